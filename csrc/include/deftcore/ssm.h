// State-space models: the selective scan (Mamba), the scalar-decay scan (Mamba-2), the causal convolution before them,
// and one decoding step of each. Linear in length, states in float.
#pragma once

#include "deftcore/common.h"

namespace deftcore {

// Time steps between saved states: the backward recomputes a chunk's states from the one before it.
inline constexpr int64_t kScanChunk = 32;
// Most states of a scan.
inline constexpr int64_t kMaxStates = 256;

// A [batch, length, channels] tensor of any layout, as element strides.
struct ScanTensor {
  void* data;  // null: not there
  int64_t batch, time, channel;
};

//   step_t = delta_t + delta_bias, through softplus where asked for
//   h_t = exp(step_t a) h_{t-1} + step_t b_t u_t,   y_t = c_t . h_t + d u_t,   out_t = y_t silu(z_t)
// b and c are float [batch, length, groups, states], channel j in group j groups / channels; or one [channels, states]
// for all batches and times where their `fixed` flag is set. States are float [batch, states, channels].
// Least traffic: u, delta, z, b, c and out once, the states of first, last and chunks; none between the steps.
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

  DEFTCORE_FIELDS(u, delta, z, out, a, b, c, d, delta_bias, first, last, chunks, batch, length, channels, states,
                  groups, dtype, softplus, fixed_b, fixed_c)
};

// Gradients of the above. Null outputs are not computed. Least traffic: the inputs, chunks and every gradient once.
struct SelectiveScanBackwardArgs {
  SelectiveScanArgs forward;  // `out` holds the gradient of out; `chunks` what the forward wrote; `last` is not read
  ScanTensor grad_u, grad_delta, grad_z;  // of the forward's dtype; grad_z null without z; may stand in their inputs
  ScanTensor out_again;                   // out, computed once more; null without z, or where not wanted
  float* grad_a;                          // [states, channels] or null; zeroed by the caller, as are the next
  float* grad_b;                          // as b, or null
  float* grad_c;                          // as c, or null
  float* grad_d;                          // [channels] or null
  float* grad_delta_bias;                 // [channels] or null
  float* grad_first;                      // [batch, states, channels], in: the gradient of `last`; out: of `first`
  void* workspace;                        // 64-byte aligned

  DEFTCORE_FIELDS(forward, grad_u, grad_delta, grad_z, out_again, grad_a, grad_b, grad_c, grad_d, grad_delta_bias,
                  grad_first, workspace)
};

// out_t = f(bias + sum_k weight[k] x_{t - width + 1 + k}), f silu or the identity. x before the start is `first`'s last
// steps, else 0. Where `sequence` is given, no tap reaches a step of another number; `first` belongs to step 0's.
// Least traffic: x and out once.
struct CausalConv1dArgs {
  ScanTensor x, out;
  ScanTensor first;         // [batch, width - 1, channels] or null
  const float* weight;      // [width, channels]
  const float* bias;        // [channels] or null
  const int32_t* sequence;  // [batch, length] or null
  int64_t batch, length, channels, width;
  DType dtype;
  bool silu;

  DEFTCORE_FIELDS(x, out, first, weight, bias, sequence, batch, length, channels, width, dtype, silu)
};

// Least traffic: x, the gradient of out and grad_x once.
struct CausalConv1dBackwardArgs {
  CausalConv1dArgs forward;  // `out` holds the gradient of out
  ScanTensor grad_x;         // may not stand in x or out
  ScanTensor grad_first;     // or null
  float* grad_weight;        // [width, channels] or null; zeroed by the caller, as is the next
  float* grad_bias;          // [channels] or null

  DEFTCORE_FIELDS(forward, grad_x, grad_first, grad_weight, grad_bias)
};
inline constexpr int64_t kMaxConvWidth = 16;

// Mamba-2: heads of `head_dim` channels with one step and one decay each.
//   h_t = exp(log_decay_t) h_{t-1} + step_t x_t b_t^T,   y_t = h_t c_t + d x_t
// Least traffic: x, step, log_decay, b, c and out once, the states of first and last; none between the steps.
struct SsdArgs {
  ScanTensor x, out;       // channels are heads * head_dim
  const float* step;       // [batch, length, heads]
  const float* log_decay;  // [batch, length, heads], at most 0
  const float* b;          // [batch, length, groups, states], head h in group h groups / heads
  const float* c;          // likewise
  const float* d;          // [heads * head_dim] or null
  const float* first;      // [batch, heads * head_dim, states] or null for 0
  float* last;             // likewise, out
  int64_t batch, length, heads, head_dim, states, groups;
  DType dtype;

  DEFTCORE_FIELDS(x, out, step, log_decay, b, c, d, first, last, batch, length, heads, head_dim, states, groups, dtype)
};

// Least traffic: the inputs and every gradient once.
struct SsdBackwardArgs {
  SsdArgs forward;        // `out` holds the gradient of out; `last` is not read
  ScanTensor grad_x;      // may stand in out
  float* grad_step;       // [batch, length, heads]
  float* grad_log_decay;  // likewise
  float* grad_b;          // as b, zeroed by the caller
  float* grad_c;          // likewise
  float* grad_d;          // as d, zeroed by the caller; or null
  float* grad_first;      // as first, in: the gradient of `last`; out: of `first`
  void* workspace;        // 64-byte aligned

  DEFTCORE_FIELDS(forward, grad_x, grad_step, grad_log_decay, grad_b, grad_c, grad_d, grad_first, workspace)
};

// A [batch, heads, head_dim] tensor as element strides; any of them may be 0.
struct HeadTensor {
  const void* data;  // null: not there
  int64_t batch, head, channel;
};

// One step of either scan: state = exp(step a) state + step b x, out = (c . state + d x) silu(z), in place. Least
// traffic: the named slots' states in and out, everything else once.
struct StateUpdateArgs {
  void* state;           // [slots, heads, head_dim, states], contiguous
  const int64_t* slots;  // [batch], row b's state; negative: out is 0, no state is touched. Null: row b has slot b
  HeadTensor x, dt, z;
  void* out;        // [batch, heads, head_dim], contiguous
  HeadTensor a;     // float, batch unused
  int64_t a_state;  // stride of a over states
  const void* b;    // [batch, groups, states], contiguous
  const void* c;    // likewise
  HeadTensor d;     // float, batch unused
  HeadTensor bias;  // float, batch unused
  int64_t batch, heads, head_dim, states, groups;
  DType dtype;  // of x, dt, z, b, c, out
  DType state_dtype;
  bool softplus;

  DEFTCORE_FIELDS(state, slots, x, dt, z, out, a, a_state, b, c, d, bias, batch, heads, head_dim, states, groups, dtype,
                  state_dtype, softplus)
};

// x [batch, channels, length] after `state` [batch, channels, window]: out as causal_conv1d's, and the window moves on.
// Least traffic: x, out, and the windows in and out.
struct CausalConv1dUpdateArgs {
  ScanTensor x, out;
  void* state;           // contiguous, in x's dtype; window >= width - 1
  const int64_t* slots;  // as above
  const float* weight;   // [width, channels]
  const float* bias;     // [channels] or null
  int64_t batch, length, channels, width, window;
  DType dtype;
  bool silu;

  DEFTCORE_FIELDS(x, out, state, slots, weight, bias, batch, length, channels, width, window, dtype, silu)
};

}  // namespace deftcore
