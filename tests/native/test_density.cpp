// act_density against double-precision formulas, on exactly sized buffers so that the sanitizers see any overrun.
#include "check.h"
#include "deftcore/math.h"
#include "deftcore/ops.h"

using namespace deftcore;

namespace {

double activation(Activation f, double z) {
  switch (f) {
    case Activation::kRelu: return z > 0 ? z : 0;
    case Activation::kRelu2: return z > 0 ? z * z : 0;
    case Activation::kGeluErf: return 0.5 * z * (1 + std::erf(z / std::sqrt(2.0)));
    case Activation::kGeluTanh:
      return 0.5 * z * (1 + std::tanh(std::sqrt(2 / 3.14159265358979323846) * (z + 0.044715 * z * z * z)));
    default: return z / (1 + std::exp(-z));
  }
}

// The scalar formulas that both devices share, on the host.
void test_math() {
  for (float z = -12.0f; z <= 12.0f; z += 0.37f) {
    const auto check = [&](auto kind) {
      constexpr Activation kF = decltype(kind)::value;
      CHECK(close(math::activate<kF>(z), activation(kF, z), 1e-6));
      const double h = 1e-4, slope = (activation(kF, z + h) - activation(kF, z - h)) / (2 * h);
      if (std::fabs(z) > 1e-3) CHECK(close(math::activate_grad<kF>(z).grad, slope, 1e-4));
    };
    check(std::integral_constant<Activation, Activation::kRelu>{});
    check(std::integral_constant<Activation, Activation::kRelu2>{});
    check(std::integral_constant<Activation, Activation::kGeluErf>{});
    check(std::integral_constant<Activation, Activation::kGeluTanh>{});
    check(std::integral_constant<Activation, Activation::kSilu>{});
  }
  CHECK(math::surrogate<Surrogate::kL0>(0.0f, 1e-7f) == 0.0f);
  CHECK(math::surrogate<Surrogate::kL0>(3e38f, 1e-7f) == 1.0f);
  CHECK(math::surrogate_grad<Surrogate::kL0>(3e38f, 1e-7f) == 0.0f);
}

// `skip` floats into their buffers, which decides on the alignment.
void test_kernels(int64_t rows, int64_t width, int64_t skip) {
  const auto size = static_cast<size_t>(rows * width);
  const float tau = 0.25f;
  std::vector<float> zs = random_floats(size + static_cast<size_t>(skip), 1), as(zs.size(), NAN), dzs(zs.size(), NAN),
                     das = random_floats(zs.size(), 2);
  float *z = zs.data() + skip, *a = as.data() + skip, *dz = dzs.data() + skip, *da = das.data() + skip;
  if (size > 0) z[0] = tau;  // not counted
  std::vector<uint8_t> mask(static_cast<size_t>(rows));
  for (size_t r = 0; r < mask.size(); ++r) mask[r] = r % 3 != 1;
  for (int f = 0; f < 5; ++f) {
    float sum = -1;
    int64_t count = -1, expected_count = 0, density_count = -1;
    double expected = 0;
    device::act_density({z, mask.data(), a, &sum, &count, rows, width, DType::kFloat32, static_cast<Activation>(f),
                         Surrogate::kL0, 1e-7f, tau},
                        nullptr);
    device::density({a, mask.data(), &density_count, rows, width, DType::kFloat32, tau}, nullptr);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < width; ++i) {
        const size_t at = static_cast<size_t>(r * width + i);
        const double ref = activation(static_cast<Activation>(f), z[at]);
        CHECK(close(a[at], ref, 1e-6));
        if (!mask[static_cast<size_t>(r)]) continue;
        expected += ref * ref / (ref * ref + 1e-7);
        expected_count += std::fabs(a[at]) > tau;
      }
    }
    CHECK(close(sum, expected, 1e-4));
    CHECK(count == expected_count);
    CHECK(density_count == expected_count);
    const float c = 0.5f;
    device::act_density_backward(
        {z, da, &c, mask.data(), dz, rows, width, DType::kFloat32, static_cast<Activation>(f), Surrogate::kL1, 0.0f},
        nullptr);
    for (size_t at = 0; at < size; ++at) {
      const double h = 1e-4, zi = z[at];
      if (std::fabs(zi) < 1e-3) continue;
      const double slope =
          (activation(static_cast<Activation>(f), zi + h) - activation(static_cast<Activation>(f), zi - h)) / (2 * h);
      const double value = activation(static_cast<Activation>(f), zi), sign = value > 0 ? 1 : value < 0 ? -1 : 0;
      const double counted = mask[at / static_cast<size_t>(width)];
      CHECK(close(dz[at], slope * (da[at] + counted * 0.5 * sign), 1e-4));
    }
  }
}

}  // namespace

int main() {
  return run_tests([] {
    test_math();
    const int64_t sizes[][3] = {{1, 1, 0},  {3, 15, 0},   {2, 16, 0}, {2, 17, 0}, {5, 6, 0},
                                {2, 16, 1}, {5, 2049, 0}, {0, 4, 0},  {4, 0, 0}};
    for (const auto& size : sizes) test_kernels(size[0], size[1], size[2]);
  });
}
