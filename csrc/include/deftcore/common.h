// Types that every op family shares. Standard library only: this header must compile without Python, PyTorch or CUDA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>

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

// Inside a struct of arguments: its members once more, in words and as references in the same order, from which the
// binding makes a constructor that takes each by name. record.h does not compile where one is missing.
#define DEFTCORE_FIELDS(...)                           \
  static constexpr const char* kFields = #__VA_ARGS__; \
  auto fields() { return std::tie(__VA_ARGS__); }

inline size_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Run-time value to compile-time constant: fn is called with an integral_constant.
template <class Fn>
void dispatch(Activation activation, Fn&& fn) {
  using A = Activation;
  switch (activation) {
    case A::kRelu: return fn(std::integral_constant<A, A::kRelu>{});
    case A::kRelu2: return fn(std::integral_constant<A, A::kRelu2>{});
    case A::kGeluErf: return fn(std::integral_constant<A, A::kGeluErf>{});
    case A::kGeluTanh: return fn(std::integral_constant<A, A::kGeluTanh>{});
    case A::kSilu: return fn(std::integral_constant<A, A::kSilu>{});
  }
}

template <class Fn>
void dispatch(Surrogate surrogate, Fn&& fn) {
  using S = Surrogate;
  switch (surrogate) {
    case S::kL0: return fn(std::integral_constant<S, S::kL0>{});
    case S::kTanh: return fn(std::integral_constant<S, S::kTanh>{});
    case S::kL1: return fn(std::integral_constant<S, S::kL1>{});
  }
}

inline void require(bool ok, const char* op, const char* what) {
  if (!ok) throw std::invalid_argument(std::string(op) + ": " + what);
}

}  // namespace deftcore
