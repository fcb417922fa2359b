// sparse_down and sparse_mlp against plain loops in double, on exactly sized buffers.
#include <algorithm>

#include "check.h"
#include "deftcore/ops.h"

using namespace deftcore;

namespace {

// Tokens that read rows together.
#if defined(DEFTCORE_TEST_CUDA)
constexpr int64_t kTogether = 4;
#else
constexpr int64_t kTogether = kMaxSparseTokens;
#endif

// The most neurons that are active in any of the tokens that read together.
template <class IsActive>
int64_t active_set(int64_t tokens, int64_t neurons, IsActive&& is_active) {
  int64_t most = 0;
  for (int64_t first = 0; first < tokens; first += kTogether) {
    int64_t count = 0;
    for (int64_t i = 0; i < neurons; ++i) {
      bool any = false;
      for (int64_t m = first; m < std::min(first + kTogether, tokens); ++m) any = any || is_active(m, i);
      count += any;
    }
    most = std::max(most, count);
  }
  return most;
}

void test_down(int64_t tokens, int64_t neurons, int64_t width, int64_t stride) {
  std::vector<float> a = random_floats(static_cast<size_t>(tokens * neurons), 1);
  // Rows of inactive neurons are poisoned: reading one would show.
  std::vector<float> w = random_floats(static_cast<size_t>((neurons - 1) * stride + width), 2);
  const std::vector<float> bias = random_floats(static_cast<size_t>(width), 3);
  int64_t expected_rows = 0;
  for (int64_t i = 0; i < neurons; ++i) {
    if (i % 3 == 0) {
      expected_rows += tokens > 0;
      // Later tokens, of other blocks on a GPU, have fewer.
      for (int64_t m = 4; m < tokens && 3 * i < 2 * neurons; ++m) a[static_cast<size_t>(m * neurons + i)] = 0.0f;
      continue;
    }
    for (int64_t m = 0; m < tokens; ++m) a[static_cast<size_t>(m * neurons + i)] = m % 2 ? 0.0f : -0.0f;
    for (int64_t j = 0; j < width; ++j) w[static_cast<size_t>(i * stride + j)] = NAN;
  }
  std::vector<float> y(static_cast<size_t>(tokens * width), NAN);
  int64_t rows_read = -1;
  SparseDownArgs args{a.data(), w.data(), bias.data(), y.data(),      nullptr,         &rows_read, tokens,
                      neurons,  width,    stride,      expected_rows, DType::kFloat32, 0.0f};
  const Room workspace(device::sparse_down_workspace(args));
  args.workspace = workspace.data();
  device::sparse_down(args, nullptr);
  CHECK(rows_read == expected_rows);
  for (int64_t m = 0; m < tokens; ++m) {
    for (int64_t j = 0; j < width; ++j) {
      double ref = bias[static_cast<size_t>(j)];
      for (int64_t i = 0; i < neurons; i += 3) {
        ref += static_cast<double>(a[static_cast<size_t>(m * neurons + i)]) * w[static_cast<size_t>(i * stride + j)];
      }
      CHECK(close(y[static_cast<size_t>(m * width + j)], ref, 1e-4));
    }
  }
  y.assign(y.size(), 42.0f);
  args.capacity = expected_rows - 1;
  device::sparse_down(args, nullptr);
  CHECK(rows_read == expected_rows);
  for (float v : y) CHECK(v == 42.0f);  // overflow writes nothing
}

// Rows of the three weights lie `gap` floats apart, twice and three times as many.
void test_gated(int64_t tokens, int64_t neurons, int64_t width, int64_t gap) {
  const auto rows = [&](int64_t more, unsigned seed) {
    return random_floats(static_cast<size_t>(neurons * (width + gap + more)), seed);
  };
  const std::vector<float> x = random_floats(static_cast<size_t>(tokens * width), 1), gate = rows(0, 2),
                           up = rows(gap, 3), down = rows(2 * gap, 4);
  std::vector<float> y(x.size(), NAN);
  int64_t rows_read = -1;
  SparseMlpArgs args{x.data(),        nullptr, gate.data(),     up.data(),         down.data(),
                     nullptr,         nullptr, y.data(),        nullptr,           &rows_read,
                     tokens,          neurons, width,           width + gap,       width + 2 * gap,
                     width + 3 * gap, neurons, DType::kFloat32, Activation::kRelu, 0.0f};
  const Room workspace(device::sparse_mlp_workspace(args));
  args.workspace = workspace.data();
  device::sparse_mlp(args, nullptr);
  const auto dot = [&](const std::vector<float>& w, int64_t stride, int64_t m, int64_t i) {
    double sum = 0;
    for (int64_t j = 0; j < width; ++j) {
      sum += static_cast<double>(x[static_cast<size_t>(m * width + j)]) * w[static_cast<size_t>(i * stride + j)];
    }
    return sum;
  };
  for (int64_t m = 0; m < tokens; ++m) {
    std::vector<double> ref(static_cast<size_t>(width));
    for (int64_t i = 0; i < neurons; ++i) {
      const double g = dot(gate, args.gate_stride, m, i);
      if (g <= 0) continue;
      const double h = g * dot(up, args.up_stride, m, i);
      for (int64_t j = 0; j < width; ++j) {
        ref[static_cast<size_t>(j)] += h * down[static_cast<size_t>(i * args.down_stride + j)];
      }
    }
    for (int64_t j = 0; j < width; ++j) {
      CHECK(std::fabs(y[static_cast<size_t>(m * width + j)] - ref[static_cast<size_t>(j)]) <=
            1e-4 * static_cast<double>(neurons) * std::sqrt(static_cast<double>(width)));
    }
  }
  CHECK(rows_read ==
        active_set(tokens, neurons, [&](int64_t m, int64_t i) { return dot(gate, args.gate_stride, m, i) > 0; }));
  y.assign(y.size(), 42.0f);
  args.capacity = rows_read - 1;
  device::sparse_mlp(args, nullptr);
  for (float v : y) CHECK(v == 42.0f);
}

// Without a gate: its biases, and the pre-activation computed here or by the caller.
void test_plain(int64_t tokens, int64_t neurons, int64_t width) {
  const auto floats = [](int64_t n, unsigned seed) { return random_floats(static_cast<size_t>(n), seed); };
  const std::vector<float> x = floats(tokens * width, 1), up = floats(neurons * width, 2),
                           down = floats(neurons * width, 3), b_up = floats(neurons, 4), b_down = floats(width, 5);
  std::vector<float> z, y(x.size(), NAN), ref;
  for (int64_t m = 0; m < tokens; ++m) {
    std::vector<double> sums(b_down.begin(), b_down.end());
    for (int64_t i = 0; i < neurons; ++i) {
      double pre = b_up[static_cast<size_t>(i)];
      for (int64_t j = 0; j < width; ++j) {
        pre += static_cast<double>(x[static_cast<size_t>(m * width + j)]) * up[static_cast<size_t>(i * width + j)];
      }
      z.push_back(static_cast<float>(pre));
      for (int64_t j = 0; j < width && pre > 0; ++j) {
        sums[static_cast<size_t>(j)] += pre * down[static_cast<size_t>(i * width + j)];
      }
    }
    ref.insert(ref.end(), sums.begin(), sums.end());
  }
  for (const float* given : {static_cast<const float*>(nullptr), static_cast<const float*>(z.data())}) {
    int64_t rows_read = -1;
    SparseMlpArgs args{x.data(), given,   nullptr,    up.data(),       down.data(),       b_up.data(), b_down.data(),
                       y.data(), nullptr, &rows_read, tokens,          neurons,           width,       width,
                       width,    width,   neurons,    DType::kFloat32, Activation::kRelu, 0.0f};
    const Room workspace(device::sparse_mlp_workspace(args));
    args.workspace = workspace.data();
    y.assign(y.size(), NAN);
    device::sparse_mlp(args, nullptr);
    for (size_t i = 0; i < y.size(); ++i) CHECK(close(y[i], ref[i], 1e-4));
  }
}

// 4-bit weights, rows or columns of blocks, with low-rank terms; gated or, where `activated`, a plain MLP from its
// activation on. W_down's codes start at any byte.
void test_mlp4(int64_t tokens, int64_t neurons, int64_t width, int64_t block, bool columns, bool activated,
               size_t down_offset = 0) {
  const size_t count = static_cast<size_t>(neurons * width);
  const int64_t rank = 3;
  std::vector<uint8_t> packed[2];
  std::vector<float> absmax[2];
  for (int i = 0; i < 2; ++i) {
    const std::vector<float> w = random_floats(count, 10 + static_cast<unsigned>(i));
    const size_t offset = i == 1 ? down_offset : 0;
    packed[i].reserve(1);  // an address, since none means a plain MLP
    packed[i].resize(offset + count / 2);
    absmax[i].resize(count / static_cast<size_t>(block));
    device::quantize_4bit({w.data(), packed[i].data() + offset, absmax[i].data(), neurons * width, block,
                           DType::kFloat32, QuantType::kNf4},
                          nullptr);
  }
  Quant4 up{packed[0].data(), kNf4Code, absmax[0].data(), nullptr, nullptr, 0.0f, neurons, width, block, false};
  Quant4 down = up;
  down.packed = packed[1].data() + down_offset;
  down.absmax = absmax[1].data();
  down.column_blocks = columns;
  if (activated) up.packed = nullptr;
  const auto at = [&](const Quant4& q, int64_t row, int64_t col) {
    const int64_t flat = row * width + col;
    const int64_t scale = q.column_blocks ? row / block * width + col : flat / block;
    return static_cast<double>(kNf4Code[q.packed[flat / 2] >> (flat % 2 ? 0 : 4) & 15]) *
           static_cast<double>(static_cast<const float*>(q.absmax)[scale]);
  };
  const auto floats = [](int64_t n, unsigned seed) { return random_floats(static_cast<size_t>(n), seed); };
  const std::vector<float> x = floats(tokens * width, 1), z = floats(tokens * neurons, 2),
                           up_low = floats(tokens * rank, 3), up_lora = floats(neurons * rank, 4),
                           down_lora = floats(neurons * rank, 5), bias = floats(width, 6);
  std::vector<float> y(x.size(), NAN), down_low(static_cast<size_t>(tokens * rank), NAN);
  int64_t rows_read = -1;
  SparseMlp4bitArgs args{x.data(),         z.data(),          up,          down,     up_low.data(), up_lora.data(),
                         down_lora.data(), down_low.data(),   bias.data(), y.data(), nullptr,       &rows_read,
                         tokens,           neurons,           width,       rank,     rank,          neurons,
                         DType::kFloat32,  Activation::kRelu, activated,   0.0f};
  const Room workspace(device::sparse_mlp_4bit_workspace(args));
  args.workspace = workspace.data();
  device::sparse_mlp_4bit(args, nullptr);
  const auto value = [](const std::vector<float>& v, int64_t i) {
    return static_cast<double>(v[static_cast<size_t>(i)]);
  };
  CHECK(rows_read == active_set(tokens, neurons, [&](int64_t m, int64_t i) {
          return activated ? value(z, m * neurons + i) != 0 : value(z, m * neurons + i) > 0;
        }));
  for (int64_t m = 0; m < tokens; ++m) {
    std::vector<double> ref(bias.begin(), bias.end()), low(static_cast<size_t>(rank));
    for (int64_t i = 0; i < neurons; ++i) {
      double h = value(z, m * neurons + i);
      if (!activated && h <= 0) continue;
      double dot = 0;
      for (int64_t j = 0; j < width && !activated; ++j) dot += value(x, m * width + j) * at(up, i, j);
      for (int64_t r = 0; r < rank; ++r) dot += value(up_low, m * rank + r) * value(up_lora, i * rank + r);
      if (!activated) h *= dot;
      for (int64_t j = 0; j < width; ++j) ref[static_cast<size_t>(j)] += h * at(down, i, j);
      for (int64_t r = 0; r < rank; ++r) low[static_cast<size_t>(r)] += h * value(down_lora, i * rank + r);
    }
    for (int64_t j = 0; j < width; ++j) CHECK(close(value(y, m * width + j), ref[static_cast<size_t>(j)], 1e-3));
    for (int64_t r = 0; r < rank; ++r) CHECK(close(value(down_low, m * rank + r), low[static_cast<size_t>(r)], 1e-3));
  }
#if !defined(DEFTCORE_TEST_CUDA)
  if (!activated) {  // x rounded to int8 where it meets W_up: near the exact result, row for row
    const std::vector<float> exact = y;
    const Room rounding(device::sparse_mlp_4bit_int8_workspace(args));
    args.workspace = rounding.data();
    y.assign(y.size(), NAN);
    rows_read = -1;
    device::sparse_mlp_4bit_int8(args, nullptr);
    double error = 0, size = 0;
    for (size_t i = 0; i < y.size(); ++i) {
      error += (y[i] - exact[i]) * (y[i] - exact[i]);
      size += exact[i] * exact[i];
    }
    CHECK(error <= 4e-4 * size);
    args.workspace = workspace.data();
  }
#endif
  y.assign(y.size(), 42.0f);
  down_low.assign(down_low.size(), 42.0f);
  args.capacity = rows_read - 1;
  device::sparse_mlp_4bit(args, nullptr);
  for (float v : y) CHECK(v == 42.0f);
  for (float v : down_low) CHECK(v == 42.0f);
}

}  // namespace

int main() {
  return run_tests([] {
    const int64_t shapes[][3] = {{7, 5, 5},     {70, 0, 0},      {0, 5, 5},      {64, 64, 64}, {66, 64, 65},
                                 {65, 63, 130}, {200, 129, 129}, {33, 300, 600}, {600, 12, 12}};
    for (const auto& s : shapes) {
      for (int64_t tokens : {0, 1, 2, 6, 7, 64}) test_down(tokens, s[0], s[1], s[2]);
    }
    for (int64_t tokens : {0, 1, 5, 13, 64}) {
      test_gated(tokens, 50, 33, 0);
      test_gated(tokens, 128, 64, 4);
      test_gated(tokens, 0, 33, 0);
      test_gated(tokens, 50, 0, 0);
      test_plain(tokens, 65, 33);
      test_plain(tokens, 64, 64);
      test_plain(tokens, 0, 33);
    }
    for (int64_t tokens : {0, 1, 2, 9, 64}) {
      for (bool columns : {false, true}) {
        for (size_t offset : {0, 1, 2}) test_mlp4(tokens, 64, 64, 32, columns, false, offset);
        test_mlp4(tokens, 128, 192, 64, columns, false);
        test_mlp4(tokens, 256, 384, 128, columns, false);
        test_mlp4(tokens, 64, 96, 32, columns, true);
        test_mlp4(tokens, 0, 64, 32, columns, false);
        test_mlp4(tokens, 64, 0, 32, columns, false);
      }
      test_mlp4(tokens, 64, 66, 32, true, true);
    }
    test_mlp4(5, 64, 1984, 32, false, false);
    SparseDownArgs bad{};
    bad.tokens = 65;
    CHECK(refused("sparse_down", [&] { device::sparse_down(bad, nullptr); }));
  });
}
