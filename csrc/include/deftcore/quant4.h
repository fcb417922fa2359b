// 4-bit weights with one scale per block (NF4 and FP4 of bitsandbytes): quantise, decode, and products that decode on
// the way. w'[i] = code[nibble i] * scale[i / block_size], i the flat row-major index; blocks ignore row ends.
#pragma once

#include "deftcore/format4.h"

namespace deftcore {

struct Quantize4bitArgs {
  const void* w;    // [count]
  uint8_t* packed;  // [ceil(count / 2)], out
  float* absmax;    // [ceil(count / block_size)], out; NaN where the block has a value that is not finite
  int64_t count, block_size;
  DType dtype;
  QuantType type;
};

struct Dequantize4bitArgs {
  Quant4 w;
  void* out;  // [rows, cols], contiguous
  DType dtype;
};

// linear_4bit:           y [tokens, rows] = x [tokens, cols] W^T + low lora^T + bias, lora [rows, rank]
// linear_4bit_backward:  y [tokens, cols] = x [tokens, rows] W   + low lora,          lora [rank, cols]
struct Linear4bitArgs {
  Quant4 w;
  const void* x;     // contiguous
  const void* bias;  // [rows] or null; forward only
  const void* low;   // [tokens, rank], contiguous, or null: the low-rank term's left factor, its scaling included
  const void* lora;  // contiguous, or null
  void* y;           // contiguous, out
  void* workspace;   // linear_4bit_workspace(args) bytes, 64-byte aligned; one size serves both directions
  int64_t tokens, rank;
  DType dtype;
};

namespace cpu {
void quantize_4bit(const Quantize4bitArgs& args, Stream stream);
void dequantize_4bit(const Dequantize4bitArgs& args, Stream stream);
size_t linear_4bit_workspace(const Linear4bitArgs& args);
inline int64_t linear_4bit_tokens(const Quant4&, DType, bool) { return INT64_MAX; }  // any number of them
void linear_4bit(const Linear4bitArgs& args, Stream stream);
void linear_4bit_backward(const Linear4bitArgs& args, Stream stream);
}  // namespace cpu

namespace cuda {
void quantize_4bit(const Quantize4bitArgs& args, Stream stream);
void dequantize_4bit(const Dequantize4bitArgs& args, Stream stream);
size_t linear_4bit_workspace(const Linear4bitArgs& args);
// Most tokens that linear_4bit takes; for more, and for the backward product, dequantize_4bit and a library's product
// are faster.
int64_t linear_4bit_tokens(const Quant4& w, DType dtype, bool backward);
void linear_4bit(const Linear4bitArgs& args, Stream stream);  // x 16-byte aligned
}  // namespace cuda

}  // namespace deftcore
