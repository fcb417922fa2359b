// 4-bit weights with one scale per block (NF4 and FP4 of bitsandbytes): quantise, decode, and products that decode on
// the way. w'[i] = code[nibble i] * scale[i / block_size], i the flat row-major index; blocks ignore row ends.
#pragma once

#include "deftcore/format4.h"

namespace deftcore {

// Largest block that is quantised.
inline constexpr int64_t kMaxBlock = 4096;

// Least traffic: w, packed and absmax once.
struct Quantize4bitArgs {
  const void* w;    // [count]
  uint8_t* packed;  // [ceil(count / 2)], out
  float* absmax;    // [ceil(count / block_size)], out; NaN where the block has a value that is not finite
  int64_t count, block_size;
  DType dtype;
  QuantType type;

  DEFTCORE_FIELDS(w, packed, absmax, count, block_size, dtype, type)
};

// Least traffic: packed bytes and scales once, out once.
struct Dequantize4bitArgs {
  Quant4 w;
  void* out;  // [rows, cols], contiguous
  DType dtype;

  DEFTCORE_FIELDS(w, out, dtype)
};

// linear_4bit:           y [tokens, rows] = x [tokens, cols] W^T + low lora^T + bias, lora [rows, rank]
// linear_4bit_backward:  y [tokens, cols] = x [tokens, rows] W   + low lora,          lora [rank, cols]
// Least traffic: packed bytes and scales once, whatever the number of tokens; x, low, lora, bias, y.
struct Linear4bitArgs {
  Quant4 w;
  const void* x;     // contiguous
  const void* bias;  // [rows] or null; forward only
  const void* low;   // [tokens, rank], contiguous, or null: the low-rank term's left factor, its scaling included
  const void* lora;  // contiguous, or null
  void* y;           // contiguous, out
  void* workspace;   // 64-byte aligned
  int64_t tokens, rank;
  DType dtype;

  DEFTCORE_FIELDS(w, x, bias, low, lora, y, workspace, tokens, rank, dtype)
};

// Most tokens that linear_4bit takes; for more, dequantize_4bit and a library's product are faster.
namespace cpu {
inline int64_t linear_4bit_tokens(const Quant4&, DType) { return INT64_MAX; }
}  // namespace cpu
namespace cuda {
int64_t linear_4bit_tokens(const Quant4& w, DType dtype);
}  // namespace cuda

}  // namespace deftcore
