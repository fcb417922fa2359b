// 4-bit products, 4096 -> 11008, double-quantised scales, cold weights: time, packed bytes per second, GFLOP/s.
#include <algorithm>
#include <cstring>

#include "deftcore/ops.h"
#include "timing.h"

using namespace deftcore;

namespace {

struct Weight {
  std::vector<uint8_t> packed, codes;
  std::vector<float> nested;
};

}  // namespace

int main(int argc, char** argv) {
  const int64_t rows = 11008, cols = 4096, block = 64, blocks = rows * cols / block;
  std::vector<float> book(256);
  for (int i = 0; i < 256; ++i) book[static_cast<size_t>(i)] = static_cast<float>(i - 127) / 128.0f;
  std::minstd_rand engine(1);
  std::vector<Weight> weights(6);  // 140 MB in turn
  for (Weight& w : weights) {
    w.packed.resize(static_cast<size_t>(rows * cols / 2));
    w.codes.resize(static_cast<size_t>(blocks));
    w.nested.assign(static_cast<size_t>(blocks / kNestedBlock + 1), 0.01f);
    for (uint8_t& byte : w.packed) byte = static_cast<uint8_t>(engine() >> 8);
    for (uint8_t& byte : w.codes) byte = static_cast<uint8_t>(engine() >> 8);
  }
  const double bytes = static_cast<double>(rows * cols / 2 + blocks + blocks / kNestedBlock * 4);
  std::printf("linear_4bit 4096 -> 11008 nf4: median [quartiles] ms, GB/s of packed bytes, GFLOP/s\n");
  for (DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (int64_t tokens : {1, 4, 16, 128, 512}) {
      if (argc > 1 && std::atoi(argv[1]) != tokens) continue;
      std::vector<float> x = bench::random_floats(static_cast<size_t>(tokens * rows), 2);
      if (dtype == DType::kBFloat16) {
        for (size_t i = 0; i < x.size(); ++i) {  // the high half of each float, packed in place
          uint32_t bits;
          std::memcpy(&bits, &x[i], 4);
          const uint16_t high = static_cast<uint16_t>(bits >> 16);
          std::memcpy(reinterpret_cast<char*>(x.data()) + 2 * i, &high, 2);
        }
      }
      std::vector<float> y(static_cast<size_t>(tokens * rows));
      size_t turn = 0;
      Linear4bitArgs args{};
      args.x = x.data();
      args.y = y.data();
      args.tokens = tokens;
      args.dtype = dtype;
      const auto next = [&] {
        const Weight& w = weights[turn++ % weights.size()];
        args.w = {w.packed.data(), kNf4Code, w.codes.data(), w.nested.data(), book.data(), 0.05f, rows, cols, block};
      };
      next();
      std::vector<char> workspace(
          std::max(cpu::linear_4bit_workspace(args), cpu::linear_4bit_backward_workspace(args)) + 64);
      args.workspace = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 63) & ~uintptr_t{63});
      const auto times = bench::alternate({[&] {
                                             next();
                                             cpu::linear_4bit(args, nullptr);
                                           },
                                           [&] {
                                             next();
                                             cpu::linear_4bit_backward(args, nullptr);
                                           }},
                                          tokens > 64 ? 7 : 25);
      const char* names[] = {"forward", "backward"};
      for (int side = 0; side < 2; ++side) {
        const auto& t = times[static_cast<size_t>(side)];
        std::printf("%s %3lld tokens %-8s %8.3f [%.3f, %.3f]  %6.1f  %7.1f\n",
                    dtype == DType::kFloat32 ? "float32 " : "bfloat16", static_cast<long long>(tokens), names[side],
                    t.median * 1e3, t.low * 1e3, t.high * 1e3, bytes / t.median / 1e9,
                    2.0 * static_cast<double>(tokens * rows * cols) / t.median / 1e9);
      }
    }
  }
  return 0;
}
