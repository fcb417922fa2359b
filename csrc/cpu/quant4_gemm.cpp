// Products of 4-bit weights with many tokens, and those of the backward. Both are, with vectors over tokens,
//   C[i, m] += sum_r A[i, r] B[r, m]
// where A is a tile of weights decoded to the compute type, read one broadcast word at a time, and B is the other
// operand packed so that a row holds a panel of tokens:
//   forward    i = output n,   r = input k:   A[i, r] = tile[n][k],  C^T = y
//   backward   i = input k,    r = output n:  A[i, r] = tile[n][k],  C^T = grad x
// A tile stays in the second-level cache and serves every token of a block; the float copy of W never exists. The
// low-rank term is one more tile, copied instead of decoded. Parts own outputs, so repeats are bit-equal.
#include "decode4.h"
#include "deftcore/workspace.h"

namespace deftcore::cpu {
namespace {

constexpr int kMaxVecs = 3;  // vectors of tokens per panel
#if defined(__AVX512F__)
constexpr int kMicroRows = 8;  // with 3 vectors: 24 accumulators
#else
constexpr int kMicroRows = 4;
#endif
constexpr int64_t kPanelTokens = kMaxVecs * kWidth;
constexpr int64_t kBlockTokens = 11 * kPanelTokens;  // tokens per pass over W
constexpr int64_t kDepth = 2048;                     // forward: inputs per tile
constexpr int64_t kOutputs = 16;                     // forward: outputs per tile
constexpr int64_t kBackDepth = 256;                  // backward: rows of W per tile
constexpr int64_t kBackOutputs = 128;                // backward: columns of W per tile, a cache line of bytes
constexpr int64_t kBackRows = 1024;                  // backward: rows of W per sweep over the columns
constexpr int64_t kMaxGroups = kDepth / 32;          // blocks of 32 in a tile's row

// What one multiply-add takes of A and B. Float: one element of the reduction.
struct FloatWord {
  using Type = float;
  static constexpr int64_t kElements = 1;
  static Vec load_row(const float* p) { return load(p); }
  static Vec multiply(const float* a, Vec b, Vec sum) { return fma(Vec(*a), b, sum); }
  template <class T>
  static float from_tokens(const T* x, int64_t left) {
    return left > 0 ? to_float(*x) : 0.0f;
  }
};

#if defined(__AVX512BF16__)
// Two bfloat16 that are neighbours along the reduction.
struct PairWord {
  using Type = uint32_t;
  static constexpr int64_t kElements = 2;
  static __m512bh load_row(const uint32_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Vec multiply(const uint32_t* a, __m512bh b, Vec sum) {
    return _mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_set1_epi32(static_cast<int>(*a)), b);
  }
  static uint32_t from_tokens(const BFloat16* x, int64_t left) {
    return (left > 0 ? x[0].bits : 0u) | (left > 1 ? static_cast<uint32_t>(x[1].bits) << 16 : 0u);
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
      decltype(Word::load_row(b)) row[kVecs];
      for (int v = 0; v < kVecs; ++v) row[v] = Word::load_row(b + (r * kVecs + v) * kWidth);
      for (int i = 0; i < kMicroRows; ++i) {
        for (int v = 0; v < kVecs; ++v) sum[i][v] = Word::multiply(a + i * t.row + r * t.step, row[v], sum[i][v]);
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
struct Panels {
  int64_t tokens;
  int64_t count() const { return (tokens + kPanelTokens - 1) / kPanelTokens; }
  int vecs(int64_t panel) const {
    const int64_t left = tokens - panel * kPanelTokens;
    return left >= kPanelTokens ? kMaxVecs : static_cast<int>((left + kWidth - 1) / kWidth);
  }
  int64_t padded() const { return (tokens + kWidth - 1) / kWidth * kWidth; }
};

// B from x [tokens, width]: panel p starts at b + p * kPanelTokens * depth words, its rows r in `range` hold the
// panel's tokens side by side.
template <class Word, class T>
void pack_tokens(const T* x, int64_t width, Panels panels, int64_t depth, Range range, typename Word::Type* b) {
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
          out[r * lanes + m] = Word::from_tokens(row + element, width - element);
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
                   Panels panels, int64_t b_depth, int64_t first, int64_t depth, float* c, int64_t c_stride) {
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
void to_words(const float* values, int64_t count, float* out) {
  std::memcpy(out, values, static_cast<size_t>(count) * 4);
}
#if defined(__AVX512BF16__)
void to_words(const float* values, int64_t count, uint32_t* out) {  // count is even
  int64_t p = 0;
  for (; p + 32 <= count; p += 32) {
    _mm512_storeu_si512(out + p / 2, (__m512i)_mm512_cvtne2ps_pbh(load(values + p + 16).v, load(values + p).v));
  }
  for (; p < count; p += 2) {
    out[p / 2] = to_bfloat16(values[p]).bits | static_cast<uint32_t>(to_bfloat16(values[p + 1]).bits) << 16;
  }
}
#endif

void to_words_across(const float* values, int64_t, int64_t count, float* out) { to_words(values, count, out); }
#if defined(__AVX512BF16__)
void to_words_across(const float* values, int64_t stride, int64_t count, uint32_t* out) {
  const auto words = [](const float* v) {
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(v)));
  };
  for (int64_t p = 0; p < count; p += kWidth) {  // kBackOutputs is a multiple of kWidth
    const __m512i high = _mm512_slli_epi32(words(values + stride + p), 16);
    _mm512_storeu_si512(out + p, _mm512_or_si512(words(values + p), high));
  }
}
#endif

// Unscaled codes of a regular row's columns as words along it.
void codes_to_words(const Quant4& q, const CodeBook& book, int64_t row, int64_t first, int64_t count, float* out) {
  const uint8_t* bytes = packed_row(q, row) + first / 2;
#if defined(__AVX2__) || defined(__AVX512F__)
  for (int64_t j = 0; j < count; j += kWidth) store(out + j, book(load_nibbles(bytes + j / 2)));
#else
  (void)book;
  for (int64_t j = 0; j < count; ++j) out[j] = q.code[bytes[j / 2] >> (j % 2 ? 0 : 4) & 15];
#endif
}
#if defined(__AVX512BF16__)
void codes_to_words(const Quant4& q, const CodeBook& book, int64_t row, int64_t first, int64_t count, uint32_t* out) {
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

// The workspace: B with the low-rank rows, and what each part has of its own.
template <class Word>
struct Layout {
  int64_t b_rows, low_rows;  // words of B along the reduction
  int64_t parts, tokens;     // tokens per pass
  typename Word::Type* b;    // [b_rows + low_rows, tokens], whole vectors
  char* own;
  int64_t own_bytes;
};

// A part's own.
template <class Word>
struct Scratch {
  typename Word::Type* tile;  // weights, or the low-rank term's rows
  float* row;                 // one row, decoded
  float* c;                   // sums
  float* scales;
  uint8_t* lines;  // backward over a regular matrix: a sweep's packed bytes
};

template <class Word>
Scratch<Word> lay_out_part(const Linear4bitArgs& args, bool backward, const Layout<Word>& l, Workspace& room) {
  Scratch<Word> own{};
  const int64_t rank = round_up(args.rank, 2), padded = round_up(l.tokens, kWidth);
  if (backward) {
    const int64_t most = round_up((round_up(args.w.cols, kBackOutputs) + l.parts - 1) / l.parts, kBackOutputs);
    own.tile = room.take<typename Word::Type>(std::max(rank, kBackDepth) * kBackOutputs);
    own.row = room.take<float>(2 * kBackOutputs);
    own.c = room.take<float>(most * padded);
    own.scales = room.take<float>(kBackOutputs);
    own.lines = room.take<uint8_t>(is_regular(args.w) ? kBackRows * most / 2 : 0);
  } else {
    own.tile = room.take<typename Word::Type>(std::max(rank, kDepth) * kOutputs);
    own.row = room.take<float>(std::max(rank, kDepth));
    own.c = room.take<float>(kOutputs * padded);
    own.scales = room.take<float>(kOutputs * kMaxGroups);
  }
  return own;
}

template <class Word>
Layout<Word> lay_out(const Linear4bitArgs& args, bool backward, Workspace& room) {
  Layout<Word> l{};
  l.tokens = std::min(args.tokens, kBlockTokens);
  l.b_rows = (backward ? args.w.rows : args.w.cols) / Word::kElements + 1;
  l.low_rows = (args.rank + Word::kElements - 1) / Word::kElements;
  l.parts = parts_for(args.w.rows * args.w.cols * args.tokens / 16);
  l.b = room.take<typename Word::Type>((l.b_rows + l.low_rows) * round_up(l.tokens, kWidth));
  Workspace part;
  lay_out_part(args, backward, l, part);
  l.own_bytes = part.bytes();
  l.own = room.take<char>(l.parts * l.own_bytes);
  return l;
}

// One part of a pass over W, forward: outputs `mine` for the panel's tokens.
template <class Word, class T>
void forward_pass(const Linear4bitArgs& args, const Layout<Word>& layout, const Scratch<Word>& scratch, Range mine,
                  Panels panels, const typename Word::Type* b, const typename Word::Type* b_low, T* y) {
  using W = typename Word::Type;
  const Quant4& q = args.w;
  const T *lora = static_cast<const T*>(args.lora), *bias = static_cast<const T*>(args.bias);
  const CodeBook book(q.code);
  const int64_t c_stride = panels.padded(), rank = args.rank;
  W* tile = scratch.tile;
  float one = 1.0f;
  for (int64_t n0 = mine.begin; n0 < mine.end; n0 += kOutputs) {
    const int64_t n_count = mine.end - n0 < kOutputs ? mine.end - n0 : kOutputs;
    const int64_t padded = round_up(n_count, kMicroRows);  // the rows beyond are zero and dropped
    std::memset(scratch.c, 0, static_cast<size_t>(padded * c_stride) * 4);
    const auto clear_rest = [&](int64_t words) {
      std::memset(tile + n_count * words, 0, static_cast<size_t>((padded - n_count) * words) * 4);
    };
    for (int64_t k0 = 0; k0 < q.cols; k0 += kDepth) {
      const int64_t count = q.cols - k0 < kDepth ? q.cols - k0 : kDepth;
      const int64_t words = (count + Word::kElements - 1) / Word::kElements;
      Tile t{words, 1, words, &one, 0};
      if (is_regular(q)) {
        t.group = (q.block_size < kDepth ? q.block_size : kDepth) / Word::kElements;
        t.scales = scratch.scales;
        t.scale_row = kMaxGroups;
        for (int64_t i = 0; i < padded; ++i) {
          float* scales = scratch.scales + i * kMaxGroups;
          if (i < n_count) {
            // The next tile's bytes: too few lie together for the hardware to see them coming.
            const bool last = k0 + kDepth >= q.cols;
            const int64_t next = last ? n0 + i + kOutputs : n0 + i;
            if (next < mine.end) {
              const uint8_t* bytes = packed_row(q, next) + (last ? 0 : (k0 + kDepth) / 2);
              for (int64_t line = 0; line < kDepth / 2; line += 64) __builtin_prefetch(bytes + line, 0, 2);
            }
            codes_to_words(q, book, n0 + i, k0, count, tile + i * words);
            decode_scales(q, ((n0 + i) * q.cols + k0) / q.block_size, (count + q.block_size - 1) / q.block_size,
                          scales);
          } else {
            std::memset(scales, 0, kMaxGroups * 4);
          }
        }
      } else {
        for (int64_t i = 0; i < n_count; ++i) {
          scratch.row[words * Word::kElements - 1] = 0.0f;
          decode_columns(q, book, n0 + i, k0, count, scratch.scales, scratch.row);
          to_words(scratch.row, words * Word::kElements, tile + i * words);
        }
      }
      clear_rest(words);
      multiply_tile<Word>(tile, t, padded, b, panels, layout.b_rows, k0 / Word::kElements, words, scratch.c, c_stride);
    }
    if (rank > 0) {
      const int64_t words = layout.low_rows;
      for (int64_t i = 0; i < n_count; ++i) {
        scratch.row[words * Word::kElements - 1] = 0.0f;
        for (int64_t r = 0; r < rank; ++r) scratch.row[r] = to_float(lora[(n0 + i) * rank + r]);
        to_words(scratch.row, words * Word::kElements, tile + i * words);
      }
      clear_rest(words);
      const Tile t{words, 1, words, &one, 0};
      multiply_tile<Word>(tile, t, padded, b_low, panels, words, 0, words, scratch.c, c_stride);
    }
    for (int64_t m = 0; m < panels.tokens; ++m) {
      for (int64_t i = 0; i < n_count; i += kWidth) {
        float lane[kWidth] = {};
        const int64_t n = n_count - i < kWidth ? n_count - i : kWidth;
        for (int64_t l = 0; l < n; ++l) lane[l] = scratch.c[(i + l) * c_stride + m];
        Vec v = load(lane);
        if (bias != nullptr) v = v + load_tail(bias + n0 + i, n);
        store_tail(y + m * q.rows + n0 + i, v, n);
      }
    }
  }
}

// One part of a pass over W, backward: columns `mine` of W. Rows a power of two apart fall on the same cache
// sets, so that a few columns of many rows are read badly where they lie: a sweep's bytes are first copied, row by row,
// into a line per tile and row.
template <class Word, class T>
void backward_pass(const Linear4bitArgs& args, const Layout<Word>& layout, const Scratch<Word>& scratch, Range mine,
                   Panels panels, const typename Word::Type* b, const typename Word::Type* b_low, T* y) {
  using W = typename Word::Type;
  const Quant4& q = args.w;
  const T* lora = static_cast<const T*>(args.lora);
  const CodeBook book(q.code);
  const int64_t c_stride = panels.padded(), rank = args.rank;
  W* tile = scratch.tile;
  uint8_t* lines = scratch.lines;
  float one = 1.0f;
  // Rows [0, rows) of a tile of `count` columns; values(n, out) writes one as floats.
  const auto multiply_rows = [&](int64_t rows, int64_t count, const W* rhs, int64_t rhs_depth, int64_t first, float* c,
                                 auto values) {
    const int64_t padded = round_up(count, kWidth > kMicroRows ? kWidth : kMicroRows);
    for (int64_t n = 0; n < rows; n += Word::kElements) {
      for (int64_t d = 0; d < Word::kElements; ++d) {
        float* out = scratch.row + d * kBackOutputs;
        if (n + d < rows) values(n + d, out);
        const int64_t from = n + d < rows ? count : 0;
        std::memset(out + from, 0, static_cast<size_t>(padded - from) * 4);
      }
      to_words_across(scratch.row, kBackOutputs, padded, tile + n / Word::kElements * padded);
    }
    const Tile t{1, padded, INT64_MAX, &one, 0};
    multiply_tile<Word>(tile, t, padded, rhs, panels, rhs_depth, first / Word::kElements,
                        (rows + Word::kElements - 1) / Word::kElements, c, c_stride);
  };
  const auto columns = [&](int64_t k0) { return mine.end - k0 < kBackOutputs ? mine.end - k0 : kBackOutputs; };
  const auto c_of = [&](int64_t k0) { return scratch.c + (k0 - mine.begin) * c_stride; };
  std::memset(scratch.c, 0, static_cast<size_t>(round_up(mine.end - mine.begin, kBackOutputs) * c_stride) * 4);

  for (int64_t r0 = 0; r0 < q.rows; r0 += kBackRows) {
    const int64_t r_count = q.rows - r0 < kBackRows ? q.rows - r0 : kBackRows;
    if (is_regular(q)) {
      for (int64_t r = 0; r < r_count; ++r) {
        for (int64_t k0 = mine.begin; k0 < mine.end; k0 += kBackOutputs) {
          std::memcpy(lines + (k0 - mine.begin) / 2 * kBackRows + r * (kBackOutputs / 2),
                      packed_row(q, r0 + r) + k0 / 2, static_cast<size_t>(columns(k0) / 2));
        }
      }
    }
    for (int64_t k0 = mine.begin; k0 < mine.end; k0 += kBackOutputs) {
      for (int64_t n0 = 0; n0 < r_count; n0 += kBackDepth) {
        const int64_t n_count = r_count - n0 < kBackDepth ? r_count - n0 : kBackDepth;
        multiply_rows(n_count, columns(k0), b, layout.b_rows, r0 + n0, c_of(k0), [&](int64_t n, float* out) {
#if defined(__AVX2__) || defined(__AVX512F__)
          if (is_regular(q)) {
            const uint8_t* bytes = lines + (k0 - mine.begin) / 2 * kBackRows + (n0 + n) * (kBackOutputs / 2);
            return decode_regular(q, book, bytes, r0 + n0 + n, k0, columns(k0), scratch.scales, out);
          }
#endif
          decode_columns(q, book, r0 + n0 + n, k0, columns(k0), scratch.scales, out);
        });
      }
    }
  }
  for (int64_t k0 = mine.begin; k0 < mine.end; k0 += kBackOutputs) {
    const int64_t count = columns(k0);
    float* c = c_of(k0);
    if (rank > 0) {
      multiply_rows(rank, count, b_low, layout.low_rows, 0, c, [&](int64_t r, float* out) {
        for (int64_t j = 0; j < count; ++j) out[j] = to_float(lora[r * q.cols + k0 + j]);
      });
    }
    for (int64_t m = 0; m < panels.tokens; ++m) {
      for (int64_t j = 0; j < count; j += kWidth) {
        float lane[kWidth];
        for (int64_t l = 0; l < kWidth; ++l) lane[l] = c[(j + l) * c_stride + m];
        store_tail(y + m * q.cols + k0 + j, load(lane), count - j < kWidth ? count - j : kWidth);
      }
    }
  }
}

template <class T>
void linear(const Linear4bitArgs& args, bool backward) {
  using Word = typename WordOf<T>::Type;
  using W = typename Word::Type;
  const int64_t inputs = backward ? args.w.rows : args.w.cols, outputs = backward ? args.w.cols : args.w.rows;
  Workspace room(args.workspace);
  const Layout<Word> layout = lay_out<Word>(args, backward, room);
  const T *x = static_cast<const T*>(args.x), *low = static_cast<const T*>(args.low);
  T* y = static_cast<T*>(args.y);
  W* b = layout.b;
  const int64_t parts = layout.parts;
  parallel(static_cast<int>(parts), [&](Team& team) {
    for (int64_t m0 = 0; m0 < args.tokens; m0 += layout.tokens) {
      const Panels panels{args.tokens - m0 < layout.tokens ? args.tokens - m0 : layout.tokens};
      W* b_low = b + layout.b_rows * panels.padded();
      team.stage([&](int part) {
        pack_tokens<Word>(x + m0 * inputs, inputs, panels, layout.b_rows, share(layout.b_rows, parts, part), b);
        if (args.rank > 0) {
          pack_tokens<Word>(low + m0 * args.rank, args.rank, panels, layout.low_rows,
                            share(layout.low_rows, parts, part), b_low);
        }
      });
      team.stage([&](int part) {
        Workspace own(layout.own + part * layout.own_bytes);
        const Scratch<Word> scratch = lay_out_part(args, backward, layout, own);
        const Range mine = share(outputs, parts, part, backward ? kBackOutputs : kMicroRows);
        if (backward) {
          backward_pass<Word>(args, layout, scratch, mine, panels, b, b_low, y + m0 * outputs);
        } else {
          forward_pass<Word>(args, layout, scratch, mine, panels, b, b_low, y + m0 * outputs);
        }
      });
    }
  });
}

size_t workspace_size(const Linear4bitArgs& args, bool backward) {
  Workspace room;
  dispatch_dtype(args.dtype, [&](auto t) { lay_out<typename WordOf<decltype(t)>::Type>(args, backward, room); });
  return room.size();
}

}  // namespace

// ----------------------------------------------------------------------------

void DEFTCORE_KERNEL(linear_4bit_many)(const Linear4bitArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) { linear<decltype(t)>(args, false); });
}

void DEFTCORE_KERNEL(linear_4bit_backward)(const Linear4bitArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) { linear<decltype(t)>(args, true); });
}

size_t DEFTCORE_KERNEL(linear_4bit_many_workspace)(const Linear4bitArgs& args) { return workspace_size(args, false); }

size_t DEFTCORE_KERNEL(linear_4bit_backward_workspace)(const Linear4bitArgs& args) {
  return workspace_size(args, true);
}

}  // namespace deftcore::cpu
