// Dot products of a few int8 tokens with rows of a regular 4-bit matrix whose code book is int8 too.
//
// x is rounded by blocks of the matrix: x8 = rint(x / absmax * 127), and so is the code book, by its largest value: a
// block's products are summed as whole numbers, which int32 holds for blocks up to 2^17, and enter the total with one
// multiply-add. A unit is 32 elements, 16 packed bytes; x8 stands with a unit's 16
// even elements first, as its high nibbles come.
#pragma once

#include "decode4.h"

namespace deftcore::cpu {
namespace {

constexpr int64_t kUnit = 32;
constexpr int64_t kDot8Rows = 4;    // rows per group
constexpr int64_t kDot8Tokens = 2;  // tokens per pass over a group

// The code book rounded to int8, and what one of its steps is worth.
struct Book8 {
  alignas(16) int8_t code[16];
  float step;
  explicit Book8(const float* book) {
    float largest = 0.0f;
    for (int i = 0; i < 16; ++i) largest = std::max(largest, std::fabs(book[i]));
    for (int i = 0; i < 16; ++i) {
      code[i] = static_cast<int8_t>(largest > 0 ? std::nearbyint(book[i] / largest * 127.0f) : 0.0f);
    }
    step = largest / 127.0f;
  }
};

// One token's blocks of x as int8 in units, and what a step of a block is worth.
template <class T>
void to_int8(const T* x, int64_t cols, int64_t block, int8_t* out, float* steps) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest whole number, ties to even
  for (int64_t begin = 0; begin < cols; begin += block) {
    Vec largest(0.0f);
    for (int64_t i = 0; i < block; i += kWidth) largest = at_least(abs(load(x + begin + i)), largest);
    const float absmax = reduce_max(largest);
    steps[begin / block] = absmax / 127.0f;
    const Vec divisor(absmax > 0 ? absmax : 1.0f);
    for (int64_t unit = begin; unit < begin + block; unit += kUnit) {
      float whole[kUnit];
      for (int64_t i = 0; i < kUnit; i += kWidth) {
        store(whole + i, load(x + unit + i) / divisor * Vec(127.0f) + Vec(kRound) - Vec(kRound));
      }
      for (int64_t i = 0; i < kUnit / 2; ++i) {
        out[unit + i] = static_cast<int8_t>(whole[2 * i]);
        out[unit + kUnit / 2 + i] = static_cast<int8_t>(whole[2 * i + 1]);
      }
    }
  }
}

#if defined(__AVX2__)

// Eight lanes: units are narrow enough for every block, also where vectors of floats are wider.
struct Lookup8 {
  __m256i table;
  explicit Lookup8(const Book8& book)
      : table(_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(book.code)))) {}
  __m256i operator()(const uint8_t* packed) const {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
    const __m256i both = _mm256_set_m128i(low, _mm_srli_epi16(low, 4));
    return _mm256_shuffle_epi8(table, _mm256_and_si256(both, _mm256_set1_epi8(15)));
  }
};
using Input8 = __m256i;
using Whole8 = __m256i;
inline Input8 load_unit(const int8_t* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }
inline Whole8 no_sum8() { return _mm256_setzero_si256(); }
// Pairs are at most 2 * 127 * 127 = 32258: the 16-bit sums do not saturate.
inline Whole8 multiply(Input8 x, __m256i codes, Whole8 sum) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(codes, x));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
struct Total8 {
  __m256 v = _mm256_setzero_ps();
  void add(Whole8 sum, float scale) { v = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_set1_ps(scale), v); }
  float sum() const {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
  }
};

#else

struct Lookup8 {
  const int8_t* code;
  explicit Lookup8(const Book8& book) : code(book.code) {}
  struct Codes {
    const int8_t* code;
    const uint8_t* packed;
  };
  Codes operator()(const uint8_t* packed) const { return {code, packed}; }
};
using Input8 = const int8_t*;
using Whole8 = int32_t;
inline Input8 load_unit(const int8_t* x) { return x; }
inline Whole8 no_sum8() { return 0; }
inline Whole8 multiply(Input8 x, Lookup8::Codes w, Whole8 sum) {
  for (int64_t i = 0; i < kUnit / 2; ++i) {
    sum += x[i] * w.code[w.packed[i] >> 4] + x[kUnit / 2 + i] * w.code[w.packed[i] & 15];
  }
  return sum;
}
struct Total8 {
  float v = 0.0f;
  void add(Whole8 sum, float scale) { v += static_cast<float>(sum) * scale; }
  float sum() const { return v; }
};

#endif

// Tokens as `to_int8` makes them.
struct Int8Tokens {
  int8_t* x;     // [tokens, cols]
  float* steps;  // [tokens, cols / block_size]
  int64_t tokens;
};

// out[r][m] = x[m] . row r.
template <int kTokens>
void dot8_tile(const Quant4& q, const Lookup8& look_up, float step, const uint8_t* const* rows, const float* scales,
               const int8_t* x, const float* steps, float (*out)[kDot8Tokens]) {
  const int64_t blocks = q.cols / q.block_size, stride = row_scale_size(q);
  Total8 total[kDot8Rows][kTokens];
  for (int64_t b = 0; b < blocks; ++b) {
    Whole8 sums[kDot8Rows][kTokens];
    for (auto& row : sums) {
      for (Whole8& sum : row) sum = no_sum8();
    }
    for (int64_t i = b * q.block_size; i < (b + 1) * q.block_size; i += kUnit) {
      Input8 units[kTokens];
      for (int m = 0; m < kTokens; ++m) units[m] = load_unit(x + m * q.cols + i);
      for (int r = 0; r < kDot8Rows; ++r) {
        const auto codes = look_up(rows[r] + i / 2);
        for (int m = 0; m < kTokens; ++m) sums[r][m] = multiply(units[m], codes, sums[r][m]);
      }
    }
    for (int m = 0; m < kTokens; ++m) {
      const float worth = steps[m * blocks + b] * step;
      for (int r = 0; r < kDot8Rows; ++r) total[r][m].add(sums[r][m], worth * scales[r * stride + b]);
    }
  }
  for (int r = 0; r < kDot8Rows; ++r) {
    for (int m = 0; m < kTokens; ++m) out[r][m] = total[r][m].sum();
  }
}

// Calls sink(n, m, x[m] . row n) for rows n in range and every token. `scales` holds kDot8Rows row_scale_size(q).
template <class Sink>
void dots8(const Quant4& q, const Book8& book, Range range, const Int8Tokens& x, float* scales, Sink&& sink) {
  const Lookup8 look_up(book);
  const int64_t last = range.end - 1, blocks = q.cols / q.block_size;
  for (int64_t n = range.begin; n < range.end; n += kDot8Rows) {
    const uint8_t* rows[kDot8Rows];
    for (int64_t r = 0; r < kDot8Rows; ++r) {  // past the end: repeat the last row, drop its result
      const int64_t row = std::min(n + r, last);
      rows[r] = packed_row(q, row);
      decode_row_scales(q, row, 0, q.cols, scales + r * row_scale_size(q));
    }
    for (int64_t m = 0; m < x.tokens; m += kDot8Tokens) {
      float out[kDot8Rows][kDot8Tokens];
      const int64_t count = std::min(kDot8Tokens, x.tokens - m);
      (count == 1 ? dot8_tile<1> : dot8_tile<kDot8Tokens>)(q, look_up, book.step, rows, scales, x.x + m * q.cols,
                                                           x.steps + m * blocks, out);
      for (int64_t r = 0; r < kDot8Rows && n + r <= last; ++r) {
        for (int64_t i = 0; i < count; ++i) sink(n + r, m + i, out[r][i]);
      }
    }
  }
}

}  // namespace
}  // namespace deftcore::cpu
