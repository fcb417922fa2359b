// Causal depthwise convolution, its backward and its one-step form: bound by memory traffic, a thread per element with
// channels side by side; the width - 1 neighbours come from the caches. Sums over time (weights, bias) take 64 steps
// per thread and end in an atomic.
#include "scan.cuh"

namespace deftcore::cuda {
namespace {

constexpr int64_t kSumSteps = 64;

// x at a step that may lie before the start.
template <class T>
__device__ float input_at(const CausalConv1dArgs& args, int64_t batch, int64_t time, int64_t channel) {
  if (time >= 0) return read_at<T>(args.x, batch, time, channel);
  return args.first.data == nullptr ? 0.0f : read_at<T>(args.first, batch, time + args.width - 1, channel);
}

// How many earlier steps the taps of step `time` may use.
__device__ int64_t reach_of(const CausalConv1dArgs& args, int64_t batch, int64_t time) {
  const int64_t most = args.width - 1;
  if (args.sequence == nullptr) return most;
  const int32_t* own = args.sequence + batch * args.length;
  int64_t back = 0;
  while (back < most && (time - back < 1 || own[time - back - 1] == own[time])) ++back;
  return back;
}

template <class T>
__device__ float convolve(const CausalConv1dArgs& args, int64_t batch, int64_t time, int64_t channel) {
  float sum = args.bias == nullptr ? 0.0f : args.bias[channel];
#pragma unroll 1  // unrolled inside another loop it spills registers
  for (int64_t back = reach_of(args, batch, time); back >= 0; --back) {
    sum +=
        args.weight[(args.width - 1 - back) * args.channels + channel] * input_at<T>(args, batch, time - back, channel);
  }
  return sum;
}

// The gradient of the sum before the activation.
template <class T>
__device__ float slope_at(const CausalConv1dArgs& args, int64_t batch, int64_t time, int64_t channel) {
  const float grad = read_at<T>(args.out, batch, time, channel);
  return args.silu ? grad * math::activate_grad<Activation::kSilu>(convolve<T>(args, batch, time, channel)).grad : grad;
}

template <class T>
__global__ void __launch_bounds__(kThreads) forward_kernel(CausalConv1dArgs args) {
  const int64_t i = thread_in_grid();
  if (i >= args.batch * args.length * args.channels) return;
  const int64_t channel = i % args.channels, time = i / args.channels % args.length;
  const int64_t batch = i / args.channels / args.length;
  const float sum = convolve<T>(args, batch, time, channel);
  write_at<T>(args.out, batch, time, channel, args.silu ? math::activate<Activation::kSilu>(sum) : sum);
}

// Steps 1 - width .. -1 are what came before.
template <class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks) input_kernel(CausalConv1dBackwardArgs back) {
  const CausalConv1dArgs& args = back.forward;
  const int64_t most = args.width - 1, rows = args.length + most, i = thread_in_grid();
  if (i >= args.batch * rows * args.channels) return;
  const int64_t channel = i % args.channels, time = i / args.channels % rows - most;
  const int64_t batch = i / args.channels / rows;
  if (time < 0 && back.grad_first.data == nullptr) return;
  float sum = 0.0f;
  for (int64_t j = time < 0 ? -time : 0; j <= most && time + j < args.length; ++j) {
    if (j > reach_of(args, batch, time + j)) continue;
    sum += args.weight[(most - j) * args.channels + channel] * slope_at<T>(args, batch, time + j, channel);
  }
  if (time < 0) {
    write_at<T>(back.grad_first, batch, time + most, channel, sum);
  } else {
    write_at<T>(back.grad_x, batch, time, channel, sum);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kMinBlocks) sums_kernel(CausalConv1dBackwardArgs back) {
  const CausalConv1dArgs& args = back.forward;
  const int64_t pieces = ceil_div(args.length, kSumSteps), i = thread_in_grid();
  if (i >= args.batch * pieces * args.channels) return;
  const int64_t channel = i % args.channels, start = i / args.channels % pieces * kSumSteps;
  const int64_t batch = i / args.channels / pieces;
  const int64_t end = start + kSumSteps < args.length ? start + kSumSteps : args.length;
  float sum = 0.0f;
  for (int64_t k = 0; k < args.width; ++k) {
    const int64_t reach = args.width - 1 - k;
    float tap = 0.0f;
    for (int64_t t = start; t < end; ++t) {
      const float grad = slope_at<T>(args, batch, t, channel);
      if (k == 0) sum += grad;
      if (reach <= reach_of(args, batch, t)) tap += grad * input_at<T>(args, batch, t - reach, channel);
    }
    if (back.grad_weight != nullptr) atomicAdd(back.grad_weight + k * args.channels + channel, tap);
  }
  if (back.grad_bias != nullptr) atomicAdd(back.grad_bias + channel, sum);
}

template <class T>
__global__ void __launch_bounds__(kThreads) update_kernel(CausalConv1dUpdateArgs args) {
  const int64_t i = thread_in_grid();
  if (i >= args.batch * args.channels) return;
  const int64_t channel = i % args.channels, batch = i / args.channels;
  const int64_t slot = args.slots == nullptr ? batch : args.slots[batch];
  T* state = static_cast<T*>(args.state) + (slot * args.channels + channel) * args.window;
  const auto at = [&](int64_t step) {
    return step < args.window ? to_float(state[step]) : read_at<T>(args.x, batch, step - args.window, channel);
  };
  for (int64_t t = 0; t < args.length; ++t) {
    float sum = args.bias == nullptr ? 0.0f : args.bias[channel];
    for (int64_t k = 0; k < args.width && slot >= 0; ++k) {
      sum += args.weight[k * args.channels + channel] * at(args.window + t - args.width + 1 + k);
    }
    const float value = args.silu ? math::activate<Activation::kSilu>(sum) : sum;
    write_at<T>(args.out, batch, t, channel, slot < 0 ? 0.0f : value);
  }
  for (int64_t k = 0; k < args.window && slot >= 0; ++k) state[k] = from_float<T>(at(args.length + k));
}

}  // namespace

// ----------------------------------------------------------------------------

void causal_conv1d(const CausalConv1dArgs& args, Stream stream) {
  check_args(args, "causal_conv1d");
  const int64_t items = args.batch * args.length * args.channels;
  if (items == 0) return;
  dispatch_dtype(args.dtype, [&](auto t) {
    launch(forward_kernel<decltype(t)>, blocks_for(items, kThreads), kThreads, 0, stream, args);
  });
}

void causal_conv1d_backward(const CausalConv1dBackwardArgs& back, Stream stream) {
  check_args(back, "causal_conv1d_backward");
  const CausalConv1dArgs& args = back.forward;
  const int64_t items = args.batch * (args.length + args.width - 1) * args.channels;
  const int64_t sums = args.batch * ceil_div(args.length, kSumSteps) * args.channels;
  if (items == 0) return;
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    launch(input_kernel<T>, blocks_for(items, kThreads), kThreads, 0, stream, back);
    if (sums == 0 || (back.grad_weight == nullptr && back.grad_bias == nullptr)) return;
    launch(sums_kernel<T>, blocks_for(sums, kThreads), kThreads, 0, stream, back);
  });
}

void causal_conv1d_update(const CausalConv1dUpdateArgs& args, Stream stream) {
  check_args(args, "causal_conv1d_update");
  const int64_t items = args.batch * args.channels;
  if (items == 0) return;
  dispatch_dtype(args.dtype, [&](auto t) {
    launch(update_kernel<decltype(t)>, blocks_for(items, kThreads), kThreads, 0, stream, args);
  });
}

}  // namespace deftcore::cuda
