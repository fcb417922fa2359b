// kWidth vectors turned in registers: lane j of vector i and lane i of vector j change places.
#pragma once

#include "isa.h"

namespace deftcore::cpu {
namespace {

#if defined(__AVX512F__)

inline void transpose(Vec* rows) {
  __m512 pairs[16], quads[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_ps(rows[i].v, rows[i + 1].v);
    pairs[i + 1] = _mm512_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  const auto low = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  const auto high = [](__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  };
  for (int i = 0; i < 16; i += 4) {  // quads[i + k]: column 4 l + k of four rows in part l
    quads[i] = low(pairs[i], pairs[i + 2]);
    quads[i + 1] = high(pairs[i], pairs[i + 2]);
    quads[i + 2] = low(pairs[i + 1], pairs[i + 3]);
    quads[i + 3] = high(pairs[i + 1], pairs[i + 3]);
  }
  for (int k = 0; k < 4; ++k) {
    const __m512 a = _mm512_shuffle_f32x4(quads[k], quads[k + 4], 0x88);  // parts 0 and 2 of both
    const __m512 b = _mm512_shuffle_f32x4(quads[k], quads[k + 4], 0xdd);  // parts 1 and 3
    const __m512 c = _mm512_shuffle_f32x4(quads[k + 8], quads[k + 12], 0x88);
    const __m512 d = _mm512_shuffle_f32x4(quads[k + 8], quads[k + 12], 0xdd);
    rows[k] = _mm512_shuffle_f32x4(a, c, 0x88);
    rows[k + 4] = _mm512_shuffle_f32x4(b, d, 0x88);
    rows[k + 8] = _mm512_shuffle_f32x4(a, c, 0xdd);
    rows[k + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

#elif defined(__AVX2__)

inline void transpose(Vec* rows) {
  __m256 pairs[8], quads[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i].v, rows[i + 1].v);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i].v, rows[i + 1].v);
  }
  for (int i = 0; i < 8; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int k = 0; k < 4; ++k) {
    rows[k] = _mm256_permute2f128_ps(quads[k], quads[k + 4], 0x20);
    rows[k + 4] = _mm256_permute2f128_ps(quads[k], quads[k + 4], 0x31);
  }
}

#elif defined(DEFTCORE_NEON)

inline void transpose(Vec* rows) {
  const auto wide = [](float32x4_t v) { return vreinterpretq_f64_f32(v); };
  const auto narrow = [](float64x2_t v) { return Vec(vreinterpretq_f32_f64(v)); };
  const float64x2_t even = wide(vtrn1q_f32(rows[0].v, rows[1].v)), odd = wide(vtrn2q_f32(rows[0].v, rows[1].v));
  const float64x2_t even2 = wide(vtrn1q_f32(rows[2].v, rows[3].v)), odd2 = wide(vtrn2q_f32(rows[2].v, rows[3].v));
  rows[0] = narrow(vtrn1q_f64(even, even2));
  rows[1] = narrow(vtrn1q_f64(odd, odd2));
  rows[2] = narrow(vtrn2q_f64(even, even2));
  rows[3] = narrow(vtrn2q_f64(odd, odd2));
}

#elif defined(DEFTCORE_LANES)

inline void transpose(Vec* rows) {
  for (int i = 0; i < kWidth; ++i) {
    for (int j = 0; j < i; ++j) std::swap(rows[i].v[j], rows[j].v[i]);
  }
}

#else

inline void transpose(Vec*) {}

#endif

}  // namespace
}  // namespace deftcore::cpu
