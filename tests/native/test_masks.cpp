// mask_units and its backward against double-precision sums, on exactly sized buffers.
#include "check.h"
#include "deftcore/math.h"
#include "deftcore/ops.h"

using namespace deftcore;

namespace {

// f(x) and its slope; -1 is the identity.
math::ValueGrad<double> value_of(int f, double x) {
  const double smooth = x / (1 + std::exp(-x)), s = 1 / (1 + std::exp(-x));
  if (f < 0) return {x, 1};
  if (f == static_cast<int>(Activation::kRelu)) return {x > 0 ? x : 0, x > 0 ? 1.0 : 0.0};
  return {smooth, s * (1 + x * (1 - s))};
}

// `skip` floats into their buffers, which decides on the alignment.
void test_kernels(int64_t rows, int64_t units, int64_t width, int64_t skip) {
  const int64_t columns = units * width;
  const auto size = static_cast<size_t>(rows * columns + skip);
  const std::vector<float> xs = random_floats(size, 1), grads = random_floats(size, 2),
                           mask = random_floats(static_cast<size_t>(units), 3);
  std::vector<float> ys(size, NAN), dxs(size, NAN), dmask(static_cast<size_t>(units), NAN);
  const float *x = xs.data() + skip, *grad = grads.data() + skip;
  float *y = ys.data() + skip, *dx = dxs.data() + skip;
  device::mask_units({x, mask.data(), y, rows, units, width, DType::kFloat32}, nullptr);
  for (int64_t i = 0; i < rows * columns; ++i) CHECK(y[i] == x[i] * mask[static_cast<size_t>(i % columns / width)]);
  for (const int f : {-1, static_cast<int>(Activation::kRelu), static_cast<int>(Activation::kSilu)}) {
    MaskUnitsBackwardArgs args{x,
                               grad,
                               mask.data(),
                               dx,
                               dmask.data(),
                               nullptr,
                               rows,
                               units,
                               width,
                               DType::kFloat32,
                               f >= 0,
                               static_cast<Activation>(f < 0 ? 0 : f)};
    const Room room(device::mask_units_backward_workspace(args));
    args.workspace = room.data();
    device::mask_units_backward(args, nullptr);
    for (int64_t u = 0; u < units; ++u) {
      double sum = 0, all = 0;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t i = r * columns + u * width; i < r * columns + (u + 1) * width; ++i) {
          const auto value = value_of(f, x[i]);
          CHECK(close(dx[i], static_cast<double>(grad[i]) * mask[static_cast<size_t>(u)] * value.grad, 1e-5));
          sum += grad[i] * value.value;
          all += std::fabs(grad[i] * value.value);
        }
      }
      CHECK(std::fabs(dmask[static_cast<size_t>(u)] - sum) <= 1e-5 * (1e-3 + all));
    }
  }
}

void test_bad_input() {
  CHECK(refused("mask_units",
                [] { device::mask_units({nullptr, nullptr, nullptr, 1, 1, 0, DType::kFloat32}, nullptr); }));
}

}  // namespace

int main() {
  return run_tests([] {
    const int64_t sizes[][4] = {{1, 1, 1, 0},    {3, 5, 3, 0},   {64, 33, 1, 0}, {65, 12, 32, 0},  {130, 3, 7, 0},
                                {9, 128, 4, 0},  {9, 128, 1, 0}, {9, 128, 4, 1}, {70, 1030, 1, 0}, {8, 1, 129, 0},
                                {200, 4, 40, 0}, {0, 4, 2, 0},   {4, 0, 2, 0}};
    for (const auto& size : sizes) test_kernels(size[0], size[1], size[2], size[3]);
    test_bad_input();
  });
}
