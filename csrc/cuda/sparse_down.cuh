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

template <class T>
__global__ void __launch_bounds__(kThreads)
    reduce_kernel(const float* partial, int splits, const T* bias, int64_t tokens, int64_t width, T* y) {
  const int64_t total = tokens * width, step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += step) {
    float sum = bias != nullptr ? to_float(bias[i % width]) : 0.0f;
    for (int s = 0; s < splits; ++s) sum += partial[s * total + i];
    y[i] = from_float<T>(sum);
  }
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

struct Buffers {
  int32_t* list;   // [neurons]
  float* h;        // [neurons, tokens]
  float* partial;  // [kMaxSplits, tokens, width]
  float* act;      // [tokens, neurons], MLPs only
};

Buffers carve(void* workspace, int64_t tokens, int64_t neurons, int64_t width) {
  char* p = static_cast<char*>(workspace);
  const auto take = [&](int64_t bytes) {
    char* mine = p;
    p += align256(static_cast<size_t>(bytes));
    return mine;
  };
  Buffers b{};
  b.list = reinterpret_cast<int32_t*>(take(neurons * 4));
  b.h = reinterpret_cast<float*>(take(neurons * tokens * 4));
  b.partial = reinterpret_cast<float*>(take(kMaxSplits * tokens * width * 4));
  b.act = reinterpret_cast<float*>(p);
  return b;
}

template <class T>
void down_and_reduce(const T* w, int64_t stride, const T* bias, const int64_t* active, const Buffers& b, int64_t tokens,
                     int64_t width, T* y, cudaStream_t stream) {
  const auto run = [&](auto pack) {
    const int64_t tiles = (width + kThreads * pack() - 1) / (kThreads * pack());
    const int splits = splits_for(tiles);
    down_kernel<pack(), T><<<dim3(static_cast<unsigned>(tiles), splits), kThreads, 0, stream>>>(
        w, stride, b.list, active, b.h, tokens, width, b.partial);
    reduce_kernel<T>
        <<<grid(tokens * width, kThreads), kThreads, 0, stream>>>(b.partial, splits, bias, tokens, width, y);
  };
  constexpr int kFull = Pack<T>::kSize;
  if (aligned16(w) && width % kFull == 0 && stride % kFull == 0) {
    run(std::integral_constant<int, kFull>{});
  } else {
    run(std::integral_constant<int, 1>{});
  }
}

}  // namespace
}  // namespace deftcore::cuda
