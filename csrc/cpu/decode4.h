// Decoding 4-bit weights in registers, shared by the dense products and the sparse MLPs.
//
// Dot products of few tokens (dot4.h) take a chunk of 8 * kWidth elements as kWidth 32-bit words. Shifting the words by
// 4 s and looking their lowest nibble up gives element 8 l + (s ^ 1) of the chunk in lane l, since the even element is
// in the high nibble. So a chunk decodes without a shuffle into "positions" s * kWidth + l, and x is put in that order
// once per call. A lane's eight elements lie in one block (blocks are 32 or more), so that one vector holds a chunk's
// scales. Everything else decodes in strips, whose vectors come in an order that costs nothing and are put in order
// where that matters.
#pragma once

#include <algorithm>

#include "deftcore/format4.h"
#include "deftcore/workspace.h"
#include "lookup4.h"

namespace deftcore::cpu {
namespace {

constexpr int64_t kChunk = 8 * kWidth;

inline int64_t chunks_of(int64_t cols) { return (cols + kChunk - 1) / kChunk; }

inline Strip strip_in_order(const CodeBook& book, const uint8_t* p) { return in_order(load_strip(book, p)); }

inline float scale_of(const Quant4& q, int64_t block) {
  if (q.nested_absmax == nullptr) return static_cast<const float*>(q.absmax)[block];
  return q.nested_code[static_cast<const uint8_t*>(q.absmax)[block]] * q.nested_absmax[block / kNestedBlock] +
         q.nested_offset;
}

// scales[first, first + count) as floats.
inline void decode_scales(const Quant4& q, int64_t first, int64_t count, float* out) {
  if (q.nested_absmax == nullptr) {
    std::copy_n(static_cast<const float*>(q.absmax) + first, count, out);  // from nowhere where a matrix is empty
    return;
  }
  const uint8_t* codes = static_cast<const uint8_t*>(q.absmax) + first;
  const Vec offset(q.nested_offset);
  for (int64_t i = 0; i < count;) {  // pieces with one nested scale
    const int64_t piece = (first + i) / kNestedBlock, end = (piece + 1) * kNestedBlock - first;
    const int64_t stop = end < count ? end : count;
    const Vec scale(q.nested_absmax[piece]);
    for (; i + kWidth <= stop; i += kWidth) store(out + i, gather(q.nested_code, codes + i) * scale + offset);
    for (; i < stop; ++i) out[i] = scale_of(q, first + i);
  }
}

// Rows that start on a block: the fast layout. Any other shape is decoded element by element.
inline bool is_regular(const Quant4& q) { return !q.column_blocks && q.cols % q.block_size == 0; }

// The scales of columns [col, ...) of a row of a matrix with column blocks.
inline const float* column_scales(const Quant4& q, int64_t row, int64_t col) {
  return static_cast<const float*>(q.absmax) + row / q.block_size * q.cols + col;
}

inline const uint8_t* packed_row(const Quant4& q, int64_t row) { return q.packed + row * (q.cols / 2); }

// Blocks are powers of two: column >> block_shift(q) is a column's block, for less than a division.
inline int block_shift(const Quant4& q) { return __builtin_ctzll(static_cast<unsigned long long>(q.block_size)); }

// How many rows, a multiple of `group`, lie between what is read and what is prefetched: of short rows many, or the
// bytes would come too late.
inline int64_t rows_ahead(int64_t row_bytes, int64_t group) {
  constexpr int64_t kBytesAhead = 4096;
  return round_up(std::max<int64_t>(kBytesAhead / std::max<int64_t>(row_bytes, 1), 1), group);
}

// Floats that hold a row's scales, and zeros for the lanes beyond.
inline int64_t row_scale_size(const Quant4& q) { return q.cols / q.block_size + 16; }

// The scales of a regular row's columns [first, first + count), then 16 zeros; `first` starts a block.
inline void decode_row_scales(const Quant4& q, int64_t row, int64_t first, int64_t count, float* out) {
  const int64_t blocks = (count + q.block_size - 1) / q.block_size;
  decode_scales(q, (row * q.cols + first) / q.block_size, blocks, out);
  for (int64_t i = blocks; i < blocks + 16; ++i) out[i] = 0.0f;
}

// All scales of regular rows row_of(k), k in [begin, begin + count), as decode_row_scales leaves them for each. Rows
// may be short: the scales of neighbours, which lie in a row, are decoded together.
template <class RowOf>
void decode_rows_scales(const Quant4& q, RowOf&& row_of, int64_t begin, int64_t count, float* out) {
  const int64_t blocks = q.cols / q.block_size, stride = row_scale_size(q), first = row_of(begin);
  if (row_of(begin + count - 1) != first + count - 1) {
    for (int64_t r = 0; r < count; ++r) decode_row_scales(q, row_of(begin + r), 0, q.cols, out + r * stride);
    return;
  }
  decode_scales(q, first * blocks, count * blocks, out);
  for (int64_t r = count - 1; r >= 0; --r) {
    std::memmove(out + r * stride, out + r * blocks, static_cast<size_t>(blocks) * sizeof(float));
    std::fill_n(out + r * stride + blocks, stride - blocks, 0.0f);
  }
}

// One weight of any layout.
inline float decode_one(const Quant4& q, int64_t row, int64_t col) {
  const int64_t flat = row * q.cols + col;
  const float scale = q.column_blocks ? *column_scales(q, row, col) : scale_of(q, flat / q.block_size);
  return q.code[q.packed[flat / 2] >> (flat % 2 ? 0 : 4) & 15] * scale;
}

// Values of columns [first, first + count) of a row of a matrix with column blocks, in order; `first` is even.
inline void decode_column_blocks(const Quant4& q, const CodeBook& book, int64_t row, int64_t first, int64_t count,
                                 float* out) {
  int64_t j = 0;
  if (q.cols % 2 == 0) {
    const uint8_t* bytes = packed_row(q, row) + first / 2;
    const float* scale = column_scales(q, row, first);
    for (; j + kStrip <= count; j += kStrip) {
      const Strip codes = strip_in_order(book, bytes + j / 2);
      for (int v = 0; v < kStripVecs; ++v) {
        const int64_t i = j + v * kWidth;
        store(out + i, codes.v[v] * load(scale + i));
      }
    }
  }
  for (; j < count; ++j) out[j] = decode_one(q, row, first + j);
}

// The same of a regular matrix, whose bytes of these columns stand at `bytes`; first and count are multiples of 32.
// `scales` is room for count / block_size + 2 floats.
inline void decode_regular(const Quant4& q, const CodeBook& book, const uint8_t* bytes, int64_t row, int64_t first,
                           int64_t count, float* scales, float* out) {
  const int64_t begin = row * q.cols + first, block = begin / q.block_size;
  decode_scales(q, block, (begin + count - 1) / q.block_size - block + 1, scales);
  for (int64_t j = 0; j < count; ++scales) {
    const int64_t left = q.block_size - (begin + j) % q.block_size, end = left < count - j ? j + left : count;
    const Vec scale(*scales);
    for (; j < end; j += kStrip) {
      const Strip codes = strip_in_order(book, bytes + j / 2);
      for (int v = 0; v < kStripVecs; ++v) store(out + j + v * kWidth, codes.v[v] * scale);
    }
  }
}

// The same of any layout.
inline void decode_columns(const Quant4& q, const CodeBook& book, int64_t row, int64_t first, int64_t count,
                           float* scales, float* out) {
  if (q.column_blocks) return decode_column_blocks(q, book, row, first, count, out);
  if (is_regular(q)) {
    return decode_regular(q, book, packed_row(q, row) + first / 2, row, first, count, scales, out);
  }
  for (int64_t j = 0; j < count; ++j) out[j] = decode_one(q, row, first + j);
}

}  // namespace
}  // namespace deftcore::cpu
