// Sparsity-aware MLP products: only the weight rows of active neurons are read.
#pragma once

#include "deftcore/format4.h"

namespace deftcore {

// Tokens that one call handles. The union of their active neurons is the list of rows read; on CUDA, where four tokens
// share reads, each four have their own.
inline constexpr int64_t kMaxSparseTokens = 64;

// y = a W_down^T + bias, W_down stored neuron-major. Least traffic: a, the active rows of W_down, y.
struct SparseDownArgs {
  const void* a;         // [tokens, neurons], contiguous
  const void* w_down_t;  // [neurons, width], row stride w_stride
  const void* bias;      // [width] or null
  void* y;               // [tokens, width], contiguous, out
  void* workspace;       // 64-byte aligned
  int64_t* rows_read;    // [1], out: length of the (longest) list; above `capacity` no other output was written
  int64_t tokens, neurons, width, w_stride;
  int64_t capacity;  // most active neurons worth the sparse path; `neurons` for no limit
  DType dtype;
  float tau;

  DEFTCORE_FIELDS(a, w_down_t, bias, y, workspace, rows_read, tokens, neurons, width, w_stride, capacity, dtype, tau)
};

// Plain MLP (w_gate null):  y = f(x W_up^T + b_up) W_down^T + b_down
// Gated MLP:                y = (f(x W_gate^T) * (x W_up^T)) W_down^T; only rows with |f| > tau of W_up, W_down are
// read. Least traffic: x, all of the first projection where z is not given, the active rows of the others, y.
struct SparseMlpArgs {
  const void* x;         // [tokens, width], contiguous
  const void* z;         // [tokens, neurons] pre-activation computed by the caller, or null
  const void* w_gate;    // [neurons, width], row stride gate_stride, or null
  const void* w_up;      // [neurons, width], row stride up_stride
  const void* w_down_t;  // [neurons, width], row stride down_stride
  const void* b_up;      // [neurons] or null (plain MLP only)
  const void* b_down;    // [width] or null
  void* y;               // [tokens, width], contiguous, out
  void* workspace;       // 64-byte aligned
  int64_t* rows_read;    // [1], out: length of the (longest) list; above `capacity` no other output was written
  int64_t tokens, neurons, width;
  int64_t gate_stride, up_stride, down_stride;
  int64_t capacity;  // as in SparseDownArgs
  DType dtype;
  Activation activation;
  float tau;

  DEFTCORE_FIELDS(x, z, w_gate, w_up, w_down_t, b_up, b_down, y, workspace, rows_read, tokens, neurons, width,
                  gate_stride, up_stride, down_stride, capacity, dtype, activation, tau)
};

// The MLP from its pre-activation on, over 4-bit weights; the caller computes z = x W^T of the first projection.
//   y = h W_down^T + b_down,  h = f(z), times (x W_up^T + up_low up_lora^T) when W_up is there
// Only rows of W_up, up_lora, W_down and down_lora with |f(z)| > tau are read. Low-rank terms are optional.
// sparse_mlp_4bit_int8 rounds x to int8 where it meets W_up, as linear_4bit_int8 does.
// Least traffic: x, z, the packed bytes and scales of those rows, y.
struct SparseMlp4bitArgs {
  const void* x;          // [tokens, width], contiguous; gated MLP only
  const void* z;          // [tokens, neurons], contiguous
  Quant4 w_up;            // [neurons, width], rows of whole blocks; packed is null for a plain MLP
  Quant4 w_down_t;        // [neurons, width] neuron-major, rows of whole blocks or column blocks of even width
  const void* up_low;     // [tokens, up_rank], contiguous, or null
  const void* up_lora;    // [neurons, up_rank], contiguous, or null
  const void* down_lora;  // [neurons, down_rank], contiguous, or null
  void* down_low;         // [tokens, down_rank], out: h down_lora
  const void* b_down;     // [width] or null
  void* y;                // [tokens, width], contiguous, out
  void* workspace;        // 64-byte aligned
  int64_t* rows_read;     // [1], out: length of the (longest) list; above `capacity` no other output was written
  int64_t tokens, neurons, width, up_rank, down_rank;
  int64_t capacity;  // as in SparseDownArgs
  DType dtype;
  Activation activation;
  bool activated;  // z is f(z) already
  float tau;

  DEFTCORE_FIELDS(x, z, w_up, w_down_t, up_low, up_lora, down_lora, down_low, b_down, y, workspace, rows_read, tokens,
                  neurons, width, up_rank, down_rank, capacity, dtype, activation, activated, tau)
};

}  // namespace deftcore
