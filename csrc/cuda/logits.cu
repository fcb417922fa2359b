// Penalties on logits. Bound by device memory: a block takes a row's statistics in two reads, of which the second finds
// the row in the L2 cache, and a block of the backward a tile of columns of a few rows, which share the loads of
// `right`. Threads move 16 bytes at a time where the widths allow.
#include "deftcore/logits.h"
#include "elements.cuh"
#include "launch.cuh"

namespace deftcore::cuda {
namespace {

constexpr int kGroup = 4;  // rows of a block of the backward

__device__ bool left_out(const uint8_t* mask, int64_t row) { return mask != nullptr && mask[row] == 0; }

// All threads' x by a commutative operation, on each of them. `parts` is the block's room for it.
template <class Op>
__device__ float over_block(float x, float* parts, Op op) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = op(x, __shfl_xor_sync(0xffffffffu, x, offset));
  __syncthreads();  // what stood there has been read
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = parts[0];
  for (int w = 1; w < kWarps; ++w) x = op(x, parts[w]);
  return x;
}

template <int kPack, class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks) logit_rows_kernel(LogitRowsArgs args) {
  using Elements = Pack<T, kPack>;
  __shared__ float parts[kWarps];
  const int64_t row = blockIdx.x, packs = args.width / kPack;
  float* stats = args.stats + row * kRowStats;
  if (left_out(args.mask, row)) {
    if (threadIdx.x < kRowStats) stats[threadIdx.x] = 0.0f;
    return;
  }
  const auto row_of = [&](const void* logits) {
    return reinterpret_cast<const Elements*>(static_cast<const T*>(logits) + row * args.stride);
  };
  const auto add = [](float a, float b) { return a + b; };
  const auto larger = [](float a, float b) { return fmaxf(a, b); };
  const Elements* student = row_of(args.student);
  const Elements* teacher = args.teacher != nullptr ? row_of(args.teacher) : nullptr;
  float largest = -INFINITY, teacher_largest = -INFINITY, squares = 0.0f;
  for (int64_t p = threadIdx.x; p < packs; p += kThreads) {
    const Elements z = student[p];
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const float x = to_float(z.values[i]);
      largest = fmaxf(largest, x);
      if (x != -INFINITY) squares += x * x;
    }
    if (teacher == nullptr) continue;
    const Elements t = teacher[p];
#pragma unroll
    for (int i = 0; i < kPack; ++i) teacher_largest = fmaxf(teacher_largest, to_float(t.values[i]));
  }
  largest = over_block(largest, parts, larger);
  squares = over_block(squares, parts, add);
  teacher_largest = teacher != nullptr ? over_block(teacher_largest, parts, larger) : 0.0f;
  const bool entropy = args.entropy_sharpness != 0.0f;
  float q_sum = 0.0f, p_sum = 0.0f, cross = 0.0f, e_sum = 0.0f, weighted = 0.0f;
  for (int64_t p = threadIdx.x; p < packs && (teacher != nullptr || entropy); p += kThreads) {
    const Elements z = student[p];
    const Elements t = teacher != nullptr ? teacher[p] : Elements{};
#pragma unroll
    for (int i = 0; i < kPack; ++i) {
      const float x = to_float(z.values[i]) - largest;
      if (teacher != nullptr) {
        const float a = x * args.sharpness, b = (to_float(t.values[i]) - teacher_largest) * args.sharpness;
        const float weight = expf(b);
        q_sum += expf(a), p_sum += weight;
        // not where the teacher's probability is 0, since 0 times infinity is not 0
        if (weight != 0.0f) cross += weight * (b - a);
      }
      if (entropy) {
        const float a = x * args.entropy_sharpness, weight = expf(a);
        e_sum += weight;
        if (weight != 0.0f) weighted += weight * a;
      }
    }
  }
  if (teacher != nullptr) {
    q_sum = over_block(q_sum, parts, add);
    p_sum = over_block(p_sum, parts, add);
    cross = over_block(cross, parts, add);
  }
  if (entropy) {
    e_sum = over_block(e_sum, parts, add);
    weighted = over_block(weighted, parts, add);
  }
  if (threadIdx.x != 0) return;
  stats[kLargest] = largest;
  stats[kSquares] = squares;
  stats[kLogSum] = teacher != nullptr ? logf(q_sum) : 0.0f;
  stats[kTeacherLargest] = teacher_largest;
  stats[kTeacherLogSum] = teacher != nullptr ? logf(p_sum) : 0.0f;
  stats[kDivergence] = teacher != nullptr ? cross / p_sum - logf(p_sum) + logf(q_sum) : 0.0f;
  stats[kEntropyLogSum] = entropy ? logf(e_sum) : 0.0f;
  stats[kEntropy] = entropy ? logf(e_sum) - weighted / e_sum : 0.0f;
}

// ---------------------------------------------------------------------------- backward

// The gradient at one logit z and its teacher's t, but for what is kept; `product` is that of the factors.
__device__ float gradient(const LogitRowsBackwardArgs& args, int64_t row, float z, float t, float product) {
  const LogitRowsArgs& f = args.forward;
  const float* stats = f.stats + row * kRowStats;
  const float x = z - stats[kLargest];
  float sum = 0.0f;
  if (z != -INFINITY) {
    if (args.rank > 0) sum = args.slopes[2] * z + product;
    if (f.entropy_sharpness != 0.0f) {
      const float log_e = x * f.entropy_sharpness - stats[kEntropyLogSum];
      sum += args.slopes[1] * expf(log_e) * (log_e + stats[kEntropy]);
    }
  }
  if (f.teacher == nullptr) return sum;
  const float q = expf(x * f.sharpness - stats[kLogSum]);
  const float p = expf((t - stats[kTeacherLargest]) * f.sharpness - stats[kTeacherLogSum]);
  return sum + args.slopes[0] * (q - p);
}

template <int kPack, class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks) logit_rows_backward_kernel(LogitRowsBackwardArgs args) {
  using Elements = Pack<T, kPack>;
  using Factors = Pack<float, kPack == 1 ? 1 : 4>;
  constexpr int64_t kTile = kThreads * kPack;
  const LogitRowsArgs& f = args.forward;
  const int64_t columns = args.end - args.begin, tiles = ceil_div(columns, kTile);
  const int64_t tile = blockIdx.x % tiles * kTile, first = tile + threadIdx.x * kPack;
  const int64_t first_row = blockIdx.x / tiles * kGroup;
  const auto place = [&](const void* logits, int64_t row) {
    return static_cast<const T*>(logits) + row * f.stride + args.begin;
  };
  T* const grad = static_cast<T*>(args.grad);
  if (first < columns) {
    float products[kGroup][kPack] = {};
    for (int64_t j = 0; j < args.rank; ++j) {
      float left[kGroup];
      for (int r = 0; r < kGroup; ++r)
        left[r] = first_row + r < f.rows ? args.left[(first_row + r) * args.rank + j] : 0;
#pragma unroll
      for (int i = 0; i < kPack; i += Factors::kSize) {
        const Factors right = *reinterpret_cast<const Factors*>(args.right + j * columns + first + i);
        for (int k = 0; k < Factors::kSize; ++k) {
          for (int r = 0; r < kGroup; ++r) products[r][i + k] += left[r] * right.values[k];
        }
      }
    }
    for (int r = 0; r < kGroup && first_row + r < f.rows; ++r) {
      const int64_t row = first_row + r;
      Elements values{};
      if (!left_out(f.mask, row)) {
        values = *reinterpret_cast<const Elements*>(place(f.student, row) + first);
        Elements t{};
        if (f.teacher != nullptr) t = *reinterpret_cast<const Elements*>(place(f.teacher, row) + first);
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          values.values[i] =
              from_float<T>(gradient(args, row, to_float(values.values[i]), to_float(t.values[i]), products[r][i]));
        }
      }
      *reinterpret_cast<Elements*>(grad + row * f.stride + args.begin + first) = values;
    }
  }
  if (args.most == 0) return;
  __syncthreads();  // the tile stands; what is kept of it is written again, whole
  for (int64_t i = threadIdx.x; i < kGroup * args.most; i += kThreads) {
    const int64_t row = first_row + i / args.most, j = i % args.most;
    if (row >= f.rows || left_out(f.mask, row)) continue;
    const int64_t column = args.kept[row * args.most + j] - args.begin;
    if (column < tile || column >= tile + kTile || column >= columns) continue;
    float product = 0.0f;
    for (int64_t k = 0; k < args.rank; ++k)
      product += args.left[row * args.rank + k] * args.right[k * columns + column];
    const float z = to_float(place(f.student, row)[column]);
    const float t = f.teacher != nullptr ? to_float(place(f.teacher, row)[column]) : 0.0f;
    grad[row * f.stride + args.begin + column] =
        from_float<T>(gradient(args, row, z, t, product) + args.kept_grad[row * args.most + j]);
  }
}

}  // namespace

// ----------------------------------------------------------------------------

void logit_rows(const LogitRowsArgs& args, Stream stream) {
  check_args(args, "logit_rows");
  if (args.rows == 0) return;
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    dispatch_pack<T>(fits_packs<T>({args.student, args.teacher}, {args.width, args.stride}), [&](auto pack) {
      launch(logit_rows_kernel<pack(), T>, blocks_for(args.rows, 1), kThreads, 0, stream, args);
    });
  });
}

void logit_rows_backward(const LogitRowsBackwardArgs& args, Stream stream) {
  check_args(args, "logit_rows_backward");
  const LogitRowsArgs& f = args.forward;
  const int64_t columns = args.end - args.begin;
  if (f.rows == 0 || columns == 0) return;
  dispatch_dtype(f.dtype, [&](auto t) {
    using T = decltype(t);
    const bool packs = fits_packs<T>({f.student, f.teacher, args.grad, args.right}, {args.begin, columns, f.stride});
    dispatch_pack<T>(packs, [&](auto pack) {
      const int64_t blocks = ceil_div(columns, kThreads * pack()) * ceil_div(f.rows, kGroup);
      launch(logit_rows_backward_kernel<pack(), T>, blocks_for(blocks, 1), kThreads, 0, stream, args);
    });
  });
}

}  // namespace deftcore::cuda
