// The kernels of one instruction set as a table, made from the list of ops.
#pragma once

#include "deftcore/ops.h"

#define DEFTCORE_JOIN_(a, b) a##_##b
#define DEFTCORE_JOIN(a, b) DEFTCORE_JOIN_(a, b)
// In a file that is compiled once per instruction set: act_density -> act_density_avx512
#define DEFTCORE_KERNEL(op) DEFTCORE_JOIN(op, DEFTCORE_ISA)

namespace deftcore::cpu {

struct Kernels {
  const char* name;
#define DEFTCORE_MEMBER(op, Args, room, devices, where) \
  void (*op)(const Args&);                              \
  DEFTCORE_IF_##room(size_t (*op##_workspace)(const Args&);)
  DEFTCORE_OPS(DEFTCORE_MEMBER, )
#undef DEFTCORE_MEMBER
};

// Those that this process uses.
const Kernels& kernels();

// Name of their instruction set, and a space-separated list of those that this machine can run.
const char* isa_name();
std::string isa_available();

}  // namespace deftcore::cpu
