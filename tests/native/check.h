// The few lines that the native tests share: a failed check prints where and makes the program return 1.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// The device under test: the CPU, or the CUDA kernels over the emulator.
#if defined(DEFTCORE_TEST_CUDA)
namespace deftcore::cuda {}
namespace device = deftcore::cuda;
#else
namespace deftcore::cpu {}
namespace device = deftcore::cpu;
#endif

inline int g_failures = 0;

#define CHECK(condition)                                                  \
  do {                                                                    \
    if (!(condition)) {                                                   \
      std::printf("%s:%d: failed: %s\n", __FILE__, __LINE__, #condition); \
      ++g_failures;                                                       \
    }                                                                     \
  } while (0)

// Return code that ctest takes as "skipped": this machine cannot run the level asked for.
constexpr int kSkipped = 77;

template <class Body>
int run_tests(Body&& body) {
  std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);  // a failed check is seen though the program crashes later
  try {
    body();
  } catch (const std::invalid_argument& error) {
    std::printf("%s\n", error.what());
    return std::string(error.what()).rfind("DEFTCORE_CPU_ISA", 0) == 0 ? kSkipped : 1;
  }
  std::printf(g_failures ? "%d checks failed\n" : "all checks passed\n", g_failures);
  return g_failures != 0;
}

// A workspace of exactly so many bytes, 64-byte aligned: a sanitizer sees a step beyond them. NaN to begin with.
class Room {
 public:
  explicit Room(size_t bytes) : data_(nullptr, &std::free) {
    void* data = nullptr;
    if (posix_memalign(&data, 64, bytes) != 0) std::abort();
    data_.reset(data);
    std::memset(data, 0xff, bytes);
  }
  void* data() const { return data_.get(); }

 private:
  std::unique_ptr<void, decltype(&std::free)> data_;
};

inline std::vector<float> random_floats(size_t count, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& v : values) v = normal(engine);
  return values;
}

inline bool close(double ours, double ref, double tolerance) {
  return std::fabs(ours - ref) <= tolerance * (1 + std::fabs(ref));
}

// Whether a call is refused by an std::invalid_argument that begins with the op's name.
template <class Call>
bool refused(const std::string& op, Call&& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return std::string(error.what()).rfind(op + ": ", 0) == 0;
  }
  return false;
}

// Some of the slopes of `total` in `values`, against symmetric differences.
template <class Total>
void check_slopes(std::vector<float>& values, const std::vector<float>& slopes, Total&& total) {
  for (size_t i = 0; i < values.size(); i += 1 + values.size() / 7) {
    const float before = values[i], h = 1e-2f;
    values[i] = before + h;
    const double up = total(), high = values[i];
    values[i] = before - h;
    const double down = total(), low = values[i];
    values[i] = before;
    CHECK(close(slopes[i], (up - down) / (high - low), 1e-2));
  }
}

// Values, and what a backward says of their slopes.
using Slopes = std::pair<std::vector<float>*, const std::vector<float>*>;

template <class Total>
void check_slopes(Total&& total, std::initializer_list<Slopes> all) {
  for (const auto& [values, slopes] : all) check_slopes(*values, *slopes, total);
}
