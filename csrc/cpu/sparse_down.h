// The stages that all sparse MLP products share, whatever their weights' format: the list of active neurons, and the
// down projection over it. W_down is neuron-major: an inactive neuron is a row that is never touched. Every function
// here is a part of a stage, or a stage of its team:
//   compact list = {i : any |act[m, i]| > tau}            neurons split, ascending
//   fill    h[k, m] = act[m, list[k]] (* up)              list split evenly: every part reads as many rows
//   down    y[m, j] = sum_k h[k, m] W_down[list[k], j]    columns split: no reduction, so repeats are bit-equal
#pragma once

#include "deftcore/workspace.h"
#include "isa.h"

#if defined(__AVX512BF16__)
#define DEFTCORE_DOT_BF16 1
#endif

namespace deftcore::cpu {
namespace {

constexpr int64_t kTileTokens = 6;  // tokens per register tile; with 4 rows or 4 vectors: 24 accumulators
#if defined(__AVX512F__)
constexpr int kTileVecs = 4;
#else
constexpr int kTileVecs = 2;  // 12 accumulators of 16 registers
#endif
constexpr int64_t kColumnUnit = 128;  // columns are split over parts in whole tiles of every kernel
constexpr int64_t kStreamRows = 16;   // rows streamed side by side for one token; 8 to 32 measured alike
constexpr int64_t kPrefetch = 64;     // elements beyond the next tile

template <class T>
struct Matrix {
  const T* data;
  int64_t stride;
  const T* row(int64_t i) const { return data + i * stride; }
};

// A row of sums: whole tiles of columns, and rows that do not all start on one cache set.
inline int64_t sum_stride(int64_t width) { return round_up(width, 64) + 16; }

// What every product here needs of the workspace.
struct Buffers {
  int32_t* list;    // [neurons], and room for the last whole vector that `compress` writes
  int64_t* counts;  // [parts]
  float* h;         // [neurons, tokens]
  uint32_t* pairs;  // [neurons / 2, tokens], both rounded up
  float* acc;       // [tokens, acc_stride]
  int64_t acc_stride;
};

Buffers lay_out(int64_t tokens, int64_t neurons, int64_t width, Workspace& room) {
  Buffers b{};
  b.acc_stride = sum_stride(width);
  b.list = room.take<int32_t>(round_up(neurons, kWidth));
  b.counts = room.take<int64_t>(most_parts());
  b.h = room.take<float>(neurons * tokens);
  b.pairs = room.take<uint32_t>((neurons + 1) / 2 * tokens);
  b.acc = room.take<float>(tokens * b.acc_stride);
  return b;
}

// Part p writes the active neurons of its share at list[share.begin...] and their number in counts[p]; a share never
// overtakes the neurons it has read, so the shares do not overlap.
template <class T>
void compact(const T* act, int64_t tokens, int64_t neurons, float tau, int parts, int part, const Buffers& b) {
  const Range mine = share(neurons, parts, part, 16);
  constexpr int64_t kGroups = 16;
  const Vec limit(tau);
  int64_t count = 0;
  for (int64_t first = mine.begin; first < mine.end; first += kGroups * kWidth) {
    // Tokens outside, so that a row is read along its cache lines: rows may all start on one cache set.
    uint32_t bits[kGroups] = {};
    for (int64_t m = 0; m < tokens; ++m) {
      const T* p = act + m * neurons;
      for (int64_t g = 0, i = first; g < kGroups && i < mine.end; ++g, i += kWidth) {
        const int64_t n = mine.end - i;
        bits[g] |= active_bits(n < kWidth ? load_tail(p + i, n) : load(p + i), limit);
      }
    }
    for (int64_t g = 0; g < kGroups && first + g * kWidth < mine.end; ++g) {
      compress(b.list + mine.begin + count, bits[g], static_cast<int32_t>(first + g * kWidth));
      count += __builtin_popcount(bits[g]);
    }
  }
  b.counts[part] = count;
}

// Closes the gaps between the parts' shares; returns the number of active neurons. Called by one thread.
int64_t join_shares(int64_t neurons, int parts, const Buffers& b) {
  int64_t total = 0;
  for (int p = 0; p < parts; ++p) {
    std::memmove(b.list + total, b.list + share(neurons, parts, p, 16).begin, static_cast<size_t>(b.counts[p]) * 4);
    total += b.counts[p];
  }
  return total;
}

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

// ---------------------------------------------------------------------------- down

// Columns [p, p + n) widened to float, zero beyond; n may be anything.
template <class T>
Vec load_columns(const T* p, int64_t n) {
  return n >= kWidth ? load(p) : n > 0 ? load_tail(p, n) : Vec(0.0f);
}

// One token is bound by traffic: a few rows are streamed side by side, straight from memory.
// acc[j] += sum_k h[k] w[list[k], j] for j in columns.
template <class T>
void down_one_token(Matrix<T> w, const int32_t* list, int64_t active, const float* h, Range columns, float* acc) {
  constexpr int64_t kTile = kTileVecs * kWidth, kLine = 64 / sizeof(T);
  for (int64_t k0 = 0; k0 < active; k0 += kStreamRows) {
    const int64_t count = active - k0 < kStreamRows ? active - k0 : kStreamRows;
    const T *rows[kStreamRows], *next[kStreamRows];
    for (int64_t r = 0; r < count; ++r) {
      const int64_t ahead = k0 + r + kStreamRows;
      rows[r] = w.row(list[k0 + r]);
      next[r] = w.row(list[ahead < active ? ahead : active - 1]);
    }
    int64_t j = columns.begin;
    for (; j + kTile <= columns.end; j += kTile) {
      Vec sum[kTileVecs];
      for (int v = 0; v < kTileVecs; ++v) sum[v] = load(acc + j + v * kWidth);
      for (int64_t r = 0; r < count; ++r) {
        const Vec hv(h[k0 + r]);
        for (int64_t line = 0; line < kTile; line += kLine) __builtin_prefetch(next[r] + j + line, 0, 2);
        for (int v = 0; v < kTileVecs; ++v) sum[v] = fma(hv, load(rows[r] + j + v * kWidth), sum[v]);
      }
      for (int v = 0; v < kTileVecs; ++v) store(acc + j + v * kWidth, sum[v]);
    }
    for (; j < columns.end; j += kWidth) {
      Vec sum = load(acc + j);
      for (int64_t r = 0; r < count; ++r) sum = fma(Vec(h[k0 + r]), load_columns(rows[r] + j, columns.end - j), sum);
      store(acc + j, sum);
    }
  }
}

// Several tokens share a row: a panel of rows x one tile of columns is copied to L1 first, since rows a power of two
// apart fall on the same cache sets. Float panels hold [rows, tile]; h is float [rows, tokens].
struct FloatPanel {
  using Word = float;
  static constexpr int kDepth = 1;  // rows per word
  static constexpr int64_t kRows = 64;
  alignas(64) float data[kRows * kTileVecs * kWidth];

  template <class T>
  void fill(const T* const* rows, int64_t count, int64_t left) {
    fill_values(count, [&](int64_t r, int v) { return load_columns(rows[r] + v * kWidth, left - v * kWidth); });
  }
  // value(r, v): vector v of row r.
  template <class Value>
  void fill_values(int64_t count, Value&& value) {
    for (int64_t r = 0; r < count; ++r) {
      for (int v = 0; v < kTileVecs; ++v) store(data + (r * kTileVecs + v) * kWidth, value(r, v));
    }
  }

  // acc[m, tile] += sum_r h[r, m] panel[r, tile]
  template <int kTokens>
  void multiply(int64_t count, const float* h, int64_t h_stride, float* acc, int64_t acc_stride) const {
    Vec sum[kTokens][kTileVecs];
    for (int m = 0; m < kTokens; ++m) {
      for (int v = 0; v < kTileVecs; ++v) sum[m][v] = load(acc + m * acc_stride + v * kWidth);
    }
    for (int64_t r = 0; r < count; ++r) {
      Vec w[kTileVecs];
      for (int v = 0; v < kTileVecs; ++v) w[v] = load(data + (r * kTileVecs + v) * kWidth);
      for (int m = 0; m < kTokens; ++m) {
        const Vec hv(h[r * h_stride + m]);
        for (int v = 0; v < kTileVecs; ++v) sum[m][v] = fma(hv, w[v], sum[m][v]);
      }
    }
    for (int m = 0; m < kTokens; ++m) {
      for (int v = 0; v < kTileVecs; ++v) store(acc + m * acc_stride + v * kWidth, sum[m][v]);
    }
  }
};

#if defined(DEFTCORE_DOT_BF16)
// Pairs of rows interleaved, so that one instruction multiplies two rows; h holds bfloat16 pairs [rows / 2, tokens].
struct PairPanel {
  using Word = uint32_t;
  static constexpr int kDepth = 2;
  static constexpr int64_t kRows = 128;
  alignas(64) uint32_t data[kRows / 2 * kTileVecs * kWidth];

  static __m512i load_columns32(const BFloat16* p, int64_t n) {
    return n >= 32 ? _mm512_loadu_si512(p)
           : n > 0 ? _mm512_maskz_loadu_epi16((1u << n) - 1, p)
                   : _mm512_setzero_si512();
  }

  void fill(const BFloat16* const* rows, int64_t count, int64_t left) {
    static_assert(kTileVecs == 4);
    alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t r = 0; r < count; r += 2) {
      uint32_t* out = data + r / 2 * kTileVecs * kWidth;
      for (int v = 0; v < 2; ++v) {
        const __m512i even = load_columns32(rows[r] + v * 32, left - v * 32);
        const __m512i odd =
            r + 1 < count ? load_columns32(rows[r + 1] + v * 32, left - v * 32) : _mm512_setzero_si512();
        _mm512_store_si512(out + v * 32, _mm512_permutex2var_epi16(even, low, odd));
        _mm512_store_si512(out + v * 32 + 16, _mm512_permutex2var_epi16(even, high, odd));
      }
    }
  }
  template <class Value>
  void fill_values(int64_t count, Value&& value) {
    const auto words = [](Vec v) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(v.v)); };
    for (int64_t r = 0; r < count; r += 2) {
      for (int v = 0; v < kTileVecs; ++v) {
        __m512i word = words(value(r, v));
        if (r + 1 < count) word = _mm512_or_si512(word, _mm512_slli_epi32(words(value(r + 1, v)), 16));
        _mm512_store_si512(data + (r / 2 * kTileVecs + v) * kWidth, word);
      }
    }
  }

  template <int kTokens>
  void multiply(int64_t count, const uint32_t* h, int64_t h_stride, float* acc, int64_t acc_stride) const {
    __m512 sum[kTokens][kTileVecs];
    for (int m = 0; m < kTokens; ++m) {
      for (int v = 0; v < kTileVecs; ++v) sum[m][v] = _mm512_loadu_ps(acc + m * acc_stride + v * kWidth);
    }
    for (int64_t r = 0; r < (count + 1) / 2; ++r) {
      __m512bh w[kTileVecs];
      for (int v = 0; v < kTileVecs; ++v) {
        w[v] = (__m512bh)_mm512_load_si512(data + (r * kTileVecs + v) * kWidth);
      }
      for (int m = 0; m < kTokens; ++m) {
        const __m512bh hv = (__m512bh)_mm512_set1_epi32(static_cast<int>(h[r * h_stride + m]));
        for (int v = 0; v < kTileVecs; ++v) sum[m][v] = _mm512_dpbf16_ps(sum[m][v], w[v], hv);
      }
    }
    for (int m = 0; m < kTokens; ++m) {
      for (int v = 0; v < kTileVecs; ++v) _mm512_storeu_ps(acc + m * acc_stride + v * kWidth, sum[m][v]);
    }
  }
};
#endif

#if defined(DEFTCORE_DOT_BF16)
template <class T>
using PanelOf = std::conditional_t<std::is_same_v<T, BFloat16>, PairPanel, FloatPanel>;
#else
template <class T>
using PanelOf = FloatPanel;
#endif

// acc[m, j] += sum_k h[k, m] w[k, j] for every token and j in columns; acc holds whole tiles. `fill(panel, k0, count,
// j)` puts rows [k0, k0 + count) of the tile at column j into the panel.
template <class Panel, class Fill>
void down_tokens(int64_t active, const typename Panel::Word* h, int64_t tokens, Range columns, float* acc,
                 int64_t acc_stride, Fill&& fill) {
  constexpr int64_t kTile = kTileVecs * kWidth;
  Panel panel;
  for (int64_t k0 = 0; k0 < active; k0 += Panel::kRows) {
    const int64_t count = active - k0 < Panel::kRows ? active - k0 : Panel::kRows;
    for (int64_t j = columns.begin; j < columns.end; j += kTile) {
      fill(panel, k0, count, j);
      for (int64_t m0 = 0; m0 < tokens; m0 += kTileTokens) {
        dispatch_tokens(tokens - m0, [&](auto n) {
          panel.template multiply<n()>(count, h + k0 / Panel::kDepth * tokens + m0, tokens, acc + m0 * acc_stride + j,
                                       acc_stride);
        });
      }
    }
  }
}

// The panel from rows of plain weights.
template <class Panel, class T>
auto fill_from(Matrix<T> w, const int32_t* list, Range columns) {
  return [=](Panel& panel, int64_t k0, int64_t count, int64_t j) {
    constexpr int64_t kTile = kTileVecs * kWidth, kLine = 64 / sizeof(T);
    const T* rows[Panel::kRows];
    for (int64_t r = 0; r < count; ++r) rows[r] = w.row(list[k0 + r]) + j;
    panel.fill(rows, count, columns.end - j);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t line = kTile; line < 2 * kTile; line += kLine) __builtin_prefetch(rows[r] + line + kPrefetch, 0, 2);
    }
  };
}

// bfloat16 products of pairs pay once several tokens share a row; one token keeps h in float.
template <class T>
constexpr bool kHasPairs =
#if defined(DEFTCORE_DOT_BF16)
    std::is_same_v<T, BFloat16>;
#else
    false;
#endif

// [rows / 2, tokens] words of two bfloat16 from [rows, tokens] floats.
void pack_pairs(const float* h, int64_t active, int64_t tokens, Range rows, uint32_t* pairs) {
  for (int64_t k = rows.begin; k < rows.end; k += 2) {
    const float *even = h + k * tokens, *odd = even + tokens;
    uint32_t* out = pairs + k / 2 * tokens;
    int64_t m = 0;
#if defined(DEFTCORE_DOT_BF16)
    const auto words = [](const float* p) {
      return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(p)));
    };
    for (; m + kWidth <= tokens && k + 1 < active; m += kWidth) {
      _mm512_storeu_si512(out + m, _mm512_or_si512(words(even + m), _mm512_slli_epi32(words(odd + m), 16)));
    }
#endif
    for (; m < tokens; ++m) {
      const uint32_t high = k + 1 < active ? to_bfloat16(odd[m]).bits : 0;
      out[m] = to_bfloat16(even[m]).bits | high << 16;
    }
  }
}

template <class T>
void widen(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, load(from + i));
  if (i < count) store_tail(to + i, load_tail(from + i, count - i), count - i);
}

template <class T>
void write_output(const float* acc, int64_t acc_stride, const T* bias, int64_t tokens, int64_t width, Range columns,
                  T* y) {
  for (int64_t m = 0; m < tokens; ++m) {
    for (int64_t j = columns.begin; j < columns.end; j += kWidth) {
      const int64_t n = columns.end - j < kWidth ? columns.end - j : kWidth;
      Vec v = load(acc + m * acc_stride + j);
      if (bias != nullptr) v = v + load_tail(bias + j, n);
      store_tail(y + m * width + j, v, n);
    }
  }
}

// The operand of the panels: pairs of bfloat16, or h itself.
template <class Panel>
const typename Panel::Word* panel_operand(const Buffers& b) {
  if constexpr (Panel::kDepth == 2) {
    return b.pairs;
  } else {
    return b.h;
  }
}

// acc += h W over the list, W of plain weights.
template <class T>
void down_product(Matrix<T> w, int64_t active, int64_t tokens, Range columns, const Buffers& b, float* acc,
                  int64_t acc_stride) {
  if (tokens == 1) return down_one_token(w, b.list, active, b.h, columns, acc);
  using Panel = PanelOf<T>;
  down_tokens<Panel>(active, panel_operand<Panel>(b), tokens, columns, acc, acc_stride,
                     fill_from<Panel>(w, b.list, columns));
}

// The last two stages. `fill(part, rows)` writes h[k, :] of its rows of the list; `product(part, columns)` adds to
// b.acc.
template <class T, class Fill, class Product>
void down_stages(Team& team, const T* bias, int64_t active, int64_t tokens, int64_t width, const Buffers& b, T* y,
                 Fill&& fill, Product&& product) {
  team.stage([&](int part) {
    const Range rows = share(active, team.parts, part, 4);  // whole groups of the dots, and pairs
    fill(part, rows);
    if (kHasPairs<T> && tokens > 1) pack_pairs(b.h, active, tokens, rows, b.pairs);
    const Range columns = share(width, team.parts, part, kColumnUnit);
    for (int64_t m = 0; m < tokens; ++m) {
      for (int64_t j = columns.begin; j < columns.end; j += kWidth) store(b.acc + m * b.acc_stride + j, Vec(0.0f));
    }
  });
  team.stage([&](int part) {
    const Range columns = share(width, team.parts, part, kColumnUnit);
    product(part, columns);
    write_output(b.acc, b.acc_stride, bias, tokens, width, columns, y);
  });
}

// h[k, m] = a[m, list[k]] for k in rows. A neuron in the list for another token's sake stays silent for this one, as it
// would alone.
template <class T>
void gather_active(const T* a, int64_t tokens, int64_t neurons, float tau, const int32_t* list, Range rows, float* h) {
  constexpr int64_t kTile = 32;  // a few cache lines of each token's row at a time, as in `compact`
  for (int64_t first = rows.begin; first < rows.end; first += kTile) {
    const int64_t end = first + kTile < rows.end ? first + kTile : rows.end;
    for (int64_t m = 0; m < tokens; ++m) {
      for (int64_t k = first; k < end; ++k) {
        const float value = to_float(a[m * neurons + list[k]]);
        h[k * tokens + m] = std::fabs(value) <= tau ? 0.0f : value;
      }
    }
  }
}

void activate_row(Activation activation, float* act, int64_t count) {
  dispatch(activation, [&](auto kind) {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(act + i, math::activate<kind()>(load(act + i)));
    if (i < count) store_tail(act + i, math::activate<kind()>(load_tail(act + i, count - i)), count - i);
  });
}

}  // namespace
}  // namespace deftcore::cpu
