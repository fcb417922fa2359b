// The emulator itself: what it computes, and that each fault it is there for is caught in a small broken kernel. Under
// the address sanitizer (-DDEFTCORE_SANITIZE=ON) the accesses out of bounds as well.
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "elements.cuh"
#include "launch.cuh"

namespace deftcore::cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;

// ---------------------------------------------------------------------------- kernels that are right

// Each block's sum of its threads' numbers, by way of warps and shared memory.
__global__ void sum_kernel(float* sums, unsigned* votes) {
  __shared__ float warps[kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, count = blockDim.x / kWarp;
  const float sum = warp_sum(static_cast<float>(threadIdx.x));
  const unsigned odd = __ballot_sync(kAll, lane % 2 != 0), many = __reduce_add_sync(kAll, 1u);
  if (lane == 0) warps[warp] = sum;
  __syncthreads();
  if (warp != 0) return;
  const float total = warp_sum(lane < count ? warps[lane] : 0.0f);
  if (lane != 0) return;
  sums[blockIdx.x] = total;
  votes[blockIdx.x] = odd + many;
}

// Halves of a warp that exchange apart, and one lane that does nothing.
__global__ void halves_kernel(int* out) {
  const int lane = threadIdx.x;
  if (lane < 16) {
    out[lane] = __shfl_xor_sync(0x0000ffffu, lane, 1);
  } else if (lane < 31) {
    out[lane] = static_cast<int>(__reduce_add_sync(0x7fff0000u, 1u));
  }
}

// Each lane's number in the one before it, and where its lowest bit is.
__global__ void turn_kernel(int* out) {
  const int lane = threadIdx.x;
  out[lane] = 100 * __ffs(lane) + __shfl_sync(kAll, lane, (lane + 1) % kWarp);
}

__global__ void fill_dynamic_kernel(int* out) {
  DEFTCORE_DYNAMIC_SHARED(int, numbers);
  numbers[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = numbers[blockDim.x - 1 - threadIdx.x];
}

// ---------------------------------------------------------------------------- kernels that are broken

__global__ void unwritten_kernel(float* out) {
  __shared__ float numbers[64];
  if (threadIdx.x != 5) numbers[threadIdx.x] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = numbers[threadIdx.x];
}

__global__ void unwritten_dynamic_kernel(float* out) {
  DEFTCORE_DYNAMIC_SHARED(float, numbers);
  out[threadIdx.x] = numbers[threadIdx.x];
}

__global__ void absent_kernel() {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void two_barriers_kernel() {
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void absent_lane_kernel(int* out) {
  if (threadIdx.x == 3) return;
  out[threadIdx.x] = __shfl_xor_sync(kAll, 1, 1);
}

__global__ void two_masks_kernel() { __syncwarp(threadIdx.x < 16 ? 0x0000ffffu : kAll); }

__global__ void not_in_mask_kernel() { __syncwarp(0x0000ffffu); }

__global__ void beyond_mask_kernel(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1, 16);
}

__global__ void partial_warp_kernel() { __syncwarp(); }

// Each lane reads what its neighbour wrote; without a meeting in between unless kMeets.
template <bool kMeets>
__global__ void neighbour_kernel(float* out) {
  __shared__ float numbers[kWarp];
  numbers[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (kMeets) __syncwarp();
  out[threadIdx.x] = threadIdx.x == 0 ? 0.0f : numbers[threadIdx.x - 1];
}

// The same between the warps of a block.
template <bool kMeets>
__global__ void other_warp_kernel(float* out) {
  __shared__ float numbers[3 * kWarp];
  numbers[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (kMeets) __syncthreads();
  out[threadIdx.x] = threadIdx.x < kWarp ? 0.0f : numbers[threadIdx.x - kWarp];
}

// Each block counts on the one before it.
__global__ void block_after_block_kernel(float* out) { out[blockIdx.x + 1] = out[blockIdx.x] + 1.0f; }

// A second round of writes that need not wait for the first one's readers.
template <bool kMeets>
__global__ void two_rounds_kernel(float* out) {
  __shared__ float numbers[64];
  float sum = 0.0f;
  for (int round = 0; round < 2; ++round) {
    if (kMeets && round > 0) __syncthreads();
    numbers[threadIdx.x] = static_cast<float>(100 * round + static_cast<int>(threadIdx.x));
    __syncthreads();
    sum += numbers[63 - threadIdx.x];
  }
  out[threadIdx.x] = sum;
}

__global__ void read_pack_kernel(const float* x, float* out) {
  *out = reinterpret_cast<const Pack<float>*>(x)->values[0];
}

__global__ void step_beyond_kernel(float* x, int count) {
  x[threadIdx.x + (threadIdx.x == 31 ? count - 31 : 0)] = 1.0f;
}

__global__ void step_beyond_shared_kernel(int count) {
  __shared__ float numbers[kWarp];
  numbers[threadIdx.x + (threadIdx.x == 31 ? count - 31 : 0)] = 1.0f;
  __syncwarp();
  if (numbers[threadIdx.x] < 0.0f) __syncthreads();
}

__global__ void step_beyond_dynamic_kernel(int count) {
  DEFTCORE_DYNAMIC_SHARED(float, numbers);
  numbers[threadIdx.x + (threadIdx.x == 31 ? count - 31 : 0)] = 1.0f;
}

__global__ void nothing_kernel() {}

__global__ void __launch_bounds__(2 * kWarp) two_warps_kernel() {}

__global__ void store_kernel(int* out, int value) { *out = value; }

// ----------------------------------------------------------------------------

// What a launch throws; empty where it does not.
template <class... Args>
std::string error_of(Args&&... args) {
  try {
    launch(std::forward<Args>(args)...);
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

bool has(const std::string& text, const char* part) {
  if (text.find(part) != std::string::npos) return true;
  std::printf("not in it: %s\nthe error: %s\n", part, text.c_str());
  return false;
}

void with_seed(const char* seed) { setenv("DEFTCORE_EMULATE_SEED", seed, 1); }

void test_values() {
  for (const char* seed : {"0", "1", "2"}) {
    with_seed(seed);
    for (const unsigned threads : {32u, 96u, 1024u}) {
      std::vector<float> sums(5);
      std::vector<unsigned> votes(5);
      launch(sum_kernel, 5, threads, 0, nullptr, sums.data(), votes.data());
      for (size_t i = 0; i < 5; ++i) {
        CHECK(sums[i] == static_cast<float>(threads * (threads - 1) / 2));
        CHECK(votes[i] == 0xaaaaaaaau + 32);
      }
    }
    std::vector<int> out(32, -7);
    launch(halves_kernel, 1, 32, 0, nullptr, out.data());
    for (int i = 0; i < 32; ++i) CHECK(out[static_cast<size_t>(i)] == (i < 16 ? i ^ 1 : i < 31 ? 15 : -7));
    launch(turn_kernel, 1, 32, 0, nullptr, out.data());
    CHECK(out[0] == 1 && out[6] == 207 && out[8] == 409 && out[31] == 100);
    launch(fill_dynamic_kernel, 1, 32, 32 * sizeof(int), nullptr, out.data());
    for (int i = 0; i < 32; ++i) CHECK(out[static_cast<size_t>(i)] == 31 - i);
  }
  with_seed("0");
}

void test_arithmetic() {
  CHECK(__half2float(__float2half(1.0f + 0x1p-11f)) == 1.0f);  // halfway, to even
  CHECK(__half2float(__float2half(1.0f + 0x3p-11f)) == 1.0f + 0x1p-9f);
  CHECK(__half2float(__float2half(0x1p-25f)) == 0.0f && __half2float(__float2half(0x3p-26f)) == 0x1p-24f);
  CHECK(std::isinf(__half2float(__float2half(65520.0f))) && __half2float(__float2half(65519.0f)) == 65504.0f);
  CHECK(__bfloat162float(__float2bfloat16(1.0f + 0x1p-8f)) == 1.0f);
  CHECK(__bfloat162float(__float2bfloat16(1.0f + 0x3p-8f)) == 1.0f + 0x1p-6f);
  CHECK(std::isinf(__bfloat162float(__float2bfloat16(3.4e38f))) && std::isnan(__bfloat162float(__float2bfloat16(NAN))));
  CHECK(__byte_perm(0x44332211u, 0x88776655u, 0x0734u) == 0x11884455u);
  CHECK(__byte_perm(0x00008000u, 0, 0x9999u) == 0xffffffffu);
}

void test_unwritten_shared_memory() {
  std::vector<float> out(64);
  for (int run = 0; run < 2; ++run) {  // what an earlier block left is gone
    launch(unwritten_kernel, 2, 64, 0, nullptr, out.data());
    for (size_t i = 0; i < 64; ++i) CHECK(std::isnan(out[i]) == (i == 5));
  }
  launch(unwritten_dynamic_kernel, 1, 64, 64 * sizeof(float), nullptr, out.data());
  CHECK(std::isnan(out[0]) && std::isnan(out[63]));
}

void test_meetings() {
  std::vector<int> out(32);
  for (const char* seed : {"0", "3"}) {
    with_seed(seed);
    std::string error = error_of(absent_kernel, 1, 64, 0, nullptr);
    CHECK(has(error, "__syncthreads in absent_kernel") && has(error, "has left the kernel"));
    CHECK(has(error, "test_emulator.cpp:"));
    CHECK(has(error_of(two_barriers_kernel, 1, 64, 0, nullptr), "__syncthreads in two_barriers_kernel"));
    error = error_of(absent_lane_kernel, 1, 32, 0, nullptr, out.data());
    CHECK(has(error, "__shfl_xor_sync in absent_lane_kernel") &&
          has(error, "thread (3,0,0) of block (0,0,0), which has left"));
    CHECK(has(error_of(two_masks_kernel, 1, 32, 0, nullptr), "__syncwarp in two_masks_kernel"));
    CHECK(has(error_of(not_in_mask_kernel, 1, 32, 0, nullptr), "is not in its own mask"));
    CHECK(has(error_of(beyond_mask_kernel, 1, 32, 0, nullptr, out.data()), "which the mask does not name"));
    CHECK(has(error_of(partial_warp_kernel, 1, 40, 0, nullptr), "a lane that the block does not have"));
  }
  with_seed("0");
  test_values();  // nothing is left of a launch that failed
}

// What a kernel of one block, or of as many blocks as there are numbers, gives under a seed.
std::vector<float> with_order(const char* seed, void (*kernel)(float*), unsigned blocks, unsigned threads) {
  std::vector<float> out(blocks * threads + 1);
  with_seed(seed);
  launch(kernel, blocks, threads, 0, nullptr, out.data());
  with_seed("0");
  return out;
}

void test_order() {
  const auto check = [](void (*right)(float*), void (*broken)(float*), unsigned blocks, unsigned threads) {
    const std::vector<float> first = with_order("0", right, blocks, threads);
    for (const float value : first) CHECK(!std::isnan(value));
    int differ = 0;
    for (const char* seed : {"1", "2", "3"}) {
      CHECK(with_order(seed, right, blocks, threads) == first);
      differ += with_order(seed, broken, blocks, threads) != first;
    }
    CHECK(differ == 3);
  };
  check(neighbour_kernel<true>, neighbour_kernel<false>, 1, 32);
  check(other_warp_kernel<true>, other_warp_kernel<false>, 1, 96);
  check(two_rounds_kernel<true>, two_rounds_kernel<false>, 1, 64);
  const std::vector<float> in_order = with_order("0", block_after_block_kernel, 9, 1);
  for (const char* seed : {"1", "2", "3"}) CHECK(with_order(seed, block_after_block_kernel, 9, 1) != in_order);
}

void test_streams() {
  emulator::Stream stream;
  int data[2] = {7, 7}, value = 1;
  launch(store_kernel, 1, 1, 0, &stream, &data[0], value);
  set_zero(data + 1, sizeof(int), &stream);
  value = 2;  // what was enqueued has its own
  CHECK(data[0] == 7 && data[1] == 7);
  for (int run = 0; run < 2; ++run) {
    CHECK(stream.replay() == nullptr);
    CHECK(data[0] == 1 && data[1] == 0);
    data[0] = data[1] = 7;
  }
  CHECK(stream.synchronise() == nullptr && data[0] == 1 && data[1] == 0);
  data[0] = 7;
  CHECK(stream.synchronise() == nullptr && data[0] == 7);
  CHECK(has(error_of(nothing_kernel, 1, 1025, 0, &stream), "1 to 1024 threads"));  // said at once
  launch(absent_kernel, 1, 64, 0, &stream);
  CHECK(has(stream.synchronise(), "__syncthreads in absent_kernel"));
}

void test_limits() {
  const auto refused = [](dim3 grid, dim3 block, size_t shared, const char* why) {
    return has(error_of(nothing_kernel, grid, block, shared, nullptr), why);
  };
  CHECK(refused(1, 1025, 0, "1 to 1024 threads"));
  CHECK(refused(1, dim3(1, 1, 65), 0, "64 along z"));
  CHECK(refused(1, 0, 0, "1 to 1024 threads"));
  CHECK(refused(0, 32, 0, "at least one block"));
  CHECK(refused(dim3(1, 65536), 32, 0, "65535"));
  CHECK(refused(dim3(1, 1, 65536), 32, 0, "65535"));
  CHECK(refused(1, 32, (48 << 10) + 1, "48 KB"));
  CHECK(error_of(two_warps_kernel, 1, 64, 0, nullptr).empty());
  CHECK(has(error_of(two_warps_kernel, 1, 65, 0, nullptr), "__launch_bounds__"));
  CHECK(error_of(nothing_kernel, 1, 1024, 0, nullptr).empty());
  CHECK(error_of(nothing_kernel, dim3(1, 65535), 1, 48 << 10, nullptr).empty());
  CHECK(cudaFuncSetAttribute(nothing_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (163 << 10) + 1) !=
        cudaSuccess);
  check(cudaFuncSetAttribute(nothing_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 163 << 10));
  CHECK(error_of(nothing_kernel, 1, 32, 163 << 10, nullptr).empty());
}

void test_misaligned() {
  alignas(16) float x[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  float out = 0.0f;
  launch(read_pack_kernel, 1, 1, 0, nullptr, x + 4, &out);
  CHECK(out == 5.0f);
  const std::string error = error_of(read_pack_kernel, 1, 1, 0, nullptr, x + 1, &out);
  CHECK(has(error, "misaligned") && has(error, "Pack") && has(error, "test_emulator.cpp:"));
}

// Whether the sanitizer ends a process that does this.
template <class Act>
bool is_caught(Act&& act) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    std::fclose(stderr);
    close(2);
    act();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return !WIFEXITED(status) || WEXITSTATUS(status) != 0;
}

void test_out_of_bounds() {
#if defined(__SANITIZE_ADDRESS__)
  for (const int beyond : {0, 1}) {
    const int last = 31 + beyond;
    const bool expected = beyond == 1;
    const auto step = [&] {
      const auto x = std::make_unique<float[]>(kWarp);
      launch(step_beyond_kernel, 1, 32, 0, nullptr, x.get(), last);
    };
    CHECK(is_caught(step) == expected);
    CHECK(is_caught([&] { launch(step_beyond_shared_kernel, 1, 32, 0, nullptr, last); }) == expected);
    CHECK(is_caught([&] { launch(step_beyond_dynamic_kernel, 1, 32, 32 * sizeof(float), nullptr, last); }) == expected);
  }
#endif
}

}  // namespace
}  // namespace deftcore::cuda

int main() {
  using namespace deftcore::cuda;
  return run_tests([] {
    test_values();
    test_arithmetic();
    test_unwritten_shared_memory();
    test_meetings();
    test_order();
    test_streams();
    test_limits();
    test_misaligned();
    test_out_of_bounds();
  });
}
