// Elements of any dtype: run-time dtype to compile-time type, conversions, packs that move as one access, a thread's
// place in a grid, sums over a warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <initializer_list>
#include <type_traits>

#include "deftcore/common.h"

namespace deftcore::cuda {

inline constexpr int kWarp = 32;
inline constexpr int kThreads = 256;  // of a block, unless a kernel has its own number
inline constexpr int kWarps = kThreads / kWarp;
inline constexpr int kMinBlocks =
    2;  // a multiprocessor; named, or ptxas aims at more blocks, fewer registers, and spills

template <class Fn>
void dispatch_dtype(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kFloat32: return fn(float{});
    case DType::kBFloat16: return fn(__nv_bfloat16{});
    case DType::kFloat16: return fn(__half{});
  }
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
template <class T>
__device__ T from_float(float x) {
  if constexpr (std::is_same_v<T, float>) return x;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16(x);
  if constexpr (std::is_same_v<T, __half>) return __float2half(x);
}

// ---------------------------------------------------------------------------- packs

// kCount elements, sixteen bytes of them unless said otherwise, loaded and stored as one access.
template <class T, int kCount = 16 / static_cast<int>(sizeof(T))>
struct alignas(sizeof(T) * kCount) Pack {
  static constexpr int kSize = kCount;
  T values[kCount];
};

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether the rows that lie this far apart at these addresses can be read in packs of sixteen bytes.
template <class T>
bool fits_packs(std::initializer_list<const void*> addresses, std::initializer_list<int64_t> strides) {
  for (const void* address : addresses) {
    if (!aligned16(address)) return false;
  }
  for (const int64_t stride : strides) {
    if (stride % Pack<T>::kSize != 0) return false;
  }
  return true;
}

// Calls fn with the elements of an access as a compile-time value: sixteen bytes of T, or one element.
template <class T, class Fn>
void dispatch_pack(bool packs, Fn&& fn) {
  if (packs) return fn(std::integral_constant<int, Pack<T>::kSize>{});
  fn(std::integral_constant<int, 1>{});
}

// ---------------------------------------------------------------------------- threads

// A thread's number in a grid of blocks of kThreads, and how many threads there are: a striding kernel's first item and
// the way to its next.
__device__ inline int64_t thread_in_grid() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }
__device__ inline int64_t threads_of_grid() { return static_cast<int64_t>(gridDim.x) * kThreads; }

template <class V>
__device__ V warp_sum(V x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

}  // namespace deftcore::cuda
