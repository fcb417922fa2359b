// quantise, decode and the products against plain loops in double, on exactly sized buffers.
#include "check.h"
#include "deftcore/ops.h"

using namespace deftcore;

namespace {

struct Matrix {
  std::vector<float> w, absmax, nested_absmax, nested_code;
  std::vector<uint8_t> packed, nested;
  Quant4 view;

  Matrix(int64_t rows, int64_t cols, int64_t block) {
    const int64_t count = rows * cols;
    w = random_floats(static_cast<size_t>(count), 1);
    packed.assign(static_cast<size_t>((count + 1) / 2), 0xa5);
    absmax.assign(static_cast<size_t>((count + block - 1) / block), NAN);
    device::quantize_4bit({w.data(), packed.data(), absmax.data(), count, block, DType::kFloat32, QuantType::kNf4},
                          nullptr);
    view = {packed.data(), kNf4Code, absmax.data(), nullptr, nullptr, 0.0f, rows, cols, block};
  }

  // Gives the blocks other scales, of the two-level kind.
  void nest() {
    for (size_t i = 0; i < absmax.size(); ++i) nested.push_back(static_cast<uint8_t>(i));
    nested_code = random_floats(256, 5);
    nested_absmax = random_floats((absmax.size() + 255) / 256, 6);
    view.absmax = nested.data();
    view.nested_absmax = nested_absmax.data();
    view.nested_code = nested_code.data();
    view.nested_offset = 0.75f;
  }

  int nibble(int64_t flat) const { return packed[static_cast<size_t>(flat / 2)] >> (flat % 2 ? 0 : 4) & 15; }

  double at(int64_t row, int64_t col) const {
    const int64_t flat = row * view.cols + col;
    const auto block =
        static_cast<size_t>(view.column_blocks ? row / view.block_size * view.cols + col : flat / view.block_size);
    float scale = absmax[block];
    if (!nested.empty()) {
      scale = nested_code[nested[block]] * nested_absmax[block / 256];
      scale += view.nested_offset;
    }
    return static_cast<double>(kNf4Code[nibble(flat)] * scale);
  }
};

// Each weight has the nearest code of its block's scale.
void test_quantize(const Matrix& q) {
  const auto size = static_cast<size_t>(q.view.block_size);
  for (size_t i = 0; i < q.w.size(); ++i) {
    double largest = 0, nearest = 1e9;
    for (size_t j = i / size * size; j < q.w.size() && j < (i / size + 1) * size; ++j) {
      largest = std::fmax(largest, std::fabs(q.w[j]));
    }
    const double scale = q.absmax[i / size];
    CHECK(scale == largest);
    for (const float code : kNf4Code) nearest = std::fmin(nearest, std::fabs(q.w[i] - code * scale));
    CHECK(std::fabs(q.w[i] - kNf4Code[q.nibble(static_cast<int64_t>(i))] * scale) < nearest + 1e-6);
  }
}

// A weight in the middle of two codes takes the lower; a block with an infinite weight has no scale.
void test_edges() {
  std::vector<float> w(64, 1.0f), absmax(2);
  std::vector<uint8_t> packed(32);
  for (size_t j = 0; j < 15; ++j) w[j] = (kNf4Code[j] + kNf4Code[j + 1]) * 0.5f;
  w[40] = INFINITY;
  device::quantize_4bit({w.data(), packed.data(), absmax.data(), 64, 32, DType::kFloat32, QuantType::kNf4}, nullptr);
  for (size_t j = 0; j < 16; ++j) CHECK((packed[j / 2] >> (j % 2 ? 0 : 4) & 15) == static_cast<int>(j));
  CHECK(absmax[0] == 1.0f);
  CHECK(std::isnan(absmax[1]));
}

// The codes also from inside a wider buffer, where they start at any byte.
void test_dequantize(const Matrix& w) {
  for (const size_t offset : {0, 1, 2, 4}) {
    std::vector<uint8_t> buffer(offset);
    buffer.insert(buffer.end(), w.packed.begin(), w.packed.end());
    Quant4 view = w.view;
    view.packed = buffer.data() + offset;
    std::vector<float> out(static_cast<size_t>(w.view.rows * w.view.cols), NAN);
    device::dequantize_4bit({view, out.data(), DType::kFloat32}, nullptr);
    for (int64_t i = 0; i < w.view.rows; ++i) {
      for (int64_t j = 0; j < w.view.cols; ++j) {
        CHECK(static_cast<double>(out[static_cast<size_t>(i * w.view.cols + j)]) == w.at(i, j));
      }
    }
  }
}

// Both directions, with the low-rank term, for as many tokens as the device takes; the CPU alone has the backward.
void test_linear(const Matrix& w, int64_t tokens, int64_t rank) {
  const int64_t rows = w.view.rows, cols = w.view.cols;
  for (bool backward : {false, true}) {
    const int64_t inputs = backward ? rows : cols, outputs = backward ? cols : rows;
    const std::vector<float> x = random_floats(static_cast<size_t>(tokens * inputs), 2);
    const std::vector<float> low = random_floats(static_cast<size_t>(tokens * rank), 3);
    const std::vector<float> lora = random_floats(static_cast<size_t>(outputs * rank), 4);
    const std::vector<float> bias = random_floats(static_cast<size_t>(rows), 5);
    std::vector<float> y(static_cast<size_t>(tokens * outputs), NAN);
    Linear4bitArgs args{
        w.view, x.data(),       backward ? nullptr : bias.data(), low.data(), lora.data(), y.data(), nullptr, tokens,
        rank,   DType::kFloat32};
    if (!backward && tokens > device::linear_4bit_tokens(w.view, DType::kFloat32)) continue;
    const Room workspace((backward ? cpu::linear_4bit_backward_workspace : device::linear_4bit_workspace)(args));
    args.workspace = workspace.data();
    (backward ? cpu::linear_4bit_backward : device::linear_4bit)(args, nullptr);
    for (int64_t m = 0; m < tokens; ++m) {
      for (int64_t o = 0; o < outputs; ++o) {
        double ref = backward ? 0 : bias[static_cast<size_t>(o)];
        for (int64_t i = 0; i < inputs; ++i) {
          ref += static_cast<double>(x[static_cast<size_t>(m * inputs + i)]) * (backward ? w.at(i, o) : w.at(o, i));
        }
        for (int64_t r = 0; r < rank; ++r) {
          ref += static_cast<double>(low[static_cast<size_t>(m * rank + r)]) *
                 static_cast<double>(lora[static_cast<size_t>(backward ? r * outputs + o : o * rank + r)]);
        }
        CHECK(close(static_cast<double>(y[static_cast<size_t>(m * outputs + o)]), ref, 1e-3));
      }
    }
  }
}

}  // namespace

int main() {
  return run_tests([] {
    const int64_t shapes[][3] = {{5, 7, 32},    {3, 5, 32},    {3, 33, 64},   {8, 32, 64},
                                 {4, 96, 64},   {70, 128, 64}, {20, 544, 32}, {9, 1024, 1024},
                                 {300, 32, 32}, {3, 2080, 32}, {0, 64, 64},   {7, 0, 32}};
    for (const auto& s : shapes) {
      Matrix w(s[0], s[1], s[2]);
      test_quantize(w);
      test_dequantize(w);
      for (int64_t tokens : {0, 1, 3, 8, 14, 17, 70}) test_linear(w, tokens, tokens % 2 ? 0 : 5);
      w.nest();
      test_dequantize(w);
      test_linear(w, 3, 0);
    }
    for (const int64_t cols : {6, 24}) {
      Matrix w(64, cols, 32);
      w.view.column_blocks = true;
      test_dequantize(w);
    }
    test_edges();
    CHECK(refused("quantize_4bit", [] {
      device::quantize_4bit({nullptr, nullptr, nullptr, 0, 48, DType::kFloat32, QuantType::kNf4}, nullptr);
    }));
  });
}
