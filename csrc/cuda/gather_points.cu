// Rows of points gathered or summed with weights, and the way back, bound by device memory: a thread makes 16 bytes of
// a row where the width allows it. The way back first lists for each point the slots that use it, a block per cloud;
// then each sum is made in registers, in the order of the slots. Atomics count only: repeats give the same bits.
#include "deftcore/neighbours.h"
#include "deftcore/workspace.h"
#include "elements.cuh"
#include "launch.cuh"

namespace deftcore::cuda {
namespace {

template <int kPack, class T>
struct Sums {
  using Elements = Pack<T, kPack>;
  float values[kPack] = {};

  __device__ void add(float weight, const Elements& x) {
#pragma unroll
    for (int i = 0; i < kPack; ++i) values[i] = fmaf(weight, to_float(x.values[i]), values[i]);
  }
  __device__ Elements rounded() const {
    Elements out;
#pragma unroll
    for (int i = 0; i < kPack; ++i) out.values[i] = from_float<T>(values[i]);
    return out;
  }
};

// A thread per pack of an output row.
template <int kPack, class T>
__global__ void __launch_bounds__(kThreads) gather_kernel(GatherPointsArgs args) {
  using Elements = Pack<T, kPack>;
  const int64_t packs = args.width / kPack, item = thread_in_grid(), row = item / packs, column = item % packs;
  if (row >= args.clouds * args.rows) return;
  const Elements* features = static_cast<const Elements*>(args.features) + row / args.rows * args.size * packs + column;
  const int64_t* indices = args.indices + row * args.k;
  Elements* out = static_cast<Elements*>(args.out) + item;
  if (args.weights == nullptr) {
    *out = features[indices[0] * packs];
    return;
  }
  Sums<kPack, T> sums;
  for (int64_t j = 0; j < args.k; ++j) sums.add(args.weights[row * args.k + j], features[indices[j] * packs]);
  *out = sums.rounded();
}

// ---------------------------------------------------------------------------- backward

// For each point of each cloud the slots r * k + j that use it, in their order: those of point i end at ends[i], where
// those of the next begin.
struct Uses {
  int32_t* ends;   // [clouds, size]
  int32_t* slots;  // [clouds, rows * k]

  Uses(const GatherPointsBackwardArgs& args, Workspace& room)
      : ends(room.take<int32_t>(args.clouds * args.size)),
        slots(room.take<int32_t>(args.clouds * args.rows * args.k)) {}
};

// Counts to the numbers before, in place, by all threads of a block, each for a piece of them.
__device__ void scan(int32_t* counts, int64_t size) {
  __shared__ int32_t totals[kThreads];
  const int64_t each = ceil_div(size, kThreads), begin = min(threadIdx.x * each, size), end = min(begin + each, size);
  int32_t sum = 0;
  for (int64_t i = begin; i < end; ++i) sum += counts[i];
  totals[threadIdx.x] = sum;
  __syncthreads();
  sum = 0;
  for (int i = 0; i < static_cast<int>(threadIdx.x); ++i) sum += totals[i];
  for (int64_t i = begin; i < end; ++i) {
    const int32_t count = counts[i];
    counts[i] = sum;
    sum += count;
  }
}

// A block per cloud. Slots take their places kThreads at a time, each behind those of its kind before it.
__global__ void __launch_bounds__(kThreads) list_kernel(GatherPointsBackwardArgs args, Uses uses) {
  __shared__ int32_t some[kThreads];
  const int64_t count = args.rows * args.k;
  const int64_t* indices = args.indices + blockIdx.x * count;
  int32_t* ends = uses.ends + blockIdx.x * args.size;
  int32_t* slots = uses.slots + blockIdx.x * count;
  const int mine = static_cast<int>(threadIdx.x);
  for (int64_t i = mine; i < args.size; i += kThreads) ends[i] = 0;
  __syncthreads();
  for (int64_t i = mine; i < count; i += kThreads) atomicAdd(&ends[indices[i]], 1);
  __syncthreads();
  scan(ends, args.size);
  for (int64_t first = 0; first < count; first += kThreads) {
    const int64_t slot = first + mine;
    const int32_t point = slot < count ? static_cast<int32_t>(indices[slot]) : -1;
    some[mine] = point;
    __syncthreads();  // the ends are those of the slots before, too
    int before = 0, all = 0;
    for (int i = 0; i < kThreads; ++i) {
      all += some[i] == point;
      before += some[i] == point && i < mine;
    }
    if (point >= 0) slots[ends[point] + before] = static_cast<int32_t>(slot);
    __syncthreads();  // all have their places
    if (point >= 0 && before == 0) ends[point] += all;
  }
}

// A thread per pack of a point's row.
template <int kPack, class T>
__global__ void __launch_bounds__(kThreads) sum_kernel(GatherPointsBackwardArgs args, Uses uses) {
  using Elements = Pack<T, kPack>;
  const int64_t packs = args.width / kPack, item = thread_in_grid(), point = item / packs, column = item % packs;
  if (point >= args.clouds * args.size) return;
  const int64_t cloud = point / args.size, count = args.rows * args.k;
  const Elements* grad = static_cast<const Elements*>(args.grad) + cloud * args.rows * packs + column;
  const int32_t* slots = uses.slots + cloud * count;
  const int32_t begin = point % args.size > 0 ? uses.ends[point - 1] : 0, end = uses.ends[point];
  const int32_t k = static_cast<int32_t>(args.k);
  Sums<kPack, T> sums;
  for (int32_t i = begin; i < end; ++i) {
    const int32_t slot = slots[i];
    sums.add(args.weights != nullptr ? args.weights[cloud * count + slot] : 1.0f, grad[slot / k * packs]);
  }
  static_cast<Elements*>(args.grad_features)[item] = sums.rounded();
}

// A warp per weight.
template <int kPack, class T>
__global__ void __launch_bounds__(kThreads) weights_kernel(GatherPointsBackwardArgs args) {
  using Elements = Pack<T, kPack>;
  const int64_t packs = args.width / kPack, slot = thread_in_grid() / kWarp;
  if (slot >= args.clouds * args.rows * args.k) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = slot / args.k, point = row / args.rows * args.size + args.indices[slot];
  const Elements* grad = static_cast<const Elements*>(args.grad) + row * packs;
  const Elements* features = static_cast<const Elements*>(args.features) + point * packs;
  float sum = 0.0f;
  for (int64_t p = lane; p < packs; p += kWarp) {
    const Elements a = grad[p], b = features[p];
#pragma unroll
    for (int i = 0; i < kPack; ++i) sum = fmaf(to_float(a.values[i]), to_float(b.values[i]), sum);
  }
  sum = warp_sum(sum);
  if (lane == 0) args.grad_weights[slot] = sum;
}

}  // namespace

// ----------------------------------------------------------------------------

void gather_points(const GatherPointsArgs& args, Stream stream) {
  check_args(args, "gather_points");
  const int64_t elements = args.clouds * args.rows * args.width;
  if (elements == 0) return;
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_pack<T>(fits_packs<T>({args.features, args.out}, {args.width}), [&](auto pack) {
      launch(gather_kernel<pack(), T>, blocks_for(elements / pack(), kThreads), kThreads, 0, stream, args);
    });
  });
}

size_t gather_points_backward_workspace(const GatherPointsBackwardArgs& args) {
  return bytes_of([&](Workspace& room) { Uses(args, room); });
}

void gather_points_backward(const GatherPointsBackwardArgs& args, Stream stream) {
  check_args(args, "gather_points_backward");
  if (args.clouds == 0) return;
  Workspace room(args.workspace);
  const Uses uses(args, room);
  const int64_t elements = args.clouds * args.size * args.width, weights = args.clouds * args.rows * args.k;
  if (elements > 0) launch(list_kernel, static_cast<unsigned>(args.clouds), kThreads, 0, stream, args, uses);
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_pack<T>(fits_packs<T>({args.grad, args.features, args.grad_features}, {args.width}), [&](auto pack) {
      if (elements > 0) {
        launch(sum_kernel<pack(), T>, blocks_for(elements / pack(), kThreads), kThreads, 0, stream, args, uses);
      }
      if (args.grad_weights == nullptr || weights == 0) return;
      launch(weights_kernel<pack(), T>, blocks_for(weights, kWarps), kThreads, 0, stream, args);
    });
  });
}

}  // namespace deftcore::cuda
