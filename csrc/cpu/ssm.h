// What the selective scan and its backward share: blocks of channels, their steps and their b and c.
#pragma once

#include "scan_tile.h"

namespace deftcore::cpu {
namespace {

// Channels of one group.
struct Block : Lanes {
  int64_t group;
};

inline Block block_of(const SelectiveScanArgs& args, int64_t index) {
  const int64_t size = args.channels / args.groups, per_group = (size + kWidth - 1) / kWidth;
  const int64_t group = index / per_group, offset = index % per_group * kWidth;
  return {{group * size + offset, std::min<int64_t>(size - offset, kWidth)}, group};
}

inline int64_t block_count(const SelectiveScanArgs& args) {
  const int64_t size = args.channels / args.groups;
  return args.groups * ((size + kWidth - 1) / kWidth);
}

// delta in place of which the step: delta + bias, through softplus. Returns the largest size of each lane's.
inline Vec to_steps(const SelectiveScanArgs& args, const Block& block, int64_t steps, float* tile) {
  const Vec bias = args.delta_bias == nullptr ? Vec(0.0f) : load_some(args.delta_bias + block.first, block.count);
  Vec largest(0.0f);
  for (int64_t t = 0; t < steps; ++t) {
    const Vec v = load(tile + t * kWidth) + bias, step = args.softplus ? math::softplus(v) : v;
    store(tile + t * kWidth, step);
    largest = at_least(abs(step), largest);
  }
  return largest;
}

// b or c at one step and state: a number for the whole block, or its channels' own where fixed.
template <bool kFixed>
struct Coefficients {
  const float* base;
  int64_t time, state;  // strides
  int64_t count;
  Coefficients(const SelectiveScanArgs& args, const float* data, int64_t batch, int64_t start, const Block& block) {
    time = args.groups * args.states;
    state = kFixed ? args.channels : 1;
    base = data + (kFixed ? block.first : (batch * args.length + start) * time + block.group * args.states);
    count = block.count;
  }
  // From a copy as [states, kScanChunk].
  void read_from(const float* turned) {
    base = turned;
    time = 1;
    state = kScanChunk;
  }
  Vec at(int64_t t, int64_t n) const {
    if constexpr (kFixed) return load_some(base + n * state, count);
    return Vec(base[t * time + n * state]);
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
