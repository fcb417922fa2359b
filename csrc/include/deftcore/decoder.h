// A step of decoding: one token of each sequence through all blocks of a Llama-like model, against a cache.
#pragma once

#include "deftcore/decoder_matrix.h"

namespace deftcore {

// h = x + o(attention(norm x));  y = h + down(f(gate(norm h)) * up(norm h)), or y = h where there is no W_up.
// With thresholds, neurons whose |f| is above theirs for some token of the step are read of W_up and W_down, or those
// whose |f * up| is of W_down. W_down is [neurons, width] then, its bias [width], lora_a [neurons, rank], lora_b
// [width, rank].
struct DecoderBlock {
  DecoderMatrix q, k, v, o, gate, up, down;
  const float* attention_norm;  // [width]
  const float* mlp_norm;        // [width]
  const float* q_norm;          // [head_size], of each head before its rotation, or null, as is k_norm then
  const float* k_norm;
  int64_t window;      // positions that a token sees, its own included
  const float* tau;    // [neurons], or null: all count
  int64_t by_product;  // 1: |f * up| decides
};
static_assert(sizeof(DecoderBlock) == 7 * sizeof(DecoderMatrix) + 7 * 8);

// logits = head(norm(blocks(hidden))). Norms divide by the root of the mean square. Every sequence is at the same
// position; what stands before its start is padding, which no token sees and no position counts. Keys and values of
// the position are written. Least traffic: all weights, and the cache's positions, once.
struct DecodeStepArgs {
  const DecoderBlock* blocks;  // [layers], in the host's memory
  const DecoderMatrix* head;   // [1], as blocks
  const float* norm;           // [width]
  const float* hidden;         // [tokens, width], contiguous; a sequence's positions stand together
  const float* cosine;         // [length, head_size], of the positions' rotations
  const float* sine;           // [length, head_size]
  const int64_t* starts;       // [tokens / steps]
  float* keys;                 // [layers, batch, kv_heads, length, head_size], in and out, rotated
  float* values;               // [layers, batch, kv_heads, length, head_size], in and out
  float* logits;               // [tokens / steps, vocabulary], out, of each sequence's last position
  void* workspace;             // 64-byte aligned
  int64_t layers, tokens, batch, position, length;
  int64_t steps;  // positions of each sequence, from `position` on
  int64_t width, heads, kv_heads, head_size, neurons, vocabulary;
  Activation activation;
  float eps;    // of the norms
  float scale;  // of the products of queries and keys

  DEFTCORE_FIELDS(blocks, head, norm, hidden, cosine, sine, starts, keys, values, logits, workspace, layers, tokens,
                  batch, position, length, steps, width, heads, kv_heads, head_size, neurons, vocabulary, activation,
                  eps, scale)
};

}  // namespace deftcore
