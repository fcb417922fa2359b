// Products in 16 bits against double precision, in all layouts, on exactly sized buffers so that the sanitizers see any
// overrun.
#include "check.h"
#include "deftcore/ops.h"

using namespace deftcore;

namespace {

// bfloat16 by cutting bits off: which numbers they are does not matter.
struct Matrix {
  int64_t rows, columns, row, column;
  std::vector<uint16_t> bits;

  Matrix(int64_t r, int64_t c, bool transposed, unsigned seed)
      : rows(r), columns(c), row(transposed ? 1 : c), column(transposed ? r : 1) {
    for (float x : random_floats(static_cast<size_t>(r * c), seed)) {
      uint32_t word;
      std::memcpy(&word, &x, 4);
      bits.push_back(static_cast<uint16_t>(word >> 16));
    }
  }
  static double value(uint16_t half) {
    const uint32_t word = static_cast<uint32_t>(half) << 16;
    float x;
    std::memcpy(&x, &word, 4);
    return x;
  }
  double at(int64_t r, int64_t c) const { return value(bits[static_cast<size_t>(r * row + c * column)]); }
};

void test(int64_t rows, int64_t inner, int64_t columns, bool a_transposed, bool b_transposed, float beta) {
  const Matrix a(rows, inner, a_transposed, 1), b(inner, columns, b_transposed, 2), bias(1, columns, false, 3),
      old(rows, columns, false, 4);
  std::vector<uint16_t> c = old.bits;
  ProductArgs args{a.bits.data(), b.bits.data(),   bias.bits.data(), c.data(), nullptr,  rows,    inner,
                   columns,       a.row,           a.column,         b.row,    b.column, columns, -1.5f,
                   beta,          DType::kBFloat16};
  const Room workspace(cpu::product_workspace(args));
  args.workspace = workspace.data();
  cpu::product(args, nullptr);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < inner; ++k) {
        sum += a.at(i, k) * b.at(k, j);
        size += std::fabs(a.at(i, k) * b.at(k, j));
      }
      const double wanted = -1.5 * sum + bias.at(0, j) + beta * old.at(i, j);
      const double found = Matrix::value(c[static_cast<size_t>(i * columns + j)]);
      CHECK(std::fabs(found - wanted) <= std::ldexp(std::fabs(wanted), -8) + 2e-6 * (size + 4) + 1e-6);
    }
  }
}

}  // namespace

int main() {
  return run_tests([] {
    const int64_t shapes[][3] = {{0, 3, 2},   {3, 0, 2},   {1, 1, 1},    {1, 70, 33},  {4, 300, 49},  {5, 9, 3},
                                 {8, 65, 50}, {9, 65, 50}, {70, 8, 193}, {40, 9, 400}, {260, 257, 30}};
    for (const auto& s : shapes) {
      for (int layout = 0; layout < 4; ++layout) {
        test(s[0], s[1], s[2], layout & 1, layout & 2, 0.0f);
        test(s[0], s[1], s[2], layout & 1, layout & 2, 0.5f);
      }
    }
    ProductArgs wrong{};
    wrong.a_row = wrong.a_inner = 2;
    CHECK(refused("product", [&] { cpu::product(wrong, nullptr); }));
  });
}
