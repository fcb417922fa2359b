// Penalties on logits, row by row: two reads of a row of student and teacher (largest; exponentials), and in the
// backward one. A row of 49,152 words in bfloat16 is 96 KB, which the second read finds in the cache; the rest is two
// exponentials an element and direction. Sums are float within a piece and double across pieces; rows go to threads as
// these are free, and each is computed by one, so that repeats are bit-equal.
#include "logits.h"

#include <algorithm>

#include "isa.h"

namespace deftcore::cpu {
namespace {

constexpr int64_t kPiece = 2048;  // columns whose sum float lanes keep exact to 1e-7
constexpr int64_t kTile = 512;    // columns whose gradient is in float32 at a time
constexpr int kGroup = 8;         // rows that share the loads of `right`

template <class T>
struct Peak {
  float largest = -INFINITY;
  double squares = 0;

  Peak(const T* z, int64_t width) {
    Vec most(-INFINITY);
    for (int64_t first = 0; first < width; first += kPiece) {
      Vec sum(0.0f);
      over(std::min(kPiece, width - first), [&](auto read) {
        const Vec x = read(z + first), finite = finite_of(x);
        most = at_least(x, most);
        sum = fma(finite, finite, sum);
      });
      squares += static_cast<double>(reduce_add(sum));
    }
    float lanes[kWidth];
    store(lanes, most);
    for (const float lane : lanes) largest = std::max(largest, lane);
  }
};

template <class T>
void row_stats(const LogitRowsArgs& args, int64_t row) {
  float* stats = args.stats + row * kRowStats;
  std::fill(stats, stats + kRowStats, 0.0f);
  if (left_out(args.mask, row)) return;
  const T* z = row_of<T>(args.student, row, args.stride);
  const T* t = row_of<T>(args.teacher, row, args.stride);
  const Peak<T> peak(z, args.width);
  stats[kLargest] = peak.largest;
  stats[kSquares] = static_cast<float>(peak.squares);
  const bool entropy = args.entropy_sharpness != 0.0f;
  if (t == nullptr && !entropy) return;
  const float teacher_largest = t != nullptr ? Peak<T>(t, args.width).largest : 0.0f;
  const Vec zero(0.0f), sharpness(args.sharpness), sharper(args.entropy_sharpness);
  const Vec shift(peak.largest), teacher_shift(teacher_largest);
  double q = 0, p = 0, cross = 0, e = 0, weighted = 0;
  for (int64_t first = 0; first < args.width; first += kPiece) {
    Vec q_sum(0.0f), p_sum(0.0f), cross_sum(0.0f), e_sum(0.0f), weighted_sum(0.0f);
    over(std::min(kPiece, args.width - first), [&](auto read) {
      const Vec x = read(z + first) - shift;
      if (t != nullptr) {
        const Vec a = x * sharpness, b = (read(t + first) - teacher_shift) * sharpness, weight = exp(b);
        q_sum = q_sum + exp(a);
        p_sum = p_sum + weight;
        // not where the teacher's probability is 0, since 0 times infinity is not 0
        cross_sum = cross_sum + where(weight == zero, zero, weight * (b - a));
      }
      if (entropy) {
        const Vec a = x * sharper, weight = exp(a);
        e_sum = e_sum + weight;
        weighted_sum = weighted_sum + where(weight == zero, zero, weight * a);
      }
    });
    q += static_cast<double>(reduce_add(q_sum)), p += static_cast<double>(reduce_add(p_sum));
    cross += static_cast<double>(reduce_add(cross_sum));
    e += static_cast<double>(reduce_add(e_sum)), weighted += static_cast<double>(reduce_add(weighted_sum));
  }
  if (t != nullptr) {
    stats[kLogSum] = static_cast<float>(std::log(q));
    stats[kTeacherLargest] = teacher_largest;
    stats[kTeacherLogSum] = static_cast<float>(std::log(p));
    stats[kDivergence] = static_cast<float>(cross / p - std::log(p) + std::log(q));
  }
  if (entropy) {
    stats[kEntropyLogSum] = static_cast<float>(std::log(e));
    stats[kEntropy] = static_cast<float>(std::log(e) - weighted / e);
  }
}

// ---------------------------------------------------------------------------- backward

// slope [kRows, n] = left right of kRows rows, whose factors begin at left[i].
template <int kRows>
void low_rank(const LogitRowsBackwardArgs& args, const float* const* left, int64_t first, int64_t n,
              float (*slope)[kTile]) {
  const int64_t columns = args.end - args.begin;
  const auto put = [&](int64_t i, auto read, auto write) {
    Vec sums[kRows];
    for (Vec& sum : sums) sum = Vec(0.0f);
    for (int64_t j = 0; j < args.rank; ++j) {
      const Vec right = read(args.right + j * columns + first + i);
      for (int r = 0; r < kRows; ++r) sums[r] = fma(Vec(left[r][j]), right, sums[r]);
    }
    for (int r = 0; r < kRows; ++r) write(slope[r] + i, sums[r]);
  };
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    put(i, [](const float* p) { return load(p); }, [](float* p, Vec v) { store(p, v); });
  }
  if (i < n) {
    put(i, [&](const float* p) { return load_tail(p, n - i); }, [&](float* p, Vec v) { store_tail(p, v, n - i); });
  }
}

// The gradient of n columns from `first` behind `begin`; `slope` has the product of the factors.
template <class T>
void row_gradient(const LogitRowsBackwardArgs& args, int64_t row, int64_t first, int64_t n, float* slope) {
  const LogitRowsArgs& f = args.forward;
  const float* stats = f.stats + row * kRowStats;
  const int64_t column = args.begin + first;
  const T* z = row_of<T>(f.student, row, f.stride) + column;
  const T* t = f.teacher != nullptr ? row_of<T>(f.teacher, row, f.stride) + column : nullptr;
  T* grad = static_cast<T*>(args.grad) + row * f.stride + column;
  const Vec zero(0.0f), none(-INFINITY), sharpness(f.sharpness), sharper(f.entropy_sharpness);
  const Vec shift(stats[kLargest]), log_sum(stats[kLogSum]);
  const Vec teacher_shift(stats[kTeacherLargest]), teacher_log_sum(stats[kTeacherLogSum]);
  const Vec entropy_log_sum(stats[kEntropyLogSum]), entropy(stats[kEntropy]);
  const Vec of_divergence(args.slopes[0]), of_entropy(args.slopes[1]), of_logits(args.slopes[2]);
  const bool spectral = args.rank > 0, every = f.entropy_sharpness != 0.0f;
  const auto at = [&](Vec x, auto read, const float* product) {
    Vec sum(0.0f);
    if (spectral) sum = fma(of_logits, x, load(product));
    if (every) {
      const Vec log_e = (x - shift) * sharper - entropy_log_sum;
      sum = fma(of_entropy, exp(log_e) * (log_e + entropy), sum);
    }
    sum = where(x == none, zero, sum);
    if (t != nullptr) {
      const Vec q = exp((x - shift) * sharpness - log_sum);
      const Vec p = exp((read(t) - teacher_shift) * sharpness - teacher_log_sum);
      sum = fma(of_divergence, q - p, sum);
    }
    return sum;
  };
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    store(slope + i, at(load(z + i), [&](const T* p) { return load(p + i); }, slope + i));
  }
  if (i < n) {
    float rest[kWidth] = {};
    std::memcpy(rest, slope + i, static_cast<size_t>(n - i) * sizeof(float));
    const auto read = [&](const T* p) { return load_rest(p + i, n - i); };
    store_tail(slope + i, at(read(z), read, rest), n - i);
  }
  for (int64_t j = 0; j < args.most; ++j) {
    const int64_t place = args.kept[row * args.most + j] - column;
    if (place >= 0 && place < n) slope[place] += args.kept_grad[row * args.most + j];
  }
  for (i = 0; i + kWidth <= n; i += kWidth) store(grad + i, load(slope + i));
  if (i < n) store_tail(grad + i, load_tail(slope + i, n - i), n - i);
}

template <class T>
void group_gradient(const LogitRowsBackwardArgs& args, int64_t group) {
  const LogitRowsArgs& f = args.forward;
  const int64_t columns = args.end - args.begin, last = std::min((group + 1) * kGroup, f.rows);
  int64_t rows[kGroup];
  const float* left[kGroup];
  int count = 0;
  for (int64_t row = group * kGroup; row < last; ++row) {
    if (left_out(f.mask, row)) {
      std::memset(static_cast<T*>(args.grad) + row * f.stride + args.begin, 0,
                  static_cast<size_t>(columns) * sizeof(T));
    } else {
      left[count] = args.left + row * args.rank;
      rows[count++] = row;
    }
  }
  float slope[kGroup][kTile];
  for (int64_t first = 0; first < columns; first += kTile) {
    const int64_t n = std::min(kTile, columns - first);
    if (args.rank > 0 && count == kGroup) {
      low_rank<kGroup>(args, left, first, n, slope);
    } else if (args.rank > 0) {
      for (int i = 0; i < count; ++i) low_rank<1>(args, left + i, first, n, slope + i);
    }
    for (int i = 0; i < count; ++i) row_gradient<T>(args, rows[i], first, n, slope[i]);
  }
}

}  // namespace

// ----------------------------------------------------------------------------

void DEFTCORE_KERNEL(logit_rows)(const LogitRowsArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    parallel(parts_for(args.rows * args.width * static_cast<int64_t>(sizeof(T))),
             [&](Team& team) { team.each(args.rows, [&](int64_t row) { row_stats<T>(args, row); }); });
  });
}

void DEFTCORE_KERNEL(logit_rows_backward)(const LogitRowsBackwardArgs& args) {
  dispatch_dtype(args.forward.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t bytes = args.forward.rows * (args.end - args.begin) * static_cast<int64_t>(sizeof(T));
    parallel(parts_for(bytes), [&](Team& team) {
      team.each((args.forward.rows + kGroup - 1) / kGroup, [&](int64_t group) { group_gradient<T>(args, group); });
    });
  });
}

}  // namespace deftcore::cpu
