// y = a W_down^T over the union of the tokens' active neurons, and the MLPs built on it; W_down is [neurons, width].
// Bound by device memory: the weight rows of active neurons, once. No host read of the count: grids are sized by the
// machine and every kernel reads the count where `compact` left it, so CUDA graphs capture the whole sequence.
//   dots (gate)   one warp per row           act[m, i] = f(x[m] . W_gate[i])
//   compact       one block, ascending       list = {i : any |act[m, i]| > tau}
//   dots / pack   one warp per list entry    h[k, m] = act[m, list[k]] (* x[m] . W_up[list[k]])
//   down          blocks = column tiles x list splits, partial sums to the workspace
//   reduce        splits added in order: repeats are bit-equal
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

// ---------------------------------------------------------------------------- dots

// Each lane of a warp sums its part of x[m] . row for up to kTileTokens tokens; every lane gets the totals.
template <bool kVector, class T>
__device__ void row_dots(const T* row, const T* x, int64_t width, int tokens, float (&out)[kTileTokens]) {
  const int lane = threadIdx.x % 32;
  for (float& o : out) o = 0.0f;
  if constexpr (kVector) {
    constexpr int kSize = Pack<T>::kSize;
    for (int64_t j = lane * kSize; j < width; j += 32 * kSize) {
      const Pack<T> w = *reinterpret_cast<const Pack<T>*>(row + j);
#pragma unroll
      for (int m = 0; m < kTileTokens; ++m) {  // past the last token: the last one again, its result unused
        const Pack<T> v = *reinterpret_cast<const Pack<T>*>(x + min(m, tokens - 1) * width + j);
#pragma unroll
        for (int i = 0; i < kSize; ++i) out[m] = fmaf(to_float(w.values[i]), to_float(v.values[i]), out[m]);
      }
    }
  } else {
    for (int64_t j = lane; j < width; j += 32) {
      const float w = to_float(row[j]);
#pragma unroll
      for (int m = 0; m < kTileTokens; ++m) {
        out[m] = fmaf(w, to_float(x[min(m, tokens - 1) * width + j]), out[m]);
      }
    }
  }
#pragma unroll
  for (float& o : out) o = warp_sum(o);
}

__device__ float activate(Activation f, float z) {
  switch (f) {
    case Activation::kRelu: return math::activate<Activation::kRelu>(z);
    case Activation::kRelu2: return math::activate<Activation::kRelu2>(z);
    case Activation::kGeluErf: return math::activate<Activation::kGeluErf>(z);
    case Activation::kGeluTanh: return math::activate<Activation::kGeluTanh>(z);
    default: return math::activate<Activation::kSilu>(z);
  }
}

// act[m, i] = f(x[m] . w[i] + b_up[i]) for all neurons.
template <bool kVector, class T>
__global__ void __launch_bounds__(kThreads) gate_kernel(SparseMlpArgs args, const T* w, int64_t stride, float* act) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  const T* x = static_cast<const T*>(args.x);
  const T* b_up = static_cast<const T*>(args.b_up);
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; i < args.neurons;
       i += warps) {
    for (int64_t m0 = 0; m0 < args.tokens; m0 += kTileTokens) {
      const int tokens = static_cast<int>(min(static_cast<int64_t>(kTileTokens), args.tokens - m0));
      float z[kTileTokens];
      row_dots<kVector>(w + i * stride, x + m0 * args.width, args.width, tokens, z);
      const int m = threadIdx.x % 32;
      if (m < tokens) {
        float mine = z[0];
#pragma unroll
        for (int t = 1; t < kTileTokens; ++t) mine = m == t ? z[t] : mine;
        if (b_up != nullptr) mine += to_float(b_up[i]);
        act[(m0 + m) * args.neurons + i] = activate(args.activation, mine);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) activate_kernel(SparseMlpArgs args, float* act) {
  const int64_t total = args.tokens * args.neurons, step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += step) {
    act[i] = activate(args.activation, to_float(static_cast<const T*>(args.z)[i]));
  }
}

// h[k, m] = kept(act[m, list[k]]), times x[m] . w_up[list[k]] when w_up is there.
template <bool kVector, class T, class A>
__global__ void __launch_bounds__(kThreads, 2)  // without the 2, ptxas aims at 64 registers and spills
    pack_kernel(const A* act, const T* x, const T* w_up, int64_t up_stride, const int32_t* list, const int64_t* active,
                int64_t tokens, int64_t neurons, int64_t width, float tau, float* h) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32), count = *active;
  const int lane = threadIdx.x % 32;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; k < count; k += warps) {
    const int64_t neuron = list[k];
    for (int64_t m0 = 0; m0 < tokens; m0 += kTileTokens) {
      const int tile = static_cast<int>(min(static_cast<int64_t>(kTileTokens), tokens - m0));
      float dot[kTileTokens];
      if (w_up != nullptr) row_dots<kVector>(w_up + neuron * up_stride, x + m0 * width, width, tile, dot);
      if (lane < tile) {
        float value = to_float(act[(m0 + lane) * neurons + neuron]);
        value = fabsf(value) <= tau ? 0.0f : value;
        if (w_up != nullptr) {
          float mine = dot[0];
#pragma unroll
          for (int t = 1; t < kTileTokens; ++t) mine = lane == t ? dot[t] : mine;
          value *= mine;
        }
        h[k * tokens + m0 + lane] = value;
      }
    }
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

// ----------------------------------------------------------------------------

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

template <class T>
bool vector_rows(const void* w, int64_t stride, const void* x, int64_t width) {
  constexpr int kFull = Pack<T>::kSize;
  return aligned16(w) && aligned16(x) && stride % kFull == 0 && width % kFull == 0;
}

template <class T>
void sparse_mlp_impl(const SparseMlpArgs& args, cudaStream_t stream) {
  const Buffers b = carve(args.workspace, args.tokens, args.neurons, args.width);
  const bool gated = args.w_gate != nullptr;
  const T* x = static_cast<const T*>(args.x);
  const T* w_first = static_cast<const T*>(gated ? args.w_gate : args.w_up);
  const int64_t first_stride = gated ? args.gate_stride : args.up_stride;
  const int warps = kThreads / 32;
  if (args.z != nullptr) {
    activate_kernel<T><<<grid(args.tokens * args.neurons, kThreads), kThreads, 0, stream>>>(args, b.act);
  } else if (vector_rows<T>(w_first, first_stride, x, args.width)) {
    gate_kernel<true, T><<<grid(args.neurons, warps), kThreads, 0, stream>>>(args, w_first, first_stride, b.act);
  } else {
    gate_kernel<false, T><<<grid(args.neurons, warps), kThreads, 0, stream>>>(args, w_first, first_stride, b.act);
  }
  compact_kernel<float>
      <<<1, kCompactThreads, 0, stream>>>(b.act, args.tokens, args.neurons, args.tau, b.list, args.rows_read);
  const T* w_up = gated ? static_cast<const T*>(args.w_up) : nullptr;
  const auto pack = vector_rows<T>(args.w_up, args.up_stride, x, args.width) ? pack_kernel<true, T, float>
                                                                             : pack_kernel<false, T, float>;
  pack<<<grid(args.neurons, warps), kThreads, 0, stream>>>(b.act, x, w_up, args.up_stride, b.list, args.rows_read,
                                                           args.tokens, args.neurons, args.width, args.tau, b.h);
  down_and_reduce<T>(static_cast<const T*>(args.w_down_t), args.down_stride, static_cast<const T*>(args.b_down),
                     args.rows_read, b, args.tokens, args.width, static_cast<T*>(args.y), stream);
}

}  // namespace

size_t sparse_down_workspace(const SparseDownArgs& args) {
  return align256(static_cast<size_t>(args.neurons) * 4) +
         align256(static_cast<size_t>(args.neurons) * static_cast<size_t>(args.tokens) * 4) +
         align256(static_cast<size_t>(kMaxSplits) * static_cast<size_t>(args.tokens) * static_cast<size_t>(args.width) *
                  4);
}

size_t sparse_mlp_workspace(const SparseMlpArgs& args) {
  SparseDownArgs down{};
  down.tokens = args.tokens;
  down.neurons = args.neurons;
  down.width = args.width;
  return sparse_down_workspace(down) + static_cast<size_t>(args.tokens) * static_cast<size_t>(args.neurons) * 4;
}

void sparse_down(const SparseDownArgs& args, Stream stream) {
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    const Buffers b = carve(args.workspace, args.tokens, args.neurons, args.width);
    const T* a = static_cast<const T*>(args.a);
    compact_kernel<T>
        <<<1, kCompactThreads, 0, stream_of(stream)>>>(a, args.tokens, args.neurons, args.tau, b.list, args.rows_read);
    pack_kernel<false, T, T><<<grid(args.neurons, kThreads / 32), kThreads, 0, stream_of(stream)>>>(
        a, nullptr, nullptr, 0, b.list, args.rows_read, args.tokens, args.neurons, args.width, args.tau, b.h);
    down_and_reduce<T>(static_cast<const T*>(args.w_down_t), args.w_stride, static_cast<const T*>(args.bias),
                       args.rows_read, b, args.tokens, args.width, static_cast<T*>(args.y), stream_of(stream));
  });
  DEFTCORE_CUDA_CHECK(cudaGetLastError());
}

void sparse_mlp(const SparseMlpArgs& args, Stream stream) {
  dispatch_dtype(args.dtype, [&](auto t) { sparse_mlp_impl<decltype(t)>(args, stream_of(stream)); });
  DEFTCORE_CUDA_CHECK(cudaGetLastError());
}

}  // namespace deftcore::cuda
