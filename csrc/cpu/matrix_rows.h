// Products of a few tokens with rows of a decoder's matrices, dense, in 4 bits or in int8: sums over a row stay in
// registers, and each weight is read once.
#pragma once

#include "deftcore/decoder_matrix.h"
#include "dot4.h"
#include "dot8.h"

namespace deftcore::cpu {
namespace {

// Activations of a few tokens, in the two orders in which products read them.
struct Activations {
  float* plain;   // [tokens, size]
  float* placed;  // [tokens, placed_stride] in the order of dot4.h, zero beyond size
  int64_t size, placed_stride;

  void set(int64_t token, int64_t column, float value) const {
    constexpr int64_t kSteps = kDotSteps<FloatWord>;
    const int64_t inside = column % kChunk, place = (inside % kSteps ^ 1) * FloatWord::kLanes + inside / kSteps;
    plain[token * size + column] = value;
    placed[token * placed_stride + column - inside + place] = value;
  }
};

inline Quant4 packed_form(const DecoderMatrix& m) {
  Quant4 q{};
  q.packed = static_cast<const uint8_t*>(m.weight);
  q.code = m.code;
  q.absmax = m.absmax;
  q.nested_absmax = m.nested_absmax;
  q.nested_code = m.nested_code;
  q.nested_offset = m.nested_offset == nullptr ? 0.0f : *m.nested_offset;
  q.rows = m.rows;
  q.cols = m.cols;
  q.block_size = m.block_size;
  q.column_blocks = m.column_blocks != 0;
  return q;
}

constexpr int64_t kRowGroup = 4;    // rows of a pass over the activations
constexpr int64_t kTokenGroup = 2;  // tokens of a pass over such rows: 8 sums beside 4 weights

// out[r][m] = rows[r] . x[m]
template <int kTokens, class T>
void dense_tile(const T* const* rows, const float* x, int64_t cols, float (*out)[kTokenGroup]) {
  Vec total[kRowGroup][kTokens];
  for (auto& row : total) {
    for (Vec& v : row) v = Vec(0.0f);
  }
  const auto step = [&](int64_t c, auto fetch) {
    Vec w[kRowGroup];
    for (int64_t r = 0; r < kRowGroup; ++r) w[r] = fetch(rows[r] + c);
    for (int m = 0; m < kTokens; ++m) {
      const Vec v = fetch(x + m * cols + c);
      for (int64_t r = 0; r < kRowGroup; ++r) total[r][m] = fma(w[r], v, total[r][m]);
    }
  };
  int64_t c = 0;
  for (; c + kWidth <= cols; c += kWidth) step(c, [](const auto* p) { return load(p); });
  if (c < cols) step(c, [&](const auto* p) { return load_tail(p, cols - c); });
  for (int64_t r = 0; r < kRowGroup; ++r) {
    for (int m = 0; m < kTokens; ++m) out[r][m] = reduce_add(total[r][m]);
  }
}

template <class T, class RowOf, class Sink>
void dense_rows(const DecoderMatrix& matrix, RowOf&& row_of, Range range, const Activations& x, int64_t tokens,
                Sink&& sink) {
  const T* weight = static_cast<const T*>(matrix.weight);
  for (int64_t k = range.begin; k < range.end; k += kRowGroup) {
    const T* rows[kRowGroup];
    for (int64_t r = 0; r < kRowGroup; ++r) {  // past the end: repeat the last row, drop its result
      rows[r] = weight + row_of(k + r < range.end ? k + r : range.end - 1) * matrix.stride;
    }
    for (int64_t m = 0; m < tokens; m += kTokenGroup) {
      const int64_t count = tokens - m < kTokenGroup ? tokens - m : kTokenGroup;
      float out[kRowGroup][kTokenGroup];
      const float* from = x.plain + m * matrix.cols;
      if (count == 1) {
        dense_tile<1>(rows, from, matrix.cols, out);
      } else {
        dense_tile<kTokenGroup>(rows, from, matrix.cols, out);
      }
      for (int64_t r = 0; r < kRowGroup && k + r < range.end; ++r) {
        for (int64_t j = 0; j < count; ++j) sink(k + r, m + j, out[r][j]);
      }
    }
  }
}

// What a part works in.
struct RowRoom {
  float* scales;   // kDot4Rows row_scale_size(matrix), of the matrix with the longest rows
  Tokens8 tokens;  // x rounded to int8
};
static_assert(kDot4Rows == kDot8Rows);

// The same of all parts, in a step whose longest row has `cols` columns.
struct RowRooms {
  float* scales;
  Tokens8 rounded;  // [parts tokens]
  int64_t scale_stride, tokens;

  RowRoom of(int64_t part) const { return {scales + part * scale_stride, rounded.from(part * tokens)}; }
};

inline RowRooms take_row_rooms(Workspace& room, int64_t tokens, int64_t cols) {
  RowRooms r{};
  r.scale_stride = kDot4Rows * round_up(cols / 32 + 16, 16);  // blocks have 32 columns or more
  r.scales = room.take<float>(most_parts() * r.scale_stride);
  r.rounded = take_tokens8(room, most_parts() * tokens, cols);
  r.tokens = tokens;
  return r;
}

// Calls sink(k, token, y) with y = x W^T + bias for rows row_of(k), k in a range, and every token. row_of rises;
// matrices in int8 are heads, of which all rows are wanted.
template <class RowOf, class Sink>
void matrix_rows(const DecoderMatrix& matrix, RowOf&& row_of, Range range, const Activations& x, int64_t tokens,
                 const RowRoom& room, Sink&& sink) {
  const auto add_bias = [&](int64_t k, int64_t token, float dot) {
    sink(k, token, matrix.bias == nullptr ? dot : dot + matrix.bias[row_of(k)]);
  };
  Tokens8 rounded = room.tokens;
  rounded.tokens = tokens;
  if (matrix.dtype == kInt8Rows) {
    to_int8<false>(x.plain, matrix.cols, kInt8Block, 1.0f, rounded);
    return dense8(static_cast<const int8_t*>(matrix.weight), static_cast<const float*>(matrix.absmax), matrix.cols,
                  range, rounded, add_bias);
  }
  if (matrix.code != nullptr && matrix.int8 != 0) {
    const Quant4 q = packed_form(matrix);
    const Book8 book(q.code);
    to_int8<true>(x.plain, q.cols, q.block_size, book.step, rounded);
    return dots8(q, book, row_of, range, rounded, room.scales, add_bias);
  }
  if (matrix.code != nullptr) {
    dots4<FloatWord>(packed_form(matrix), row_of, range, x.placed, x.placed_stride, tokens, room.scales, add_bias);
    return;
  }
  dispatch_dtype(static_cast<DType>(matrix.dtype),
                 [&](auto t) { dense_rows<decltype(t)>(matrix, row_of, range, x, tokens, add_bias); });
}

}  // namespace
}  // namespace deftcore::cpu
