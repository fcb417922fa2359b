// a = f(z), sum of s(a), count of |a| > tau in one pass; backward dz = f'(z) (da + c m s'(f(z))) in another.
// Bound by device memory: each thread moves 16 bytes at a time where the width allows, and sums in registers; a block
// adds its sum and count with one atomic each.
#include "deftcore/density.h"
#include "deftcore/math.h"
#include "elements.cuh"
#include "launch.cuh"

namespace deftcore::cuda {
namespace {

__device__ bool counted(const uint8_t* mask, int64_t element, int64_t width) {
  return mask == nullptr || mask[element / width] != 0;
}

// Adds a thread's sum and count to the totals; every thread of the block calls it.
__device__ void add_to_totals(float sum, unsigned count, float* total_sum, int64_t* total_count) {
  __shared__ float sums[kWarps];
  __shared__ unsigned counts[kWarps];
  sum = warp_sum(sum);
  count = __reduce_add_sync(0xffffffffu, count);
  if (threadIdx.x % kWarp == 0) {
    sums[threadIdx.x / kWarp] = sum;
    counts[threadIdx.x / kWarp] = count;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned long long all = 0;
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) {
      total += sums[w];
      all += counts[w];
    }
    if (total_sum != nullptr) atomicAdd(total_sum, total);
    atomicAdd(reinterpret_cast<unsigned long long*>(total_count), all);
  }
}

// kPack elements of one row per step: the launcher makes kPack divide the width.
template <Activation kF, Surrogate kS, int kPack, class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks) act_density_kernel(ActDensityArgs args) {
  using Elements = Pack<T, kPack>;
  const int64_t packs = args.rows * args.width / kPack, step = threads_of_grid();
  float sum = 0.0f;
  unsigned count = 0;
  for (int64_t p = thread_in_grid(); p < packs; p += step) {
    Elements values = static_cast<const Elements*>(args.z)[p];
    const bool is_counted = counted(args.mask, p * kPack, args.width);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const float a = math::activate<kF>(to_float(values.values[i]));
      values.values[i] = from_float<T>(a);
      if (is_counted) {
        sum += math::surrogate<kS>(a, args.surrogate_param);
        count += !(fabsf(a) <= args.tau);
      }
    }
    static_cast<Elements*>(args.a)[p] = values;
  }
  add_to_totals(sum, count, args.surrogate_sum, args.active_count);
}

template <Activation kF, Surrogate kS, int kPack, class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks) act_density_backward_kernel(ActDensityBackwardArgs args) {
  using Elements = Pack<T, kPack>;
  const int64_t packs = args.rows * args.width / kPack, step = threads_of_grid();
  const float grad_sum = args.grad_sum != nullptr ? *args.grad_sum : 0.0f;
  for (int64_t p = thread_in_grid(); p < packs; p += step) {
    Elements values = static_cast<const Elements*>(args.z)[p], grads{};
    if (args.grad_a != nullptr) grads = static_cast<const Elements*>(args.grad_a)[p];
    const bool is_counted = args.grad_sum != nullptr && counted(args.mask, p * kPack, args.width);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const auto f = math::activate_grad<kF>(to_float(values.values[i]));
      float grad = args.grad_a != nullptr ? to_float(grads.values[i]) : 0.0f;
      if (is_counted) grad += grad_sum * math::surrogate_grad<kS>(f.value, args.surrogate_param);
      values.values[i] = from_float<T>(f.grad * grad);
    }
    static_cast<Elements*>(args.grad_z)[p] = values;
  }
}

template <int kPack, class T>
__global__ void __launch_bounds__(kThreads) density_kernel(DensityArgs args) {
  using Elements = Pack<T, kPack>;
  const int64_t packs = args.rows * args.width / kPack, step = threads_of_grid();
  unsigned count = 0;
  for (int64_t p = thread_in_grid(); p < packs; p += step) {
    if (!counted(args.mask, p * kPack, args.width)) continue;
    const Elements values = static_cast<const Elements*>(args.a)[p];
#pragma unroll
    for (int i = 0; i < kPack; ++i) count += !(fabsf(to_float(values.values[i])) <= args.tau);
  }
  add_to_totals(0.0f, count, nullptr, args.active_count);
}

}  // namespace

// ----------------------------------------------------------------------------

void act_density(const ActDensityArgs& args, Stream stream) {
  const int64_t elements = args.rows * args.width;
  set_zero(args.surrogate_sum, sizeof(float), stream);
  set_zero(args.active_count, sizeof(int64_t), stream);
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_pack<T>(fits_packs<T>({args.z, args.a}, {args.width}), [&](auto pack) {
      dispatch(args.activation, [&](auto f) {
        dispatch(args.surrogate, [&](auto s) {
          launch(act_density_kernel<f(), s(), pack(), T>, striding_blocks(elements / pack(), kThreads), kThreads, 0,
                 stream, args);
        });
      });
    });
  });
}

void act_density_backward(const ActDensityBackwardArgs& args, Stream stream) {
  const int64_t elements = args.rows * args.width;
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_pack<T>(fits_packs<T>({args.z, args.grad_a, args.grad_z}, {args.width}), [&](auto pack) {
      dispatch(args.activation, [&](auto f) {
        dispatch(args.surrogate, [&](auto s) {
          launch(act_density_backward_kernel<f(), s(), pack(), T>, striding_blocks(elements / pack(), kThreads),
                 kThreads, 0, stream, args);
        });
      });
    });
  });
}

void density(const DensityArgs& args, Stream stream) {
  const int64_t elements = args.rows * args.width;
  set_zero(args.active_count, sizeof(int64_t), stream);
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_pack<T>(fits_packs<T>({args.a}, {args.width}), [&](auto pack) {
      launch(density_kernel<pack(), T>, striding_blocks(elements / pack(), kThreads), kThreads, 0, stream, args);
    });
  });
}

}  // namespace deftcore::cuda
