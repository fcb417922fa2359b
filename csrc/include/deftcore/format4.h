// 4-bit weights with one scale per block (NF4 and FP4 of bitsandbytes), as every kernel that reads them sees them.
#pragma once

#include "deftcore/common.h"

namespace deftcore {

enum class QuantType : int { kNf4 = 0, kFp4 = 1 };

// Code books: NF4 ascending, from normal quantiles; FP4 by its bits, sign | {0, 1/16, 8, 12, 4, 6, 2, 3} / 12.
inline constexpr float kNf4Code[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};
inline constexpr float kFp4Code[16] = {
    0.0f,
    0.0052083334885537624f,
    0.6666666865348816f,
    1.0f,
    0.3333333432674408f,
    0.5f,
    0.1666666716337204f,
    0.25f,
    0.0f,
    -0.0052083334885537624f,
    -0.6666666865348816f,
    -1.0f,
    -0.3333333432674408f,
    -0.5f,
    -0.1666666716337204f,
    -0.25f,
};
// Code indices in ascending order of value; a value on the midpoint of two neighbours takes the lower.
inline constexpr uint8_t kNf4Order[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
inline constexpr uint8_t kFp4Order[16] = {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3};

inline const float* code_book(QuantType type) { return type == QuantType::kNf4 ? kNf4Code : kFp4Code; }
inline const uint8_t* code_order(QuantType type) { return type == QuantType::kNf4 ? kNf4Order : kFp4Order; }

// A packed matrix: w[r, c] = code[nibble] * scale[block], nibbles in flat row-major order. Blocks are consecutive
// elements and ignore row ends; or, with `column_blocks`, block_size rows of one column: the transpose of a matrix
// whose blocks lie in rows, its scales float [rows / block_size, cols]. Scales are floats, or (nested) 8-bit codes:
// scale = nested_code[q] * nested_absmax[b / 256] + offset, two roundings.
struct Quant4 {
  const uint8_t* packed;       // [ceil(rows * cols / 2)], element 2j in the high nibble of byte j
  const float* code;           // [16]
  const void* absmax;          // float [blocks], or uint8_t [blocks] when nested
  const float* nested_absmax;  // [ceil(blocks / 256)], or null when not nested
  const float* nested_code;    // [256], or null
  float nested_offset;
  int64_t rows, cols;
  int64_t block_size;  // a power of two, at least 32
  bool column_blocks = false;

  DEFTCORE_FIELDS(packed, code, absmax, nested_absmax, nested_code, nested_offset, rows, cols, block_size,
                  column_blocks)
};
inline constexpr int64_t kNestedBlock = 256;

}  // namespace deftcore
