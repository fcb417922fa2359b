// Reading and writing [batch, time, channel] tensors of any layout as tiles [kVectors, kScanChunk, kWidth]: vectors of
// channels, one per step. Rows of a channels-last tensor are far apart, which defeats the hardware's prefetching: each
// row read also asks for the line that the next block of channels will want, or a kernel that computes for long asks
// for one now and then.
#pragma once

#include <algorithm>

#include "decay.h"
#include "transpose.h"

namespace deftcore::cpu {
namespace {

constexpr int64_t kTileFloats = kScanChunk * kWidth;
constexpr size_t kAhead = 64;  // bytes

inline int64_t chunk_count(int64_t length) { return (length + kScanChunk - 1) / kScanChunk; }

// Channels first .. first + count, at most those of a tile.
struct Lanes {
  int64_t first, count;
};

// Those of a tile's vector v; none where count <= 0.
inline Lanes vector_of(Lanes lanes, int64_t v) {
  return {lanes.first + v * kWidth, std::min<int64_t>(lanes.count - v * kWidth, kWidth)};
}

// None where count <= 0.
template <class T>
inline Vec load_some(const T* p, int64_t count) {
  return count == kWidth ? load(p) : load_tail(p, std::max<int64_t>(count, 0));
}
template <class T>
inline void store_some(T* p, Vec v, int64_t count) {
  if (count == kWidth) return store(p, v);
  store_tail(p, v, std::max<int64_t>(count, 0));
}
inline void add_to(float* p, Vec v, int64_t count) { store_some(p, load_some(p, count) + v, count); }

// Whether a channel's steps stand side by side, and are enough to be turned in registers.
inline bool turns(const ScanTensor& x, int64_t steps) { return kWidth > 1 && x.time == 1 && steps >= kWidth; }

// What the next block of channels will want, a line at a time: a core waits for ten to twenty lines at once, so that
// requests spread over the work on a block cost nothing, and a burst of them stops it. They go to L2: rows some KiB
// apart meet in a few of L1's sets, where they would push each other out.
inline void ask(const void* line) { __builtin_prefetch(line, 0, 2); }
class Asks {
 public:
  Asks(const void* const* lines, int64_t at, int64_t pace) : lines_(lines), at_(at), pace_(pace) {}
  void one() {
    ask(lines_[at_ >> 16]);
    at_ += pace_;
  }

 private:
  const void* const* lines_;
  int64_t at_, pace_;  // in lines / 2^16
};
template <int kTensors>
class Ahead {
 public:
  // Some steps of a tensor, of which a block has `row` channels; as far as there is room.
  template <class T>
  void add(const ScanTensor& x, int64_t batch, int64_t start, int64_t steps, int64_t first, int64_t row) {
    if (x.channel != 1 || x.data == nullptr) return;
    const T* from = static_cast<const T*>(x.data) + batch * x.batch + start * x.time + first;
    if (reinterpret_cast<uintptr_t>(from) % kAhead >= row * sizeof(T)) return;  // the block before asked for it
    for (int64_t t = 0; t < steps && count_ < kMost; ++t) {
      lines_[count_++] = from + t * x.time + kAhead / sizeof(T) + row - 1;
    }
  }
  // All lines of some steps of `count` channels, as far as there is room.
  template <class T>
  void add_rows(const ScanTensor& x, int64_t batch, int64_t start, int64_t steps, int64_t first, int64_t count) {
    if (x.channel != 1 || x.data == nullptr) return;
    for (int64_t t = start; t < start + steps; ++t) {
      const char* from =
          reinterpret_cast<const char*>(static_cast<const T*>(x.data) + batch * x.batch + t * x.time + first);
      const char* end = from + count * static_cast<int64_t>(sizeof(T));
      for (from -= reinterpret_cast<uintptr_t>(from) % kAhead; from < end && count_ < kMost; from += kAhead) {
        lines_[count_++] = from;
      }
    }
  }
  void spread_over(int64_t calls) { pace_ = (count_ << 16) / std::max<int64_t>(calls, 1); }
  // The next some calls of those; each asks for one line, and may ask for the one before again.
  Asks next(int64_t calls) {
    constexpr int64_t kOne = 1 << 16;
    const Asks asks(lines_, at_, std::min(pace_, kOne));
    const int64_t end = std::min(at_ + calls * pace_, count_ << 16);  // more calls than they were spread over
    for (int64_t i = at_ + calls * kOne; i < end; i += kOne) ask(lines_[i >> 16]);
    at_ = end;
    return asks;
  }

 private:
  static constexpr int64_t kMost = kTensors * kScanChunk;
  const void* lines_[kMost + 1] = {};
  int64_t count_ = 0, at_ = 0, pace_ = 0;
};

// A tensor's values at some steps as floats, lanes past the block zero.
template <class T, bool kAsk = true, int kVectors = 1>
void read_tile(const ScanTensor& x, int64_t batch, int64_t start, int64_t steps, Lanes lanes, float* tile) {
  const T* from = static_cast<const T*>(x.data) + batch * x.batch + start * x.time + lanes.first * x.channel;
  if (x.channel == 1) {
    for (int64_t t = 0; t < steps; ++t) {
      const T* row = from + t * x.time;
      if (kAsk) __builtin_prefetch(row + kAhead / sizeof(T));
      for (int v = 0; v < kVectors; ++v) {
        store(tile + v * kTileFloats + t * kWidth, load_some(row + v * kWidth, vector_of(lanes, v).count));
      }
    }
    return;
  }
  if (turns(x, steps)) {
    for (int v = 0; v < kVectors; ++v, from += kWidth * x.channel, tile += kTileFloats) {
      const int64_t count = vector_of(lanes, v).count;
      for (int64_t t = 0; t < steps; t += kWidth) {
        const int64_t at = std::min(t, steps - kWidth);  // the last piece again over some that were done
        Vec rows[kWidth];
        for (int j = 0; j < kWidth; ++j) rows[j] = j < count ? load(from + j * x.channel + at) : Vec(0.0f);
        transpose(rows);
        for (int i = 0; i < kWidth; ++i) store(tile + (at + i) * kWidth, rows[i]);
      }
    }
    return;
  }
  for (int v = 0; v < kVectors; ++v, from += kWidth * x.channel, tile += kTileFloats) {
    const int64_t count = vector_of(lanes, v).count;
    if (count < kWidth) std::fill(tile, tile + steps * kWidth, 0.0f);
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t t = 0; t < steps; ++t) tile[t * kWidth + j] = to_float(from[j * x.channel + t * x.time]);
    }
  }
}

template <class T, bool kAsk = true, int kVectors = 1>
void write_tile(const ScanTensor& x, int64_t batch, int64_t start, int64_t steps, Lanes lanes, const float* tile) {
  T* to = static_cast<T*>(x.data) + batch * x.batch + start * x.time + lanes.first * x.channel;
  if (x.channel == 1) {
    for (int64_t t = 0; t < steps; ++t) {
      T* row = to + t * x.time;
      if (kAsk) __builtin_prefetch(row + kAhead / sizeof(T), 1);
      for (int v = 0; v < kVectors; ++v) {
        store_some(row + v * kWidth, load(tile + v * kTileFloats + t * kWidth), vector_of(lanes, v).count);
      }
    }
    return;
  }
  if (turns(x, steps)) {
    for (int v = 0; v < kVectors; ++v, to += kWidth * x.channel, tile += kTileFloats) {
      const int64_t count = vector_of(lanes, v).count;
      for (int64_t t = 0; t < steps; t += kWidth) {
        const int64_t at = std::min(t, steps - kWidth);
        Vec rows[kWidth];
        for (int i = 0; i < kWidth; ++i) rows[i] = load(tile + (at + i) * kWidth);
        transpose(rows);
        for (int j = 0; j < kWidth; ++j) {
          if (j < count) store(to + j * x.channel + at, rows[j]);
        }
      }
    }
    return;
  }
  for (int v = 0; v < kVectors; ++v, to += kWidth * x.channel, tile += kTileFloats) {
    T row[kTileFloats];
    for (int64_t i = 0; i < steps * kWidth; i += kWidth) store(row + i, load(tile + i));
    for (int64_t j = 0; j < vector_of(lanes, v).count; ++j) {
      for (int64_t t = 0; t < steps; ++t) to[j * x.channel + t * x.time] = row[t * kWidth + j];
    }
  }
}

}  // namespace
}  // namespace deftcore::cpu
