// The selective scan against a double-precision loop, and its backward against differences, on exactly sized buffers so
// that the sanitizers see any overrun.
#include "check.h"
#include "deftcore/ops.h"

using namespace deftcore;

namespace {

struct Problem {
  int64_t batch, length, channels, states, groups;
  bool fixed;  // b and c are [states, channels]
  std::vector<float> u, delta, z, a, b, c, d, bias, first;

  Problem(int64_t batch_, int64_t length_, int64_t channels_, int64_t states_, int64_t groups_, bool fixed_ = false)
      : batch(batch_), length(length_), channels(channels_), states(states_), groups(groups_), fixed(fixed_) {
    const auto floats = [](int64_t n, unsigned seed) { return random_floats(static_cast<size_t>(n), seed); };
    u = floats(batch * length * channels, 1);
    delta = floats(batch * length * channels, 2);
    z = floats(batch * length * channels, 3);
    a = floats(states * channels, 4);
    for (float& v : a) v = -std::exp(v);
    b = floats(fixed ? states * channels : batch * length * groups * states, 5);
    c = floats(fixed ? states * channels : batch * length * groups * states, 6);
    d = floats(channels, 7);
    bias = floats(channels, 8);
    first = floats(batch * states * channels, 9);
  }

  ScanTensor tensor(std::vector<float>& x) const { return {x.data(), length * channels, channels, 1}; }

  SelectiveScanArgs args(std::vector<float>& out, std::vector<float>& last, std::vector<float>& chunks) {
    return {tensor(u), tensor(delta), tensor(z),    tensor(out),     a.data(),      b.data(), c.data(),
            d.data(),  bias.data(),   first.data(), last.data(),     chunks.data(), batch,    length,
            channels,  states,        groups,       DType::kFloat32, true,          fixed,    fixed};
  }

  // sum(out) + sum(last) in double precision; fills `out` where it is given.
  double total(std::vector<double>* out) const {
    double sum = 0;
    for (int64_t i = 0; i < batch; ++i) {
      for (int64_t j = 0; j < channels; ++j) {
        std::vector<double> h(static_cast<size_t>(states));
        for (int64_t n = 0; n < states; ++n) h[static_cast<size_t>(n)] = first[at((i * states + n) * channels + j)];
        for (int64_t t = 0; t < length; ++t) {
          const size_t k = at((i * length + t) * channels + j);
          const double step = std::log1p(std::exp(static_cast<double>(delta[k]) + bias[at(j)])), ut = u[k];
          double y = d[at(j)] * ut;
          for (int64_t n = 0; n < states; ++n) {
            const size_t m =
                at(fixed ? n * channels + j : ((i * length + t) * groups + j / (channels / groups)) * states + n);
            double& state = h[static_cast<size_t>(n)];
            state = std::exp(step * a[at(n * channels + j)]) * state + step * b[m] * ut;
            y += c[m] * state;
          }
          y *= z[k] / (1 + std::exp(-static_cast<double>(z[k])));
          if (out != nullptr) (*out)[k] = y;
          sum += y;
        }
        for (const double state : h) sum += state;
      }
    }
    return sum;
  }

  static size_t at(int64_t i) { return static_cast<size_t>(i); }
};

void test_scan(Problem p) {
  const size_t size = p.u.size(), plane = p.first.size();
  const auto chunk_rows = static_cast<size_t>((p.length + kScanChunk - 1) / kScanChunk);
  std::vector<float> out(size, NAN), last(plane, NAN), chunks(chunk_rows * plane, NAN);
  SelectiveScanArgs args = p.args(out, last, chunks);
  device::selective_scan(args, nullptr);
  std::vector<double> expected(size);
  p.total(&expected);
  for (size_t i = 0; i < size; ++i) CHECK(close(out[i], expected[i], 1e-4));
  if (p.length == 0) CHECK(last == p.first);

  std::vector<float> ones(size, 1.0f), du(size, NAN), ddelta(size, NAN), dz(size, NAN), da(p.a.size()), db(p.b.size()),
      dc(p.c.size()), dd(p.d.size()), dbias(p.bias.size()), dfirst(plane, 1.0f), again(size, NAN);
  args.out = p.tensor(ones);
  SelectiveScanBackwardArgs back{args,      p.tensor(du), p.tensor(ddelta), p.tensor(dz), p.tensor(again), da.data(),
                                 db.data(), dc.data(),    dd.data(),        dbias.data(), dfirst.data(),   nullptr};
  const Room workspace(device::selective_scan_backward_workspace(back));
  back.workspace = workspace.data();
  device::selective_scan_backward(back, nullptr);
  for (size_t i = 0; i < size; ++i) CHECK(close(again[i], expected[i], 1e-4));
  const auto total = [&] { return p.total(nullptr); };
  check_slopes(total, {{&p.u, &du}, {&p.delta, &ddelta}, {&p.z, &dz}, {&p.first, &dfirst}});
  check_slopes(total, {{&p.a, &da}, {&p.b, &db}, {&p.c, &dc}, {&p.d, &dd}, {&p.bias, &dbias}});
}

}  // namespace

int main() {
  return run_tests([] {
    test_scan(Problem(1, 1, 1, 1, 1));
    test_scan(Problem(2, 35, 6, 3, 2));
    test_scan(Problem(1, 40, 21, 16, 1));
    test_scan(Problem(1, 3, 48, 5, 3));
    test_scan(Problem(2, 34, 70, 3, 1));
    test_scan(Problem(1, 33, 34, 256, 1));
    test_scan(Problem(2, 35, 6, 9, 2, true));
    test_scan(Problem(0, 4, 8, 2, 1));
    test_scan(Problem(2, 0, 8, 2, 1));
    test_scan(Problem(2, 5, 0, 2, 1));
  });
}
