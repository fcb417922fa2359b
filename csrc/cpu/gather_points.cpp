// Rows of points gathered or summed with weights, and the way back, bound by memory traffic. The way back first lists
// for each point the slots that use it, by counting, so that each of its sums is made in registers, in the order of the
// slots, by one thread.
#include <algorithm>

#include "deftcore/neighbours.h"
#include "deftcore/workspace.h"
#include "isa.h"

namespace deftcore::cpu {
namespace {

constexpr int kSums = 8;         // vectors of a row that are summed at a time
constexpr int64_t kPoints = 16;  // points, or rows, of a task

// fn(i, read, write) for each vector of n columns, and once more for the tail: read(p) is the vector at p + i.
template <class T, class Fn>
void each_vector(int64_t n, Fn&& fn) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    fn([i](const auto* p) { return load(p + i); }, [i](T* p, Vec v) { store(p + i, v); });
  }
  if (const int64_t rest = n - i; rest > 0) {
    fn([i, rest](const auto* p) { return load_tail(p + i, rest); },
       [i, rest](T* p, Vec v) { store_tail(p + i, v, rest); });
  }
}

// out = sum of weight(j) row(j) over j < count, [width].
template <class T, class Row, class Weight>
void weighted_sum(int64_t count, int64_t width, T* out, Row&& row, Weight&& weight) {
  int64_t first = 0;
  for (; first + kSums * kWidth <= width; first += kSums * kWidth) {
    Vec sums[kSums];
    for (Vec& sum : sums) sum = Vec(0.0f);
    for (int64_t j = 0; j < count; ++j) {
      const T* x = row(j) + first;
      const Vec w(weight(j));
      for (int s = 0; s < kSums; ++s) sums[s] = fma(w, load(x + s * kWidth), sums[s]);
    }
    for (int s = 0; s < kSums; ++s) store(out + first + s * kWidth, sums[s]);
  }
  each_vector<T>(width - first, [&](auto read, auto write) {
    Vec sum(0.0f);
    for (int64_t j = 0; j < count; ++j) sum = fma(Vec(weight(j)), read(row(j) + first), sum);
    write(out + first, sum);
  });
}

template <class T>
void gather_row(const GatherPointsArgs& args, int64_t row) {
  const T* features = static_cast<const T*>(args.features) + row / args.rows * args.size * args.width;
  const int64_t* indices = args.indices + row * args.k;
  T* out = static_cast<T*>(args.out) + row * args.width;
  if (args.weights == nullptr) {
    std::copy_n(features + indices[0] * args.width, args.width, out);
    return;
  }
  const float* weights = args.weights + row * args.k;
  weighted_sum(
      args.k, args.width, out, [&](int64_t j) { return features + indices[j] * args.width; },
      [&](int64_t j) { return weights[j]; });
}

// ---------------------------------------------------------------------------- backward

// For each point of each cloud the slots r * k + j that use it, in their order: those of point i begin at starts[i].
struct Uses {
  int32_t* starts;  // [clouds, size + 1]
  int32_t* slots;   // [clouds, rows * k]

  Uses(const GatherPointsBackwardArgs& args, Workspace& room)
      : starts(room.take<int32_t>(args.clouds * (args.size + 1))),
        slots(room.take<int32_t>(args.clouds * args.rows * args.k)) {}

  void list(const GatherPointsBackwardArgs& args, int64_t cloud) const {
    const int64_t count = args.rows * args.k;
    const int64_t* indices = args.indices + cloud * count;
    int32_t* start = starts + cloud * (args.size + 1);
    int32_t* slot = slots + cloud * count;
    std::fill(start, start + args.size + 1, 0);
    for (int64_t i = 0; i < count; ++i) ++start[indices[i] + 1];
    for (int64_t i = 0; i < args.size; ++i) start[i + 1] += start[i];
    for (int64_t i = 0; i < count; ++i) slot[start[indices[i]]++] = static_cast<int32_t>(i);
    for (int64_t i = args.size; i > 0; --i) start[i] = start[i - 1];
    start[0] = 0;
  }
};

template <class T>
void sum_uses(const GatherPointsBackwardArgs& args, const Uses& uses, int64_t point) {
  const int64_t cloud = point / args.size, k = args.k;
  const int32_t* start = uses.starts + cloud * (args.size + 1) + point % args.size;
  const int32_t* slots = uses.slots + cloud * args.rows * k + start[0];
  const T* grad = static_cast<const T*>(args.grad) + cloud * args.rows * args.width;
  const float* weights = args.weights != nullptr ? args.weights + cloud * args.rows * k : nullptr;
  weighted_sum(
      start[1] - start[0], args.width, static_cast<T*>(args.grad_features) + point * args.width,
      [&](int64_t j) { return grad + (k == 1 ? slots[j] : slots[j] / k) * args.width; },
      [&](int64_t j) { return weights != nullptr ? weights[slots[j]] : 1.0f; });
}

template <class T>
void weights_of_row(const GatherPointsBackwardArgs& args, int64_t row) {
  const T* features = static_cast<const T*>(args.features) + row / args.rows * args.size * args.width;
  const T* grad = static_cast<const T*>(args.grad) + row * args.width;
  for (int64_t j = 0; j < args.k; ++j) {
    const T* x = features + args.indices[row * args.k + j] * args.width;
    Vec sum(0.0f);
    each_vector<T>(args.width, [&](auto read, auto) { sum = fma(read(x), read(grad), sum); });
    args.grad_weights[row * args.k + j] = reduce_add(sum);
  }
}

// fn(i) for i in [0, count), some at a time.
template <class Fn>
void by_some(Team& team, int64_t count, Fn&& fn) {
  team.each((count + kPoints - 1) / kPoints, [&](int64_t some) {
    const int64_t last = std::min((some + 1) * kPoints, count);
    for (int64_t i = some * kPoints; i < last; ++i) fn(i);
  });
}

}  // namespace

// ----------------------------------------------------------------------------

void DEFTCORE_KERNEL(gather_points)(const GatherPointsArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t rows = args.clouds * args.rows;
    for_range(rows, rows * args.width * (args.k + 1) * static_cast<int64_t>(sizeof(T)),
              [&](int64_t row) { gather_row<T>(args, row); });
  });
}

size_t DEFTCORE_KERNEL(gather_points_backward_workspace)(const GatherPointsBackwardArgs& args) {
  return bytes_of([&](Workspace& room) { Uses(args, room); });
}

void DEFTCORE_KERNEL(gather_points_backward)(const GatherPointsBackwardArgs& args) {
  Workspace room(args.workspace);
  const Uses uses(args, room);
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    const int64_t rows = args.clouds * args.rows;
    const int64_t bytes = (rows * args.k + args.clouds * args.size) * args.width * static_cast<int64_t>(sizeof(T));
    parallel(parts_for(bytes), [&](Team& team) {
      team.each(args.clouds, [&](int64_t cloud) { uses.list(args, cloud); });
      by_some(team, args.clouds * args.size, [&](int64_t point) { sum_uses<T>(args, uses, point); });
      if (args.grad_weights == nullptr) return;
      by_some(team, rows, [&](int64_t row) { weights_of_row<T>(args, row); });
    });
  });
}

}  // namespace deftcore::cpu
