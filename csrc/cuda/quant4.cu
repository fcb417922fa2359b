// 4-bit weights: quantise, decode, and y = x W^T of few tokens with the decode inside: a warp per 1 to 4 rows of W,
// 16-byte loads of 32 weights, x in shared memory, sums in registers. More tokens, rows that do not start on a block
// and the backward product are the caller's: one decode and a library's product, whose tensor cores make up for the
// decode.
#include "decode4.cuh"
#include "deftcore/quant4.h"

namespace deftcore::cuda {
namespace {

// Where the products with the decode inside end, 4096 to 11008 and back on an H100: 8 tokens in bfloat16 take 73 us,
// decode and cuBLAS 86, 16 take 122; 16 in float32 take 167, decode and cuBLAS 219.
constexpr int64_t kMostTokensHalf = 8, kMostTokensFloat = 16;

// ---------------------------------------------------------------------------- quantise, dequantise

struct Book {
  float thresholds[15];
  uint8_t order[16];
};

// A warp per block.
template <class T>
__global__ void quantize_kernel(const T* w, uint8_t* packed, float* absmax, int64_t count, int64_t block_size,
                                Book book) {
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  const int lane = threadIdx.x % kWarp;
  const int64_t first = warp * block_size;
  if (first >= count) return;
  const int64_t n = count - first < block_size ? count - first : block_size;
  float largest = 0.0f, bad = 0.0f;
  for (int64_t i = lane; i < n; i += kWarp) {
    const float v = to_float(w[first + i]);
    largest = fmaxf(largest, fabsf(v));
    bad += v * 0.0f;
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
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
  for (int64_t j = lane; j < (n + 1) / 2; j += kWarp) {
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
  const int64_t count = q.rows * q.cols, first = thread_in_grid() * 8;
  if (first >= count) return;
  if constexpr (kWords) {
    if (first + 8 <= count) {
      float w[8], scales[8];
      decode8(*reinterpret_cast<const uint32_t*>(q.packed + first / 2), code, w);
      if (q.column_blocks) {
        column_scales8(q, first / q.cols / q.block_size, first % q.cols, scales);
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

// y[m, row] for kCount tokens and kRows rows a warp; x is read from shared memory once for all rows. Bound by the
// packed bytes and, close behind, by the reads of the code book (one a weight, 32 lanes a cycle): a token at 4096 to
// 11008 needs 8 us for the bytes and 6.3 for the reads on an H100, and takes 18. The next chunk's codes are on their
// way while one is multiplied.
template <class T, int kCount, int kRows>
__global__ void __launch_bounds__(kThreads) gemv_kernel(Linear4bitArgs args, int stage_chunks) {
  DEFTCORE_DYNAMIC_SHARED(uint4, dynamic);
  __shared__ Books books;
  T* staged = reinterpret_cast<T*>(dynamic);
  const Quant4& q = args.w;
  load_books(q, books);
  const int lane = threadIdx.x % kWarp;
  const int64_t row0 = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp) * kRows;
  const int64_t token0 = static_cast<int64_t>(blockIdx.y) * kCount;
  const int tokens = static_cast<int>(min(static_cast<int64_t>(kCount), args.tokens - token0));
  const T* x = static_cast<const T*>(args.x) + token0 * q.cols;
  const int chunks = static_cast<int>(ceil_div(q.cols, kChunk));
  const auto load = [&](int chunk, Codes(&rows)[kRows]) {
    const int64_t k = static_cast<int64_t>(chunk) * kChunk + lane * kLaneWeights;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {  // past the last row: the last one again, its result unused
      if (k < q.cols) rows[r] = load_codes(q, min(row0 + r, q.rows - 1) * q.cols + k);
    }
  };
  float total[kRows][kCount] = {};
  Codes now[kRows];
  load(0, now);
  for (int stage = 0; stage < chunks; stage += stage_chunks) {
    const int here = min(stage_chunks, chunks - stage);
    __syncthreads();  // the last stage is used up
    stage_x<kCount>(x, q.cols, tokens, static_cast<int64_t>(stage) * kChunk, here, staged);
    __syncthreads();
    for (int c = 0; c < here; ++c) {
      Codes next[kRows];
      if (stage + c + 1 < chunks) load(stage + c + 1, next);
      if (static_cast<int64_t>(stage + c) * kChunk + lane * kLaneWeights < q.cols) {
        add_dots(q, books, now, staged + c * kCount * kStagedChunk<T>, total);
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) now[r] = next[r];
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
      for (int64_t i = lane; i < args.rank; i += kWarp) {
        sum = fmaf(to_float(low[(token0 + m) * args.rank + i]), to_float(lora[row * args.rank + i]), sum);
      }
      sum = warp_sum(sum);
      if (lane != 0) continue;
      if (args.bias != nullptr) sum += to_float(static_cast<const T*>(args.bias)[row]);
      static_cast<T*>(args.y)[(token0 + m) * q.rows + row] = from_float<T>(sum);
    }
  }
}

// ---------------------------------------------------------------------------- launch

constexpr int kStageBytes = 40 << 10;  // of x: five blocks fit the shared memory of an H100's multiprocessor
static_assert(kStageBytes + sizeof(Books) <= kSharedBytes, "x and the books fit a block");

template <class T, int kCount, int kRows>
void gemv_rows(const Linear4bitArgs& args, Stream stream) {
  const Stage stage = stage_of<kStageBytes, kCount, T>(args.w.cols);
  const dim3 grid(blocks_for(args.w.rows, kWarps * kRows), blocks_for(args.tokens, kCount));
  launch(gemv_kernel<T, kCount, kRows>, grid, kThreads, stage.bytes, stream, args, stage.chunks);
}

// As many rows a warp as leave every multiprocessor two blocks.
template <class T, int kCount>
void gemv_tokens(const Linear4bitArgs& args, Stream stream) {
  const int64_t rows_per_warp = args.w.rows / (2 * multiprocessors() * kWarps);
  if (rows_per_warp >= 4 && kCount <= 2) return gemv_rows<T, kCount, kCount <= 2 ? 4 : 2>(args, stream);
  if (rows_per_warp >= 2) return gemv_rows<T, kCount, 2>(args, stream);
  gemv_rows<T, kCount, 1>(args, stream);
}

template <class T>
void gemv(const Linear4bitArgs& args, Stream stream) {
  if (args.tokens == 1) return gemv_tokens<T, 1>(args, stream);
  if (args.tokens == 2) return gemv_tokens<T, 2>(args, stream);
  if (args.tokens <= 4) return gemv_tokens<T, 4>(args, stream);
  gemv_tokens<T, 8>(args, stream);
}

}  // namespace

void quantize_4bit(const Quantize4bitArgs& args, Stream stream) {
  check_args(args, "quantize_4bit");
  if (args.count == 0) return;
  Book book{};
  const float* code = code_book(args.type);
  const uint8_t* order = code_order(args.type);
  for (int j = 0; j < 16; ++j) book.order[j] = order[j];
  for (int j = 0; j < 15; ++j) book.thresholds[j] = (code[order[j]] + code[order[j + 1]]) * 0.5f;
  const int64_t blocks = ceil_div(args.count, args.block_size);
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    launch(quantize_kernel<T>, blocks_for(blocks, kWarps), kThreads, 0, stream, static_cast<const T*>(args.w),
           args.packed, args.absmax, args.count, args.block_size, book);
  });
}

void dequantize_4bit(const Dequantize4bitArgs& args, Stream stream) {
  check_args(args, "dequantize_4bit");
  const Quant4& q = args.w;
  const int64_t count = q.rows * q.cols;
  if (count == 0) return;
  const bool words =
      reinterpret_cast<uintptr_t>(q.packed) % 4 == 0 && aligned16(args.out) && (!q.column_blocks || q.cols % 8 == 0);
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    launch(words ? dequantize_kernel<true, T> : dequantize_kernel<false, T>, blocks_for(count, kThreads * 8), kThreads,
           0, stream, q, static_cast<T*>(args.out));
  });
}

size_t linear_4bit_workspace(const Linear4bitArgs&) { return 0; }

int64_t linear_4bit_tokens(const Quant4& w, DType dtype) {
  if (!is_regular(w) || !aligned16(w.packed)) return 0;
  return dtype == DType::kFloat32 ? kMostTokensFloat : kMostTokensHalf;
}

void linear_4bit(const Linear4bitArgs& args, Stream stream) {
  check_args(args, "linear_4bit");
  require(args.tokens <= linear_4bit_tokens(args.w, args.dtype) && aligned16(args.x), "linear_4bit",
          "more than linear_4bit_tokens, or x is not 16-byte aligned");
  if (args.tokens == 0 || args.w.rows == 0) return;
  dispatch_dtype(args.dtype, [&](auto t) { gemv<decltype(t)>(args, stream); });
}

}  // namespace deftcore::cuda
