// The part of a GaLore step between its products with the subspace, which are cuBLAS's: bound by device memory, most of
// all by the window, which is read twice. A block works on a piece of one matrix; the matrices' records are a launch's
// arguments, so that nothing has to be copied first, and a launch has kMost of them. A window's products leave each
// block as a sum per row; one warp adds them up in their order, solves, and leaves N's coefficients.
#include "deftcore/galore.h"
#include "deftcore/workspace.h"
#include "elements.cuh"
#include "launch.cuh"

namespace deftcore::cuda {
namespace {

constexpr int kMost = 24;

// The matrices of a launch, and what is common to them.
struct StepBatch {
  GaloreMatrix matrices[kMost];
  float correction[kMost];
  int64_t first[kMost + 1];  // pieces before each matrix
  int64_t count;
  AdamRule adam;
  double* sums;  // [pieces, rows], a piece's products of the window with R
  double* root;  // [count, rows, rows]
  double* c;     // [count, rows], coefficients of N
};
static_assert(sizeof(StepBatch) + sizeof(GaloreStepArgs) <= 4096, "arguments of a launch");

// The part of a matrix that a block works on.
struct Piece {
  int64_t matrix, begin, count;
};

__device__ Piece piece_of_block(const StepBatch& batch) {
  int64_t i = 0;
  while (i + 1 < batch.count && batch.first[i + 1] <= blockIdx.x) ++i;
  const int64_t begin = (blockIdx.x - batch.first[i]) * kGalorePiece, left = batch.matrices[i].elements - begin;
  return {i, begin, left < kGalorePiece ? left : kGalorePiece};
}

// Writes R into its row, and the products of that part of the row with all of them: a warp per row.
template <class T>
__global__ void __launch_bounds__(kThreads) galore_push_kernel(StepBatch batch, GaloreStepArgs args) {
  __shared__ float current[kGalorePiece];
  const Piece p = piece_of_block(batch);
  const GaloreMatrix& m = batch.matrices[p.matrix];
  if (m.history == nullptr) return;
  T* history = static_cast<T*>(m.history) + p.begin;
  const float* r = static_cast<const float*>(m.grad) + p.begin;
  for (int64_t i = threadIdx.x; i < p.count; i += kThreads) {
    const T held = from_float<T>(r[i]);
    history[m.slot * m.elements + i] = held;
    current[i] = to_float(held);
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  for (int64_t row = threadIdx.x / kWarp; row < rows_of(m); row += kWarps) {
    double sum = 0;
    for (int64_t i = lane; i < p.count; i += kWarp) {
      const double h = row == m.slot ? current[i] : to_float(history[row * m.elements + i]);
      sum += h * current[i];
    }
    sum = warp_sum(sum);
    if (lane == 0) batch.sums[blockIdx.x * args.rows + row] = sum;
  }
}

struct WarpGroup {
  static constexpr int64_t lanes = kWarp;
  int64_t lane;
  __device__ void sync() const { __syncwarp(); }
};

// A warp per matrix.
__global__ void __launch_bounds__(kWarp) galore_solve_kernel(StepBatch batch, GaloreStepArgs args) {
  const int64_t i = blockIdx.x;
  const GaloreMatrix& m = batch.matrices[i];
  if (m.history == nullptr) return;
  for (int64_t row = threadIdx.x; row < rows_of(m); row += kWarp) {
    double sum = 0;
    for (int64_t piece = batch.first[i]; piece < batch.first[i + 1]; ++piece)
      sum += batch.sums[piece * args.rows + row];
    m.gram[m.slot * m.rows + row] = sum;
    m.gram[row * m.rows + m.slot] = sum;
  }
  __syncwarp();
  solve_window(WarpGroup{threadIdx.x}, args, m, batch.root + i * args.rows * args.rows, batch.c + i * args.rows);
}

// N of one element, and the window's rows there where it starts anew.
template <class T>
__device__ float natural(const GaloreMatrix& m, const double* c, int64_t i, float r) {
  T* history = static_cast<T*>(m.history) + i;
  double sum = 0;
  if (*m.outcome == kHeld) {
    for (int64_t row = 0; row < rows_of(m); ++row) {
      sum += c[row] * static_cast<double>(to_float(history[row * m.elements]));
    }
    return static_cast<float>(sum);
  }
  const T own = history[m.slot * m.elements];
  const bool alone = *m.outcome == kAlone;
  for (int64_t row = 0; row < m.rows; ++row) history[row * m.elements] = row == 0 && alone ? own : from_float<T>(0.0f);
  return static_cast<float>(c[0] * static_cast<double>(alone ? to_float(own) : r));
}

template <class T>
__device__ void write_weight(T* weight, float value, int64_t place, bool stochastic, int64_t seed) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if (stochastic) {
      const uint16_t bits =
          round_stochastically(__float_as_uint(value), static_cast<uint32_t>(place), static_cast<uint32_t>(seed));
      *weight = __ushort_as_bfloat16(bits);
      return;
    }
  }
  *weight = from_float<T>(value);
}

// T is the window's type, or, of whole gradients, theirs.
template <bool kWhole, class T>
__global__ void __launch_bounds__(kThreads) galore_step_kernel(StepBatch batch, GaloreStepArgs args) {
  const Piece p = piece_of_block(batch);
  const GaloreMatrix& m = batch.matrices[p.matrix];
  for (int64_t i = p.begin + threadIdx.x; i < p.begin + p.count; i += kThreads) {
    float n;
    if constexpr (kWhole) {
      n = to_float(static_cast<const T*>(m.grad)[i]);
    } else {
      n = static_cast<const float*>(m.grad)[i];
      if (m.history != nullptr) n = natural<T>(m, batch.c + p.matrix * args.rows, i, n);
    }
    float mean = m.exp_avg[i], square = m.exp_avg_sq[i];
    const float u = batch.adam(n, mean, square, batch.correction[p.matrix]);
    m.exp_avg[i] = mean;
    m.exp_avg_sq[i] = square;
    if constexpr (kWhole) {
      T* weight = static_cast<T*>(m.out) + i;
      write_weight(weight, stepped(to_float(*weight), u, args.rate, args.keep), i, args.stochastic, m.seed);
    } else {
      static_cast<float*>(m.out)[i] = u;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) galore_update_kernel(GaloreUpdateArgs args) {
  T* weight = static_cast<T*>(args.weight);
  for (int64_t i = thread_in_grid(); i < args.elements; i += threads_of_grid()) {
    const float value = stepped(to_float(weight[i]), args.change[i], args.rate, args.keep);
    write_weight(weight + i, value, i, args.stochastic, args.seed);
  }
}

}  // namespace

// ----------------------------------------------------------------------------

namespace {

struct Room {
  double *sums, *root, *c;
};

// For one launch's matrices after another: they have the room in turn.
Room lay_out(const GaloreStepArgs& args, Workspace& room) {
  const int64_t count = std::min<int64_t>(args.count, kMost);
  Room found{};
  found.sums = room.take<double>((args.elements / kGalorePiece + count) * args.rows);
  found.root = room.take<double>(count * args.rows * args.rows);
  found.c = room.take<double>(count * args.rows);
  return found;
}

// The matrices of a launch, from `start` on; returns how many pieces they have.
int64_t fill(StepBatch& batch, const GaloreStepArgs& args, int64_t start) {
  batch.count = std::min<int64_t>(args.count - start, kMost);
  batch.adam = adam_rule(args);
  for (int64_t i = 0; i < batch.count; ++i) {
    batch.matrices[i] = args.matrices[start + i];
    batch.correction[i] = adam_correction(args, batch.matrices[i].age);
    batch.first[i + 1] = batch.first[i] + ceil_div(batch.matrices[i].elements, kGalorePiece);
  }
  return batch.first[batch.count];
}

template <bool kWhole, class T>
void run(const StepBatch& batch, const GaloreStepArgs& args, int64_t pieces, Stream stream) {
  const auto blocks = static_cast<unsigned>(pieces);
  if constexpr (!kWhole) {
    if (args.rows > 0) {
      if (pieces > 0) launch(galore_push_kernel<T>, blocks, kThreads, 0, stream, batch, args);
      launch(galore_solve_kernel, static_cast<unsigned>(batch.count), kWarp, 0, stream, batch, args);
    }
  }
  if (pieces > 0) launch(galore_step_kernel<kWhole, T>, blocks, kThreads, 0, stream, batch, args);
}

}  // namespace

size_t galore_step_workspace(const GaloreStepArgs& args) {
  return bytes_of([&](Workspace& room) { lay_out(args, room); });
}

void galore_step(const GaloreStepArgs& args, Stream stream) {
  check_args(args, "galore_step");
  Workspace memory(args.workspace);
  const Room room = lay_out(args, memory);
  for (int64_t start = 0; start < args.count; start += kMost) {
    StepBatch batch{};
    const int64_t pieces = fill(batch, args, start);
    batch.sums = room.sums, batch.root = room.root, batch.c = room.c;
    if (args.whole) {
      dispatch_dtype(args.dtype, [&](auto t) { run<true, decltype(t)>(batch, args, pieces, stream); });
    } else if (args.history_dtype == DType::kBFloat16) {
      run<false, __nv_bfloat16>(batch, args, pieces, stream);
    } else {
      run<false, float>(batch, args, pieces, stream);
    }
  }
}

void galore_update(const GaloreUpdateArgs& args, Stream stream) {
  dispatch_dtype(args.dtype, [&](auto t) {
    launch(galore_update_kernel<decltype(t)>, striding_blocks(args.elements, kThreads), kThreads, 0, stream, args);
  });
}

}  // namespace deftcore::cuda
