// Dot products of vectors in float, and the factor of a norm by the root of the mean square.
#pragma once

#include "isa.h"

namespace deftcore::cpu {
namespace {

inline float dot(const float* a, const float* b, int64_t n) {
  Vec sum(0.0f);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) sum = fma(load(a + i), load(b + i), sum);
  if (i < n) sum = fma(load_tail(a + i, n - i), load_tail(b + i, n - i), sum);
  return reduce_add(sum);
}

// 1 / sqrt(mean(x^2) + eps)
inline float inverse_rms(const float* x, int64_t n, float eps) {
  return 1.0f / std::sqrt(dot(x, x, n) / static_cast<float>(n) + eps);
}

}  // namespace
}  // namespace deftcore::cpu
