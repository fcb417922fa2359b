// One decoding step of either scan: state = exp(step a) state + step b x, out = (c . state + d x) silu(z). A state's
// row is read and written once, in the layout that decoding keeps it in (states side by side).
#pragma once

#include "scan_tile.h"

namespace deftcore::cpu {
namespace {

// The lanes of a [batch, heads, head_dim] tensor; 0 where it is not there.
template <class T>
inline Vec gather(const HeadTensor& x, int64_t batch, int64_t head, Lanes lanes) {
  alignas(64) float values[kWidth] = {};
  const T* from = static_cast<const T*>(x.data) + batch * x.batch + head * x.head + lanes.first * x.channel;
  for (int64_t j = 0; j < lanes.count && x.data != nullptr; ++j) values[j] = to_float(from[j * x.channel]);
  return load(values);
}

template <class T, class S>
void update_block(const StateUpdateArgs& args, int64_t batch, int64_t head, Lanes lanes) {
  T* out = static_cast<T*>(args.out) + (batch * args.heads + head) * args.head_dim + lanes.first;
  const int64_t slot = args.slots == nullptr ? batch : args.slots[batch], states = args.states;
  if (slot < 0) {
    std::fill(out, out + lanes.count, T{});
    return;
  }
  const Vec x = gather<T>(args.x, batch, head, lanes), skip = gather<float>(args.d, 0, head, lanes);
  Vec step = gather<T>(args.dt, batch, head, lanes) + gather<float>(args.bias, 0, head, lanes);
  if (args.softplus) step = math::softplus(step);
  alignas(64) float steps[kWidth], inputs[kWidth], y[kWidth] = {};
  store(steps, step);
  store(inputs, step * x);
  const int64_t group = head * args.groups / args.heads;
  const T* b = static_cast<const T*>(args.b) + (batch * args.groups + group) * states;
  const T* c = static_cast<const T*>(args.c) + (batch * args.groups + group) * states;
  for (int64_t j = 0; j < lanes.count; ++j) {
    const int64_t channel = lanes.first + j;
    S* h = static_cast<S*>(args.state) + ((slot * args.heads + head) * args.head_dim + channel) * states;
    const float* a = static_cast<const float*>(args.a.data) + head * args.a.head + channel * args.a.channel;
    const bool one_decay = args.a_state == 0;
    const Vec s(steps[j]), sx(inputs[j]);
    Vec decay = one_decay ? exp(s * Vec(*a)) : s, sum(0.0f);
    for (int64_t n = 0; n < states; n += kWidth) {
      const int64_t some = std::min<int64_t>(states - n, kWidth);
      if (!one_decay) decay = exp(s * load_some(a + n, some));
      const Vec before = load_some(h + n, some);
      const Vec after = fma(decay, before, sx * load_some(b + n, some));
      sum = fma(load_some(c + n, some), after, sum);
      store_some(h + n, after, some);
    }
    y[j] = reduce_add(sum);
  }
  Vec result = fma(skip, x, load(y));
  if (args.z.data != nullptr) {
    result = result * math::activate<Activation::kSilu>(gather<T>(args.z, batch, head, lanes));
  }
  store_tail(out, result, lanes.count);
}

}  // namespace
}  // namespace deftcore::cpu
