// What the steps of all models have in common: a stream of [tokens, width] to which their blocks add, norms of it, and
// products with matrices as stages of a team.
#pragma once

#include "deftcore/workspace.h"
#include "matrix_rows.h"
#include "root_mean_square.h"

namespace deftcore::cpu {
namespace {

struct StageBuffers {
  int64_t tokens, width;
  Activations normed;  // [width]
  float* stream;       // [tokens, width]
  RowRooms rooms;
};

inline Activations take_activations(Workspace& room, int64_t tokens, int64_t size) {
  Activations a{};
  a.size = size;
  a.placed_stride = chunks_of(size) * kChunk;
  a.plain = room.take<float>(tokens * size);
  a.placed = room.take<float>(tokens * a.placed_stride);
  return a;
}

// `longest`: columns of any matrix, at most.
inline StageBuffers take_stages(Workspace& room, int64_t tokens, int64_t width, int64_t longest) {
  StageBuffers b{};
  b.tokens = tokens;
  b.width = width;
  b.normed = take_activations(room, tokens, width);
  b.stream = room.take<float>(tokens * width);
  b.rooms = take_row_rooms(room, tokens, longest);
  return b;
}

class StepStages {
 public:
  StepStages(Team& team, const StageBuffers& stages) : team_(team), s_(stages) {}

 protected:
  // The stream begins as `hidden`; `others` are what products will read.
  void begin(const float* hidden, std::initializer_list<const Activations*> others) {
    team_.once([&] {
      std::copy_n(hidden, s_.tokens * s_.width, s_.stream);
      std::fill_n(s_.normed.placed, s_.tokens * s_.normed.placed_stride, 0.0f);
      for (const Activations* a : others) std::fill_n(a->placed, s_.tokens * a->placed_stride, 0.0f);
    });
  }

  // A part's share of some rows of x W^T + bias; without `some`, of all.
  template <class Sink>
  void rows(int part, const DecoderMatrix& m, Range some, const Activations& x, Sink&& sink) {
    const Range mine = share(some.end - some.begin, team_.parts, part, kRowGroup);
    own_rows(part, m, {some.begin + mine.begin, some.begin + mine.end}, x, sink);
  }
  template <class Sink>
  void rows(int part, const DecoderMatrix& m, const Activations& x, Sink&& sink) {
    rows(part, m, {0, m.rows}, x, sink);
  }
  template <class Sink>
  void rows(const DecoderMatrix& m, const Activations& x, Sink&& sink) {
    team_.stage([&](int part) { rows(part, m, x, sink); });
  }

  // All of some rows, by one part.
  template <class Sink>
  void own_rows(int part, const DecoderMatrix& m, Range mine, const Activations& x, Sink&& sink) {
    matrix_rows(m, [](int64_t k) { return k; }, mine, x, s_.tokens, s_.rooms.of(part), sink);
  }

  // normed = the stream over its root mean square, times weight.
  void norm(const float* weight, float eps) {
    team_.stage([&](int part) {
      const Range mine = share(s_.tokens, team_.parts, part);
      for (int64_t t = mine.begin; t < mine.end; ++t) {
        const float* x = s_.stream + t * s_.width;
        const float factor = inverse_rms(x, s_.width, eps);
        for (int64_t i = 0; i < s_.width; ++i) s_.normed.set(t, i, x[i] * factor * weight[i]);
      }
    });
  }

  // stream += x W^T + bias
  void add(const DecoderMatrix& m, const Activations& x) {
    rows(m, x, [&](int64_t row, int64_t token, float y) { s_.stream[token * s_.width + row] += y; });
  }

  // Of each `steps` tokens the last one alone goes on.
  void keep_last(int64_t steps) {
    if (steps == 1) return;
    team_.once([&] {
      for (int64_t t = 0; t < s_.tokens / steps; ++t) {
        std::copy_n(s_.stream + (t * steps + steps - 1) * s_.width, s_.width, s_.stream + t * s_.width);
      }
    });
    s_.tokens /= steps;
  }

  // logits [tokens, rows of the head]
  void project_out(const DecoderMatrix& head, float* logits) {
    rows(head, s_.normed, [&](int64_t row, int64_t token, float y) { logits[token * head.rows + row] = y; });
  }

  Team& team_;
  StageBuffers s_;
};

}  // namespace
}  // namespace deftcore::cpu
