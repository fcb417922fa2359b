// Partial back-propagation (S2FT): a = f(g) u and its slopes, bound by device memory, a thread moving 16 bytes at a
// time where the rows allow it; and y[t] += delta[adapter[t]] x[t] for a few tokens. There each token is its own unit
// of work, since the host does not know the adapter numbers: a second token of the same delta finds its rows in L2.
#include "deftcore/math.h"
#include "deftcore/partial_linear.h"
#include "launch.cuh"

namespace deftcore::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMinBlocks = 2;
constexpr int kBlocksPerMultiprocessor = 8;
constexpr int kColumns = 128;  // of y per block of the axpy stage: a warp's 16-byte loads cover a piece of a row
constexpr int kDotRows = 8;    // rows per block of the dot stage: one per warp

template <int kPack, class T>
struct alignas(sizeof(T) * kPack) Group {
  T values[kPack];
};

template <int kPack, class T>
__device__ Group<kPack, T> read_group(const void* base, int64_t row, int64_t stride, int64_t column) {
  return *reinterpret_cast<const Group<kPack, T>*>(static_cast<const T*>(base) + row * stride + column);
}

template <Activation kF, int kPack, class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks) gated_act_kernel(GatedActArgs args) {
  const int64_t groups = args.rows * args.width / kPack, step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < groups; i += step) {
    const int64_t row = i * kPack / args.width, column = i * kPack % args.width;
    auto g = read_group<kPack, T>(args.gate, row, args.gate_stride, column);
    const auto u = read_group<kPack, T>(args.up, row, args.up_stride, column);
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      g.values[j] = from_float<T>(math::activate<kF>(to_float(g.values[j])) * to_float(u.values[j]));
    }
    static_cast<Group<kPack, T>*>(args.a)[i] = g;
  }
}

template <Activation kF, int kPack, class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks) gated_act_backward_kernel(GatedActBackwardArgs args) {
  const int64_t groups = args.rows * args.width / kPack, step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < groups; i += step) {
    const int64_t row = i * kPack / args.width, column = i * kPack % args.width;
    auto g = read_group<kPack, T>(args.gate, row, args.gate_stride, column);
    auto u = read_group<kPack, T>(args.up, row, args.up_stride, column);
    const auto grad = static_cast<const Group<kPack, T>*>(args.grad)[i];
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const auto f = math::gated_slopes<kF>(to_float(g.values[j]), to_float(u.values[j]), to_float(grad.values[j]));
      g.values[j] = from_float<T>(f.gate);
      u.values[j] = from_float<T>(f.up);
    }
    static_cast<Group<kPack, T>*>(args.grad_gate)[i] = g;
    static_cast<Group<kPack, T>*>(args.grad_up)[i] = u;
  }
}

// ---------------------------------------------------------------------------- deltas per row

// grid (rows / kDotRows, tokens): one warp per scatter or low-rank row of the token's delta.
template <class T>
__global__ void __launch_bounds__(kThreads) delta_dots_kernel(GroupedDeltaArgs args) {
  const int64_t token = blockIdx.y, delta = args.adapter[token];
  const DeltaBank& bank = args.bank;
  if (delta < 0 || delta >= bank.count) return;
  const int lane = threadIdx.x % 32;
  const int64_t scatter = bank.scatter_start[delta], low = bank.low_start[delta];
  const int64_t scattered = bank.scatter_start[delta + 1] - scatter, ranks = bank.low_start[delta + 1] - low;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kDotRows + threadIdx.x / 32;
  if (row >= scattered + ranks) return;
  const bool is_low = row >= scattered;
  const T* w = is_low ? static_cast<const T*>(bank.low_in) + (low + row - scattered) * bank.inputs
                      : static_cast<const T*>(bank.scatter_rows) + (scatter + row) * bank.inputs;
  const T* x = static_cast<const T*>(args.x) + token * bank.inputs;
  float sum = 0.0f;
  for (int64_t i = lane; i < bank.inputs; i += 32) sum = fmaf(to_float(x[i]), to_float(w[i]), sum);
  sum = warp_sum(sum);
  if (lane != 0) return;
  if (is_low) {
    static_cast<float*>(args.workspace)[token * args.most + row - scattered] = sum;
  } else {
    T* y = static_cast<T*>(args.y) + token * bank.outputs + bank.scatter_index[scatter + row];
    *y = from_float<T>(to_float(*y) + sum);
  }
}

// grid (outputs / kColumns, tokens): the block's two halves take the even and the odd rows of the token's delta.
template <class T>
__global__ void __launch_bounds__(kThreads) delta_axpys_kernel(GroupedDeltaArgs args) {
  __shared__ float halves[kColumns];
  const int64_t token = blockIdx.y, delta = args.adapter[token];
  const DeltaBank& bank = args.bank;
  if (delta < 0 || delta >= bank.count) return;
  const int half = threadIdx.x / kColumns, lane = threadIdx.x % kColumns;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + lane;
  const int64_t gather = bank.gather_start[delta], gathered = bank.gather_start[delta + 1] - gather;
  const int64_t low = bank.low_start[delta], ranks = bank.low_start[delta + 1] - low;
  const T* x = static_cast<const T*>(args.x) + token * bank.inputs;
  const float* factors = static_cast<const float*>(args.workspace) + token * args.most;
  float sum = 0.0f;
  if (column < bank.outputs) {
    const T* rows = static_cast<const T*>(bank.gather_rows) + gather * bank.outputs + column;
    for (int64_t r = half; r < gathered; r += 2) {
      sum = fmaf(to_float(x[bank.gather_index[gather + r]]), to_float(rows[r * bank.outputs]), sum);
    }
    rows = static_cast<const T*>(bank.low_out) + low * bank.outputs + column;
    for (int64_t r = half; r < ranks; r += 2) sum = fmaf(factors[r], to_float(rows[r * bank.outputs]), sum);
  }
  if (half == 1) halves[lane] = sum;
  __syncthreads();
  if (half == 0 && column < bank.outputs && gathered + ranks > 0) {
    T* y = static_cast<T*>(args.y) + token * bank.outputs + column;
    *y = from_float<T>(to_float(*y) + sum + halves[lane]);
  }
}
static_assert(kThreads == 2 * kColumns && kThreads == 32 * kDotRows, "a block is two halves, and a warp per dot");

// ----------------------------------------------------------------------------

int blocks_for(int64_t groups) {
  const int64_t wanted = (groups + kThreads - 1) / kThreads, most = multiprocessors() * kBlocksPerMultiprocessor;
  return static_cast<int>(wanted < most ? (wanted > 0 ? wanted : 1) : most);
}

// Calls fn(integral_constant n): sixteen bytes of T where every row allows it, else one element.
template <class T, class Args, class Fn>
void dispatch_pack(const Args& args, bool aligned, Fn&& fn) {
  constexpr int kFull = Pack<T>::kSize;
  const bool whole = args.width % kFull == 0 && args.gate_stride % kFull == 0 && args.up_stride % kFull == 0;
  if (aligned && whole) return fn(std::integral_constant<int, kFull>{});
  return fn(std::integral_constant<int, 1>{});
}

}  // namespace

void gated_act(const GatedActArgs& args, Stream stream) {
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_pack<T>(args, aligned16(args.gate) && aligned16(args.up) && aligned16(args.a), [&](auto pack) {
      dispatch(args.activation, [&](auto f) {
        gated_act_kernel<f(), pack(), T>
            <<<blocks_for(args.rows * args.width / pack()), kThreads, 0, stream_of(stream)>>>(args);
      });
    });
  });
  DEFTCORE_CUDA_CHECK(cudaGetLastError());
}

void gated_act_backward(const GatedActBackwardArgs& args, Stream stream) {
  const bool aligned = aligned16(args.gate) && aligned16(args.up) && aligned16(args.grad) &&
                       aligned16(args.grad_gate) && aligned16(args.grad_up);
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_pack<T>(args, aligned, [&](auto pack) {
      dispatch(args.activation, [&](auto f) {
        gated_act_backward_kernel<f(), pack(), T>
            <<<blocks_for(args.rows * args.width / pack()), kThreads, 0, stream_of(stream)>>>(args);
      });
    });
  });
  DEFTCORE_CUDA_CHECK(cudaGetLastError());
}

size_t grouped_delta_workspace(const GroupedDeltaArgs& args) {
  return static_cast<size_t>(args.tokens) * static_cast<size_t>(args.most) * sizeof(float) + 64;
}

void grouped_delta(const GroupedDeltaArgs& args, Stream stream) {
  constexpr int64_t kMaxTokens = 65535;  // of a grid's second dimension
  require(args.tokens <= kMaxTokens, "grouped_delta", "tokens must be at most 65535");
  if (args.tokens == 0 || args.most == 0) return;
  const auto blocks = [](int64_t n, int64_t per) { return static_cast<unsigned>((n + per - 1) / per); };
  const dim3 dots(blocks(args.most, kDotRows), static_cast<unsigned>(args.tokens));
  const dim3 axpys(blocks(args.bank.outputs, kColumns), static_cast<unsigned>(args.tokens));
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    delta_dots_kernel<T><<<dots, kThreads, 0, stream_of(stream)>>>(args);
    delta_axpys_kernel<T><<<axpys, kThreads, 0, stream_of(stream)>>>(args);
  });
  DEFTCORE_CUDA_CHECK(cudaGetLastError());
}

}  // namespace deftcore::cuda
