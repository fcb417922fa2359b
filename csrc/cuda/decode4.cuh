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

// Eight code values of a 32-bit word; element 0 is the high nibble of its first byte. The code book lies in shared
// memory: its 16 entries stand in 16 banks, so that lanes never wait for each other.
__device__ inline void decode8(uint32_t word, const float* code, float (&w)[8]) {
  const uint32_t even = word >> 2 & 0x3c3c3c3cu, odd = word << 2 & 0x3c3c3c3cu;  // byte offsets into the book
  const char* book = reinterpret_cast<const char*>(code);
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    w[2 * b] = *reinterpret_cast<const float*>(book + __byte_perm(even, 0, 0x4440 + b));
    w[2 * b + 1] = *reinterpret_cast<const float*>(book + __byte_perm(odd, 0, 0x4440 + b));
  }
}

// Sixteen packed bytes. kVector: their address is a multiple of 16.
template <bool kVector>
__device__ inline uint4 load_codes(const uint8_t* p) {
  if constexpr (kVector) {
    return *reinterpret_cast<const uint4*>(p);
  } else {
    uint32_t word[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      word[w] = p[4 * w] | p[4 * w + 1] << 8 | p[4 * w + 2] << 16 | static_cast<uint32_t>(p[4 * w + 3]) << 24;
    }
    return make_uint4(word[0], word[1], word[2], word[3]);
  }
}

__device__ inline uint32_t word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// out[m] = x[m] . row for `tokens` tokens of x [tokens, cols], by one warp over a regular matrix; lanes stride over the
// row 32 weights at a time, and every lane gets the totals.
template <bool kVector, class T, int kCount>
__device__ void row_dots4(const Quant4& q, const float* code, int64_t row, const T* x, int tokens,
                          float (&out)[kCount]) {
  const uint8_t* bytes = q.packed + row * (q.cols / 2);
#pragma unroll
  for (float& o : out) o = 0.0f;
  for (int64_t k = threadIdx.x % 32 * 32; k < q.cols; k += 32 * 32) {
    const float scale = scale_at(q, (row * q.cols + k) / q.block_size);
    const uint4 codes = load_codes<kVector>(bytes + k / 2);
    float part[kCount] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float w[8];
      decode8(word_of(codes, i), code, w);
#pragma unroll
      for (int m = 0; m < kCount; ++m) {  // past the last token: the last one again, its result unused
        const T* xm = x + (m < tokens ? m : tokens - 1) * q.cols + k + 8 * i;
#pragma unroll
        for (int c = 0; c < 8; ++c) part[m] += w[c] * to_float(xm[c]);
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
