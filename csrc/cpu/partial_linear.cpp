// Partial back-propagation (S2FT): a = f(g) u and its slopes in one pass each, bound by memory traffic (and by exp for
// SiLU and GELU); and y[t] += delta[adapter[t]] x[t] for a few tokens, bound by reading each delta in use once. Tokens
// of one delta are taken together in tiles; a dot stage (scatter and low-rank rows) and an axpy stage (gathered and
// low-rank rows) share the work evenly. Every output is summed by one part in a fixed order.
#include <algorithm>

#include "deftcore/workspace.h"
#include "isa.h"

namespace deftcore::cpu {
namespace {

// Columns at a time: an accumulator of kSharingTokens rows stays in L1, and a row's piece spans a page.
constexpr int64_t kPiece = 1024;
constexpr int kSharingTokens = 4;  // tokens that share one read of a row
constexpr int kUnroll = 8;         // rows per pass over the accumulator: a factor each and one sum in registers

template <class T>
const T* row_of(const void* base, int64_t row, int64_t stride) {
  return static_cast<const T*>(base) + row * stride;
}

// Runs body(row, first, count) over pieces of rows, in parallel.
template <class Body>
void for_row_pieces(int64_t rows, int64_t width, int64_t bytes, Body&& body) {
  const int64_t per_row = (width + kPiece - 1) / kPiece, pieces = rows * per_row;
  for_range(pieces, bytes, [&](int64_t p) {
    const int64_t first = p % per_row * kPiece;
    body(p / per_row, first, std::min(width - first, kPiece));
  });
}

template <Activation kF, class T>
void gated_act_piece(const GatedActArgs& args, int64_t row, int64_t first, int64_t n) {
  const T* g = row_of<T>(args.gate, row, args.gate_stride) + first;
  const T* u = row_of<T>(args.up, row, args.up_stride) + first;
  T* a = static_cast<T*>(args.a) + row * args.width + first;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(a + i, math::activate<kF>(load(g + i)) * load(u + i));
  if (i < n) store_tail(a + i, math::activate<kF>(load_tail(g + i, n - i)) * load_tail(u + i, n - i), n - i);
}

template <Activation kF, class T>
void gated_act_backward_piece(const GatedActBackwardArgs& args, int64_t row, int64_t first, int64_t n) {
  const T* g = row_of<T>(args.gate, row, args.gate_stride) + first;
  const T* u = row_of<T>(args.up, row, args.up_stride) + first;
  const int64_t offset = row * args.width + first;
  const T* grad = static_cast<const T*>(args.grad) + offset;
  T* grad_gate = static_cast<T*>(args.grad_gate) + offset;
  T* grad_up = static_cast<T*>(args.grad_up) + offset;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const auto f = math::gated_slopes<kF>(load(g + i), load(u + i), load(grad + i));
    store(grad_gate + i, f.gate);
    store(grad_up + i, f.up);
  }
  if (i < n) {
    const auto f = math::gated_slopes<kF>(load_tail(g + i, n - i), load_tail(u + i, n - i), load_tail(grad + i, n - i));
    store_tail(grad_gate + i, f.gate, n - i);
    store_tail(grad_up + i, f.up, n - i);
  }
}

// ---------------------------------------------------------------------------- deltas per row

// Tokens of one delta that are computed together.
struct Tile {
  int64_t adapter;
  int64_t tokens[kSharingTokens];
  int64_t count;
};

struct Work {
  Tile* tiles;     // [tokens], at most one each
  int64_t* order;  // [tokens]
  float* low;      // [tiles, kSharingTokens, most]: x . low_in
  int64_t tile_count;
};

Work lay_out(const GroupedDeltaArgs& args, Workspace& room) {
  Work work{};
  work.tiles = room.take<Tile>(args.tokens);
  work.order = room.take<int64_t>(args.tokens);
  work.low = room.take<float>(args.tokens * kSharingTokens * args.most);
  return work;
}

int64_t rows_between(const int64_t* start, int64_t delta) { return start[delta + 1] - start[delta]; }

// Groups the tokens by delta, in order of their numbers; those without one are left out.
void make_tiles(const GroupedDeltaArgs& args, Work& work) {
  int64_t* order = work.order;
  int64_t used = 0;
  for (int64_t t = 0; t < args.tokens; ++t) {
    if (args.adapter[t] >= 0 && args.adapter[t] < args.bank.count) order[used++] = t;
  }
  std::sort(order, order + used, [&](int64_t a, int64_t b) {
    return args.adapter[a] != args.adapter[b] ? args.adapter[a] < args.adapter[b] : a < b;
  });
  work.tile_count = 0;
  for (int64_t i = 0; i < used; ++i) {
    const int64_t delta = args.adapter[order[i]];
    Tile* last = work.tile_count > 0 ? work.tiles + work.tile_count - 1 : nullptr;
    if (last == nullptr || last->adapter != delta || last->count == kSharingTokens) {
      last = work.tiles + work.tile_count++;
      *last = Tile{delta, {}, 0};
    }
    last->tokens[last->count++] = order[i];
  }
}

template <class T>
float dot(const T* a, const T* b, int64_t n) {
  Vec sums[4] = {Vec(0.0f), Vec(0.0f), Vec(0.0f), Vec(0.0f)};
  int64_t i = 0;
  for (; i + 4 * kWidth <= n; i += 4 * kWidth) {
    for (int j = 0; j < 4; ++j) sums[j] = fma(load(a + i + j * kWidth), load(b + i + j * kWidth), sums[j]);
  }
  for (; i + kWidth <= n; i += kWidth) sums[0] = fma(load(a + i), load(b + i), sums[0]);
  if (i < n) sums[1] = fma(load_tail(a + i, n - i), load_tail(b + i, n - i), sums[1]);
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Rows [begin, end) of all tiles' scatter and low-rank rows, counted tile after tile.
template <class T>
void dots(const GroupedDeltaArgs& args, const Work& work, int64_t begin, int64_t end) {
  const DeltaBank& bank = args.bank;
  const T* x = static_cast<const T*>(args.x);
  int64_t before = 0;
  for (int64_t i = 0; i < work.tile_count && before < end; ++i) {
    const Tile& tile = work.tiles[i];
    const int64_t scattered = rows_between(bank.scatter_start, tile.adapter);
    const int64_t total = scattered + rows_between(bank.low_start, tile.adapter);
    const int64_t first = std::max(begin - before, int64_t{0}), last = std::min(end - before, total);
    for (int64_t r = first; r < last; ++r) {
      const bool is_low = r >= scattered;
      const int64_t row = is_low ? bank.low_start[tile.adapter] + r - scattered : bank.scatter_start[tile.adapter] + r;
      const T* w = row_of<T>(is_low ? bank.low_in : bank.scatter_rows, row, bank.inputs);
      for (int64_t m = 0; m < tile.count; ++m) {
        const float sum = dot(x + tile.tokens[m] * bank.inputs, w, bank.inputs);
        if (is_low) {
          work.low[(i * kSharingTokens + m) * args.most + r - scattered] = sum;
        } else {
          T* y = static_cast<T*>(args.y) + tile.tokens[m] * bank.outputs + bank.scatter_index[row];
          store_tail(y, load_tail(y, 1) + Vec(sum), 1);
        }
      }
    }
    before += total;
  }
}

// sums[m, 0:n] += sum over kRows rows of factors[row][m] * row.
template <int kRows, class T>
void add_rows(const T* w, int64_t stride, const float (*factors)[kSharingTokens], int64_t tokens, int64_t n,
              float* sums) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t m = 0; m < tokens; ++m) {
    float* sum = sums + m * kPiece;
    Vec c[kRows];
    for (int r = 0; r < kRows; ++r) c[r] = Vec(factors[r][m]);
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) {
      Vec total = load(sum + i);
      for (int r = 0; r < kRows; ++r) {
        if (i % kLine == 0) __builtin_prefetch(w + (r + kRows) * stride + i);  // the next rows' same columns
        total = fma(c[r], load(w + r * stride + i), total);
      }
      store(sum + i, total);
    }
    if (i < n) {
      Vec total = load_tail(sum + i, n - i);
      for (int r = 0; r < kRows; ++r) total = fma(c[r], load_tail(w + r * stride + i, n - i), total);
      store_tail(sum + i, total, n - i);
    }
  }
}

template <class T, class Factor>
void add_all_rows(const T* w, int64_t stride, int64_t rows, int64_t tokens, int64_t n, float* sums, Factor&& factor) {
  float factors[kUnroll][kSharingTokens];
  int64_t r = 0;
  for (; r + kUnroll <= rows; r += kUnroll) {
    for (int j = 0; j < kUnroll; ++j) {
      for (int64_t m = 0; m < tokens; ++m) factors[j][m] = factor(r + j, m);
    }
    add_rows<kUnroll>(w + r * stride, stride, factors, tokens, n, sums);
  }
  for (; r < rows; ++r) {
    for (int64_t m = 0; m < tokens; ++m) factors[0][m] = factor(r, m);
    add_rows<1>(w + r * stride, stride, factors, tokens, n, sums);
  }
}

template <class T>
void axpys(const GroupedDeltaArgs& args, const Work& work, int64_t i, int64_t first) {
  alignas(64) float sums[kSharingTokens * kPiece];
  const DeltaBank& bank = args.bank;
  const Tile& tile = work.tiles[i];
  const int64_t n = std::min(bank.outputs - first, kPiece);
  const int64_t gathered = rows_between(bank.gather_start, tile.adapter);
  const int64_t ranks = rows_between(bank.low_start, tile.adapter);
  if (gathered + ranks == 0) return;
  std::fill(sums, sums + tile.count * kPiece, 0.0f);
  const T* x = static_cast<const T*>(args.x);
  const int32_t* index = bank.gather_index + bank.gather_start[tile.adapter];
  const T* w = row_of<T>(bank.gather_rows, bank.gather_start[tile.adapter], bank.outputs) + first;
  add_all_rows(w, bank.outputs, gathered, tile.count, n, sums,
               [&](int64_t r, int64_t m) { return to_float(x[tile.tokens[m] * bank.inputs + index[r]]); });
  w = row_of<T>(bank.low_out, bank.low_start[tile.adapter], bank.outputs) + first;
  add_all_rows(w, bank.outputs, ranks, tile.count, n, sums,
               [&](int64_t r, int64_t m) { return work.low[(i * kSharingTokens + m) * args.most + r]; });
  for (int64_t m = 0; m < tile.count; ++m) {
    T* y = static_cast<T*>(args.y) + tile.tokens[m] * bank.outputs + first;
    const float* sum = sums + m * kPiece;
    int64_t c = 0;
    for (; c + kWidth <= n; c += kWidth) store(y + c, load(y + c) + load(sum + c));
    if (c < n) store_tail(y + c, load_tail(y + c, n - c) + load_tail(sum + c, n - c), n - c);
  }
}

template <class T>
void run_grouped_delta(const GroupedDeltaArgs& args) {
  Workspace room(args.workspace);
  Work work = lay_out(args, room);
  make_tiles(args, work);
  const DeltaBank& bank = args.bank;
  int64_t dot_rows = 0, axpy_rows = 0;
  for (int64_t i = 0; i < work.tile_count; ++i) {
    const int64_t ranks = rows_between(bank.low_start, work.tiles[i].adapter);
    dot_rows += ranks + rows_between(bank.scatter_start, work.tiles[i].adapter);
    axpy_rows += ranks + rows_between(bank.gather_start, work.tiles[i].adapter);
  }
  const int64_t pieces = (bank.outputs + kPiece - 1) / kPiece;
  const int64_t bytes = (dot_rows * bank.inputs + axpy_rows * bank.outputs) * static_cast<int64_t>(sizeof(T));
  parallel(parts_for(bytes), [&](Team& team) {
    team.stage([&](int part) {
      const Range mine = share(dot_rows, team.parts, part);
      dots<T>(args, work, mine.begin, mine.end);
    });
    team.each(work.tile_count * pieces, [&](int64_t p) { axpys<T>(args, work, p / pieces, p % pieces * kPiece); });
  });
}

}  // namespace

// ----------------------------------------------------------------------------

void DEFTCORE_KERNEL(gated_act)(const GatedActArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) {
    dispatch(args.activation, [&](auto f) {
      for_row_pieces(
          args.rows, args.width, args.rows * args.width * 3 * static_cast<int64_t>(sizeof(t)),
          [&](int64_t row, int64_t first, int64_t n) { gated_act_piece<f(), decltype(t)>(args, row, first, n); });
    });
  });
}

void DEFTCORE_KERNEL(gated_act_backward)(const GatedActBackwardArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) {
    dispatch(args.activation, [&](auto f) {
      for_row_pieces(args.rows, args.width, args.rows * args.width * 5 * static_cast<int64_t>(sizeof(t)),
                     [&](int64_t row, int64_t first, int64_t n) {
                       gated_act_backward_piece<f(), decltype(t)>(args, row, first, n);
                     });
    });
  });
}

size_t DEFTCORE_KERNEL(grouped_delta_workspace)(const GroupedDeltaArgs& args) {
  return bytes_of([&](Workspace& room) { lay_out(args, room); });
}

void DEFTCORE_KERNEL(grouped_delta)(const GroupedDeltaArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) { run_grouped_delta<decltype(t)>(args); });
}

}  // namespace deftcore::cpu
