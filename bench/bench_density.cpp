// act_density forward and backward against a bare copy of the same bytes, which is its roofline.
#include <cstring>

#include "deftcore/ops.h"
#include "timing.h"

using namespace deftcore;

int main() {
  const int64_t rows = 1024, width = 11008;
  const size_t count = static_cast<size_t>(rows * width);
  const std::vector<float> z = bench::random_floats(count, 1), grad = bench::random_floats(count, 2);
  std::vector<float> a(count), dz(count);
  const char* names[] = {"relu", "relu2", "gelu", "gelu_tanh", "silu"};
  std::printf("act_density %ldx%ld float32: median [quartiles] ms, share of the copy roofline\n", rows, width);
  for (int f = 0; f < 5; ++f) {
    float sum, c = 0.1f;
    int64_t active;
    const auto times = bench::alternate(
        {[&] {
#pragma omp parallel for schedule(static)
           for (int64_t row = 0; row < rows; ++row) {
             std::memcpy(&a[static_cast<size_t>(row * width)], &z[static_cast<size_t>(row * width)],
                         static_cast<size_t>(width) * 4);
           }
         },
         [&] {
           cpu::act_density({z.data(), nullptr, a.data(), &sum, &active, rows, width, DType::kFloat32,
                             static_cast<Activation>(f), Surrogate::kL0, 1e-7f, 0.0f},
                            nullptr);
         },
         [&] {
           cpu::act_density_backward({z.data(), grad.data(), &c, nullptr, dz.data(), rows, width, DType::kFloat32,
                                      static_cast<Activation>(f), Surrogate::kL0, 1e-7f},
                                     nullptr);
         }},
        15);
    std::printf("%-10s forward %6.2f [%.2f, %.2f] %3.0f %%   backward %6.2f [%.2f, %.2f] %3.0f %%\n", names[f],
                times[1].median * 1e3, times[1].low * 1e3, times[1].high * 1e3, 100 * times[0].median / times[1].median,
                times[2].median * 1e3, times[2].low * 1e3, times[2].high * 1e3,
                150 * times[0].median / times[2].median);
  }
}
