// Products of 4-bit weights with many tokens, and those of the backward. Both are, with vectors over tokens,
//   C[i, m] += sum_r A[i, r] B[r, m]
// where A is a tile of weights decoded to the compute type, read one broadcast word at a time, and B is the other
// operand packed so that a row holds a panel of tokens:
//   forward    i = output n,   r = input k:   A[i, r] = tile[n][k],  C^T = y
//   backward   i = input k,    r = output n:  A[i, r] = tile[n][k],  C^T = grad x
// A tile stays in the second-level cache and serves every token of a block; the float copy of W never exists. The
// low-rank term is one more tile, copied instead of decoded. Parts own outputs, so repeats are bit-equal.
#include "deftcore/workspace.h"
#include "micro4.h"

namespace deftcore::cpu {
namespace {

// Sizes of blocks, chosen by what they have to fit, not measured one by one: a tile of either direction is 128 KiB of
// floats and leaves the second-level cache room for a panel of tokens; a pass takes 512 tokens with AVX-512.
constexpr int64_t kBlockTokens = 11 * kPanelTokens;  // tokens per pass over W
constexpr int64_t kDepth = 2048;                     // forward: inputs per tile
constexpr int64_t kOutputs = 16;                     // forward: outputs per tile
constexpr int64_t kBackDepth = 256;                  // backward: rows of W per tile
constexpr int64_t kBackOutputs = 128;                // backward: columns of W per tile, a cache line of bytes
constexpr int64_t kBackRows = 1024;                  // backward: rows of W per sweep over the columns
constexpr int64_t kMaxGroups = kDepth / 32;          // blocks of 32 in a tile's row

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
  l.own_bytes = static_cast<int64_t>(bytes_of([&](Workspace& part) { lay_out_part(args, backward, l, part); }));
  l.own = room.take<char>(l.parts * l.own_bytes);
  return l;
}

// One part of a pass over W, forward: outputs `mine` for the panel's tokens.
template <class Word, class T>
void forward_pass(const Linear4bitArgs& args, const Layout<Word>& layout, const Scratch<Word>& scratch, Range mine,
                  TokenPanels panels, const typename Word::Type* b, const typename Word::Type* b_low, T* y) {
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
                   TokenPanels panels, const typename Word::Type* b, const typename Word::Type* b_low, T* y) {
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
          if (is_regular(q)) {
            const uint8_t* bytes = lines + (k0 - mine.begin) / 2 * kBackRows + (n0 + n) * (kBackOutputs / 2);
            return decode_regular(q, book, bytes, r0 + n0 + n, k0, columns(k0), scratch.scales, out);
          }
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
  using Word = WordOf<T>;
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
      const TokenPanels panels{args.tokens - m0 < layout.tokens ? args.tokens - m0 : layout.tokens};
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
  return bytes_of([&](Workspace& room) {
    dispatch_dtype(args.dtype, [&](auto t) { lay_out<WordOf<decltype(t)>>(args, backward, room); });
  });
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
