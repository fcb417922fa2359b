// A matrix of a model that decodes token by token, in any of the forms that its steps read.
#pragma once

#include "deftcore/format4.h"

namespace deftcore {

// In place of a DType: weights are int8, rows in one piece and of whole blocks, and absmax has what a step of each row
// is worth, [rows] floats. x is rounded to int8 as well, by blocks.
inline constexpr int64_t kInt8Rows = 3;
inline constexpr int64_t kInt8Block = 32;

// y = x W^T + bias + lora_scale (x lora_a^T) lora_b^T, W in `dtype`, or in 4 bits where there is a code.
struct DecoderMatrix {
  const void* weight;  // [rows, cols], row stride `stride`; in 4 bits the packed bytes; null: there is no such matrix
  const float* bias;   // [rows] or null
  const float* code;   // [16]; null: dense. What follows, up to the offset, as in Quant4
  const void* absmax;
  const float* nested_absmax;
  const float* nested_code;
  const float* nested_offset;  // [1], or null
  int64_t column_blocks;       // in 4 bits, 0 or 1, as in Quant4
  const float* lora_a;         // [rank, cols]
  const float* lora_b;         // [rows, rank]
  const float* lora_scale;     // [1]
  int64_t rank;                // 0: no such term
  int64_t rows, cols, stride, block_size, dtype;
  int64_t int8;  // in 4 bits: whether x is rounded to int8 by the matrix' blocks

  DEFTCORE_FIELDS(weight, bias, code, absmax, nested_absmax, nested_code, nested_offset, column_blocks, lora_a, lora_b,
                  lora_scale, rank, rows, cols, stride, block_size, dtype, int8)
};
// Python writes tables of these, as rows of 64-bit numbers.
static_assert(sizeof(DecoderMatrix) == 8 * std::tuple_size_v<decltype(DecoderMatrix{}.fields())>);

}  // namespace deftcore
