// The scalar-decay scan against a double-precision loop, its backward against differences, and the one-step form, on
// exactly sized buffers.
#include "check.h"
#include "deftcore/ops.h"

using namespace deftcore;

namespace {

size_t at(int64_t i) { return static_cast<size_t>(i); }

struct Problem {
  int64_t batch, length, heads, head_dim, states, groups;
  std::vector<float> x, step, log_decay, b, c, d, first;

  Problem(int64_t batch_, int64_t length_, int64_t heads_, int64_t head_dim_, int64_t states_, int64_t groups_)
      : batch(batch_), length(length_), heads(heads_), head_dim(head_dim_), states(states_), groups(groups_) {
    x = random_floats(at(batch * length * heads * head_dim), 1);
    step = random_floats(at(batch * length * heads), 2);
    log_decay = random_floats(at(batch * length * heads), 3);
    for (float& v : step) v = std::abs(v);
    for (float& v : log_decay) v = -std::abs(v);
    b = random_floats(at(batch * length * groups * states), 4);
    c = random_floats(at(batch * length * groups * states), 5);
    d = random_floats(at(heads * head_dim), 6);
    first = random_floats(at(batch * heads * head_dim * states), 7);
  }

  ScanTensor tensor(std::vector<float>& v) const { return {v.data(), length * heads * head_dim, heads * head_dim, 1}; }

  SsdArgs args(std::vector<float>& out, std::vector<float>& last) {
    return {tensor(x),    tensor(out),    step.data(), log_decay.data(), b.data(), c.data(), d.data(),
            first.data(), last.data(),    batch,       length,           heads,    head_dim, states,
            groups,       DType::kFloat32};
  }

  // sum(out) + sum(last) in double precision; fills `out` where it is given.
  double total(std::vector<double>* out) const {
    double sum = 0;
    const int64_t width = heads * head_dim;
    for (int64_t i = 0; i < batch; ++i) {
      for (int64_t j = 0; j < width; ++j) {
        const int64_t head = j / head_dim, group = head / (heads / groups);
        std::vector<double> h(at(states));
        for (int64_t n = 0; n < states; ++n) h[at(n)] = first[at((i * width + j) * states + n)];
        for (int64_t t = 0; t < length; ++t) {
          const size_t k = at((i * length + t) * heads + head), place = at((i * length + t) * width + j);
          double y = static_cast<double>(d[at(j)]) * x[place];
          for (int64_t n = 0; n < states; ++n) {
            const size_t m = at(((i * length + t) * groups + group) * states + n);
            h[at(n)] =
                std::exp(static_cast<double>(log_decay[k])) * h[at(n)] + static_cast<double>(step[k]) * x[place] * b[m];
            y += c[m] * h[at(n)];
          }
          if (out != nullptr) (*out)[place] = y;
          sum += y;
        }
        for (const double state : h) sum += state;
      }
    }
    return sum;
  }
};

void test_scan(Problem p) {
  std::vector<float> out(p.x.size(), NAN), last(p.first.size(), NAN);
  SsdArgs args = p.args(out, last);
  device::ssd(args, nullptr);
  std::vector<double> expected(out.size());
  p.total(&expected);
  for (size_t i = 0; i < out.size(); ++i) CHECK(close(out[i], expected[i], 1e-4));
  if (p.length == 0) CHECK(last == p.first);

  std::vector<float> ones(out.size(), 1.0f), dx(out.size(), NAN), dstep(p.step.size(), NAN), ddecay(p.step.size(), NAN),
      db(p.b.size()), dc(p.c.size()), dd(p.d.size()), dfirst(last.size(), 1.0f);
  args.out = p.tensor(ones);
  SsdBackwardArgs back{args,      p.tensor(dx), dstep.data(),  ddecay.data(), db.data(),
                       dc.data(), dd.data(),    dfirst.data(), nullptr};
  const Room workspace(device::ssd_backward_workspace(back));
  back.workspace = workspace.data();
  device::ssd_backward(back, nullptr);
  const auto total = [&] { return p.total(nullptr); };
  check_slopes(total, {{&p.x, &dx}, {&p.step, &dstep}, {&p.log_decay, &ddecay}, {&p.first, &dfirst}});
  check_slopes(total, {{&p.b, &db}, {&p.c, &dc}, {&p.d, &dd}});
}

// One step of the scan by the update: dt is the step, a its logarithmic decay over it.
void test_update(Problem p) {
  std::vector<float> out(p.x.size()), last(p.first.size()), stepped(p.x.size(), NAN);
  device::ssd(p.args(out, last), nullptr);
  std::vector<float> a(at(p.heads)), state = p.first, z = random_floats(p.x.size(), 8);
  for (int64_t i = 0; i < p.batch; ++i) {  // decays differ between rows: one row at a time
    for (int64_t h = 0; h < p.heads; ++h) {
      a[at(h)] = p.log_decay[at(i * p.heads + h)] / p.step[at(i * p.heads + h)];
    }
    const int64_t width = p.heads * p.head_dim, row = p.groups * p.states;
    device::selective_state_update({state.data() + i * width * p.states,
                                    nullptr,
                                    {p.x.data() + i * width, width, p.head_dim, 1},
                                    {p.step.data() + i * p.heads, p.heads, 1, 0},
                                    {z.data() + i * width, width, p.head_dim, 1},
                                    stepped.data() + i * width,
                                    {a.data(), 0, 1, 0},
                                    0,
                                    p.b.data() + i * row,
                                    p.c.data() + i * row,
                                    {p.d.data(), 0, p.head_dim, 1},
                                    {},
                                    1,
                                    p.heads,
                                    p.head_dim,
                                    p.states,
                                    p.groups,
                                    DType::kFloat32,
                                    DType::kFloat32,
                                    false},
                                   nullptr);
  }
  for (size_t i = 0; i < out.size(); ++i) CHECK(close(stepped[i], out[i] * z[i] / (1 + std::exp(-z[i])), 1e-4));
  for (size_t i = 0; i < last.size(); ++i) CHECK(close(state[i], last[i], 1e-4));
}

}  // namespace

int main() {
  return run_tests([] {
    test_scan(Problem(1, 1, 1, 1, 1, 1));
    test_scan(Problem(2, 35, 6, 3, 5, 2));
    test_scan(Problem(1, 40, 3, 21, 17, 3));
    test_scan(Problem(1, 70, 4, 16, 32, 1));
    test_scan(Problem(1, 33, 2, 70, 3, 2));
    test_scan(Problem(1, 37, 2, 16, 8, 2));  // two groups as wide as a vector's or a panel's states
    test_scan(Problem(1, 37, 4, 16, 16, 2));
    test_scan(Problem(0, 4, 2, 2, 2, 1));
    test_scan(Problem(1, 0, 4, 8, 16, 1));
    test_update(Problem(2, 1, 6, 19, 23, 2));
    test_update(Problem(1, 1, 2, 16, 16, 1));
  });
}
