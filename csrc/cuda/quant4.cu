// 4-bit weights: quantise, decode, and y = x W^T (backward: y = x W) with the decode inside.
//   one token      a warp per row of W, 16-byte loads of 32 weights, sums in registers: bound by the packed bytes
//   more, backward tiles of W decoded to shared memory, then tensor cores (bfloat16, float16) or multiply-adds
//                  (float32); the low-rank term is a further tile, copied instead of decoded
// Rows that do not start on a block are decoded element by element.
#include <mma.h>

#include "decode4.cuh"
#include "deftcore/quant4.h"

namespace deftcore::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kGemvTokens = 4;
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

// A thread per 32 elements, which lie in one block.
template <class T>
__global__ void dequantize_kernel(Quant4 q, T* out) {
  const int64_t count = q.rows * q.cols;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 32;
  if (first >= count) return;
  const int64_t end = count - first < 32 ? count : first + 32;
  if (q.column_blocks) {
    for (int64_t i = first; i < end; ++i) out[i] = from_float<T>(weight_at(q, q.code, i));
    return;
  }
  const float scale = scale_at(q, first / q.block_size);
  for (int64_t i = first; i < end; ++i) {
    const int nibble = q.packed[i / 2] >> (i % 2 ? 0 : 4) & 15;
    out[i] = from_float<T>(__fmul_rn(q.code[nibble], scale));
  }
}

// ---------------------------------------------------------------------------- few tokens

// A warp per row; lanes stride over the row 32 weights at a time. Regular matrices only.
template <class T, int kCount>
__global__ void gemv_kernel(Linear4bitArgs args) {
  __shared__ float code[16];
  if (threadIdx.x < 16) code[threadIdx.x] = args.w.code[threadIdx.x];
  __syncthreads();
  const Quant4& q = args.w;
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= q.rows) return;
  float sum[kCount];
  row_dots4<true>(q, code, row, static_cast<const T*>(args.x), kCount, sum);
  for (int m = 0; m < kCount; ++m) {
    float total = sum[m];
    if (lane != 0) continue;
    const T *low = static_cast<const T*>(args.low), *lora = static_cast<const T*>(args.lora);
    if (args.bias != nullptr) total += to_float(static_cast<const T*>(args.bias)[row]);
    for (int64_t r = 0; r < args.rank; ++r) {
      total += to_float(low[m * args.rank + r]) * to_float(lora[row * args.rank + r]);
    }
    static_cast<T*>(args.y)[m * q.rows + row] = from_float<T>(total);
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
      for (int c = 0; c < 8; ++c) {
        const uint32_t nibble = word >> (c / 2 * 8 + (c % 2 ? 0 : 4)) & 15;
        out[c] = from_float<T>(__fmul_rn(s.code[nibble], scale));
      }
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
__global__ void __launch_bounds__(kThreads) gemm_kernel(Linear4bitArgs args) {
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
  return args.tokens <= kGemvTokens && is_regular(args.w) && aligned16(args.w.packed);
}

template <class T>
void gemv(const Linear4bitArgs& args, cudaStream_t stream) {
  const unsigned grid = blocks_for(args.w.rows, kThreads / 32);
  switch (args.tokens) {
    case 1: gemv_kernel<T, 1><<<grid, kThreads, 0, stream>>>(args); break;
    case 2: gemv_kernel<T, 2><<<grid, kThreads, 0, stream>>>(args); break;
    case 3: gemv_kernel<T, 3><<<grid, kThreads, 0, stream>>>(args); break;
    default: gemv_kernel<T, 4><<<grid, kThreads, 0, stream>>>(args); break;
  }
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
  const int64_t count = args.w.rows * args.w.cols;
  if (count == 0) return;
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    dequantize_kernel<T>
        <<<blocks_for(count, kThreads * 32), kThreads, 0, stream_of(stream)>>>(args.w, static_cast<T*>(args.out));
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
