// Neighbourhoods in clouds of points (PointNet++, Point-PEFT): farthest point sampling, nearest neighbours, balls, and
// rows of neighbours. Every kernel of every device computes a squared distance as (dx dx + dy dy) + dz dz, each
// operation rounded to float32 and none fused, and gives a tie to the lower index: so all find the same indices.
// Coordinates are finite and of size at most 1e18, so that no squared distance is infinite.
#pragma once

#include "deftcore/common.h"

namespace deftcore {

// Points with a squared norm of at most this are left out where `skip_near_origin`; compared in double.
inline constexpr double kNearOrigin = 1e-3;

// picks[0] = start, then always the point with the largest squared distance to its nearest pick. A pick is not picked
// again while others are left; then picks follow again in their order. Least traffic: points and picks once; bound by
// arithmetic, 10 operations per point and pick.
struct FarthestPointSampleArgs {
  const float* points;     // [clouds, size, 3], contiguous
  const int64_t* lengths;  // [clouds], in 1..size, above start; null: size
  int64_t* picks;          // [clouds, samples], out
  void* workspace;         // 64-byte aligned
  int64_t clouds, size, samples, start;
  bool skip_near_origin;

  DEFTCORE_FIELDS(points, lengths, picks, workspace, clouds, size, samples, start, skip_near_origin)
};

// The k nearest points of each query, nearest first. Beyond a cloud's length the nearest again, at infinity. Least
// traffic: everything once; bound by arithmetic, 8 operations per point and query.
struct KnnArgs {
  const float* points;     // [clouds, size, 3], contiguous
  const float* queries;    // [clouds, count, 3], contiguous
  const int64_t* lengths;  // [clouds], in 1..size; null: size
  int64_t* indices;        // [clouds, count, k], out
  float* distances;        // [clouds, count, k], out
  void* workspace;         // 64-byte aligned
  int64_t clouds, size, count, k;

  DEFTCORE_FIELDS(points, queries, lengths, indices, distances, workspace, clouds, size, count, k)
};

// The first k points, in the order of their indices, with a squared distance below `square`. Missing ones repeat the
// first; where there is none, the nearest point, and the mask is 0.
struct BallQueryArgs {
  const float* points;     // [clouds, size, 3], contiguous
  const float* queries;    // [clouds, count, 3], contiguous
  const int64_t* lengths;  // [clouds], in 1..size; null: size
  int64_t* indices;        // [clouds, count, k], out
  uint8_t* mask;           // [clouds, count, k], 0 or 1, out
  void* workspace;         // 64-byte aligned
  int64_t clouds, size, count, k;
  float square;

  DEFTCORE_FIELDS(points, queries, lengths, indices, mask, workspace, clouds, size, count, k, square)
};

// out[r] = sum_j weights[r, j] features[indices[r, j]] in float32; features[indices[r]], bit by bit, without weights,
// and k is 1 then. Least traffic: each gathered row and out once.
struct GatherPointsArgs {
  const void* features;    // [clouds, size, width], contiguous
  const int64_t* indices;  // [clouds, rows, k], in 0..size-1
  const float* weights;    // [clouds, rows, k]; null: ones
  void* out;               // [clouds, rows, width], contiguous, out
  int64_t clouds, size, rows, k, width;
  DType dtype;

  DEFTCORE_FIELDS(features, indices, weights, out, clouds, size, rows, k, width, dtype)
};

// grad_features[i] = sum of weights[r, j] grad[r] over the (r, j) with indices[r, j] = i, in their order, in float32;
// grad_weights[r, j] = grad[r] . features[indices[r, j]]. Least traffic: grad, grad_features and, for the weights, the
// gathered rows once. No atomics: repeats give the same bits.
struct GatherPointsBackwardArgs {
  const void* grad;        // [clouds, rows, width], contiguous
  const void* features;    // [clouds, size, width], contiguous; not read without grad_weights
  const int64_t* indices;  // [clouds, rows, k], in 0..size-1
  const float* weights;    // [clouds, rows, k]; null: ones
  void* grad_features;     // [clouds, size, width], contiguous, out
  float* grad_weights;     // [clouds, rows, k], out; null: not wanted
  void* workspace;         // 64-byte aligned
  int64_t clouds, size, rows, k, width;
  DType dtype;

  DEFTCORE_FIELDS(grad, features, indices, weights, grad_features, grad_weights, workspace, clouds, size, rows, k,
                  width, dtype)
};

}  // namespace deftcore
