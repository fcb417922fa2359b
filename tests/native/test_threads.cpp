// Parts, whatever threads come: one, several, fewer than asked for, and regions inside regions.
#include <omp.h>

#include "../../csrc/cpu/threads.h"
#include "check.h"
#include "deftcore/ops.h"

using namespace deftcore;

namespace {

// Every part runs once in each stage, and sees all that the stages before it wrote.
void test_stages(int parts) {
  std::vector<int> first(static_cast<size_t>(parts)), second(first), third(20);
  int sum = 0;
  bool seen = true;
  cpu::parallel(parts, [&](cpu::Team& team) {
    for (int round = 1; round <= 3; ++round) {
      team.stage([&](int part) { first[static_cast<size_t>(part)] += part + 1; });
      team.once([&] {
        sum = 0;
        for (int value : first) sum += value;
      });
      if (sum != round * parts * (parts + 1) / 2) seen = false;
      team.stage([&](int part) { second[static_cast<size_t>(part)] += sum; });
      team.each(20, [&](int64_t i) { ++third[static_cast<size_t>(i)]; });
    }
  });
  CHECK(seen);
  for (int part = 0; part < parts; ++part) {
    CHECK(first[static_cast<size_t>(part)] == 3 * (part + 1));
    CHECK(second[static_cast<size_t>(part)] == 6 * parts * (parts + 1) / 2);
  }
  for (int count : third) CHECK(count == 3);
}

// The input gradient of a 4-bit layer: its panels of sums are sized by the number of parts.
std::vector<float> layer_gradient() {
  constexpr int64_t kRows = 256, kCols = 512, kTokens = 16;
  const std::vector<float> w = random_floats(kRows * kCols, 1), grad = random_floats(kTokens * kRows, 2);
  std::vector<uint8_t> packed(kRows * kCols / 2);
  std::vector<float> absmax(kRows * kCols / 64), y(kTokens * kCols, NAN);
  cpu::quantize_4bit({w.data(), packed.data(), absmax.data(), kRows * kCols, 64, DType::kFloat32, QuantType::kNf4},
                     nullptr);
  Linear4bitArgs args{};
  args.w = {packed.data(), kNf4Code, absmax.data(), nullptr, nullptr, 0.0f, kRows, kCols, 64};
  args.x = grad.data();
  args.y = y.data();
  args.tokens = kTokens;
  const Room workspace(cpu::linear_4bit_backward_workspace(args));
  args.workspace = workspace.data();
  cpu::linear_4bit_backward(args, nullptr);
  return y;
}

// The scan's gradient of b, summed over heads of several parts.
std::vector<float> scan_gradient() {
  constexpr int64_t kLength = 40, kHeads = 6, kDim = 12, kStates = 16;
  const size_t inputs = kLength * kHeads * kDim, steps = kLength * kHeads, rows = kLength * kStates;
  const std::vector<float> x = random_floats(inputs, 1), b = random_floats(rows, 2), c = random_floats(rows, 3);
  std::vector<float> grad = random_floats(inputs, 4), step(steps, 0.1f), decay(steps, -0.1f), grad_x(inputs),
                     grad_step(steps), grad_decay(steps), grad_b(rows), grad_c(rows), first(kHeads * kDim * kStates);
  SsdBackwardArgs args{};
  const auto tensor = [](const float* data) {
    return ScanTensor{const_cast<float*>(data), kLength * kHeads * kDim, kHeads * kDim, 1};
  };
  args.forward = {tensor(x.data()),
                  tensor(grad.data()),
                  step.data(),
                  decay.data(),
                  b.data(),
                  c.data(),
                  nullptr,
                  nullptr,
                  nullptr,
                  1,
                  kLength,
                  kHeads,
                  kDim,
                  kStates,
                  1,
                  DType::kFloat32};
  args.grad_x = tensor(grad_x.data());
  args.grad_step = grad_step.data();
  args.grad_log_decay = grad_decay.data();
  args.grad_b = grad_b.data();
  args.grad_c = grad_c.data();
  args.grad_first = first.data();
  const Room workspace(cpu::ssd_backward_workspace(args));
  args.workspace = workspace.data();
  cpu::ssd_backward(args, nullptr);
  return grad_b;
}

// The same bits with all threads, and where a region inside a region gets one.
template <class Fn>
void test_nested(Fn&& gradient) {
  const std::vector<float> alone = gradient();
  for (float value : alone) CHECK(std::isfinite(value));
  std::vector<std::vector<float>> inside(3);
#pragma omp parallel for num_threads(3)
  for (int i = 0; i < 3; ++i) inside[static_cast<size_t>(i)] = gradient();
  for (const auto& found : inside) CHECK(found == alone);
  omp_set_dynamic(1);  // as many as OpenMP thinks fit
  CHECK(gradient() == alone);
  omp_set_dynamic(0);
}

}  // namespace

int main() {
  return run_tests([] {
    omp_set_num_threads(4);
    for (int parts : {1, 2, 3, 8}) {
      test_stages(parts);
#pragma omp parallel for num_threads(2)
      for (int i = 0; i < 2; ++i) test_stages(parts);
    }
    test_nested(layer_gradient);
    test_nested(scan_gradient);
  });
}
