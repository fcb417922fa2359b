// Decays of the scans: 2^x, of which a scan takes one per state and step.
#pragma once

#include "isa.h"

namespace deftcore::cpu {
namespace {

constexpr float kLog2E = 1.44269504088896341f;

// 2^x. 1 at 0 exactly and never above 1 for x <= 0 (the constant term is 1, so that long memories cannot grow); 2 ulp
// for |x| <= 1.44; 0 below -150, infinity from 128. Coefficients from the specification of the scan. AVX2 scales by
// adding to the exponent's bits, which only normal numbers bear: 0 below -126.
#if defined(DEFTCORE_LANES)
inline Vec exp2_decay(Vec x) {
  return lanes_of([&](int i) { return exp2f(x.v[i]); });
}
#elif defined(DEFTCORE_VECTORS)
inline Vec exp2_near_zero(Vec x) {
  return horner(x, 1.0f, 0.693147203f, 0.240226479f, 0.0555033247f, 9.61843736e-3f, 1.33988747e-3f, 1.53533612e-4f);
}
#if defined(__AVX512F__)
inline Vec exp2_decay(Vec x) {
  const Vec n = round(x), f = _mm512_reduce_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);  // 0 at infinity
  return scale2(exp2_near_zero(f), n);
}
#elif defined(__AVX2__)
inline Vec exp2_decay(Vec x) {
  const Vec held = at_most(x, Vec(128.0f));
  const __m256i n = _mm256_cvtps_epi32(held.v);
  const Vec p = exp2_near_zero(held - Vec(_mm256_cvtepi32_ps(n)));
  const __m256i scaled = _mm256_add_epi32(_mm256_castps_si256(p.v), _mm256_slli_epi32(n, 23));
  return _mm256_andnot_ps((x < Vec(-126.0f)).m, _mm256_castsi256_ps(scaled));
}
#else
inline Vec exp2_decay(Vec x) {
  const Vec held = at_most(at_least(x, Vec(-151.0f)), Vec(128.0f)), n = round(held);
  return scale2(exp2_near_zero(held - n), n);
}
#endif
#else
inline Vec exp2_decay(Vec x) { return exp2f(x); }
#endif

// Of step s and rate a, log2 e in it.
struct AnyDecay {
  Vec operator()(Vec s, Vec a) const { return exp2_decay(s * a); }
};

// The same where |s a| is at most kSmallExponent, or NaN: nothing to clamp. Adding a number so large that its last bits
// are worth 1, or 1/8, leaves the rounded exponent in them; the product itself is never rounded.
constexpr float kSmallExponent = 125.0f;
#if defined(__AVX2__) && !defined(__AVX512F__)
// Rounded to eighths, whose powers are looked up: a polynomial of degree 3 does for what is left (relative error below
// 3e-8). The table's entries lack their own index's share of the exponent, so that one shift and one addition do.
constexpr float kRoundsToEighths = 1572864.0f;  // 1.5 * 2^20
struct SmallDecay {
  __m256i table;
  SmallDecay() {
    const float powers[8] = {1.0f,        1.09050773f, 1.18920712f, 1.29683955f,
                             1.41421356f, 1.54221083f, 1.68179283f, 1.83400809f};
    table = _mm256_sub_epi32(_mm256_castps_si256(_mm256_loadu_ps(powers)),
                             _mm256_slli_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), 20));
  }
  // 2^(n / 8 + left), where `moved` is n / 8 on top of kRoundsToEighths.
  Vec power(Vec moved, Vec left) const {
    const __m256i eighths = _mm256_castps_si256(moved.v);
    const __m256i whole = _mm256_add_epi32(_mm256_permutevar8x32_epi32(table, eighths), _mm256_slli_epi32(eighths, 20));
    return Vec(_mm256_castsi256_ps(whole)) * horner(left, 1.0f, 0.693147242f, 0.240257636f, 0.0554962195f);
  }
  Vec operator()(Vec s, Vec a) const {
    const Vec large(kRoundsToEighths), moved = fma(s, a, large);
    return power(moved, fma(s, a, large - moved));
  }
};
// e^-|x| of the same parts, with log2 e in two. Its exponent is raised by 32 until the end, for numbers below the
// smallest normal one.
inline Vec exp_minus_abs(Vec x) {
  const SmallDecay decay;
  const Vec size = abs(x), rate(-kLog2E), large(kRoundsToEighths + 32.0f), moved = fma(size, rate, large);
  const Vec power = decay.power(moved, fma(size, Vec(-1.92596303e-8f), fma(size, rate, large - moved)));
  return Vec(_mm256_andnot_ps((size > Vec(109.0f)).m, power.v)) * Vec(0x1p-32f);
}
#elif defined(DEFTCORE_NEON)
struct SmallDecay {
  Vec operator()(Vec s, Vec a) const {
    const Vec large(12582912.0f), moved = fma(s, a, large);  // 1.5 * 2^23
    const Vec left = vnegq_f32(vfmsq_f32((moved - large).v, s.v, a.v));
    const int32x4_t power = vaddq_s32(vshlq_n_s32(vreinterpretq_s32_f32(moved.v), 23), vdupq_n_s32(127 << 23));
    return Vec(vreinterpretq_f32_s32(power)) * exp2_near_zero(left);
  }
};
#else
using SmallDecay = AnyDecay;  // scales and rounds without bounds, at no cost
#endif
#if !defined(__AVX2__) || defined(__AVX512F__)
inline Vec exp_minus_abs(Vec x) { return exp(Vec(0.0f) - abs(x)); }
#endif

// fn(decay) for exponents that are at most `largest` in every lane.
template <class Fn>
inline void with_decay(Vec largest, Fn&& fn) {
  if constexpr (!std::is_same_v<SmallDecay, AnyDecay>) {
    if (bits_of(largest <= Vec(kSmallExponent)) == (1u << kWidth) - 1) return fn(SmallDecay());
  }
  fn(AnyDecay());
}

}  // namespace
}  // namespace deftcore::cpu
