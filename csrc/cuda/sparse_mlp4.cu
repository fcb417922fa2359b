// The MLP from its pre-activation on, over 4-bit weights: packed rows of inactive neurons are not read. The stages are
// those of sparse_down.cuh, with the rows of W_up and W_down decoded where they are used.
//   pack   one warp per list entry          h[k, m] = act[m, list[k]] (* (x[m] . W_up[list[k]] + low-rank term))
//   down   blocks = column tiles x splits   a thread decodes the same columns of every row of its split
#include "decode4.cuh"
#include "sparse_down.cuh"

namespace deftcore::cuda {
namespace {

// A = T where act holds activations already, float after activate_kernel.
template <bool kVector, class T, class A>
__global__ void __launch_bounds__(kThreads, 2)
    pack4_kernel(SparseMlp4bitArgs args, const A* act, const int32_t* list, float* h) {
  __shared__ float code[16];
  const bool gated = args.w_up.packed != nullptr;
  if (gated && threadIdx.x < 16) code[threadIdx.x] = args.w_up.code[threadIdx.x];
  __syncthreads();
  const T *x = static_cast<const T*>(args.x), *low = static_cast<const T*>(args.up_low);
  const T* lora = static_cast<const T*>(args.up_lora);
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32), count = *args.rows_read;
  const int lane = threadIdx.x % 32;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; k < count; k += warps) {
    const int64_t neuron = list[k];
    for (int64_t m0 = 0; m0 < args.tokens; m0 += kTileTokens) {
      const int tile = static_cast<int>(min(static_cast<int64_t>(kTileTokens), args.tokens - m0));
      float dot[kTileTokens] = {};
      if (gated) row_dots4<kVector>(args.w_up, code, neuron, x + m0 * args.width, tile, dot);
      if (lane < tile) {
        const int64_t m = m0 + lane;
        float value = to_float(act[m * args.neurons + neuron]);
        value = fabsf(value) <= args.tau ? 0.0f : value;
        if (gated) {
          float mine = value_of(dot, lane);
          for (int64_t r = 0; r < args.up_rank; ++r) {
            mine += to_float(low[m * args.up_rank + r]) * to_float(lora[neuron * args.up_rank + r]);
          }
          value *= mine;
        }
        h[k * args.tokens + m] = value;
      }
    }
  }
}

// partial[split, m, j] = sum over the split's share of the list of h[k, m] W_down[list[k], j], kPack columns a thread:
// 8 are a 32-bit word of one block, 2 a byte.
template <int kPack>
__global__ void __launch_bounds__(kThreads)
    down4_kernel(Quant4 q, const int32_t* list, const int64_t* active, const float* h, int64_t tokens, float* partial) {
  __shared__ float code[16];
  if (threadIdx.x < 16) code[threadIdx.x] = q.code[threadIdx.x];
  __syncthreads();
  const int64_t j = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kPack;
  if (j >= q.cols) return;
  const int64_t count = *active, begin = count * blockIdx.y / gridDim.y, end = count * (blockIdx.y + 1) / gridDim.y;
  for (int64_t m0 = 0; m0 < tokens; m0 += kTileTokens) {
    float sum[kTileTokens][kPack] = {};
    for (int64_t k = begin; k < end; ++k) {
      const int64_t flat = static_cast<int64_t>(list[k]) * q.cols + j;
      float w[kPack];
      if constexpr (kPack == 8) {
        const uint32_t word = *reinterpret_cast<const uint32_t*>(q.packed + flat / 2);
        const float scale = q.column_blocks ? 0.0f : scale_at(q, flat / q.block_size);
        const float* scales = static_cast<const float*>(q.absmax) + list[k] / q.block_size * q.cols + j;
        decode8(word, code, w);
#pragma unroll
        for (int i = 0; i < 8; ++i) w[i] = __fmul_rn(w[i], q.column_blocks ? scales[i] : scale);
      } else {
        for (int i = 0; i < kPack; ++i) w[i] = weight_at(q, code, flat + i);
      }
#pragma unroll
      for (int m = 0; m < kTileTokens; ++m) {
        const float value = m0 + m < tokens ? h[k * tokens + m0 + m] : 0.0f;
#pragma unroll
        for (int i = 0; i < kPack; ++i) sum[m][i] = fmaf(value, w[i], sum[m][i]);
      }
    }
#pragma unroll
    for (int m = 0; m < kTileTokens; ++m) {
      if (m0 + m >= tokens) break;
#pragma unroll
      for (int i = 0; i < kPack; ++i) partial[(blockIdx.y * tokens + m0 + m) * q.cols + j + i] = sum[m][i];
    }
  }
}

// ----------------------------------------------------------------------------

template <class T>
void down4_and_reduce(const SparseMlp4bitArgs& args, const Buffers& b, cudaStream_t stream) {
  const Quant4& q = args.w_down_t;
  const bool words = q.cols % 8 == 0 && reinterpret_cast<uintptr_t>(q.packed) % 4 == 0;
  const int pack = words ? 8 : 2;
  const int64_t tiles = (q.cols + kThreads * pack - 1) / (kThreads * pack);
  const int splits = splits_for(tiles);
  const dim3 blocks(static_cast<unsigned>(tiles), static_cast<unsigned>(splits));
  (words ? down4_kernel<8> : down4_kernel<2>)<<<blocks, kThreads, 0, stream>>>(q, b.list, args.rows_read, b.h,
                                                                               args.tokens, b.partial);
  reduce<T>(b.partial, nullptr, splits, static_cast<const T*>(args.b_down), args.capacity, args.tokens, q.cols,
            args.rows_read, static_cast<T*>(args.y), stream);
}

template <class T>
void sparse_mlp_4bit_impl(const SparseMlp4bitArgs& args, cudaStream_t stream) {
  const int64_t widest = args.width > args.down_rank ? args.width : args.down_rank;
  const Buffers b = carve(args.workspace, args.tokens, args.neurons, widest, true);
  const T* z = static_cast<const T*>(args.z);
  const bool vector = args.w_up.packed == nullptr || aligned16(args.w_up.packed);
  const int blocks = grid(args.neurons, kThreads / 32);
  if (args.activated) {
    compact_kernel<T>
        <<<1, kCompactThreads, 0, stream>>>(z, args.tokens, args.neurons, args.tau, b.list, args.rows_read);
    (vector ? pack4_kernel<true, T, T> : pack4_kernel<false, T, T>)<<<blocks, kThreads, 0, stream>>>(args, z, b.list,
                                                                                                     b.h);
  } else {
    const int64_t count = args.tokens * args.neurons;
    activate_kernel<T><<<grid(count, kThreads), kThreads, 0, stream>>>(args.activation, z, count, b.act);
    compact_kernel<float>
        <<<1, kCompactThreads, 0, stream>>>(b.act, args.tokens, args.neurons, args.tau, b.list, args.rows_read);
    (vector ? pack4_kernel<true, T, float> : pack4_kernel<false, T, float>)<<<blocks, kThreads, 0, stream>>>(
        args, b.act, b.list, b.h);
  }
  down4_and_reduce<T>(args, b, stream);
  if (args.down_rank > 0) {
    down_and_reduce<T>(static_cast<const T*>(args.down_lora), args.down_rank, nullptr, args.capacity, args.rows_read, b,
                       args.tokens, args.down_rank, static_cast<T*>(args.down_low), stream);
  }
}

}  // namespace

size_t sparse_mlp_4bit_workspace(const SparseMlp4bitArgs& args) {
  SparseMlpArgs plain{};
  plain.tokens = args.tokens;
  plain.neurons = args.neurons;
  plain.width = args.width > args.down_rank ? args.width : args.down_rank;
  return sparse_mlp_workspace(plain);
}

void sparse_mlp_4bit(const SparseMlp4bitArgs& args, Stream stream) {
  dispatch_dtype(args.dtype, [&](auto t) { sparse_mlp_4bit_impl<decltype(t)>(args, stream_of(stream)); });
  DEFTCORE_CUDA_CHECK(cudaGetLastError());
}

}  // namespace deftcore::cuda
