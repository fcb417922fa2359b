// Partial back-propagation (S2FT): the gated activation and its slopes in one pass, and products with per-row deltas.
#pragma once

#include "deftcore/common.h"

namespace deftcore {

// a = f(gate) * up. Rows may lie in wider buffers. Least traffic: gate, up and a once.
struct GatedActArgs {
  const void* gate;  // [rows, width]
  const void* up;    // [rows, width]
  void* a;           // [rows, width], contiguous, out
  int64_t rows, width, gate_stride, up_stride;
  DType dtype;
  Activation activation;

  DEFTCORE_FIELDS(gate, up, a, rows, width, gate_stride, up_stride, dtype, activation)
};

// grad_gate = grad * up * f'(gate), grad_up = grad * f(gate). Least traffic: all five once.
struct GatedActBackwardArgs {
  const void* gate;  // [rows, width]
  const void* up;    // [rows, width]
  const void* grad;  // [rows, width], contiguous
  void* grad_gate;   // [rows, width], contiguous, out
  void* grad_up;     // [rows, width], contiguous, out; may be grad itself
  int64_t rows, width, gate_stride, up_stride;
  DType dtype;
  Activation activation;

  DEFTCORE_FIELDS(gate, up, grad, grad_gate, grad_up, rows, width, gate_stride, up_stride, dtype, activation)
};

// Several deltas of one [outputs, inputs] weight, one after another. Delta j has, in this order of the lists,
//   gather:   y += x[gather_index] . gather_rows        rows [gather_start[j], gather_start[j + 1])
//   scatter:  y[scatter_index] += scatter_rows . x      rows [scatter_start[j], ...)
//   low rank: y += (low_in . x) . low_out               rows [low_start[j], ...)
// Every list of starts has count + 1 entries.
struct DeltaBank {
  const int64_t* gather_start;
  const int32_t* gather_index;  // [gathered], below inputs
  const void* gather_rows;      // [gathered, outputs]
  const int64_t* scatter_start;
  const int32_t* scatter_index;  // [scattered], below outputs; no number twice within a delta
  const void* scatter_rows;      // [scattered, inputs]
  const int64_t* low_start;
  const void* low_in;   // [ranks, inputs]
  const void* low_out;  // [ranks, outputs]
  int64_t count, inputs, outputs;

  DEFTCORE_FIELDS(gather_start, gather_index, gather_rows, scatter_start, scatter_index, scatter_rows, low_start,
                  low_in, low_out, count, inputs, outputs)
};

// y[t] += delta[adapter[t]] x[t]; a number outside 0..count - 1 is no delta. Least traffic: each delta that a token
// names once, x, y in and out.
struct GroupedDeltaArgs {
  DeltaBank bank;
  const void* x;           // [tokens, inputs], contiguous
  const int64_t* adapter;  // [tokens]
  void* y;                 // [tokens, outputs], contiguous, in and out
  void* workspace;         // 64-byte aligned
  int64_t tokens;
  int64_t most;  // rows of the largest delta: gathered, scattered and ranks together
  DType dtype;

  DEFTCORE_FIELDS(bank, x, adapter, y, workspace, tokens, most, dtype)
};

}  // namespace deftcore
