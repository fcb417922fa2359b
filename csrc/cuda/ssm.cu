// Selective scan (Mamba), cut as scan.cuh says, and its one-step form. Sums over channels (b, c) are taken in a warp,
// written out per warp and added in a fixed order by a second kernel; those over time and batch (a, d, bias, fixed b
// and c) use atomics.
#include "deftcore/workspace.h"
#include "scan.cuh"

namespace deftcore::cuda {
namespace {

constexpr int kBackwardBlock = 8;  // states in registers; the adjoint keeps three numbers per state

// As scan.cuh's, or of an x [channels, states] that holds for all times.
__device__ float coefficient(const SelectiveScanArgs& args, const float* x, bool fixed, const Owner& own, int64_t time,
                             int64_t n) {
  if (n >= args.states) return 0.0f;
  if (fixed) return x[n * args.channels + own.channel];
  return x[group_row(args, own, time) + n];
}

__device__ float step_at(const SelectiveScanArgs& args, float delta, int64_t channel) {
  const float v = delta + (args.delta_bias == nullptr ? 0.0f : args.delta_bias[channel]);
  return args.softplus ? math::softplus(v) : v;
}

template <class T>
__global__ void __launch_bounds__(kScanThreads, kMinBlocks) scan_kernel(SelectiveScanArgs args) {
  __shared__ Tile u, step, y;
  const Owner own = owner_of(args);
  const int lane = static_cast<int>(threadIdx.x);
  if (!own.active) return;
  const int64_t plane = own.batch * args.states * args.channels + own.channel;
  for (int64_t n = 0; n < args.states; ++n) {
    args.last[plane + n * args.channels] = args.first == nullptr ? 0.0f : args.first[plane + n * args.channels];
  }
  const float d = args.d == nullptr ? 0.0f : args.d[own.channel];
  for (int64_t chunk = 0; chunk < chunks_of(args.length); ++chunk) {
    const int64_t start = chunk * kSteps;
    const int steps = steps_from(start, args.length);
    for (int t = 0; t < steps; ++t) {
      u[t][lane] = read_at<T>(args.u, own.batch, start + t, own.channel);
      step[t][lane] = step_at(args, read_at<T>(args.delta, own.batch, start + t, own.channel), own.channel);
      y[t][lane] = d * u[t][lane];
    }
    for (int64_t n0 = 0; n0 < args.states; n0 += kStateBlock) {
      float a[kStateBlock], h[kStateBlock];
#pragma unroll
      for (int i = 0; i < kStateBlock; ++i) {
        const bool there = n0 + i < args.states;
        a[i] = there ? args.a[(n0 + i) * args.channels + own.channel] : 0.0f;
        h[i] = there ? args.last[plane + (n0 + i) * args.channels] : 0.0f;
        if (there && args.chunks != nullptr) {
          args.chunks[((own.batch * chunks_of(args.length) + chunk) * args.states + n0 + i) * args.channels +
                      own.channel] = h[i];
        }
      }
      for (int t = 0; t < steps; ++t) {
        const float s = step[t][lane], su = s * u[t][lane];
        float sum = y[t][lane];
#pragma unroll
        for (int i = 0; i < kStateBlock; ++i) {
          h[i] = expf(s * a[i]) * h[i] + su * coefficient(args, args.b, args.fixed_b, own, start + t, n0 + i);
          sum += coefficient(args, args.c, args.fixed_c, own, start + t, n0 + i) * h[i];
        }
        y[t][lane] = sum;
      }
#pragma unroll
      for (int i = 0; i < kStateBlock; ++i) {
        if (n0 + i < args.states) args.last[plane + (n0 + i) * args.channels] = h[i];
      }
    }
    for (int t = 0; t < steps; ++t) {
      float out = y[t][lane];
      if (args.z.data != nullptr) {
        out *= math::activate<Activation::kSilu>(read_at<T>(args.z, own.batch, start + t, own.channel));
      }
      write_at<T>(args.out, own.batch, start + t, own.channel, out);
    }
  }
}

// ---------------------------------------------------------------------------- backward

int64_t warps_of(const SelectiveScanArgs& args) {
  return ceil_div(args.channels / args.groups, kScanThreads) * kScanWarps;
}

// The workspace: parts of b's and of c's gradient, [batch, length, groups, warps, states] each.
struct PartialSums {
  float *b, *c;
  size_t bytes;
};

PartialSums lay_out(const SelectiveScanBackwardArgs& back) {
  const SelectiveScanArgs& args = back.forward;
  const int64_t floats = args.batch * args.length * args.groups * warps_of(args) * args.states;
  Workspace room(back.workspace, kArrayAlignment);
  PartialSums parts{};
  parts.b = room.take<float>(floats);
  parts.c = room.take<float>(floats);
  parts.bytes = room.size();
  return parts;
}

template <class T>
__global__ void __launch_bounds__(kScanThreads)
    backward_kernel(SelectiveScanBackwardArgs back, int64_t warps, float* parts_b, float* parts_c) {
  __shared__ Tile u, step, dy, y, into_u, into_step;
  const SelectiveScanArgs& args = back.forward;
  const Owner own = owner_of(args);
  const int lane = static_cast<int>(threadIdx.x);
  const int64_t plane = own.batch * args.states * args.channels + own.channel;
  const int64_t warp = blockIdx.x % (warps / kScanWarps) * kScanWarps + threadIdx.x / kWarp;
  const float d = args.d == nullptr ? 0.0f : args.d[own.channel];
  float sum_d = 0.0f, sum_bias = 0.0f;
  for (int64_t chunk = chunks_of(args.length) - 1; chunk >= 0; --chunk) {
    const int64_t start = chunk * kSteps;
    const int steps = steps_from(start, args.length);
    for (int t = 0; t < steps; ++t) {
      const bool on = own.active;
      u[t][lane] = on ? read_at<T>(args.u, own.batch, start + t, own.channel) : 0.0f;
      step[t][lane] = on ? step_at(args, read_at<T>(args.delta, own.batch, start + t, own.channel), own.channel) : 0.0f;
      float grad = on ? read_at<T>(args.out, own.batch, start + t, own.channel) : 0.0f;
      if (on && args.z.data != nullptr) {
        grad *= math::activate<Activation::kSilu>(read_at<T>(args.z, own.batch, start + t, own.channel));
      }
      dy[t][lane] = grad;
      y[t][lane] = d * u[t][lane];
      into_u[t][lane] = into_step[t][lane] = 0.0f;
      sum_d += grad * u[t][lane];
    }
    for (int64_t n0 = 0; n0 < args.states; n0 += kBackwardBlock) {
      float a[kBackwardBlock], g[kBackwardBlock], sum_a[kBackwardBlock], history[kSteps + 1][kBackwardBlock];
      for (int i = 0; i < kBackwardBlock; ++i) {
        const bool there = own.active && n0 + i < args.states;
        const int64_t place = (n0 + i) * args.channels + own.channel;
        a[i] = there ? args.a[place] : 0.0f;
        g[i] = there ? back.grad_first[plane + (n0 + i) * args.channels] : 0.0f;
        sum_a[i] = 0.0f;
        history[0][i] =
            there ? args.chunks[(own.batch * chunks_of(args.length) + chunk) * args.states * args.channels + place]
                  : 0.0f;
      }
      for (int t = 0; t < steps; ++t) {
        const float s = step[t][lane], su = s * u[t][lane];
        for (int i = 0; i < kBackwardBlock; ++i) {
          history[t + 1][i] =
              expf(s * a[i]) * history[t][i] + su * coefficient(args, args.b, args.fixed_b, own, start + t, n0 + i);
          y[t][lane] += coefficient(args, args.c, args.fixed_c, own, start + t, n0 + i) * history[t + 1][i];
        }
      }
      for (int t = steps - 1; t >= 0; --t) {
        const float s = step[t][lane], ut = u[t][lane], dyt = dy[t][lane];
        float to_u = 0.0f, to_step = 0.0f;
        for (int i = 0; i < kBackwardBlock; ++i) {
          const float b = coefficient(args, args.b, args.fixed_b, own, start + t, n0 + i);
          const float c = coefficient(args, args.c, args.fixed_c, own, start + t, n0 + i);
          const float decay = expf(s * a[i]), decayed = decay * history[t][i];
          g[i] += c * dyt;
          to_u += g[i] * b;
          to_step += g[i] * (a[i] * decayed + b * ut);
          sum_a[i] += s * g[i] * decayed;
          const float into_b = g[i] * s * ut, into_c = dyt * history[t + 1][i];
          const int64_t n = n0 + i, place = n * args.channels + own.channel;
          const int64_t part =
              (((own.batch * args.length + start + t) * args.groups + own.group) * warps + warp) * args.states + n;
          if (args.fixed_b) {
            if (back.grad_b != nullptr && own.active && n < args.states) atomicAdd(back.grad_b + place, into_b);
          } else if (back.grad_b != nullptr) {
            const float sum = warp_sum(into_b);
            if (threadIdx.x % kWarp == 0 && n < args.states) parts_b[part] = sum;
          }
          if (args.fixed_c) {
            if (back.grad_c != nullptr && own.active && n < args.states) atomicAdd(back.grad_c + place, into_c);
          } else if (back.grad_c != nullptr) {
            const float sum = warp_sum(into_c);
            if (threadIdx.x % kWarp == 0 && n < args.states) parts_c[part] = sum;
          }
          g[i] *= decay;
        }
        into_u[t][lane] += to_u;
        into_step[t][lane] += to_step;
      }
      for (int i = 0; i < kBackwardBlock; ++i) {
        if (!own.active || n0 + i >= args.states) continue;
        back.grad_first[plane + (n0 + i) * args.channels] = g[i];
        if (back.grad_a != nullptr) atomicAdd(back.grad_a + (n0 + i) * args.channels + own.channel, sum_a[i]);
      }
    }
    if (!own.active) continue;
    for (int t = 0; t < steps; ++t) {
      const float raw = read_at<T>(args.delta, own.batch, start + t, own.channel) +
                        (args.delta_bias == nullptr ? 0.0f : args.delta_bias[own.channel]);
      const float slope = !args.softplus || raw > math::kSoftplusLinear ? 1.0f : 1.0f / (1.0f + expf(-raw));
      if (args.z.data != nullptr) {
        const auto gate = math::activate_grad<Activation::kSilu>(read_at<T>(args.z, own.batch, start + t, own.channel));
        const float grad = read_at<T>(args.out, own.batch, start + t, own.channel);
        if (back.out_again.data != nullptr) {
          write_at<T>(back.out_again, own.batch, start + t, own.channel, y[t][lane] * gate.value);
        }
        write_at<T>(back.grad_z, own.batch, start + t, own.channel, grad * y[t][lane] * gate.grad);
      }
      const float into_delta = into_step[t][lane] * slope;
      sum_bias += into_delta;
      write_at<T>(back.grad_u, own.batch, start + t, own.channel, step[t][lane] * into_u[t][lane] + d * dy[t][lane]);
      write_at<T>(back.grad_delta, own.batch, start + t, own.channel, into_delta);
    }
  }
  if (own.active && back.grad_d != nullptr) atomicAdd(back.grad_d + own.channel, sum_d);
  if (own.active && back.grad_delta_bias != nullptr) atomicAdd(back.grad_delta_bias + own.channel, sum_bias);
}

// grad [rows, states] from parts [rows, warps, states].
__global__ void add_parts_kernel(const float* parts, float* grad, int64_t rows, int64_t warps, int64_t states) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= rows * states) return;
  const float* from = parts + i / states * warps * states + i % states;
  float sum = 0.0f;
  for (int64_t w = 0; w < warps; ++w) sum += from[w * states];
  grad[i] = sum;
}

// ---------------------------------------------------------------------------- one step

template <class T>
__device__ float value_at(const HeadTensor& x, int64_t batch, int64_t head, int64_t channel) {
  if (x.data == nullptr) return 0.0f;
  return to_float(static_cast<const T*>(x.data)[batch * x.batch + head * x.head + channel * x.channel]);
}

// A warp per channel, its lanes along the states.
template <class T, class S>
__global__ void update_kernel(StateUpdateArgs args) {
  const int64_t rows = args.batch * args.heads * args.head_dim;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarp) + threadIdx.x / kWarp;
  if (row >= rows) return;
  const int64_t channel = row % args.head_dim, head = row / args.head_dim % args.heads;
  const int64_t batch = row / args.head_dim / args.heads, lane = threadIdx.x % kWarp;
  T* out = static_cast<T*>(args.out) + row;
  const int64_t slot = args.slots == nullptr ? batch : args.slots[batch];
  if (slot < 0) {
    if (lane == 0) *out = from_float<T>(0.0f);
    return;
  }
  const float x = value_at<T>(args.x, batch, head, channel);
  float step = value_at<T>(args.dt, batch, head, channel) + value_at<float>(args.bias, 0, head, channel);
  if (args.softplus) step = math::softplus(step);
  S* state = static_cast<S*>(args.state) + ((slot * args.heads + head) * args.head_dim + channel) * args.states;
  const float* a = static_cast<const float*>(args.a.data) + head * args.a.head + channel * args.a.channel;
  const int64_t group = (batch * args.groups + head * args.groups / args.heads) * args.states;
  float sum = 0.0f;
  for (int64_t n = lane; n < args.states; n += kWarp) {
    const float b = to_float(static_cast<const T*>(args.b)[group + n]);
    const float h = expf(step * a[n * args.a_state]) * to_float(state[n]) + step * x * b;
    sum += to_float(static_cast<const T*>(args.c)[group + n]) * h;
    state[n] = from_float<S>(h);
  }
  sum = warp_sum(sum) + value_at<float>(args.d, 0, head, channel) * x;
  if (args.z.data != nullptr) sum *= math::activate<Activation::kSilu>(value_at<T>(args.z, batch, head, channel));
  if (lane == 0) *out = from_float<T>(sum);
}

}  // namespace

// ----------------------------------------------------------------------------

void selective_scan(const SelectiveScanArgs& args, Stream stream) {
  check_args(args, "selective_scan");
  if (args.batch == 0 || args.channels == 0) return;
  dispatch_dtype(args.dtype,
                 [&](auto t) { launch(scan_kernel<decltype(t)>, scan_grid(args), kScanThreads, 0, stream, args); });
}

size_t selective_scan_backward_workspace(const SelectiveScanBackwardArgs& back) { return lay_out(back).bytes; }

void selective_scan_backward(const SelectiveScanBackwardArgs& back, Stream stream) {
  check_args(back, "selective_scan_backward");
  const SelectiveScanArgs& args = back.forward;
  if (args.batch == 0 || args.channels == 0 || args.length == 0) return;
  const int64_t rows = args.batch * args.length * args.groups, warps = warps_of(args);
  const PartialSums parts = lay_out(back);
  dispatch_dtype(args.dtype, [&](auto t) {
    launch(backward_kernel<decltype(t)>, scan_grid(args), kScanThreads, 0, stream, back, warps, parts.b, parts.c);
  });
  const auto add = [&](const float* part, float* grad) {
    const unsigned blocks = blocks_for(rows * args.states, kThreads);
    launch(add_parts_kernel, blocks, kThreads, 0, stream, part, grad, rows, warps, args.states);
  };
  if (back.grad_b != nullptr && !args.fixed_b) add(parts.b, back.grad_b);
  if (back.grad_c != nullptr && !args.fixed_c) add(parts.c, back.grad_c);
}

void selective_state_update(const StateUpdateArgs& args, Stream stream) {
  check_args(args, "selective_state_update");
  const int64_t rows = args.batch * args.heads * args.head_dim;
  if (rows == 0) return;
  constexpr int kUpdateThreads = 128;
  const unsigned blocks = blocks_for(rows, kUpdateThreads / kWarp);
  dispatch_dtype(args.dtype, [&](auto t) {
    dispatch_dtype(args.state_dtype, [&](auto s) {
      launch(update_kernel<decltype(t), decltype(s)>, blocks, kUpdateThreads, 0, stream, args);
    });
  });
}

}  // namespace deftcore::cuda
