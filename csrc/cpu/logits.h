// How kernels read rows of logits.
#pragma once

#include "isa.h"

namespace deftcore::cpu {
namespace {

template <class T>
const T* row_of(const void* logits, int64_t row, int64_t stride) {
  return logits == nullptr ? nullptr : static_cast<const T*>(logits) + row * stride;
}

inline bool left_out(const uint8_t* mask, int64_t row) { return mask != nullptr && mask[row] == 0; }

// Minus infinity, which has no probability, as 0.
inline Vec finite_of(Vec x) { return where(x == Vec(-INFINITY), Vec(0.0f), x); }

// n < kWidth elements, minus infinity beyond.
template <class T>
Vec load_rest(const T* p, int64_t n) {
  float buffer[kWidth];
  for (int64_t i = 0; i < kWidth; ++i) buffer[i] = i < n ? to_float(p[i]) : -INFINITY;
  return load(buffer);
}

// fn(read) for each vector of n columns, where read(p) has the vector of an array that begins at p.
template <class Fn>
void over(int64_t n, Fn&& fn) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) fn([i](const auto* p) { return load(p + i); });
  if (i < n) fn([i, n](const auto* p) { return load_rest(p + i, n - i); });
}

}  // namespace
}  // namespace deftcore::cpu
