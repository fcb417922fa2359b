// Stands in for CUDA's header of this name: the part of the language and the runtime that csrc/cuda uses, over the
// emulator. The device is like an H100, but for the number of its multiprocessors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
// An empty instruction before the kernel for each warp of a block: the emulator counts them.
#define __launch_bounds__(threads, ...) __attribute__((patchable_function_entry((threads) / 32, (threads) / 32)))
// With internal linkage and in a section of its own, which shared.ld gathers.
#define __shared__ static
#define DEFTCORE_DYNAMIC_SHARED(T, name) T* name = static_cast<T*>(::emulator::dynamic_shared())

// ---------------------------------------------------------------------------- types

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---------------------------------------------------------------------------- arithmetic

// The files are compiled without contraction: a product and a sum are rounded each.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> 4 * i & 15, byte = bytes >> 8 * (pick & 7) & 0xff;
    out |= (pick & 8 ? (byte & 0x80 ? 0xff : 0) : byte) << 8 * i;
  }
  return out;
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}

// One thread runs at a time.
template <class T>
T atomicAdd(T* to, std::common_type_t<T> x) {
  const T before = *to;
  *to = before + x;
  return before;
}

// ---------------------------------------------------------------------------- meetings

inline void __syncthreads(emulator::Site site = emulator::Site::here()) { emulator::sync_threads(site); }
inline void __syncwarp(unsigned mask = 0xffffffffu, emulator::Site site = emulator::Site::here()) {
  emulator::meet("__syncwarp", mask, 0, site);
}
inline unsigned __ballot_sync(unsigned mask, bool vote, emulator::Site site = emulator::Site::here()) {
  const uint64_t* votes = emulator::meet("__ballot_sync", mask, vote, site);
  unsigned all = 0;
  for (int lane = 0; lane < emulator::kWarp; ++lane) all |= (mask >> lane & votes[lane] & 1) << lane;
  return all;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned x, emulator::Site site = emulator::Site::here()) {
  const uint64_t* values = emulator::meet("__reduce_add_sync", mask, x, site);
  unsigned sum = 0;
  for (int lane = 0; lane < emulator::kWarp; ++lane) sum += mask >> lane & 1 ? static_cast<unsigned>(values[lane]) : 0;
  return sum;
}
namespace emulator {
template <class T>
T value_of(const char* what, unsigned mask, T value, int lane, Site site) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = bits_of(what, mask, bits, lane, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
}  // namespace emulator
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, emulator::Site site = emulator::Site::here()) {
  return emulator::value_of("__shfl_sync", mask, value, lane, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other, emulator::Site site = emulator::Site::here()) {
  return emulator::value_of("__shfl_xor_sync", mask, value, emulator::lane() ^ other, site);
}

// ---------------------------------------------------------------------------- runtime

using cudaStream_t = emulator::Stream*;
enum cudaError_t { cudaSuccess, cudaErrorLaunchFailure };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

namespace emulator {
inline const char* last_error = "no error";
template <class... Params>
auto address(void (*kernel)(Params...)) {
  return reinterpret_cast<void (*)()>(kernel);
}
inline cudaError_t status_of(const char* error) {
  last_error = error != nullptr ? error : "no error";
  return error == nullptr ? cudaSuccess : cudaErrorLaunchFailure;
}
inline cudaError_t submit(cudaStream_t stream, Stream::Work work) {
  if (stream == nullptr) return status_of(work());
  return stream->add(std::move(work)), cudaSuccess;
}
}  // namespace emulator

inline const char* cudaGetErrorString(cudaError_t) { return emulator::last_error; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = emulator::kMultiprocessors, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* data, int value, size_t bytes, cudaStream_t stream) {
  return emulator::submit(stream, [=] { return std::memset(data, value, bytes), nullptr; });
}

template <class... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute, int bytes) {
  const bool fits = static_cast<size_t>(bytes) <= emulator::kMostShared;
  if (fits) emulator::limits_of(emulator::address(kernel)).shared_bytes = static_cast<size_t>(bytes);
  return emulator::status_of(fits ? nullptr : "a block has at most 163 KB of shared memory");
}

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  const emulator::Shape shape{{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, config->dynamicSmemBytes};
  if (const char* error = emulator::beyond_limits(shape, emulator::address(kernel))) return emulator::status_of(error);
  auto call = [kernel, values = std::tuple<Params...>(static_cast<Params>(args)...)] { std::apply(kernel, values); };
  return emulator::submit(config->stream, [shape, kernel, call]() mutable {
    if (emulator::on_launch != nullptr) emulator::on_launch(shape, emulator::address(kernel));
    return emulator::run(shape, [](void* data) { (*static_cast<decltype(call)*>(data))(); }, &call);
  });
}
