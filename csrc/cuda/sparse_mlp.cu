// y = a W_down^T over the active neurons of a [tokens, neurons], and the MLPs built on it; W_down is [neurons, width].
// Bound by device memory: the weight rows of active neurons, once for four tokens.
//   gate     a warp per row              act[m, i] = f(x[m] . W_gate[i])
//   share    blocks = shares of neurons  list, h = act (* x . W_up) and down projection; partial sums to the workspace
//   reduce   shares added in a fixed order: repeats are bit-equal
#include "sparse_down.cuh"

namespace deftcore::cuda {
namespace {

// Each lane of a warp sums its part of x[m] . row for `tokens` of kCount tokens; every lane gets the totals.
template <bool kVector, int kCount, class T>
__device__ void row_dots(const T* row, const T* x, int64_t width, int tokens, float (&out)[kCount]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (float& o : out) o = 0.0f;
  if constexpr (kVector) {
    constexpr int kSize = Pack<T>::kSize;
#pragma unroll 4
    for (int64_t j = lane * kSize; j < width; j += kWarp * kSize) {
      const Pack<T> w = *reinterpret_cast<const Pack<T>*>(row + j);
#pragma unroll
      for (int m = 0; m < kCount; ++m) {  // past the last token: the last one again, its result unused
        const Pack<T> v = *reinterpret_cast<const Pack<T>*>(x + min(m, tokens - 1) * width + j);
#pragma unroll
        for (int i = 0; i < kSize; ++i) out[m] = fmaf(to_float(w.values[i]), to_float(v.values[i]), out[m]);
      }
    }
  } else {
    for (int64_t j = lane; j < width; j += kWarp) {
      const float w = to_float(row[j]);
#pragma unroll
      for (int m = 0; m < kCount; ++m) {
        out[m] = fmaf(w, to_float(x[min(m, tokens - 1) * width + j]), out[m]);
      }
    }
  }
#pragma unroll
  for (float& o : out) o = warp_sum(o);
}

// act[m, i] = f(x[m] . w[i] + b_up[i]) for all neurons.
template <bool kVector, int kCount, class T>
__global__ void __launch_bounds__(kThreads) gate_kernel(SparseMlpArgs args, const T* w, int64_t stride, float* act) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  const T* x = static_cast<const T*>(args.x);
  const T* b_up = static_cast<const T*>(args.b_up);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; i < args.neurons; i += warps) {
    for (int64_t m0 = 0; m0 < args.tokens; m0 += kCount) {
      const int tokens = static_cast<int>(min(static_cast<int64_t>(kCount), args.tokens - m0));
      float z[kCount];
      row_dots<kVector, kCount>(w + i * stride, x + m0 * args.width, args.width, tokens, z);
      const int m = threadIdx.x % kWarp;
      if (m < tokens) {
        float mine = value_of(z, m);
        if (b_up != nullptr) mine += to_float(b_up[i]);
        act[(m0 + m) * args.neurons + i] = activate(args.activation, mine);
      }
    }
  }
}

template <class T, class A>
struct ShareArgs {
  const A* act;     // [tokens, neurons]
  const T* x;       // [tokens, width], gated MLPs only
  const T* w_up;    // [neurons, width] or null
  const T* w_down;  // [neurons, width]
  int64_t up_stride, down_stride, tokens, neurons, width;
  float tau;
  float* partial;   // [shares, tokens, width], out
  int32_t* counts;  // [groups, shares], out
};

template <int kPack, int kCount, class T, class A>
__global__ void __launch_bounds__(kThreads, kMinBlocks) share_kernel(ShareArgs<T, A> args) {
  __shared__ int32_t list[kShare];
  __shared__ float h[kShare][kCount];
  const Share share = share_of(args.neurons, args.tokens, kCount);
  const int count = list_active<kCount>(share, args.act, args.neurons, args.tau, list, h);
  if (threadIdx.x == 0 && blockIdx.x == 0) args.counts[blockIdx.z * gridDim.y + blockIdx.y] = count;
  if (args.w_up != nullptr) {
    const T* x = args.x + share.token * args.width;
    for (int k = threadIdx.x / kWarp; k < count; k += kWarps) {
      float dot[kCount];
      row_dots<(kPack > 1), kCount>(args.w_up + list[k] * args.up_stride, x, args.width, share.tokens, dot);
      const int m = threadIdx.x % kWarp;
      if (m < kCount) h[k][m] *= value_of(dot, m);
    }
    __syncthreads();
  }
  constexpr int64_t kBlockColumns = kThreads * kPack;
  for (int64_t j = blockIdx.x * kBlockColumns + threadIdx.x * kPack; j < args.width; j += gridDim.x * kBlockColumns) {
    float sum[kCount][kPack] = {};
#pragma unroll 8
    for (int k = 0; k < count; ++k) {
      const auto row = *reinterpret_cast<const Pack<T, kPack>*>(args.w_down + list[k] * args.down_stride + j);
#pragma unroll
      for (int m = 0; m < kCount; ++m) {
#pragma unroll
        for (int i = 0; i < kPack; ++i) sum[m][i] = fmaf(h[k][m], to_float(row.values[i]), sum[m][i]);
      }
    }
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
      if (m >= share.tokens) break;
      store_sums(sum[m], args.partial + (blockIdx.y * args.tokens + share.token + m) * args.width + j);
    }
  }
}

// ----------------------------------------------------------------------------

Buffers buffers_of(const SparseDownArgs& args) {
  return lay_out(args.workspace, args.tokens, args.neurons, args.width, 0, false);
}

Buffers buffers_of(const SparseMlpArgs& args) {
  return lay_out(args.workspace, args.tokens, args.neurons, args.width, 0, true);
}

template <class T, class A>
void share_and_reduce(ShareArgs<T, A> args, const Buffers& b, const T* bias, int64_t capacity, int64_t* active, T* y,
                      Stream stream) {
  args.partial = b.partial;
  args.counts = b.counts;
  const Cut cut = cut_for(args.neurons, args.tokens);
  const bool gated = args.w_up != nullptr;
  const bool packs = fits_packs<T>({args.w_down}, {args.down_stride, args.width}) &&
                     (!gated || fits_packs<T>({args.w_up, args.x}, {args.up_stride, args.width}));
  dispatch_pack<T>(packs, [&](auto pack) {
    dispatch_count(cut, [&](auto count) {
      const dim3 grid = grid_of(cut, args.width, kThreads * pack(), gated);
      launch(share_kernel<pack(), count(), T, A>, grid, kThreads, 0, stream, args);
    });
  });
  reduce<T>(b.partial, b, cut, bias, capacity, args.tokens, args.width, active, y, stream);
}

template <class T>
void sparse_mlp_impl(const SparseMlpArgs& args, Stream stream) {
  const Buffers b = buffers_of(args);
  const bool gated = args.w_gate != nullptr;
  const T* x = static_cast<const T*>(args.x);
  const T* w_first = static_cast<const T*>(gated ? args.w_gate : args.w_up);
  const int64_t first_stride = gated ? args.gate_stride : args.up_stride;
  if (args.z != nullptr) {
    const int64_t count = args.tokens * args.neurons;
    launch(activate_kernel<T>, striding_blocks(count, kThreads), kThreads, 0, stream, args.activation,
           static_cast<const T*>(args.z), count, b.act);
  } else {
    const bool packs = fits_packs<T>({w_first, x}, {first_stride, args.width});
    const auto gate = args.tokens == 1 ? (packs ? gate_kernel<true, 1, T> : gate_kernel<false, 1, T>)
                                       : (packs ? gate_kernel<true, 4, T> : gate_kernel<false, 4, T>);
    launch(gate, striding_blocks(args.neurons, kWarps), kThreads, 0, stream, args, w_first, first_stride, b.act);
  }
  share_and_reduce<T, float>(
      {b.act, x, gated ? static_cast<const T*>(args.w_up) : nullptr, static_cast<const T*>(args.w_down_t),
       args.up_stride, args.down_stride, args.tokens, args.neurons, args.width, args.tau, nullptr, nullptr},
      b, static_cast<const T*>(args.b_down), args.capacity, args.rows_read, static_cast<T*>(args.y), stream);
}

}  // namespace

size_t sparse_down_workspace(const SparseDownArgs& args) { return buffers_of(args).bytes; }

size_t sparse_mlp_workspace(const SparseMlpArgs& args) { return buffers_of(args).bytes; }

void sparse_down(const SparseDownArgs& args, Stream stream) {
  check_args(args, "sparse_down");
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    share_and_reduce<T, T>({static_cast<const T*>(args.a), nullptr, nullptr, static_cast<const T*>(args.w_down_t), 0,
                            args.w_stride, args.tokens, args.neurons, args.width, args.tau, nullptr, nullptr},
                           buffers_of(args), static_cast<const T*>(args.bias), args.capacity, args.rows_read,
                           static_cast<T*>(args.y), stream);
  });
}

void sparse_mlp(const SparseMlpArgs& args, Stream stream) {
  check_args(args, "sparse_mlp");
  dispatch_dtype(args.dtype, [&](auto t) { sparse_mlp_impl<decltype(t)>(args, stream); });
}

}  // namespace deftcore::cuda
