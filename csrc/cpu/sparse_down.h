// The stages that all sparse MLP products share, whatever their weights' format: the list of active neurons, and the
// down projection over it. W_down is neuron-major: an inactive neuron is a row that is never touched. Every function
// here is a part of a stage, or a stage of its team:
//   compact list = {i : any |act[m, i]| > tau}            neurons split, ascending
//   fill    h[k, m] = act[m, list[k]] (* up)              list split evenly: every part reads as many rows
//   down    y[m, j] = sum_k h[k, m] W_down[list[k], j]    columns split: no reduction, so repeats are bit-equal
#pragma once

#include "deftcore/workspace.h"
#include "panels.h"

namespace deftcore::cpu {
namespace {

constexpr int64_t kColumnUnit = 128;  // columns are split over parts in whole tiles of every kernel
constexpr int64_t kStreamRows = 16;   // rows streamed side by side for one token; 8 to 32 measured alike

// A row of sums: whole tiles of columns, and rows that do not all start on one cache set.
inline int64_t sum_stride(int64_t width) { return round_up(width, 64) + 16; }

// What every product here needs of the workspace.
struct Buffers {
  int32_t* list;    // [neurons], and room for the last whole vector that `compress` writes
  int64_t* counts;  // [parts]
  float* h;         // [neurons, tokens]
  uint32_t* pairs;  // [neurons / 2, tokens], both rounded up
  float* acc;       // [tokens, acc_stride]
  int64_t acc_stride;

  // h as the panels' products take it.
  template <class Word>
  const typename Word::Type* words() const {
    if constexpr (Word::kElements == 2) {
      return pairs;
    } else {
      return h;
    }
  }
};

Buffers lay_out(int64_t tokens, int64_t neurons, int64_t width, Workspace& room) {
  Buffers b{};
  b.acc_stride = sum_stride(width);
  b.list = room.take<int32_t>(round_up(neurons, kWidth));
  b.counts = room.take<int64_t>(most_parts());
  b.h = room.take<float>(neurons * tokens);
  b.pairs = room.take<uint32_t>((neurons + 1) / 2 * tokens);
  b.acc = room.take<float>(tokens * b.acc_stride);
  return b;
}

// Part p writes the active neurons of its share at list[share.begin...] and their number in counts[p]; a share never
// overtakes the neurons it has read, so the shares do not overlap.
template <class T>
void compact(const T* act, int64_t tokens, int64_t neurons, float tau, int parts, int part, const Buffers& b) {
  const Range mine = share(neurons, parts, part, 16);
  constexpr int64_t kGroups = 16;
  const Vec limit(tau);
  int64_t count = 0;
  for (int64_t first = mine.begin; first < mine.end; first += kGroups * kWidth) {
    // Tokens outside, so that a row is read along its cache lines: rows may all start on one cache set.
    uint32_t bits[kGroups] = {};
    for (int64_t m = 0; m < tokens; ++m) {
      const T* p = act + m * neurons;
      for (int64_t g = 0, i = first; g < kGroups && i < mine.end; ++g, i += kWidth) {
        const int64_t n = mine.end - i;
        bits[g] |= active_bits(n < kWidth ? load_tail(p + i, n) : load(p + i), limit);
      }
    }
    for (int64_t g = 0; g < kGroups && first + g * kWidth < mine.end; ++g) {
      compress(b.list + mine.begin + count, bits[g], static_cast<int32_t>(first + g * kWidth));
      count += __builtin_popcount(bits[g]);
    }
  }
  b.counts[part] = count;
}

// Closes the gaps between the parts' shares; returns the number of active neurons. Called by one thread.
int64_t join_shares(int64_t neurons, int parts, const Buffers& b) {
  int64_t total = 0;
  for (int p = 0; p < parts; ++p) {
    std::memmove(b.list + total, b.list + share(neurons, parts, p, 16).begin, static_cast<size_t>(b.counts[p]) * 4);
    total += b.counts[p];
  }
  return total;
}

// ---------------------------------------------------------------------------- down

// One token is bound by traffic: a few rows are streamed side by side, straight from memory.
// acc[j] += sum_k h[k] w[list[k], j] for j in columns.
template <class T>
void down_one_token(Matrix<T> w, const int32_t* list, int64_t active, const float* h, Range columns, float* acc) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t k0 = 0; k0 < active; k0 += kStreamRows) {
    const int64_t count = active - k0 < kStreamRows ? active - k0 : kStreamRows;
    const T *rows[kStreamRows], *next[kStreamRows];
    for (int64_t r = 0; r < count; ++r) {
      const int64_t ahead = k0 + r + kStreamRows;
      rows[r] = w.row(list[k0 + r]);
      next[r] = w.row(list[ahead < active ? ahead : active - 1]);
    }
    int64_t j = columns.begin;
    for (; j + kTileColumns <= columns.end; j += kTileColumns) {
      Vec sum[kTileVecs];
      for (int v = 0; v < kTileVecs; ++v) sum[v] = load(acc + j + v * kWidth);
      for (int64_t r = 0; r < count; ++r) {
        const Vec hv(h[k0 + r]);
        for (int64_t line = 0; line < kTileColumns; line += kLine) __builtin_prefetch(next[r] + j + line, 0, 2);
        for (int v = 0; v < kTileVecs; ++v) sum[v] = fma(hv, load(rows[r] + j + v * kWidth), sum[v]);
      }
      for (int v = 0; v < kTileVecs; ++v) store(acc + j + v * kWidth, sum[v]);
    }
    for (; j < columns.end; j += kWidth) {
      Vec sum = load(acc + j);
      for (int64_t r = 0; r < count; ++r) sum = fma(Vec(h[k0 + r]), load_columns(rows[r] + j, columns.end - j), sum);
      store(acc + j, sum);
    }
  }
}

template <class T>
void to_floats(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, load(from + i));
  if (i < count) store_tail(to + i, load_tail(from + i, count - i), count - i);
}

template <class T>
void write_output(const float* acc, int64_t acc_stride, const T* bias, int64_t tokens, int64_t width, Range columns,
                  T* y) {
  for (int64_t m = 0; m < tokens; ++m) {
    for (int64_t j = columns.begin; j < columns.end; j += kWidth) {
      const int64_t n = columns.end - j < kWidth ? columns.end - j : kWidth;
      Vec v = load(acc + m * acc_stride + j);
      if (bias != nullptr) v = v + load_tail(bias + j, n);
      store_tail(y + m * width + j, v, n);
    }
  }
}

// acc += h W over the list, W of plain weights.
template <class Word, class T>
void down_product(Matrix<T> w, int64_t active, int64_t tokens, Range columns, const Buffers& b, float* acc,
                  int64_t acc_stride) {
  if (tokens == 1) return down_one_token(w, b.list, active, b.h, columns, acc);
  down_tokens<Word>(active, b.words<Word>(), tokens, columns, acc, acc_stride, fill_from<Word>(w, b.list, columns));
}

// The last two stages. `fill(part, rows)` writes h[k, :] of its rows of the list; `product(part, columns)` adds to
// b.acc, and `write(part, columns)` takes its sums from there.
template <class Word, class Fill, class Product, class Write>
void down_stages(Team& team, int64_t active, int64_t tokens, int64_t width, const Buffers& b, Fill&& fill,
                 Product&& product, Write&& write) {
  team.stage([&](int part) {
    const Range rows = share(active, team.parts, part, 4);  // whole groups of the dots, and pairs
    fill(part, rows);
    if (Word::kElements == 2 && tokens > 1) pack_pairs(b.h, active, tokens, rows, b.pairs);
    const Range columns = share(width, team.parts, part, kColumnUnit);
    for (int64_t m = 0; m < tokens; ++m) {
      for (int64_t j = columns.begin; j < columns.end; j += kWidth) store(b.acc + m * b.acc_stride + j, Vec(0.0f));
    }
  });
  team.stage([&](int part) {
    const Range columns = share(width, team.parts, part, kColumnUnit);
    product(part, columns);
    write(part, columns);
  });
}

// h[k, m] = a[m, list[k]] for k in rows. A neuron in the list for another token's sake stays silent for this one, as it
// would alone.
template <class T>
void gather_active(const T* a, int64_t tokens, int64_t neurons, float tau, const int32_t* list, Range rows, float* h) {
  constexpr int64_t kAtOnce = 32;  // a few cache lines of each token's row at a time, as in `compact`
  for (int64_t first = rows.begin; first < rows.end; first += kAtOnce) {
    const int64_t end = first + kAtOnce < rows.end ? first + kAtOnce : rows.end;
    for (int64_t m = 0; m < tokens; ++m) {
      for (int64_t k = first; k < end; ++k) {
        const float value = to_float(a[m * neurons + list[k]]);
        h[k * tokens + m] = std::fabs(value) <= tau ? 0.0f : value;
      }
    }
  }
}

void activate_row(Activation activation, float* act, int64_t count) {
  dispatch(activation, [&](auto kind) {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(act + i, math::activate<kind()>(load(act + i)));
    if (i < count) store_tail(act + i, math::activate<kind()>(load_tail(act + i, count - i)), count - i);
  });
}

}  // namespace
}  // namespace deftcore::cpu
