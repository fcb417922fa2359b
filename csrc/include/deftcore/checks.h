// What each op demands of its arguments on any device, as far as a kernel would crash otherwise; the Python layer
// checks the rest.
#pragma once

#include "deftcore/ops.h"

namespace deftcore {

// An op whose arguments have no check of their own takes all.
template <class Args>
void check_args(const Args&, const char*) {}

// int32 neuron numbers and int64 offsets.
template <class Args>
void check_sparse(const Args& args, const char* op) {
  require(args.tokens >= 0 && args.tokens <= kMaxSparseTokens, op, "tokens must be in 0..64");
  require(args.neurons >= 0 && args.neurons < INT32_MAX, op, "neurons must be below 2^31");
  require(args.width >= 0, op, "width must not be negative");
  require(args.tau >= 0, op, "tau must not be negative");
}

inline bool is_block_size(int64_t size) { return size >= 32 && (size & (size - 1)) == 0; }

inline void check_quant(const Quant4& q, const char* op) {
  require(q.rows >= 0 && q.cols >= 0, op, "rows and cols must not be negative");
  require(is_block_size(q.block_size), op, "block_size must be a power of two, at least 32");
}

inline void check_states(int64_t states, const char* op) {
  require(states >= 1 && states <= kMaxStates, op, "states must be in 1..256");
}

inline void check_heads(int64_t heads, int64_t groups, const char* op) {
  require(groups >= 1 && heads % groups == 0, op, "groups must divide heads");
}

inline void check_taps(int64_t width, const char* op) {
  require(width >= 1 && width <= kMaxConvWidth, op, "width must be in 1..16");
}

// int32 columns.
inline void check_units(int64_t units, int64_t width, const char* op) {
  require(units >= 0 && width >= 1, op, "units must not be negative, width must be at least 1");
  require(units < INT32_MAX && width < INT32_MAX && units * width < INT32_MAX, op, "columns must be below 2^31");
}

// int32 numbers of points.
inline void check_clouds(int64_t clouds, int64_t size, const char* op) {
  require(clouds >= 0 && size >= 1 && size < INT32_MAX, op, "clouds must have 1 to 2^31 - 2 points");
}

template <class Args>
void check_search(const Args& args, const char* op) {
  check_clouds(args.clouds, args.size, op);
  require(args.count >= 0 && args.k >= 1, op, "count must not be negative, k must be at least 1");
}

// int32 numbers of slots.
template <class Args>
void check_gather(const Args& args, const char* op) {
  check_clouds(args.clouds, args.size, op);
  require(args.rows >= 0 && args.k >= 0 && args.width >= 0, op, "sizes must not be negative");
  require(args.rows < INT32_MAX && args.k < INT32_MAX && args.rows * args.k < INT32_MAX, op,
          "a cloud's indices must be below 2^31");
  require(args.weights != nullptr || args.k == 1 || args.clouds * args.rows == 0, op, "without weights k must be 1");
}

// ----------------------------------------------------------------------------

inline void check_args(const SparseDownArgs& args, const char* op) { check_sparse(args, op); }
inline void check_args(const SparseMlpArgs& args, const char* op) { check_sparse(args, op); }

inline void check_args(const SparseMlp4bitArgs& args, const char* op) {
  check_sparse(args, op);
  const auto check_rows = [&](const Quant4& q, bool columns) {
    check_quant(q, op);
    require(q.rows == args.neurons && q.cols == args.width, op, "weights must be [neurons, width]");
    require(q.column_blocks ? columns && q.cols % 2 == 0 && q.rows % q.block_size == 0 : q.cols % q.block_size == 0, op,
            "rows must be whole blocks");
  };
  if (args.w_up.packed != nullptr) check_rows(args.w_up, false);
  check_rows(args.w_down_t, true);
}

inline void check_args(const Quantize4bitArgs& args, const char* op) {
  require(is_block_size(args.block_size) && args.block_size <= kMaxBlock, op,
          "block_size must be a power of two in 32..4096");
}

inline void check_args(const Dequantize4bitArgs& args, const char* op) { check_quant(args.w, op); }
inline void check_args(const Linear4bitArgs& args, const char* op) { check_quant(args.w, op); }

inline void check_args(const GroupedDeltaArgs& args, const char* op) {
  require(args.tokens >= 0 && args.most >= 0, op, "tokens and most must not be negative");
}

inline void check_args(const MaskUnitsArgs& args, const char* op) { check_units(args.units, args.width, op); }
inline void check_args(const MaskUnitsBackwardArgs& args, const char* op) { check_units(args.units, args.width, op); }

inline void check_args(const SelectiveScanArgs& args, const char* op) {
  check_states(args.states, op);
  require(args.groups >= 1 && args.channels % args.groups == 0, op, "groups must divide channels");
}

inline void check_args(const SelectiveScanBackwardArgs& args, const char* op) {
  check_args(args.forward, op);
  const bool empty = args.forward.batch == 0 || args.forward.length == 0 || args.forward.channels == 0;
  require(args.forward.chunks != nullptr || empty, op, "chunks are needed");
}

inline void check_args(const StateUpdateArgs& args, const char* op) {
  check_heads(args.heads, args.groups, op);
  require(args.a_state == 0 || args.a_state == 1, op, "a's stride over states must be 0 or 1");
}

inline void check_args(const CausalConv1dArgs& args, const char* op) { check_taps(args.width, op); }
inline void check_args(const CausalConv1dBackwardArgs& args, const char* op) { check_args(args.forward, op); }

inline void check_args(const CausalConv1dUpdateArgs& args, const char* op) {
  check_taps(args.width, op);
  require(args.window >= args.width - 1, op, "the window must hold width - 1 steps");
}

inline void check_args(const SsdArgs& args, const char* op) {
  check_states(args.states, op);
  check_heads(args.heads, args.groups, op);
}

inline void check_args(const GaloreStepArgs& args, const char* op) {
  require(args.count >= 0 && args.elements >= 0 && args.rows >= 0, op, "sizes must not be negative");
  require(args.history_dtype != DType::kFloat16, op, "a window must be float32 or bfloat16");
  require(!args.whole || args.rows == 0, op, "whole gradients have no window");
  for (int64_t i = 0; i < args.count; ++i) {
    const GaloreMatrix& m = args.matrices[i];
    require(m.elements >= 0, op, "elements must not be negative");
    if (m.history == nullptr) continue;
    require(m.rows >= 1 && m.rows <= args.rows, op, "rows must be in 1..args.rows");
    require(m.fill >= 0 && m.slot >= 0 && m.slot < m.rows && m.slot <= m.fill, op, "slot must be a row");
  }
}

inline void check_any_matrix(const DecoderMatrix& m, int64_t rows, int64_t cols, const char* op) {
  require(m.weight != nullptr && m.rows == rows && m.cols == cols, op,
          "a matrix has another shape than the model's sizes say");
  require(m.rank == 0 || (m.rank > 0 && m.lora_a && m.lora_b && m.lora_scale), op,
          "a matrix' low-rank term needs lora_a, lora_b and lora_scale");
  const bool packed = m.code != nullptr;
  require(m.dtype >= 0 && m.dtype <= (packed ? 0 : kInt8Rows), op, "a matrix' dtype must be in 0..3, 0 in 4 bits");
  require(m.absmax != nullptr || !(packed || m.dtype == kInt8Rows), op, "a matrix in 4 bits or int8 needs absmax");
  require(packed || m.stride >= cols, op, "a matrix' stride must be its columns at least");
}

inline void check_matrix(const DecoderMatrix& m, int64_t rows, int64_t cols, const char* op) {
  check_any_matrix(m, rows, cols, op);
  const bool whole = m.column_blocks == 0 && is_block_size(m.block_size) && cols % m.block_size == 0;
  require(m.code == nullptr || whole, op, "rows in 4 bits must be whole blocks");
  require(m.dtype != kInt8Rows || (cols % kInt8Block == 0 && m.stride == cols), op,
          "rows in int8 must be whole blocks of 32, in one piece");
}

// Of which only some rows are read.
inline void check_sparse_rows(const DecoderMatrix& m, int64_t rows, int64_t cols, const char* op) {
  check_matrix(m, rows, cols, op);
  require(m.dtype != kInt8Rows, op, "of a matrix in int8 all rows are read");
}

// Neuron-major: [neurons, width].
inline void check_sparse_down(const DecoderMatrix& m, int64_t neurons, int64_t width, const char* op) {
  if (m.code == nullptr || m.column_blocks == 0) return check_sparse_rows(m, neurons, width, op);
  check_any_matrix(m, neurons, width, op);
  require(is_block_size(m.block_size) && neurons % m.block_size == 0 && width % 2 == 0, op,
          "columns in 4 bits must be whole blocks, and rows even");
}

inline void check_args(const DecodeStepArgs& args, const char* op) {
  require(args.steps >= 1 && args.tokens >= 1 && args.tokens % args.steps == 0, op, "steps must divide tokens");
  require(args.tokens / args.steps <= args.batch, op, "tokens must be at most steps batch");
  require(args.position >= 0 && args.position + args.steps <= args.length, op, "positions must be in 0..length - 1");
  require(args.kv_heads >= 1 && args.heads % args.kv_heads == 0, op, "kv_heads must divide heads");
  require(args.width >= 1 && args.neurons >= 0 && args.vocabulary >= 1, op, "sizes must be at least 1");
  require(args.head_size >= 2 && args.head_size % 2 == 0, op, "head_size must be even");
  for (int64_t t = 0; t < args.tokens / args.steps; ++t) {
    require(args.starts[t] >= 0 && args.starts[t] < args.position + args.steps, op,
            "starts must be in 0..last position");
  }
  const int64_t mixed = args.heads * args.head_size, kept = args.kv_heads * args.head_size;
  const auto check = [&](const DecoderMatrix& m, int64_t rows, int64_t cols) { check_matrix(m, rows, cols, op); };
  for (int64_t i = 0; i < args.layers; ++i) {
    const DecoderBlock& block = args.blocks[i];
    check(block.q, mixed, args.width);
    check(block.k, kept, args.width);
    check(block.v, kept, args.width);
    check(block.o, args.width, mixed);
    if (block.up.weight != nullptr) {
      check(block.gate, args.neurons, args.width);
      if (block.tau == nullptr) {
        check(block.up, args.neurons, args.width);
        check(block.down, args.width, args.neurons);
      } else {
        check_sparse_rows(block.up, args.neurons, args.width, op);
        check_sparse_down(block.down, args.neurons, args.width, op);
      }
    }
    require(block.window >= 1, op, "window must be at least 1");
  }
  check(*args.head, args.vocabulary, args.width);
}

inline void check_args(const MambaStepArgs& args, const char* op) {
  require(args.tokens >= 1 && args.tokens <= args.batch, op, "tokens must be in 1..batch");
  require(args.width >= 1 && args.channels >= 1 && args.vocabulary >= 1, op, "sizes must be at least 1");
  check_states(args.states, op);
  check_heads(args.heads, args.groups, op);
  require(args.taps >= 1 && args.taps <= kMaxConvWidth, op, "taps must be in 1..16");
  require(args.heads >= 1 && args.channels % args.heads == 0, op, "heads must divide channels");
  require(args.norm_groups >= 1 && args.channels % args.norm_groups == 0, op, "norm_groups must divide channels");
  require(args.rank >= 0 && (args.rank == 0 || args.heads == 1), op, "Mamba has one head");
  const int64_t second = args.rank == 0 ? args.heads : 0;
  const auto check = [&](const DecoderMatrix& m, int64_t rows, int64_t cols) {
    check_matrix(m, rows, cols, op);
    require(m.rank == 0, op, "a matrix has a low-rank term");
  };
  for (int64_t i = 0; i < args.count; ++i) {
    const MambaLayer& layer = args.layers[i];
    check(layer.in, args.channels + args.mixed() + second, args.width);
    if (args.rank > 0) {
      check(layer.x, args.rank + 2 * args.states, args.channels);
      check(layer.dt, args.channels, args.rank);
    }
    check(layer.out, args.width, args.channels);
  }
  check(*args.head, args.vocabulary, args.width);
}

inline void check_args(const SsdBackwardArgs& args, const char* op) { check_args(args.forward, op); }

inline void check_args(const FarthestPointSampleArgs& args, const char* op) {
  check_clouds(args.clouds, args.size, op);
  require(args.samples >= 1, op, "samples must be at least 1");
  require(args.start >= 0 && args.start < args.size, op, "start must be a point");
}

inline void check_args(const KnnArgs& args, const char* op) { check_search(args, op); }
inline void check_args(const BallQueryArgs& args, const char* op) { check_search(args, op); }
inline void check_args(const GatherPointsArgs& args, const char* op) { check_gather(args, op); }
inline void check_args(const GatherPointsBackwardArgs& args, const char* op) { check_gather(args, op); }

// int32 columns.
inline void check_args(const LogitRowsArgs& args, const char* op) {
  require(args.rows >= 0 && args.width >= 0 && args.width <= args.stride, op, "width must be in 0..stride");
  require(args.stride < INT32_MAX, op, "stride must be below 2^31");
}

inline void check_args(const LogitRowsBackwardArgs& args, const char* op) {
  check_args(args.forward, op);
  require(args.begin >= 0 && args.begin <= args.end && args.end <= args.forward.width, op,
          "columns must be in 0..width");
}

inline void check_args(const TopLogitsArgs& args, const char* op) {
  require(args.most >= 1 && args.most <= args.width, op, "most must be in 1..width");
  require(args.stride < INT32_MAX, op, "stride must be below 2^31");
}

inline void check_args(const LogitProductArgs& args, const char* op) {
  require(args.begin >= 0 && args.begin <= args.end && args.end <= args.stride, op, "columns must be in 0..stride");
}

inline void check_args(const ProductArgs& args, const char* op) {
  require(args.rows >= 0 && args.inner >= 0 && args.columns >= 0, op, "sizes must not be negative");
  require(args.a_row == 1 || args.a_inner == 1, op, "a stride of a must be 1");
  require(args.b_inner == 1 || args.b_column == 1, op, "a stride of b must be 1");
}

}  // namespace deftcore
