// Dot products of a few tokens with rows of a regular 4-bit matrix, decoded in registers: each block's codes are summed
// unscaled and enter the total with one multiply-add, so a weight costs a lookup and a product.
#pragma once

#include "decode4.h"
#include "words.h"

namespace deftcore::cpu {
namespace {

constexpr int64_t kDot4Rows = 4;    // rows per group
constexpr int64_t kDot4Tokens = 4;  // tokens per pass over a group

// How codes become words to multiply with. Floats: 8 lookups a chunk, exact code values.
template <class Word>
struct DotForm {
  static constexpr int kAtOnce = CodeBook::kAtOnce, kHeld = CodeBook::kHeld;
  CodeBook book;
  explicit DotForm(const float* code) : book(code) {}
  template <int kPart>
  void values(Words w, Vec* out) const {
    book.steps<kPart>(w, out);
  }
  // Rows of a tile: a block's sums stay in registers, beside the code book and what is looked up at once. The totals
  // are met once a block and may lie in L1.
  static constexpr int rows(int tokens) {
    int most = kDot4Rows;
    while (most > 1 && !in_registers(most * tokens, kHeld + most * kAtOnce)) most /= 2;
    return most;
  }
  static_assert(in_registers(kDot4Tokens, kHeld + kAtOnce));
};

#if defined(__AVX512BF16__)
// bfloat16 pairs: 4 lookups a chunk in 16-bit halves, and the code book rounded to bfloat16 (at most 0.32 %, the
// rounding that bfloat16 weights have). Shifting 16-bit half w by 4 j gives element 4 w + (j ^ 1).
template <>
struct DotForm<PairWord> {
  static constexpr int kAtOnce = 1, kHeld = 1;
  __m512i table;
  explicit DotForm(const float* code) {
    alignas(64) uint16_t halves[32];
    for (int i = 0; i < 32; ++i) halves[i] = to_bfloat16(code[i % 16]).bits;
    table = _mm512_load_si512(halves);
  }
  template <int kPart>
  void values(Words w, __m512bh* out) const {
    out[0] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(w, 4 * kPart), table);
  }
  static constexpr int rows(int tokens) { return tokens == 1 ? 4 : 2; }  // four met the totals too often: slower
};
#endif

template <class Word>
constexpr int kDotSteps = static_cast<int>(kChunk / Word::kLanes);  // per chunk: rows of words

// One token's x in the order in which a chunk decodes, zero beyond cols.
template <class Word, class T>
void to_positions(const T* x, int64_t cols, typename Word::Element* out) {
  for (int64_t c = 0; c < chunks_of(cols); ++c) {
    for (int64_t p = 0; p < kChunk; ++p) {
      const int64_t col = c * kChunk + kDotSteps<Word> * (p % Word::kLanes) + ((p / Word::kLanes) ^ 1);
      typename Word::Element value{};
      if (col < cols) {
        if constexpr (std::is_same_v<typename Word::Element, T>) {
          value = x[col];
        } else {
          value = to_float(x[col]);
        }
      }
      out[c * kChunk + p] = value;
    }
  }
}

// out[r][m] = x[m] . row r for kRows rows; `next` rows are prefetched alongside.
template <int kRows, int kTokens, class Word>
void dot4_tile(const DotForm<Word>& form, const Quant4& q, const LaneScales& lanes, const uint8_t* const* rows,
               const uint8_t* const* next, const float* scales, int64_t scale_stride, const typename Word::Element* x,
               int64_t x_stride, float (*out)[kDot4Tokens]) {
  using Form = DotForm<Word>;
  constexpr int kParts = kDotSteps<Word> / Form::kAtOnce;
  const int shift = block_shift(q);
  Vec total[kRows][kTokens];
  for (auto& row : total) {
    for (Vec& v : row) v = Vec(0.0f);
  }
  const auto chunk = [&](int64_t c, auto fetch) {
    Words w[kRows];
    Vec part[kRows][kTokens];
    for (int r = 0; r < kRows; ++r) {
      w[r] = fetch(rows[r] + c * (kChunk / 2));
      for (Vec& v : part[r]) v = Vec(0.0f);
    }
    const auto* xc = x + c * kChunk;
    const auto look_up = [&](auto p) {
      if constexpr (p() < kParts) {
        typename Word::Row values[kRows][Form::kAtOnce];
        for (int r = 0; r < kRows; ++r) form.template values<p()>(w[r], values[r]);
        for (int i = 0; i < Form::kAtOnce; ++i) {
          const int step = p() + i * kParts;
          for (int r = 0; r < kRows; ++r) {
            for (int m = 0; m < kTokens; ++m) {
              part[r][m] =
                  Word::multiply(values[r][i], Word::load(xc + m * x_stride + step * Word::kLanes), part[r][m]);
            }
          }
        }
      }
    };
    look_up(std::integral_constant<int, 0>{});
    look_up(std::integral_constant<int, 1>{});
    look_up(std::integral_constant<int, 2>{});
    look_up(std::integral_constant<int, 3>{});
    look_up(std::integral_constant<int, 4>{});
    look_up(std::integral_constant<int, 5>{});
    look_up(std::integral_constant<int, 6>{});
    look_up(std::integral_constant<int, 7>{});
    for (int r = 0; r < kRows; ++r) {
      const Vec scale = lanes(scales + r * scale_stride + (c * kChunk >> shift));
      for (int m = 0; m < kTokens; ++m) total[r][m] = fma(part[r][m], scale, total[r][m]);
    }
  };
  const int64_t whole = q.cols / kChunk, left = q.cols % kChunk / 2;
  for (int64_t c = 0; c < whole; ++c) {
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(next[r] + c * (kChunk / 2), 0, 2);
    chunk(c, [](const uint8_t* p) { return load_words(p); });
  }
  if (left > 0) chunk(whole, [&](const uint8_t* p) { return load_words(p, left); });
  for (int r = 0; r < kRows; ++r) {
    for (int m = 0; m < kTokens; ++m) out[r][m] = reduce_add(total[r][m]);
  }
}

// Calls sink(k, m, x[m] . row row_of(k)) for k in range and every token; row_of rises. `scales` holds kDot4Rows
// row_scale_size(q).
template <class Word, class RowOf, class Sink>
void dots4(const Quant4& q, RowOf&& row_of, Range range, const typename Word::Element* x, int64_t x_stride,
           int64_t tokens, float* scales, Sink&& sink) {
  const DotForm<Word> form(q.code);
  const LaneScales lanes(q.block_size);
  const int64_t last = range.end - 1, scale_stride = row_scale_size(q), leap = rows_ahead(q.cols / 2, kDot4Rows);
  for (int64_t k = range.begin; k < range.end; k += kDot4Rows) {
    const uint8_t *rows[kDot4Rows], *next[kDot4Rows];
    for (int64_t r = 0; r < kDot4Rows; ++r) {  // past the end: repeat the last row, drop its result
      const int64_t row = row_of(k + r < last ? k + r : last), ahead = k + r + leap;
      rows[r] = packed_row(q, row);
      next[r] = packed_row(q, row_of(ahead < last ? ahead : last));
    }
    decode_rows_scales(q, row_of, k, std::min(kDot4Rows, range.end - k), scales);
    for (int64_t m0 = 0; m0 < tokens; m0 += kDot4Tokens) {
      float out[kDot4Rows][kDot4Tokens];
      const auto tile = [&](auto row_count, auto count) {
        for (int r = 0; r < kDot4Rows; r += row_count()) {
          dot4_tile<row_count(), count()>(form, q, lanes, rows + r, (m0 == 0 ? next : rows) + r,
                                          scales + r * scale_stride, scale_stride, x + m0 * x_stride, x_stride,
                                          out + r);
        }
        for (int64_t r = 0; r < kDot4Rows && k + r <= last; ++r) {
          for (int m = 0; m < count(); ++m) sink(k + r, m0 + m, out[r][m]);
        }
      };
      using std::integral_constant;
      constexpr auto rows_of = DotForm<Word>::rows;
      switch (tokens - m0) {
        case 1: tile(integral_constant<int, rows_of(1)>{}, integral_constant<int, 1>{}); break;
        case 2: tile(integral_constant<int, rows_of(2)>{}, integral_constant<int, 2>{}); break;
        case 3: tile(integral_constant<int, rows_of(3)>{}, integral_constant<int, 3>{}); break;
        default: tile(integral_constant<int, rows_of(4)>{}, integral_constant<int, 4>{}); break;
      }
    }
  }
}

}  // namespace
}  // namespace deftcore::cpu
