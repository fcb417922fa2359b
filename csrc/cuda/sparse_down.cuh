// The stages that all sparse MLP products share, whatever their weights' format: activation, the list of a block's
// active neurons, and the sum over blocks. No host read of the count: grids are sized by the machine, so CUDA graphs
// capture the whole sequence.
//
// A block owns a share of the neurons and up to kTokens tokens. It lists the share's neurons that are active in its
// tokens, takes their dot products with W_up where there is one, and adds their rows of W_down: no list passes through
// memory, and no block waits for another. More tokens are more blocks, which read shared rows again, mostly from L2.
#pragma once

#include "deftcore/math.h"
#include "deftcore/sparse_mlp.h"
#include "deftcore/workspace.h"
#include "elements.cuh"
#include "launch.cuh"

namespace deftcore::cuda {
namespace {

constexpr int kTokens = 4;        // of one block; its sums are registers
constexpr int kShare = kThreads;  // most neurons of one block: a thread looks at one
constexpr int kMaxGroups = kMaxSparseTokens / kTokens;

// ---------------------------------------------------------------------------- activation

__device__ float activate(Activation f, float z) {
  switch (f) {
    case Activation::kRelu: return math::activate<Activation::kRelu>(z);
    case Activation::kRelu2: return math::activate<Activation::kRelu2>(z);
    case Activation::kGeluErf: return math::activate<Activation::kGeluErf>(z);
    case Activation::kGeluTanh: return math::activate<Activation::kGeluTanh>(z);
    default: return math::activate<Activation::kSilu>(z);
  }
}

// act = f(z), both [count].
template <class T>
__global__ void __launch_bounds__(kThreads) activate_kernel(Activation f, const T* z, int64_t count, float* act) {
  const int64_t step = threads_of_grid();
  for (int64_t i = thread_in_grid(); i < count; i += step) act[i] = activate(f, to_float(z[i]));
}

// ---------------------------------------------------------------------------- a block's share

// Where a block stands in a grid (column tiles, shares, groups of tokens).
struct Share {
  int64_t first_neuron, token;
  int neurons, tokens;
};

__device__ inline Share share_of(int64_t neurons, int64_t tokens, int count) {
  Share s;
  s.first_neuron = neurons * blockIdx.y / gridDim.y;
  s.neurons = static_cast<int>(neurons * (blockIdx.y + 1) / gridDim.y - s.first_neuron);
  s.token = static_cast<int64_t>(blockIdx.z) * count;
  s.tokens = static_cast<int>(min(static_cast<int64_t>(count), tokens - s.token));
  return s;
}

// The active neurons of a share in ascending order and the values of its tokens there (0 where a token's own is not
// active); returns their number. act is [tokens, neurons]. Every thread of the block calls it.
template <int kCount, class A>
__device__ int list_active(const Share& share, const A* act, int64_t neurons, float tau, int32_t* list,
                           float (*h)[kCount]) {
  __shared__ int votes[kWarps];
  const int i = threadIdx.x, lane = i % kWarp, warp = i / kWarp;
  float value[kCount] = {};
  bool is_active = false;
  if (i < share.neurons) {
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
      if (m >= share.tokens) break;
      const float v = to_float(act[(share.token + m) * neurons + share.first_neuron + i]);
      if (fabsf(v) <= tau) continue;
      value[m] = v;
      is_active = true;
    }
  }
  const unsigned vote = __ballot_sync(0xffffffffu, is_active);
  if (lane == 0) votes[warp] = __popc(vote);
  __syncthreads();
  int before = 0, count = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp ? votes[w] : 0;
    count += votes[w];
  }
  if (is_active) {
    const int k = before + __popc(vote & ((1u << lane) - 1));
    list[k] = static_cast<int32_t>(share.first_neuron + i);
#pragma unroll
    for (int m = 0; m < kCount; ++m) h[k][m] = value[m];
  }
  __syncthreads();
  return count;
}

// The value of lane m < kCount out of an array that must stay in registers.
template <int kCount>
__device__ float value_of(const float (&values)[kCount], int m) {
  float mine = values[0];
#pragma unroll
  for (int t = 1; t < kCount; ++t) mine = m == t ? values[t] : mine;
  return mine;
}

// A thread's sums of neighbouring columns, 16 bytes at a time where there are so many.
template <int kPack>
__device__ void store_sums(const float (&sum)[kPack], float* out) {
  if constexpr (kPack % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kPack; i += 4) {
      *reinterpret_cast<float4*>(out + i) = make_float4(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kPack; ++i) out[i] = sum[i];
  }
}

// ---------------------------------------------------------------------------- reduce

constexpr int kReduceColumns = 32, kReduceParts = 32;

// y [tokens, width] = bias + the partial sums of all shares, added in an order that the sizes alone fix, so that
// repeats are bit-equal. `active` is the largest number of active neurons among the groups of tokens; above `capacity`
// y is left alone.
template <class T>
__global__ void __launch_bounds__(kReduceColumns* kReduceParts)
    reduce_kernel(const float* partial, const int32_t* counts, int shares, int groups, const T* bias, int64_t capacity,
                  int64_t tokens, int64_t width, int64_t* active, T* y) {
  __shared__ float sums[kReduceParts][kReduceColumns + 1];
  __shared__ int totals[kMaxGroups];
  const int column = threadIdx.x % kReduceColumns, part = threadIdx.x / kReduceColumns;
  if (threadIdx.x < kMaxGroups) totals[threadIdx.x] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < shares * groups; i += blockDim.x) atomicAdd(&totals[i / shares], counts[i]);
  __syncthreads();
  int most = 0;
  for (int g = 0; g < groups; ++g) most = max(most, totals[g]);
  if (threadIdx.x == 0 && blockIdx.x == 0) *active = most;
  if (most > capacity) return;
  const int64_t total = tokens * width, i = static_cast<int64_t>(blockIdx.x) * kReduceColumns + column;
  float sum = 0.0f;
#pragma unroll 8
  for (int s = part; s < shares; s += kReduceParts) sum += i < total ? partial[s * total + i] : 0.0f;
  sums[part][column] = sum;
  __syncthreads();
  if (part != 0 || i >= total) return;
  sum = bias != nullptr ? to_float(bias[i % width]) : 0.0f;
#pragma unroll
  for (int p = 0; p < kReduceParts; ++p) sum += sums[p][column];
  y[i] = from_float<T>(sum);
}

// ---------------------------------------------------------------------------- launch

// How the work of one product is cut. Two blocks a multiprocessor keep enough reads under way: one token at 4096 to
// 11008 in float32 with half of the neurons active reads at 77 % (sparse_down) and 88 % (gated MLP) of an H100's
// streaming rate. Fewer shares mean less traffic of partial sums, which counts from four tokens on.
struct Cut {
  int shares, groups, count;  // count: tokens of a block, 1, 2 or kTokens
};

Cut cut_for(int64_t neurons, int64_t tokens) {
  tokens = std::max<int64_t>(tokens, 1);  // none are one block's that has nothing to do
  const int count = tokens <= 2 ? static_cast<int>(tokens) : kTokens;
  const int64_t groups = ceil_div(tokens, count), least = ceil_div(neurons, kShare);
  const int64_t wanted = (count < kTokens ? 2 : 1) * multiprocessors() / groups;
  return {static_cast<int>(std::max<int64_t>({wanted, least, 1})), static_cast<int>(groups), count};
}

// As blocks_for; one where there is no column, for the count of active neurons.
unsigned column_blocks_for(int64_t columns, int64_t per_block) { return std::max(1u, blocks_for(columns, per_block)); }

// A gated block has h of its share's neurons, and so adds up all columns.
dim3 grid_of(const Cut& cut, int64_t width, int block_columns, bool gated) {
  return dim3(gated ? 1 : column_blocks_for(width, block_columns), static_cast<unsigned>(cut.shares),
              static_cast<unsigned>(cut.groups));
}

// What stands in the workspace.
struct Buffers {
  int32_t* counts;     // [groups, shares]
  float* partial;      // [shares, tokens, width]
  float* low_partial;  // [shares, tokens, rank], low-rank terms only
  float* act;          // [tokens, neurons], MLPs only
  size_t bytes;
};

Buffers lay_out(void* workspace, int64_t tokens, int64_t neurons, int64_t width, int64_t rank, bool with_act) {
  const Cut cut = cut_for(neurons, tokens);
  Workspace room(workspace, kArrayAlignment);
  Buffers b{};
  b.counts = room.take<int32_t>(static_cast<int64_t>(cut.groups) * cut.shares);
  b.partial = room.take<float>(cut.shares * tokens * width);
  b.low_partial = room.take<float>(cut.shares * tokens * rank);
  if (with_act) b.act = room.take<float>(tokens * neurons);
  b.bytes = room.size();
  return b;
}

template <class T>
void reduce(const float* partial, const Buffers& b, const Cut& cut, const T* bias, int64_t capacity, int64_t tokens,
            int64_t width, int64_t* active, T* y, Stream stream) {
  launch(reduce_kernel<T>, column_blocks_for(tokens * width, kReduceColumns), kReduceColumns * kReduceParts, 0, stream,
         partial, b.counts, cut.shares, cut.groups, bias, capacity, tokens, width, active, y);
}

// Calls fn with the tokens of a block as a compile-time value.
template <class Fn>
void dispatch_count(const Cut& cut, Fn&& fn) {
  if (cut.count == 1) return fn(std::integral_constant<int, 1>{});
  if (cut.count == 2) return fn(std::integral_constant<int, 2>{});
  fn(std::integral_constant<int, kTokens>{});
}

}  // namespace
}  // namespace deftcore::cuda
