// A GPU's machine for tests, on one CPU thread: blocks run one after another; a block's threads are fibers that change
// only where they meet, at a barrier or a warp's collective, so that a kernel without either is a plain loop.
//
// What hardware hides is an error here, thrown by the launch: a meeting that not every named thread reaches, a launch
// beyond the limits, a misaligned access. Shared memory starts as 0xff bytes, NaN in every float format and -1 in
// integers, so that what is read before it was written spoils the result. Out-of-bounds accesses are the address
// sanitizer's. DEFTCORE_EMULATE_SEED draws the order of blocks and threads: whatever it is, results must agree.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace emulator {

inline constexpr int kWarp = 32;
// Few, so that small sizes too have several rows a warp and several turns of a striding loop; odd, so that shares of
// the work are uneven.
inline constexpr int kMultiprocessors = 3;
// Bytes of a block that has opted in, on the smaller of the GPUs that the kernels are built for.
inline constexpr size_t kMostShared = 163 << 10;

// Where a kernel's code stands.
struct Site {
  const char *file, *function;
  int line;
  static Site here(const char* file = __builtin_FILE(), const char* function = __builtin_FUNCTION(),
                   int line = __builtin_LINE()) {
    return {file, function, line};
  }
};

struct Uint3 {
  unsigned x, y, z;
};

struct Shape {
  Uint3 grid, block;
  size_t shared;  // dynamic, in bytes
};

// Of a kernel's launches.
struct Limits {
  unsigned threads;                // of a block
  size_t shared_bytes = 48 << 10;  // dynamic
};
Limits& limits_of(void (*kernel)());

// Why there can be no such launch of the kernel, or null.
const char* beyond_limits(const Shape& shape, void (*kernel)());

// Told of every launch that runs, where it is set.
extern void (*on_launch)(const Shape& shape, void (*kernel)());

// Runs body(data), a call of a kernel, as every thread of every block. Returns what went wrong, or null; the text lives
// until the next launch.
const char* run(const Shape& shape, void (*body)(void*), void* data);

// Work that waits: a queue until it is synchronised; or, where it is run and kept, a captured graph. The null stream's
// is done at once.
class Stream {
 public:
  using Work = std::function<const char*()>;  // returns what went wrong, or null

  void add(Work work) { work_.push_back(std::move(work)); }
  const char* replay() const {
    for (const Work& work : work_) {
      if (const char* error = work()) return error;
    }
    return nullptr;
  }
  const char* synchronise() {
    const char* error = replay();
    work_.clear();
    return error;
  }

 private:
  std::vector<Work> work_;
};

// Of the running thread.
int lane();
void* dynamic_shared();

// Waits for all threads of the block.
void sync_threads(Site site);

// Waits for the lanes in `mask`; returns the bits that each brought, valid until this thread's next meeting.
const uint64_t* meet(const char* what, unsigned mask, uint64_t bits, Site site);

// The bits that lane `source` brought, which must be in the mask.
uint64_t bits_of(const char* what, unsigned mask, uint64_t bits, int source, Site site);

}  // namespace emulator

extern emulator::Uint3 threadIdx, blockIdx, blockDim, gridDim;
