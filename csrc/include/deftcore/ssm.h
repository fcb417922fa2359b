// State-space models (Mamba): the selective scan and its backward, linear in length, state in float.
#pragma once

#include "deftcore/common.h"

namespace deftcore {

// Time steps between saved states: the backward recomputes a chunk's states from the one before it.
inline constexpr int64_t kScanChunk = 32;

// A [batch, length, channels] tensor of any layout, as element strides.
struct ScanTensor {
  void* data;  // null: not there
  int64_t batch, time, channel;
};

//   step_t = delta_t + delta_bias, through softplus where asked for
//   h_t = exp(step_t a) h_{t-1} + step_t b_t u_t,   y_t = c_t . h_t + d u_t,   out_t = y_t silu(z_t)
// b and c are float [batch, length, groups, states], channel j in group j groups / channels; or one [channels, states]
// for all batches and times where their `fixed` flag is set. States are float [batch, states, channels].
struct SelectiveScanArgs {
  ScanTensor u, delta, z, out;
  const float* a;           // [states, channels]
  const float* b;           // see above; [states, channels] where fixed
  const float* c;           // likewise
  const float* d;           // [channels] or null
  const float* delta_bias;  // [channels] or null
  const float* first;       // [batch, states, channels] or null for 0
  float* last;              // [batch, states, channels], out
  float* chunks;  // [batch, ceil(length / kScanChunk), states, channels], states before each chunk, out; or null
  int64_t batch, length, channels, states, groups;
  DType dtype;
  bool softplus, fixed_b, fixed_c;
};

// Gradients of the above. Null outputs are not computed.
struct SelectiveScanBackwardArgs {
  SelectiveScanArgs forward;  // `out` holds the gradient of out; `chunks` what the forward wrote; `last` is not read
  ScanTensor grad_u, grad_delta, grad_z;  // of the forward's dtype; grad_z null without z
  float* grad_a;                          // [states, channels] or null; zeroed by the caller, as are the next
  float* grad_b;                          // as b, or null
  float* grad_c;                          // as c, or null
  float* grad_d;                          // [channels] or null
  float* grad_delta_bias;                 // [channels] or null
  float* grad_first;                      // [batch, states, channels], in: the gradient of `last`; out: of `first`
  void* workspace;                        // selective_scan_workspace(args) bytes, 64-byte aligned
};

namespace cpu {
void selective_scan(const SelectiveScanArgs& args, Stream stream);
size_t selective_scan_workspace(const SelectiveScanArgs& args);
void selective_scan_backward(const SelectiveScanBackwardArgs& args, Stream stream);
}  // namespace cpu

}  // namespace deftcore
