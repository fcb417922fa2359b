// Chooses the instruction set once per process: the best that the machine has, or DEFTCORE_CPU_ISA.
#include <cstdlib>

#include "kernels.h"

namespace deftcore::cpu {

#define DEFTCORE_DECLARE(op, Args, room, devices, isa) \
  void op##_##isa(const Args&);                        \
  DEFTCORE_IF_##room(size_t op##_workspace_##isa(const Args&);)
#define DEFTCORE_ENTRY(op, Args, room, devices, isa) op##_##isa, DEFTCORE_IF_##room(op##_workspace_##isa, )

DEFTCORE_OPS(DEFTCORE_DECLARE, scalar)
#if defined(DEFTCORE_TEST_LEVEL)
DEFTCORE_OPS(DEFTCORE_DECLARE, lanes16)
#endif
#if defined(DEFTCORE_X86)
DEFTCORE_OPS(DEFTCORE_DECLARE, avx2)
DEFTCORE_OPS(DEFTCORE_DECLARE, avx512)
DEFTCORE_OPS(DEFTCORE_DECLARE, avx512bf16)
#elif defined(DEFTCORE_ARM64)
DEFTCORE_OPS(DEFTCORE_DECLARE, neon)
#endif

namespace {

struct Level {
  Kernels kernels;
  bool available;
};

// Plainest first, after the tests' own, which no machine prefers.
const Level* levels(int* count) {
#define DEFTCORE_TABLE(isa)                 \
  {                                         \
    #isa, DEFTCORE_OPS(DEFTCORE_ENTRY, isa) \
  }
#if defined(DEFTCORE_X86)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
#endif
  static const Level all[] = {
#if defined(DEFTCORE_TEST_LEVEL)
      {DEFTCORE_TABLE(lanes16), true},
#endif
      {DEFTCORE_TABLE(scalar), true},
#if defined(DEFTCORE_X86)
      {DEFTCORE_TABLE(avx2), avx2},    {DEFTCORE_TABLE(avx512), avx512}, {DEFTCORE_TABLE(avx512bf16), avx512bf16},
#elif defined(DEFTCORE_ARM64)
      {DEFTCORE_TABLE(neon), true},
#endif
  };
  *count = sizeof(all) / sizeof(all[0]);
  return all;
}

const Kernels& choose() {
  int count;
  const Level* all = levels(&count);
  const char* forced = std::getenv("DEFTCORE_CPU_ISA");
  if (forced != nullptr && *forced != '\0') {
    for (int i = 0; i < count; ++i) {
      if (std::string(forced) == all[i].kernels.name && all[i].available) return all[i].kernels;
    }
    throw std::invalid_argument("DEFTCORE_CPU_ISA: this machine has " + isa_available() + ", got '" + forced + "'");
  }
  int best = 0;
  for (int i = 0; i < count; ++i) {
    if (all[i].available) best = i;
  }
  return all[best].kernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* isa_name() { return kernels().name; }

std::string isa_available() {
  int count;
  const Level* all = levels(&count);
  std::string names;
  for (int i = 0; i < count; ++i) {
    if (all[i].available) names += (names.empty() ? "" : " ") + std::string(all[i].kernels.name);
  }
  return names;
}

}  // namespace deftcore::cpu
