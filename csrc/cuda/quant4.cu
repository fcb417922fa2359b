// 4-bit weights: quantise, decode, and y = x W^T (backward: y = x W) with the decode inside.
//   few tokens     a warp per 1 to 4 rows of W, 16-byte loads of 32 weights, x in shared memory, sums in registers
//   more, backward tiles of W decoded to shared memory, then tensor cores (bfloat16, float16) or multiply-adds
//                  (float32); the low-rank term is a further tile, copied instead of decoded
// Rows that do not start on a block are decoded element by element.
#include <mma.h>

#include "decode4.cuh"
#include "deftcore/quant4.h"

namespace deftcore::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kGemvTokens = 16;  // in passes of up to 8
constexpr int kTokens = 64, kOutputs = 64, kDepth = 32, kSkew = 8;

// ---------------------------------------------------------------------------- quantise, dequantise

struct Book {
  float thresholds[15];
  uint8_t order[16];
};

// A warp per block.
template <class T>
__global__ void quantize_kernel(const T* w, uint8_t* packed, float* absmax, int64_t count, int64_t block_size,
                                Book book) {
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  const int64_t first = warp * block_size;
  if (first >= count) return;
  const int64_t n = count - first < block_size ? count - first : block_size;
  float largest = 0.0f, bad = 0.0f;
  for (int64_t i = lane; i < n; i += 32) {
    const float v = to_float(w[first + i]);
    largest = fmaxf(largest, fabsf(v));
    bad += v * 0.0f;
  }
  for (int offset = 16; offset > 0; offset /= 2)
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
  bad = warp_sum(bad);
  const float floored = fmaxf(largest, 1e-38f), inverse = __fdiv_rn(1.0f, floored);
  const bool whole = n == block_size;
  if (lane == 0) absmax[warp] = bad == 0.0f ? (whole ? largest : floored) : NAN;
  const auto index = [&](int64_t i) {
    const float v = i < n ? to_float(w[first + i]) : 0.0f;
    const float scaled = whole ? fminf(fmaxf(__fmul_rn(v, inverse), -1.0f), 1.0f) : __fdiv_rn(v, floored);
    int below = 0;
    for (int j = 0; j < 15; ++j) below += scaled > book.thresholds[j];
    return static_cast<uint8_t>(book.order[below]);
  };
  for (int64_t j = lane; j < (n + 1) / 2; j += 32) {
    packed[first / 2 + j] = static_cast<uint8_t>(index(2 * j) << 4 | index(2 * j + 1));
  }
}

// A thread per 8 elements: one word of codes in, 16-byte stores out, so that a warp reads and writes whole lines. They
// lie in one block of a regular matrix, or in 8 columns of one row of column blocks. kWords: every 8 elements do so,
// and the addresses are multiples of 4 and 16.
template <bool kWords, class T>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(Quant4 q, T* out) {
  __shared__ float code[16];
  if (threadIdx.x < 16) code[threadIdx.x] = q.code[threadIdx.x];
  __syncthreads();
  const int64_t count = q.rows * q.cols, first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 8;
  if (first >= count) return;
  if constexpr (kWords) {
    if (first + 8 <= count) {
      float w[8], scales[8];
      decode8(*reinterpret_cast<const uint32_t*>(q.packed + first / 2), code, w);
      if (q.column_blocks) {
        const float* row =
            static_cast<const float*>(q.absmax) + first / q.cols / q.block_size * q.cols + first % q.cols;
#pragma unroll
        for (int i = 0; i < 8; ++i) scales[i] = row[i];
      } else {
        const float scale = scale_at(q, first / q.block_size);
#pragma unroll
        for (float& s : scales) s = scale;
      }
      constexpr int kSize = Pack<T>::kSize;
#pragma unroll
      for (int p = 0; p < 8 / kSize; ++p) {
        Pack<T> pack;
#pragma unroll
        for (int i = 0; i < kSize; ++i) {
          pack.values[i] = from_float<T>(__fmul_rn(w[p * kSize + i], scales[p * kSize + i]));
        }
        reinterpret_cast<Pack<T>*>(out + first)[p] = pack;
      }
      return;
    }
  }
  for (int64_t i = first; i < first + 8 && i < count; ++i) out[i] = from_float<T>(weight_at(q, code, i));
}

// ---------------------------------------------------------------------------- few tokens

// y[m, row] for kCount tokens and kRows rows a warp. A lane takes 32 weights of a row at a time (16 bytes, one scale)
// for each of its rows, and the x that goes with them from shared memory, once for all rows; x lies there in groups of
// 32 with 16 bytes between groups, so that a quarter warp's 16-byte reads touch every bank once. Bound by the packed
// bytes and, close behind, by the reads of the code book (one a weight, 32 lanes a cycle): 6.3 us at 4096 to 11008 on
// an H100.
constexpr int kGroup = 32, kChunk = 32 * kGroup;  // weights of a lane and of a warp in one turn

template <class T>
struct StagedX {
  static constexpr int kStride = kGroup + Pack<T>::kSize;  // elements from one group to the next
};

template <class T, int kCount, int kRows>
__global__ void __launch_bounds__(kThreads) gemv_kernel(Linear4bitArgs args) {
  constexpr int kStride = StagedX<T>::kStride, kSize = Pack<T>::kSize;
  __shared__ float code[16];
  __shared__ alignas(16) T staged[kCount][32 * kStride];
  if (threadIdx.x < 16) code[threadIdx.x] = args.w.code[threadIdx.x];
  const Quant4& q = args.w;
  const int lane = threadIdx.x % 32;
  const int64_t row0 = (static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32) * kRows;
  const int64_t token0 = static_cast<int64_t>(blockIdx.y) * kCount;
  const int tokens = static_cast<int>(min(static_cast<int64_t>(kCount), args.tokens - token0));
  const T* x = static_cast<const T*>(args.x) + token0 * q.cols;
  float total[kRows][kCount] = {};
  for (int64_t chunk = 0; chunk < q.cols; chunk += kChunk) {
    __syncthreads();  // the last chunk is used up
    for (int i = threadIdx.x * kSize; i < kCount * kChunk; i += kThreads * kSize) {
      const int m = i / kChunk, k = i % kChunk;
      if (m < tokens && chunk + k < q.cols) {  // rows are whole groups of 32
        *reinterpret_cast<Pack<T>*>(&staged[m][k / kGroup * kStride + k % kGroup]) =
            *reinterpret_cast<const Pack<T>*>(x + m * q.cols + chunk + k);
      }
    }
    __syncthreads();
    const int64_t k = chunk + lane * kGroup;
    if (k >= q.cols) continue;
    uint4 codes[kRows];
    float scale[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {  // past the last row: the last one again, its result unused
      const int64_t flat = (row0 + r < q.rows ? row0 + r : q.rows - 1) * q.cols + k;
      codes[r] = *reinterpret_cast<const uint4*>(q.packed + flat / 2);
      scale[r] = scale_at(q, flat / q.block_size);
    }
    float part[kRows][kCount] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float xs[kCount][8];
#pragma unroll
      for (int m = 0; m < kCount; ++m) {
#pragma unroll
        for (int p = 0; p < 8 / kSize; ++p) {
          const Pack<T> pack = *reinterpret_cast<const Pack<T>*>(&staged[m][lane * kStride + 8 * i + p * kSize]);
#pragma unroll
          for (int c = 0; c < kSize; ++c) xs[m][p * kSize + c] = to_float(pack.values[c]);
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float w[8];
        decode8(word_of(codes[r], i), code, w);
#pragma unroll
        for (int m = 0; m < kCount; ++m) {
#pragma unroll
          for (int c = 0; c < 8; ++c) part[r][m] = fmaf(w[c], xs[m][c], part[r][m]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int m = 0; m < kCount; ++m) total[r][m] = fmaf(part[r][m], scale[r], total[r][m]);
    }
  }
  const T *low = static_cast<const T*>(args.low), *lora = static_cast<const T*>(args.lora);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = row0 + r;
    if (row >= q.rows) break;
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
      if (m >= tokens) break;
      float sum = total[r][m];
      for (int64_t i = lane; i < args.rank; i += 32) {
        sum = fmaf(to_float(low[(token0 + m) * args.rank + i]), to_float(lora[row * args.rank + i]), sum);
      }
      sum = warp_sum(sum);
      if (lane != 0) continue;
      if (args.bias != nullptr) sum += to_float(static_cast<const T*>(args.bias)[row]);
      static_cast<T*>(args.y)[(token0 + m) * q.rows + row] = from_float<T>(sum);
    }
  }
}

// ---------------------------------------------------------------------------- many tokens

// Shared memory of one step: x [kTokens][kDepth], and W as it lies: forward [kOutputs][kDepth], backward
// [kDepth][kOutputs]. Sums pass through shared memory once, at the end.
template <class T, bool kBackward>
struct Shared {
  static constexpr int kXStride = kDepth + kSkew, kWRows = kBackward ? kDepth : kOutputs,
                       kWCols = kBackward ? kOutputs : kDepth, kWStride = kWCols + kSkew;
  float code[16];
  alignas(32) T x[kTokens * kXStride];
  alignas(32) T w[kWRows * kWStride];
  alignas(32) float sums[kTokens * (kOutputs + kSkew)];
};

template <class T, bool kBackward>
__device__ void load_step(Shared<T, kBackward>& s, const Linear4bitArgs& args, int64_t token, int64_t output,
                          int64_t step, bool low_rank) {
  using S = Shared<T, kBackward>;
  const Quant4& q = args.w;
  const int64_t reduction = low_rank ? args.rank : kBackward ? q.rows : q.cols;
  const int64_t outputs = kBackward ? q.cols : q.rows;
  const T* x = static_cast<const T*>(low_rank ? args.low : args.x);
  const T zero = from_float<T>(0.0f);
  for (int i = threadIdx.x; i < kTokens * kDepth; i += kThreads) {
    const int64_t m = token + i / kDepth, r = step + i % kDepth;
    s.x[i / kDepth * S::kXStride + i % kDepth] = m < args.tokens && r < reduction ? x[m * reduction + r] : zero;
  }
  // Eight columns of W a turn: within a block in a regular matrix.
  for (int i = threadIdx.x; i < S::kWRows * S::kWCols / 8; i += kThreads) {
    const int row = i / (S::kWCols / 8), col = i % (S::kWCols / 8) * 8;
    const int64_t n = (kBackward ? step : output) + row, k = (kBackward ? output : step) + col;
    const int64_t rows = kBackward ? reduction : outputs, cols = kBackward ? outputs : reduction;
    T* out = s.w + row * S::kWStride + col;
    if (low_rank) {
      const T* lora = static_cast<const T*>(args.lora);
      for (int c = 0; c < 8; ++c) out[c] = n < rows && k + c < cols ? lora[n * cols + k + c] : zero;
    } else if (n < rows && k + 8 <= cols && is_regular(q)) {
      const int64_t flat = n * q.cols + k;
      const float scale = scale_at(q, flat / q.block_size);
      const uint32_t word = *reinterpret_cast<const uint32_t*>(q.packed + flat / 2);
      float w[8];
      decode8(word, s.code, w);
      for (int c = 0; c < 8; ++c) out[c] = from_float<T>(__fmul_rn(w[c], scale));
    } else {
      for (int c = 0; c < 8; ++c) {
        out[c] = n < rows && k + c < cols ? from_float<T>(weight_at(q, s.code, n * q.cols + k + c)) : zero;
      }
    }
  }
}

// 8 warps: 4 x 2 of 16 x 32 outputs each.
template <class T, bool kBackward>
struct TensorCores {
  using S = Shared<T, kBackward>;
  using Layout = std::conditional_t<kBackward, nvcuda::wmma::row_major, nvcuda::wmma::col_major>;
  nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float> sum[2];

  __device__ TensorCores() {
    for (auto& f : sum) nvcuda::wmma::fill_fragment(f, 0.0f);
  }
  __device__ void multiply(const S& s) {
    namespace wmma = nvcuda::wmma;
    const int warp = threadIdx.x / 32, m = warp / 2 * 16, n = warp % 2 * 32;
    for (int r = 0; r < kDepth; r += 16) {
      wmma::fragment<wmma::matrix_a, 16, 16, 16, T, wmma::row_major> a;
      wmma::load_matrix_sync(a, s.x + m * S::kXStride + r, S::kXStride);
      for (int j = 0; j < 2; ++j) {
        wmma::fragment<wmma::matrix_b, 16, 16, 16, T, Layout> b;
        const int col = n + 16 * j;
        const T* w = kBackward ? s.w + r * S::kWStride + col : s.w + col * S::kWStride + r;
        wmma::load_matrix_sync(b, w, S::kWStride);
        wmma::mma_sync(sum[j], a, b, sum[j]);
      }
    }
  }
  __device__ void store(S& s) {
    const int warp = threadIdx.x / 32, m = warp / 2 * 16, n = warp % 2 * 32;
    for (int j = 0; j < 2; ++j) {
      nvcuda::wmma::store_matrix_sync(s.sums + m * (kOutputs + kSkew) + n + 16 * j, sum[j], kOutputs + kSkew,
                                      nvcuda::wmma::mem_row_major);
    }
  }
};

// 16 x 16 threads of 4 x 4 outputs each.
template <bool kBackward>
struct MultiplyAdds {
  using S = Shared<float, kBackward>;
  float sum[4][4] = {};

  __device__ void multiply(const S& s) {
    const int m = threadIdx.x / 16 * 4, n = threadIdx.x % 16;
    for (int r = 0; r < kDepth; ++r) {
      for (int j = 0; j < 4; ++j) {
        const int col = n + 16 * j;
        const float w = kBackward ? s.w[r * S::kWStride + col] : s.w[col * S::kWStride + r];
        for (int i = 0; i < 4; ++i) sum[i][j] += s.x[(m + i) * S::kXStride + r] * w;
      }
    }
  }
  __device__ void store(S& s) {
    const int m = threadIdx.x / 16 * 4, n = threadIdx.x % 16;
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 4; ++j) s.sums[(m + i) * (kOutputs + kSkew) + n + 16 * j] = sum[i][j];
    }
  }
};

template <class T, bool kBackward>
__global__ void __launch_bounds__(kThreads, 2)  // without the 2, ptxas aims at fewer registers and spills
    gemm_kernel(Linear4bitArgs args) {
  __shared__ Shared<T, kBackward> s;
  if (threadIdx.x < 16) s.code[threadIdx.x] = args.w.code[threadIdx.x];
  __syncthreads();
  std::conditional_t<std::is_same_v<T, float>, MultiplyAdds<kBackward>, TensorCores<T, kBackward>> product;
  const int64_t token = static_cast<int64_t>(blockIdx.y) * kTokens,
                output = static_cast<int64_t>(blockIdx.x) * kOutputs;
  const int64_t reduction = kBackward ? args.w.rows : args.w.cols, outputs = kBackward ? args.w.cols : args.w.rows;
  const int64_t steps = (reduction + kDepth - 1) / kDepth, low_steps = (args.rank + kDepth - 1) / kDepth;
  for (int64_t i = 0; i < steps + low_steps; ++i) {
    load_step<T, kBackward>(s, args, token, output, (i < steps ? i : i - steps) * kDepth, i >= steps);
    __syncthreads();
    product.multiply(s);
    __syncthreads();
  }
  product.store(s);
  __syncthreads();
  const T* bias = static_cast<const T*>(args.bias);
  for (int i = threadIdx.x; i < kTokens * kOutputs; i += kThreads) {
    const int64_t m = token + i / kOutputs, n = output + i % kOutputs;
    if (m >= args.tokens || n >= outputs) continue;
    float v = s.sums[i / kOutputs * (kOutputs + kSkew) + i % kOutputs];
    if (bias != nullptr) v += to_float(bias[n]);
    static_cast<T*>(args.y)[m * outputs + n] = from_float<T>(v);
  }
}

// ---------------------------------------------------------------------------- launch

unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>((items + per_block - 1) / per_block);
}

bool supports_gemv(const Linear4bitArgs& args) {
  return args.tokens <= kGemvTokens && is_regular(args.w) && aligned16(args.w.packed) && aligned16(args.x);
}

template <class T, int kCount, int kRows>
void gemv_rows(const Linear4bitArgs& args, cudaStream_t stream) {
  const dim3 grid(blocks_for(args.w.rows, kThreads / 32 * kRows), blocks_for(args.tokens, kCount));
  gemv_kernel<T, kCount, kRows><<<grid, kThreads, 0, stream>>>(args);
}

// As many rows a warp as leave every multiprocessor two blocks.
template <class T, int kCount>
void gemv_tokens(const Linear4bitArgs& args, cudaStream_t stream) {
  const int64_t rows_per_warp = args.w.rows / (2 * multiprocessors() * (kThreads / 32));
  if (rows_per_warp >= 4 && kCount <= 4) {
    gemv_rows<T, kCount, kCount <= 4 ? 4 : 2>(args, stream);
  } else if (rows_per_warp >= 2) {
    gemv_rows<T, kCount, 2>(args, stream);
  } else {
    gemv_rows<T, kCount, 1>(args, stream);
  }
}

template <class T>
void gemv(const Linear4bitArgs& args, cudaStream_t stream) {
  if (args.tokens == 1) return gemv_tokens<T, 1>(args, stream);
  if (args.tokens == 2) return gemv_tokens<T, 2>(args, stream);
  if (args.tokens <= 4) return gemv_tokens<T, 4>(args, stream);
  gemv_tokens<T, 8>(args, stream);
}

template <class T, bool kBackward>
void gemm(const Linear4bitArgs& args, cudaStream_t stream) {
  const int64_t outputs = kBackward ? args.w.cols : args.w.rows;
  const dim3 grid(blocks_for(outputs, kOutputs), blocks_for(args.tokens, kTokens));
  gemm_kernel<T, kBackward><<<grid, kThreads, 0, stream>>>(args);
}

}  // namespace

void quantize_4bit(const Quantize4bitArgs& args, Stream stream) {
  if (args.count == 0) return;
  Book book{};
  const float* code = code_book(args.type);
  const uint8_t* order = code_order(args.type);
  for (int j = 0; j < 16; ++j) book.order[j] = order[j];
  for (int j = 0; j < 15; ++j) book.thresholds[j] = (code[order[j]] + code[order[j + 1]]) * 0.5f;
  const int64_t blocks = (args.count + args.block_size - 1) / args.block_size;
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    quantize_kernel<T><<<blocks_for(blocks, kThreads / 32), kThreads, 0, stream_of(stream)>>>(
        static_cast<const T*>(args.w), args.packed, args.absmax, args.count, args.block_size, book);
  });
  DEFTCORE_CUDA_CHECK(cudaGetLastError());
}

void dequantize_4bit(const Dequantize4bitArgs& args, Stream stream) {
  const Quant4& q = args.w;
  const int64_t count = q.rows * q.cols;
  if (count == 0) return;
  const bool words =
      reinterpret_cast<uintptr_t>(q.packed) % 4 == 0 && aligned16(args.out) && (!q.column_blocks || q.cols % 8 == 0);
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    (words ? dequantize_kernel<true, T>
           : dequantize_kernel<false, T>)<<<blocks_for(count, kThreads * 8), kThreads, 0, stream_of(stream)>>>(
        q, static_cast<T*>(args.out));
  });
  DEFTCORE_CUDA_CHECK(cudaGetLastError());
}

size_t linear_4bit_workspace(const Linear4bitArgs&) { return 0; }

void linear_4bit(const Linear4bitArgs& args, Stream stream) {
  if (args.tokens == 0 || args.w.rows == 0) return;
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    if (supports_gemv(args)) {
      gemv<T>(args, stream_of(stream));
    } else {
      gemm<T, false>(args, stream_of(stream));
    }
  });
  DEFTCORE_CUDA_CHECK(cudaGetLastError());
}

void linear_4bit_backward(const Linear4bitArgs& args, Stream stream) {
  if (args.tokens == 0 || args.w.cols == 0) return;
  dispatch_dtype(args.dtype, [&](auto t) { gemm<decltype(t), true>(args, stream_of(stream)); });
  DEFTCORE_CUDA_CHECK(cudaGetLastError());
}

}  // namespace deftcore::cuda
