// The part of a GaLore step between its products with the subspace. Of an [m, n] matrix in a subspace of r dimensions
// those two products take 4 r operations a parameter; this part reads a window of s rows twice, 8 s q bytes in float32
// with q = r / min(m, n), and moves 32 q more for R, U and the moments; gradient and weight are 12. At r = 128, s = 20
// and 1024 columns that is 512 operations and 36 bytes, where AdamW moves 28: 1.5 times its time is out of reach where
// fewer than 12 operations are done in the time of a byte, as on any CPU. What is left is to keep this part small.
//
// Work is cut into pieces of all matrices. Each reads its part of every row of the window, four rows at a time, so that
// few streams are open, and sums in double; the second pass goes from the last piece to the first, whose rows may
// still be in the third cache. A part's sums depend on the pieces, not on how many threads came.
#include <algorithm>

#include "deftcore/workspace.h"
#include "wide.h"

namespace deftcore::cpu {
namespace {

constexpr int kStreams = 4;  // rows of a window at a time
static_assert(kGalorePiece % kWidth == 0 && kWidth % kWide == 0);

// A single thread, to what is written for groups of them.
struct Alone {
  static constexpr int64_t lane = 0, lanes = 1;
  void sync() const {}
};

struct Work {
  int64_t* first;  // [count + 1], the pieces before each matrix
  double* sums;    // [pieces, rows], a piece's products of the window with R
  double* root;    // [count, rows, rows]
  double* c;       // [count, rows], coefficients of N
};

Work lay_out(const GaloreStepArgs& args, Workspace& room) {
  Work work{};
  work.first = room.take<int64_t>(args.count + 1);
  work.sums = room.take<double>((args.elements / kGalorePiece + args.count) * args.rows);
  work.root = room.take<double>(args.count * args.rows * args.rows);
  work.c = room.take<double>(args.count * args.rows);
  return work;
}

int64_t pieces_of(int64_t elements) { return (elements + kGalorePiece - 1) / kGalorePiece; }

// Calls fn(matrix, the piece's number, its first element, its elements) for the pieces of a part.
template <class Fn>
void for_pieces(const int64_t* first, int64_t count, const GaloreMatrix* matrices, Range mine, bool backwards,
                Fn&& fn) {
  for (int64_t n = mine.begin; n < mine.end; ++n) {
    const int64_t piece = backwards ? mine.end - 1 - (n - mine.begin) : n;
    const int64_t i = std::upper_bound(first, first + count, piece) - first - 1;
    const int64_t begin = (piece - first[i]) * kGalorePiece;
    fn(i, piece, begin, std::min(kGalorePiece, matrices[i].elements - begin));
  }
}

template <class T>
T* row_of(const GaloreMatrix& m, int64_t row, int64_t begin) {
  return static_cast<T*>(m.history) + row * m.elements + begin;
}

// n elements of a row as doubles, zeros up to a whole vector. [kGalorePiece]
template <class T>
void widen(const T* row, int64_t n, double* out) {
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) store(out + i, load_wide(row + i));
  for (; i < n; ++i) out[i] = static_cast<double>(to_float(row[i]));
}

template <int kRows, class T>
void dot_rows(const T* rows, int64_t stride, const double* x, int64_t n, double* sums) {
  Wide sum[kRows];
  for (Wide& s : sum) s = Wide(0.0);
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) {
    const Wide xi = load_wide(x + i);
    for (int r = 0; r < kRows; ++r) sum[r] = fma(load_wide(rows + r * stride + i), xi, sum[r]);
  }
  for (int r = 0; r < kRows; ++r) {
    sums[r] = reduce_add(sum[r]);
    for (int64_t j = i; j < n; ++j) sums[r] += static_cast<double>(to_float(rows[r * stride + j])) * x[j];
  }
}

template <int kRows, class T>
void add_rows(const T* rows, int64_t stride, const double* c, int64_t n, double* sum) {
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) {
    Wide s = load_wide(sum + i);
    for (int r = 0; r < kRows; ++r) s = fma(Wide(c[r]), load_wide(rows + r * stride + i), s);
    store(sum + i, s);
  }
  for (; i < n; ++i) {
    for (int r = 0; r < kRows; ++r) sum[i] += c[r] * static_cast<double>(to_float(rows[r * stride + i]));
  }
}

// n floats, rounded to T.
template <class T>
void narrow(const float* from, int64_t n, T* to) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store_ieee(to + i, load(from + i));
  if (i < n) {
    T tail[kWidth];
    store_ieee(tail, load_tail(from + i, n - i));
    std::memcpy(to + i, tail, static_cast<size_t>(n - i) * sizeof(T));
  }
}

// Writes R into its row, and the products of that part of the row with all of them.
template <class T>
void push(const GaloreMatrix& m, int64_t begin, int64_t n, double* sums) {
  const float* r = static_cast<const float*>(m.grad) + begin;
  T* own = row_of<T>(m, m.slot, begin);
  narrow(r, n, own);
  alignas(64) double x[kGalorePiece];
  widen(own, n, x);
  const int64_t rows = rows_of(m);
  int64_t j = 0;
  for (; j + kStreams <= rows; j += kStreams) dot_rows<kStreams>(row_of<T>(m, j, begin), m.elements, x, n, sums + j);
  for (; j < rows; ++j) dot_rows<1>(row_of<T>(m, j, begin), m.elements, x, n, sums + j);
}

void solve(const GaloreStepArgs& args, const Work& work, int64_t i) {
  const GaloreMatrix& m = args.matrices[i];
  if (m.history == nullptr) return;
  const int64_t rows = rows_of(m);
  for (int64_t j = 0; j < rows; ++j) {
    double sum = 0;
    for (int64_t piece = work.first[i]; piece < work.first[i + 1]; ++piece) sum += work.sums[piece * args.rows + j];
    m.gram[m.slot * m.rows + j] = m.gram[j * m.rows + m.slot] = sum;
  }
  solve_window(Alone{}, args, m, work.root + i * args.rows * args.rows, work.c + i * args.rows);
}

// N of a piece, and the window's rows where it starts anew.
template <class T>
void natural(const GaloreMatrix& m, const double* c, int64_t begin, int64_t n, float* out) {
  alignas(64) double sum[kGalorePiece];
  std::fill_n(sum, n, 0.0);
  if (*m.outcome == kHeld) {
    const int64_t rows = rows_of(m);
    int64_t j = 0;
    for (; j + kStreams <= rows; j += kStreams) {
      add_rows<kStreams>(row_of<T>(m, j, begin), m.elements, c + j, n, sum);
    }
    for (; j < rows; ++j) add_rows<1>(row_of<T>(m, j, begin), m.elements, c + j, n, sum);
  } else {
    const bool alone = *m.outcome == kAlone;
    T own[kGalorePiece];
    std::copy_n(row_of<T>(m, m.slot, begin), n, own);
    if (alone) {
      add_rows<1>(own, 0, c, n, sum);
    } else {
      add_rows<1>(static_cast<const float*>(m.grad) + begin, 0, c, n, sum);
    }
    for (int64_t j = 0; j < m.rows; ++j) std::fill_n(row_of<T>(m, j, begin), n, T{});
    if (alone) std::copy_n(own, n, row_of<T>(m, 0, begin));
  }
  int64_t i = 0;
  for (; i + kWide <= n; i += kWide) store(out + i, load_wide(sum + i));
  for (; i < n; ++i) out[i] = static_cast<float>(sum[i]);
}

// Values of a piece into a weight; `place` is the number of its first element.
template <class T>
void write_weight(const float* values, T* weight, int64_t place, int64_t n, bool stochastic, int64_t seed) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (stochastic) {
      for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, values + i, 4);
        weight[i].bits = round_stochastically(bits, static_cast<uint32_t>(place + i), static_cast<uint32_t>(seed));
      }
      return;
    }
  }
  narrow(values, n, weight);
}

// fn(get, put) for vectors of a piece, the last one in part: get(p) reads the vector of an array that begins at p,
// put(p, v) writes it.
template <class Fn>
void for_vectors(int64_t n, Fn&& fn) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    fn([=](const auto* p) { return load(p + i); }, [=](float* p, Vec v) { store(p + i, v); });
  }
  if (i < n) {
    fn([=](const auto* p) { return load_tail(p + i, n - i); }, [=](float* p, Vec v) { store_tail(p + i, v, n - i); });
  }
}

// U of a piece into `out`, which may be `n` itself.
template <class T>
void move_on(const GaloreMatrix& m, const AdamRule& adam, float correction, int64_t begin, int64_t count, const T* n,
             float* out) {
  float *mean = m.exp_avg + begin, *square = m.exp_avg_sq + begin;
  for_vectors(count, [&](auto get, auto put) {
    Vec first = get(mean), second = get(square);
    const Vec u = adam(get(n), first, second, correction);
    put(mean, first);
    put(square, second);
    put(out, u);
  });
}

template <class T>
void change_weight(T* weight, const float* change, float rate, float keep, int64_t place, int64_t n, bool stochastic,
                   int64_t seed) {
  alignas(64) float values[kGalorePiece];
  for_vectors(n, [&](auto get, auto put) { put(values, stepped(get(weight), get(change), rate, keep)); });
  write_weight(values, weight, place, n, stochastic, seed);
}

// T is the window's type, or, of whole gradients, theirs.
template <bool kWhole, class T>
void step(const GaloreStepArgs& args, const Work& work) {
  const AdamRule adam = adam_rule(args);
  const int64_t pieces = work.first[args.count];
  const int parts = parts_for(args.elements * (16 + 2 * args.rows * static_cast<int64_t>(sizeof(T))));
  const auto each = [&](int part, bool backwards, auto&& fn) {
    for_pieces(work.first, args.count, args.matrices, share(pieces, parts, part), backwards, fn);
  };
  parallel(parts, [&](Team& team) {
    if constexpr (!kWhole) {
      if (args.rows > 0) {
        team.stage([&](int part) {
          each(part, false, [&](int64_t i, int64_t piece, int64_t begin, int64_t n) {
            const GaloreMatrix& m = args.matrices[i];
            if (m.history != nullptr) push<T>(m, begin, n, work.sums + piece * args.rows);
          });
        });
        team.each(args.count, [&](int64_t i) { solve(args, work, i); });
      }
    }
    team.stage([&](int part) {
      each(part, true, [&](int64_t i, int64_t, int64_t begin, int64_t n) {
        const GaloreMatrix& m = args.matrices[i];
        const float correction = adam_correction(args, m.age);
        if constexpr (kWhole) {
          alignas(64) float u[kGalorePiece];
          move_on(m, adam, correction, begin, n, static_cast<const T*>(m.grad) + begin, u);
          change_weight(static_cast<T*>(m.out) + begin, u, args.rate, args.keep, begin, n, args.stochastic, m.seed);
        } else {
          float* out = static_cast<float*>(m.out) + begin;
          const float* r = static_cast<const float*>(m.grad) + begin;
          if (m.history != nullptr) natural<T>(m, work.c + i * args.rows, begin, n, out);
          move_on(m, adam, correction, begin, n, m.history != nullptr ? out : r, out);
        }
      });
    });
  });
}

}  // namespace

// ----------------------------------------------------------------------------

size_t DEFTCORE_KERNEL(galore_step_workspace)(const GaloreStepArgs& args) {
  return bytes_of([&](Workspace& room) { lay_out(args, room); });
}

void DEFTCORE_KERNEL(galore_step)(const GaloreStepArgs& args) {
  Workspace room(args.workspace);
  const Work work = lay_out(args, room);
  work.first[0] = 0;
  for (int64_t i = 0; i < args.count; ++i) {
    work.first[i + 1] = work.first[i] + pieces_of(args.matrices[i].elements);
  }
  if (args.whole) {
    dispatch_dtype(args.dtype, [&](auto t) { step<true, decltype(t)>(args, work); });
  } else if (args.history_dtype == DType::kBFloat16) {
    step<false, BFloat16>(args, work);
  } else {
    step<false, float>(args, work);
  }
}

void DEFTCORE_KERNEL(galore_update)(const GaloreUpdateArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    for_range(pieces_of(args.elements), args.elements * (4 + 2 * static_cast<int64_t>(sizeof(T))), [&](int64_t piece) {
      const int64_t begin = piece * kGalorePiece, n = std::min(kGalorePiece, args.elements - begin);
      change_weight(static_cast<T*>(args.weight) + begin, args.change + begin, args.rate, args.keep, begin, n,
                    args.stochastic, args.seed);
    });
  });
}

}  // namespace deftcore::cpu
