// Decoding 4-bit weights, shared by the dense products and the sparse MLPs.
#pragma once

#include "deftcore/format4.h"
#include "elements.cuh"
#include "launch.cuh"

namespace deftcore::cuda {
namespace {

__device__ inline float nested_scale(const Quant4& q, float code, float outer) {
  return __fadd_rn(__fmul_rn(code, outer), q.nested_offset);
}

__device__ inline float scale_at(const Quant4& q, int64_t block) {
  if (q.nested_absmax == nullptr) return static_cast<const float*>(q.absmax)[block];
  const float code = q.nested_code[static_cast<const uint8_t*>(q.absmax)[block]];
  return nested_scale(q, code, q.nested_absmax[block / kNestedBlock]);
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

// Scales of 8 neighbouring columns, of column blocks.
__device__ inline void column_scales8(const Quant4& q, int64_t block_row, int64_t column, float (&scales)[8]) {
  const float* from = static_cast<const float*>(q.absmax) + block_row * q.cols + column;
#pragma unroll
  for (int i = 0; i < 8; ++i) scales[i] = from[i];
}

__device__ inline uint32_t word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

// ---------------------------------------------------------------------------- dot products of whole rows by a warp
//
// A lane takes 32 weights of a row at a time: 16 bytes of codes, one scale. The x that goes with them lies in shared
// memory in groups of 32 with 16 bytes between groups, so that a quarter warp's 16-byte reads touch every bank once.

constexpr int kLaneWeights = 32, kChunk = kWarp * kLaneWeights;  // weights of a lane and of a warp in one turn

template <class T>
constexpr int kStagedChunk = kWarp * (kLaneWeights + Pack<T>::kSize);  // elements of a chunk of x in shared memory

// x[0 .. tokens) [cols] from column `first` on, `chunks` chunks, to staged [chunks][kCount][kStagedChunk], by the
// block.
template <int kCount, class T>
__device__ void stage_x(const T* x, int64_t cols, int tokens, int64_t first, int chunks, T* staged) {
  constexpr int kSize = Pack<T>::kSize;
  const int packs = kChunk / kSize;
  for (int i = threadIdx.x; i < chunks * kCount * packs; i += blockDim.x) {
    const int c = i / (kCount * packs), m = i / packs % kCount, k = i % packs * kSize;
    const int64_t column = first + c * kChunk + k;
    if (m >= tokens || column >= cols) continue;  // rows are whole lanes' shares
    T* out = staged + (c * kCount + m) * kStagedChunk<T> + k / kLaneWeights * (kLaneWeights + kSize) + k % kLaneWeights;
    *reinterpret_cast<Pack<T>*>(out) = *reinterpret_cast<const Pack<T>*>(x + m * cols + column);
  }
}

// How much of x a block stages at once: at most kMostBytes, in whole chunks, of which rows without columns have one.
struct Stage {
  int chunks;
  size_t bytes;
};

template <int kMostBytes, int kCount, class T>
Stage stage_of(int64_t cols) {
  constexpr int kChunkBytes = kCount * kStagedChunk<T> * static_cast<int>(sizeof(T));
  static_assert(kChunkBytes <= kMostBytes, "a chunk of x fits");
  const int chunks = static_cast<int>(std::clamp<int64_t>(ceil_div(cols, kChunk), 1, kMostBytes / kChunkBytes));
  return {chunks, static_cast<size_t>(chunks) * kChunkBytes};
}

// A lane's codes of one turn and its scale as it lies in memory: nothing here waits for another load.
struct Codes {
  uint4 codes;
  uint32_t inner;  // the 8-bit code of a nested scale, or the scale's own bits
  float outer;
};

__device__ inline Codes load_codes(const Quant4& q, int64_t flat) {
  Codes c;
  c.codes = *reinterpret_cast<const uint4*>(q.packed + flat / 2);
  const int64_t block = flat / q.block_size;
  const bool nested = q.nested_absmax != nullptr;
  c.inner = nested ? static_cast<const uint8_t*>(q.absmax)[block] : static_cast<const uint32_t*>(q.absmax)[block];
  c.outer = nested ? q.nested_absmax[block / kNestedBlock] : 0.0f;
  return c;
}

// What decoding looks up, in shared memory.
struct Books {
  float code[16];
  float nested[256];
};

__device__ inline void load_books(const Quant4& q, Books& books) {
  for (int i = threadIdx.x; i < 16; i += blockDim.x) books.code[i] = q.code[i];
  if (q.nested_code == nullptr) return;
  for (int i = threadIdx.x; i < 256; i += blockDim.x) books.nested[i] = q.nested_code[i];
}

__device__ inline float scale_of(const Quant4& q, const Books& books, const Codes& c) {
  if (q.nested_absmax == nullptr) return __uint_as_float(c.inner);
  return nested_scale(q, books.nested[c.inner], c.outer);
}

// total[r][m] += this lane's part of the dot products of kRows rows with kCount tokens over one chunk.
template <class T, int kCount, int kRows>
__device__ inline void add_dots(const Quant4& q, const Books& books, const Codes (&rows)[kRows], const T* chunk,
                                float (&total)[kRows][kCount]) {
  constexpr int kSize = Pack<T>::kSize;
  const T* mine = chunk + threadIdx.x % kWarp * (kLaneWeights + kSize);
  float part[kRows][kCount] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float xs[kCount][8];
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
#pragma unroll
      for (int p = 0; p < 8 / kSize; ++p) {
        const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(mine + m * kStagedChunk<T> + 8 * i + p * kSize);
#pragma unroll
        for (int c = 0; c < kSize; ++c) xs[m][p * kSize + c] = to_float(pack.values[c]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float w[8];
      decode8(word_of(rows[r].codes, i), books.code, w);
#pragma unroll
      for (int m = 0; m < kCount; ++m) {
#pragma unroll
        for (int c = 0; c < 8; ++c) part[r][m] = fmaf(w[c], xs[m][c], part[r][m]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float scale = scale_of(q, books, rows[r]);
#pragma unroll
    for (int m = 0; m < kCount; ++m) total[r][m] = fmaf(part[r][m], scale, total[r][m]);
  }
}

}  // namespace
}  // namespace deftcore::cuda
