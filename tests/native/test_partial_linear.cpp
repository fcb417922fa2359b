// gated_act and grouped_delta against double-precision formulas, on exactly sized buffers so that the sanitizers see
// any overrun.
#include "check.h"
#include "deftcore/ops.h"

using namespace deftcore;

namespace {

void test_gated(int64_t rows, int64_t width) {
  const size_t count = static_cast<size_t>(rows * width);
  const std::vector<float> gate = random_floats(count, 1), up = random_floats(count, 2), grad = random_floats(count, 3);
  std::vector<float> a(count), grad_gate(count), grad_up = grad;
  device::gated_act({gate.data(), up.data(), a.data(), rows, width, width, width, DType::kFloat32, Activation::kSilu},
                    nullptr);
  device::gated_act_backward({gate.data(), up.data(), grad_up.data(), grad_gate.data(), grad_up.data(), rows, width,
                              width, width, DType::kFloat32, Activation::kSilu},
                             nullptr);
  for (size_t i = 0; i < count; ++i) {
    const double g = gate[i], s = 1 / (1 + std::exp(-g));
    CHECK(close(a[i], g * s * up[i], 1e-5));
    CHECK(close(grad_gate[i], grad[i] * up[i] * s * (1 + g * (1 - s)), 1e-5));
    CHECK(close(grad_up[i], grad[i] * g * s, 1e-5));
  }
}

// Two deltas: the first gathers two inputs and has rank one, the second scatters to one output.
void test_grouped(int64_t tokens, int64_t inputs, int64_t outputs) {
  const auto floats = [](int64_t n, unsigned seed) { return random_floats(static_cast<size_t>(n), seed); };
  const std::vector<float> x = floats(tokens * inputs, 1), gathered = floats(2 * outputs, 2),
                           scattered = floats(inputs, 3), low_in = floats(inputs, 4), low_out = floats(outputs, 5),
                           before = floats(tokens * outputs, 6);
  const int64_t gather_start[] = {0, 2, 2}, scatter_start[] = {0, 0, 1}, low_start[] = {0, 1, 1};
  const int32_t gather_index[] = {static_cast<int32_t>(inputs - 1), 0},
                scatter_index[] = {static_cast<int32_t>(outputs / 2)};
  const DeltaBank bank{gather_start,     gather_index, gathered.data(), scatter_start,  scatter_index,
                       scattered.data(), low_start,    low_in.data(),   low_out.data(), 2,
                       inputs,           outputs};
  std::vector<int64_t> adapter(static_cast<size_t>(tokens));
  for (size_t t = 0; t < adapter.size(); ++t) adapter[t] = static_cast<int64_t>(t % 4) - 1;  // 2 is out of range
  std::vector<float> y = before;
  GroupedDeltaArgs args{bank, x.data(), adapter.data(), y.data(), nullptr, tokens, 3, DType::kFloat32};
  const Room workspace(device::grouped_delta_workspace(args));
  args.workspace = workspace.data();
  device::grouped_delta(args, nullptr);
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = x.data() + t * inputs;
    double low = 0, sum = 0;
    for (int64_t i = 0; i < inputs; ++i) {
      low += static_cast<double>(row[i]) * low_in[static_cast<size_t>(i)];
      sum += static_cast<double>(row[i]) * scattered[static_cast<size_t>(i)];
    }
    for (int64_t j = 0; j < outputs; ++j) {
      const auto at = static_cast<size_t>(j);
      double expected = before[static_cast<size_t>(t * outputs + j)];
      if (adapter[static_cast<size_t>(t)] == 0) {
        expected += static_cast<double>(row[inputs - 1]) * gathered[at] +
                    static_cast<double>(row[0]) * gathered[static_cast<size_t>(outputs + j)] + low * low_out[at];
      } else if (adapter[static_cast<size_t>(t)] == 1 && j == outputs / 2) {
        expected += sum;
      }
      CHECK(close(y[static_cast<size_t>(t * outputs + j)], expected, 1e-4));
    }
  }
}

}  // namespace

int main() {
  return run_tests([] {
    for (const int64_t width : {1, 7, 16, 33, 1024, 1025}) {
      test_gated(3, width);
      for (const int64_t tokens : {0, 1, 4, 13}) test_grouped(tokens, width, 37);
      test_grouped(5, 19, width);
    }
  });
}
