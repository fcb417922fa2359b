// a = f(z), sum of s(a) and count of |a| > tau in one read of z and one write of a; backward in one pass:
//   dz = f'(z) * (da + c * m * s'(f(z))),  c = grad_sum[0].
// Bound by memory traffic for ReLU and by the transcendental for GELU and SiLU. Work is cut into pieces of one row so
// that a masked row costs no branch inside the loop; sums are float within a piece and double across pieces.
#include <vector>

#include "isa.h"

namespace deftcore::cpu {
namespace {

constexpr int64_t kPiece = 2048;  // elements: small enough that float lanes stay exact to 1e-7, large enough to stream

struct SumCount {
  double sum = 0;
  int64_t count = 0;
};

// Runs body(acc, row, first, count) over every piece of a [rows, width] array, in parallel. Returns the sum of the
// parts' accumulators, taken in the order of the parts so that repeats are bit-equal.
template <class Body>
SumCount for_pieces(int64_t rows, int64_t width, int64_t bytes, Body&& body) {
  const int64_t per_row = (width + kPiece - 1) / kPiece, pieces = rows * per_row;
  const int parts = parts_for(bytes);
  std::vector<SumCount> sums(static_cast<size_t>(parts));
  for_parts(parts, [&](int part) {
    SumCount acc;
    const Range mine = share(pieces, parts, part);
    for (int64_t p = mine.begin; p < mine.end; ++p) {
      const int64_t row = p / per_row, first = p % per_row * kPiece;
      body(acc, row, first, width - first < kPiece ? width - first : kPiece);
    }
    sums[static_cast<size_t>(part)] = acc;
  });
  SumCount total;
  for (const SumCount& acc : sums) {
    total.sum += acc.sum;
    total.count += acc.count;
  }
  return total;
}

template <Activation kF, Surrogate kS, class T>
void act_density_piece(const ActDensityArgs& args, SumCount& acc, int64_t row, int64_t first, int64_t n) {
  const T* z = static_cast<const T*>(args.z) + row * args.width + first;
  T* a = static_cast<T*>(args.a) + row * args.width + first;
  const bool counted = args.mask == nullptr || args.mask[row] != 0;
  const Vec p(args.surrogate_param), tau(args.tau);
  Vec sum(0.0f);
  int64_t count = 0, i = 0;
  // Surrogate and count see f(z) before it is rounded to T, so that 16-bit inputs agree with a float64 reference.
  const auto observe = [&](Vec value) {
    sum = sum + math::surrogate<kS>(value, p);
    count += __builtin_popcount(active_bits(value, tau));
  };
  const auto put = [](T* to, Vec value) {
    if constexpr (kF == Activation::kRelu) {
      store_exact(to, value);
    } else {
      store(to, value);
    }
  };
  for (; i + kWidth <= n; i += kWidth) {
    const Vec value = math::activate<kF>(load(z + i));
    put(a + i, value);
    if (counted) observe(value);
  }
  if (i < n) {
    const Vec value = math::activate<kF>(load_tail(z + i, n - i));
    T tail[kWidth];
    put(tail, value);
    std::memcpy(a + i, tail, static_cast<size_t>(n - i) * sizeof(T));
    if (counted) observe(value);
  }
  acc.sum += static_cast<double>(reduce_add(sum));
  acc.count += count;
}

template <Activation kF, Surrogate kS, class T>
void act_density_backward_piece(const ActDensityBackwardArgs& args, int64_t row, int64_t first, int64_t n) {
  const int64_t offset = row * args.width + first;
  const T* z = static_cast<const T*>(args.z) + offset;
  const T* grad_a = args.grad_a ? static_cast<const T*>(args.grad_a) + offset : nullptr;
  T* grad_z = static_cast<T*>(args.grad_z) + offset;
  const bool counted = args.grad_sum != nullptr && (args.mask == nullptr || args.mask[row] != 0);
  const Vec c(counted ? *args.grad_sum : 0.0f), p(args.surrogate_param), zero(0.0f);
  const auto step = [&](Vec zi, Vec da) {
    const auto f = math::activate_grad<kF>(zi);
    if (counted) da = fma(c, math::surrogate_grad<kS>(f.value, p), da);
    return f.grad * da;
  };
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(grad_z + i, step(load(z + i), grad_a ? load(grad_a + i) : zero));
  if (i < n) store_tail(grad_z + i, step(load_tail(z + i, n - i), grad_a ? load_tail(grad_a + i, n - i) : zero), n - i);
}

template <class T>
void density_piece(const DensityArgs& args, SumCount& acc, int64_t row, int64_t first, int64_t n) {
  if (args.mask != nullptr && args.mask[row] == 0) return;
  const T* a = static_cast<const T*>(args.a) + row * args.width + first;
  const Vec tau(args.tau);
  int64_t i = 0, count = 0;
  for (; i + kWidth <= n; i += kWidth) count += __builtin_popcount(active_bits(load(a + i), tau));
  if (i < n) count += __builtin_popcount(active_bits(load_tail(a + i, n - i), tau));
  acc.count += count;
}

}  // namespace

// ----------------------------------------------------------------------------

void DEFTCORE_KERNEL(act_density)(const ActDensityArgs& args) {
  SumCount total;
  dispatch_dtype(args.dtype, [&](auto t) {
    dispatch(args.activation, [&](auto f) {
      dispatch(args.surrogate, [&](auto s) {
        total = for_pieces(args.rows, args.width, args.rows * args.width * 2 * static_cast<int64_t>(sizeof(t)),
                           [&](SumCount& acc, int64_t row, int64_t first, int64_t n) {
                             act_density_piece<f(), s(), decltype(t)>(args, acc, row, first, n);
                           });
      });
    });
  });
  *args.surrogate_sum = static_cast<float>(total.sum);
  *args.active_count = total.count;
}

void DEFTCORE_KERNEL(act_density_backward)(const ActDensityBackwardArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) {
    dispatch(args.activation, [&](auto f) {
      dispatch(args.surrogate, [&](auto s) {
        for_pieces(args.rows, args.width, args.rows * args.width * 3 * static_cast<int64_t>(sizeof(t)),
                   [&](SumCount&, int64_t row, int64_t first, int64_t n) {
                     act_density_backward_piece<f(), s(), decltype(t)>(args, row, first, n);
                   });
      });
    });
  });
}

void DEFTCORE_KERNEL(density)(const DensityArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) {
    const SumCount total = for_pieces(args.rows, args.width, args.rows * args.width * static_cast<int64_t>(sizeof(t)),
                                      [&](SumCount& acc, int64_t row, int64_t first, int64_t n) {
                                        density_piece<decltype(t)>(args, acc, row, first, n);
                                      });
    *args.active_count = total.count;
  });
}

}  // namespace deftcore::cpu
