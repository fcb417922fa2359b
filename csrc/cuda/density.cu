// a = f(z), sum of s(a), count of |a| > tau in one pass; backward dz = f'(z) (da + c m s'(f(z))) in another.
// Bound by device memory: each thread moves 16 bytes at a time where the width allows, and sums in registers; a block
// adds its sum and count with one atomic each.
#include "deftcore/density.h"
#include "deftcore/math.h"
#include "launch.cuh"

namespace deftcore::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMinBlocks = 2;  // named, or ptxas aims at more blocks, fewer registers, and spills
constexpr int kBlocksPerMultiprocessor = 8;

__device__ bool counted(const uint8_t* mask, int64_t element, int64_t width) {
  return mask == nullptr || mask[element / width] != 0;
}

// Adds a thread's sum and count to the totals; every thread of the block calls it.
__device__ void add_to_totals(float sum, unsigned count, float* total_sum, int64_t* total_count) {
  __shared__ float sums[kThreads / 32];
  __shared__ unsigned counts[kThreads / 32];
  sum = warp_sum(sum);
  count = __reduce_add_sync(0xffffffffu, count);
  if (threadIdx.x % 32 == 0) {
    sums[threadIdx.x / 32] = sum;
    counts[threadIdx.x / 32] = count;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned long long all = 0;
    float total = 0.0f;
    for (int w = 0; w < kThreads / 32; ++w) {
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
  struct alignas(sizeof(T) * kPack) Group {
    T values[kPack];
  };
  const int64_t groups = args.rows * args.width / kPack, step = static_cast<int64_t>(gridDim.x) * kThreads;
  float sum = 0.0f;
  unsigned count = 0;
  for (int64_t g = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; g < groups; g += step) {
    Group values = static_cast<const Group*>(args.z)[g];
    const bool is_counted = counted(args.mask, g * kPack, args.width);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const float a = math::activate<kF>(to_float(values.values[i]));
      values.values[i] = from_float<T>(a);
      if (is_counted) {
        sum += math::surrogate<kS>(a, args.surrogate_param);
        count += !(fabsf(a) <= args.tau);
      }
    }
    static_cast<Group*>(args.a)[g] = values;
  }
  add_to_totals(sum, count, args.surrogate_sum, args.active_count);
}

template <Activation kF, Surrogate kS, int kPack, class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks) act_density_backward_kernel(ActDensityBackwardArgs args) {
  struct alignas(sizeof(T) * kPack) Group {
    T values[kPack];
  };
  const int64_t groups = args.rows * args.width / kPack, step = static_cast<int64_t>(gridDim.x) * kThreads;
  const float grad_sum = args.grad_sum != nullptr ? *args.grad_sum : 0.0f;
  for (int64_t g = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; g < groups; g += step) {
    Group values = static_cast<const Group*>(args.z)[g], grads{};
    if (args.grad_a != nullptr) grads = static_cast<const Group*>(args.grad_a)[g];
    const bool is_counted = args.grad_sum != nullptr && counted(args.mask, g * kPack, args.width);
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const auto f = math::activate_grad<kF>(to_float(values.values[i]));
      float grad = args.grad_a != nullptr ? to_float(grads.values[i]) : 0.0f;
      if (is_counted) grad += grad_sum * math::surrogate_grad<kS>(f.value, args.surrogate_param);
      values.values[i] = from_float<T>(f.grad * grad);
    }
    static_cast<Group*>(args.grad_z)[g] = values;
  }
}

template <int kPack, class T>
__global__ void __launch_bounds__(kThreads) density_kernel(DensityArgs args) {
  struct alignas(sizeof(T) * kPack) Group {
    T values[kPack];
  };
  const int64_t groups = args.rows * args.width / kPack, step = static_cast<int64_t>(gridDim.x) * kThreads;
  unsigned count = 0;
  for (int64_t g = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; g < groups; g += step) {
    if (!counted(args.mask, g * kPack, args.width)) continue;
    const Group values = static_cast<const Group*>(args.a)[g];
#pragma unroll
    for (int i = 0; i < kPack; ++i) count += !(fabsf(to_float(values.values[i])) <= args.tau);
  }
  add_to_totals(0.0f, count, nullptr, args.active_count);
}

// ----------------------------------------------------------------------------

int blocks_for(int64_t groups) {
  const int64_t wanted = (groups + kThreads - 1) / kThreads, most = multiprocessors() * kBlocksPerMultiprocessor;
  return static_cast<int>(wanted < most ? (wanted > 0 ? wanted : 1) : most);
}

// Calls fn(integral_constant n): sixteen bytes of T where every row and address allows it, else one element.
template <class T, class Fn>
void dispatch_pack(int64_t width, bool aligned, Fn&& fn) {
  constexpr int kFull = Pack<T>::kSize;
  if (aligned && width % kFull == 0) return fn(std::integral_constant<int, kFull>{});
  return fn(std::integral_constant<int, 1>{});
}

}  // namespace

void act_density(const ActDensityArgs& args, Stream stream) {
  DEFTCORE_CUDA_CHECK(cudaMemsetAsync(args.surrogate_sum, 0, sizeof(float), stream_of(stream)));
  DEFTCORE_CUDA_CHECK(cudaMemsetAsync(args.active_count, 0, sizeof(int64_t), stream_of(stream)));
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_pack<T>(args.width, aligned16(args.z) && aligned16(args.a), [&](auto pack) {
      dispatch(args.activation, [&](auto f) {
        dispatch(args.surrogate, [&](auto s) {
          act_density_kernel<f(), s(), pack(), T>
              <<<blocks_for(args.rows * args.width / pack()), kThreads, 0, stream_of(stream)>>>(args);
        });
      });
    });
  });
  DEFTCORE_CUDA_CHECK(cudaGetLastError());
}

void act_density_backward(const ActDensityBackwardArgs& args, Stream stream) {
  const bool aligned = aligned16(args.z) && aligned16(args.grad_a) && aligned16(args.grad_z);
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_pack<T>(args.width, aligned, [&](auto pack) {
      dispatch(args.activation, [&](auto f) {
        dispatch(args.surrogate, [&](auto s) {
          act_density_backward_kernel<f(), s(), pack(), T>
              <<<blocks_for(args.rows * args.width / pack()), kThreads, 0, stream_of(stream)>>>(args);
        });
      });
    });
  });
  DEFTCORE_CUDA_CHECK(cudaGetLastError());
}

void density(const DensityArgs& args, Stream stream) {
  DEFTCORE_CUDA_CHECK(cudaMemsetAsync(args.active_count, 0, sizeof(int64_t), stream_of(stream)));
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_pack<T>(args.width, aligned16(args.a), [&](auto pack) {
      density_kernel<pack(), T><<<blocks_for(args.rows * args.width / pack()), kThreads, 0, stream_of(stream)>>>(args);
    });
  });
  DEFTCORE_CUDA_CHECK(cudaGetLastError());
}

}  // namespace deftcore::cuda
