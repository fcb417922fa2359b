// Sparsity-aware MLP products: only the weight rows of active neurons are read.
#pragma once

#include "deftcore/common.h"

namespace deftcore {

// Tokens that one call handles; the union of their active neurons is the list of rows read.
inline constexpr int64_t kMaxSparseTokens = 64;

// y = a W_down^T + bias, W_down stored neuron-major.
struct SparseDownArgs {
  const void* a;         // [tokens, neurons], contiguous
  const void* w_down_t;  // [neurons, width], row stride w_stride
  const void* bias;      // [width] or null
  void* y;               // [tokens, width], contiguous, out
  void* workspace;       // sparse_down_workspace(args) bytes, 64-byte aligned
  int64_t* rows_read;    // [1], out: size of the active set; above `capacity` y was not written
  int64_t tokens, neurons, width, w_stride;
  int64_t capacity;  // most active neurons worth the sparse path; `neurons` for no limit
  DType dtype;
  float tau;
};

// Plain MLP (w_gate null):  y = f(x W_up^T + b_up) W_down^T + b_down
// Gated MLP:                y = (f(x W_gate^T) * (x W_up^T)) W_down^T; only rows with |f| > tau of W_up, W_down are
// read
struct SparseMlpArgs {
  const void* x;         // [tokens, width], contiguous
  const void* z;         // [tokens, neurons] pre-activation computed by the caller, or null
  const void* w_gate;    // [neurons, width], row stride gate_stride, or null
  const void* w_up;      // [neurons, width], row stride up_stride
  const void* w_down_t;  // [neurons, width], row stride down_stride
  const void* b_up;      // [neurons] or null (plain MLP only)
  const void* b_down;    // [width] or null
  void* y;               // [tokens, width], contiguous, out
  void* workspace;       // sparse_mlp_workspace(args) bytes, 64-byte aligned
  int64_t* rows_read;    // [1], out: size of the active set; above `capacity` y was not written
  int64_t tokens, neurons, width;
  int64_t gate_stride, up_stride, down_stride;
  int64_t capacity;  // as in SparseDownArgs
  DType dtype;
  Activation activation;
  float tau;
};

namespace cpu {
size_t sparse_down_workspace(const SparseDownArgs& args);
size_t sparse_mlp_workspace(const SparseMlpArgs& args);
void sparse_down(const SparseDownArgs& args, Stream stream);
void sparse_mlp(const SparseMlpArgs& args, Stream stream);
}  // namespace cpu

namespace cuda {
size_t sparse_down_workspace(const SparseDownArgs& args);
size_t sparse_mlp_workspace(const SparseMlpArgs& args);
void sparse_down(const SparseDownArgs& args, Stream stream);
void sparse_mlp(const SparseMlpArgs& args, Stream stream);
}  // namespace cuda

}  // namespace deftcore
