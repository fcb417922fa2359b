// What every CUDA file uses on the host: checked calls and launches, grids.
//
// Kernels run on the current device, which the caller makes the tensors' own, once for a whole op (`_on_its_device` in
// deftcore/ops/_library.py): by the time of a launch a workspace has been sized by the device's multiprocessors and
// library products have run, and neither a default stream nor an argument struct says which device it belongs to.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "deftcore/checks.h"
#include "deftcore/ops.h"

namespace deftcore::cuda {

inline void check(cudaError_t status, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  if (status != cudaSuccess) {
    throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + cudaGetErrorString(status));
  }
}

// A stream and the line that named it: a call that takes a StreamHere is given a Stream, and its errors name the
// caller.
struct StreamHere {
  cudaStream_t stream;
  const char* file;
  int line;
  StreamHere(Stream stream, const char* file = __builtin_FILE(), int line = __builtin_LINE())
      : stream(static_cast<cudaStream_t>(stream)), file(file), line(line) {}
};

// Dynamic shared memory inside a kernel. Its own name, since this one form is not C++ to a compiler that is not CUDA's.
#if defined(__CUDACC__)
#define DEFTCORE_DYNAMIC_SHARED(T, name) extern __shared__ T name[]
#endif

// Most shared memory of a block, its own variables and what the launch adds, for which a kernel need not opt in.
inline constexpr size_t kSharedBytes = 48 << 10;

// Every kernel starts here. `shared` is the dynamic shared memory in bytes.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared, StreamHere here, const Args&... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = here.stream;
  check(cudaLaunchKernelEx(&config, kernel, args...), here.file, here.line);
}

inline void set_zero(void* data, size_t bytes, StreamHere here) {
  check(cudaMemsetAsync(data, 0, bytes, here.stream), here.file, here.line);
}

// ---------------------------------------------------------------------------- grids

// Multiprocessors of the current device; asked for once per device.
inline int multiprocessors() {
  static int counts[64] = {};
  int device = 0;
  check(cudaGetDevice(&device));
  if (counts[device & 63] == 0) {
    check(cudaDeviceGetAttribute(&counts[device & 63], cudaDevAttrMultiProcessorCount, device));
  }
  return counts[device & 63];
}

template <class Per>
__host__ __device__ constexpr int64_t ceil_div(int64_t n, Per per) {
  return (n + per - 1) / per;
}

inline unsigned blocks_for(int64_t items, int64_t per_block) {
  return static_cast<unsigned>(ceil_div(items, per_block));
}

// The same for kernels that stride over their items: at least one block, at most eight a multiprocessor, whose 2048
// threads on sm_80 and sm_90 are then taken.
inline unsigned striding_blocks(int64_t items, int64_t per_block) {
  constexpr int64_t kMost = 8;
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(items, per_block), 1, kMost * multiprocessors()));
}

inline constexpr int64_t kArrayAlignment = 256;  // bytes, of the arrays in a workspace

}  // namespace deftcore::cuda
