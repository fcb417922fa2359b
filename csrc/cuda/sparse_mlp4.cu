// The MLP from its pre-activation on, over 4-bit weights: packed rows of inactive neurons are not read. Blocks and sums
// are those of sparse_down.cuh; a warp takes the dot products of one row of W_up at a time, and a thread decodes the
// same columns of every row of W_down, so that the scales of column blocks are read once for all rows of a block.
#include "decode4.cuh"
#include "sparse_down.cuh"

namespace deftcore::cuda {
namespace {

constexpr int kUpStageBytes = 20 << 10;  // of x
// A block's own: its votes, list, h and dots, the code book of W_down, and the books of W_up.
constexpr size_t kOwnBytes = kWarps * sizeof(int) + kShare * (sizeof(int32_t) + 2 * kTokens * sizeof(float)) +
                             16 * sizeof(float) + sizeof(Books);
static_assert(kUpStageBytes + kOwnBytes <= kSharedBytes, "x and the block's own fit");

// h[k, m] *= x[m] . W_up[list[k]] + up_low[m] . up_lora[list[k]]. Every thread of the block calls it.
template <class T, int kCount>
__device__ void multiply_up(const SparseMlp4bitArgs& args, const Share& share, int count, const int32_t* list,
                            int stage_chunks, T* staged, float (*h)[kCount]) {
  __shared__ Books books;
  __shared__ float dots[kShare][kCount];
  const Quant4& q = args.w_up;
  const T *x = static_cast<const T*>(args.x) + share.token * args.width, *low = static_cast<const T*>(args.up_low),
          *lora = static_cast<const T*>(args.up_lora);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int chunks = max(static_cast<int>(ceil_div(q.cols, kChunk)), 1);  // the first has the low-rank term, too
  load_books(q, books);
  for (int stage = 0; stage < chunks; stage += stage_chunks) {
    const int here = min(stage_chunks, chunks - stage);
    __syncthreads();  // the last stage is used up
    stage_x<kCount>(x, q.cols, share.tokens, static_cast<int64_t>(stage) * kChunk, here, staged);
    __syncthreads();
    for (int k = warp; k < count; k += kWarps) {
      const int64_t row = list[k];
      float total[1][kCount] = {};
      if (stage == 0) {
#pragma unroll
        for (int m = 0; m < kCount; ++m) {
          for (int64_t r = lane; r < args.up_rank && m < share.tokens; r += kWarp) {
            total[0][m] = fmaf(to_float(low[(share.token + m) * args.up_rank + r]),
                               to_float(lora[row * args.up_rank + r]), total[0][m]);
          }
        }
      }
      for (int c = 0; c < here; ++c) {
        const int64_t column = static_cast<int64_t>(stage + c) * kChunk + lane * kLaneWeights;
        if (column >= q.cols) break;
        const Codes codes[1] = {load_codes(q, row * q.cols + column)};
        add_dots(q, books, codes, staged + c * kCount * kStagedChunk<T>, total);
      }
#pragma unroll
      for (int m = 0; m < kCount; ++m) total[0][m] = warp_sum(total[0][m]);
      if (lane < kCount) dots[k][lane] = value_of(total[0], lane) + (stage == 0 ? 0.0f : dots[k][lane]);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < count * kCount; i += kThreads)
    h[i / kCount][i % kCount] *= dots[i / kCount][i % kCount];
  __syncthreads();
}

// sum[m] += sum over the list of h[k, m] W_down[list[k], j ...]. kPack columns: 8 are a 32-bit word, 2 a byte.
template <int kPack, int kCount>
__device__ void add_rows(const Quant4& q, const float* code, const int32_t* list, const float (*h)[kCount], int count,
                         int64_t j, float (&sum)[kCount][kPack]) {
  if constexpr (kPack == 8) {
    constexpr int kAhead = 4;
    float part[kCount][8] = {}, scales[8] = {};
    int64_t block = -1;
    const auto close_block = [&] {
#pragma unroll
      for (int m = 0; m < kCount; ++m) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          sum[m][i] = fmaf(part[m][i], scales[i], sum[m][i]);
          part[m][i] = 0.0f;
        }
      }
    };
    for (int k0 = 0; k0 < count; k0 += kAhead) {
      uint32_t words[kAhead];
      float scale[kAhead];
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int64_t flat = static_cast<int64_t>(list[min(k0 + a, count - 1)]) * q.cols + j;
        words[a] = *reinterpret_cast<const uint32_t*>(q.packed + flat / 2);
        scale[a] = q.column_blocks ? 1.0f : scale_at(q, flat / q.block_size);
      }
#pragma unroll
      for (int a = 0; a < kAhead; ++a) {
        const int k = k0 + a;
        if (k >= count) break;
        if (q.column_blocks && list[k] / q.block_size != block) {
          close_block();
          block = list[k] / q.block_size;
          column_scales8(q, block, j, scales);
        }
        float w[8];
        decode8(words[a], code, w);
#pragma unroll
        for (int m = 0; m < kCount; ++m) {
          const float value = h[k][m] * scale[a];
#pragma unroll
          for (int i = 0; i < 8; ++i) part[m][i] = fmaf(value, w[i], part[m][i]);
        }
      }
    }
    if (!q.column_blocks) {
#pragma unroll
      for (float& s : scales) s = 1.0f;
    }
    close_block();
  } else {
    for (int k = 0; k < count; ++k) {
#pragma unroll
      for (int i = 0; i < kPack; ++i) {
        const float w = weight_at(q, code, static_cast<int64_t>(list[k]) * q.cols + j + i);
#pragma unroll
        for (int m = 0; m < kCount; ++m) sum[m][i] = fmaf(h[k][m], w, sum[m][i]);
      }
    }
  }
}

// A = T where act holds activations already, float after activate_kernel.
template <int kPack, int kCount, class T, class A>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    share4_kernel(SparseMlp4bitArgs args, const A* act, Buffers b, int stage_chunks) {
  DEFTCORE_DYNAMIC_SHARED(uint4, dynamic);
  __shared__ int32_t list[kShare];
  __shared__ float h[kShare][kCount];
  __shared__ float code[16];
  const Quant4& q = args.w_down_t;
  if (threadIdx.x < 16) code[threadIdx.x] = q.code[threadIdx.x];
  const Share share = share_of(args.neurons, args.tokens, kCount);
  const int count = list_active<kCount>(share, act, args.neurons, args.tau, list, h);
  if (threadIdx.x == 0 && blockIdx.x == 0) b.counts[blockIdx.z * gridDim.y + blockIdx.y] = count;
  if (args.w_up.packed != nullptr) {
    multiply_up<T, kCount>(args, share, count, list, stage_chunks, reinterpret_cast<T*>(dynamic), h);
  }
  const int64_t row = blockIdx.y * args.tokens + share.token;
  constexpr int64_t kBlockColumns = kThreads * kPack;
  for (int64_t j = blockIdx.x * kBlockColumns + threadIdx.x * kPack; j < q.cols; j += gridDim.x * kBlockColumns) {
    float sum[kCount][kPack] = {};
    add_rows<kPack, kCount>(q, code, list, h, count, j, sum);
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
      if (m >= share.tokens) break;
      store_sums(sum[m], b.partial + (row + m) * q.cols + j);
    }
  }
  if (blockIdx.x != 0) return;
  const T* lora = static_cast<const T*>(args.down_lora);
  for (int64_t i = threadIdx.x; i < args.down_rank * share.tokens; i += kThreads) {
    const int64_t r = i % args.down_rank, m = i / args.down_rank;
    float sum = 0.0f;
    for (int k = 0; k < count; ++k) sum = fmaf(h[k][m], to_float(lora[list[k] * args.down_rank + r]), sum);
    b.low_partial[(row + m) * args.down_rank + r] = sum;
  }
}

// ----------------------------------------------------------------------------

Buffers buffers_of(const SparseMlp4bitArgs& args) {
  return lay_out(args.workspace, args.tokens, args.neurons, args.width, args.down_rank, true);
}

template <class T, class A>
void share4_and_reduce(const SparseMlp4bitArgs& args, const A* act, const Buffers& b, Stream stream) {
  const Quant4& q = args.w_down_t;
  const bool gated = args.w_up.packed != nullptr;
  const Cut cut = cut_for(args.neurons, args.tokens);
  const auto run = [&](auto pack) {
    dispatch_count(cut, [&](auto count) {
      const Stage stage = stage_of<kUpStageBytes, count(), T>(args.width);
      const dim3 grid = grid_of(cut, q.cols, kThreads * pack(), gated);
      launch(share4_kernel<pack(), count(), T, A>, grid, kThreads, gated ? stage.bytes : 0, stream, args, act, b,
             stage.chunks);
    });
  };
  if (q.cols % 8 == 0 && reinterpret_cast<uintptr_t>(q.packed) % 4 == 0) {
    run(std::integral_constant<int, 8>{});
  } else {
    run(std::integral_constant<int, 2>{});
  }
  reduce<T>(b.partial, b, cut, static_cast<const T*>(args.b_down), args.capacity, args.tokens, q.cols, args.rows_read,
            static_cast<T*>(args.y), stream);
  if (args.down_rank > 0) {
    reduce<T>(b.low_partial, b, cut, nullptr, args.capacity, args.tokens, args.down_rank, args.rows_read,
              static_cast<T*>(args.down_low), stream);
  }
}

template <class T>
void sparse_mlp_4bit_impl(const SparseMlp4bitArgs& args, Stream stream) {
  const Buffers b = buffers_of(args);
  const T* z = static_cast<const T*>(args.z);
  if (args.activated) return share4_and_reduce<T, T>(args, z, b, stream);
  const int64_t count = args.tokens * args.neurons;
  launch(activate_kernel<T>, striding_blocks(count, kThreads), kThreads, 0, stream, args.activation, z, count, b.act);
  share4_and_reduce<T, float>(args, b.act, b, stream);
}

}  // namespace

size_t sparse_mlp_4bit_workspace(const SparseMlp4bitArgs& args) { return buffers_of(args).bytes; }

void sparse_mlp_4bit(const SparseMlp4bitArgs& args, Stream stream) {
  check_args(args, "sparse_mlp_4bit");
  require(args.w_up.packed == nullptr || (aligned16(args.w_up.packed) && aligned16(args.x)), "sparse_mlp_4bit",
          "w_up and x must be 16-byte aligned");
  dispatch_dtype(args.dtype, [&](auto t) { sparse_mlp_4bit_impl<decltype(t)>(args, stream); });
}

}  // namespace deftcore::cuda
