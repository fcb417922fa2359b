// What one multiply-add takes of its two operands: a float; or, where the instruction set has it for bfloat16, a pair
// of neighbours along the sum, whose two products are added at once. Every product is written over one of the two.
#pragma once

#include "isa.h"

namespace deftcore::cpu {
namespace {

struct FloatWord {
  using Type = float;
  using Element = float;  // of an operand that was put into words
  using Row = Vec;        // kWidth words
  static constexpr int kElements = 1;
  static constexpr int kLanes = kWidth;  // elements of a row

  template <class T>
  static Row load(const T* p) {
    return cpu::load(p);
  }
  template <class T>
  static Row load_tail(const T* p, int64_t n) {
    return cpu::load_tail(p, n);
  }
  static Row broadcast(const float* word) { return Vec(*word); }
  static Vec multiply(Row a, Row b, Vec sum) { return fma(a, b, sum); }
};

#if defined(__AVX512BF16__)

struct PairWord {
  using Type = uint32_t;  // the earlier element in the low half
  using Element = BFloat16;
  using Row = __m512bh;
  static constexpr int kElements = 2;
  static constexpr int kLanes = 2 * kWidth;

  static Row load(const void* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Row load_tail(const BFloat16* p, int64_t n) { return (__m512bh)_mm512_maskz_loadu_epi16((1u << n) - 1, p); }
  static Row broadcast(const uint32_t* word) { return (__m512bh)_mm512_set1_epi32(static_cast<int>(*word)); }
  static Vec multiply(Row a, Row b, Vec sum) { return _mm512_dpbf16_ps(sum.v, a, b); }
};

// Words of elements that stand in two vectors, rounded to bfloat16.
inline __m512i pairs_of(Vec earlier, Vec later) {
  const auto halves = [](Vec v) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v.v)); };
  return _mm512_or_si512(halves(earlier), _mm512_slli_epi32(halves(later), 16));
}

template <class T>
using WordOf = std::conditional_t<std::is_same_v<T, BFloat16>, PairWord, FloatWord>;

#else

template <class T>
using WordOf = FloatWord;

#endif

template <class T>
constexpr bool kHasPairs = WordOf<T>::kElements == 2;

}  // namespace
}  // namespace deftcore::cpu
