// The sum of a causal depthwise convolution at one step, a block of channels at a time.
#pragma once

#include "scan_tile.h"

namespace deftcore::cpu {
namespace {

inline Lanes lanes_of(int64_t channels, int64_t block) {
  return {block * kWidth, std::min<int64_t>(channels - block * kWidth, kWidth)};
}

struct Taps {
  Vec weight[kMaxConvWidth];
  Vec bias;
};

inline Taps taps_of(const float* weight, const float* bias, int64_t width, int64_t channels, Lanes lanes) {
  Taps taps;
  for (int64_t k = 0; k < width; ++k) taps.weight[k] = load_some(weight + k * channels + lanes.first, lanes.count);
  taps.bias = bias == nullptr ? Vec(0.0f) : load_some(bias + lanes.first, lanes.count);
  return taps;
}

// The sum before the activation; `row` is the oldest tap's. kTaps 0: any width, taps beyond `reach` left out.
template <int kTaps>
Vec convolve(const Taps& taps, const float* row, int64_t width, int64_t reach) {
  Vec sum = taps.bias;
  if constexpr (kTaps > 0) {
    for (int k = 0; k < kTaps; ++k) sum = fma(taps.weight[k], load(row + k * kWidth), sum);
  } else {
    for (int64_t k = width - 1 - reach; k < width; ++k) sum = fma(taps.weight[k], load(row + k * kWidth), sum);
  }
  return sum;
}

}  // namespace
}  // namespace deftcore::cpu
