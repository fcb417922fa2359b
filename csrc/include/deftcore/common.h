// Types that every op family shares. Standard library only: this header must compile without Python, PyTorch or CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace deftcore {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };
enum class Activation : int { kRelu = 0, kRelu2 = 1, kGeluErf = 2, kGeluTanh = 3, kSilu = 4 };
enum class Surrogate : int { kL0 = 0, kTanh = 1, kL1 = 2 };

// A cudaStream_t on the GPU, ignored on the CPU.
using Stream = void*;

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline size_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

inline void require(bool ok, const char* op, const char* what) {
  if (!ok) throw std::invalid_argument(std::string(op) + ": " + what);
}

}  // namespace deftcore
