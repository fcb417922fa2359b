// Partial back-propagation (S2FT): a = f(g) u and its slopes, bound by device memory, a thread moving 16 bytes at a
// time where the rows allow it; and y[t] += delta[adapter[t]] x[t] for a few tokens. There each token is its own unit
// of work, since the host does not know the adapter numbers: a second token of the same delta finds its rows in L2.
#include "deftcore/math.h"
#include "deftcore/partial_linear.h"
#include "elements.cuh"
#include "launch.cuh"

namespace deftcore::cuda {
namespace {

constexpr int kColumns = kThreads / 2;  // of y per block of the axpy stage: a thread per column and half of the rows

// A pack of a row, by its number in a contiguous [rows, width].
template <int kPack, class T>
__device__ Pack<T, kPack> read_pack(const void* base, int64_t stride, int64_t width, int64_t i) {
  const int64_t row = i * kPack / width, column = i * kPack % width;
  return *reinterpret_cast<const Pack<T, kPack>*>(static_cast<const T*>(base) + row * stride + column);
}

template <Activation kF, int kPack, class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks) gated_act_kernel(GatedActArgs args) {
  const int64_t packs = args.rows * args.width / kPack, step = threads_of_grid();
  for (int64_t i = thread_in_grid(); i < packs; i += step) {
    auto g = read_pack<kPack, T>(args.gate, args.gate_stride, args.width, i);
    const auto u = read_pack<kPack, T>(args.up, args.up_stride, args.width, i);
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      g.values[j] = from_float<T>(math::activate<kF>(to_float(g.values[j])) * to_float(u.values[j]));
    }
    static_cast<Pack<T, kPack>*>(args.a)[i] = g;
  }
}

template <Activation kF, int kPack, class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks) gated_act_backward_kernel(GatedActBackwardArgs args) {
  const int64_t packs = args.rows * args.width / kPack, step = threads_of_grid();
  for (int64_t i = thread_in_grid(); i < packs; i += step) {
    auto g = read_pack<kPack, T>(args.gate, args.gate_stride, args.width, i);
    auto u = read_pack<kPack, T>(args.up, args.up_stride, args.width, i);
    const auto grad = static_cast<const Pack<T, kPack>*>(args.grad)[i];
#pragma unroll
    for (int j = 0; j < kPack; ++j) {
      const auto f = math::gated_slopes<kF>(to_float(g.values[j]), to_float(u.values[j]), to_float(grad.values[j]));
      g.values[j] = from_float<T>(f.gate);
      u.values[j] = from_float<T>(f.up);
    }
    static_cast<Pack<T, kPack>*>(args.grad_gate)[i] = g;
    static_cast<Pack<T, kPack>*>(args.grad_up)[i] = u;
  }
}

// ---------------------------------------------------------------------------- deltas per row

// The workspace: factors [tokens, most], a token's low-rank rows times x.
size_t factor_floats(const GroupedDeltaArgs& args) { return static_cast<size_t>(args.tokens * args.most); }
__host__ __device__ float* factors_of(const GroupedDeltaArgs& args, int64_t token) {
  return static_cast<float*>(args.workspace) + token * args.most;
}

// grid (rows / kWarps, tokens): one warp per scatter or low-rank row of the token's delta.
template <class T>
__global__ void __launch_bounds__(kThreads) delta_dots_kernel(GroupedDeltaArgs args) {
  const int64_t token = blockIdx.y, delta = args.adapter[token];
  const DeltaBank& bank = args.bank;
  if (delta < 0 || delta >= bank.count) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t scatter = bank.scatter_start[delta], low = bank.low_start[delta];
  const int64_t scattered = bank.scatter_start[delta + 1] - scatter, ranks = bank.low_start[delta + 1] - low;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= scattered + ranks) return;
  const bool is_low = row >= scattered;
  const T* w = is_low ? static_cast<const T*>(bank.low_in) + (low + row - scattered) * bank.inputs
                      : static_cast<const T*>(bank.scatter_rows) + (scatter + row) * bank.inputs;
  const T* x = static_cast<const T*>(args.x) + token * bank.inputs;
  float sum = 0.0f;
  for (int64_t i = lane; i < bank.inputs; i += kWarp) sum = fmaf(to_float(x[i]), to_float(w[i]), sum);
  sum = warp_sum(sum);
  if (lane != 0) return;
  if (is_low) {
    factors_of(args, token)[row - scattered] = sum;
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
  const float* factors = factors_of(args, token);
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

}  // namespace

// ----------------------------------------------------------------------------

void gated_act(const GatedActArgs& args, Stream stream) {
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    const bool packs = fits_packs<T>({args.gate, args.up, args.a}, {args.width, args.gate_stride, args.up_stride});
    dispatch_pack<T>(packs, [&](auto pack) {
      dispatch(args.activation, [&](auto f) {
        const unsigned blocks = striding_blocks(args.rows * args.width / pack(), kThreads);
        launch(gated_act_kernel<f(), pack(), T>, blocks, kThreads, 0, stream, args);
      });
    });
  });
}

void gated_act_backward(const GatedActBackwardArgs& args, Stream stream) {
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    const bool packs = fits_packs<T>({args.gate, args.up, args.grad, args.grad_gate, args.grad_up},
                                     {args.width, args.gate_stride, args.up_stride});
    dispatch_pack<T>(packs, [&](auto pack) {
      dispatch(args.activation, [&](auto f) {
        const unsigned blocks = striding_blocks(args.rows * args.width / pack(), kThreads);
        launch(gated_act_backward_kernel<f(), pack(), T>, blocks, kThreads, 0, stream, args);
      });
    });
  });
}

size_t grouped_delta_workspace(const GroupedDeltaArgs& args) { return factor_floats(args) * sizeof(float); }

void grouped_delta(const GroupedDeltaArgs& args, Stream stream) {
  check_args(args, "grouped_delta");
  constexpr int64_t kMaxTokens = 65535;  // of a launch: a grid's second dimension
  if (args.most == 0 || args.bank.outputs == 0) return;
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    for (int64_t first = 0; first < args.tokens; first += kMaxTokens) {
      GroupedDeltaArgs piece = args;
      piece.tokens = std::min(kMaxTokens, args.tokens - first);
      piece.x = static_cast<const T*>(args.x) + first * args.bank.inputs;
      piece.adapter = args.adapter + first;
      piece.y = static_cast<T*>(args.y) + first * args.bank.outputs;
      piece.workspace = factors_of(args, first);
      const dim3 dots(blocks_for(args.most, kWarps), static_cast<unsigned>(piece.tokens));
      const dim3 axpys(blocks_for(args.bank.outputs, kColumns), static_cast<unsigned>(piece.tokens));
      launch(delta_dots_kernel<T>, dots, kThreads, 0, stream, piece);
      launch(delta_axpys_kernel<T>, axpys, kThreads, 0, stream, piece);
    }
  });
}

}  // namespace deftcore::cuda
