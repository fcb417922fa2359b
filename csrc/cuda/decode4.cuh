// Decoding 4-bit weights, shared by the dense products and the sparse MLPs.
#pragma once

#include "deftcore/format4.h"
#include "launch.cuh"

namespace deftcore::cuda {
namespace {

__device__ inline float scale_at(const Quant4& q, int64_t block) {
  if (q.nested_absmax == nullptr) return static_cast<const float*>(q.absmax)[block];
  const float code = q.nested_code[static_cast<const uint8_t*>(q.absmax)[block]];
  return __fadd_rn(__fmul_rn(code, q.nested_absmax[block / kNestedBlock]), q.nested_offset);
}

// One weight of any layout by its flat index.
__device__ inline float weight_at(const Quant4& q, const float* code, int64_t flat) {
  const int nibble = q.packed[flat / 2] >> (flat % 2 ? 0 : 4) & 15;
  const int64_t block = q.column_blocks ? flat / q.cols / q.block_size * q.cols + flat % q.cols : flat / q.block_size;
  return __fmul_rn(code[nibble], scale_at(q, block));
}

// Rows that start on a block.
__host__ __device__ inline bool is_regular(const Quant4& q) { return !q.column_blocks && q.cols % q.block_size == 0; }

// out[m] = x[m] . row for `tokens` tokens of x [tokens, cols], by one warp over a regular matrix; lanes stride over the
// row 32 weights at a time, and every lane gets the totals. kVector: the packed bytes are 16-byte aligned.
template <bool kVector, class T, int kCount>
__device__ void row_dots4(const Quant4& q, const float* code, int64_t row, const T* x, int tokens,
                          float (&out)[kCount]) {
  const uint8_t* bytes = q.packed + row * (q.cols / 2);
#pragma unroll
  for (float& o : out) o = 0.0f;
  for (int64_t k = threadIdx.x % 32 * 32; k < q.cols; k += 32 * 32) {
    const float scale = scale_at(q, (row * q.cols + k) / q.block_size);
    uint32_t word[4];
    if constexpr (kVector) {
      const uint4 words = *reinterpret_cast<const uint4*>(bytes + k / 2);
      word[0] = words.x, word[1] = words.y, word[2] = words.z, word[3] = words.w;
    } else {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint8_t* p = bytes + k / 2 + 4 * w;
        word[w] = p[0] | p[1] << 8 | p[2] << 16 | static_cast<uint32_t>(p[3]) << 24;
      }
    }
    float part[kCount] = {};
#pragma unroll
    for (int b = 0; b < 16; ++b) {
      const uint32_t byte = word[b / 4] >> (8 * (b % 4));
      const float even = code[byte >> 4 & 15], odd = code[byte & 15];
#pragma unroll
      for (int m = 0; m < kCount; ++m) {  // past the last token: the last one again, its result unused
        const T* xm = x + (m < tokens ? m : tokens - 1) * q.cols + k + 2 * b;
        part[m] += even * to_float(xm[0]) + odd * to_float(xm[1]);
      }
    }
#pragma unroll
    for (int m = 0; m < kCount; ++m) out[m] += part[m] * scale;
  }
#pragma unroll
  for (float& o : out) o = warp_sum(o);
}

}  // namespace
}  // namespace deftcore::cuda
