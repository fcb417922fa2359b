// A step of decoding: one token of each sequence through all layers of a Mamba or Mamba-2 model, against their states.
#pragma once

#include "deftcore/decoder_matrix.h"

namespace deftcore {

// x, z (and in Mamba-2 dt) = in(norm stream);  u = silu(causal convolution of x);  low, b, c = x(u), dt = dt(low), or
// in Mamba-2 b and c are the convolution's last outputs;  state = exp(step a) state + step b u with step = softplus(dt
// + dt_bias);  y = (c . state + d u) silu(z), in Mamba-2 over the root mean square of its group, times gated_norm;
// stream += out(y). Rows of `in`: x, z; in Mamba-2 z, x with b and c, dt.
struct MambaLayer {
  DecoderMatrix in, x, dt, out;  // Mamba-2 has no x and no dt, whose rows are 0 then
  const float* norm;             // [width]
  const float* taps;             // [taps, mixed channels], the newest last
  const float* taps_bias;        // [mixed channels] or null
  const float* a;                // [channels, states], negative; Mamba-2: [heads]
  const float* d;                // [channels]; [heads]
  const float* dt_bias;          // [channels]; [heads]; or null
  const float* gated_norm;       // Mamba-2: [channels], else null
};
// Python writes a table of these, as rows of 64-bit numbers.
static_assert(sizeof(MambaLayer) == 4 * sizeof(DecoderMatrix) + 7 * 8);

// logits = head(norm(layers(hidden))). The convolution runs over x, in Mamba-2 with b and c beside it: mixed channels.
// Least traffic: all weights, and the states of `tokens` sequences in and out, once.
struct MambaStepArgs {
  const MambaLayer* layers;   // [count], in the host's memory
  const DecoderMatrix* head;  // [1], as layers
  const float* norm;          // [width]
  const float* hidden;        // [tokens, width], contiguous
  float* windows;             // [count, batch, taps - 1, mixed channels], the convolution's last inputs, in and out
  float* memory;              // [count, batch, channels, states], in and out
  float* logits;              // [tokens, vocabulary], out
  void* workspace;            // 64-byte aligned
  int64_t count, tokens, batch, width, channels, states, taps, vocabulary;
  int64_t rank;         // columns of dt; 0: Mamba-2
  int64_t heads;        // with one decay and one step each; 1 in Mamba
  int64_t groups;       // of b and c; 1 in Mamba
  int64_t norm_groups;  // of the gated norm
  float eps;            // of the norms

  int64_t mixed() const { return channels + (rank == 0 ? 2 * groups * states : 0); }

  DEFTCORE_FIELDS(layers, head, norm, hidden, windows, memory, logits, workspace, count, tokens, batch, width, channels,
                  states, taps, vocabulary, rank, heads, groups, norm_groups, eps)
};

}  // namespace deftcore
