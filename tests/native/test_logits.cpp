// The kernels on logits against double-precision formulas, on exactly sized buffers so that the sanitizers see any
// overrun.
#include <algorithm>

#include "check.h"
#include "deftcore/ops.h"

using namespace deftcore;

namespace {

struct Shape {
  int64_t rows, width, stride, begin, end;
};

struct Problem {
  Shape s;
  std::vector<float> z, t;
  std::vector<uint8_t> mask;

  explicit Problem(const Shape& shape)
      : s(shape),
        z(random_floats(static_cast<size_t>(s.rows * s.stride), 1)),
        t(random_floats(z.size(), 2)),
        mask(static_cast<size_t>(s.rows)) {
    for (size_t r = 0; r < mask.size(); ++r) mask[r] = r % 4 != 1;
    if (s.rows > 0 && s.width > 3) z[2] = t[1] = -INFINITY;
    if (s.rows > 0 && s.width > 3) t[2] = -INFINITY;  // where the student has no probability, the teacher has none
  }
  double at(const std::vector<float>& logits, int64_t r, int64_t v) const {
    return logits[static_cast<size_t>(r * s.stride + v)];
  }
  double finite(int64_t r, int64_t v) const { return std::isinf(at(z, r, v)) ? 0.0 : at(z, r, v); }
  // log of the softmax of a row times `sharpness`
  std::vector<double> log_softmax(const std::vector<float>& logits, int64_t r, double sharpness) const {
    double largest = -INFINITY, sum = 0;
    for (int64_t v = 0; v < s.width; ++v) largest = std::max(largest, at(logits, r, v));
    for (int64_t v = 0; v < s.width; ++v) sum += std::exp((at(logits, r, v) - largest) * sharpness);
    std::vector<double> found;
    for (int64_t v = 0; v < s.width; ++v) found.push_back((at(logits, r, v) - largest) * sharpness - std::log(sum));
    return found;
  }
};

double times_log(double p, double log) { return p > 0 ? p * log : 0.0; }

void test_rows(const Shape& shape, bool teacher, float entropy_sharpness) {
  const Problem problem(shape);
  const auto [rows, width, stride, begin, end] = shape;
  const float sharpness = 0.6f;
  std::vector<float> stats(static_cast<size_t>(rows * kRowStats), NAN);
  const LogitRowsArgs args{problem.z.data(),
                           teacher ? problem.t.data() : nullptr,
                           problem.mask.data(),
                           stats.data(),
                           rows,
                           width,
                           stride,
                           DType::kFloat32,
                           sharpness,
                           entropy_sharpness};
  device::logit_rows(args, nullptr);
  const int64_t most = std::min<int64_t>(3, width), rank = 3, columns = end - begin;
  const std::vector<float> slopes = random_floats(3, 3), kept_grad = random_floats(static_cast<size_t>(rows * most), 4),
                           left = random_floats(static_cast<size_t>(rows * rank), 5),
                           right = random_floats(static_cast<size_t>(rank * columns), 6);
  std::vector<int32_t> kept(kept_grad.size(), -1);
  for (size_t i = 0; i < kept.size(); ++i) {
    if (i % 5 != 3)
      kept[i] = static_cast<int32_t>((static_cast<int64_t>(i % static_cast<size_t>(most)) * 7 + 2) % width);
  }
  std::vector<float> grad(problem.z.size(), NAN);
  device::logit_rows_backward({args, slopes.data(), kept.data(), kept_grad.data(), left.data(), right.data(),
                               grad.data(), begin, end, most, rank},
                              nullptr);
  for (int64_t r = 0; r < rows; ++r) {
    const float* found = stats.data() + r * kRowStats;
    const float* slope = grad.data() + r * stride;
    for (int64_t v = 0; v < stride; ++v) CHECK((v < begin || v >= end) == std::isnan(slope[v]));
    if (problem.mask[static_cast<size_t>(r)] == 0) {
      for (int64_t i = 0; i < kRowStats; ++i) CHECK(found[i] == 0.0f);
      for (int64_t v = begin; v < end; ++v) CHECK(slope[v] == 0.0f);
      continue;
    }
    const auto q = problem.log_softmax(problem.z, r, sharpness), p = problem.log_softmax(problem.t, r, sharpness);
    const auto e = problem.log_softmax(problem.z, r, entropy_sharpness);
    double divergence = 0, entropy = 0, squares = 0;
    for (int64_t v = 0; v < width; ++v) {
      const auto i = static_cast<size_t>(v);
      if (std::exp(p[i]) > 0) divergence += std::exp(p[i]) * (p[i] - q[i]);
      entropy -= times_log(std::exp(e[i]), e[i]);
      squares += problem.finite(r, v) * problem.finite(r, v);
    }
    CHECK(close(found[kSquares], squares, 1e-5));
    CHECK(close(found[kDivergence], teacher ? divergence : 0.0, 1e-5));
    CHECK(close(found[kEntropy], entropy_sharpness != 0 ? entropy : 0.0, 1e-5));
    for (int64_t v = begin; v < end; ++v) {
      const auto i = static_cast<size_t>(v);
      double expected = 0;
      if (!std::isinf(problem.at(problem.z, r, v))) {
        expected += slopes[2] * problem.at(problem.z, r, v);
        for (int64_t j = 0; j < rank; ++j) {
          expected += left[static_cast<size_t>(r * rank + j)] * right[static_cast<size_t>(j * columns + v - begin)];
        }
        if (entropy_sharpness != 0) expected += slopes[1] * std::exp(e[i]) * (e[i] + entropy);
      }
      if (teacher) expected += slopes[0] * (std::exp(q[i]) - std::exp(p[i]));
      for (int64_t j = 0; j < most; ++j) {
        if (kept[static_cast<size_t>(r * most + j)] == v) expected += kept_grad[static_cast<size_t>(r * most + j)];
      }
      CHECK(close(slope[v], expected, 1e-5));
    }
  }
}

#if !defined(DEFTCORE_TEST_CUDA)
void test_top(const Shape& shape) {
  const Problem problem(shape);
  for (const int64_t most : {int64_t{1}, std::min<int64_t>(5, shape.width), shape.width}) {
    std::vector<int32_t> top(static_cast<size_t>(shape.rows * most), 99);
    cpu::top_logits({problem.z.data(), problem.mask.data(), top.data(), shape.rows, shape.width, shape.stride, most,
                     DType::kFloat32},
                    nullptr);
    for (int64_t r = 0; r < shape.rows; ++r) {
      std::vector<int32_t> expected;
      for (int32_t v = 0; v < shape.width; ++v) {
        if (problem.mask[static_cast<size_t>(r)] != 0 && !std::isinf(problem.at(problem.z, r, v)))
          expected.push_back(v);
      }
      std::stable_sort(expected.begin(), expected.end(),
                       [&](int32_t a, int32_t b) { return problem.at(problem.z, r, a) > problem.at(problem.z, r, b); });
      expected.resize(static_cast<size_t>(most), -1);
      std::vector<int32_t> found(top.begin() + r * most, top.begin() + (r + 1) * most);
      std::sort(found.begin(), found.end());
      std::sort(expected.begin(), expected.end());
      CHECK(found == expected);
    }
  }
}

// NaN is above all numbers, and a heap full of it takes nothing from behind the row.
void test_top_of_nan(int64_t width) {
  for (const int64_t most : {int64_t{1}, std::min<int64_t>(5, width), width}) {
    const std::vector<float> z(static_cast<size_t>(width), NAN);
    std::vector<int32_t> top(static_cast<size_t>(most), 99);
    cpu::top_logits({z.data(), nullptr, top.data(), 1, width, width, most, DType::kFloat32}, nullptr);
    std::sort(top.begin(), top.end());
    for (int64_t i = 0; i < most; ++i) CHECK(top[static_cast<size_t>(i)] == i);
  }
}

void test_products(const Shape& shape, int64_t rank) {
  const Problem problem(shape);
  const auto [rows, width, stride, begin, end] = shape;
  const int64_t columns = end - begin;
  std::vector<float> of_rows(static_cast<size_t>(rows * rank), NAN),
      of_columns = random_floats(static_cast<size_t>(rank * columns), 3);
  LogitProductArgs args{problem.z.data(),
                        problem.mask.data(),
                        of_rows.data(),
                        of_columns.data(),
                        rows,
                        stride,
                        begin,
                        end,
                        rank,
                        DType::kFloat32,
                        false};
  cpu::logit_product(args, nullptr);
  const auto value = [&](int64_t r, int64_t v) {
    return problem.mask[static_cast<size_t>(r)] != 0 ? problem.finite(r, begin + v) : 0.0;
  };
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < rank; ++j) {
      double expected = 0;
      for (int64_t v = 0; v < columns; ++v) expected += value(r, v) * of_columns[static_cast<size_t>(j * columns + v)];
      CHECK(close(of_rows[static_cast<size_t>(r * rank + j)], expected, 1e-4));
    }
  }
  of_rows = random_floats(of_rows.size(), 4);
  std::fill(of_columns.begin(), of_columns.end(), NAN);
  args.of_rows = of_rows.data(), args.of_columns = of_columns.data(), args.transposed = true;
  cpu::logit_product(args, nullptr);
  for (int64_t j = 0; j < rank; ++j) {
    for (int64_t v = 0; v < columns; ++v) {
      double expected = 0;
      for (int64_t r = 0; r < rows; ++r) expected += value(r, v) * of_rows[static_cast<size_t>(r * rank + j)];
      CHECK(close(of_columns[static_cast<size_t>(j * columns + v)], expected, 1e-5));
    }
  }
}
#endif

}  // namespace

int main() {
  return run_tests([] {
    const Shape shapes[] = {{1, 1, 1, 0, 1},          {3, 15, 15, 0, 15},    {9, 16, 16, 0, 16},
                            {10, 17, 20, 3, 16},      {4, 264, 264, 0, 264}, {2, 1032, 1040, 8, 1024},
                            {5, 2051, 2053, 1, 2050}, {17, 64, 64, 16, 48},  {5, 16, 18, 0, 16},
                            {3, 16, 20, 3, 15},       {0, 4, 4, 0, 4}};
    for (const Shape& shape : shapes) {
      for (const bool teacher : {false, true}) {
        for (const float entropy_sharpness : {0.0f, 1.0f}) test_rows(shape, teacher, entropy_sharpness);
      }
#if !defined(DEFTCORE_TEST_CUDA)
      test_top(shape);
      for (const int64_t rank : {1, 4, 7}) test_products(shape, rank);
#endif
    }
#if !defined(DEFTCORE_TEST_CUDA)
    for (const int64_t width : {1, 15, 16, 17, 37}) test_top_of_nan(width);
#endif
  });
}
