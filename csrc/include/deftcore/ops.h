// The list of ops. All that is said of an op again and again comes from here: the declarations below, the tables of
// kernels per instruction set and the functions that choose from them (csrc/cpu), the Python binding of both devices.
// A new op is a struct of arguments in its family's header, a definition per device, and a line here.
#pragma once

#include "deftcore/decoder.h"
#include "deftcore/density.h"
#include "deftcore/galore.h"
#include "deftcore/logits.h"
#include "deftcore/mamba_step.h"
#include "deftcore/masks.h"
#include "deftcore/neighbours.h"
#include "deftcore/partial_linear.h"
#include "deftcore/product.h"
#include "deftcore/quant4.h"
#include "deftcore/sparse_mlp.h"
#include "deftcore/ssm.h"

// X(op, its arguments, whether it needs a workspace, devices, where); `where` is what the user of the list hands
// through.
//   PLAIN       void op(const Args&, Stream)
//   WORKSPACE   further size_t op_workspace(const Args&): bytes of args.workspace. Reads no pointer.
//   EVERYWHERE  on CPU and CUDA
//   CPU_ONLY    CUDA has no such kernel: the caller takes what a library has, decoded first where it must be
#define DEFTCORE_OPS(X, where)                                                        \
  X(act_density, ActDensityArgs, PLAIN, EVERYWHERE, where)                            \
  X(act_density_backward, ActDensityBackwardArgs, PLAIN, EVERYWHERE, where)           \
  X(density, DensityArgs, PLAIN, EVERYWHERE, where)                                   \
  X(sparse_down, SparseDownArgs, WORKSPACE, EVERYWHERE, where)                        \
  X(sparse_mlp, SparseMlpArgs, WORKSPACE, EVERYWHERE, where)                          \
  X(sparse_mlp_4bit, SparseMlp4bitArgs, WORKSPACE, EVERYWHERE, where)                 \
  X(sparse_mlp_4bit_int8, SparseMlp4bitArgs, WORKSPACE, CPU_ONLY, where)              \
  X(quantize_4bit, Quantize4bitArgs, PLAIN, EVERYWHERE, where)                        \
  X(dequantize_4bit, Dequantize4bitArgs, PLAIN, EVERYWHERE, where)                    \
  X(linear_4bit, Linear4bitArgs, WORKSPACE, EVERYWHERE, where)                        \
  X(linear_4bit_backward, Linear4bitArgs, WORKSPACE, CPU_ONLY, where)                 \
  X(linear_4bit_int8, Linear4bitArgs, WORKSPACE, CPU_ONLY, where)                     \
  X(product, ProductArgs, WORKSPACE, CPU_ONLY, where)                                 \
  X(gated_act, GatedActArgs, PLAIN, EVERYWHERE, where)                                \
  X(gated_act_backward, GatedActBackwardArgs, PLAIN, EVERYWHERE, where)               \
  X(grouped_delta, GroupedDeltaArgs, WORKSPACE, EVERYWHERE, where)                    \
  X(mask_units, MaskUnitsArgs, PLAIN, EVERYWHERE, where)                              \
  X(mask_units_backward, MaskUnitsBackwardArgs, WORKSPACE, EVERYWHERE, where)         \
  X(selective_scan, SelectiveScanArgs, PLAIN, EVERYWHERE, where)                      \
  X(selective_scan_backward, SelectiveScanBackwardArgs, WORKSPACE, EVERYWHERE, where) \
  X(selective_state_update, StateUpdateArgs, PLAIN, EVERYWHERE, where)                \
  X(causal_conv1d, CausalConv1dArgs, PLAIN, EVERYWHERE, where)                        \
  X(causal_conv1d_backward, CausalConv1dBackwardArgs, PLAIN, EVERYWHERE, where)       \
  X(causal_conv1d_update, CausalConv1dUpdateArgs, PLAIN, EVERYWHERE, where)           \
  X(ssd, SsdArgs, PLAIN, EVERYWHERE, where)                                           \
  X(ssd_backward, SsdBackwardArgs, WORKSPACE, EVERYWHERE, where)                      \
  X(decode_step, DecodeStepArgs, WORKSPACE, CPU_ONLY, where)                          \
  X(mamba_step, MambaStepArgs, WORKSPACE, CPU_ONLY, where)                            \
  X(logit_rows, LogitRowsArgs, PLAIN, EVERYWHERE, where)                              \
  X(logit_rows_backward, LogitRowsBackwardArgs, PLAIN, EVERYWHERE, where)             \
  X(top_logits, TopLogitsArgs, PLAIN, CPU_ONLY, where)                                \
  X(logit_product, LogitProductArgs, PLAIN, CPU_ONLY, where)                          \
  X(galore_step, GaloreStepArgs, WORKSPACE, EVERYWHERE, where)                        \
  X(galore_update, GaloreUpdateArgs, PLAIN, EVERYWHERE, where)                        \
  X(farthest_point_sample, FarthestPointSampleArgs, WORKSPACE, EVERYWHERE, where)     \
  X(knn, KnnArgs, WORKSPACE, EVERYWHERE, where)                                       \
  X(ball_query, BallQueryArgs, WORKSPACE, EVERYWHERE, where)                          \
  X(gather_points, GatherPointsArgs, PLAIN, EVERYWHERE, where)                        \
  X(gather_points_backward, GatherPointsBackwardArgs, WORKSPACE, EVERYWHERE, where)

// Text that stands only where the list says so.
#define DEFTCORE_IF_PLAIN(...)
#define DEFTCORE_IF_WORKSPACE(...) __VA_ARGS__
#define DEFTCORE_IF_EVERYWHERE_cpu(...) __VA_ARGS__
#define DEFTCORE_IF_EVERYWHERE_cuda(...) __VA_ARGS__
#define DEFTCORE_IF_CPU_ONLY_cpu(...) __VA_ARGS__
#define DEFTCORE_IF_CPU_ONLY_cuda(...)

namespace deftcore {

#define DEFTCORE_DECLARE(op, Args, room, devices, device)                    \
  DEFTCORE_IF_##devices##_##device(void op(const Args& args, Stream stream); \
                                   DEFTCORE_IF_##room(size_t op##_workspace(const Args& args);))
namespace cpu {
DEFTCORE_OPS(DEFTCORE_DECLARE, cpu)
}
namespace cuda {
DEFTCORE_OPS(DEFTCORE_DECLARE, cuda)
}
#undef DEFTCORE_DECLARE

}  // namespace deftcore
