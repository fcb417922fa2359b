// y = a W_down^T over the union of the tokens' active neurons, and the MLPs built on it; W_down is [neurons, width].
// Bound by device memory: the weight rows of active neurons, once. No host read of the count: grids are sized by the
// machine and every kernel reads the count where `compact` left it, so CUDA graphs capture the whole sequence.
//   gate          one warp per row           act[m, i] = f(x[m] . W_gate[i])
//   few tokens    blocks = shares of neurons list, h and down projection of a share; partial sums to the workspace
//   more: compact one block, ascending       list = {i : any |act[m, i]| > tau}
//         pack    one warp per list entry    h[k, m] = act[m, list[k]] (* x[m] . W_up[list[k]])
//         down    blocks = column tiles x list splits, partial sums to the workspace
//   reduce        splits added in a fixed order: repeats are bit-equal
#include "sparse_down.cuh"

namespace deftcore::cuda {
namespace {

// ---------------------------------------------------------------------------- dots

// act[m, i] = f(x[m] . w[i] + b_up[i]) for all neurons.
template <bool kVector, int kCount, class T>
__global__ void __launch_bounds__(kThreads) gate_kernel(SparseMlpArgs args, const T* w, int64_t stride, float* act) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  const T* x = static_cast<const T*>(args.x);
  const T* b_up = static_cast<const T*>(args.b_up);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; i < args.neurons;
       i += warps) {
    for (int64_t m0 = 0; m0 < args.tokens; m0 += kCount) {
      const int tokens = static_cast<int>(min(static_cast<int64_t>(kCount), args.tokens - m0));
      float z[kCount];
      row_dots<kVector, kCount>(w + i * stride, x + m0 * args.width, args.width, tokens, z);
      const int m = threadIdx.x % 32;
      if (m < tokens) {
        float mine = value_of(z, m);
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
      if (w_up != nullptr) row_dots<kVector, kTileTokens>(w_up + neuron * up_stride, x + m0 * width, width, tile, dot);
      if (lane < tile) {
        float value = to_float(act[(m0 + lane) * neurons + neuron]);
        value = fabsf(value) <= tau ? 0.0f : value;
        if (w_up != nullptr) value *= value_of(dot, lane);
        h[k * tokens + m0 + lane] = value;
      }
    }
  }
}

// ----------------------------------------------------------------------------

template <class T>
void sparse_mlp_impl(const SparseMlpArgs& args, cudaStream_t stream) {
  const Buffers b = carve(args.workspace, args.tokens, args.neurons, args.width, true);
  const bool gated = args.w_gate != nullptr;
  const T* x = static_cast<const T*>(args.x);
  const T* w_first = static_cast<const T*>(gated ? args.w_gate : args.w_up);
  const int64_t first_stride = gated ? args.gate_stride : args.up_stride;
  const int warps = kThreads / 32;
  if (args.z != nullptr) {
    const int64_t count = args.tokens * args.neurons;
    activate_kernel<T>
        <<<grid(count, kThreads), kThreads, 0, stream>>>(args.activation, static_cast<const T*>(args.z), count, b.act);
  } else {
    const bool vector = vector_rows<T>(w_first, first_stride, args.width) && aligned16(x);
    const auto gate = args.tokens == 1 ? (vector ? gate_kernel<true, 1, T> : gate_kernel<false, 1, T>)
                                       : (vector ? gate_kernel<true, 4, T> : gate_kernel<false, 4, T>);
    gate<<<grid(args.neurons, warps), kThreads, 0, stream>>>(args, w_first, first_stride, b.act);
  }
  const T* w_up = gated ? static_cast<const T*>(args.w_up) : nullptr;
  const T *w_down = static_cast<const T*>(args.w_down_t), *bias = static_cast<const T*>(args.b_down);
  T* y = static_cast<T*>(args.y);
  if (args.tokens <= kFewTokens) {
    few_and_reduce<T, float>(
        {b.act, x, w_up, w_down, args.up_stride, args.down_stride, args.tokens, args.neurons, args.width, args.tau},
        bias, args.capacity, args.rows_read, b, y, stream);
    return;
  }
  compact_kernel<float>
      <<<1, kCompactThreads, 0, stream>>>(b.act, args.tokens, args.neurons, args.tau, b.list, args.rows_read);
  const auto pack = vector_rows<T>(args.w_up, args.up_stride, args.width) && aligned16(x)
                        ? pack_kernel<true, T, float>
                        : pack_kernel<false, T, float>;
  pack<<<grid(args.neurons, warps), kThreads, 0, stream>>>(b.act, x, w_up, args.up_stride, b.list, args.rows_read,
                                                           args.tokens, args.neurons, args.width, args.tau, b.h);
  down_and_reduce<T>(w_down, args.down_stride, bias, args.capacity, args.rows_read, b, args.tokens, args.width, y,
                     stream);
}

}  // namespace

size_t sparse_down_workspace(const SparseDownArgs& args) {
  return carve(nullptr, args.tokens, args.neurons, args.width, false).bytes;
}

size_t sparse_mlp_workspace(const SparseMlpArgs& args) {
  return carve(nullptr, args.tokens, args.neurons, args.width, true).bytes;
}

void sparse_down(const SparseDownArgs& args, Stream stream) {
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    const Buffers b = carve(args.workspace, args.tokens, args.neurons, args.width, false);
    const T *a = static_cast<const T*>(args.a), *w = static_cast<const T*>(args.w_down_t);
    const T* bias = static_cast<const T*>(args.bias);
    T* y = static_cast<T*>(args.y);
    if (args.tokens <= kFewTokens) {
      few_and_reduce<T, T>({a, nullptr, nullptr, w, 0, args.w_stride, args.tokens, args.neurons, args.width, args.tau},
                           bias, args.capacity, args.rows_read, b, y, stream_of(stream));
      return;
    }
    compact_kernel<T>
        <<<1, kCompactThreads, 0, stream_of(stream)>>>(a, args.tokens, args.neurons, args.tau, b.list, args.rows_read);
    pack_kernel<false, T, T><<<grid(args.neurons, kThreads / 32), kThreads, 0, stream_of(stream)>>>(
        a, nullptr, nullptr, 0, b.list, args.rows_read, args.tokens, args.neurons, args.width, args.tau, b.h);
    down_and_reduce<T>(w, args.w_stride, bias, args.capacity, args.rows_read, b, args.tokens, args.width, y,
                       stream_of(stream));
  });
  DEFTCORE_CUDA_CHECK(cudaGetLastError());
}

void sparse_mlp(const SparseMlpArgs& args, Stream stream) {
  dispatch_dtype(args.dtype, [&](auto t) { sparse_mlp_impl<decltype(t)>(args, stream_of(stream)); });
  DEFTCORE_CUDA_CHECK(cudaGetLastError());
}

}  // namespace deftcore::cuda
