// sparse_down over densities and tokens, cold weights: time, bytes of weights per second against plain streaming reads.
#include "deftcore/ops.h"
#include "timing.h"

using namespace deftcore;

int main() {
  const int64_t width = 4096, neurons = 11008;
  const size_t count = static_cast<size_t>(width * neurons);
  const std::vector<std::vector<float>> weights = {bench::random_floats(count, 1), bench::random_floats(count, 2)};
  std::printf("sparse_down 4096x11008 float32, two weights in turn: median [quartiles] ms, GB/s, share of streaming\n");
  for (int64_t tokens : {1, 4, 16, 64}) {
    for (double density : {0.05, 0.1, 0.2, 0.5, 1.0}) {
      std::vector<float> a = bench::random_floats(static_cast<size_t>(tokens * neurons), 3);
      std::minstd_rand engine(7);
      for (int64_t i = 0; i < neurons; ++i) {
        if (static_cast<double>(engine() % 100000) >= density * 1e5) {
          for (int64_t m = 0; m < tokens; ++m) a[static_cast<size_t>(m * neurons + i)] = 0.0f;
        }
      }
      std::vector<float> y(static_cast<size_t>(tokens * width));
      int64_t rows_read = 0;
      SparseDownArgs args{a.data(), nullptr, nullptr, y.data(), nullptr,         &rows_read, tokens,
                          neurons,  width,   width,   neurons,  DType::kFloat32, 0.0f};
      std::vector<char> workspace(cpu::sparse_down_workspace(args) + 64);
      args.workspace = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 63) & ~uintptr_t{63});
      size_t turn = 0;
      double sink = 0;
      const auto times =
          bench::alternate({[&] {
                              const std::vector<float>& w = weights[turn++ % 2];
                              double total = 0;
#pragma omp parallel for reduction(+ : total) schedule(static)
                              for (int64_t block = 0; block < static_cast<int64_t>(count / 4096); ++block) {
                                float lanes[16] = {};
                                for (int64_t i = 0; i < 4096; i += 16) {
                                  for (int64_t l = 0; l < 16; ++l)
                                    lanes[l] += w[static_cast<size_t>(block * 4096 + i + l)];
                                }
                                for (float lane : lanes) total += lane;
                              }
                              sink += total;
                            },
                            [&] {
                              args.w_down_t = weights[turn++ % 2].data();
                              cpu::sparse_down(args, nullptr);
                            }},
                           11);
      const double bytes = static_cast<double>(rows_read * width * 4);
      const double stream = static_cast<double>(count) * 4 / times[0].median;
      std::printf("tokens %2ld density %.2f  %7.3f [%.3f, %.3f] ms  %5.1f GB/s  %3.0f %%  %6.1f GFLOP/s%s\n", tokens,
                  density, times[1].median * 1e3, times[1].low * 1e3, times[1].high * 1e3,
                  bytes / times[1].median / 1e9, 100 * bytes / times[1].median / stream,
                  2e-9 * static_cast<double>(tokens * rows_read * width) / times[1].median, sink == 0.5 ? " " : "");
    }
  }
}
