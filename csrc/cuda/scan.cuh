// What the scans share: element access to tensors of any layout, and the cut of the work. A thread owns a channel and
// runs through time, kStateBlock states in registers at once; a chunk's steps stand in shared memory, a column per
// thread, so that threads never wait for each other.
#pragma once

#include "deftcore/math.h"
#include "deftcore/ssm.h"
#include "elements.cuh"
#include "launch.cuh"

namespace deftcore::cuda {
namespace {

template <class T>
__device__ float read_at(const ScanTensor& x, int64_t batch, int64_t time, int64_t channel) {
  return to_float(static_cast<const T*>(x.data)[batch * x.batch + time * x.time + channel * x.channel]);
}

template <class T>
__device__ void write_at(const ScanTensor& x, int64_t batch, int64_t time, int64_t channel, float value) {
  static_cast<T*>(x.data)[batch * x.batch + time * x.time + channel * x.channel] = from_float<T>(value);
}

// ---------------------------------------------------------------------------- scans

// Neither is tuned yet: on an H100 256 steps of selective_scan, width 1536, take 0.56 ms forward and 2.4 with the
// backward.
constexpr int kScanThreads = 64;
constexpr int kStateBlock = 16;
constexpr int kScanWarps = kScanThreads / kWarp;
constexpr int kSteps = static_cast<int>(kScanChunk);  // of a chunk

// A chunk's numbers, [step][thread].
using Tile = float[kSteps][kScanThreads];

__host__ __device__ inline int64_t chunks_of(int64_t length) { return ceil_div(length, kScanChunk); }

__device__ inline int steps_from(int64_t start, int64_t length) {
  return static_cast<int>(length - start < kSteps ? length - start : kSteps);
}

// Channels come in parts, Mamba's groups and Mamba-2's heads, and those of a block are of one part.
__host__ __device__ inline int64_t part_channels(const SelectiveScanArgs& args) { return args.channels / args.groups; }
__host__ __device__ inline const int64_t& part_channels(const SsdArgs& args) { return args.head_dim; }
__host__ __device__ inline int64_t parts_of(const SelectiveScanArgs& args) { return args.groups; }
__host__ __device__ inline int64_t parts_of(const SsdArgs& args) { return args.heads; }
// Whose b and c a part uses.
__device__ inline int64_t group_of(const SelectiveScanArgs&, int64_t part) { return part; }
__device__ inline int64_t group_of(const SsdArgs& args, int64_t part) { return part * args.groups / args.heads; }

// All in the first dimension, the only one that takes more than 65535.
template <class Args>
unsigned scan_grid(const Args& args) {
  return static_cast<unsigned>(args.batch * parts_of(args) * ceil_div(part_channels(args), kScanThreads));
}

// This thread's channel; threads past the part's last one take part in warp sums with zeros.
struct Owner {
  int64_t batch, part, group, channel;
  bool active;
};

template <class Args>
__device__ Owner owner_of(const Args& args) {
  const int64_t& channels = part_channels(args);
  // In 32 bits, as the grid's own numbers are: 64 cost the scans 20 to 60 registers.
  const auto blocks = static_cast<unsigned>(ceil_div(channels, kScanThreads));
  const auto parts = static_cast<unsigned>(parts_of(args));
  const unsigned part = blockIdx.x / blocks % parts, batch = blockIdx.x / blocks / parts;
  const int64_t offset = blockIdx.x % blocks * kScanThreads + threadIdx.x;
  const bool active = offset < channels;
  return {batch, part, group_of(args, part), part * channels + (active ? offset : 0), active};
}

// Where an owner's coefficients stand in a [batch, length, groups, states] tensor.
template <class Args>
__device__ int64_t group_row(const Args& args, const Owner& own, int64_t time) {
  return ((own.batch * args.length + time) * args.groups + own.group) * args.states;
}

}  // namespace
}  // namespace deftcore::cuda
