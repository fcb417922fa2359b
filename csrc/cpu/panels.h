// Products of several tokens with rows of weights that they share: a panel of rows x one tile of columns is copied to
// L1 first, since rows a power of two apart fall on the same cache sets, and then serves every token from there.
#pragma once

#include "words.h"

namespace deftcore::cpu {
namespace {

// A register tile: sums of tokens and vectors of columns, beside a row's vectors and a token's factor.
constexpr int64_t kTileTokens = 6;
constexpr int kTileVecs = in_registers(4 * kTileTokens, 4 + 1) ? 4 : 2;
static_assert(in_registers(kTileVecs* kTileTokens, kTileVecs + 1));
constexpr int64_t kTileColumns = kTileVecs * kWidth;
constexpr int64_t kPrefetch = 64;  // elements beyond the next tile that are asked for; chosen, not measured

template <class T>
struct Matrix {
  const T* data;
  int64_t stride;
  const T* row(int64_t i) const { return data + i * stride; }
};

// Calls fn(integral_constant n) for n = min(remaining, kTileTokens).
template <class Fn>
void dispatch_tokens(int64_t remaining, Fn&& fn) {
  switch (remaining < kTileTokens ? remaining : kTileTokens) {
    case 1: return fn(std::integral_constant<int, 1>{});
    case 2: return fn(std::integral_constant<int, 2>{});
    case 3: return fn(std::integral_constant<int, 3>{});
    case 4: return fn(std::integral_constant<int, 4>{});
    case 5: return fn(std::integral_constant<int, 5>{});
    default: return fn(std::integral_constant<int, 6>{});
  }
}

// Columns [p, p + n) widened to float, zero beyond; n may be anything.
template <class T>
Vec load_columns(const T* p, int64_t n) {
  return n >= kWidth ? load(p) : n > 0 ? load_tail(p, n) : Vec(0.0f);
}

// Rows of a tile in words: [rows / kElements, kTileColumns].
template <class Word>
struct Panel {
  static constexpr int64_t kRows = 64 * Word::kElements;
  alignas(64) typename Word::Type data[64 * kTileColumns];

  // acc[m, tile] += sum_r h[r, m] panel[r, tile] over words; h is [count, h_stride].
  template <int kTokens>
  void multiply(int64_t count, const typename Word::Type* h, int64_t h_stride, float* acc, int64_t acc_stride) const {
    Vec sum[kTokens][kTileVecs];
    for (int m = 0; m < kTokens; ++m) {
      for (int v = 0; v < kTileVecs; ++v) sum[m][v] = load(acc + m * acc_stride + v * kWidth);
    }
    for (int64_t r = 0; r < count; ++r) {
      typename Word::Row w[kTileVecs];
      for (int v = 0; v < kTileVecs; ++v) w[v] = Word::load(data + (r * kTileVecs + v) * kWidth);
      for (int m = 0; m < kTokens; ++m) {
        const auto hv = Word::broadcast(h + r * h_stride + m);
        for (int v = 0; v < kTileVecs; ++v) sum[m][v] = Word::multiply(w[v], hv, sum[m][v]);
      }
    }
    for (int m = 0; m < kTokens; ++m) {
      for (int v = 0; v < kTileVecs; ++v) store(acc + m * acc_stride + v * kWidth, sum[m][v]);
    }
  }
};

// The panel from values: value(r, v) is vector v of row r.
template <class Value>
void fill_values(Panel<FloatWord>& panel, int64_t count, Value&& value) {
  for (int64_t r = 0; r < count; ++r) {
    for (int v = 0; v < kTileVecs; ++v) store(panel.data + (r * kTileVecs + v) * kWidth, value(r, v));
  }
}

// The panel from rows of which `left` columns are there.
template <class T>
void fill_rows(Panel<FloatWord>& panel, const T* const* rows, int64_t count, int64_t left) {
  fill_values(panel, count, [&](int64_t r, int v) { return load_columns(rows[r] + v * kWidth, left - v * kWidth); });
}

#if defined(__AVX512BF16__)
template <class Value>
void fill_values(Panel<PairWord>& panel, int64_t count, Value&& value) {
  for (int64_t r = 0; r < count; r += 2) {
    for (int v = 0; v < kTileVecs; ++v) {
      const Vec odd = r + 1 < count ? value(r + 1, v) : Vec(0.0f);
      _mm512_store_si512(panel.data + (r / 2 * kTileVecs + v) * kWidth, pairs_of(value(r, v), odd));
    }
  }
}

inline void fill_rows(Panel<PairWord>& panel, const BFloat16* const* rows, int64_t count, int64_t left) {
  static_assert(kTileVecs == 4);
  alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const auto load_columns32 = [](const BFloat16* p, int64_t n) {
    return n >= 32 ? _mm512_loadu_si512(p)
           : n > 0 ? _mm512_maskz_loadu_epi16((1u << n) - 1, p)
                   : _mm512_setzero_si512();
  };
  for (int64_t r = 0; r < count; r += 2) {
    uint32_t* out = panel.data + r / 2 * kTileColumns;
    for (int v = 0; v < 2; ++v) {
      const __m512i even = load_columns32(rows[r] + v * 32, left - v * 32);
      const __m512i odd = r + 1 < count ? load_columns32(rows[r + 1] + v * 32, left - v * 32) : _mm512_setzero_si512();
      _mm512_store_si512(out + v * 32, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_store_si512(out + v * 32 + 16, _mm512_permutex2var_epi16(even, high, odd));
    }
  }
}
#endif

// acc[m, j] += sum_k h[k, m] w[k, j] for every token and j in columns; acc holds whole tiles. `fill(panel, k0, count,
// j)` puts rows [k0, k0 + count) of the tile at column j into the panel.
template <class Word, class Fill>
void down_tokens(int64_t active, const typename Word::Type* h, int64_t tokens, Range columns, float* acc,
                 int64_t acc_stride, Fill&& fill) {
  Panel<Word> panel;
  for (int64_t k0 = 0; k0 < active; k0 += panel.kRows) {
    const int64_t count = active - k0 < panel.kRows ? active - k0 : panel.kRows;
    for (int64_t j = columns.begin; j < columns.end; j += kTileColumns) {
      fill(panel, k0, count, j);
      for (int64_t m0 = 0; m0 < tokens; m0 += kTileTokens) {
        dispatch_tokens(tokens - m0, [&](auto n) {
          panel.template multiply<n()>((count + Word::kElements - 1) / Word::kElements,
                                       h + k0 / Word::kElements * tokens + m0, tokens, acc + m0 * acc_stride + j,
                                       acc_stride);
        });
      }
    }
  }
}

// The panel from rows of plain weights.
template <class Word, class T>
auto fill_from(Matrix<T> w, const int32_t* list, Range columns) {
  return [=](Panel<Word>& panel, int64_t k0, int64_t count, int64_t j) {
    constexpr int64_t kLine = 64 / sizeof(T);
    const T* rows[Panel<Word>::kRows];
    for (int64_t r = 0; r < count; ++r) rows[r] = w.row(list[k0 + r]) + j;
    fill_rows(panel, rows, count, columns.end - j);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t line = kTileColumns; line < 2 * kTileColumns; line += kLine)
        __builtin_prefetch(rows[r] + line + kPrefetch, 0, 2);
    }
  };
}

// [rows / 2, tokens] words of two bfloat16 from [rows, tokens] floats.
void pack_pairs(const float* h, int64_t active, int64_t tokens, Range rows, uint32_t* pairs) {
  for (int64_t k = rows.begin; k < rows.end; k += 2) {
    const float *even = h + k * tokens, *odd = even + tokens;
    uint32_t* out = pairs + k / 2 * tokens;
    int64_t m = 0;
#if defined(__AVX512BF16__)
    for (; m + kWidth <= tokens && k + 1 < active; m += kWidth) {
      _mm512_storeu_si512(out + m, pairs_of(load(even + m), load(odd + m)));
    }
#endif
    for (; m < tokens; ++m) {
      const uint32_t high = k + 1 < active ? to_bfloat16(odd[m]).bits : 0;
      out[m] = to_bfloat16(even[m]).bits | high << 16;
    }
  }
}

}  // namespace
}  // namespace deftcore::cpu
