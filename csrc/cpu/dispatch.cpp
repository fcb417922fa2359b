// The ops on the CPU: a check of the arguments, then the kernel of the instruction set in use.
#include "deftcore/checks.h"
#include "kernels.h"

namespace deftcore::cpu {

#define DEFTCORE_DEFINE(op, Args, room, devices, where) \
  void op(const Args& args, Stream) {                   \
    check_args(args, #op);                              \
    kernels().op(args);                                 \
  }                                                     \
  DEFTCORE_IF_##room(size_t op##_workspace(const Args& args) { return kernels().op##_workspace(args); })
DEFTCORE_OPS(DEFTCORE_DEFINE, cpu)

}  // namespace deftcore::cpu
