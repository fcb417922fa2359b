// Farthest point sampling: a pass over the points a pick, bound by arithmetic (10 operations a point, none fused: see
// neighbours.h). The state of a cloud of 2,048 points is 32 KB and stays in L1. A pass keeps the largest distance lane
// by lane; the point that has it is looked for afterwards, in one strip.
//
// One thread of a Zen 5 beside other work, 8 clouds of 2,048 points: 61 % of the bare arithmetic with AVX-512, 73 %
// with AVX2 forced there. The rest is the state that is read and written with each point, and the search, whose
// branches no predictor knows.
#include <algorithm>

#include "clouds.h"

namespace deftcore::cpu {
namespace {

constexpr int64_t kStrip = 16 * kWidth;     // points whose farthest are kept lane by lane
constexpr int64_t kSharedPoints = 1 << 14;  // a pass over a smaller cloud is not worth a barrier

// A cloud while it is sampled: `least` is the squared distance to the nearest pick, -1 of what is not to be picked (any
// more); `peaks` has the largest of each strip, lane by lane.
struct Sampled {
  Cloud cloud;
  float *least, *peaks;

  static Sampled take(Workspace& room, int64_t size) {
    const Cloud cloud = Cloud::take(room, padded(size));
    float* least = room.take<float>(padded(size));
    return {cloud, least, room.take<float>(round_up(padded(size), kStrip) / kStrip * kWidth)};
  }
};

struct Farthest {
  float distance;
  int64_t point;
};

// Lays the points [begin, end) out.
void begin_sampling(const FarthestPointSampleArgs& args, const Sampled& s, int64_t cloud, Range range) {
  const float* points = args.points + cloud * args.size * 3;
  const int64_t length = length_of(args.lengths, cloud, args.size);
  s.cloud.fill(points, range.begin, range.end, length);
  const float origin[3] = {0, 0, 0};
  for (int64_t i = range.begin; i < range.end; i += kWidth) {
    float norms[kWidth];
    store(norms, squared_distance(s.cloud, i, Point(origin)));
    for (int64_t j = 0; j < kWidth; ++j) {
      const bool skipped = args.skip_near_origin && static_cast<double>(norms[j]) <= kNearOrigin;
      s.least[i + j] = i + j >= length || skipped ? -1.0f : INFINITY;
    }
  }
}

// Takes a pick into account in the points of a range, which begins with a strip, and finds the farthest of them.
Farthest update(const Sampled& s, Range range, const float* pick) {
  const Point p(pick);
  Vec most(-1.0f);
  for (int64_t first = range.begin; first < range.end; first += kStrip) {
    Vec peak(-1.0f), other(-1.0f);  // two, as each waits for the one before it
    const auto see = [&](int64_t i, Vec& highest) {
      const Vec least = at_most(squared_distance(s.cloud, i, p), load(s.least + i));
      store(s.least + i, least);
      highest = at_least(least, highest);
    };
    const int64_t last = std::min(first + kStrip, range.end);
    int64_t i = first;
    for (; i + 4 * kWidth <= last; i += 4 * kWidth) {
      see(i, peak);
      see(i + kWidth, other);
      see(i + 2 * kWidth, peak);
      see(i + 3 * kWidth, other);
    }
    for (; i < last; i += kWidth) see(i, peak);
    peak = at_least(other, peak);
    store(s.peaks + first / kStrip * kWidth, peak);
    most = at_least(peak, most);
  }
  const float distance = reduce_max(most);
  if (distance < 0) return {distance, 0};
  const Vec wanted(distance);
  int64_t strip = range.begin / kStrip;
  while (bits_of(load(s.peaks + strip * kWidth) == wanted) == 0) ++strip;
  int64_t i = strip * kStrip;
  uint32_t bits;
  while ((bits = bits_of(load(s.least + i) == wanted)) == 0) i += kWidth;
  return {distance, i + __builtin_ctz(bits)};
}

const float* point_of(const FarthestPointSampleArgs& args, int64_t cloud, int64_t point) {
  return args.points + (cloud * args.size + point) * 3;
}

// From the n-th pick on there is nothing new to pick.
void repeat(int64_t* picks, int64_t n, int64_t samples) {
  for (int64_t i = n; i < samples; ++i) picks[i] = picks[i - n];
}

void sample(const FarthestPointSampleArgs& args, const Sampled& s, int64_t cloud) {
  const Range all{0, padded(args.size)};
  int64_t* picks = args.picks + cloud * args.samples;
  begin_sampling(args, s, cloud, all);
  Farthest found{0, args.start};
  for (int64_t n = 0; n < args.samples; ++n) {
    if (found.distance < 0) return repeat(picks, n, args.samples);
    picks[n] = found.point;
    s.least[found.point] = -1.0f;
    if (n + 1 < args.samples) found = update(s, all, point_of(args, cloud, found.point));
  }
}

// All threads on one cloud, a part of its points each, with a barrier a pick. `found` has two rows of a farthest point
// per part: one is read while the other is written.
void sample_together(const FarthestPointSampleArgs& args, const Sampled& s, Farthest* found, int parts, int64_t cloud) {
  int64_t* picks = args.picks + cloud * args.samples;
  std::fill(picks, picks + args.samples, -1);
  parallel(parts, [&](Team& team) {
    const auto own = [&](int part) { return share(padded(args.size), team.parts, part, kStrip); };
    team.stage([&](int part) {
      begin_sampling(args, s, cloud, own(part));
      found[part] = {0, args.start};
    });
    for (int64_t n = 0; n < args.samples; ++n) {
      const Farthest* before = found + n % 2 * team.parts;
      Farthest* after = found + (n + 1) % 2 * team.parts;
      team.stage([&](int part) {
        Farthest best = before[0];
        for (int i = 1; i < team.parts; ++i) {
          if (before[i].distance > best.distance) best = before[i];
        }
        after[part] = best;
        if (best.distance < 0) return;
        if (part == 0) picks[n] = best.point;
        const Range mine = own(part);
        if (best.point >= mine.begin && best.point < mine.end) s.least[best.point] = -1.0f;
        after[part] = update(s, mine, point_of(args, cloud, best.point));
      });
    }
  });
  repeat(picks, std::find(picks, picks + args.samples, -1) - picks, args.samples);
}

// How threads share the work, and their buffers.
struct Sampling {
  int parts;
  bool together;
  Farthest* found;
  Sampled first;
  int64_t floats;  // from one part's buffers to the next's

  Sampling(const FarthestPointSampleArgs& args, Workspace& room) {
    const int64_t most = std::min<int64_t>(most_parts(), padded(args.size) / kSharedPoints);
    together = args.clouds < most;
    parts = static_cast<int>(together ? most : std::max<int64_t>(1, std::min<int64_t>(args.clouds, most_parts())));
    found = room.take<Farthest>(2 * parts);
    const int64_t before = room.bytes();
    first = Sampled::take(room, args.size);
    floats = (room.bytes() - before) / static_cast<int64_t>(sizeof(float));
    for (int part = 1; part < parts && !together; ++part) Sampled::take(room, args.size);
  }
  Sampled of(int part) const {
    return {first.cloud.from(part * floats), first.least + part * floats, first.peaks + part * floats};
  }
};

}  // namespace

// ----------------------------------------------------------------------------

size_t DEFTCORE_KERNEL(farthest_point_sample_workspace)(const FarthestPointSampleArgs& args) {
  return bytes_of([&](Workspace& room) { Sampling(args, room); });
}

void DEFTCORE_KERNEL(farthest_point_sample)(const FarthestPointSampleArgs& args) {
  Workspace room(args.workspace);
  const Sampling plan(args, room);
  if (plan.together) {
    for (int64_t c = 0; c < args.clouds; ++c) sample_together(args, plan.first, plan.found, plan.parts, c);
    return;
  }
  for_parts(plan.parts, [&](int part) {
    for (int64_t c = part; c < args.clouds; c += plan.parts) sample(args, plan.of(part), c);
  });
}

}  // namespace deftcore::cpu
