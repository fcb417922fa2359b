// What a CPU kernel file sees of the instruction set. Each kernel file is compiled once per level with
// DEFTCORE_ISA set; Vec hides the width, and everything stands in an anonymous namespace so that the linker
// cannot merge the levels.
#pragma once

#include <cmath>
#include <cstring>

#include "deftcore/math.h"
#include "kernels.h"
#include "threads.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(DEFTCORE_NEON)
#include <arm_neon.h>
#endif
#if defined(__AVX512F__) || defined(__AVX2__) || defined(DEFTCORE_NEON) || defined(DEFTCORE_LANES)
#define DEFTCORE_VECTORS  // of more than one lane
#endif

namespace deftcore::cpu {
namespace {

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 h) {
  const uint32_t bits = static_cast<uint32_t>(h.bits) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
#if defined(__F16C__)
inline float to_float(Float16 h) { return _cvtsh_ss(h.bits); }
#else
inline float to_float(Float16 h) {
  const uint32_t sign = (h.bits & 0x8000u) << 16, exponent = (h.bits >> 10) & 31, fraction = h.bits & 0x3ff;
  uint32_t bits;
  float x;
  if (exponent == 0) {  // zero and subnormals: fraction * 2^-24 is exact
    x = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &x, 4);
    bits |= sign;
  } else {
    bits = sign | ((exponent == 31 ? 255u : exponent + 112) << 23) | (fraction << 13);
  }
  std::memcpy(&x, &bits, 4);
  return x;
}
#endif
inline BFloat16 to_bfloat16(float x) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = x != x ? bits | 0x400000u : bits + 0x7fff + ((bits >> 16) & 1);
  return {static_cast<uint16_t>(bits >> 16)};
}

inline Float16 to_float16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00u;
  } else if (bits >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (bits < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the fraction, rounded, in the low bits
    const float magic = fabsf(x) + 0.5f;
    std::memcpy(&half, &magic, 4);
    half -= 0x3f000000u;
  } else {
    half = (bits + 0xfff + ((bits >> 13) & 1) - 0x38000000u) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

#if defined(__AVX512F__)

constexpr int kWidth = 16;
constexpr int kRegisters = 32;  // of vectors
using Mask = __mmask16;

struct Vec {
  __m512 v;
  Vec() = default;
  Vec(__m512 x) : v(x) {}
  explicit Vec(float x) : v(_mm512_set1_ps(x)) {}
};
inline Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
inline Mask operator>(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
inline Mask operator<(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline Mask operator<=(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ); }
inline Mask operator==(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
inline Vec where(Mask m, Vec a, Vec b) { return _mm512_mask_blend_ps(m, b.v, a.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
// min and max return their second operand when one is NaN.
inline Vec at_most(Vec x, Vec bound) { return _mm512_min_ps(bound.v, x.v); }
inline Vec at_least(Vec x, Vec bound) { return _mm512_max_ps(bound.v, x.v); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a.v); }
inline Vec sqrt(Vec a) { return _mm512_sqrt_ps(a.v); }
inline Vec round(Vec a) { return _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec scale2(Vec a, Vec n) { return _mm512_scalef_ps(a.v, n.v); }
inline Vec rcp(Vec a) {  // 14-bit estimate and one Newton step: relative error below 2^-27
  const __m512 r = _mm512_rcp14_ps(a.v);
  return _mm512_mul_ps(r, _mm512_fnmadd_ps(a.v, r, _mm512_set1_ps(2.0f)));
}
inline float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
inline uint32_t bits_of(Mask m) { return m; }
// Bit i set where !(|a| <= tau): NaN counts as active.
inline uint32_t active_bits(Vec a, Vec tau) { return _mm512_cmp_ps_mask(abs(a).v, tau.v, _CMP_NLE_UQ); }

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec expand_bfloat16(__m256i h) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16)); }
inline Vec load(const BFloat16* p) { return expand_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load(const Float16* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline __m256i narrow(Vec a) {  // as to_bfloat16
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const Mask nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
#if defined(__AVX512BF16__)
inline void store(BFloat16* p, Vec a) {  // subnormal results, below 1.2e-38, become zero
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a.v));
}
#else
inline void store(BFloat16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
#endif
inline void store_ieee(BFloat16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a)); }
inline void store(Float16* p, Vec a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
// For values that came from T and were not changed in their low bits: no rounding to do.
inline void store_exact(BFloat16* p, Vec a) {
  const __m512i high = _mm512_srli_epi32(_mm512_castps_si512(a.v), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
}
// Writes base + i for each set bit, in order. May write up to kWidth entries past the last.
inline void compress(int32_t* out, uint32_t bits, int32_t base) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_add_epi32(lane, _mm512_set1_epi32(base));
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(static_cast<Mask>(bits), index));
}

#elif defined(__AVX2__)

constexpr int kWidth = 8;
constexpr int kRegisters = 16;

struct Vec {
  __m256 v;
  Vec() = default;
  Vec(__m256 x) : v(x) {}
  explicit Vec(float x) : v(_mm256_set1_ps(x)) {}
};
struct Mask {
  __m256 m;
};
inline Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
inline Mask operator>(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
inline Mask operator<(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
inline Mask operator<=(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
inline Mask operator==(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
inline Vec where(Mask m, Vec a, Vec b) { return _mm256_blendv_ps(b.v, a.v, m.m); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
// min and max return their second operand when one is NaN.
inline Vec at_most(Vec x, Vec bound) { return _mm256_min_ps(bound.v, x.v); }
inline Vec at_least(Vec x, Vec bound) { return _mm256_max_ps(bound.v, x.v); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
inline Vec sqrt(Vec a) { return _mm256_sqrt_ps(a.v); }
inline Vec round(Vec a) { return _mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Vec scale2(Vec a, Vec n) {  // |n| <= 252, in two halves so that neither factor leaves the normal range
  const __m256i k = _mm256_cvtps_epi32(n.v), half = _mm256_srai_epi32(k, 1), bias = _mm256_set1_epi32(127);
  const auto pow2 = [&](__m256i e) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, bias), 23)); };
  return _mm256_mul_ps(_mm256_mul_ps(a.v, pow2(half)), pow2(_mm256_sub_epi32(k, half)));
}
inline Vec rcp(Vec a) { return _mm256_div_ps(_mm256_set1_ps(1.0f), a.v); }
inline float reduce_add(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float reduce_max(Vec a) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
}
inline uint32_t bits_of(Mask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m.m)); }
inline uint32_t active_bits(Vec a, Vec tau) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(abs(a).v, tau.v, _CMP_NLE_UQ)));
}

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec expand_bfloat16(__m128i h) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16)); }
inline Vec load(const BFloat16* p) { return expand_bfloat16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline Vec load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(BFloat16* p, Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), nan);
  rounded = _mm256_srli_epi32(rounded, 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store(Float16* p, Vec a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
// Of each set of eight bits the places of those that are set, a byte each.
struct SetBits {
  uint64_t places[256];
  constexpr SetBits() : places() {
    for (int bits = 0; bits < 256; ++bits) {
      for (int bit = 0, found = 0; bit < 8; ++bit) {
        if (bits >> bit & 1) places[bits] |= static_cast<uint64_t>(bit) << 8 * found++;
      }
    }
  }
};
inline void compress(int32_t* out, uint32_t bits, int32_t base) {
  static constexpr SetBits kSet;
  const __m256i lanes = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(kSet.places[bits])));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_add_epi32(lanes, _mm256_set1_epi32(base)));
}

#elif defined(DEFTCORE_NEON)

#include "neon.h"

#elif defined(DEFTCORE_LANES)

#include "lanes.h"

#else

constexpr int kWidth = 1;
constexpr int kRegisters = 16;
using Mask = bool;
using Vec = float;
using math::abs;
using math::at_least;
using math::at_most;
using math::exp;
using math::normal_cdf;
using math::rcp;
using math::sqrt;
using math::tanh;
using math::where;
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline float reduce_add(Vec a) { return a; }
inline float reduce_max(Vec a) { return a; }
inline uint32_t bits_of(Mask m) { return m; }
inline uint32_t active_bits(Vec a, Vec tau) { return !(fabsf(a) <= tau); }

inline Vec load(const float* p) { return *p; }
inline Vec load(const BFloat16* p) { return to_float(*p); }
inline Vec load(const Float16* p) { return to_float(*p); }
inline void store(float* p, Vec a) { *p = a; }
inline void store(BFloat16* p, Vec a) { *p = to_bfloat16(a); }
inline void store(Float16* p, Vec a) { *p = to_float16(a); }
inline void compress(int32_t* out, uint32_t bits, int32_t base) {
  if (bits) *out = base;
}

#endif

// `store` that keeps subnormal results at every level.
template <class T>
inline void store_ieee(T* p, Vec a) {
  store(p, a);
}

// Tails: n < kWidth elements, zero beyond.
template <class T>
inline Vec load_tail(const T* p, int64_t n) {
  T buffer[kWidth];
  std::memset(buffer, 0, sizeof(buffer));
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return load(buffer);
}
template <class T>
inline void store_tail(T* p, Vec a, int64_t n) {
  T buffer[kWidth];
  store(buffer, a);
  std::memcpy(p, buffer, static_cast<size_t>(n) * sizeof(T));
}

#if defined(DEFTCORE_VECTORS)

inline Vec polynomial(Vec x, Vec c) {
  (void)x;
  return c;
}
// c0 + x (c1 + x (c2 + ...)), lowest power first.
template <class... C>
inline Vec polynomial(Vec x, Vec c0, C... rest) {
  return fma(x, polynomial(x, rest...), c0);
}
template <class... C>
inline Vec horner(Vec x, C... c) {
  return polynomial(x, Vec(static_cast<float>(c))...);
}

// e^x = 2^n e^r, |r| <= ln 2 / 2. Relative error below 2 ulp; 0 below -104, infinity above 88.72; NaN stays.
inline Vec exp(Vec x) {
  const Vec clamped = at_most(at_least(x, Vec(-104.0f)), Vec(89.0f));
  const Vec n = round(clamped * Vec(1.44269504088896341f));
  Vec r = fma(n, Vec(-0.693359375f), clamped);
  r = fma(n, Vec(2.12194440e-4f), r);
  const Vec p = horner(r, 1.0f, 1.0f, 0.49999992f, 0.1666642f, 0.04166823f, 0.00837482f, 0.00138368f);
  return scale2(p, n);
}

// Standard normal distribution function and bell = e^{-z^2 / 2}. With y = |z|: cdf(-y) = bell Q(1 / (y + 2.5)),
// relative error below 4e-7 on [0, 15], beyond which bell is 0. Coefficients from a Lawson-weighted least-squares fit.
inline Vec normal_cdf(Vec z, Vec& bell) {
  const Vec t = rcp(at_most(abs(z), Vec(15.0f)) + Vec(2.5f));
  const Vec q = horner(t, -1.06350568e-5f, 0.399688126f, 0.975259509f, 2.45636959f, -0.351638837f, 23.9481929f,
                       -89.8159016f, 120.487741f, -59.2994117f);
  bell = exp(z * z * Vec(-0.5f));
  const Vec tail = bell * q;
  return where(z < Vec(0.0f), tail, Vec(1.0f) - tail);
}

inline Vec tanh(Vec x) {
  const Vec ax = at_most(abs(x), Vec(10.0f)), x2 = x * x, one(1.0f);
  const Vec small = x * horner(x2, 1.0f, -0.33333252f, 0.13330932f, -0.05370532f, 0.02053994f, -0.00560274f);
  const Vec large = one - Vec(2.0f) * rcp(exp(ax + ax) + one);
  return where(ax < Vec(0.6f), small, where(x < Vec(0.0f), Vec(0.0f) - large, large));
}

#endif

template <class T>
inline void store_exact(T* p, Vec a) {
  store(p, a);
}

// Whether a tile's sums stay in registers beside what one of its steps holds: every kernel that keeps a tile of sums
// picks its size by this, or checks it.
constexpr bool in_registers(int sums, int operands) { return sums + operands <= kRegisters; }

// Run-time value to compile-time constant.
template <class Fn>
inline void dispatch_dtype(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kFloat32: return fn(float{});
    case DType::kBFloat16: return fn(BFloat16{});
    case DType::kFloat16: return fn(Float16{});
  }
}

}  // namespace
}  // namespace deftcore::cpu
