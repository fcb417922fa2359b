// Timing for the bench_<family> binaries: alternate the sides in one process, rotate cold buffers, report medians.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

namespace bench {

inline double seconds(const std::function<void()>& run) {
  const auto start = std::chrono::steady_clock::now();
  run();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct Times {
  double median, low, high;  // seconds; low and high are quartiles
};

// Runs every side `repeats` times in turn, after one round that does not count.
inline std::vector<Times> alternate(const std::vector<std::function<void()>>& sides, int repeats) {
  std::vector<std::vector<double>> all(sides.size());
  for (int r = 0; r <= repeats; ++r) {
    for (size_t s = 0; s < sides.size(); ++s) {
      const double t = seconds(sides[s]);
      if (r > 0) all[s].push_back(t);
    }
  }
  std::vector<Times> result;
  for (auto& times : all) {
    std::sort(times.begin(), times.end());
    result.push_back({times[times.size() / 2], times[times.size() / 4], times[times.size() * 3 / 4]});
  }
  return result;
}

inline std::vector<float> random_floats(size_t count, unsigned seed) {
  std::minstd_rand engine(seed);
  std::vector<float> values(count);
  for (float& v : values) v = static_cast<float>(engine() % 2001) / 1000.0f - 1.0f;
  return values;
}

}  // namespace bench
