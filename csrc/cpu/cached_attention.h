// Attention of one query over cached keys and values: softmax(scale q K^T) V.
#pragma once

#include "root_mean_square.h"

namespace deftcore::cpu {
namespace {

// y += factor x
inline void add_scaled(float factor, const float* x, int64_t n, float* y) {
  const Vec f(factor);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(y + i, fma(f, load(x + i), load(y + i)));
  if (i < n) store_tail(y + i, fma(f, load_tail(x + i, n - i), load_tail(y + i, n - i)), n - i);
}

// x as a head's vector at a position: normed, where there is a norm, and its halves rotated against each other.
inline void rotate_head(const float* x, const float* norm, float eps, const float* cosine, const float* sine,
                        int64_t size, float* out) {
  const float factor = norm == nullptr ? 1.0f : inverse_rms(x, size, eps);
  const auto value = [&](int64_t i) { return norm == nullptr ? x[i] : x[i] * factor * norm[i]; };
  const int64_t half = size / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float low = value(i), high = value(i + half);
    out[i] = low * cosine[i] - high * sine[i];
    out[i + half] = high * cosine[i + half] + low * sine[i + half];
  }
}

// x[0, n) becomes softmax(x).
inline void softmax(float* x, int64_t n) {
  float most = -INFINITY, sum = 0.0f;
  for (int64_t i = 0; i < n; ++i) most = x[i] > most ? x[i] : most;
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    const Vec e = exp(load(x + i) - Vec(most));
    store(x + i, e);
    sum += reduce_add(e);
  }
  for (; i < n; ++i) sum += x[i] = std::exp(x[i] - most);
  for (int64_t j = 0; j < n; ++j) x[j] /= sum;
}

// Keys and values of positions [0, count) lie in rows of `size`; the last position's are given apart, since other
// threads may be writing them. `scores` holds count floats.
inline void attend(const float* query, const float* keys, const float* values, const float* last_key,
                   const float* last_value, int64_t count, int64_t size, float scale, float* scores, float* out) {
  const int64_t last = count - 1;
  for (int64_t j = 0; j < last; ++j) scores[j] = scale * dot(query, keys + j * size, size);
  scores[last] = scale * dot(query, last_key, size);
  softmax(scores, count);
  for (int64_t i = 0; i < size; ++i) out[i] = scores[last] * last_value[i];
  for (int64_t j = 0; j < last; ++j) add_scaled(scores[j], values + j * size, size, out);
}

}  // namespace
}  // namespace deftcore::cpu
