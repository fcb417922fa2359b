// y = a W_down^T over the union of the tokens' active neurons, and the MLPs built on it; W_down is [neurons, width].
// Bound by device memory: the weight rows of active neurons, once. No host read of the count: grids are sized by the
// machine and every kernel reads the count where `compact` left it, so CUDA graphs capture the whole sequence.
//   dots (gate)   one warp per row           act[m, i] = f(x[m] . W_gate[i])
//   compact       one block, ascending       list = {i : any |act[m, i]| > tau}
//   dots / pack   one warp per list entry    h[k, m] = act[m, list[k]] (* x[m] . W_up[list[k]])
//   down          blocks = column tiles x list splits, partial sums to the workspace
//   reduce        splits added in order: repeats are bit-equal
#include "sparse_down.cuh"

namespace deftcore::cuda {
namespace {

// ---------------------------------------------------------------------------- dots

// Each lane of a warp sums its part of x[m] . row for up to kTileTokens tokens; every lane gets the totals.
template <bool kVector, class T>
__device__ void row_dots(const T* row, const T* x, int64_t width, int tokens, float (&out)[kTileTokens]) {
  const int lane = threadIdx.x % 32;
  for (float& o : out) o = 0.0f;
  if constexpr (kVector) {
    constexpr int kSize = Pack<T>::kSize;
    for (int64_t j = lane * kSize; j < width; j += 32 * kSize) {
      const Pack<T> w = *reinterpret_cast<const Pack<T>*>(row + j);
#pragma unroll
      for (int m = 0; m < kTileTokens; ++m) {  // past the last token: the last one again, its result unused
        const Pack<T> v = *reinterpret_cast<const Pack<T>*>(x + min(m, tokens - 1) * width + j);
#pragma unroll
        for (int i = 0; i < kSize; ++i) out[m] = fmaf(to_float(w.values[i]), to_float(v.values[i]), out[m]);
      }
    }
  } else {
    for (int64_t j = lane; j < width; j += 32) {
      const float w = to_float(row[j]);
#pragma unroll
      for (int m = 0; m < kTileTokens; ++m) {
        out[m] = fmaf(w, to_float(x[min(m, tokens - 1) * width + j]), out[m]);
      }
    }
  }
#pragma unroll
  for (float& o : out) o = warp_sum(o);
}

// act[m, i] = f(x[m] . w[i] + b_up[i]) for all neurons.
template <bool kVector, class T>
__global__ void __launch_bounds__(kThreads) gate_kernel(SparseMlpArgs args, const T* w, int64_t stride, float* act) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  const T* x = static_cast<const T*>(args.x);
  const T* b_up = static_cast<const T*>(args.b_up);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; i < args.neurons;
       i += warps) {
    for (int64_t m0 = 0; m0 < args.tokens; m0 += kTileTokens) {
      const int tokens = static_cast<int>(min(static_cast<int64_t>(kTileTokens), args.tokens - m0));
      float z[kTileTokens];
      row_dots<kVector>(w + i * stride, x + m0 * args.width, args.width, tokens, z);
      const int m = threadIdx.x % 32;
      if (m < tokens) {
        float mine = z[0];
#pragma unroll
        for (int t = 1; t < kTileTokens; ++t) mine = m == t ? z[t] : mine;
        if (b_up != nullptr) mine += to_float(b_up[i]);
        act[(m0 + m) * args.neurons + i] = activate(args.activation, mine);
      }
    }
  }
}

// h[k, m] = kept(act[m, list[k]]), times x[m] . w_up[list[k]] when w_up is there.
template <bool kVector, class T, class A>
__global__ void __launch_bounds__(kThreads, 2)  // without the 2, ptxas aims at 64 registers and spills
    pack_kernel(const A* act, const T* x, const T* w_up, int64_t up_stride, const int32_t* list, const int64_t* active,
                int64_t tokens, int64_t neurons, int64_t width, float tau, float* h) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32), count = *active;
  const int lane = threadIdx.x % 32;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; k < count; k += warps) {
    const int64_t neuron = list[k];
    for (int64_t m0 = 0; m0 < tokens; m0 += kTileTokens) {
      const int tile = static_cast<int>(min(static_cast<int64_t>(kTileTokens), tokens - m0));
      float dot[kTileTokens];
      if (w_up != nullptr) row_dots<kVector>(w_up + neuron * up_stride, x + m0 * width, width, tile, dot);
      if (lane < tile) {
        float value = to_float(act[(m0 + lane) * neurons + neuron]);
        value = fabsf(value) <= tau ? 0.0f : value;
        if (w_up != nullptr) {
          float mine = dot[0];
#pragma unroll
          for (int t = 1; t < kTileTokens; ++t) mine = lane == t ? dot[t] : mine;
          value *= mine;
        }
        h[k * tokens + m0 + lane] = value;
      }
    }
  }
}

// ----------------------------------------------------------------------------

template <class T>
bool vector_rows(const void* w, int64_t stride, const void* x, int64_t width) {
  constexpr int kFull = Pack<T>::kSize;
  return aligned16(w) && aligned16(x) && stride % kFull == 0 && width % kFull == 0;
}

template <class T>
void sparse_mlp_impl(const SparseMlpArgs& args, cudaStream_t stream) {
  const Buffers b = carve(args.workspace, args.tokens, args.neurons, args.width);
  const bool gated = args.w_gate != nullptr;
  const T* x = static_cast<const T*>(args.x);
  const T* w_first = static_cast<const T*>(gated ? args.w_gate : args.w_up);
  const int64_t first_stride = gated ? args.gate_stride : args.up_stride;
  const int warps = kThreads / 32;
  if (args.z != nullptr) {
    const int64_t count = args.tokens * args.neurons;
    activate_kernel<T>
        <<<grid(count, kThreads), kThreads, 0, stream>>>(args.activation, static_cast<const T*>(args.z), count, b.act);
  } else if (vector_rows<T>(w_first, first_stride, x, args.width)) {
    gate_kernel<true, T><<<grid(args.neurons, warps), kThreads, 0, stream>>>(args, w_first, first_stride, b.act);
  } else {
    gate_kernel<false, T><<<grid(args.neurons, warps), kThreads, 0, stream>>>(args, w_first, first_stride, b.act);
  }
  compact_kernel<float>
      <<<1, kCompactThreads, 0, stream>>>(b.act, args.tokens, args.neurons, args.tau, b.list, args.rows_read);
  const T* w_up = gated ? static_cast<const T*>(args.w_up) : nullptr;
  const auto pack = vector_rows<T>(args.w_up, args.up_stride, x, args.width) ? pack_kernel<true, T, float>
                                                                             : pack_kernel<false, T, float>;
  pack<<<grid(args.neurons, warps), kThreads, 0, stream>>>(b.act, x, w_up, args.up_stride, b.list, args.rows_read,
                                                           args.tokens, args.neurons, args.width, args.tau, b.h);
  down_and_reduce<T>(static_cast<const T*>(args.w_down_t), args.down_stride, static_cast<const T*>(args.b_down),
                     args.rows_read, b, args.tokens, args.width, static_cast<T*>(args.y), stream);
}

}  // namespace

size_t sparse_down_workspace(const SparseDownArgs& args) {
  return align256(static_cast<size_t>(args.neurons) * 4) +
         align256(static_cast<size_t>(args.neurons) * static_cast<size_t>(args.tokens) * 4) +
         align256(static_cast<size_t>(kMaxSplits) * static_cast<size_t>(args.tokens) * static_cast<size_t>(args.width) *
                  4);
}

size_t sparse_mlp_workspace(const SparseMlpArgs& args) {
  SparseDownArgs down{};
  down.tokens = args.tokens;
  down.neurons = args.neurons;
  down.width = args.width;
  return sparse_down_workspace(down) + static_cast<size_t>(args.tokens) * static_cast<size_t>(args.neurons) * 4;
}

void sparse_down(const SparseDownArgs& args, Stream stream) {
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    const Buffers b = carve(args.workspace, args.tokens, args.neurons, args.width);
    const T* a = static_cast<const T*>(args.a);
    compact_kernel<T>
        <<<1, kCompactThreads, 0, stream_of(stream)>>>(a, args.tokens, args.neurons, args.tau, b.list, args.rows_read);
    pack_kernel<false, T, T><<<grid(args.neurons, kThreads / 32), kThreads, 0, stream_of(stream)>>>(
        a, nullptr, nullptr, 0, b.list, args.rows_read, args.tokens, args.neurons, args.width, args.tau, b.h);
    down_and_reduce<T>(static_cast<const T*>(args.w_down_t), args.w_stride, static_cast<const T*>(args.bias),
                       args.rows_read, b, args.tokens, args.width, static_cast<T*>(args.y), stream_of(stream));
  });
  DEFTCORE_CUDA_CHECK(cudaGetLastError());
}

void sparse_mlp(const SparseMlpArgs& args, Stream stream) {
  dispatch_dtype(args.dtype, [&](auto t) { sparse_mlp_impl<decltype(t)>(args, stream_of(stream)); });
  DEFTCORE_CUDA_CHECK(cudaGetLastError());
}

}  // namespace deftcore::cuda
