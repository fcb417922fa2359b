// y = a W_down^T over the union of the tokens' active neurons, and the MLPs built on it. W_down is neuron-major
// [neurons, width]: an inactive neuron is a row that is never touched. Few tokens are bound by weight traffic, sixteen
// and more by multiply-adds. One parallel region per call:
//   (gate)  act[m, i] = f(x[m] . W_gate[i])             neurons split over threads
//   compact list = {i : any |act[m, i]| > tau}          neurons split, ascending
//   pack    h[k, m] = act[m, list[k]] (* x[m] . W_up[list[k]])   list split evenly: every thread reads as many rows
//   down    y[m, j] = sum_k h[k, m] W_down[list[k], j]  columns split: no reduction, so repeats are bit-equal
#include "isa.h"

#if defined(__AVX512BF16__)
#define DEFTCORE_DOT_BF16 1
#endif

namespace deftcore::cpu {
namespace {

constexpr int64_t kDotRows = 4;     // weight rows per dot tile
constexpr int64_t kTileTokens = 6;  // tokens per register tile; with 4 rows or 4 vectors: 24 accumulators
#if defined(__AVX512F__)
constexpr int kTileVecs = 4;
#else
constexpr int kTileVecs = 2;  // 12 accumulators of 16 registers
#endif
constexpr int64_t kStreamRows = 16;  // rows streamed side by side for one token; 8 to 32 measured alike
constexpr int64_t kPrefetch = 64;    // elements beyond the next tile

template <class T>
struct Matrix {
  const T* data;
  int64_t stride;
  const T* row(int64_t i) const { return data + i * stride; }
};

// The workspace, cut up; isa.cpp computes its size.
struct Buffers {
  int32_t* list;    // [neurons + 64]
  int64_t* counts;  // [threads]
  float* h;         // [neurons, tokens]
  uint32_t* pairs;  // [neurons / 2, tokens]
  float* acc;       // [tokens, acc_stride]
  float* act;       // [tokens, neurons], MLPs only, as is x_wide
  float* x_wide;    // [tokens, acc_stride]
  int64_t acc_stride;
};

Buffers carve(void* workspace, int64_t threads, int64_t tokens, int64_t neurons, int64_t width) {
  char* next = static_cast<char*>(workspace);
  const auto take = [&](int64_t count, size_t size) {
    char* mine = next;
    next += (static_cast<size_t>(count) * size + 63) & ~static_cast<size_t>(63);
    return mine;
  };
  Buffers b{};
  b.acc_stride = (width + 63) / 64 * 64 + 16;  // whole tiles, and rows that do not all start on one cache set
  b.list = reinterpret_cast<int32_t*>(take(neurons + 64, 4));
  b.counts = reinterpret_cast<int64_t*>(take(threads, 8));
  b.h = reinterpret_cast<float*>(take(neurons * tokens + 64, 4));
  b.pairs = reinterpret_cast<uint32_t*>(take((neurons + 64) * tokens / 2 + 64, 4));
  b.acc = reinterpret_cast<float*>(take(tokens * b.acc_stride, 4));
  b.act = reinterpret_cast<float*>(take(tokens * neurons, 4));
  b.x_wide = reinterpret_cast<float*>(next);
  return b;
}

// Called by every thread of a region. Thread t writes the active neurons of its share at list[share.begin...] and
// their number in counts[t]; a share never overtakes the neurons it has read, so the shares do not overlap.
template <class T>
void compact(const T* act, int64_t tokens, int64_t neurons, float tau, int32_t* list, int64_t* counts) {
  const int thread = omp_get_thread_num();
  const Range mine = share(neurons, omp_get_num_threads(), thread, 16);
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
      compress(list + mine.begin + count, bits[g], static_cast<int32_t>(first + g * kWidth));
      count += __builtin_popcount(bits[g]);
    }
  }
  counts[thread] = count;
}

// Closes the gaps between the threads' shares; returns the number of active neurons. Called by one thread.
int64_t join_shares(int64_t neurons, int threads, int32_t* list, const int64_t* counts) {
  int64_t total = 0;
  for (int t = 0; t < threads; ++t) {
    std::memmove(list + total, list + share(neurons, threads, t, 16).begin, static_cast<size_t>(counts[t]) * 4);
    total += counts[t];
  }
  return total;
}

// ---------------------------------------------------------------------------- dots

// out[r][m] = x[m] . rows[r]; x is float [tokens, x_stride]. `next` rows are prefetched alongside.
template <int kTokens, class T>
void dot_tile(const T* const* rows, const T* const* next, const float* x, int64_t x_stride, int64_t width,
              float (*out)[kTileTokens]) {
  Vec acc[kDotRows][kTokens];
  for (auto& row : acc) {
    for (Vec& v : row) v = Vec(0.0f);
  }
  const auto step = [&](int64_t j, auto fetch) {
    Vec w[kDotRows];
    for (int r = 0; r < kDotRows; ++r) w[r] = fetch(rows[r] + j);
    for (int m = 0; m < kTokens; ++m) {
      const Vec xv = load(x + m * x_stride + j);
      for (int r = 0; r < kDotRows; ++r) acc[r][m] = fma(w[r], xv, acc[r][m]);
    }
  };
  int64_t j = 0;
  for (; j + kWidth <= width; j += kWidth) {
    for (int r = 0; r < kDotRows; ++r) __builtin_prefetch(next[r] + j, 0, 2);
    step(j, [](const T* p) { return load(p); });
  }
  if (j < width) step(j, [&](const T* p) { return load_tail(p, width - j); });
  for (int r = 0; r < kDotRows; ++r) {
    for (int m = 0; m < kTokens; ++m) out[r][m] = reduce_add(acc[r][m]);
  }
}

#if defined(DEFTCORE_DOT_BF16)
inline __m512bh load_pairs(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline __m512bh load_pairs_tail(const BFloat16* p, int64_t n) {
  return (__m512bh)_mm512_maskz_loadu_epi16((1u << n) - 1, p);
}

// The same over bfloat16 pairs: two products per lane and instruction. x is bfloat16 [tokens, x_stride].
template <int kTokens>
void dot_tile(const BFloat16* const* rows, const BFloat16* const* next, const BFloat16* x, int64_t x_stride,
              int64_t width, float (*out)[kTileTokens]) {
  __m512 acc[kDotRows][kTokens];
  for (auto& row : acc) {
    for (__m512& v : row) v = _mm512_setzero_ps();
  }
  const auto step = [&](int64_t j, auto fetch) {
    __m512bh w[kDotRows];
    for (int r = 0; r < kDotRows; ++r) w[r] = fetch(rows[r] + j);
    for (int m = 0; m < kTokens; ++m) {
      const __m512bh xv = fetch(x + m * x_stride + j);
      for (int r = 0; r < kDotRows; ++r) acc[r][m] = _mm512_dpbf16_ps(acc[r][m], w[r], xv);
    }
  };
  int64_t j = 0;
  for (; j + 32 <= width; j += 32) {
    for (int r = 0; r < kDotRows; ++r) __builtin_prefetch(next[r] + j, 0, 2);
    step(j, load_pairs);
  }
  if (j < width) step(j, [&](const BFloat16* p) { return load_pairs_tail(p, width - j); });
  for (int r = 0; r < kDotRows; ++r) {
    for (int m = 0; m < kTokens; ++m) out[r][m] = _mm512_reduce_add_ps(acc[r][m]);
  }
}
#endif

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

// Calls sink(k, m, x[m] . w[row_of(k)]) for k in range and every token.
template <class T, class X, class RowOf, class Sink>
void dots(Matrix<T> w, RowOf&& row_of, Range range, const X* x, int64_t x_stride, int64_t tokens, int64_t width,
          Sink&& sink) {
  const int64_t last = range.end - 1;
  for (int64_t k = range.begin; k < range.end; k += kDotRows) {
    const T *rows[kDotRows], *next[kDotRows];
    for (int64_t r = 0; r < kDotRows; ++r) {  // past the end: repeat the last row, drop its result
      rows[r] = w.row(row_of(k + r < last ? k + r : last));
      next[r] = w.row(row_of(k + r + kDotRows < last ? k + r + kDotRows : last));
    }
    for (int64_t m0 = 0; m0 < tokens; m0 += kTileTokens) {
      float out[kDotRows][kTileTokens];
      dispatch_tokens(tokens - m0, [&](auto count) {
        dot_tile<count()>(rows, m0 == 0 ? next : rows, x + m0 * x_stride, x_stride, width, out);
        for (int64_t r = 0; r < kDotRows && k + r <= last; ++r) {
          for (int m = 0; m < count(); ++m) sink(k + r, m0 + m, out[r][m]);
        }
      });
    }
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
    for (int64_t r = 0; r < count; ++r) {
      for (int v = 0; v < kTileVecs; ++v) {
        store(data + (r * kTileVecs + v) * kWidth, load_columns(rows[r] + v * kWidth, left - v * kWidth));
      }
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

// acc[m, j] += sum_k h[k, m] w[list[k], j] for every token and j in columns; acc holds whole tiles.
template <class Panel, class T>
void down_tokens(Matrix<T> w, const int32_t* list, int64_t active, const typename Panel::Word* h, int64_t tokens,
                 Range columns, float* acc, int64_t acc_stride) {
  constexpr int64_t kTile = kTileVecs * kWidth, kLine = 64 / sizeof(T);
  Panel panel;
  for (int64_t k0 = 0; k0 < active; k0 += Panel::kRows) {
    const int64_t count = active - k0 < Panel::kRows ? active - k0 : Panel::kRows;
    const T* rows[Panel::kRows];
    for (int64_t r = 0; r < count; ++r) rows[r] = w.row(list[k0 + r]) + columns.begin;
    for (int64_t j = columns.begin; j < columns.end; j += kTile) {
      panel.fill(rows, count, columns.end - j);
      for (int64_t r = 0; r < count; ++r) {
        rows[r] += kTile;
        for (int64_t line = 0; line < kTile; line += kLine) __builtin_prefetch(rows[r] + line + kPrefetch, 0, 2);
      }
      for (int64_t m0 = 0; m0 < tokens; m0 += kTileTokens) {
        dispatch_tokens(tokens - m0, [&](auto n) {
          panel.template multiply<n()>(count, h + k0 / Panel::kDepth * tokens + m0, tokens, acc + m0 * acc_stride + j,
                                       acc_stride);
        });
      }
    }
  }
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

// The last two stages, shared by all ops. Called by every thread of a region; `fill(k)` writes h[k, :].
template <class T, class Fill>
void down_stage(Matrix<T> w, const T* bias, int64_t active, int64_t tokens, int64_t width, const Buffers& b, T* y,
                Fill&& fill) {
  const int threads = omp_get_num_threads(), thread = omp_get_thread_num();
  const bool use_pairs = kHasPairs<T> && tokens > 1;
  const Range rows = share(active, threads, thread, kDotRows);
  fill(rows);
  if (use_pairs) pack_pairs(b.h, active, tokens, rows, b.pairs);
  const Range columns = share(width, threads, thread, kTileVecs * kWidth);
  for (int64_t m = 0; m < tokens; ++m) {
    for (int64_t j = columns.begin; j < columns.end; j += kWidth) store(b.acc + m * b.acc_stride + j, Vec(0.0f));
  }
#pragma omp barrier
  if (tokens == 1) {
    down_one_token(w, b.list, active, b.h, columns, b.acc);
  } else {
#if defined(DEFTCORE_DOT_BF16)
    using Panel = std::conditional_t<kHasPairs<T>, PairPanel, FloatPanel>;
#else
    using Panel = FloatPanel;
#endif
    const auto* words = [&] {
      if constexpr (kHasPairs<T>) {
        return b.pairs;
      } else {
        return b.h;
      }
    }();
    down_tokens<Panel>(w, b.list, active, words, tokens, columns, b.acc, b.acc_stride);
  }
  write_output(b.acc, b.acc_stride, bias, tokens, width, columns, y);
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

template <class T>
void sparse_down(const SparseDownArgs& args) {
  const T* a = static_cast<const T*>(args.a);
  const Matrix<T> w{static_cast<const T*>(args.w_down_t), args.w_stride};
  const int64_t tokens = args.tokens, neurons = args.neurons, width = args.width;
  const int threads = threads_for(neurons * (width / 8 + tokens) * static_cast<int64_t>(sizeof(T)));
  const Buffers b = carve(args.workspace, threads, tokens, neurons, width);
  int64_t active = 0;
#pragma omp parallel num_threads(threads)
  {
    compact(a, tokens, neurons, args.tau, b.list, b.counts);
#pragma omp barrier
#pragma omp single
    active = join_shares(neurons, omp_get_num_threads(), b.list, b.counts);
    if (active <= args.capacity)
      down_stage(w, static_cast<const T*>(args.bias), active, tokens, width, b, static_cast<T*>(args.y),
                 [&](Range rows) { gather_active(a, tokens, neurons, args.tau, b.list, rows, b.h); });
  }
  *args.rows_read = active;
}

void activate_row(Activation activation, float* act, int64_t count) {
  dispatch(activation, [&](auto kind) {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(act + i, math::activate<kind()>(load(act + i)));
    if (i < count) store_tail(act + i, math::activate<kind()>(load_tail(act + i, count - i)), count - i);
  });
}

template <class T>
void sparse_mlp(const SparseMlpArgs& args) {
  const bool gated = args.w_gate != nullptr;
  const Matrix<T> w_first{static_cast<const T*>(gated ? args.w_gate : args.w_up),
                          gated ? args.gate_stride : args.up_stride};
  const Matrix<T> w_up{static_cast<const T*>(args.w_up), args.up_stride};
  const Matrix<T> w_down{static_cast<const T*>(args.w_down_t), args.down_stride};
  const T* x = static_cast<const T*>(args.x);
  const T* z = static_cast<const T*>(args.z);
  const T* b_up = static_cast<const T*>(args.b_up);
  const int64_t tokens = args.tokens, neurons = args.neurons, width = args.width;
  const int threads = threads_for(neurons * width * static_cast<int64_t>(sizeof(T)));
  const Buffers b = carve(args.workspace, threads, tokens, neurons, width);
  float* const act = b.act;
  for (int64_t m = 0; m < tokens && !kHasPairs<T>; ++m) {
    float* row = b.x_wide + m * b.acc_stride;
    widen(x + m * width, width, row);
    for (int64_t j = width; j < b.acc_stride; ++j) row[j] = 0.0f;  // a dot's last vector reads beyond the width
  }

  const auto dot_rows = [&](Matrix<T> w, auto row_of, Range range, auto sink) {
#if defined(DEFTCORE_DOT_BF16)
    if constexpr (kHasPairs<T>) return dots(w, row_of, range, x, width, tokens, width, sink);
#endif
    return dots(w, row_of, range, static_cast<const float*>(b.x_wide), b.acc_stride, tokens, width, sink);
  };

  int64_t active = 0;
#pragma omp parallel num_threads(threads)
  {
    const Range mine = share(neurons, omp_get_num_threads(), omp_get_thread_num(), 16);
    const int64_t n = mine.end - mine.begin;
    if (z != nullptr) {
      for (int64_t m = 0; m < tokens; ++m) widen(z + m * neurons + mine.begin, n, act + m * neurons + mine.begin);
    } else {
      dot_rows(
          w_first, [](int64_t i) { return i; }, mine,
          [&](int64_t i, int64_t m, float dot) {
            act[m * neurons + i] = b_up != nullptr ? dot + to_float(b_up[i]) : dot;
          });
    }
    for (int64_t m = 0; m < tokens; ++m) activate_row(args.activation, act + m * neurons + mine.begin, n);
    compact(act, tokens, neurons, args.tau, b.list, b.counts);
#pragma omp barrier
#pragma omp single
    active = join_shares(neurons, omp_get_num_threads(), b.list, b.counts);
    if (active <= args.capacity)
      down_stage(w_down, static_cast<const T*>(args.b_down), active, tokens, width, b, static_cast<T*>(args.y),
                 [&](Range rows) {
                   gather_active(act, tokens, neurons, args.tau, b.list, rows, b.h);
                   if (!gated) return;
                   dot_rows(
                       w_up, [&](int64_t k) { return b.list[k]; }, rows,
                       [&](int64_t k, int64_t m, float dot) { b.h[k * tokens + m] *= dot; });
                 });
  }
  *args.rows_read = active;
}

}  // namespace

// ----------------------------------------------------------------------------

void DEFTCORE_KERNEL(sparse_down)(const SparseDownArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) { sparse_down<decltype(t)>(args); });
}

void DEFTCORE_KERNEL(sparse_mlp)(const SparseMlpArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) { sparse_mlp<decltype(t)>(args); });
}

}  // namespace deftcore::cpu
