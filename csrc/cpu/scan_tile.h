// Reading and writing [batch, time, channel] tensors of any layout as tiles [time, kWidth]: one vector of channels per
// step. Rows of a channels-last tensor are far apart, which defeats the hardware's prefetching: each row read also asks
// for the line that the next block of channels will want.
#pragma once

#include <algorithm>

#include "isa.h"

namespace deftcore::cpu {
namespace {

constexpr int64_t kTileFloats = kScanChunk * kWidth;
constexpr size_t kAhead = 64;  // bytes

inline int64_t chunk_count(int64_t length) { return (length + kScanChunk - 1) / kScanChunk; }

constexpr float kLog2E = 1.44269504088896341f;

// 2^x for decays. 1 at 0 exactly and never above 1 for x <= 0 (the constant term is 1, so that long memories cannot
// grow); 2 ulp for |x| <= 1.44; 0 below -150, infinity from 128. Coefficients from the specification of the scan. AVX2
// scales by adding to the exponent's bits, which only normal numbers bear: 0 below -126.
#if defined(__AVX512F__) || defined(__AVX2__)
inline Vec exp2_near_zero(Vec x) {
  return horner(x, 1.0f, 0.693147203f, 0.240226479f, 0.0555033247f, 9.61843736e-3f, 1.33988747e-3f, 1.53533612e-4f);
}
#if defined(__AVX512F__)
inline Vec exp2_decay(Vec x) {
  const Vec n = round(x), f = _mm512_reduce_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);  // 0 at infinity
  return scale2(exp2_near_zero(f), n);
}
#else
inline Vec exp2_decay(Vec x) {
  const Vec held = at_most(x, Vec(128.0f));
  const __m256i n = _mm256_cvtps_epi32(held.v);
  const Vec p = exp2_near_zero(held - Vec(_mm256_cvtepi32_ps(n)));
  const __m256i scaled = _mm256_add_epi32(_mm256_castps_si256(p.v), _mm256_slli_epi32(n, 23));
  return _mm256_andnot_ps((x < Vec(-126.0f)).m, _mm256_castsi256_ps(scaled));
}
#endif
#elif defined(DEFTCORE_LANES)
inline Vec exp2_decay(Vec x) {
  return lanes_of([&](int i) { return exp2f(x.v[i]); });
}
#else
inline Vec exp2_decay(Vec x) { return exp2f(x); }
#endif

// Channels first .. first + count, at most kWidth.
struct Lanes {
  int64_t first, count;
};

template <class T>
inline Vec load_some(const T* p, int64_t count) {
  return count == kWidth ? load(p) : load_tail(p, count);
}
template <class T>
inline void store_some(T* p, Vec v, int64_t count) {
  if (count == kWidth) return store(p, v);
  store_tail(p, v, count);
}
inline void add_to(float* p, Vec v, int64_t count) { store_some(p, load_some(p, count) + v, count); }

// steps x kWidth values of a tensor as floats, lanes past the block zero.
template <class T>
void read_tile(const ScanTensor& x, int64_t batch, int64_t start, int64_t steps, Lanes lanes, float* tile) {
  const T* from = static_cast<const T*>(x.data) + batch * x.batch + start * x.time + lanes.first * x.channel;
  if (x.channel == 1) {
    for (int64_t t = 0; t < steps; ++t) {
      const T* row = from + t * x.time;
      __builtin_prefetch(row + kAhead / sizeof(T));
      store(tile + t * kWidth, load_some(row, lanes.count));
    }
    return;
  }
  if (lanes.count < kWidth) std::fill(tile, tile + steps * kWidth, 0.0f);
  for (int64_t j = 0; j < lanes.count; ++j) {
    for (int64_t t = 0; t < steps; ++t) tile[t * kWidth + j] = to_float(from[j * x.channel + t * x.time]);
  }
}

template <class T>
void write_tile(const ScanTensor& x, int64_t batch, int64_t start, int64_t steps, Lanes lanes, const float* tile) {
  T* to = static_cast<T*>(x.data) + batch * x.batch + start * x.time + lanes.first * x.channel;
  if (x.channel == 1) {
    for (int64_t t = 0; t < steps; ++t) {
      __builtin_prefetch(to + t * x.time + kAhead / sizeof(T), 1);
      store_some(to + t * x.time, load(tile + t * kWidth), lanes.count);
    }
    return;
  }
  T row[kTileFloats];
  for (int64_t t = 0; t < steps; ++t) store(row + t * kWidth, load(tile + t * kWidth));
  for (int64_t j = 0; j < lanes.count; ++j) {
    for (int64_t t = 0; t < steps; ++t) to[j * x.channel + t * x.time] = row[t * kWidth + j];
  }
}

}  // namespace
}  // namespace deftcore::cpu
