// The stages that all sparse MLP products share, whatever their weights' format: activation, the list of active
// neurons, and the down projection over plain rows. No host read of the count: grids are sized by the machine and every
// kernel reads the count where `compact` left it, so CUDA graphs capture the whole sequence.
#pragma once

#include "deftcore/math.h"
#include "deftcore/sparse_mlp.h"
#include "launch.cuh"

namespace deftcore::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kCompactThreads = 1024;
constexpr int kTileTokens = 4;  // tokens that share one read of a row; more tokens read it again, from L2
constexpr int kMaxSplits = 64;
static_assert(kCompactThreads == 32 * 32, "compact scans one value per warp with one warp");

// ---------------------------------------------------------------------------- compact

template <class T>
__global__ void __launch_bounds__(kCompactThreads)
    compact_kernel(const T* act, int64_t tokens, int64_t neurons, float tau, int32_t* list, int64_t* active) {
  __shared__ int warp_totals[32];
  __shared__ int base;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (threadIdx.x == 0) base = 0;
  __syncthreads();
  for (int64_t start = 0; start < neurons; start += kCompactThreads) {
    const int64_t i = start + threadIdx.x;
    bool is_active = false;
    for (int64_t m = 0; m < tokens && i < neurons && !is_active; ++m) {
      is_active = !(fabsf(to_float(act[m * neurons + i])) <= tau);
    }
    const unsigned votes = __ballot_sync(0xffffffffu, is_active);
    if (lane == 0) warp_totals[warp] = __popc(votes);
    __syncthreads();
    int before = 0, total = 0;
    for (int w = 0; w < 32; ++w) {
      before += w < warp ? warp_totals[w] : 0;
      total += warp_totals[w];
    }
    if (is_active) list[base + before + __popc(votes & ((1u << lane) - 1))] = static_cast<int32_t>(i);
    __syncthreads();
    if (threadIdx.x == 0) base += total;
    __syncthreads();
  }
  if (threadIdx.x == 0) *active = base;
}

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
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count; i += step) {
    act[i] = activate(f, to_float(z[i]));
  }
}

// ---------------------------------------------------------------------------- down

// partial[split, m, j] = sum over the split's share of the list of h[k, m] w[list[k], j].
template <int kPack, class T>
__global__ void __launch_bounds__(kThreads)
    down_kernel(const T* w, int64_t stride, const int32_t* list, const int64_t* active, const float* h, int64_t tokens,
                int64_t width, float* partial) {
  struct alignas(sizeof(T) * kPack) Group {
    T values[kPack];
  };
  const int64_t j = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kPack;
  if (j >= width) return;
  const int64_t count = *active, begin = count * blockIdx.y / gridDim.y, end = count * (blockIdx.y + 1) / gridDim.y;
  for (int64_t m0 = 0; m0 < tokens; m0 += kTileTokens) {
    float sum[kTileTokens][kPack] = {};
#pragma unroll 4
    for (int64_t k = begin; k < end; ++k) {
      const Group row = *reinterpret_cast<const Group*>(w + list[k] * stride + j);
#pragma unroll
      for (int m = 0; m < kTileTokens; ++m) {
        const float value = m0 + m < tokens ? h[k * tokens + m0 + m] : 0.0f;
#pragma unroll
        for (int i = 0; i < kPack; ++i) sum[m][i] = fmaf(value, to_float(row.values[i]), sum[m][i]);
      }
    }
#pragma unroll
    for (int m = 0; m < kTileTokens; ++m) {
      if (m0 + m >= tokens) break;
#pragma unroll
      for (int i = 0; i < kPack; ++i) partial[(blockIdx.y * tokens + m0 + m) * width + j + i] = sum[m][i];
    }
  }
}

// ---------------------------------------------------------------------------- few tokens: one kernel

// Each lane of a warp sums its part of x[m] . row for `tokens` of kCount tokens; every lane gets the totals.
template <bool kVector, int kCount, class T>
__device__ void row_dots(const T* row, const T* x, int64_t width, int tokens, float (&out)[kCount]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (float& o : out) o = 0.0f;
  if constexpr (kVector) {
    constexpr int kSize = Pack<T>::kSize, kAhead = kCount < 8 ? 4 : 1;
#pragma unroll kAhead
    for (int64_t j = lane * kSize; j < width; j += 32 * kSize) {
      const Pack<T> w = *reinterpret_cast<const Pack<T>*>(row + j);
#pragma unroll
      for (int m = 0; m < kCount; ++m) {  // past the last token: the last one again, its result unused
        const Pack<T> v = *reinterpret_cast<const Pack<T>*>(x + min(m, tokens - 1) * width + j);
#pragma unroll
        for (int i = 0; i < kSize; ++i) out[m] = fmaf(to_float(w.values[i]), to_float(v.values[i]), out[m]);
      }
    }
  } else {
    for (int64_t j = lane; j < width; j += 32) {
      const float w = to_float(row[j]);
#pragma unroll
      for (int m = 0; m < kCount; ++m) {
        out[m] = fmaf(w, to_float(x[min(m, tokens - 1) * width + j]), out[m]);
      }
    }
  }
#pragma unroll
  for (float& o : out) o = warp_sum(o);
}

// The tokens' values of lane m < kCount out of an array that must stay in registers.
template <int kCount>
__device__ float value_of(const float (&values)[kCount], int m) {
  float mine = values[0];
#pragma unroll
  for (int t = 1; t < kCount; ++t) mine = m == t ? values[t] : mine;
  return mine;
}

constexpr int kFewTokens = 8;
constexpr int kRange = 1024;  // most neurons a block looks at

template <class T, class A>
struct FewArgs {
  const A* act;     // [tokens, neurons]
  const T* x;       // [tokens, width], gated MLPs only
  const T* w_up;    // [neurons, width] or null
  const T* w_down;  // [neurons, width]
  int64_t up_stride, down_stride, tokens, neurons, width;
  float tau;
  float* partial;   // [splits, tokens, width], out
  int32_t* counts;  // [splits], out: active neurons of each split
};

// A block lists the active neurons of its share, takes their dot products with W_up where there is one, and adds their
// rows of W_down: no list passes through memory and no block waits for another. Shares are equal numbers of neurons.
template <int kPack, int kCount, class T, class A>
__global__ void __launch_bounds__(kThreads, 2) few_kernel(FewArgs<T, A> args) {
  struct alignas(sizeof(T) * kPack) Group {
    T values[kPack];
  };
  __shared__ int32_t list[kRange];
  __shared__ float h[kRange][kCount];
  __shared__ int votes[kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tokens = static_cast<int>(args.tokens);
  const int64_t first = args.neurons * blockIdx.y / gridDim.y;
  const int range = static_cast<int>(args.neurons * (blockIdx.y + 1) / gridDim.y - first);
  int count = 0;
  for (int start = 0; start < range; start += kThreads) {
    const int i = start + threadIdx.x;
    float value[kCount] = {};
    bool is_active = false;
    if (i < range) {
#pragma unroll
      for (int m = 0; m < kCount; ++m) {
        if (m >= tokens) break;
        const float v = to_float(args.act[m * args.neurons + first + i]);
        value[m] = fabsf(v) <= args.tau ? 0.0f : v;
        is_active = is_active || !(fabsf(v) <= args.tau);
      }
    }
    const unsigned vote = __ballot_sync(0xffffffffu, is_active);
    if (lane == 0) votes[warp] = __popc(vote);
    __syncthreads();
    int before = count;
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) {
      before += w < warp ? votes[w] : 0;
      count += votes[w];
    }
    if (is_active) {
      const int k = before + __popc(vote & ((1u << lane) - 1));
      list[k] = static_cast<int32_t>(first + i);
#pragma unroll
      for (int m = 0; m < kCount; ++m) h[k][m] = value[m];
    }
    __syncthreads();
  }
  if (threadIdx.x == 0 && blockIdx.x == 0) args.counts[blockIdx.y] = count;
  if (args.w_up != nullptr) {
    for (int k = warp; k < count; k += kThreads / 32) {
      float dot[kCount];
      row_dots<(kPack > 1), kCount>(args.w_up + list[k] * args.up_stride, args.x, args.width, tokens, dot);
      if (lane < kCount) h[k][lane] *= value_of(dot, lane);
    }
    __syncthreads();
  }
  constexpr int64_t kTile = kThreads * kPack;
  constexpr int kRowsAhead = kCount < 8 ? 8 : 2;  // loads in flight; eight tokens' sums leave few registers
  for (int64_t j = blockIdx.x * kTile + threadIdx.x * kPack; j < args.width; j += gridDim.x * kTile) {
    float sum[kCount][kPack] = {};
#pragma unroll kRowsAhead
    for (int k = 0; k < count; ++k) {
      const Group row = *reinterpret_cast<const Group*>(args.w_down + list[k] * args.down_stride + j);
#pragma unroll
      for (int m = 0; m < kCount; ++m) {
#pragma unroll
        for (int i = 0; i < kPack; ++i) sum[m][i] = fmaf(h[k][m], to_float(row.values[i]), sum[m][i]);
      }
    }
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
      if (m >= tokens) break;
      float* out = args.partial + (blockIdx.y * args.tokens + m) * args.width + j;
      if constexpr (kPack % 4 == 0) {
#pragma unroll
        for (int i = 0; i < kPack; i += 4) {
          *reinterpret_cast<float4*>(out + i) = make_float4(sum[m][i], sum[m][i + 1], sum[m][i + 2], sum[m][i + 3]);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kPack; ++i) out[i] = sum[m][i];
      }
    }
  }
}

// ---------------------------------------------------------------------------- reduce

constexpr int kReduceColumns = 32, kReduceParts = 32;

// y = bias + the partial sums, added in an order that the sizes alone fix, so that repeats are bit-equal. Where
// `counts` is there, the first block adds up the active neurons; above `capacity` y is left alone.
template <class T>
__global__ void __launch_bounds__(kReduceColumns* kReduceParts)
    reduce_kernel(const float* partial, const int32_t* counts, int splits, const T* bias, int64_t capacity,
                  int64_t tokens, int64_t width, int64_t* active, T* y) {
  __shared__ float sums[kReduceParts][kReduceColumns + 1];
  __shared__ int total_count;
  const int column = threadIdx.x % kReduceColumns, part = threadIdx.x / kReduceColumns;
  if (counts != nullptr) {
    if (threadIdx.x == 0) total_count = 0;
    __syncthreads();
    for (int s = threadIdx.x; s < splits; s += blockDim.x) atomicAdd(&total_count, counts[s]);
    __syncthreads();
    if (threadIdx.x == 0 && blockIdx.x == 0) *active = total_count;
    if (total_count > capacity) return;
  } else if (*active > capacity) {
    return;
  }
  const int64_t total = tokens * width, i = static_cast<int64_t>(blockIdx.x) * kReduceColumns + column;
  float sum = 0.0f;
#pragma unroll 8
  for (int s = part; s < splits; s += kReduceParts) sum += i < total ? partial[s * total + i] : 0.0f;
  sums[part][column] = sum;
  __syncthreads();
  if (part != 0 || i >= total) return;
  sum = bias != nullptr ? to_float(bias[i % width]) : 0.0f;
#pragma unroll
  for (int p = 0; p < kReduceParts; ++p) sum += sums[p][column];
  y[i] = from_float<T>(sum);
}

// ---------------------------------------------------------------------------- launch

size_t align256(size_t bytes) { return (bytes + 255) & ~static_cast<size_t>(255); }

int grid(int64_t items, int per_block) {
  const int64_t wanted = (items + per_block - 1) / per_block, most = multiprocessors() * 8;
  return static_cast<int>(wanted < most ? (wanted > 0 ? wanted : 1) : most);
}

// Enough blocks for two waves of the machine; the workspace has room for kMaxSplits.
int splits_for(int64_t column_tiles) {
  const int64_t wanted = (2 * multiprocessors() + column_tiles - 1) / column_tiles;
  return static_cast<int>(wanted < kMaxSplits ? wanted : kMaxSplits);
}

// Shares of the neurons where one kernel does it all: two blocks a multiprocessor, none above kRange.
int64_t few_splits(int64_t neurons) {
  const int64_t least = (neurons + kRange - 1) / kRange, wanted = 2 * multiprocessors();
  return wanted > least ? wanted : least;
}

struct Buffers {
  int32_t* list;   // [neurons]; few tokens: the counts of the splits
  float* h;        // [neurons, tokens]
  float* partial;  // [splits, tokens, width]
  float* act;      // [tokens, neurons], MLPs only
  size_t bytes;
};

// Where each buffer stands in the workspace, and how large that must be.
Buffers carve(void* workspace, int64_t tokens, int64_t neurons, int64_t width, bool with_act) {
  Buffers b{};
  const auto take = [&](auto*& mine, int64_t items) {
    mine = reinterpret_cast<std::remove_reference_t<decltype(mine)>>(static_cast<char*>(workspace) + b.bytes);
    b.bytes += align256(static_cast<size_t>(items) * 4);
  };
  const int64_t few = few_splits(neurons), splits = tokens <= kFewTokens && few > kMaxSplits ? few : kMaxSplits;
  take(b.list, neurons > few ? neurons : few);
  take(b.h, neurons * tokens);
  take(b.partial, splits * tokens * width);
  if (with_act) take(b.act, tokens * neurons);
  return b;
}

template <class T>
void reduce(const float* partial, const int32_t* counts, int splits, const T* bias, int64_t capacity, int64_t tokens,
            int64_t width, int64_t* active, T* y, cudaStream_t stream) {
  const int64_t blocks = (tokens * width + kReduceColumns - 1) / kReduceColumns;
  reduce_kernel<T><<<static_cast<unsigned>(blocks), kReduceColumns * kReduceParts, 0, stream>>>(
      partial, counts, splits, bias, capacity, tokens, width, active, y);
}

template <class T>
bool vector_rows(const void* w, int64_t stride, int64_t width) {
  constexpr int kFull = Pack<T>::kSize;
  return aligned16(w) && stride % kFull == 0 && width % kFull == 0;
}

template <class T>
void down_and_reduce(const T* w, int64_t stride, const T* bias, int64_t capacity, int64_t* active, const Buffers& b,
                     int64_t tokens, int64_t width, T* y, cudaStream_t stream) {
  const auto run = [&](auto pack) {
    const int64_t tiles = (width + kThreads * pack() - 1) / (kThreads * pack());
    const int splits = splits_for(tiles);
    down_kernel<pack(), T><<<dim3(static_cast<unsigned>(tiles), splits), kThreads, 0, stream>>>(
        w, stride, b.list, active, b.h, tokens, width, b.partial);
    reduce<T>(b.partial, nullptr, splits, bias, capacity, tokens, width, active, y, stream);
  };
  if (vector_rows<T>(w, stride, width)) {
    run(std::integral_constant<int, Pack<T>::kSize>{});
  } else {
    run(std::integral_constant<int, 1>{});
  }
}

// List, dots with W_up and down projection of up to kFewTokens tokens in one kernel, and the sums over its splits.
template <class T, class A>
void few_and_reduce(FewArgs<T, A> args, const T* bias, int64_t capacity, int64_t* active, const Buffers& b, T* y,
                    cudaStream_t stream) {
  args.partial = b.partial;
  args.counts = b.list;
  const bool gated = args.w_up != nullptr;
  const bool vector = vector_rows<T>(args.w_down, args.down_stride, args.width) &&
                      (!gated || (vector_rows<T>(args.w_up, args.up_stride, args.width) && aligned16(args.x)));
  int64_t splits = few_splits(args.neurons);
  const auto run = [&](auto pack, auto count) {
    const int64_t tiles = (args.width + kThreads * pack() - 1) / (kThreads * pack());
    // A gated block has h for all columns; else two tiles share the list, and half as many splits fill the machine.
    if (!gated && tiles > 1 && splits / 2 * kRange >= args.neurons) splits /= 2;
    const dim3 blocks(gated ? 1 : static_cast<unsigned>(tiles), static_cast<unsigned>(splits));
    few_kernel<pack(), count(), T, A><<<blocks, kThreads, 0, stream>>>(args);
  };
  const auto with_pack = [&](auto pack) {
    if (args.tokens == 1) return run(pack, std::integral_constant<int, 1>{});
    if (args.tokens == 2) return run(pack, std::integral_constant<int, 2>{});
    if (args.tokens <= 4) return run(pack, std::integral_constant<int, 4>{});
    run(pack, std::integral_constant<int, kFewTokens>{});
  };
  if (vector) {
    with_pack(std::integral_constant<int, Pack<T>::kSize>{});
  } else {
    with_pack(std::integral_constant<int, 1>{});
  }
  reduce<T>(b.partial, b.list, static_cast<int>(splits), bias, capacity, args.tokens, args.width, active, y, stream);
}

}  // namespace
}  // namespace deftcore::cuda
