// Products of 4-bit weights with many tokens, and those of the backward. Both are, with vectors over tokens,
//   C[i, m] += sum_r A[i, r] B[r, m]
// where A is a tile of weights decoded to the compute type, read one broadcast word at a time, and B is the other
// operand packed so that a row holds a panel of tokens:
//   forward    i = output n,   r = input k:   A[i, r] = tile[n][k],  C^T = y
//   backward   i = input k,    r = output n:  A[i, r] = tile[n][k],  C^T = grad x
// A tile stays in the second-level cache and serves every token of a block; the float copy of W never exists. The
// low-rank term is one more tile, copied instead of decoded. Threads own outputs, so repeats are bit-equal.
#include "decode4.h"

namespace deftcore::cpu {
namespace {

constexpr int kMaxVecs = 3;  // vectors of tokens per panel
#if defined(__AVX512F__)
constexpr int kMicroRows = 8;  // with 3 vectors: 24 accumulators
#else
constexpr int kMicroRows = 4;
#endif
constexpr int64_t kPanelTokens = kMaxVecs * kWidth;
constexpr int64_t kBlockTokens = 10 * kPanelTokens;  // tokens per pass over W
constexpr int64_t kTileDepth = 512;                  // reduction per tile, forward
constexpr int64_t kTileOutputs = 64;                 // outputs per tile, forward
constexpr int64_t kBackDepth = 128;                  // reduction per tile, backward
constexpr int64_t kBackOutputs = 2 * kChunk > 128 ? 2 * kChunk : 128;

// The word of A and B that one multiply-add takes. Float: one element of the reduction.
struct FloatWord {
  using Type = float;
  static constexpr int64_t kDepth = 1;
  static float pack(const float* v, int64_t) { return v[0]; }
  static Vec load_row(const float* p) { return load(p); }
  static Vec multiply(const float* a, Vec b, Vec sum) { return fma(Vec(*a), b, sum); }
};

#if defined(__AVX512BF16__)
// Two bfloat16 that are neighbours along the reduction.
struct PairWord {
  using Type = uint32_t;
  static constexpr int64_t kDepth = 2;
  static uint32_t pack(const float* v, int64_t stride) {
    return to_bfloat16(v[0]).bits | static_cast<uint32_t>(to_bfloat16(v[stride]).bits) << 16;
  }
  static __m512bh load_row(const uint32_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Vec multiply(const uint32_t* a, __m512bh b, Vec sum) {
    return _mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_set1_epi32(static_cast<int>(*a)), b);
  }
};
#endif

template <class T>
struct WordOf {
  using Type = FloatWord;
};
#if defined(__AVX512BF16__)
template <>
struct WordOf<BFloat16> {
  using Type = PairWord;
};
#endif

// c[i, 0 .. kVecs * kWidth) += sum_r a[i * a_row + r * a_step] b[r, ...] for kMicroRows rows.
template <class Word, int kVecs>
void micro_kernel(const typename Word::Type* a, int64_t a_row, int64_t a_step, const typename Word::Type* b,
                  int64_t depth, float* c, int64_t c_stride) {
  Vec sum[kMicroRows][kVecs];
  for (int i = 0; i < kMicroRows; ++i) {
    for (int v = 0; v < kVecs; ++v) sum[i][v] = Vec(0.0f);  // summed apart, tile by tile, for accuracy
  }
  for (int64_t r = 0; r < depth; ++r) {
    decltype(Word::load_row(b)) row[kVecs];
    for (int v = 0; v < kVecs; ++v) row[v] = Word::load_row(b + (r * kVecs + v) * kWidth);
    for (int i = 0; i < kMicroRows; ++i) {
      for (int v = 0; v < kVecs; ++v) sum[i][v] = Word::multiply(a + i * a_row + r * a_step, row[v], sum[i][v]);
    }
  }
  for (int i = 0; i < kMicroRows; ++i) {
    for (int v = 0; v < kVecs; ++v) {
      float* out = c + i * c_stride + v * kWidth;
      store(out, load(out) + sum[i][v]);
    }
  }
}

// Tokens [first, first + count) as panels of at most kMaxVecs vectors.
struct Panels {
  int64_t tokens;
  int64_t count() const { return (tokens + kPanelTokens - 1) / kPanelTokens; }
  int vecs(int64_t panel) const {
    const int64_t left = tokens - panel * kPanelTokens;
    return left >= kPanelTokens ? kMaxVecs : static_cast<int>((left + kWidth - 1) / kWidth);
  }
  int64_t padded() const { return (tokens + kWidth - 1) / kWidth * kWidth; }
};

// Panel p of B starts at b + p * kPanelTokens * depth words, depth in words for the whole reduction; rows follow one
// another. Packs rows [range) from x [tokens, width]; element_of(r) is the column of reduction index r, or -1 for zero.
template <class Word, class T, class ElementOf>
void pack_rows(const T* x, int64_t width, Panels panels, int64_t depth, Range range, ElementOf&& element_of,
               typename Word::Type* b) {
  constexpr int64_t kStep = 64;  // rows per pass over the tokens of a panel, so that x is read along its lines
  for (int64_t panel = 0; panel < panels.count(); ++panel) {
    const int64_t lanes = panels.vecs(panel) * kWidth, first = panel * kPanelTokens;
    typename Word::Type* out = b + first * depth;
    for (int64_t r0 = range.begin; r0 < range.end; r0 += kStep) {
      const int64_t r1 = r0 + kStep < range.end ? r0 + kStep : range.end;
      for (int64_t m = 0; m < lanes; ++m) {
        const T* row = x + (first + m) * width;
        for (int64_t r = r0; r < r1; ++r) {
          float v[2] = {};
          for (int64_t d = 0; d < Word::kDepth && first + m < panels.tokens; ++d) {
            const int64_t element = element_of(r * Word::kDepth + d);
            if (element >= 0) v[d] = to_float(row[element]);
          }
          out[r * lanes + m] = Word::pack(v, 1);
        }
      }
    }
  }
}

// C[i0 .., all tokens] += A B for `outputs` rows (a multiple of kMicroRows) and B's rows [first, first + depth).
template <class Word>
void multiply_tile(const typename Word::Type* a, int64_t a_row, int64_t a_step, int64_t outputs,
                   const typename Word::Type* b, Panels panels, int64_t b_depth, int64_t first, int64_t depth, float* c,
                   int64_t c_stride) {
  for (int64_t panel = 0; panel < panels.count(); ++panel) {
    const int vecs = panels.vecs(panel);
    const auto* rows = b + panel * kPanelTokens * b_depth + first * vecs * kWidth;
    for (int64_t i = 0; i < outputs; i += kMicroRows) {
      float* out = c + i * c_stride + panel * kPanelTokens;
      const auto* tile = a + i * a_row;
      switch (vecs) {
        case 1: micro_kernel<Word, 1>(tile, a_row, a_step, rows, depth, out, c_stride); break;
        case 2: micro_kernel<Word, 2>(tile, a_row, a_step, rows, depth, out, c_stride); break;
        default: micro_kernel<Word, 3>(tile, a_row, a_step, rows, depth, out, c_stride); break;
      }
    }
  }
}

// Forward tile: words[n][k]: values of one row in position order, packed along the row.
template <class Word>
void pack_along(const float* values, int64_t count, typename Word::Type* out) {
  int64_t p = 0;
#if defined(__AVX512BF16__)
  if constexpr (Word::kDepth == 2) {
    for (; p + 2 * kWidth <= count; p += 2 * kWidth) {
      _mm512_storeu_si512(out + p / 2, (__m512i)_mm512_cvtne2ps_pbh(load(values + p + kWidth).v, load(values + p).v));
    }
  }
#endif
  for (; p < count; p += Word::kDepth) out[p / Word::kDepth] = Word::pack(values + p, 1);
}

// Backward tile: words[n][k] of one row (float) or of a pair of rows (bfloat16), `stride` floats apart.
template <class Word>
void pack_across(const float* values, int64_t stride, int64_t count, typename Word::Type* out) {
  int64_t p = 0;
#if defined(__AVX512BF16__)
  if constexpr (Word::kDepth == 2) {
    const auto words = [](const float* v) {
      return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(v)));
    };
    for (; p + kWidth <= count; p += kWidth) {
      const __m512i high = _mm512_slli_epi32(words(values + stride + p), 16);
      _mm512_storeu_si512(out + p, _mm512_or_si512(words(values + p), high));
    }
  }
#endif
  for (; p < count; ++p) out[p] = Word::pack(values + p, stride);
}

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Workspace of a call, in bytes: B for a block of tokens with the low-rank rows, then each thread's tile, C and scales.
struct Layout {
  int64_t b_rows, b_low_rows, tile_words, row_floats, c_floats, scale_floats, threads;

  template <class Word>
  static Layout of(const Linear4bitArgs& args, bool backward) {
    const int64_t tokens = args.tokens < kBlockTokens ? args.tokens : kBlockTokens;
    const int64_t reduction = backward ? args.w.rows : chunks_of(args.w.cols) * kChunk;
    const int64_t padded = round_up(tokens, kWidth);
    Layout l{};
    l.b_rows = round_up(reduction, Word::kDepth) / Word::kDepth;
    l.b_low_rows = round_up(args.rank, Word::kDepth) / Word::kDepth;
    const int64_t deepest = kTileDepth > args.rank ? kTileDepth : args.rank + 1;
    const int64_t deepest_back = kBackDepth > args.rank ? kBackDepth : args.rank + 1;
    l.tile_words = backward ? round_up(deepest_back, 2) * kBackOutputs : kTileOutputs * round_up(deepest, kChunk);
    l.row_floats = backward ? 2 * kBackOutputs : round_up(deepest, kChunk);
    l.c_floats = (backward ? kBackOutputs : kTileOutputs) * padded;
    l.scale_floats = row_scale_size(args.w) + 64;
    l.threads = omp_get_max_threads();
    return l;
  }
  int64_t b_words(int64_t tokens) const { return (b_rows + b_low_rows) * round_up(tokens, kWidth); }
  int64_t thread_floats() const {
    return round_up(tile_words, 16) + round_up(row_floats, 16) + round_up(c_floats, 16) + round_up(scale_floats, 16);
  }
  int64_t bytes(int64_t tokens) const {
    const int64_t block = tokens < kBlockTokens ? tokens : kBlockTokens;
    return 4 * (round_up(b_words(block), 16) + threads * thread_floats());
  }
};

template <class T>
void linear(const Linear4bitArgs& args, bool backward) {
  using Word = typename WordOf<T>::Type;
  using W = typename Word::Type;
  constexpr int64_t kDepth = Word::kDepth;
  const Quant4& q = args.w;
  const int64_t inputs = backward ? q.rows : q.cols, outputs = backward ? q.cols : q.rows, rank = args.rank;
  const Layout layout = Layout::of<Word>(args, backward);
  const T *x = static_cast<const T*>(args.x), *low = static_cast<const T*>(args.low);
  const T *lora = static_cast<const T*>(args.lora), *bias = static_cast<const T*>(args.bias);
  T* y = static_cast<T*>(args.y);
  W* b = static_cast<W*>(args.workspace);
  W* b_low = nullptr;
  const CodeBook book(q.code);
  const LaneScales lanes(q.block_size);
  float* const per_thread = static_cast<float*>(args.workspace) +
                            round_up(layout.b_words(args.tokens < kBlockTokens ? args.tokens : kBlockTokens), 16);

#pragma omp parallel num_threads(static_cast<int>(layout.threads))
  {
    const int threads = omp_get_num_threads(), thread = omp_get_thread_num();
    float* scratch = per_thread + thread * layout.thread_floats();
    W* tile = reinterpret_cast<W*>(scratch);
    float* row = scratch + round_up(layout.tile_words, 16);
    float* c = row + round_up(layout.row_floats, 16);
    float* scales = c + round_up(layout.c_floats, 16);

    for (int64_t m0 = 0; m0 < args.tokens; m0 += kBlockTokens) {
      const Panels panels{args.tokens - m0 < kBlockTokens ? args.tokens - m0 : kBlockTokens};
      const int64_t c_stride = panels.padded();
#pragma omp barrier
#pragma omp single
      b_low = b + layout.b_rows * c_stride;
      pack_rows<Word>(
          x + m0 * inputs, inputs, panels, layout.b_rows, share(layout.b_rows, threads, thread),
          [&](int64_t r) {
            const int64_t element = backward ? r : r / kChunk * kChunk + element_at(r % kChunk);
            return element < inputs ? element : -1;
          },
          b);
      pack_rows<Word>(
          low + m0 * rank, rank, panels, layout.b_low_rows, share(layout.b_low_rows, threads, thread),
          [&](int64_t r) { return r < rank ? r : -1; }, b_low);
#pragma omp barrier

      if (!backward) {
        const Range mine = share(outputs, threads, thread, kMicroRows);
        const int64_t chunks = chunks_of(q.cols), per_tile = kTileDepth / kChunk;
        for (int64_t n0 = mine.begin; n0 < mine.end; n0 += kTileOutputs) {
          const int64_t n_count = mine.end - n0 < kTileOutputs ? mine.end - n0 : kTileOutputs;
          const int64_t padded = round_up(n_count, kMicroRows);  // rows beyond n_count repeat old ones and are dropped
          std::memset(c, 0, static_cast<size_t>(padded * c_stride) * 4);
          for (int64_t c0 = 0; c0 < chunks; c0 += per_tile) {
            const int64_t count = chunks - c0 < per_tile ? chunks - c0 : per_tile, depth = count * kChunk / kDepth;
            for (int64_t i = 0; i < n_count; ++i) {
              decode_row(q, book, lanes, n0 + i, c0, count, scales, row);
              pack_along<Word>(row, count * kChunk, tile + i * depth);
            }
            std::memset(tile + n_count * depth, 0, static_cast<size_t>((padded - n_count) * depth) * 4);
            multiply_tile<Word>(tile, depth, 1, padded, b, panels, layout.b_rows, c0 * kChunk / kDepth, depth, c,
                                c_stride);
          }
          if (rank > 0) {
            const int64_t depth = layout.b_low_rows;
            for (int64_t i = 0; i < n_count; ++i) {
              row[rank] = 0.0f;
              for (int64_t r = 0; r < rank; ++r) row[r] = to_float(lora[(n0 + i) * rank + r]);
              pack_along<Word>(row, depth * kDepth, tile + i * depth);
            }
            std::memset(tile + n_count * depth, 0, static_cast<size_t>((padded - n_count) * depth) * 4);
            multiply_tile<Word>(tile, depth, 1, padded, b_low, panels, depth, 0, depth, c, c_stride);
          }
          for (int64_t m = 0; m < panels.tokens; ++m) {
            for (int64_t i = 0; i < n_count; i += kWidth) {
              float lane[kWidth];
              const int64_t n = n_count - i < kWidth ? n_count - i : kWidth;
              for (int64_t l = 0; l < n; ++l) lane[l] = c[(i + l) * c_stride + m];
              for (int64_t l = n; l < kWidth; ++l) lane[l] = 0.0f;
              Vec v = load(lane);
              if (bias != nullptr) v = v + load_tail(bias + n0 + i, n);
              store_tail(y + (m0 + m) * outputs + n0 + i, v, n);
            }
          }
        }
        continue;
      }

      const Range mine = share(chunks_of(q.cols), threads, thread);
      const int64_t per_tile = kBackOutputs / kChunk;
      for (int64_t c0 = mine.begin; c0 < mine.end; c0 += per_tile) {
        const int64_t count = mine.end - c0 < per_tile ? mine.end - c0 : per_tile, columns = count * kChunk;
        std::memset(c, 0, static_cast<size_t>(columns * c_stride) * 4);
        for (int64_t n0 = 0; n0 < q.rows; n0 += kBackDepth) {
          const int64_t n_count = q.rows - n0 < kBackDepth ? q.rows - n0 : kBackDepth;
          for (int64_t i = 0; i < n_count; i += kDepth) {
            for (int64_t d = 0; d < kDepth; ++d) {
              if (i + d < n_count) {
                decode_row(q, book, lanes, n0 + i + d, c0, count, scales, row + d * kBackOutputs);
              } else {
                std::memset(row + d * kBackOutputs, 0, static_cast<size_t>(columns) * 4);
              }
            }
            pack_across<Word>(row, kBackOutputs, columns, tile + i / kDepth * columns);
          }
          multiply_tile<Word>(tile, 1, columns, columns, b, panels, layout.b_rows, n0 / kDepth,
                              (n_count + kDepth - 1) / kDepth, c, c_stride);
        }
        if (rank > 0) {
          for (int64_t r = 0; r < rank; r += kDepth) {
            for (int64_t d = 0; d < kDepth; ++d) {
              for (int64_t p = 0; p < columns; ++p) {
                const int64_t col = (c0 + p / kChunk) * kChunk + element_at(p % kChunk);
                row[d * kBackOutputs + p] =
                    r + d < rank && col < q.cols ? to_float(lora[(r + d) * q.cols + col]) : 0.0f;
              }
            }
            pack_across<Word>(row, kBackOutputs, columns, tile + r / kDepth * columns);
          }
          multiply_tile<Word>(tile, 1, columns, columns, b_low, panels, layout.b_low_rows, 0, layout.b_low_rows, c,
                              c_stride);
        }
        for (int64_t m = 0; m < panels.tokens; ++m) {
          for (int64_t j = 0; j < columns && c0 * kChunk + j < q.cols; j += kWidth) {
            const int64_t col = c0 * kChunk + j, n = q.cols - col < kWidth ? q.cols - col : kWidth;
            float lane[kWidth];
            for (int64_t l = 0; l < kWidth; ++l) {
              const int64_t p = (j + l) / kChunk * kChunk + position_of((j + l) % kChunk);
              lane[l] = c[p * c_stride + m];
            }
            store_tail(y + (m0 + m) * q.cols + col, load(lane), n);
          }
        }
      }
    }
  }
}

template <class T>
size_t workspace_bytes(const Linear4bitArgs& args) {
  using Word = typename WordOf<T>::Type;
  const int64_t forward = Layout::of<Word>(args, false).bytes(args.tokens);
  const int64_t backward = Layout::of<Word>(args, true).bytes(args.tokens);
  return static_cast<size_t>(forward > backward ? forward : backward) + 64;
}

}  // namespace

// ----------------------------------------------------------------------------

void DEFTCORE_KERNEL(linear_4bit_many)(const Linear4bitArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) { linear<decltype(t)>(args, false); });
}

void DEFTCORE_KERNEL(linear_4bit_backward)(const Linear4bitArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) { linear<decltype(t)>(args, true); });
}

void DEFTCORE_KERNEL(linear_4bit_many_workspace)(const Linear4bitArgs& args, size_t* bytes) {
  dispatch_dtype(args.dtype, [&](auto t) { *bytes = workspace_bytes<decltype(t)>(args); });
}

}  // namespace deftcore::cpu
