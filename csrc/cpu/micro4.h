// The innermost part of the 4-bit products of many tokens (quant4_gemm.cpp): a tile of decoded weights A, read one
// broadcast word at a time, times panels of tokens B, a vector of tokens per lane.
#pragma once

#include "decode4.h"
#include "words.h"

namespace deftcore::cpu {
namespace {

constexpr int kMaxVecs = 3;  // vectors of tokens per panel
constexpr int kMicroRows = in_registers(8 * kMaxVecs, kMaxVecs + 1) ? 8 : 4;
static_assert(in_registers(kMicroRows* kMaxVecs, kMaxVecs + 1));  // beside the tokens and a weight
constexpr int64_t kPanelTokens = kMaxVecs * kWidth;

// Where A's word for output i and reduction r lies, and how its sums are scaled: after every `group` words, by
// scales[i * scale_row + number of the group].
struct Tile {
  int64_t row, step;  // strides of i and r, in words
  int64_t group;
  const float* scales;
  int64_t scale_row;
};

// c[i, 0 .. kVecs * kWidth) += sum over groups of scale[i] * sum_r a[i, r] b[r, ...], for kMicroRows rows. Groups are
// summed apart, for accuracy too.
template <class Word, int kVecs>
void micro_kernel(const typename Word::Type* a, const Tile& t, int64_t first_row, const typename Word::Type* b,
                  int64_t depth, float* c, int64_t c_stride) {
  const float* scales = t.scales + first_row * t.scale_row;
  for (int64_t g = 0, r = 0; r < depth; ++g) {
    const int64_t end = depth - r < t.group ? depth : r + t.group;
    Vec sum[kMicroRows][kVecs];
    for (auto& row : sum) {
      for (Vec& v : row) v = Vec(0.0f);
    }
    for (; r < end; ++r) {
      typename Word::Row row[kVecs];
      for (int v = 0; v < kVecs; ++v) row[v] = Word::load(b + (r * kVecs + v) * kWidth);
      for (int i = 0; i < kMicroRows; ++i) {
        const auto weight = Word::broadcast(a + i * t.row + r * t.step);
        for (int v = 0; v < kVecs; ++v) sum[i][v] = Word::multiply(weight, row[v], sum[i][v]);
      }
    }
    for (int i = 0; i < kMicroRows; ++i) {
      const Vec scale(scales[i * t.scale_row + g]);
      for (int v = 0; v < kVecs; ++v) {
        float* out = c + i * c_stride + v * kWidth;
        store(out, fma(sum[i][v], scale, load(out)));
      }
    }
  }
}

// Tokens as panels of at most kMaxVecs vectors.
struct TokenPanels {
  int64_t tokens;
  int64_t count() const { return (tokens + kPanelTokens - 1) / kPanelTokens; }
  int vecs(int64_t panel) const {
    const int64_t left = tokens - panel * kPanelTokens;
    return left >= kPanelTokens ? kMaxVecs : static_cast<int>((left + kWidth - 1) / kWidth);
  }
  int64_t padded() const { return (tokens + kWidth - 1) / kWidth * kWidth; }
};

// The word at x, of whose elements `left` are there.
template <class Word, class T>
typename Word::Type word_at(const T* x, int64_t left) {
  if constexpr (Word::kElements == 2) {
    return (left > 0 ? x[0].bits : 0u) | (left > 1 ? static_cast<uint32_t>(x[1].bits) << 16 : 0u);
  } else {
    return left > 0 ? to_float(*x) : 0.0f;
  }
}

// B from x [tokens, width]: panel p starts at b + p * kPanelTokens * depth words, its rows r in `range` hold the
// panel's tokens side by side.
template <class Word, class T>
void pack_tokens(const T* x, int64_t width, TokenPanels panels, int64_t depth, Range range, typename Word::Type* b) {
  constexpr int64_t kStep = 64;  // rows per pass over a panel's tokens: x is read and B written along their lines
  for (int64_t panel = 0; panel < panels.count(); ++panel) {
    const int64_t lanes = panels.vecs(panel) * kWidth, first = panel * kPanelTokens;
    const int64_t tokens = panels.tokens - first < lanes ? panels.tokens - first : lanes;
    auto* out = b + first * depth;
    for (int64_t r0 = range.begin; r0 < range.end; r0 += kStep) {
      const int64_t r1 = r0 + kStep < range.end ? r0 + kStep : range.end;
      for (int64_t m = 0; m < tokens; ++m) {
        const T* row = x + (first + m) * width;
        for (int64_t r = r0; r < r1; ++r) {
          const int64_t element = r * Word::kElements;
          out[r * lanes + m] = word_at<Word>(row + element, width - element);
        }
      }
      for (int64_t r = r0; r < r1; ++r) {
        for (int64_t m = tokens; m < lanes; ++m) out[r * lanes + m] = 0;
      }
    }
  }
}

// C[0 .. outputs, all tokens] += A B over B's rows [first, first + depth); outputs is a multiple of kMicroRows.
template <class Word>
void multiply_tile(const typename Word::Type* a, const Tile& t, int64_t outputs, const typename Word::Type* b,
                   TokenPanels panels, int64_t b_depth, int64_t first, int64_t depth, float* c, int64_t c_stride) {
  for (int64_t panel = 0; panel < panels.count(); ++panel) {
    const int vecs = panels.vecs(panel);
    const auto* rows = b + panel * kPanelTokens * b_depth + first * vecs * kWidth;
    for (int64_t i = 0; i < outputs; i += kMicroRows) {
      float* out = c + i * c_stride + panel * kPanelTokens;
      const auto* tile = a + i * t.row;
      switch (vecs) {
        case 1: micro_kernel<Word, 1>(tile, t, i, rows, depth, out, c_stride); break;
        case 2: micro_kernel<Word, 2>(tile, t, i, rows, depth, out, c_stride); break;
        default: micro_kernel<Word, 3>(tile, t, i, rows, depth, out, c_stride); break;
      }
    }
  }
}

// Floats of a row as words along it, or (`stride` apart) of two rows as words across them.
inline void to_words(const float* values, int64_t count, float* out) {
  std::memcpy(out, values, static_cast<size_t>(count) * 4);
}
#if defined(__AVX512BF16__)
inline void to_words(const float* values, int64_t count, uint32_t* out) {  // count is even
  int64_t p = 0;
  for (; p + 32 <= count; p += 32) {
    _mm512_storeu_si512(out + p / 2, (__m512i)_mm512_cvtne2ps_pbh(load(values + p + 16).v, load(values + p).v));
  }
  for (; p < count; p += 2) {
    out[p / 2] = to_bfloat16(values[p]).bits | static_cast<uint32_t>(to_bfloat16(values[p + 1]).bits) << 16;
  }
}
#endif

inline void to_words_across(const float* values, int64_t, int64_t count, float* out) { to_words(values, count, out); }
#if defined(__AVX512BF16__)
inline void to_words_across(const float* values, int64_t stride, int64_t count, uint32_t* out) {
  for (int64_t p = 0; p < count; p += kWidth) {  // count is a multiple of kWidth
    _mm512_storeu_si512(out + p, pairs_of(load(values + p), load(values + stride + p)));
  }
}
#endif

// Unscaled codes of a regular row's columns as words along it.
inline void codes_to_words(const Quant4& q, const CodeBook& book, int64_t row, int64_t first, int64_t count,
                           float* out) {
  const uint8_t* bytes = packed_row(q, row) + first / 2;
  for (int64_t j = 0; j < count; j += kStrip) {
    const Strip codes = strip_in_order(book, bytes + j / 2);
    for (int v = 0; v < kStripVecs; ++v) store(out + j + v * kWidth, codes.v[v]);
  }
}
#if defined(__AVX512BF16__)
inline void codes_to_words(const Quant4& q, const CodeBook& book, int64_t row, int64_t first, int64_t count,
                           uint32_t* out) {
  const uint8_t* bytes = packed_row(q, row) + first / 2;
  const __m512i half = (__m512i)_mm512_cvtne2ps_pbh(book.table, book.table);  // the book twice, in bfloat16
  for (int64_t j = 0; j < count; j += 32) {
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + j / 2)));
    // Low word: the high nibble, which is the even element; the lookup ignores higher bits.
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(wide, 4), _mm512_slli_epi32(wide, 16));
    _mm512_storeu_si512(out + j / 2, _mm512_permutexvar_epi16(index, half));
  }
}
#endif

}  // namespace
}  // namespace deftcore::cpu
