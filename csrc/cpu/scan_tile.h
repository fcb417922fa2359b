// Reading and writing [batch, time, channel] tensors of any layout as tiles [time, kWidth]: one vector of channels per
// step. Rows of a channels-last tensor are far apart, which defeats the hardware's prefetching: each row read also asks
// for the line that the next block of channels will want, or a kernel that computes for long asks for some at a time.
#pragma once

#include <algorithm>

#include "decay.h"
#include "transpose.h"

namespace deftcore::cpu {
namespace {

constexpr int64_t kTileFloats = kScanChunk * kWidth;
constexpr size_t kAhead = 64;  // bytes

inline int64_t chunk_count(int64_t length) { return (length + kScanChunk - 1) / kScanChunk; }

// Channels first .. first + count, at most kWidth.
struct Lanes {
  int64_t first, count;
};

template <class T>
inline Vec load_some(const T* p, int64_t count) {
  return count == kWidth ? load(p) : load_tail(p, count);
}
template <class T>
inline void store_some(T* p, Vec v, int64_t count) {
  if (count == kWidth) return store(p, v);
  store_tail(p, v, count);
}
inline void add_to(float* p, Vec v, int64_t count) { store_some(p, load_some(p, count) + v, count); }

// Whether a channel's steps stand side by side, and are enough to be turned in registers.
inline bool turns(const ScanTensor& x, int64_t steps) { return kWidth > 1 && x.time == 1 && steps >= kWidth; }

// Asks for what the next block of channels will want of some steps: a core waits for ten to twenty lines at once, so
// that requests spread over the work on a block cost nothing, and a burst of them stops it.
template <class T>
void ask_ahead(const ScanTensor& x, int64_t batch, int64_t start, int64_t steps, Lanes lanes) {
  if (x.channel != 1 || x.data == nullptr) return;
  const T* row = static_cast<const T*>(x.data) + batch * x.batch + start * x.time + lanes.first;
  for (int64_t t = 0; t < steps; ++t) __builtin_prefetch(row + t * x.time + kAhead / sizeof(T));
}

// steps x kWidth values of a tensor as floats, lanes past the block zero.
template <class T, bool kAsk = true>
void read_tile(const ScanTensor& x, int64_t batch, int64_t start, int64_t steps, Lanes lanes, float* tile) {
  const T* from = static_cast<const T*>(x.data) + batch * x.batch + start * x.time + lanes.first * x.channel;
  if (x.channel == 1) {
    for (int64_t t = 0; t < steps; ++t) {
      const T* row = from + t * x.time;
      if (kAsk) __builtin_prefetch(row + kAhead / sizeof(T));
      store(tile + t * kWidth, load_some(row, lanes.count));
    }
    return;
  }
  if (turns(x, steps)) {
    for (int64_t t = 0; t < steps; t += kWidth) {
      const int64_t at = std::min(t, steps - kWidth);  // the last piece again over some that were done
      Vec rows[kWidth];
      for (int j = 0; j < kWidth; ++j) rows[j] = j < lanes.count ? load(from + j * x.channel + at) : Vec(0.0f);
      transpose(rows);
      for (int i = 0; i < kWidth; ++i) store(tile + (at + i) * kWidth, rows[i]);
    }
    return;
  }
  if (lanes.count < kWidth) std::fill(tile, tile + steps * kWidth, 0.0f);
  for (int64_t j = 0; j < lanes.count; ++j) {
    for (int64_t t = 0; t < steps; ++t) tile[t * kWidth + j] = to_float(from[j * x.channel + t * x.time]);
  }
}

template <class T, bool kAsk = true>
void write_tile(const ScanTensor& x, int64_t batch, int64_t start, int64_t steps, Lanes lanes, const float* tile) {
  T* to = static_cast<T*>(x.data) + batch * x.batch + start * x.time + lanes.first * x.channel;
  if (x.channel == 1) {
    for (int64_t t = 0; t < steps; ++t) {
      if (kAsk) __builtin_prefetch(to + t * x.time + kAhead / sizeof(T), 1);
      store_some(to + t * x.time, load(tile + t * kWidth), lanes.count);
    }
    return;
  }
  if (turns(x, steps)) {
    for (int64_t t = 0; t < steps; t += kWidth) {
      const int64_t at = std::min(t, steps - kWidth);
      Vec rows[kWidth];
      for (int i = 0; i < kWidth; ++i) rows[i] = load(tile + (at + i) * kWidth);
      transpose(rows);
      for (int j = 0; j < kWidth; ++j) {
        if (j < lanes.count) store(to + j * x.channel + at, rows[j]);
      }
    }
    return;
  }
  T row[kTileFloats];
  for (int64_t t = 0; t < steps; ++t) store(row + t * kWidth, load(tile + t * kWidth));
  for (int64_t j = 0; j < lanes.count; ++j) {
    for (int64_t t = 0; t < steps; ++t) to[j * x.channel + t * x.time] = row[t * kWidth + j];
  }
}

}  // namespace
}  // namespace deftcore::cpu
