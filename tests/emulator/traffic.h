// Counts what the kernels move through global memory: the CUDA files are compiled with the thread sanitizer's calls,
// whose library this takes the place of, so that every access comes here. Global memory is what `watch` has been told
// of; shared memory and stacks are not.
#pragma once

#include <string>
#include <vector>

#include "emulator.h"

namespace traffic {

inline constexpr int64_t kSector = 32;  // bytes: the least that a GPU's caches and memory move

// Bytes of one launch and direction. The last three are whole sectors.
struct Bytes {
  int64_t asked = 0;   // by threads
  int64_t warp = 0;    // each once for a warp's access, which is what the first cache has to serve
  int64_t block = 0;   // each once for a block: what passes the first cache, where that holds all of a block's
  int64_t launch = 0;  // each once: what passes the second, where that holds all of a launch's
};

struct Launch {
  std::string kernel;
  emulator::Shape shape;
  Bytes read, written;
};

// From now on accesses to this memory are counted.
void watch(const void* data, size_t bytes);

// The launches since the last call; forgets all memory.
std::vector<Launch> take();

}  // namespace traffic
