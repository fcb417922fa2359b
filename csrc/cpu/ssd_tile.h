// What Mamba-2's scan and its backward share: products of register tiles, and the decays between the steps of a chunk.
// A tile is some rows of sums, each kTileVecs vectors wide; what it multiplies comes from L1, a vector of a matrix for
// every row and a factor for every vector.
#pragma once

#include "scan_tile.h"

namespace deftcore::cpu {
namespace {

constexpr int kTileVecs = 2;
constexpr int kTileRows = in_registers(8 * kTileVecs, kTileVecs + 1) ? 8 : 4;
static_assert(in_registers(kTileRows* kTileVecs, kTileVecs + 1));
constexpr int64_t kPanel = kTileVecs * kWidth;
static_assert(kScanChunk % kPanel == 0, "a chunk's products with itself are whole tiles");

// Row k of a matrix of tiles: kTileVecs vectors, `between` floats from one to the next.
struct TileRows {
  const float* data;
  int64_t row, between;
  Vec at(int64_t k, int v) const { return load(data + k * row + v * between); }
};

// The factor of a tile's row i and a matrix's row k.
struct Factors {
  const float* data;
  int64_t row, step;
  Vec at(int64_t i, int64_t k) const { return Vec(data[i * row + k * step]); }
};

template <int kCount>
struct Tile {
  static constexpr int64_t kRows = kCount;
  Vec sums[kCount][kTileVecs];

  void clear() {
    for (auto& row : sums) {
      for (Vec& sum : row) sum = Vec(0.0f);
    }
  }
  void read(const float* from, int64_t row) {
    for (int i = 0; i < kCount; ++i) {
      for (int v = 0; v < kTileVecs; ++v) sums[i][v] = load(from + i * row + v * kWidth);
    }
  }
  // Row i by factors[i step].
  void scale(const float* factors, int64_t step) {
    for (int i = 0; i < kCount; ++i) {
      for (Vec& sum : sums[i]) sum = Vec(factors[i * step]) * sum;
    }
  }
  void keep(float* to, int64_t row, int64_t between = kWidth) const {
    for (int i = 0; i < kCount; ++i) {
      for (int v = 0; v < kTileVecs; ++v) store(to + i * row + v * between, sums[i][v]);
    }
  }

  // += sum over k in [begin, end) of factors(i, k) x(k).
  void add(const Factors& factors, const TileRows& x, int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) add_rows<0, kCount>(factors, x, k);
  }
  // The same for rows from `at` on of a square of which only k <= i counts; what else it holds is not looked at, nor is
  // x multiplied by 0: a step says nothing to those before it, whatever it is.
  void add_lower(const Factors& factors, const TileRows& x, int64_t at) {
    add(factors, x, 0, at);
    add_corner<true>(factors, x, at, std::make_integer_sequence<int, kCount>());
  }
  // Likewise where k >= i, up to `end`.
  void add_upper(const Factors& factors, const TileRows& x, int64_t at, int64_t end) {
    add_corner<false>(factors, x, at, std::make_integer_sequence<int, kCount>());
    add(factors, x, at + kCount, end);
  }

 private:
  template <int kFirst, int kEnd>
  void add_rows(const Factors& factors, const TileRows& x, int64_t k) {
    Vec row[kTileVecs];
    for (int v = 0; v < kTileVecs; ++v) row[v] = x.at(k, v);
#pragma GCC unroll 16
    for (int i = kFirst; i < kEnd; ++i) {
      const Vec factor = factors.at(i, k);
      for (int v = 0; v < kTileVecs; ++v) sums[i][v] = fma(factor, row[v], sums[i][v]);
    }
  }
  template <bool kLower, int... kSteps>
  void add_corner(const Factors& factors, const TileRows& x, int64_t at, std::integer_sequence<int, kSteps...>) {
    (add_rows<kLower ? kSteps : 0, kLower ? kCount : kSteps + 1>(factors, x, at + kSteps), ...);
  }
};

// fn(tile, row) for the tiles of `count` rows.
template <int kCount = kTileRows, class Fn>
inline void for_tiles(int64_t count, Fn&& fn, int64_t at = 0) {
  for (; at + kCount <= count; at += kCount) {
    Tile<kCount> tile;
    fn(tile, at);
  }
  if constexpr (kCount > 1) {
    if (at < count) for_tiles<kCount / 2>(count, fn, at);
  }
}

// [rows, columns] to [columns, rows], both with some room between their rows.
inline void turn(const float* from, int64_t from_row, int64_t rows, int64_t columns, float* to, int64_t to_row) {
  for (int64_t r = 0; r < rows; r += kWidth) {
    const int64_t some = std::min<int64_t>(rows - r, kWidth);
    for (int64_t c = 0; c < columns; c += kWidth) {
      const int64_t wide = std::min<int64_t>(columns - c, kWidth);
      Vec square[kWidth];
      for (int j = 0; j < kWidth; ++j) {
        square[j] = j < some ? load_some(from + (r + j) * from_row + c, wide) : Vec(0.0f);
      }
      transpose(square);
      for (int64_t i = 0; i < wide; ++i) store_some(to + (c + i) * to_row + r, square[i], some);
    }
  }
}

// fn(first channel, how many) for the vectors of a head's channels.
template <class Fn>
inline void each_vector(int64_t count, Fn&& fn) {
  for (int64_t p = 0; p < count; p += kWidth) fn(p, std::min<int64_t>(count - p, kWidth));
}

// [steps, channels] of one head as floats.
template <class T>
void read_head(const ScanTensor& x, int64_t batch, int64_t start, int64_t steps, int64_t head, int64_t count,
               int64_t width, float* tile) {
  const T* from = static_cast<const T*>(x.data) + batch * x.batch + start * x.time + head * count * x.channel;
  for (int64_t t = 0; t < steps; ++t) {
    std::fill(tile + t * width + count, tile + (t + 1) * width, 0.0f);
    if (x.channel == 1) {
      each_vector(count, [&](int64_t p, int64_t some) {
        store_some(tile + t * width + p, load_some(from + t * x.time + p, some), some);
      });
    } else {
      for (int64_t p = 0; p < count; ++p) tile[t * width + p] = to_float(from[t * x.time + p * x.channel]);
    }
  }
}

template <class T>
void write_head(const ScanTensor& x, int64_t batch, int64_t time, int64_t head, int64_t count, const float* row) {
  T* to = static_cast<T*>(x.data) + batch * x.batch + time * x.time + head * count * x.channel;
  each_vector(count, [&](int64_t p, int64_t some) {
    if (x.channel == 1) return store_some(to + p, load(row + p), some);
    T narrow[kWidth];
    store(narrow, load(row + p));
    for (int64_t j = 0; j < some; ++j) to[(p + j) * x.channel] = narrow[j];
  });
}

// products[t, s] = x_t . y_s of the steps s <= t of a chunk, [kScanChunk, kScanChunk]; `turned` has room for
// [count, kScanChunk].
inline void multiply_steps(const float* x, int64_t x_row, const float* y, int64_t y_row, int64_t steps, int64_t count,
                           float* turned, float* products) {
  for (int64_t n = 0; n < count && steps < kScanChunk; ++n) {
    std::fill(turned + n * kScanChunk + steps, turned + (n + 1) * kScanChunk, 0.0f);
  }
  turn(y, y_row, steps, count, turned, kScanChunk);
  for_tiles(steps, [&](auto& tile, int64_t t) {
    for (int64_t s = 0; s < t + tile.kRows; s += kPanel) {
      tile.clear();
      tile.add({x + t * x_row, x_row, 1}, {turned + s, kScanChunk, kWidth}, 0, count);
      tile.keep(products + t * kScanChunk + s, kScanChunk);
    }
  });
}

// One head's steps over a chunk.
struct Decays {
  alignas(64) float step[kScanChunk];
  alignas(64) float from_start[kScanChunk];            // to each step
  alignas(64) float to_end[kScanChunk];                // from each step
  alignas(64) float between[kScanChunk * kScanChunk];  // [t, s], from step s <= t to t

  float whole(int64_t steps) const { return from_start[steps - 1]; }

  // Products of decays below the smallest normal number are 0: numbers below it make every operation slow that meets
  // them.
  void read(const SsdArgs& args, int64_t batch, int64_t head, int64_t start, int64_t steps) {
    constexpr float kSmallest = 1.17549435e-38f;
    alignas(64) float lanes[kWidth];
    for (int i = 0; i < kWidth; ++i) lanes[i] = static_cast<float>(i);
    const Vec lane = load(lanes);
    std::fill(to_end, to_end + kScanChunk, 1.0f);
    std::fill(step, step + kScanChunk, 0.0f);
    float start_to = 1.0f;
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t at = (batch * args.length + start + t) * args.heads + head;
      const float decay = std::exp(args.log_decay[at]), least = kSmallest / decay;
      step[t] = args.step[at];
      from_start[t] = start_to = start_to < least ? 0.0f : decay * start_to;
      for (int64_t s = 0; s <= t; s += kWidth) {
        const Vec old = load(to_end + s);
        const Vec next = where(old < Vec(least), Vec(0.0f), Vec(decay) * old);
        const Vec now = where(lane < Vec(static_cast<float>(t - s)), next, old);
        store(to_end + s, now);
        store(between + t * kScanChunk + s, now);
      }
    }
  }
};

}  // namespace
}  // namespace deftcore::cpu
