// Nearest neighbours and balls: brute force, bound by the arithmetic of distances (8 operations a pair, none fused: see
// neighbours.h). A cloud of 2,048 points is 24 KB and stays in L1. Of its distances only those are looked at one by one
// that a bound, taken from the least distances of groups of points, leaves.
//
// What the arithmetic alone takes cannot be reached on clouds that small. Of 32 neighbours among 2,048 points, 8
// clouds, one thread of a Zen 5 with AVX-512 beside other work, bare distances take 98 ns a query. Storing them and the
// groups' least makes it 200; another look at each against the bound, without a branch, 170 more; keys of the 45 or so
// that are left, and their order, another 170: 540 in all, 18 % of bare distances (26 % with AVX2 forced there, whose
// distances take twice as long). A cloud of 65,536 points, 16 neighbours: 27 and 43 %, where the second look remains.
#include <algorithm>

#include "clouds.h"

namespace deftcore::cpu {
namespace {

constexpr int64_t kChunk = 2048;  // points whose distances are kept at a time: 24 KB of points, 8 KB of distances
constexpr int64_t kQueries = 8;   // that go over a chunk one after another while it is in L1

// The bits of a distance above those of a number: no two are equal, and they are ordered as distances, then numbers.
using Key = int64_t;

inline Key key_of(float distance, int64_t point) {
  uint32_t bits;
  std::memcpy(&bits, &distance, 4);
  return static_cast<Key>(static_cast<uint64_t>(bits) << 32 | static_cast<uint64_t>(point));
}
inline float distance_of(Key key) {
  const uint32_t bits = static_cast<uint32_t>(key >> 32);
  float distance;
  std::memcpy(&distance, &bits, 4);
  return distance;
}
inline int64_t number_of(Key key) { return key & 0xffffffff; }

constexpr int64_t kGroups = 256;  // at most, of the points of a chunk
constexpr int64_t kRanked = 128;  // keys that are sorted by counting, without a branch that depends on them

// A bound that at least k distances do not exceed: close above the k-th least of the groups' least distances, found by
// halving the range of their bits.
float bound_of(const float* least, int64_t groups, int64_t k) {
  Vec most = load(least), fewest = Vec(0.0f) - most;
  for (int64_t i = kWidth; i < groups; i += kWidth) {
    most = at_least(load(least + i), most);
    fewest = at_least(Vec(0.0f) - load(least + i), fewest);
  }
  const float ends[2] = {-reduce_max(fewest), reduce_max(most)};
  int32_t low, high;
  std::memcpy(&low, ends, 4);
  std::memcpy(&high, ends + 1, 4);
  low &= INT32_MAX;  // of -0
  float bound;
  for (int step = 0; step < 8; ++step) {
    const int32_t middle = low + (high - low) / 2;
    std::memcpy(&bound, &middle, 4);
    int64_t below = 0;
    for (int64_t i = 0; i < groups; i += kWidth) {
      below += __builtin_popcount(bits_of(load(least + i) <= Vec(bound)));
    }
    const bool enough = below >= k;
    low = enough ? low : middle;
    high = enough ? middle : high;
  }
  std::memcpy(&bound, &high, 4);
  return bound;
}

// Sorts count <= kRanked keys into `sorted`, by counting for a vector of them at a time how many distances are below;
// false where two are equal.
bool rank_distances(const Key* keys, int64_t count, Key* sorted) {
  float distances[kRanked + kWidth], below[kWidth];
  for (int64_t i = 0; i < count; ++i) distances[i] = distance_of(keys[i]);
  std::fill_n(distances + count, kWidth, INFINITY);
  std::fill_n(sorted, count, Key{-1});
  for (int64_t first = 0; first < count; first += kWidth) {
    const Vec own = load(distances + first), one(1.0f), none(0.0f);
    Vec less(0.0f);
    for (int64_t j = 0; j < count; ++j) less = less + where(Vec(distances[j]) < own, one, none);
    store(below, less);
    for (int64_t i = 0; i < std::min<int64_t>(kWidth, count - first); ++i) {
      sorted[static_cast<int64_t>(below[i])] = keys[first + i];
    }
  }
  return std::find(sorted, sorted + count, Key{-1}) == sorted + count;
}

// The same for keys, eight of them at a time.
void rank(const Key* keys, int64_t count, Key* sorted) {
  constexpr int64_t kSome = 8;
  for (int64_t first = 0; first < count; first += kSome) {
    const int64_t n = std::min(kSome, count - first);
    Key own[kSome] = {};
    int64_t below[kSome] = {};
    std::copy_n(keys + first, n, own);
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t i = 0; i < kSome; ++i) below[i] += keys[j] < own[i];
    }
    for (int64_t i = 0; i < n; ++i) sorted[below[i]] = own[i];
  }
}

// A query on its way over the chunks of a cloud: its candidates, and the distance beyond which there are none.
struct Search {
  Key* keys;  // [k + kChunk]
  int64_t k, count;
  float bound;

  // Sees n points, whole vectors, of which the first has this number.
  void visit(const Cloud& cloud, const float* query, int64_t first, int64_t n) {
    alignas(64) float distances[kChunk], least[kGroups];
    int32_t found[kChunk + kWidth];
    const Point p(query);
    int64_t groups = 4 * kWidth;
    while (groups < 2 * k && groups < kGroups) groups *= 2;
    if (count == 0 && 2 * k <= groups && 2 * groups <= n) {
      std::fill(least, least + groups, INFINITY);
      for (int64_t i = 0; i < n; i += kWidth) {
        const Vec distance = squared_distance(cloud, first + i, p);
        float* group = least + (i & (groups - 1));
        store(distances + i, distance);
        store(group, at_most(distance, load(group)));
      }
      bound = bound_of(least, groups, k);
    } else {
      for (int64_t i = 0; i < n; i += kWidth) store(distances + i, squared_distance(cloud, first + i, p));
    }
    int32_t hits = 0;
    for (int64_t i = 0; i < n; i += kWidth) {
      const uint32_t bits = bits_of(load(distances + i) <= Vec(bound));
      compress(found + hits, bits, static_cast<int32_t>(i));
      hits += __builtin_popcount(bits);
    }
    Key* more = keys + count;
    for (int32_t i = 0; i < hits; ++i) more[i] = key_of(distances[found[i]], first + found[i]);
    count += hits;
  }

  // Keeps the k nearest, in no order.
  void prune() {
    if (count <= k) return;
    std::nth_element(keys, keys + k - 1, keys + count);
    count = k;
    bound = distance_of(keys[k - 1]);
  }

  void finish(int64_t* indices, float* distances) {
    Key ranked[kRanked];
    if (count > kRanked) prune();
    if (count <= kRanked) {
      if (!rank_distances(keys, count, ranked)) rank(keys, count, ranked);
    } else {
      std::sort(keys, keys + count);
    }
    const Key* sorted = count <= kRanked ? ranked : keys;
    for (int64_t i = 0; i < k; ++i) {
      indices[i] = number_of(sorted[i < count ? i : 0]);
      distances[i] = i < count ? distance_of(sorted[i]) : INFINITY;
    }
  }
};

// How threads share the queries, and their buffers.
struct Searching {
  Clouds clouds;
  int64_t across, tasks, keys_each;  // blocks of queries of a cloud; of all
  int parts;
  Key* keys;

  Searching(const KnnArgs& args, Workspace& room) : clouds(args.clouds, args.size, room) {
    across = (args.count + kQueries - 1) / kQueries;
    tasks = across * args.clouds;
    parts = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(tasks, most_parts())));
    keys_each = args.k + kChunk;
    keys = room.take<Key>(parts * kQueries * keys_each);
  }
};

void search(const KnnArgs& args, const Searching& plan, int part, int64_t task) {
  const int64_t c = task / plan.across, begin = task % plan.across * kQueries;
  const int64_t count = std::min(kQueries, args.count - begin), row = c * args.count + begin;
  const int64_t length = padded(length_of(args.lengths, c, args.size));
  const Cloud cloud = plan.clouds[c];
  const float* queries = args.queries + row * 3;
  Search searches[kQueries];
  for (int64_t q = 0; q < count; ++q) {
    searches[q] = {plan.keys + (part * kQueries + q) * plan.keys_each, args.k, 0, kMost};
  }
  for (int64_t first = 0; first < length; first += kChunk) {
    const int64_t n = std::min(kChunk, length - first);
    for (int64_t q = 0; q < count; ++q) {
      searches[q].prune();
      searches[q].visit(cloud, queries + q * 3, first, n);
    }
  }
  for (int64_t q = 0; q < count; ++q) {
    searches[q].finish(args.indices + (row + q) * args.k, args.distances + (row + q) * args.k);
  }
}

// ---------------------------------------------------------------------------- balls

int64_t nearest(const Cloud& cloud, int64_t length, const Point& p) {
  Vec least(kMost);
  for (int64_t i = 0; i < length; i += kWidth) least = at_most(squared_distance(cloud, i, p), least);
  const Vec wanted(-reduce_max(Vec(0.0f) - least));
  int64_t i = 0;
  uint32_t bits;
  while ((bits = bits_of(squared_distance(cloud, i, p) == wanted)) == 0) i += kWidth;
  return i + __builtin_ctz(bits);
}

void fill_ball(const BallQueryArgs& args, const Clouds& clouds, int64_t row) {
  const int64_t c = row / args.count, length = padded(length_of(args.lengths, c, args.size));
  const Cloud cloud = clouds[c];
  const Point p(args.queries + row * 3);
  const Vec square(args.square);
  int64_t* indices = args.indices + row * args.k;
  int64_t hits = 0;
  for (int64_t i = 0; i < length && hits < args.k; i += kWidth) {
    uint32_t bits = bits_of(squared_distance(cloud, i, p) < square);
    for (; bits != 0 && hits < args.k; bits &= bits - 1) indices[hits++] = i + __builtin_ctz(bits);
  }
  std::fill(indices + hits, indices + args.k, hits > 0 ? indices[0] : nearest(cloud, length, p));
  uint8_t* mask = args.mask + row * args.k;
  std::fill(mask, mask + hits, uint8_t{1});
  std::fill(mask + hits, mask + args.k, uint8_t{0});
}

}  // namespace

// ----------------------------------------------------------------------------

size_t DEFTCORE_KERNEL(knn_workspace)(const KnnArgs& args) {
  return bytes_of([&](Workspace& room) { Searching(args, room); });
}

void DEFTCORE_KERNEL(knn)(const KnnArgs& args) {
  Workspace room(args.workspace);
  const Searching plan(args, room);
  parallel(plan.parts, [&](Team& team) {
    plan.clouds.fill(args, team);
    team.stage([&](int part) {
      const Range mine = share(plan.tasks, team.parts, part);
      for (int64_t task = mine.begin; task < mine.end; ++task) search(args, plan, part, task);
    });
  });
}

size_t DEFTCORE_KERNEL(ball_query_workspace)(const BallQueryArgs& args) {
  return bytes_of([&](Workspace& room) { Clouds(args.clouds, args.size, room); });
}

void DEFTCORE_KERNEL(ball_query)(const BallQueryArgs& args) {
  Workspace room(args.workspace);
  const Clouds clouds(args.clouds, args.size, room);
  const int64_t rows = args.clouds * args.count;
  parallel(parts_for(rows * args.size), [&](Team& team) {
    clouds.fill(args, team);
    team.each((rows + kQueries - 1) / kQueries, [&](int64_t i) {
      const int64_t last = std::min((i + 1) * kQueries, rows);
      for (int64_t row = i * kQueries; row < last; ++row) fill_ball(args, clouds, row);
    });
  });
}

}  // namespace deftcore::cpu
