// A step of Natural GaLore (arXiv 2410.16029) and GaLore (arXiv 2403.03507) between its two products with the subspace,
// which are a library's: the window's products, the solve, N, Adam's moments, and the weights' change and rounding.
#pragma once

#include "deftcore/math.h"

namespace deftcore {

// One matrix of a step: R [elements], its moments, and the last `rows` of R's kind, of which `fill` are there.
struct GaloreMatrix {
  const void* grad;   // R, float32; where the gradient is whole, that, in args.dtype
  void* out;          // U, float32, may be `grad` itself; where the gradient is whole the weight, in and out
  float* exp_avg;     // [elements], in and out
  float* exp_avg_sq;  // [elements], in and out
  void* history;      // [rows, elements], in and out; null: N is R
  double* gram;       // [rows, rows], in and out: history history^T, of what is filled
  int64_t* failures;  // in and out: counts the windows that did not hold
  int64_t* outcome;   // out: a WindowOutcome
  int64_t elements, rows;
  int64_t slot;  // of R's row
  int64_t fill;  // rows filled before this step
  int64_t age;   // steps that the moments have seen, this one included
  int64_t seed;  // of stochastic rounding

  DEFTCORE_FIELDS(grad, out, exp_avg, exp_avg_sq, history, gram, failures, outcome, elements, rows, slot, fill, age,
                  seed)
};
// Python writes tables of them, as rows of 64-bit numbers.
static_assert(sizeof(GaloreMatrix) == 8 * std::tuple_size_v<decltype(GaloreMatrix{}.fields())>);

// What became of a window: R is its row `slot`; it holds R alone, in row 0; it is empty, as |R|^2 is not finite.
enum WindowOutcome : int64_t { kHeld = 0, kAlone = 1, kEmpty = 2 };

// N = (damping I + sum or mean of h h^T)^-1 R, U = Adam(N). Least traffic: the window's filled rows twice, R's row
// written, R or the gradient once, the moments in and out, U out or the weight in and out. The window is read a second
// time for N, whose coefficients depend on all of its products. About 20 operations an element beside 4 for each row,
// in float64.
struct GaloreStepArgs {
  const GaloreMatrix* matrices;  // [count], in the host's memory on both devices
  void* workspace;               // 64-byte aligned
  int64_t count;
  int64_t elements;  // of all matrices
  int64_t rows;      // the most of a matrix with a window; 0: there is none
  DType dtype;       // of whole gradients and their weights
  DType history_dtype;
  bool whole;       // the gradients are; then there is no window
  bool stochastic;  // rounding, of whole bfloat16 weights
  bool correct_bias;
  bool relative;  // damping is to be multiplied with the window's mean squared norm
  bool mean;
  double damping, beta1, beta2, eps;
  float rate, keep;  // of whole weights, see GaloreUpdateArgs

  DEFTCORE_FIELDS(matrices, workspace, count, elements, rows, dtype, history_dtype, whole, stochastic, correct_bias,
                  relative, mean, damping, beta1, beta2, eps, rate, keep)
};

// W = keep (W - rate change), rounded once. Least traffic: the weight in and out, the change once.
struct GaloreUpdateArgs {
  void* weight;         // [elements], in and out
  const float* change;  // [elements]
  int64_t elements, seed;
  DType dtype;
  bool stochastic;  // rounding, of a bfloat16 weight
  float rate, keep;

  DEFTCORE_FIELDS(weight, change, elements, seed, dtype, stochastic, rate, keep)
};

// Elements of a piece: what one task, or one block, works on.
inline constexpr int64_t kGalorePiece = 2048;

// ---------------------------------------------------------------------------- numbers one by one

// U = M / (sqrt(V) + eps), times `correction`; both moments move on.
struct AdamRule {
  float beta1, rest1, beta2, rest2, eps;

  template <class V>
  DEFTCORE_HD V operator()(V n, V& mean, V& square, float correction) const {
    using math::sqrt;
    mean = V(beta1) * mean + V(rest1) * n;
    square = V(beta2) * square + V(rest2) * n * n;
    return mean / (sqrt(square) + V(eps)) * V(correction);
  }
};

inline AdamRule adam_rule(const GaloreStepArgs& args) {
  return {static_cast<float>(args.beta1), static_cast<float>(1 - args.beta1), static_cast<float>(args.beta2),
          static_cast<float>(1 - args.beta2), static_cast<float>(args.eps)};
}

inline float adam_correction(const GaloreStepArgs& args, int64_t age) {
  if (!args.correct_bias) return 1.0f;
  const auto t = static_cast<double>(age);
  return static_cast<float>(std::sqrt(1 - std::pow(args.beta2, t)) / (1 - std::pow(args.beta1, t)));
}

template <class V>
DEFTCORE_HD V stepped(V weight, V change, float rate, float keep) {
  return (weight - V(rate) * change) * V(keep);
}

// The bits of x, a float, as bfloat16: the neighbour above or below, by a hash of seed and place.
DEFTCORE_HD uint16_t round_stochastically(uint32_t x, uint32_t place, uint32_t seed) {
  uint32_t noise = place * 0x9E3779B1u + seed * 0x85EBCA6Bu;
  noise = (noise ^ (noise >> 16)) * 0x7FEB352Du;
  noise = (noise ^ (noise >> 15)) * 0x846CA68Bu;
  noise = (noise ^ (noise >> 16)) & 0xFFFFu;
  const uint32_t magnitude = x & 0x7FFFFFFFu;
  const uint32_t special = magnitude > 0x7F800000u ? x | 0x400000u : x;  // NaN stays one
  return static_cast<uint16_t>((magnitude < 0x7F800000u ? x + noise : special) >> 16);
}

// ---------------------------------------------------------------------------- a window's solve

DEFTCORE_HD int64_t rows_of(const GaloreMatrix& m) { return m.fill + 1 < m.rows ? m.fill + 1 : m.rows; }

DEFTCORE_HD bool is_finite(double x) { return x - x == 0; }

// What is added to the diagonal of K, and what N is multiplied with.
struct Ridge {
  double value, factor;
};
DEFTCORE_HD Ridge ridge_of(double damping, bool relative, bool mean, double trace, int64_t rows) {
  const auto count = static_cast<double>(rows);
  const double value = relative ? damping * trace / count : damping;
  if (value == 0) return {1.0, 1.0};  // every row is zero, and so is N
  return mean ? Ridge{value * count, count} : Ridge{value, 1.0};
}

// `root` [rows, rows] becomes K + ridge, and then its Cholesky factor in the lower half; false where there is none. All
// threads of a group call it, and those below.
template <class Group>
DEFTCORE_HD bool factorise(const Group& group, const GaloreMatrix& m, double ridge, double* root) {
  const int64_t rows = rows_of(m);
  bool finite = true;
  for (int64_t i = 0; i < rows; ++i) {  // each thread all: none need tell another
    for (int64_t j = 0; j <= i; ++j) finite = finite && is_finite(m.gram[i * m.rows + j] + (i == j ? ridge : 0.0));
  }
  if (!finite) return false;
  for (int64_t i = group.lane; i < rows; i += group.lanes) {
    for (int64_t j = 0; j <= i; ++j) root[i * rows + j] = m.gram[i * m.rows + j] + (i == j ? ridge : 0.0);
  }
  group.sync();
  for (int64_t j = 0; j < rows; ++j) {
    const double pivot = root[j * rows + j];
    if (!(pivot > 0)) return false;
    const double scale = math::sqrt(pivot);
    group.sync();
    for (int64_t i = j + group.lane; i < rows; i += group.lanes) root[i * rows + j] /= scale;
    group.sync();
    for (int64_t i = j + 1 + group.lane; i < rows; i += group.lanes) {
      for (int64_t l = j + 1; l <= i; ++l) root[i * rows + l] -= root[i * rows + j] * root[l * rows + j];
    }
    group.sync();
  }
  return true;
}

// x [rows]: root root^T x = the unit vector of the slot.
template <class Group>
DEFTCORE_HD void solve_unit(const Group& group, const double* root, int64_t rows, int64_t slot, double* x) {
  for (int64_t i = group.lane; i < rows; i += group.lanes) x[i] = i == slot ? 1.0 : 0.0;
  group.sync();
  for (int64_t j = slot; j < rows; ++j) {
    if (group.lane == 0) x[j] /= root[j * rows + j];
    group.sync();
    for (int64_t i = j + 1 + group.lane; i < rows; i += group.lanes) x[i] -= root[i * rows + j] * x[j];
    group.sync();
  }
  for (int64_t j = rows - 1; j >= 0; --j) {
    if (group.lane == 0) x[j] /= root[j * rows + j];
    group.sync();
    for (int64_t i = group.lane; i < j; i += group.lanes) x[i] -= root[j * rows + i] * x[j];
    group.sync();
  }
}

// Once the slot's row and column of K are there: the coefficients c of N = sum_j c_j h_j. Where K + ridge has no
// factor the window starts anew: c[0] is then that of R, whose row 0 becomes, or that of R where |R|^2 is not finite.
template <class Group>
DEFTCORE_HD void solve_window(const Group& group, const GaloreStepArgs& args, const GaloreMatrix& m, double* root,
                              double* c) {
  const int64_t rows = rows_of(m);
  double trace = 0;
  for (int64_t i = 0; i < rows; ++i) trace += m.gram[i * m.rows + i];
  const Ridge ridge = ridge_of(args.damping, args.relative, args.mean, trace, rows);
  if (factorise(group, m, ridge.value, root)) {
    solve_unit(group, root, rows, m.slot, c);
    for (int64_t i = group.lane; i < rows; i += group.lanes) c[i] *= ridge.factor;
    if (group.lane == 0) *m.outcome = kHeld;
    return;
  }
  const double square = m.gram[m.slot * m.rows + m.slot];
  const bool alone = is_finite(square);
  const Ridge own = ridge_of(args.damping, args.relative, args.mean, square, 1);
  group.sync();
  for (int64_t i = group.lane; i < m.rows * m.rows; i += group.lanes) m.gram[i] = 0;
  group.sync();
  if (group.lane != 0) return;
  if (alone) {
    m.gram[0] = square;
    c[0] = own.factor / (own.value + square);
  } else {
    c[0] = is_finite(own.value) ? own.factor / own.value : 1.0;  // a relative one is infinite, or no number
  }
  *m.failures += 1;
  *m.outcome = alone ? kAlone : kEmpty;
}

}  // namespace deftcore
