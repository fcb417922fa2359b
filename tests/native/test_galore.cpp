// galore_step and galore_update against double-precision formulas, on exactly sized buffers so that the sanitizers see
// any overrun.
#include <algorithm>
#include <limits>

#include "check.h"
#include "deftcore/galore.h"
#include "deftcore/ops.h"

using namespace deftcore;

namespace {

constexpr double kDamping = 0.5, kBeta1 = 0.9, kBeta2 = 0.99, kEps = 1e-3;
constexpr float kRate = 0.1f, kKeep = 0.9f;

// A matrix with its own memory.
struct Owned {
  std::vector<float> grad, out, mean, square, history;
  std::vector<double> gram;
  int64_t failures = 4, outcome = -1;
  int64_t elements, rows, slot, fill, age;

  Owned(int64_t elements_, int64_t rows_, int64_t fill_, int64_t slot_, unsigned seed)
      : elements(elements_), rows(rows_), slot(slot_), fill(fill_), age(seed % 5 + 1) {
    const auto n = static_cast<size_t>(elements);
    grad = random_floats(n, seed);
    out.assign(n, NAN);
    mean = random_floats(n, seed + 1);
    square = random_floats(n, seed + 2);
    for (float& x : square) x = x * x + 0.1f;
    history = random_floats(n * static_cast<size_t>(rows), seed + 3);
    for (size_t i = n * static_cast<size_t>(fill); i < history.size(); ++i) history[i] = 0.0f;
    gram.assign(static_cast<size_t>(rows * rows), 0.0);
    for (int64_t a = 0; a < rows; ++a) {
      for (int64_t b = 0; b < rows; ++b) at(a, b) = dot(a, b);
    }
  }
  double& at(int64_t a, int64_t b) { return gram[static_cast<size_t>(a * rows + b)]; }
  const float* row(int64_t a) const { return history.data() + a * elements; }
  double dot(int64_t a, int64_t b) const {
    double sum = 0;
    for (int64_t i = 0; i < elements; ++i) sum += static_cast<double>(row(a)[i]) * row(b)[i];
    return sum;
  }
  GaloreMatrix record() {
    return {grad.data(),
            out.data(),
            mean.data(),
            square.data(),
            rows > 0 ? history.data() : nullptr,
            rows > 0 ? gram.data() : nullptr,
            &failures,
            &outcome,
            elements,
            rows,
            slot,
            fill,
            age,
            7};
  }
};

GaloreStepArgs args_of(const std::vector<GaloreMatrix>& table) {
  GaloreStepArgs args{};
  args.matrices = table.data();
  args.count = static_cast<int64_t>(table.size());
  for (const GaloreMatrix& m : table) {
    args.elements += m.elements;
    args.rows = std::max(args.rows, m.rows);
  }
  args.dtype = args.history_dtype = DType::kFloat32;
  args.correct_bias = true;
  args.damping = kDamping, args.beta1 = kBeta1, args.beta2 = kBeta2, args.eps = kEps;
  args.rate = kRate, args.keep = kKeep;
  return args;
}

void run(GaloreStepArgs args) {
  const Room workspace(device::galore_step_workspace(args));
  args.workspace = workspace.data();
  device::galore_step(args, nullptr);
}

// Moments and U behind a step of N, in double.
void check_adam(const Owned& before, const Owned& after, const std::vector<double>& n, const float* out) {
  const double t = static_cast<double>(before.age);
  const double correction = std::sqrt(1 - std::pow(kBeta2, t)) / (1 - std::pow(kBeta1, t));
  for (size_t i = 0; i < n.size(); ++i) {
    const double mean = kBeta1 * before.mean[i] + (1 - kBeta1) * n[i];
    const double square = kBeta2 * before.square[i] + (1 - kBeta2) * n[i] * n[i];
    CHECK(close(after.mean[i], mean, 1e-5));
    CHECK(close(after.square[i], square, 1e-5));
    CHECK(close(out[i], mean / (std::sqrt(square) + kEps) * correction, 1e-4));
  }
}

// N of the current window by Gauss-Jordan elimination of (K + ridge) c = e_slot.
std::vector<double> natural(const Owned& m, double ridge, double factor) {
  const int64_t rows = std::min(m.fill + 1, m.rows), width = rows + 1;
  std::vector<double> a(static_cast<size_t>(rows * width));
  const auto at = [&](int64_t i, int64_t j) -> double& { return a[static_cast<size_t>(i * width + j)]; };
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < rows; ++j) at(i, j) = m.dot(i, j) + (i == j ? ridge : 0.0);
    at(i, rows) = i == m.slot;
  }
  for (int64_t p = 0; p < rows; ++p) {
    for (int64_t i = 0; i < rows; ++i) {
      if (i == p) continue;
      const double share = at(i, p) / at(p, p);
      for (int64_t j = p; j < width; ++j) at(i, j) -= share * at(p, j);
    }
  }
  std::vector<double> n(static_cast<size_t>(m.elements));
  for (int64_t i = 0; i < rows; ++i) {
    const double c = factor * at(i, rows) / at(i, i);
    for (int64_t k = 0; k < m.elements; ++k) n[static_cast<size_t>(k)] += c * m.row(i)[k];
  }
  return n;
}

// More matrices than a launch takes, with and without windows, of pieces minus and plus one.
void test_windows(bool relative, bool mean) {
  std::vector<Owned> owned;
  const int64_t sizes[] = {1, 37, kGalorePiece - 1, kGalorePiece, kGalorePiece + 1, 2 * kGalorePiece + 5};
  for (unsigned i = 0; i < 26; ++i) {
    const int64_t rows = i == 25 ? 40 : i % 7, fill = i == 25 ? 37 : rows == 0 ? 0 : std::min<int64_t>(i % 9, rows);
    owned.emplace_back(sizes[i % 6], rows, fill, rows == 0 ? 0 : fill < rows ? fill : i % rows, 10 * i + 1);
  }
  std::vector<Owned> before = owned;
  std::vector<GaloreMatrix> table;
  for (Owned& m : owned) table.push_back(m.record());
  GaloreStepArgs args = args_of(table);
  args.relative = relative, args.mean = mean;
  run(args);
  for (size_t i = 0; i < owned.size(); ++i) {
    Owned& m = owned[i];
    std::vector<double> n(m.grad.begin(), m.grad.end());
    if (m.rows > 0) {
      const int64_t rows = std::min(m.fill + 1, m.rows);
      std::copy(m.grad.begin(), m.grad.end(), before[i].history.begin() + m.slot * m.elements);
      CHECK(m.history == before[i].history);
      double trace = 0;
      for (int64_t a = 0; a < rows; ++a) {
        trace += m.dot(a, a);
        for (int64_t b = 0; b < rows; ++b) CHECK(close(m.at(a, b), m.dot(a, b), 1e-9));
      }
      const double ridge = relative ? kDamping * trace / static_cast<double>(rows) : kDamping;
      const double factor = mean ? static_cast<double>(rows) : 1.0;
      n = natural(m, ridge * factor, factor);
      CHECK(m.outcome == kHeld);
    }
    CHECK(m.failures == 4);
    check_adam(before[i], m, n, m.out.data());
  }
}

// Beside a window that holds: one of equal rows beside which lambda vanishes, and one with an infinite gradient.
void test_windows_that_do_not_hold() {
  std::vector<Owned> owned = {Owned(9, 4, 3, 3, 1), Owned(9, 4, 3, 3, 2), Owned(2100, 4, 2, 1, 3)};
  Owned& alike = owned[0];
  std::fill(alike.grad.begin(), alike.grad.end(), 0.0f);
  alike.grad[3] = 0x1p20f;
  for (int64_t a = 0; a < 3; ++a) std::copy(alike.grad.begin(), alike.grad.end(), alike.history.begin() + a * 9);
  for (int64_t a = 0; a < 3; ++a) {
    for (int64_t b = 0; b < 3; ++b) alike.at(a, b) = 0x1p40;
  }
  owned[1].grad[5] = std::numeric_limits<float>::infinity();
  const std::vector<Owned> before = owned;
  std::vector<GaloreMatrix> table;
  for (Owned& m : owned) table.push_back(m.record());
  GaloreStepArgs args = args_of(table);
  args.damping = 1e-9;
  run(args);
  CHECK(owned[0].outcome == kAlone);
  CHECK(owned[1].outcome == kEmpty);
  CHECK(owned[2].outcome == kHeld);
  for (size_t i = 0; i < 2; ++i) {
    Owned& m = owned[i];
    CHECK(m.failures == 5);
    for (int64_t k = 0; k < 4 * 9; ++k) CHECK(m.history[static_cast<size_t>(k)] == (i == 0 && k == 3 ? 0x1p20f : 0.0f));
    for (int64_t k = 0; k < 16; ++k) CHECK(m.gram[static_cast<size_t>(k)] == (i == 0 && k == 0 ? 0x1p40 : 0.0));
  }
  std::vector<double> n(9, 0.0);
  n[3] = 0x1p20 / (1e-9 + 0x1p40);
  check_adam(before[0], owned[0], n, owned[0].out.data());
  CHECK(owned[2].failures == 4);
  const float *grad = owned[1].grad.data(), *mean = owned[1].mean.data();
  for (size_t k = 0; k < 9; ++k) {
    if (k != 5) CHECK(close(mean[k], kBeta1 * before[1].mean[k] + (1 - kBeta1) * grad[k] / 1e-9, 1e-5));
  }
}

float float_of(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// In bfloat16: a row counts as it is held, but for R / lambda behind an infinite gradient.
void test_narrow_window(bool infinite) {
  Owned m(9, 4, 2, 2, 6);
  if (infinite) m.grad[5] = std::numeric_limits<float>::infinity();
  std::vector<BFloat16> history(4 * 9, BFloat16{0});
  std::fill(m.gram.begin(), m.gram.end(), 0.0);
  const Owned before = m;
  std::vector<GaloreMatrix> table = {m.record()};
  table[0].history = history.data();
  GaloreStepArgs args = args_of(table);
  args.history_dtype = DType::kBFloat16;
  run(args);
  CHECK(m.outcome == (infinite ? kEmpty : kHeld));
  double square = kDamping;
  for (size_t i = 18; i < 27; ++i) square += static_cast<double>(float_of(history[i])) * float_of(history[i]);
  std::vector<double> n;
  for (size_t i = 0; i < 9; ++i) n.push_back(infinite ? m.grad[i] / kDamping : float_of(history[18 + i]) / square);
  for (size_t i = 0; i < 9; ++i) {
    if (infinite && i == 5) continue;
    CHECK(close(m.mean[i], kBeta1 * before.mean[i] + (1 - kBeta1) * n[i], 1e-6));
    if (!infinite) CHECK(std::fabs(float_of(history[18 + i]) - m.grad[i]) <= std::ldexp(std::fabs(m.grad[i]), -8));
  }
}

void test_whole(int64_t elements, bool stochastic) {
  Owned m(elements, 0, 0, 0, 5);
  std::vector<BFloat16> grad(m.grad.size()), weight(m.grad.size());
  for (size_t i = 0; i < grad.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &m.grad[i], 4);
    grad[i] = weight[i] = {static_cast<uint16_t>(bits >> 16)};
  }
  const Owned before = m;
  const std::vector<BFloat16> old = weight;
  std::vector<GaloreMatrix> table = {m.record()};
  table[0].grad = grad.data(), table[0].out = weight.data();
  GaloreStepArgs args = args_of(table);
  args.dtype = DType::kBFloat16;
  args.whole = true, args.stochastic = stochastic;
  run(args);
  std::vector<double> n;
  for (const BFloat16 g : grad) n.push_back(float_of(g));
  const double t = static_cast<double>(m.age);
  const double correction = std::sqrt(1 - std::pow(kBeta2, t)) / (1 - std::pow(kBeta1, t));
  std::vector<float> u(n.size());
  double drift = 0, bias = 0;
  for (size_t i = 0; i < n.size(); ++i) {
    u[i] = static_cast<float>(m.mean[i] / (std::sqrt(m.square[i]) + kEps) * correction);
    const double exact = (float_of(old[i]) - kRate * u[i]) * kKeep, error = float_of(weight[i]) - exact;
    CHECK(std::fabs(error) <= std::ldexp(std::fabs(exact), stochastic ? -7 : -8) + 1e-6);
    drift += std::fabs(error), bias += error;
  }
  check_adam(before, m, n, u.data());
  if (stochastic && elements > 1000) CHECK(drift > 0 && std::fabs(bias) < 0.1 * drift);
}

void test_update(int64_t elements, bool stochastic) {
  const std::vector<float> old = random_floats(static_cast<size_t>(elements), 1),
                           change = random_floats(static_cast<size_t>(elements), 2);
  std::vector<float> weight = old;
  device::galore_update({weight.data(), change.data(), elements, 3, DType::kFloat32, stochastic, kRate, kKeep},
                        nullptr);
  for (size_t i = 0; i < old.size(); ++i) {
    CHECK(close(weight[i], (static_cast<double>(old[i]) - kRate * static_cast<double>(change[i])) * kKeep, 1e-6));
  }
  std::vector<BFloat16> narrow(old.size(), BFloat16{0x3f80}), again = narrow;
  for (auto* to : {&narrow, &again}) {
    device::galore_update({to->data(), change.data(), elements, 3, DType::kBFloat16, stochastic, 0x1p-10f, 1.0f},
                          nullptr);
  }
  double sum = 0, expected = 0;
  for (size_t i = 0; i < old.size(); ++i) {
    const double exact = 1.0 - 0x1p-10 * static_cast<double>(change[i]);
    CHECK(std::fabs(float_of(narrow[i]) - exact) <= (stochastic ? 0x1p-7 : 0x1p-8));
    CHECK(narrow[i].bits == again[i].bits);
    sum += float_of(narrow[i]), expected += exact;
  }
  if (stochastic && elements > 1000) CHECK(std::fabs(sum - expected) < 0.3);
}

}  // namespace

int main() {
  return run_tests([] {
    for (const bool relative : {false, true}) {
      for (const bool mean : {false, true}) test_windows(relative, mean);
    }
    test_windows_that_do_not_hold();
    for (const bool infinite : {false, true}) test_narrow_window(infinite);
    for (const bool stochastic : {false, true}) {
      for (const int64_t elements : {int64_t{0}, int64_t{1}, int64_t{37}, kGalorePiece + 1}) {
        test_whole(elements, stochastic);
        test_update(elements, stochastic);
      }
    }
  });
}
