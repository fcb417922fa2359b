// The scalar-decay scan of Mamba-2, cut as scan.cuh says. The backward first runs forward for the states before each
// chunk. Sums over channels are taken in a warp and end in atomics, whose order varies from run to run.
#include "scan.cuh"

namespace deftcore::cuda {
namespace {

__device__ float coefficient(const SsdArgs& args, const float* x, const Owner& own, int64_t time, int64_t n) {
  return n < args.states ? x[group_row(args, own, time) + n] : 0.0f;
}

// Where step t of a chunk stands in a [batch, length, heads] tensor.
__device__ int64_t head_row(const SsdArgs& args, const Owner& own, int64_t start, int t) {
  return (own.batch * args.length + start + t) * args.heads + own.part;
}

// First number of this thread's states in a [batch, channels, states] tensor.
__device__ int64_t states_at(const SsdArgs& args, const Owner& own) {
  return (own.batch * args.heads * args.head_dim + own.channel) * args.states;
}

// Runs forward over all chunks. `bounds` [chunks, states] of this thread receives the states before each chunk, or
// null.
template <class T, bool kWrite>
__device__ void run(const SsdArgs& args, const Owner& own, float* state, float* bounds, Tile sx, Tile y) {
  const int lane = static_cast<int>(threadIdx.x);
  const float d = args.d == nullptr ? 0.0f : args.d[own.channel];
  for (int64_t chunk = 0; chunk < chunks_of(args.length); ++chunk) {
    const int64_t start = chunk * kSteps;
    const int steps = steps_from(start, args.length);
    for (int t = 0; t < steps; ++t) {
      const float x = read_at<T>(args.x, own.batch, start + t, own.channel);
      sx[t][lane] = args.step[head_row(args, own, start, t)] * x;
      if (kWrite) y[t][lane] = d * x;
    }
    for (int64_t n0 = 0; n0 < args.states; n0 += kStateBlock) {
      float h[kStateBlock];
#pragma unroll
      for (int i = 0; i < kStateBlock; ++i) {
        h[i] = n0 + i < args.states ? state[n0 + i] : 0.0f;
        if (bounds != nullptr && n0 + i < args.states) bounds[chunk * args.states + n0 + i] = h[i];
      }
      for (int t = 0; t < steps; ++t) {
        const float decay = expf(args.log_decay[head_row(args, own, start, t)]);
        float sum = kWrite ? y[t][lane] : 0.0f;
#pragma unroll
        for (int i = 0; i < kStateBlock; ++i) {
          h[i] = decay * h[i] + sx[t][lane] * coefficient(args, args.b, own, start + t, n0 + i);
          if (kWrite) sum += coefficient(args, args.c, own, start + t, n0 + i) * h[i];
        }
        if (kWrite) y[t][lane] = sum;
      }
#pragma unroll
      for (int i = 0; i < kStateBlock; ++i) {
        if (n0 + i < args.states) state[n0 + i] = h[i];
      }
    }
    if constexpr (kWrite) {
      for (int t = 0; t < steps; ++t) write_at<T>(args.out, own.batch, start + t, own.channel, y[t][lane]);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kScanThreads) forward_kernel(SsdArgs args) {
  __shared__ Tile sx, y;
  const Owner own = owner_of(args);
  if (!own.active) return;
  const int64_t plane = states_at(args, own);
  for (int64_t n = 0; n < args.states; ++n) args.last[plane + n] = args.first == nullptr ? 0.0f : args.first[plane + n];
  run<T, true>(args, own, args.last + plane, nullptr, sx, y);
}

// Workspace of a channel: states before each chunk, and one more row that `run` works in.
int64_t channel_floats(const SsdArgs& args) { return (chunks_of(args.length) + 1) * args.states; }

template <class T>
__global__ void __launch_bounds__(kScanThreads) backward_kernel(SsdBackwardArgs back, int64_t per_channel) {
  __shared__ Tile x, sx, dy, into;
  const SsdArgs& args = back.forward;
  const Owner own = owner_of(args);
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t plane = states_at(args, own);
  float* bounds =
      static_cast<float*>(back.workspace) + (own.batch * args.heads * args.head_dim + own.channel) * per_channel;
  if (own.active) {
    float* state = bounds + chunks_of(args.length) * args.states;
    for (int64_t n = 0; n < args.states; ++n) state[n] = args.first == nullptr ? 0.0f : args.first[plane + n];
    run<T, false>(args, own, state, bounds, sx, nullptr);
  }
  const float d = args.d == nullptr ? 0.0f : args.d[own.channel];
  float sum_d = 0.0f;
  for (int64_t chunk = chunks_of(args.length) - 1; chunk >= 0; --chunk) {
    const int64_t start = chunk * kSteps;
    const int steps = steps_from(start, args.length);
    for (int t = 0; t < steps; ++t) {
      x[t][lane] = own.active ? read_at<T>(args.x, own.batch, start + t, own.channel) : 0.0f;
      sx[t][lane] = args.step[head_row(args, own, start, t)] * x[t][lane];
      dy[t][lane] = own.active ? read_at<T>(args.out, own.batch, start + t, own.channel) : 0.0f;
      into[t][lane] = 0.0f;
      sum_d += dy[t][lane] * x[t][lane];
    }
    for (int64_t n0 = 0; n0 < args.states; n0 += kStateBlock) {
      float g[kStateBlock], history[kSteps + 1][kStateBlock];
      for (int i = 0; i < kStateBlock; ++i) {
        const bool there = own.active && n0 + i < args.states;
        g[i] = there ? back.grad_first[plane + n0 + i] : 0.0f;
        history[0][i] = there ? bounds[chunk * args.states + n0 + i] : 0.0f;
      }
      for (int t = 0; t < steps; ++t) {
        const float decay = expf(args.log_decay[head_row(args, own, start, t)]);
        for (int i = 0; i < kStateBlock; ++i) {
          history[t + 1][i] = decay * history[t][i] + sx[t][lane] * coefficient(args, args.b, own, start + t, n0 + i);
        }
      }
      for (int t = steps - 1; t >= 0; --t) {
        const int64_t at = head_row(args, own, start, t);
        const int64_t place = group_row(args, own, start + t);
        const float decay = expf(args.log_decay[at]);
        float to_x = 0.0f, to_decay = 0.0f;
        for (int i = 0; i < kStateBlock; ++i) {
          g[i] += coefficient(args, args.c, own, start + t, n0 + i) * dy[t][lane];
          to_x += g[i] * coefficient(args, args.b, own, start + t, n0 + i);
          const float into_b = warp_sum(g[i] * sx[t][lane]), into_c = warp_sum(dy[t][lane] * history[t + 1][i]);
          if (threadIdx.x % kWarp == 0 && n0 + i < args.states) {
            atomicAdd(back.grad_b + place + n0 + i, into_b);
            atomicAdd(back.grad_c + place + n0 + i, into_c);
          }
          g[i] *= decay;
          to_decay += g[i] * history[t][i];
        }
        into[t][lane] += to_x;
        to_decay = warp_sum(to_decay);
        if (threadIdx.x % kWarp == 0) atomicAdd(back.grad_log_decay + at, to_decay);
      }
      for (int i = 0; i < kStateBlock; ++i) {
        if (own.active && n0 + i < args.states) back.grad_first[plane + n0 + i] = g[i];
      }
    }
    for (int t = 0; t < steps; ++t) {
      const int64_t at = head_row(args, own, start, t);
      const float to_step = warp_sum(own.active ? into[t][lane] * x[t][lane] : 0.0f);
      if (threadIdx.x % kWarp == 0) atomicAdd(back.grad_step + at, to_step);
      if (!own.active) continue;
      write_at<T>(back.grad_x, own.batch, start + t, own.channel, args.step[at] * into[t][lane] + d * dy[t][lane]);
    }
  }
  if (own.active && back.grad_d != nullptr) atomicAdd(back.grad_d + own.channel, sum_d);
}

}  // namespace

// ----------------------------------------------------------------------------

void ssd(const SsdArgs& args, Stream stream) {
  check_args(args, "ssd");
  if (args.batch == 0 || args.heads * args.head_dim == 0) return;
  dispatch_dtype(args.dtype,
                 [&](auto t) { launch(forward_kernel<decltype(t)>, scan_grid(args), kScanThreads, 0, stream, args); });
}

size_t ssd_backward_workspace(const SsdBackwardArgs& back) {
  const SsdArgs& args = back.forward;
  return static_cast<size_t>(args.batch * args.heads * args.head_dim * channel_floats(args)) * sizeof(float);
}

void ssd_backward(const SsdBackwardArgs& back, Stream stream) {
  check_args(back, "ssd_backward");
  const SsdArgs& args = back.forward;
  if (args.batch == 0 || args.heads == 0 || args.length == 0) return;
  const size_t bytes = static_cast<size_t>(args.batch * args.length * args.heads) * sizeof(float);
  set_zero(back.grad_step, bytes, stream);  // the kernel adds
  set_zero(back.grad_log_decay, bytes, stream);
  if (args.head_dim == 0) return;
  dispatch_dtype(args.dtype, [&](auto t) {
    launch(backward_kernel<decltype(t)>, scan_grid(args), kScanThreads, 0, stream, back, channel_floats(args));
  });
}

}  // namespace deftcore::cuda
