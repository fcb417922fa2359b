// Farthest points, nearest neighbours, balls and gathered rows against loops, index by index, on exactly sized buffers.
#include <algorithm>

#include "check.h"
#include "deftcore/ops.h"

using namespace deftcore;

namespace {

struct Clouds {
  int64_t clouds, size;
  std::vector<float> points;
  std::vector<int64_t> lengths;

  // On a small grid many points are equal, and nearly all distances tied.
  Clouds(int64_t count, int64_t n, bool grid, unsigned seed)
      : clouds(count), size(n), points(random_floats(static_cast<size_t>(count * n * 3), seed)) {
    if (grid) {
      for (float& x : points) x = std::round(2 * x);
    }
    for (int64_t c = 0; c < count; ++c) lengths.push_back(1 + (n - 1 + c * (n / 2 + 3)) % n);  // all, half, few
  }
  const float* point(int64_t cloud, int64_t i) const { return &points[static_cast<size_t>((cloud * size + i) * 3)]; }
};

// Each operation rounded by itself, whatever the compiler would fuse.
float squared_distance(const float* a, const float* b) {
  volatile float d[3], squares[3], sum;
  for (int i = 0; i < 3; ++i) {
    d[i] = a[i] - b[i];
    squares[i] = d[i] * d[i];
  }
  sum = squares[0] + squares[1];
  sum = sum + squares[2];
  return sum;
}

void test_farthest(int64_t clouds, int64_t size, int64_t samples, bool grid, bool skip) {
  const Clouds in(clouds, size, grid, 1);
  std::vector<int64_t> picks(static_cast<size_t>(clouds * samples), -1);
  FarthestPointSampleArgs args{
      in.points.data(), in.lengths.data(), picks.data(), nullptr, clouds, size, samples, 0, skip};
  const Room room(device::farthest_point_sample_workspace(args));
  args.workspace = room.data();
  device::farthest_point_sample(args, nullptr);
  const float origin[3] = {0, 0, 0};
  for (int64_t c = 0; c < clouds; ++c) {
    std::vector<float> least(static_cast<size_t>(size), -1);
    const int64_t length = in.lengths[static_cast<size_t>(c)];
    for (int64_t i = 0; i < length; ++i) {
      if (!skip || squared_distance(in.point(c, i), origin) > kNearOrigin) least[static_cast<size_t>(i)] = INFINITY;
    }
    std::vector<int64_t> expected{0};
    while (static_cast<int64_t>(expected.size()) < samples) {
      least[static_cast<size_t>(expected.back())] = -1;
      for (int64_t i = 0; i < length; ++i) {
        float& mine = least[static_cast<size_t>(i)];
        mine = std::min(mine, squared_distance(in.point(c, i), in.point(c, expected.back())));
      }
      const auto best = std::max_element(least.begin(), least.end());
      if (*best < 0) break;
      expected.push_back(best - least.begin());
    }
    for (int64_t i = 0; i < samples; ++i) {
      CHECK(picks[static_cast<size_t>(c * samples + i)] == expected[static_cast<size_t>(i) % expected.size()]);
    }
  }
}

void test_searches(int64_t clouds, int64_t size, int64_t count, int64_t k, bool grid) {
  const Clouds in(clouds, size, grid, 2), queries(clouds, count, grid, 3);
  const auto slots = static_cast<size_t>(clouds * count * k);
  std::vector<int64_t> indices(slots, -1), ball(slots, -1);
  std::vector<float> distances(slots, NAN);
  std::vector<uint8_t> mask(slots, 7);
  const float *points = in.points.data(), *asked = queries.points.data();
  const int64_t* lengths = in.lengths.data();
  KnnArgs args{points, asked, lengths, indices.data(), distances.data(), nullptr, clouds, size, count, k};
  const Room room(device::knn_workspace(args));
  args.workspace = room.data();
  device::knn(args, nullptr);
  const float square = grid ? 1.0f : 0.5f;  // on the grid many distances are 1
  BallQueryArgs balls{points, asked, lengths, ball.data(), mask.data(), nullptr, clouds, size, count, k, square};
  const Room other(device::ball_query_workspace(balls));
  balls.workspace = other.data();
  device::ball_query(balls, nullptr);
  for (int64_t q = 0; q < clouds * count; ++q) {
    const int64_t c = q / count, length = in.lengths[static_cast<size_t>(c)];
    std::vector<std::pair<float, int64_t>> all;
    std::vector<int64_t> inside;
    for (int64_t i = 0; i < length; ++i) {
      all.emplace_back(squared_distance(in.point(c, i), queries.point(c, q % count)), i);
      if (all.back().first < square) inside.push_back(i);
    }
    std::sort(all.begin(), all.end());
    const size_t hits = inside.size();
    if (hits == 0) inside.push_back(all[0].second);
    for (int64_t j = 0; j < k; ++j) {
      const auto at = static_cast<size_t>(q * k + j), slot = static_cast<size_t>(j);
      CHECK(indices[at] == all[j < length ? slot : 0].second);
      CHECK(j < length ? distances[at] == all[slot].first : std::isinf(distances[at]));
      CHECK(ball[at] == inside[slot < hits ? slot : 0]);
      CHECK(mask[at] == (slot < hits));
    }
  }
}

void test_gather(int64_t clouds, int64_t size, int64_t rows, int64_t k, int64_t width) {
  const auto at = [](int64_t i) { return static_cast<size_t>(i); };
  const std::vector<float> x = random_floats(at(clouds * size * width), 4), w = random_floats(at(clouds * rows * k), 5),
                           grad = random_floats(at(clouds * rows * width), 6);
  std::vector<int64_t> indices(at(clouds * rows * k));
  for (size_t i = 0; i < indices.size(); ++i) indices[i] = static_cast<int64_t>(i * i + i / 3) % size;
  std::vector<float> out(grad.size(), NAN), dx(x.size(), NAN), dw(w.size(), NAN);
  const float* weights = k == 1 ? nullptr : w.data();
  device::gather_points({x.data(), indices.data(), weights, out.data(), clouds, size, rows, k, width, DType::kFloat32},
                        nullptr);
  GatherPointsBackwardArgs args{grad.data(),
                                k == 1 ? nullptr : x.data(),
                                indices.data(),
                                weights,
                                dx.data(),
                                k == 1 ? nullptr : dw.data(),
                                nullptr,
                                clouds,
                                size,
                                rows,
                                k,
                                width,
                                DType::kFloat32};
  const Room room(device::gather_points_backward_workspace(args));
  args.workspace = room.data();
  device::gather_points_backward(args, nullptr);
  std::vector<double> sums(x.size());
  for (int64_t r = 0; r < clouds * rows; ++r) {
    for (int64_t i = 0; i < width; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < k; ++j) {
        const size_t from = at((r / rows * size + indices[at(r * k + j)]) * width + i);
        const double weight = k == 1 ? 1.0 : w[at(r * k + j)];
        sum += weight * x[from];
        sums[from] += weight * grad[at(r * width + i)];
      }
      CHECK(close(out[at(r * width + i)], sum, 1e-5));
    }
    for (int64_t j = 0; j < k && k > 1; ++j) {
      double sum = 0;
      for (int64_t i = 0; i < width; ++i) {
        sum += static_cast<double>(grad[at(r * width + i)]) *
               x[at((r / rows * size + indices[at(r * k + j)]) * width + i)];
      }
      CHECK(close(dw[at(r * k + j)], sum, 1e-4));
    }
  }
  for (size_t i = 0; i < sums.size(); ++i) CHECK(close(dx[i], sums[i], 1e-4));
}

void test_bad_input() {
  CHECK(
      refused("knn", [] { device::knn({nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 1, 0, 1, 1}, nullptr); }));
}

}  // namespace

int main() {
  return run_tests([] {
    for (const bool grid : {false, true}) {
      for (const int64_t size : {1, 15, 16, 17, 33, 256, 257, 1000}) {
        for (const bool skip : {false, true}) test_farthest(3, size, std::min<int64_t>(size, 40) + 3, grid, skip);
        for (const int64_t k : {1, 3, 33, 140}) test_searches(2, size, 37, k, grid);
      }
      test_searches(2, 4200, 3, 32, grid);  // more than a chunk
      // A thread of a GPU holds 4, 8, 12 points, or reads them again.
      for (const int64_t size : {1500, 3000, 5000, 40000}) test_farthest(2, size, 20, grid, false);
    }
    for (const int64_t width : {0, 1, 15, 64, 130, 300}) {
      for (const int64_t k : {1, 2, 5}) test_gather(2, 13, 21, k, width);
    }
    for (const int64_t k : {1, 3}) test_gather(2, 700, 900, k, 5);  // more points than a block has threads
    test_bad_input();
  });
}
