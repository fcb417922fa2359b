// What every CUDA file uses: error checks with file and line, run-time dtype to compile-time type, 16-byte accesses.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "deftcore/ops.h"

#define DEFTCORE_CUDA_CHECK(call) ::deftcore::cuda::check((call), __FILE__, __LINE__)

namespace deftcore::cuda {

inline void check(cudaError_t status, const char* file, int line) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + cudaGetErrorString(status));
  }
}

inline cudaStream_t stream_of(Stream stream) { return static_cast<cudaStream_t>(stream); }

template <class Fn>
void dispatch_dtype(DType dtype, Fn&& fn) {
  switch (dtype) {
    case DType::kFloat32: return fn(float{});
    case DType::kBFloat16: return fn(__nv_bfloat16{});
    case DType::kFloat16: return fn(__half{});
  }
}

// Multiprocessors of the current device; asked for once per device.
inline int multiprocessors() {
  static int counts[64] = {};
  int device = 0;
  DEFTCORE_CUDA_CHECK(cudaGetDevice(&device));
  if (counts[device & 63] == 0) {
    DEFTCORE_CUDA_CHECK(cudaDeviceGetAttribute(&counts[device & 63], cudaDevAttrMultiProcessorCount, device));
  }
  return counts[device & 63];
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

// Sixteen bytes of T, loaded and stored as one access.
template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

__device__ inline float warp_sum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

}  // namespace deftcore::cuda
