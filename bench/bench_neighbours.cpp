// farthest_point_sample and knn against what bounds them: the arithmetic of their distances, at the rate that a bare
// loop of it reaches over points in L1, no operation fused.
#include <omp.h>

#include <cstring>

#include "deftcore/ops.h"
#include "timing.h"

using namespace deftcore;

namespace deftcore::cpu {
const char* isa_name();
}

namespace {

constexpr int64_t kPoints = 1024;

// The least squared distances of kPoints points by coordinate to a point, `rounds` times.
#define BARE(name, bytes, ...)                                             \
  __VA_ARGS__ float name(const float* points, int64_t rounds) {            \
    typedef float V __attribute__((vector_size(bytes)));                   \
    constexpr int64_t kLanes = bytes / 4;                                  \
    V least[2] = {V{} + 1e30f, V{} + 1e30f};                               \
    for (int64_t r = 0; r < rounds; ++r) {                                 \
      const float at = 1e-3f * static_cast<float>(r % 1000);               \
      for (int64_t i = 0; i < kPoints; i += 2 * kLanes) {                  \
        for (int64_t j = 0; j < 2; ++j) {                                  \
          V x, y, z;                                                       \
          std::memcpy(&x, points + i + j * kLanes, bytes);                 \
          std::memcpy(&y, points + kPoints + i + j * kLanes, bytes);       \
          std::memcpy(&z, points + 2 * kPoints + i + j * kLanes, bytes);   \
          x -= at, y -= at, z -= at;                                       \
          const V distance = x * x + y * y + z * z;                        \
          least[j] = distance < least[j] ? distance : least[j];            \
        }                                                                  \
      }                                                                    \
    }                                                                      \
    float sum = 0;                                                         \
    for (int64_t i = 0; i < kLanes; ++i) sum += least[0][i] + least[1][i]; \
    return sum;                                                            \
  }
BARE(bare_128, 16, )
#if defined(__x86_64__)
BARE(bare_256, 32, __attribute__((target("avx2"))))
BARE(bare_512, 64, __attribute__((target("avx512f"))))
#endif

// Distances per second of all threads.
double bare_rate() {
  auto* run = &bare_128;
#if defined(__x86_64__)
  if (std::strncmp(cpu::isa_name(), "avx512", 6) == 0) run = &bare_512;
  if (std::strcmp(cpu::isa_name(), "avx2") == 0) run = &bare_256;
#endif
  constexpr int64_t kRounds = 2000;
  const std::vector<float> points = bench::random_floats(3 * kPoints, 7);
  int threads = 1;
  float sink = 0;
  const auto times = bench::alternate({[&] {
#pragma omp parallel reduction(+ : sink)
                                        {
#pragma omp single
                                          threads = omp_get_num_threads();
                                          sink += run(points.data(), kRounds);
                                        }
                                      }},
                                      15);
  if (sink == 12345.0f) std::printf(" ");  // used
  return static_cast<double>(threads * kPoints * kRounds) / times[0].median;
}

}  // namespace

int main() {
  const double bound = bare_rate();
  std::printf("float32, %s: median [quartiles] ms, distances per second, share of the bare arithmetic's %.1f G/s\n",
              cpu::isa_name(), bound / 1e9);
  for (const int64_t size : {1024, 2048, 8192, 65536}) {
    const int64_t clouds = size > 8192 ? 1 : 8, samples = size / 16, k = 32;
    const std::vector<float> points = bench::random_floats(static_cast<size_t>(clouds * size * 3), 1);
    std::vector<float> queries(static_cast<size_t>(clouds * samples * 3));
    std::copy_n(points.begin(), queries.size(), queries.begin());
    std::vector<int64_t> picks(static_cast<size_t>(clouds * samples)), indices(picks.size() * k);
    std::vector<float> distances(indices.size());
    FarthestPointSampleArgs farthest{points.data(), nullptr, picks.data(), nullptr, clouds, size, samples, 0, false};
    KnnArgs nearest{points.data(), queries.data(), nullptr, indices.data(), distances.data(),
                    nullptr,       clouds,         size,    samples,        k};
    std::vector<double> room((cpu::farthest_point_sample_workspace(farthest) + cpu::knn_workspace(nearest)) / 8 + 16);
    farthest.workspace = nearest.workspace =
        reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(room.data()) + 63) / 64 * 64);
    const auto times = bench::alternate(
        {[&] { cpu::farthest_point_sample(farthest, nullptr); }, [&] { cpu::knn(nearest, nullptr); }}, 15);
    const double pairs = static_cast<double>(clouds * size * samples);
    const char* names[] = {"farthest_point_sample", "knn"};
    for (size_t i = 0; i < 2; ++i) {
      std::printf("%-22s %ld x %5ld to %4ld  %8.3f [%.3f, %.3f] ms  %6.2f G/s %3.0f %%\n", names[i], clouds, size,
                  samples, times[i].median * 1e3, times[i].low * 1e3, times[i].high * 1e3,
                  pairs / times[i].median / 1e9, 100 * pairs / times[i].median / bound);
    }
  }
}
