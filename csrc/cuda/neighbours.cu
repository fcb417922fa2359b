// Farthest points, nearest neighbours and balls, bound by the arithmetic of distances (8 operations a pair, none fused:
// see neighbours.h). A distance and its point's number are one key, so that the least of all keys is the nearest point
// with the lowest number. Sampling: a block per cloud, which keeps points and distances in registers, with one barrier
// a pick. Searches: a warp for a few queries, which read the points from tiles in shared memory; the nearest lie sorted
// over its lanes' registers. No workspace but for a cloud that registers do not hold.
#include "deftcore/neighbours.h"
#include "deftcore/workspace.h"
#include "elements.cuh"
#include "launch.cuh"

namespace deftcore::cuda {
namespace {

using Key = uint64_t;
constexpr Key kNone = ~Key{0};  // above every key

__device__ Key key_of(float distance, unsigned number) {
  return static_cast<Key>(__float_as_uint(distance)) << 32 | number;
}
__device__ float distance_of(Key key) { return __uint_as_float(static_cast<unsigned>(key >> 32)); }
__device__ unsigned number_of(Key key) { return static_cast<unsigned>(key); }

struct Point {
  float x, y, z;
};

__device__ Point point_at(const float* points, int64_t i) {
  return {points[3 * i], points[3 * i + 1], points[3 * i + 2]};
}

__device__ float squared_distance(const Point& a, const Point& b) {
  const float dx = a.x - b.x, dy = a.y - b.y, dz = a.z - b.z;
  return __fadd_rn(__fadd_rn(__fmul_rn(dx, dx), __fmul_rn(dy, dy)), __fmul_rn(dz, dz));
}

__device__ int length_of(const int64_t* lengths, int64_t cloud, int64_t size) {
  return static_cast<int>(lengths == nullptr ? size : lengths[cloud]);
}

template <class Op>
__device__ Key over_warp(Key key, Op op) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) key = op(key, __shfl_xor_sync(0xffffffffu, key, offset));
  return key;
}

// ---------------------------------------------------------------------------- farthest points

constexpr int kSamplers = 512;  // threads of a cloud
constexpr int kMostHeld = 12;   // points that a thread holds in registers

// A thread's points of a cloud, every kSamplers-th from its own, and each one's squared distance to the nearest pick,
// -1 of what is not to be picked (any more).
template <int kHeld>
struct Held {
  Point points[kHeld];
  float least[kHeld];

  __device__ Held(const float*, float*) {}
  template <class Fn>
  __device__ void each(int, Fn&& fn) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) fn(static_cast<int>(threadIdx.x) + i * kSamplers, points[i], least[i]);
  }
};

// The same of a cloud that registers do not hold: distances lie in the workspace.
template <>
struct Held<0> {
  const float* points;
  float* least;

  __device__ Held(const float* points, float* least) : points(points), least(least) {}
  template <class Fn>
  __device__ void each(int size, Fn&& fn) {
    for (int i = static_cast<int>(threadIdx.x); i < size; i += kSamplers) {
      Point point = point_at(points, i);
      fn(i, point, least[i]);
    }
  }
};

// Nothing where registers hold a cloud.
float* distances_of(const FarthestPointSampleArgs& args, Workspace& room) {
  return room.take<float>(args.size > kMostHeld * kSamplers ? args.clouds * args.size : 0);
}

template <int kHeld>
__global__ void __launch_bounds__(kSamplers) sample_kernel(FarthestPointSampleArgs args, float* distances) {
  __shared__ Key farthest[2][kSamplers / kWarp];  // one is read while the other is written
  const int64_t cloud = blockIdx.x;
  const int size = static_cast<int>(args.size), length = length_of(args.lengths, cloud, args.size);
  const float* points = args.points + cloud * args.size * 3;
  int64_t* picks = args.picks + cloud * args.samples;
  Held<kHeld> own(points, distances + cloud * args.size);
  own.each(size, [&](int i, Point& point, float& least) {
    least = -1.0f;
    if (i >= length) return;
    point = point_at(points, i);
    const float norm = squared_distance(point, {0.0f, 0.0f, 0.0f});
    if (!args.skip_near_origin || static_cast<double>(norm) > kNearOrigin) least = INFINITY;
  });
  int64_t pick = args.start, n = 0;
  for (;;) {
    if (threadIdx.x == 0) picks[n] = pick;
    if (++n == args.samples) return;
    const Point last = point_at(points, pick);
    // Complements of numbers: of equal distances the lowest number has the largest key, and no point has key 0.
    Key best = 0;
    own.each(size, [&](int i, const Point& point, float& least) {
      least = i == pick ? -1.0f : fminf(least, squared_distance(point, last));
      if (least >= 0.0f) best = max(best, key_of(least, ~static_cast<unsigned>(i)));
    });
    best = over_warp(best, [](Key a, Key b) { return max(a, b); });
    Key* keys = farthest[n % 2];
    if (threadIdx.x % kWarp == 0) keys[threadIdx.x / kWarp] = best;
    __syncthreads();
    for (int w = 0; w < kSamplers / kWarp; ++w) best = max(best, keys[w]);
    if (best == 0) break;
    pick = ~number_of(best);
  }
  for (int64_t i = n + threadIdx.x; i < args.samples; i += kSamplers) picks[i] = picks[i % n];
}

// ---------------------------------------------------------------------------- searches

constexpr int kTile = 1024;   // points of a tile: 12 KB
constexpr int kQueries = 2;   // of a warp: they share the loads of points
constexpr int kMostHits = 4;  // keys that a lane holds of a query

// A warp's queries of a block's cloud; a query that is not there has no points.
struct Queries {
  int64_t cloud, first;
  int lengths[kQueries];
  Point points[kQueries];

  template <class Args>
  __device__ Queries(const Args& args, int blocks_across)
      : cloud(blockIdx.x / blocks_across),
        first((static_cast<int64_t>(blockIdx.x % blocks_across) * kWarps + threadIdx.x / kWarp) * kQueries) {
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      lengths[q] = first + q < args.count ? length_of(args.lengths, cloud, args.size) : 0;
      points[q] = point_at(args.queries, cloud * args.count + min(first + q, args.count - 1));
    }
  }
};

// fn(q, number, key) for every point of a cloud and every query of the warp, kWarp points at a time in their order; all
// lanes call, and the key is kNone where there is no point.
template <class Args, class Fn>
__device__ void search(const Args& args, const Queries& queries, Fn&& fn) {
  __shared__ float tile[3 * kTile];
  const int length = length_of(args.lengths, queries.cloud, args.size), lane = threadIdx.x % kWarp;
  const float* points = args.points + queries.cloud * args.size * 3;
  for (int64_t first = 0; first < length; first += kTile) {
    const int count = static_cast<int>(min(length - first, static_cast<int64_t>(kTile)));
    __syncthreads();  // the last tile is used up
    for (int i = threadIdx.x; i < 3 * count; i += kThreads) tile[i] = points[3 * first + i];
    __syncthreads();
    for (int i = lane; i - lane < count; i += kWarp) {
      const int number = static_cast<int>(first) + i;
      const Point point = point_at(tile, min(i, count - 1));
#pragma unroll
      for (int q = 0; q < kQueries; ++q) {
        const Key key = key_of(squared_distance(point, queries.points[q]), static_cast<unsigned>(number));
        fn(q, number, i < count && queries.lengths[q] > 0 ? key : kNone);
      }
    }
  }
}

// The least keys that a warp saw, ascending: that at place i is in lane i % kWarp. Below the `wanted` last places,
// which are filled, stand zeros.
template <int kHits>
struct Nearest {
  Key keys[kHits];
  Key most;  // the last

  __device__ void clear(int wanted) {
#pragma unroll
    for (int r = 0; r < kHits; ++r) keys[r] = place(r) < kHits * kWarp - wanted ? 0 : kNone;
    most = kNone;
  }
  __device__ static int place(int r) { return r * kWarp + static_cast<int>(threadIdx.x % kWarp); }

  // Sees a key of each lane.
  __device__ void see(Key key) {
    unsigned near = __ballot_sync(0xffffffffu, key < most);
    for (; near != 0; near &= near - 1) {
      const Key next = __shfl_sync(0xffffffffu, key, __ffs(static_cast<int>(near)) - 1);
      if (next < most) insert(next);
    }
  }

  __device__ void insert(Key key) {
    const int lane = threadIdx.x % kWarp;
    Key before = 0;  // in lane 0: at the place before register r
#pragma unroll
    for (int r = 0; r < kHits; ++r) {
      const Key turned = __shfl_sync(0xffffffffu, keys[r], (lane + kWarp - 1) % kWarp);
      const Key left = lane == 0 ? before : turned;
      if (keys[r] > key) keys[r] = max(left, key);
      before = turned;
    }
    most = __shfl_sync(0xffffffffu, keys[kHits - 1], kWarp - 1);
  }
};

// Passes over the points find the nearest kHits * kWarp, then those behind them, and so on.
template <int kHits>
__global__ void __launch_bounds__(kThreads, kMinBlocks) knn_kernel(KnnArgs args, int blocks_across) {
  const Queries queries(args, blocks_across);
  Nearest<kHits> nearest[kQueries];
  Key floors[kQueries] = {};
  for (int64_t done = 0; done < args.k; done += kHits * kWarp) {
    const int wanted = static_cast<int>(min(args.k - done, static_cast<int64_t>(kHits * kWarp)));
    for (Nearest<kHits>& each : nearest) each.clear(wanted);
    search(args, queries, [&](int q, int, Key key) { nearest[q].see(key >= floors[q] ? key : kNone); });
#pragma unroll
    for (int q = 0; q < kQueries; ++q) {
      floors[q] = nearest[q].most == kNone ? kNone : nearest[q].most + 1;
      if (queries.lengths[q] == 0) continue;
      const int64_t row = (queries.cloud * args.count + queries.first + q) * args.k;
      const auto each = [&](auto&& fn) {
#pragma unroll
        for (int r = 0; r < kHits; ++r) {
          const int slot = nearest[q].place(r) - (kHits * kWarp - wanted);
          if (slot >= 0) fn(row + done + slot, nearest[q].keys[r]);
        }
      };
      each([&](int64_t at, Key key) {
        args.distances[at] = key == kNone ? INFINITY : distance_of(key);
        if (key != kNone) args.indices[at] = number_of(key);
      });
      __syncwarp();  // the nearest is written
      each([&](int64_t at, Key key) {
        if (key == kNone) args.indices[at] = args.indices[row];
      });
    }
  }
}

__global__ void __launch_bounds__(kThreads, kMinBlocks) ball_kernel(BallQueryArgs args, int blocks_across) {
  const Queries queries(args, blocks_across);
  const int lane = threadIdx.x % kWarp;
  int64_t hits[kQueries] = {}, first[kQueries] = {};
  Key nearest[kQueries];
  for (Key& key : nearest) key = kNone;
  const auto row_of = [&](int q) { return (queries.cloud * args.count + queries.first + q) * args.k; };
  search(args, queries, [&](int q, int number, Key key) {
    if (hits[q] >= args.k) return;
    const bool inside = key != kNone && distance_of(key) < args.square;
    const unsigned found = __ballot_sync(0xffffffffu, inside);
    const int64_t slot = hits[q] + __popc(found & ((1u << lane) - 1));
    if (inside && slot < args.k) {
      args.indices[row_of(q) + slot] = number;
      args.mask[row_of(q) + slot] = 1;
    }
    if (hits[q] == 0) {
      nearest[q] = min(nearest[q], key);
      first[q] = number - lane + __ffs(static_cast<int>(found)) - 1;
    }
    hits[q] += __popc(found);
  });
#pragma unroll
  for (int q = 0; q < kQueries; ++q) {
    if (queries.lengths[q] == 0) continue;
    const Key least = over_warp(nearest[q], [](Key a, Key b) { return min(a, b); });
    for (int64_t slot = hits[q] + lane; slot < args.k; slot += kWarp) {
      args.indices[row_of(q) + slot] = hits[q] > 0 ? first[q] : static_cast<int64_t>(number_of(least));
      args.mask[row_of(q) + slot] = 0;
    }
  }
}

template <class Args>
void launch_search(void (*kernel)(Args, int), const Args& args, StreamHere here) {
  const unsigned across = blocks_for(args.count, kWarps * kQueries);
  launch(kernel, static_cast<unsigned>(args.clouds) * across, kThreads, 0, here, args, static_cast<int>(across));
}

}  // namespace

// ----------------------------------------------------------------------------

size_t farthest_point_sample_workspace(const FarthestPointSampleArgs& args) {
  return bytes_of([&](Workspace& room) { distances_of(args, room); });
}

void farthest_point_sample(const FarthestPointSampleArgs& args, Stream stream) {
  check_args(args, "farthest_point_sample");
  if (args.clouds == 0) return;
  Workspace room(args.workspace);
  float* distances = distances_of(args, room);
  const auto run = [&](auto kernel) {
    launch(kernel, static_cast<unsigned>(args.clouds), kSamplers, 0, stream, args, distances);
  };
  const int64_t held = ceil_div(args.size, kSamplers);
  if (held <= 2) return run(sample_kernel<2>);
  if (held <= 4) return run(sample_kernel<4>);
  if (held <= 8) return run(sample_kernel<8>);
  if (held <= kMostHeld) return run(sample_kernel<kMostHeld>);
  run(sample_kernel<0>);
}

size_t knn_workspace(const KnnArgs&) { return 0; }

void knn(const KnnArgs& args, Stream stream) {
  check_args(args, "knn");
  if (args.clouds * args.count == 0) return;
  if (args.k <= kWarp) return launch_search(knn_kernel<1>, args, stream);
  if (args.k <= 2 * kWarp) return launch_search(knn_kernel<2>, args, stream);
  launch_search(knn_kernel<kMostHits>, args, stream);
}

size_t ball_query_workspace(const BallQueryArgs&) { return 0; }

void ball_query(const BallQueryArgs& args, Stream stream) {
  check_args(args, "ball_query");
  if (args.clouds * args.count == 0) return;
  launch_search(ball_kernel, args, stream);
}

}  // namespace deftcore::cuda
