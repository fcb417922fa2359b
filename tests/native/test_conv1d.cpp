// The causal convolution and its backward against double-precision loops, on exactly sized buffers.
#include "check.h"
#include "deftcore/ops.h"

using namespace deftcore;

namespace {

size_t at(int64_t i) { return static_cast<size_t>(i); }

struct Problem {
  int64_t batch, length, channels, width;
  bool packed;
  std::vector<float> x, first, weight, bias, grad;
  std::vector<int32_t> sequence;

  Problem(int64_t batch_, int64_t length_, int64_t channels_, int64_t width_, bool packed_)
      : batch(batch_), length(length_), channels(channels_), width(width_), packed(packed_) {
    x = random_floats(at(batch * length * channels), 1);
    first = random_floats(at(batch * (width - 1) * channels), 2);
    weight = random_floats(at(width * channels), 3);
    bias = random_floats(at(channels), 4);
    grad = random_floats(at(batch * length * channels), 5);
    for (int64_t i = 0; i < batch * length; ++i) sequence.push_back(static_cast<int32_t>(i % length / 5));
  }

  ScanTensor tensor(std::vector<float>& v, int64_t rows) const { return {v.data(), rows * channels, channels, 1}; }

  // Whether the tap `back` steps before t is used.
  bool reaches(int64_t t, int64_t back) const { return !packed || t / 5 == (t - back < 0 ? 0 : (t - back) / 5); }

  double input(int64_t i, int64_t t, int64_t c) const {
    return t < 0 ? first[at((i * (width - 1) + t + width - 1) * channels + c)] : x[at((i * length + t) * channels + c)];
  }

  double sum(int64_t i, int64_t t, int64_t c) const {
    double total = bias[at(c)];
    for (int64_t back = 0; back < width; ++back) {
      if (reaches(t, back)) total += weight[at((width - 1 - back) * channels + c)] * input(i, t - back, c);
    }
    return total;
  }
};

double sigmoid(double v) { return 1 / (1 + std::exp(-v)); }

void test_conv(Problem p) {
  std::vector<float> out(p.x.size(), NAN);
  CausalConv1dArgs args{p.tensor(p.x, p.length),
                        p.tensor(out, p.length),
                        p.tensor(p.first, p.width - 1),
                        p.weight.data(),
                        p.bias.data(),
                        p.packed ? p.sequence.data() : nullptr,
                        p.batch,
                        p.length,
                        p.channels,
                        p.width,
                        DType::kFloat32,
                        true};
  device::causal_conv1d(args, nullptr);
  std::vector<double> dx(p.x.size()), dfirst(p.first.size()), dweight(p.weight.size()), dbias(p.bias.size());
  for (int64_t i = 0; i < p.batch; ++i) {
    for (int64_t t = 0; t < p.length; ++t) {
      for (int64_t c = 0; c < p.channels; ++c) {
        const size_t place = at((i * p.length + t) * p.channels + c);
        const double v = p.sum(i, t, c), s = sigmoid(v), g = p.grad[place] * s * (1 + v * (1 - s));
        CHECK(close(out[place], v * s, 1e-5));
        dbias[at(c)] += g;
        for (int64_t back = 0; back < p.width; ++back) {
          if (!p.reaches(t, back)) continue;
          const size_t tap = at((p.width - 1 - back) * p.channels + c);
          dweight[tap] += g * p.input(i, t - back, c);
          if (t - back >= 0) {
            dx[at((i * p.length + t - back) * p.channels + c)] += g * p.weight[tap];
          } else {
            dfirst[at((i * (p.width - 1) + t - back + p.width - 1) * p.channels + c)] += g * p.weight[tap];
          }
        }
      }
    }
  }
  std::vector<float> gx(dx.size(), NAN), gfirst(dfirst.size(), NAN), gweight(dweight.size()), gbias(dbias.size());
  args.out = p.tensor(p.grad, p.length);
  device::causal_conv1d_backward(
      {args, p.tensor(gx, p.length), p.tensor(gfirst, p.width - 1), gweight.data(), gbias.data()}, nullptr);
  const auto check = [](const std::vector<float>& ours, const std::vector<double>& wanted) {
    for (size_t i = 0; i < ours.size(); ++i) CHECK(close(ours[i], wanted[i], 1e-4));
  };
  check(gx, dx);
  check(gfirst, dfirst);
  check(gweight, dweight);
  check(gbias, dbias);

  // Step by step, in a window one longer than needed, the rows' own in reverse order.
  if (p.packed) return;
  std::vector<float> window(at(p.batch * p.channels * p.width)), stepped(out.size(), NAN);
  std::vector<int64_t> slots;
  for (int64_t i = 0; i < p.batch; ++i) slots.push_back(p.batch - 1 - i);
  for (int64_t i = 0; i < p.batch; ++i) {
    for (int64_t c = 0; c < p.channels; ++c) {
      for (int64_t k = 1; k < p.width; ++k) {
        window[at((slots[at(i)] * p.channels + c) * p.width + k)] =
            p.first[at((i * (p.width - 1) + k - 1) * p.channels + c)];
      }
    }
  }
  const auto step = [&](int64_t t) {
    const int64_t row = p.length * p.channels;
    device::causal_conv1d_update({{p.x.data() + t * p.channels, row, p.channels, 1},
                                  {stepped.data() + t * p.channels, row, p.channels, 1},
                                  window.data(),
                                  slots.data(),
                                  p.weight.data(),
                                  p.bias.data(),
                                  p.batch,
                                  1,
                                  p.channels,
                                  p.width,
                                  p.width,
                                  DType::kFloat32,
                                  true},
                                 nullptr);
  };
  for (int64_t t = 0; t < p.length; ++t) step(t);
  for (size_t i = 0; i < out.size(); ++i) CHECK(close(stepped[i], out[i], 1e-5));

  // A row without a slot gives 0 and leaves all windows alone.
  const std::vector<float> before = window;
  slots.assign(slots.size(), -1);
  for (int64_t t = 0; t < p.length; ++t) step(t);
  for (const float v : stepped) CHECK(v == 0.0f);
  CHECK(window == before);
}

}  // namespace

int main() {
  return run_tests([] {
    test_conv(Problem(1, 1, 1, 1, false));
    test_conv(Problem(2, 35, 6, 4, false));
    test_conv(Problem(2, 67, 70, 4, true));
    test_conv(Problem(1, 3, 33, 7, false));
    test_conv(Problem(3, 40, 16, 16, true));
    test_conv(Problem(0, 4, 8, 2, false));
    test_conv(Problem(2, 0, 8, 4, false));
    test_conv(Problem(2, 5, 0, 4, false));
  });
}
