// y = a W_down^T over the union of the tokens' active neurons, and the MLPs built on it; weights of x's dtype. Few
// tokens are bound by weight traffic, sixteen and more by multiply-adds. One parallel region per call: the first
// product with all neurons split over parts, then the stages of sparse_down.h.
#include "sparse_down.h"

namespace deftcore::cpu {
namespace {

constexpr int64_t kDotRows = 4;  // weight rows per group

// Rows of a group that one tile takes: its sums, a vector of each row and one of a token have to fit.
constexpr int rows_of_tile(int tokens) { return in_registers(4 * tokens, 4 + 1) ? 4 : 2; }
static_assert(in_registers(rows_of_tile(kTileTokens) * kTileTokens, rows_of_tile(kTileTokens) + 1));

// ---------------------------------------------------------------------------- dots

// out[r][m] = x[m] . rows[r]; x is [tokens, x_stride]. `next` rows are prefetched alongside.
template <class Word, int kRows, int kTokens, class T>
void dot_tile(const T* const* rows, const T* const* next, const typename Word::Element* x, int64_t x_stride,
              int64_t width, float (*out)[kTileTokens]) {
  Vec acc[kRows][kTokens];
  for (auto& row : acc) {
    for (Vec& v : row) v = Vec(0.0f);
  }
  const auto step = [&](int64_t j, auto fetch) {
    typename Word::Row w[kRows];
    for (int r = 0; r < kRows; ++r) w[r] = fetch(rows[r] + j);
    for (int m = 0; m < kTokens; ++m) {
      const auto xv = fetch(x + m * x_stride + j);
      for (int r = 0; r < kRows; ++r) acc[r][m] = Word::multiply(w[r], xv, acc[r][m]);
    }
  };
  int64_t j = 0;
  for (; j + Word::kLanes <= width; j += Word::kLanes) {
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(next[r] + j, 0, 2);
    step(j, [](const auto* p) { return Word::load(p); });
  }
  if (j < width) step(j, [&](const auto* p) { return Word::load_tail(p, width - j); });
  for (int r = 0; r < kRows; ++r) {
    for (int m = 0; m < kTokens; ++m) out[r][m] = reduce_add(acc[r][m]);
  }
}

// Calls sink(k, m, x[m] . w[row_of(k)]) for k in range and every token.
template <class Word, class T, class RowOf, class Sink>
void dots(Matrix<T> w, RowOf&& row_of, Range range, const typename Word::Element* x, int64_t x_stride, int64_t tokens,
          int64_t width, Sink&& sink) {
  const int64_t last = range.end - 1;
  for (int64_t k = range.begin; k < range.end; k += kDotRows) {
    const T *rows[kDotRows], *next[kDotRows];
    for (int64_t r = 0; r < kDotRows; ++r) {  // past the end: repeat the last row, drop its result
      rows[r] = w.row(row_of(k + r < last ? k + r : last));
      next[r] = w.row(row_of(k + r + kDotRows < last ? k + r + kDotRows : last));
    }
    for (int64_t m0 = 0; m0 < tokens; m0 += kTileTokens) {
      float out[kDotRows][kTileTokens];
      dispatch_tokens(tokens - m0, [&](auto count) {
        constexpr int kRows = rows_of_tile(count());
        for (int r = 0; r < kDotRows; r += kRows) {
          dot_tile<Word, kRows, count()>(rows + r, (m0 == 0 ? next : rows) + r, x + m0 * x_stride, x_stride, width,
                                         out + r);
        }
        for (int64_t r = 0; r < kDotRows && k + r <= last; ++r) {
          for (int m = 0; m < count(); ++m) sink(k + r, m0 + m, out[r][m]);
        }
      });
    }
  }
}

// ---------------------------------------------------------------------------- products

template <class T>
void sparse_down(const SparseDownArgs& args) {
  const T* a = static_cast<const T*>(args.a);
  const Matrix<T> w{static_cast<const T*>(args.w_down_t), args.w_stride};
  const int64_t tokens = args.tokens, neurons = args.neurons, width = args.width;
  const int parts = parts_for(neurons * (width / 8 + tokens) * static_cast<int64_t>(sizeof(T)));
  Workspace room(args.workspace);
  const Buffers b = lay_out(tokens, neurons, width, room);
  int64_t active = 0;
  parallel(parts, [&](Team& team) {
    team.stage([&](int part) { compact(a, tokens, neurons, args.tau, parts, part, b); });
    team.once([&] { active = join_shares(neurons, parts, b); });
    if (active <= args.capacity)
      down_stages<WordOf<T>>(
          team, active, tokens, width, b,
          [&](int, Range rows) { gather_active(a, tokens, neurons, args.tau, b.list, rows, b.h); },
          [&](int, Range columns) { down_product<WordOf<T>>(w, active, tokens, columns, b, b.acc, b.acc_stride); },
          [&](int, Range columns) {
            write_output(b.acc, b.acc_stride, static_cast<const T*>(args.bias), tokens, width, columns,
                         static_cast<T*>(args.y));
          });
  });
  *args.rows_read = active;
}

struct MlpBuffers : Buffers {
  float* act;     // [tokens, neurons]
  float* x_wide;  // [tokens, acc_stride], unless x is read as pairs
};

MlpBuffers lay_out(const SparseMlpArgs& args, Workspace& room) {
  MlpBuffers b{lay_out(args.tokens, args.neurons, args.width, room), nullptr, nullptr};
  b.act = room.take<float>(args.tokens * args.neurons);
  b.x_wide = room.take<float>(args.tokens * b.acc_stride);
  return b;
}

template <class T>
void sparse_mlp(const SparseMlpArgs& args) {
  const bool gated = args.w_gate != nullptr;
  const Matrix<T> w_first{static_cast<const T*>(gated ? args.w_gate : args.w_up),
                          gated ? args.gate_stride : args.up_stride};
  const Matrix<T> w_up{static_cast<const T*>(args.w_up), args.up_stride};
  const Matrix<T> w_down{static_cast<const T*>(args.w_down_t), args.down_stride};
  const T* x = static_cast<const T*>(args.x);
  const T* z = static_cast<const T*>(args.z);
  const T* b_up = static_cast<const T*>(args.b_up);
  const int64_t tokens = args.tokens, neurons = args.neurons, width = args.width;
  const int parts = parts_for(neurons * width * static_cast<int64_t>(sizeof(T)));
  Workspace room(args.workspace);
  const MlpBuffers b = lay_out(args, room);
  float* const act = b.act;
  for (int64_t m = 0; m < tokens && !kHasPairs<T>; ++m) {
    to_floats(x + m * width, width, b.x_wide + m * b.acc_stride);
  }

  const auto dot_rows = [&](Matrix<T> w, auto row_of, Range range, auto sink) {
    if constexpr (kHasPairs<T>) {
      dots<WordOf<T>>(w, row_of, range, x, width, tokens, width, sink);
    } else {
      dots<WordOf<T>>(w, row_of, range, b.x_wide, b.acc_stride, tokens, width, sink);
    }
  };

  int64_t active = 0;
  parallel(parts, [&](Team& team) {
    team.stage([&](int part) {
      const Range mine = share(neurons, parts, part, 16);
      const int64_t n = mine.end - mine.begin;
      if (z != nullptr) {
        for (int64_t m = 0; m < tokens; ++m) to_floats(z + m * neurons + mine.begin, n, act + m * neurons + mine.begin);
      } else {
        dot_rows(
            w_first, [](int64_t i) { return i; }, mine,
            [&](int64_t i, int64_t m, float dot) {
              act[m * neurons + i] = b_up != nullptr ? dot + to_float(b_up[i]) : dot;
            });
      }
      for (int64_t m = 0; m < tokens; ++m) activate_row(args.activation, act + m * neurons + mine.begin, n);
      compact(act, tokens, neurons, args.tau, parts, part, b);
    });
    team.once([&] { active = join_shares(neurons, parts, b); });
    if (active <= args.capacity)
      down_stages<WordOf<T>>(
          team, active, tokens, width, b,
          [&](int, Range rows) {
            gather_active(act, tokens, neurons, args.tau, b.list, rows, b.h);
            if (!gated) return;
            dot_rows(
                w_up, [&](int64_t k) { return b.list[k]; }, rows,
                [&](int64_t k, int64_t m, float dot) { b.h[k * tokens + m] *= dot; });
          },
          [&](int, Range columns) { down_product<WordOf<T>>(w_down, active, tokens, columns, b, b.acc, b.acc_stride); },
          [&](int, Range columns) {
            write_output(b.acc, b.acc_stride, static_cast<const T*>(args.b_down), tokens, width, columns,
                         static_cast<T*>(args.y));
          });
  });
  *args.rows_read = active;
}

}  // namespace

// ----------------------------------------------------------------------------

void DEFTCORE_KERNEL(sparse_down)(const SparseDownArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) { sparse_down<decltype(t)>(args); });
}

size_t DEFTCORE_KERNEL(sparse_down_workspace)(const SparseDownArgs& args) {
  return bytes_of([&](Workspace& room) { lay_out(args.tokens, args.neurons, args.width, room); });
}

size_t DEFTCORE_KERNEL(sparse_mlp_workspace)(const SparseMlpArgs& args) {
  return bytes_of([&](Workspace& room) { lay_out(args, room); });
}

void DEFTCORE_KERNEL(sparse_mlp)(const SparseMlpArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) { sparse_mlp<decltype(t)>(args); });
}

}  // namespace deftcore::cpu
