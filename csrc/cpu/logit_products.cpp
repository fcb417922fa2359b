// The largest logits of a row, and products of all rows with a few vectors, which the spectral term is made of.
// Both read the logits once, in their own dtype. A product takes as many multiply-adds an element as there are vectors;
// tiles of columns keep the vectors' share in the cache, and a few rows at a time share its loads.
#include <algorithm>

#include "isa.h"
#include "logits.h"

namespace deftcore::cpu {
namespace {

// ---------------------------------------------------------------------------- the largest

// The larger comes first, of equal ones the earlier; NaN is larger than all.
template <class T>
bool precedes(const T* z, int32_t a, int32_t b) {
  const float x = to_float(z[a]), y = to_float(z[b]);
  if (x != x || y != y) return x != x && (y == y || a < b);
  return x > y || (x == y && a < b);
}

// A heap of the best so far, the worst of them on top.
template <class T>
void top_of_row(const TopLogitsArgs& args, int64_t row) {
  int32_t* top = args.top + row * args.most;
  int64_t count = 0;
  if (!left_out(args.mask, row)) {
    const T* z = row_of<T>(args.logits, row, args.stride);
    const auto first = [z](int32_t a, int32_t b) { return precedes(z, a, b); };
    float bound = -INFINITY;
    const auto offer = [&](int32_t column) {
      if (count < args.most) {
        top[count++] = column;
        std::push_heap(top, top + count, first);
      } else if (first(column, top[0])) {
        std::pop_heap(top, top + count, first);
        top[count - 1] = column;
        std::push_heap(top, top + count, first);
      }
      if (count < args.most) return;
      bound = to_float(z[top[0]]);
      if (bound != bound) bound = INFINITY;  // all are NaN: nothing may pass, least of all what stands behind the row
    };
    int64_t column = 0;
    over(args.width, [&](auto read) {
      const Vec none(0.0f), some(1.0f);
      uint32_t hits = active_bits(where(read(z) <= Vec(bound), none, some), none);
      for (; hits != 0; hits &= hits - 1) offer(static_cast<int32_t>(column + __builtin_ctz(hits)));
      column += kWidth;
    });
  }
  std::fill(top + count, top + args.most, -1);
}

// ---------------------------------------------------------------------------- products

constexpr int64_t kColumns = 2048;  // of a tile of a product over columns
constexpr int64_t kRows = 32;       // that go through such a tile one after another
// Rows and vectors of a block: their sums stay in registers, beside the vectors and a row's logits.
constexpr int kSharing = 4, kVectors = in_registers(4 * 4, 4 + 1) ? 4 : 2;
static_assert(in_registers(kSharing* kVectors, kVectors + 1));
constexpr int64_t kTransposedColumns = 512, kTransposedRows = 8;

// Adds products of kR rows and kV vectors over n columns to the rows' results.
template <int kR, int kV, class T>
void add_dots(const LogitProductArgs& args, const int64_t* rows, int64_t vector, int64_t first, int64_t n) {
  const int64_t columns = args.end - args.begin;
  Vec sums[kR][kV];
  for (auto& of_row : sums) {
    for (Vec& sum : of_row) sum = Vec(0.0f);
  }
  const auto add = [&](auto read_logits, auto read_vector) {
    Vec vectors[kV];
    for (int v = 0; v < kV; ++v) vectors[v] = read_vector(args.of_columns + (vector + v) * columns + first);
    for (int r = 0; r < kR; ++r) {
      const Vec x = finite_of(read_logits(row_of<T>(args.logits, rows[r], args.stride) + args.begin + first));
      for (int v = 0; v < kV; ++v) sums[r][v] = fma(x, vectors[v], sums[r][v]);
    }
  };
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const auto read = [i](const auto* p) { return load(p + i); };
    add(read, read);
  }
  if (i < n) {
    add([&](const T* p) { return load_rest(p + i, n - i); }, [&](const float* p) { return load_tail(p + i, n - i); });
  }
  for (int r = 0; r < kR; ++r) {
    for (int v = 0; v < kV; ++v) args.of_rows[rows[r] * args.rank + vector + v] += reduce_add(sums[r][v]);
  }
}

// fn(begin, constant) over blocks of kMost and then of one that make up `count`.
template <int kMost, class Fn>
void in_blocks(int64_t count, Fn&& fn) {
  int64_t i = 0;
  for (; i + kMost <= count; i += kMost) fn(i, std::integral_constant<int, kMost>{});
  for (; i < count; ++i) fn(i, std::integral_constant<int, 1>{});
}

template <class T>
void product_of_rows(const LogitProductArgs& args, int64_t begin) {
  int64_t rows[kRows];
  int64_t count = 0;
  for (int64_t row = begin; row < std::min(begin + kRows, args.rows); ++row) {
    std::fill(args.of_rows + row * args.rank, args.of_rows + (row + 1) * args.rank, 0.0f);
    if (!left_out(args.mask, row)) rows[count++] = row;
  }
  const int64_t columns = args.end - args.begin;
  for (int64_t first = 0; first < columns; first += kColumns) {
    const int64_t n = std::min(kColumns, columns - first);
    in_blocks<kSharing>(count, [&](int64_t r, auto sharing) {
      in_blocks<kVectors>(
          args.rank, [&](int64_t v, auto vectors) { add_dots<sharing(), vectors(), T>(args, rows + r, v, first, n); });
    });
  }
}

// Adds what kR rows give to n columns of all vectors.
template <int kR, class T>
void add_outer(const LogitProductArgs& args, const int64_t* rows, int64_t first, int64_t n) {
  const int64_t columns = args.end - args.begin;
  const auto add = [&](auto read_logits, auto read, auto write) {
    Vec x[kR];
    for (int r = 0; r < kR; ++r) {
      x[r] = finite_of(read_logits(row_of<T>(args.logits, rows[r], args.stride) + args.begin + first));
    }
    for (int64_t v = 0; v < args.rank; ++v) {
      float* out = args.of_columns + v * columns + first;
      Vec sum = read(out);
      for (int r = 0; r < kR; ++r) sum = fma(x[r], Vec(args.of_rows[rows[r] * args.rank + v]), sum);
      write(out, sum);
    }
  };
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const auto read = [i](const auto* p) { return load(p + i); };
    add(read, read, [i](float* p, Vec sum) { store(p + i, sum); });
  }
  if (i < n) {
    add([&](const T* p) { return load_rest(p + i, n - i); }, [&](const float* p) { return load_tail(p + i, n - i); },
        [&](float* p, Vec sum) { store_tail(p + i, sum, n - i); });
  }
}

template <class T>
void product_of_columns(const LogitProductArgs& args, int64_t tile) {
  const int64_t columns = args.end - args.begin, first = tile * kTransposedColumns;
  const int64_t n = std::min(kTransposedColumns, columns - first);
  for (int64_t v = 0; v < args.rank; ++v) {
    float* out = args.of_columns + v * columns + first;
    std::fill(out, out + n, 0.0f);
  }
  int64_t rows[kTransposedRows];
  int64_t count = 0;
  for (int64_t row = 0; row < args.rows; ++row) {
    if (!left_out(args.mask, row)) rows[count++] = row;
    if (count == kTransposedRows) {
      add_outer<kTransposedRows, T>(args, rows, first, n);
      count = 0;
    }
  }
  for (int64_t r = 0; r < count; ++r) add_outer<1, T>(args, rows + r, first, n);
}

}  // namespace

// ----------------------------------------------------------------------------

void DEFTCORE_KERNEL(top_logits)(const TopLogitsArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    parallel(parts_for(args.rows * args.width * static_cast<int64_t>(sizeof(T))),
             [&](Team& team) { team.each(args.rows, [&](int64_t row) { top_of_row<T>(args, row); }); });
  });
}

void DEFTCORE_KERNEL(logit_product)(const LogitProductArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t columns = args.end - args.begin;
    parallel(parts_for(args.rows * columns * static_cast<int64_t>(sizeof(T))), [&](Team& team) {
      if (args.transposed) {
        team.each((columns + kTransposedColumns - 1) / kTransposedColumns,
                  [&](int64_t tile) { product_of_columns<T>(args, tile); });
      } else {
        team.each((args.rows + kRows - 1) / kRows, [&](int64_t block) { product_of_rows<T>(args, block * kRows); });
      }
    });
  });
}

}  // namespace deftcore::cpu
