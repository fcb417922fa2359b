// Clouds of points laid out by coordinate, and distances to them, which a vector has for kWidth points at once.
#pragma once

#include "deftcore/neighbours.h"
#include "deftcore/workspace.h"
#include "isa.h"

namespace deftcore::cpu {
namespace {

constexpr int64_t kFill = 1024;  // points that a task lays out
constexpr float kFar = 1e30f;    // a coordinate of padding: at an infinite distance from every point
constexpr float kMost = 3e38f;   // no smaller than any distance between points

int64_t padded(int64_t size) { return round_up(size, kWidth); }

int64_t length_of(const int64_t* lengths, int64_t cloud, int64_t size) {
  return lengths == nullptr ? size : lengths[cloud];
}

// Points by coordinate, padded to whole vectors.
struct Cloud {
  float *x, *y, *z;

  // Of `count` floats a coordinate.
  static Cloud take(Workspace& room, int64_t count) {
    float* x = room.take<float>(count);
    float* y = room.take<float>(count);
    return {x, y, room.take<float>(count)};
  }
  Cloud from(int64_t point) const { return {x + point, y + point, z + point}; }

  void fill(const float* points, int64_t begin, int64_t end, int64_t length) const {
    for (int64_t i = begin; i < end; ++i) {
      const bool valid = i < length;
      x[i] = valid ? points[3 * i] : kFar;
      y[i] = valid ? points[3 * i + 1] : kFar;
      z[i] = valid ? points[3 * i + 2] : kFar;
    }
  }
};

struct Point {
  Vec x, y, z;
  explicit Point(const float* p) : x(p[0]), y(p[1]), z(p[2]) {}
};

inline Vec squared_distance(const Cloud& cloud, int64_t i, const Point& p) {
  const Vec dx = load(cloud.x + i) - p.x, dy = load(cloud.y + i) - p.y, dz = load(cloud.z + i) - p.z;
  return dx * dx + dy * dy + dz * dz;
}

// All clouds by coordinate, [clouds, padded(size)].
struct Clouds {
  Cloud all;
  int64_t size;

  Clouds(int64_t clouds, int64_t points, Workspace& room)
      : all(Cloud::take(room, clouds * padded(points))), size(padded(points)) {}
  Cloud operator[](int64_t cloud) const { return all.from(cloud * size); }

  template <class Args>
  void fill(const Args& args, Team& team) const {
    const int64_t across = (size + kFill - 1) / kFill;
    team.each(args.clouds * across, [&](int64_t i) {
      const int64_t cloud = i / across, begin = i % across * kFill;
      (*this)[cloud].fill(args.points + cloud * args.size * 3, begin, std::min(begin + kFill, size),
                          length_of(args.lengths, cloud, args.size));
    });
  }
};

}  // namespace
}  // namespace deftcore::cpu
