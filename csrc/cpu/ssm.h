// What the selective scan and its backward share: blocks of channels, their steps and their b and c.
#pragma once

#include "gates.h"
#include "scan_tile.h"

namespace deftcore::cpu {
namespace {

// A block's row of channels is a line of floats, in as many vectors as that takes: lines are read once, and narrow
// vectors share what is done per step.
constexpr int kVectors = kWidth > 1 && kWidth < 16 ? 16 / kWidth : 1;
constexpr int kRow = kVectors * kWidth;
constexpr int64_t kBlockFloats = kVectors * kTileFloats;

// Channels of one group.
struct Block : Lanes {
  int64_t group;
  int64_t vectors() const { return (count + kWidth - 1) / kWidth; }
};

inline Block block_of(const SelectiveScanArgs& args, int64_t index) {
  const int64_t size = args.channels / args.groups, per_group = (size + kRow - 1) / kRow;
  const int64_t group = index / per_group, offset = index % per_group * kRow;
  return {{group * size + offset, std::min<int64_t>(size - offset, kRow)}, group};
}

inline int64_t block_count(const SelectiveScanArgs& args) {
  const int64_t size = args.channels / args.groups;
  return args.groups * ((size + kRow - 1) / kRow);
}

// One vector's steps: delta + bias, through softplus, whose slope goes to `slopes` where given. `steps` may be `delta`.
// Returns the largest size of each lane's.
inline Vec to_steps(const SelectiveScanArgs& args, Lanes lanes, int64_t count, const float* delta, float* steps,
                    float* slopes) {
  const Vec bias = args.delta_bias == nullptr ? Vec(0.0f) : load_some(args.delta_bias + lanes.first, lanes.count);
  Vec largest(0.0f);
  for (int64_t i = 0; i < count * kWidth; i += kWidth) {
    const Vec v = load(delta + i) + bias;
    Vec step = v;
    if (args.softplus) {
      const Softplus soft = softplus(v);
      step = soft.value;
      if (slopes != nullptr) store(slopes + i, sigmoid(v, soft.w));
    }
    store(steps + i, step);
    largest = at_least(abs(step), largest);
  }
  return largest;
}

// b or c of one group over a chunk as [states, kScanChunk], so that a state's steps are neighbours.
inline void turn(const SelectiveScanArgs& args, const float* data, int64_t batch, int64_t group, int64_t start,
                 int64_t steps, float* turned) {
  for (int64_t t = 0; t < steps; ++t) {
    const float* row = data + ((batch * args.length + start + t) * args.groups + group) * args.states;
    for (int64_t n = 0; n < args.states; ++n) turned[n * kScanChunk + t] = row[n];
  }
}

// b or c at one step and state: a number for the whole block, or its channels' own where fixed.
template <bool kFixed>
struct Coefficients {
  const float* base;
  int64_t channels, count;
  Coefficients(const SelectiveScanArgs& args, const float* fixed, const float* turned, Lanes lanes)
      : base(kFixed ? fixed + lanes.first : turned), channels(args.channels), count(lanes.count) {}
  Vec at(int64_t t, int64_t n) const {
    if constexpr (kFixed) return load_some(base + n * channels, count);
    return Vec(base[n * kScanChunk + t]);
  }
};

template <class Fn>
inline void dispatch_fixed(const SelectiveScanArgs& args, Fn&& fn) {
  using Yes = std::true_type;
  using No = std::false_type;
  if (args.fixed_b) return args.fixed_c ? fn(Yes{}, Yes{}) : fn(Yes{}, No{});
  return args.fixed_c ? fn(No{}, Yes{}) : fn(No{}, No{});
}

}  // namespace
}  // namespace deftcore::cpu
