// gated_act and grouped_delta against double-precision formulas, on exactly sized buffers so that the sanitizers see
// any overrun.
#include <algorithm>

#include "check.h"
#include "deftcore/ops.h"

using namespace deftcore;

namespace {

// Rows of gate and up lie `gap` floats apart, in one buffer.
void test_gated(int64_t rows, int64_t width, int64_t gap) {
  const size_t count = static_cast<size_t>(rows * width);
  const int64_t stride = 2 * (width + gap);
  const std::vector<float> gate_up = random_floats(static_cast<size_t>(std::max<int64_t>(rows, 1) * stride), 1),
                           grad = random_floats(count, 3);
  const float *gate = gate_up.data(), *up = gate + width + gap;
  std::vector<float> a(count, NAN), grad_gate(count, NAN), grad_up = grad;
  device::gated_act({gate, up, a.data(), rows, width, stride, stride, DType::kFloat32, Activation::kSilu}, nullptr);
  device::gated_act_backward({gate, up, grad_up.data(), grad_gate.data(), grad_up.data(), rows, width, stride, stride,
                              DType::kFloat32, Activation::kSilu},
                             nullptr);
  for (size_t i = 0; i < count; ++i) {
    const auto w = static_cast<size_t>(width), at = i / w * static_cast<size_t>(stride) + i % w;
    const double g = gate[at], u = up[at], s = 1 / (1 + std::exp(-g));
    CHECK(close(a[i], g * s * u, 1e-5));
    CHECK(close(grad_gate[i], grad[i] * u * s * (1 + g * (1 - s)), 1e-5));
    CHECK(close(grad_up[i], grad[i] * g * s, 1e-5));
  }
}

// Two deltas, each with rows of all three kinds.
void test_grouped(int64_t tokens, int64_t inputs, int64_t outputs) {
  const auto floats = [](int64_t n, unsigned seed) { return random_floats(static_cast<size_t>(n), seed); };
  const int64_t gather_start[] = {0, 2, 3}, scatter_start[] = {0, 1, 2}, low_start[] = {0, 1, 10}, most = 11;
  const int32_t gather_index[] = {static_cast<int32_t>(inputs - 1), 0, static_cast<int32_t>(inputs / 2)},
                scatter_index[] = {static_cast<int32_t>(outputs / 2), static_cast<int32_t>(outputs - 1)};
  const std::vector<float> x = floats(tokens * inputs, 1), gathered = floats(3 * outputs, 2),
                           scattered = floats(2 * inputs, 3), low_in = floats(10 * inputs, 4),
                           low_out = floats(10 * outputs, 5), before = floats(tokens * outputs, 6);
  const DeltaBank bank{gather_start,     gather_index, gathered.data(), scatter_start,  scatter_index,
                       scattered.data(), low_start,    low_in.data(),   low_out.data(), 2,
                       inputs,           outputs};
  std::vector<int64_t> adapter(static_cast<size_t>(tokens));
  for (size_t t = 0; t < adapter.size(); ++t) adapter[t] = static_cast<int64_t>(t % 4) - 1;  // 2 is out of range
  std::vector<float> y = before;
  GroupedDeltaArgs args{bank, x.data(), adapter.data(), y.data(), nullptr, tokens, most, DType::kFloat32};
  const Room workspace(device::grouped_delta_workspace(args));
  args.workspace = workspace.data();
  device::grouped_delta(args, nullptr);
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = x.data() + t * inputs;
    const auto dot = [&](const std::vector<float>& rows, int64_t r) {
      double sum = 0;
      for (int64_t i = 0; i < inputs; ++i) {
        sum += static_cast<double>(row[i]) * rows[static_cast<size_t>(r * inputs + i)];
      }
      return sum;
    };
    std::vector<double> expected(before.begin() + t * outputs, before.begin() + (t + 1) * outputs);
    const int64_t delta = adapter[static_cast<size_t>(t)];
    if (delta == 0 || delta == 1) {
      const auto add_row = [&](const std::vector<float>& rows, int64_t r, double factor) {
        for (int64_t j = 0; j < outputs; ++j) {
          expected[static_cast<size_t>(j)] += factor * rows[static_cast<size_t>(r * outputs + j)];
        }
      };
      for (int64_t r = gather_start[delta]; r < gather_start[delta + 1]; ++r)
        add_row(gathered, r, row[gather_index[r]]);
      for (int64_t r = scatter_start[delta]; r < scatter_start[delta + 1]; ++r) {
        expected[static_cast<size_t>(scatter_index[r])] += dot(scattered, r);
      }
      for (int64_t r = low_start[delta]; r < low_start[delta + 1]; ++r) add_row(low_out, r, dot(low_in, r));
    }
    for (int64_t j = 0; j < outputs; ++j) {
      CHECK(close(y[static_cast<size_t>(t * outputs + j)], expected[static_cast<size_t>(j)], 1e-4));
    }
  }
}

}  // namespace

int main() {
  return run_tests([] {
    test_gated(3, 0, 0);
    test_gated(0, 16, 0);
    for (const int64_t width : {1, 7, 16, 33, 1024, 1025}) {
      for (const int64_t gap : {0, 1, 4}) test_gated(3, width, gap);
      for (const int64_t tokens : {0, 1, 4, 11}) test_grouped(tokens, width, 37);
      test_grouped(5, 19, width);
    }
  });
}
