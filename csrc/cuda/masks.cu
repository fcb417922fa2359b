// y = x * mask, and its backward in one pass over x and its output's gradient, both bound by device memory: a thread
// moves 16 bytes at a time where the columns allow it. A block takes kMaskRows rows of 32 packs, a warp every eighth
// row. In the backward it writes one sum per column to the workspace; a warp per unit adds those up. No atomics:
// repeats give the same bits.
#include "deftcore/masks.h"
#include "deftcore/math.h"
#include "deftcore/workspace.h"
#include "elements.cuh"
#include "launch.cuh"

namespace deftcore::cuda {
namespace {

// What a thread works on, of block `across` + b * `blocks_across`: kPack columns of the rows [b * kMaskRows, ...),
// every kWarps-th from its warp's. So it reads its columns' masks once.
template <int kPack>
struct Share {
  int64_t row, last;
  int column;
  float mask[kPack];

  __device__ Share(const float* all, int64_t rows, int columns, int width, int blocks_across) {
    const int64_t part = blockIdx.x / blocks_across;
    row = part * kMaskRows + threadIdx.x / kWarp;
    column = static_cast<int>(blockIdx.x % blocks_across * kWarp + threadIdx.x % kWarp) * kPack;
    last = column < columns ? min(rows, (part + 1) * kMaskRows) : 0;
#pragma unroll
    for (int i = 0; i < kPack; ++i) mask[i] = column < columns ? all[(column + i) / width] : 0.0f;
  }
};

template <int kPack, class T>
__global__ void __launch_bounds__(kThreads) mask_kernel(MaskUnitsArgs args, int blocks_across) {
  using Elements = Pack<T, kPack>;
  const int width = static_cast<int>(args.width), columns = static_cast<int>(args.units) * width;
  const Share<kPack> own(args.mask, args.rows, columns, width, blocks_across);
  for (int64_t row = own.row; row < own.last; row += kWarps) {
    const int64_t at = (row * columns + own.column) / kPack;
    Elements values = static_cast<const Elements*>(args.x)[at];
#pragma unroll
    for (int i = 0; i < kPack; ++i) values.values[i] = from_float<T>(to_float(values.values[i]) * own.mask[i]);
    static_cast<Elements*>(args.y)[at] = values;
  }
}

// The slopes of m f(x): grad m f'(x) for x, and grad f(x) for m.
struct Identity {
  __device__ static math::GatedSlopes<float> slopes(float x, float mask, float grad) { return {grad * mask, grad * x}; }
};
template <Activation kF>
struct Activated {
  __device__ static math::GatedSlopes<float> slopes(float x, float mask, float grad) {
    return math::gated_slopes<kF>(x, mask, grad);
  }
};

// The workspace: sums [ceil(rows / kMaskRows), columns].
float* sums_of(const MaskUnitsBackwardArgs& args, Workspace& room) {
  return room.take<float>(ceil_div(args.rows, kMaskRows) * args.units * args.width);
}

template <class F, int kPack, class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    mask_backward_kernel(MaskUnitsBackwardArgs args, float* sums, int blocks_across) {
  using Elements = Pack<T, kPack>;
  __shared__ float totals[kWarps][kWarp * kPack];
  const int width = static_cast<int>(args.width), columns = static_cast<int>(args.units) * width;
  const Share<kPack> own(args.mask, args.rows, columns, width, blocks_across);
  float total[kPack] = {};
  for (int64_t row = own.row; row < own.last; row += kWarps) {
    const int64_t at = (row * columns + own.column) / kPack;
    Elements values = static_cast<const Elements*>(args.x)[at];
    const Elements grads = static_cast<const Elements*>(args.grad)[at];
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const auto f = F::slopes(to_float(values.values[i]), own.mask[i], to_float(grads.values[i]));
      total[i] += f.up;
      values.values[i] = from_float<T>(f.gate);
    }
    static_cast<Elements*>(args.grad_x)[at] = values;
  }
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kPack; ++i) totals[warp][lane * kPack + i] = total[i];
  __syncthreads();
  const int mine = static_cast<int>(threadIdx.x), first = static_cast<int>(blockIdx.x % blocks_across) * kWarp * kPack;
  if (mine >= kWarp * kPack || first + mine >= columns) return;
  float sum = 0.0f;
  for (int w = 0; w < kWarps; ++w) sum += totals[w][mine];
  sums[blockIdx.x / blocks_across * columns + first + mine] = sum;
}

// A warp per unit.
__global__ void __launch_bounds__(kThreads) mask_sums_kernel(MaskUnitsBackwardArgs args, const float* sums) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (unit >= args.units) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t items = ceil_div(args.rows, kMaskRows) * args.width;
  float sum = 0.0f;
  for (int64_t i = lane; i < items; i += kWarp) {
    sum += sums[(i / args.width * args.units + unit) * args.width + i % args.width];
  }
  sum = warp_sum(sum);
  if (lane == 0) args.grad_mask[unit] = sum;
}

// Blocks of Share, and how many lie across.
struct Blocks {
  unsigned all;
  int across;

  Blocks(int64_t rows, int64_t columns, int pack)
      : all(static_cast<unsigned>(ceil_div(columns, kWarp * pack) * ceil_div(rows, kMaskRows))),
        across(static_cast<int>(ceil_div(columns, kWarp * pack))) {}
};

template <class F, class T>
void backward(const MaskUnitsBackwardArgs& args, float* sums, Stream stream) {
  const int64_t columns = args.units * args.width;
  dispatch_pack<T>(fits_packs<T>({args.x, args.grad, args.grad_x}, {columns}), [&](auto pack) {
    const Blocks blocks(args.rows, columns, pack());
    if (blocks.all == 0) return;
    launch(mask_backward_kernel<F, pack(), T>, blocks.all, kThreads, 0, stream, args, sums, blocks.across);
  });
}

}  // namespace

// ----------------------------------------------------------------------------

void mask_units(const MaskUnitsArgs& args, Stream stream) {
  check_args(args, "mask_units");
  const int64_t columns = args.units * args.width;
  if (args.rows == 0 || columns == 0) return;
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_pack<T>(fits_packs<T>({args.x, args.y}, {columns}), [&](auto pack) {
      const Blocks blocks(args.rows, columns, pack());
      launch(mask_kernel<pack(), T>, blocks.all, kThreads, 0, stream, args, blocks.across);
    });
  });
}

size_t mask_units_backward_workspace(const MaskUnitsBackwardArgs& args) {
  return bytes_of([&](Workspace& room) { sums_of(args, room); });
}

void mask_units_backward(const MaskUnitsBackwardArgs& args, Stream stream) {
  check_args(args, "mask_units_backward");
  if (args.units == 0) return;
  Workspace room(args.workspace);
  float* sums = sums_of(args, room);
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    if (!args.activated) return backward<Identity, T>(args, sums, stream);
    dispatch(args.activation, [&](auto f) { backward<Activated<f()>, T>(args, sums, stream); });
  });
  const float* ready = sums;
  launch(mask_sums_kernel, blocks_for(args.units, kWarps), kThreads, 0, stream, args, ready);
}

}  // namespace deftcore::cuda
