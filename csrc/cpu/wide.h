// Vectors of double, for sums that must keep their digits: half as many lanes as Vec has.
#pragma once

#include "isa.h"

namespace deftcore::cpu {
namespace {

#if defined(__AVX512F__)

constexpr int kWide = 8;
struct Wide {
  __m512d v;
  Wide() = default;
  Wide(__m512d x) : v(x) {}
  explicit Wide(double x) : v(_mm512_set1_pd(x)) {}
};
inline Wide fma(Wide a, Wide b, Wide c) { return _mm512_fmadd_pd(a.v, b.v, c.v); }
inline double reduce_add(Wide a) { return _mm512_reduce_add_pd(a.v); }
inline Wide load_wide(const double* p) { return _mm512_loadu_pd(p); }
inline Wide load_wide(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
inline Wide load_wide(const BFloat16* p) {
  const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_cvtps_pd(_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)));
}
inline void store(double* p, Wide a) { _mm512_storeu_pd(p, a.v); }
inline void store(float* p, Wide a) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(a.v)); }

#elif defined(__AVX2__)

constexpr int kWide = 4;
struct Wide {
  __m256d v;
  Wide() = default;
  Wide(__m256d x) : v(x) {}
  explicit Wide(double x) : v(_mm256_set1_pd(x)) {}
};
inline Wide fma(Wide a, Wide b, Wide c) { return _mm256_fmadd_pd(a.v, b.v, c.v); }
inline double reduce_add(Wide a) {
  const __m128d half = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)));
}
inline Wide load_wide(const double* p) { return _mm256_loadu_pd(p); }
inline Wide load_wide(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
inline Wide load_wide(const BFloat16* p) {
  const __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(bits, 16)));
}
inline void store(double* p, Wide a) { _mm256_storeu_pd(p, a.v); }
inline void store(float* p, Wide a) { _mm_storeu_ps(p, _mm256_cvtpd_ps(a.v)); }

#elif defined(DEFTCORE_NEON)

constexpr int kWide = 2;
struct Wide {
  float64x2_t v;
  Wide() = default;
  Wide(float64x2_t x) : v(x) {}
  explicit Wide(double x) : v(vdupq_n_f64(x)) {}
};
inline Wide fma(Wide a, Wide b, Wide c) { return vfmaq_f64(c.v, a.v, b.v); }
inline double reduce_add(Wide a) { return vaddvq_f64(a.v); }
inline Wide load_wide(const double* p) { return vld1q_f64(p); }
inline Wide load_wide(const float* p) { return vcvt_f64_f32(vld1_f32(p)); }
inline Wide load_wide(const BFloat16* p) {
  const float both[2] = {to_float(p[0]), to_float(p[1])};
  return load_wide(both);
}
inline void store(double* p, Wide a) { vst1q_f64(p, a.v); }
inline void store(float* p, Wide a) { vst1_f32(p, vcvt_f32_f64(a.v)); }

#elif defined(DEFTCORE_LANES)

constexpr int kWide = kWidth / 2;
struct Wide {
  double v[kWide];
  Wide() = default;
  explicit Wide(double x) {
    for (double& lane : v) lane = x;
  }
};
inline Wide fma(Wide a, Wide b, Wide c) {
  for (int i = 0; i < kWide; ++i) c.v[i] = std::fma(a.v[i], b.v[i], c.v[i]);
  return c;
}
inline double reduce_add(Wide a) {
  for (int half = kWide / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  }
  return a.v[0];
}
inline Wide load_wide(const double* p) {
  Wide out;
  std::memcpy(out.v, p, sizeof(out.v));
  return out;
}
template <class T>
inline Wide load_wide(const T* p) {
  Wide out;
  for (int i = 0; i < kWide; ++i) out.v[i] = to_float(p[i]);
  return out;
}
inline void store(double* p, Wide a) { std::memcpy(p, a.v, sizeof(a.v)); }
inline void store(float* p, Wide a) {
  for (int i = 0; i < kWide; ++i) p[i] = static_cast<float>(a.v[i]);
}

#else

constexpr int kWide = 1;
using Wide = double;
inline Wide fma(Wide a, Wide b, Wide c) { return a * b + c; }
inline double reduce_add(Wide a) { return a; }
inline Wide load_wide(const double* p) { return *p; }
template <class T>
inline Wide load_wide(const T* p) {
  return to_float(*p);
}
inline void store(double* p, Wide a) { *p = a; }
inline void store(float* p, Wide a) { *p = static_cast<float>(a); }

#endif

}  // namespace
}  // namespace deftcore::cpu
