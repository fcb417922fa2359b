// How the kernels use threads. Work is cut into parts, and whichever threads come take the parts in turn: OpenMP may
// bring fewer than it was asked for (OMP_THREAD_LIMIT, OMP_DYNAMIC, a region inside a region). Buffers and results
// belong to parts, so that neither depends on how many threads came. No kernel asks OpenMP anything itself.
#pragma once

#include <omp.h>

#include <cstdint>

namespace deftcore::cpu {
namespace {

struct Range {
  int64_t begin, end;
};

// Share `part` of [0, total) in `parts` nearly equal pieces whose bounds are multiples of `unit`.
inline Range share(int64_t total, int64_t parts, int64_t part, int64_t unit = 1) {
  const int64_t units = (total + unit - 1) / unit;
  const int64_t begin = units * part / parts * unit, end = units * (part + 1) / parts * unit;
  return {begin < total ? begin : total, end < total ? end : total};
}

// The most parts that work is cut into; workspaces have room for as many.
inline int most_parts() { return omp_get_max_threads(); }

// Parts for `bytes` of traffic: waking a thread costs about 3 us, in which one core alone streams about kBytesPerPart.
inline int parts_for(int64_t bytes) {
  constexpr int64_t kBytesPerPart = 1 << 16;
  const int64_t wanted = bytes / kBytesPerPart + 1, most = most_parts();
  return static_cast<int>(wanted < most ? wanted : most);
}

// What the body of `parallel` works with. All its threads must run the same stages; a stage begins when the one before
// is done.
class Team {
 public:
  explicit Team(int count) : parts(count) {}
  const int parts;

  // fn(part) for every part.
  template <class Fn>
  void stage(Fn&& fn) {
    wait();
    for (int part = omp_get_thread_num(); part < parts; part += omp_get_num_threads()) fn(part);
  }

  // fn() on one thread; what it sets may be read outside of stages too.
  template <class Fn>
  void once(Fn&& fn) {
    wait();
    if (omp_get_thread_num() == 0) fn();
    wait();
    busy_ = false;
  }

  // fn(i) for i in [0, count), each on a thread that is free: for work of uneven size that writes only what is its own.
  template <class Fn>
  void each(int64_t count, Fn&& fn) {
    wait();
#pragma omp for schedule(dynamic) nowait
    for (int64_t i = 0; i < count; ++i) fn(i);
  }

 private:
  void wait() {
    if (busy_) {
#pragma omp barrier
    }
    busy_ = true;
  }
  bool busy_ = false;
};

// body(team) on the threads of a region.
template <class Body>
void parallel(int parts, Body&& body) {
#pragma omp parallel num_threads(parts)
  {
    Team team(parts);
    body(team);
  }
}

// A region of one stage.
template <class Fn>
void for_parts(int parts, Fn&& fn) {
  parallel(parts, [&](Team& team) { team.stage(fn); });
}

// fn(i) for i in [0, count), in parallel where `bytes` of traffic are worth it.
template <class Fn>
void for_range(int64_t count, int64_t bytes, Fn&& fn) {
  const int parts = parts_for(bytes);
  for_parts(parts, [&](int part) {
    const Range mine = share(count, parts, part);
    for (int64_t i = mine.begin; i < mine.end; ++i) fn(i);
  });
}

}  // namespace
}  // namespace deftcore::cpu
