// The down projection over 4-bit weights: packed rows of inactive neurons are not read, and active ones are decoded in
// registers (few tokens) or once per panel (more).
#pragma once

#include "decode4.h"
#include "sparse_down.h"

namespace deftcore::cpu {
namespace {

constexpr int64_t kDecodeTokens = 4;  // tokens that share one decode in registers
// Up to here rows are decoded in registers, at most twice; beyond, once per panel. Chosen by that count.
constexpr int64_t kDirectTokens = 8;

// Rows of the active list that one pass over the columns takes, and what each is multiplied by.
struct Piece {
  const uint8_t *rows[kStreamRows], *next[kStreamRows];  // packed; `next` is prefetched alongside
  int64_t count;
  const float* factors;  // [count, tokens, factor_stride]: by the number of the block, from that of column 0
  int64_t factor_stride;
  int block_shift;      // log2 of the block size; 63 for one factor per row
  const float* scales;  // of column 0 onwards, or null: what the piece's sum is multiplied by
};

// acc[m, j ...] += sum_r factor * code[row r, j ...] for kStrips strips.
template <int kTokens, int kStrips>
void down_tile4(const CodeBook& book, const Piece& p, int64_t j, float* acc, int64_t acc_stride) {
  Strip sums[kTokens][kStrips];
  for (auto& of_token : sums) {
    for (Strip& sum : of_token) {
      for (Vec& v : sum.v) v = Vec(0.0f);
    }
  }
  for (int64_t r = 0; r < p.count; ++r) {
    const uint8_t* bytes = p.rows[r] + j / 2;
    const float* factors = p.factors + r * kTokens * p.factor_stride;
    __builtin_prefetch(p.next[r] + j / 2, 0, 2);
    for (int i = 0; i < kStrips; ++i) {
      const Strip codes = load_strip(book, bytes + i * (kStrip / 2));
      const int64_t block = (j + i * kStrip) >> p.block_shift;
      for (int m = 0; m < kTokens; ++m) {
        const Vec factor(factors[m * p.factor_stride + block]);
        for (int v = 0; v < kStripVecs; ++v) sums[m][i].v[v] = fma(codes.v[v], factor, sums[m][i].v[v]);
      }
    }
  }
  for (int m = 0; m < kTokens; ++m) {
    for (int i = 0; i < kStrips; ++i) {
      const Strip sum = in_order(sums[m][i]);
      for (int v = 0; v < kStripVecs; ++v) {
        const int64_t column = j + i * kStrip + v * kWidth;
        float* out = acc + m * acc_stride + column;
        store(out, load(out) + (p.scales != nullptr ? sum.v[v] * load(p.scales + column) : sum.v[v]));
      }
    }
  }
}

// Strips of a tile: sums in half of the registers, where more were measured slower.
constexpr int strips_of_tile(int tokens) {
  int strips = 4;
  while (strips > 1 && kStripVecs * strips * tokens > kRegisters / 2) --strips;
  return strips;
}

// acc[m, j] += sum_k h[k, m] w[list[k], j] for kTokens tokens of h [active, tokens] and j in columns, which start at a
// multiple of kColumnUnit. `factors` is room for kStreamRows * kTokens rows of scales.
template <int kTokens>
void down_few4(const Quant4& q, const int32_t* list, int64_t active, const float* h, int64_t tokens, Range columns,
               float* factors, float* acc, int64_t acc_stride) {
  constexpr int kStrips = strips_of_tile(kTokens);
  const CodeBook book(q.code);
  Piece p{};
  p.factors = factors;
  p.factor_stride = q.column_blocks ? 1 : row_scale_size(q);
  p.block_shift = q.column_blocks ? 63 : block_shift(q);
  for (int64_t k0 = 0; k0 < active; k0 += p.count) {
    const int64_t group = list[k0] / q.block_size;
    p.count = 0;
    while (p.count < kStreamRows && k0 + p.count < active) {
      const int64_t k = k0 + p.count, row = list[k], ahead = k + kStreamRows;
      if (q.column_blocks && row / q.block_size != group) break;  // rows of one group share their scales
      p.rows[p.count] = packed_row(q, row);
      p.next[p.count] = packed_row(q, list[ahead < active ? ahead : active - 1]);
      float* mine = factors + p.count * kTokens * p.factor_stride;
      if (q.column_blocks) {
        for (int m = 0; m < kTokens; ++m) mine[m] = h[k * tokens + m];
      } else {
        const int64_t first = columns.begin / q.block_size, blocks = (columns.end - 1) / q.block_size - first + 1;
        float* last = mine + (kTokens - 1) * p.factor_stride + first;
        decode_scales(q, row * q.cols / q.block_size + first, blocks, last);
        for (int m = 0; m < kTokens; ++m) {  // the last in place
          float* out = mine + m * p.factor_stride + first;
          for (int64_t b = 0; b < blocks; ++b) out[b] = last[b] * h[k * tokens + m];
        }
      }
      ++p.count;
    }
    p.scales = q.column_blocks ? column_scales(q, list[k0], 0) : nullptr;
    int64_t j = columns.begin;
    for (; j + kStrips * kStrip <= columns.end; j += kStrips * kStrip) {
      down_tile4<kTokens, kStrips>(book, p, j, acc, acc_stride);
    }
    for (; j + kStrip <= columns.end; j += kStrip) down_tile4<kTokens, 1>(book, p, j, acc, acc_stride);
    for (; j < columns.end; ++j) {  // a ragged width, with column blocks only
      for (int64_t r = 0; r < p.count; ++r) {
        const float w = decode_one(q, list[k0 + r], j);
        for (int m = 0; m < kTokens; ++m) acc[m * acc_stride + j] += h[(k0 + r) * tokens + m] * w;
      }
    }
  }
}

// Panels of decoded rows. `scales` is room for a panel's rows of scales, decoded when a new set of rows begins.
template <class Word>
auto fill_from4(const Quant4& q, const CodeBook& book, const int32_t* list, Range columns, float* scales) {
  return [&q, &book, list, columns, scales](Panel<Word>& panel, int64_t k0, int64_t count, int64_t j) {
    const int64_t stride = row_scale_size(q);
    if (j == columns.begin && !q.column_blocks) {
      for (int64_t r = 0; r < count; ++r) {
        const int64_t first = j / q.block_size, row = list[k0 + r];
        decode_scales(q, row * q.cols / q.block_size + first, (columns.end - 1) / q.block_size - first + 1,
                      scales + r * stride + first);
      }
    }
    const int shift = block_shift(q);
    fill_values(panel, count, [&](int64_t r, int v) {
      const int64_t row = list[k0 + r], col = j + v * kWidth, left = columns.end - col;
      if (v == 0) __builtin_prefetch(packed_row(q, row) + (j + kTileColumns) / 2 + 32, 0, 2);
      if (left < kWidth || (kWidth == 1 && q.column_blocks)) {
        float lanes[kWidth] = {};
        for (int64_t l = 0; l < left && l < kWidth; ++l) lanes[l] = decode_one(q, row, col + l);
        return load(lanes);
      }
#if defined(DEFTCORE_VECTORS)
      const Vec value = book(load_nibbles(packed_row(q, row) + col / 2));
#else
      const Vec value = book(static_cast<Words>(packed_row(q, row)[col / 2] >> (col % 2 ? 0 : 4)));
#endif
      return value * (q.column_blocks ? load(column_scales(q, row, col)) : Vec(scales[r * stride + (col >> shift)]));
    });
  };
}

// Floats of scales that a part holds at once: a panel's rows, or a piece's for each of its tokens.
template <class Word>
int64_t down_scales(const Quant4& q) {
  return std::max(Panel<Word>::kRows, kStreamRows * kDecodeTokens) * row_scale_size(q);
}

// b.acc += h W over the list, in 4 bits. `scales` has room for down_scales.
template <class Word>
void down_product4(const Quant4& q, int64_t active, int64_t tokens, Range columns, const Buffers& b, float* scales) {
  if (tokens > kDirectTokens) {
    const CodeBook book(q.code);
    return down_tokens<Word>(active, b.template words<Word>(), tokens, columns, b.acc, b.acc_stride,
                             fill_from4<Word>(q, book, b.list, columns, scales));
  }
  for (int64_t m = 0; m < tokens; m += kDecodeTokens) {
    const auto few = [&](auto n) {
      down_few4<n()>(q, b.list, active, b.h + m, tokens, columns, scales, b.acc + m * b.acc_stride, b.acc_stride);
    };
    using std::integral_constant;
    switch (tokens - m) {
      case 1: few(integral_constant<int, 1>{}); break;
      case 2: few(integral_constant<int, 2>{}); break;
      case 3: few(integral_constant<int, 3>{}); break;
      default: few(integral_constant<int, 4>{}); break;
    }
  }
}

}  // namespace
}  // namespace deftcore::cpu
