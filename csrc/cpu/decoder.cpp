// One step of decoding, bound by the weights' bytes: all blocks in one parallel region of seven stages a block, each
// of which ends where the next one's threads read what others wrote. Low-rank terms add a stage per product that has
// them; sparse MLPs are the stages of sparse_down.h, columns of the down projection split over parts: no reduction, so
// that results are the same for any number of threads, and rows of a few hundred bytes still make whole cache lines.
#include "cached_attention.h"
#include "sparse_down4.h"
#include "step_stages.h"

namespace deftcore::cpu {
namespace {

struct StepBuffers {
  StageBuffers stages;
  Activations mixed, gated;        // [heads head_size], [neurons]: what products read
  float *queries, *keys, *values;  // [tokens, heads head_size], of this position
  float *scores, *heads;           // per part
  int64_t score_stride, head_stride;
  float* scales;  // of a sparse W_down, per part
  int64_t scale_stride;
  float *low, *low_parts;  // low-rank terms [3][tokens, rank]; of a sparse W_down [2 parts][tokens, rank]
  int64_t low_stride;
  Buffers sparse;
  int64_t* active;  // [1], neurons in the list
};

// Calls fn(matrix) for all that have rows.
template <class Fn>
void for_matrices(const DecodeStepArgs& args, Fn&& fn) {
  fn(*args.head);
  for (int64_t layer = 0; layer < args.layers; ++layer) {
    const DecoderBlock& b = args.blocks[layer];
    for (const DecoderMatrix* m : {&b.q, &b.k, &b.v, &b.o, &b.gate, &b.up, &b.down}) {
      if (m->weight != nullptr) fn(*m);
    }
  }
}

StepBuffers lay_out(const DecodeStepArgs& args, Workspace& room) {
  const int64_t tokens = args.tokens, parts = most_parts();
  const int64_t mixed = args.heads * args.head_size, kept = args.kv_heads * args.head_size;
  StepBuffers b{};
  b.stages = take_stages(room, tokens, args.width, std::max({args.width, mixed, args.neurons}));
  int64_t rank = 0, scales = 0;
  for_matrices(args, [&](const DecoderMatrix& m) {
    rank = std::max(rank, m.rank);
    if (m.code != nullptr) scales = std::max(scales, down_scales<FloatWord>(packed_form(m)));
  });
  b.mixed = take_activations(room, tokens, mixed);
  b.gated = take_activations(room, tokens, args.neurons);
  b.queries = room.take<float>(tokens * mixed);
  b.keys = room.take<float>(tokens * kept);
  b.values = room.take<float>(tokens * kept);
  b.score_stride = round_up(args.length, 16);
  b.head_stride = round_up(3 * args.head_size, 16);
  b.scores = room.take<float>(parts * b.score_stride);
  b.heads = room.take<float>(parts * b.head_stride);
  b.scale_stride = round_up(scales, 16);
  b.scales = room.take<float>(parts * b.scale_stride);
  b.low_stride = round_up(tokens * rank, 16);
  b.low = room.take<float>(3 * b.low_stride);
  b.low_parts = room.take<float>(2 * parts * b.low_stride);
  b.sparse = lay_out(tokens, args.neurons, args.width, room);
  b.active = room.take<int64_t>(1);
  return b;
}

class Step : public StepStages {
 public:
  Step(const DecodeStepArgs& args, Team& team, const StepBuffers& buffers)
      : StepStages(team, buffers.stages), args_(args), b_(buffers) {}

  void run() {
    begin(args_.hidden, {&b_.mixed, &b_.gated});
    for (int64_t layer = 0; layer < args_.layers; ++layer) {
      const DecoderBlock& block = args_.blocks[layer];
      norm(block.attention_norm, args_.eps);
      project(block);
      attention(block, layer);
      add(block.o, b_.mixed);
      mlp(block);
    }
    keep_last(args_.steps);
    norm(args_.norm, args_.eps);
    rows(*args_.head, s_.normed,
         [&](int64_t row, int64_t token, float y) { args_.logits[token * args_.vocabulary + row] = y; });
  }

 private:
  // The low-rank terms of products with x, before `rows` adds them: x lora_a^T of each of a group that has one.
  void lower(std::initializer_list<const DecoderMatrix*> group, const Activations& x) {
    const auto has_rank = [](const DecoderMatrix* m) { return m->rank > 0; };
    if (std::none_of(group.begin(), group.end(), has_rank)) return;
    team_.stage([&](int part) {
      float* low = b_.low;
      for (const DecoderMatrix* m : group) {
        DecoderMatrix a{};
        a.weight = m->lora_a;
        a.cols = a.stride = m->cols;
        const Range mine = share(m->rank, team_.parts, part, kRowGroup);
        dense_rows<float>(a, kSame, mine, x, s_.tokens,
                          [&](int64_t r, int64_t token, float y) { low[token * m->rank + r] = *m->lora_scale * y; });
        low += b_.low_stride;
      }
    });
  }

  // A part's rows row_of(k) of a matrix' product, k in range. `place` is the matrix' in the group that was lowered.
  template <class RowOf, class Sink>
  void rows(int part, const DecoderMatrix& m, int64_t place, RowOf&& row_of, Range range, const Activations& x,
            Sink&& sink) {
    const float* low = b_.low + place * b_.low_stride;
    matrix_rows(m, row_of, range, x, s_.tokens, s_.rooms.of(part), [&](int64_t k, int64_t token, float y) {
      if (m.rank > 0) y += dot(low + token * m.rank, m.lora_b + row_of(k) * m.rank, m.rank);
      sink(k, token, y);
    });
  }
  template <class Sink>
  void rows(int part, const DecoderMatrix& m, int64_t place, const Activations& x, Sink&& sink) {
    rows(part, m, place, kSame, share(m.rows, team_.parts, part, kRowGroup), x, sink);
  }
  template <class Sink>
  void rows(const DecoderMatrix& m, const Activations& x, Sink&& sink) {
    lower({&m}, x);
    team_.stage([&](int part) { rows(part, m, 0, x, sink); });
  }
  void add(const DecoderMatrix& m, const Activations& x) {
    rows(m, x, [&](int64_t row, int64_t token, float y) { s_.stream[token * args_.width + row] += y; });
  }

  void project(const DecoderBlock& block) {
    lower({&block.q, &block.k, &block.v}, s_.normed);
    team_.stage([&](int part) {
      const auto into = [](const DecoderMatrix& m, float* out) {
        return [&m, out](int64_t row, int64_t token, float y) { out[token * m.rows + row] = y; };
      };
      rows(part, block.q, 0, s_.normed, into(block.q, b_.queries));
      rows(part, block.k, 1, s_.normed, into(block.k, b_.keys));
      rows(part, block.v, 2, s_.normed, into(block.v, b_.values));
    });
  }

  // Where a token stands, and the angles of its rotation; padding has none.
  struct Place {
    int64_t sequence, position, start;
    const float *cosine, *sine;
    bool padding() const { return position < start; }
  };
  Place place_of(int64_t token) const {
    const int64_t sequence = token / args_.steps, position = args_.position + token % args_.steps;
    const int64_t start = args_.starts[sequence], turn = std::max<int64_t>(position - start, 0) * args_.head_size;
    return {sequence, position, start, args_.cosine + turn, args_.sine + turn};
  }
  // Offset of a head's first position in the cache.
  int64_t cached(int64_t layer, int64_t sequence, int64_t kv_head) const {
    return ((layer * args_.batch + sequence) * args_.kv_heads + kv_head) * args_.length * args_.head_size;
  }

  // Of one position each head of queries rotates its key anew, which saves a stage; the first one of a group keeps it.
  // Several positions' keys are in the cache before any of their queries reads it.
  void attention(const DecoderBlock& block, int64_t layer) {
    const int64_t size = args_.head_size, group = args_.heads / args_.kv_heads;
    if (args_.steps > 1) keep(block, layer);
    team_.stage([&](int part) {
      float *query = b_.heads + part * b_.head_stride, *key = query + size, *out = key + size;
      const Range mine = share(s_.tokens * args_.heads, team_.parts, part);
      for (int64_t unit = mine.begin; unit < mine.end; ++unit) {
        const int64_t t = unit / args_.heads, head = unit % args_.heads, source = t * args_.kv_heads + head / group;
        const Place at = place_of(t);
        const int64_t row = cached(layer, at.sequence, head / group), now = at.position * size;
        float *keys = args_.keys + row, *values = args_.values + row;
        const int64_t first = std::max(at.start, at.position - block.window + 1);
        if (at.padding()) {
          std::fill_n(out, size, 0.0f);
        } else {
          rotate_head(b_.queries + unit * size, block.q_norm, args_.eps, at.cosine, at.sine, size, query);
          if (args_.steps == 1) {
            rotate_head(b_.keys + source * size, block.k_norm, args_.eps, at.cosine, at.sine, size, key);
          } else {
            std::copy_n(keys + now, size, key);
          }
          attend(query, keys + first * size, values + first * size, key, b_.values + source * size,
                 at.position - first + 1, size, args_.scale, b_.scores + part * b_.score_stride, out);
        }
        for (int64_t i = 0; i < size; ++i) b_.mixed.set(t, head * size + i, out[i]);
        if (args_.steps == 1 && head % group == 0) {
          std::copy_n(key, size, keys + now);
          std::copy_n(b_.values + source * size, size, values + now);
        }
      }
    });
  }

  // Keys and values of all tokens into the cache.
  void keep(const DecoderBlock& block, int64_t layer) {
    const int64_t size = args_.head_size;
    team_.stage([&](int part) {
      const Range mine = share(s_.tokens * args_.kv_heads, team_.parts, part);
      for (int64_t unit = mine.begin; unit < mine.end; ++unit) {
        const Place at = place_of(unit / args_.kv_heads);
        const int64_t to = cached(layer, at.sequence, unit % args_.kv_heads) + at.position * size;
        rotate_head(b_.keys + unit * size, block.k_norm, args_.eps, at.cosine, at.sine, size, args_.keys + to);
        std::copy_n(b_.values + unit * size, size, args_.values + to);
      }
    });
  }

  void mlp(const DecoderBlock& block) {
    if (block.up.weight == nullptr) return;
    norm(block.mlp_norm, args_.eps);
    lower({&block.gate, &block.up}, s_.normed);
    if (block.tau != nullptr) return active_mlp(block);
    gate(block);
    add(block.down, b_.gated);
  }

  // Rows of the gate wait where their products will stand.
  void gate(const DecoderBlock& block) {
    dispatch(args_.activation, [&](auto f) {
      team_.stage([&](int part) {
        rows(part, block.gate, 0, s_.normed,
             [&](int64_t row, int64_t token, float y) { b_.gated.plain[token * args_.neurons + row] = y; });
        rows(part, block.up, 1, s_.normed, [&](int64_t row, int64_t token, float y) {
          const float z = b_.gated.plain[token * args_.neurons + row];
          b_.gated.set(token, row, math::activate<f(), float>(z) * y);
        });
      });
    });
  }

  void active_mlp(const DecoderBlock& block) {
    const int64_t tokens = args_.tokens, neurons = args_.neurons, rank = block.down.rank;
    const bool by_product = block.by_product != 0;
    const Buffers& s = b_.sparse;
    float* act = b_.gated.plain;
    team_.stage([&](int part) {
      const Range mine = share(neurons, team_.parts, part, 16);
      rows(part, block.gate, 0, kSame, mine, s_.normed,
           [&](int64_t row, int64_t token, float y) { act[token * neurons + row] = y; });
      for (int64_t m = 0; m < tokens; ++m) {
        activate_row(args_.activation, act + m * neurons + mine.begin, mine.end - mine.begin);
      }
      if (by_product) {
        rows(part, block.up, 1, kSame, mine, s_.normed,
             [&](int64_t row, int64_t token, float y) { act[token * neurons + row] *= y; });
      }
      for (int64_t m = 0; m < tokens; ++m) {
        for (int64_t i = mine.begin; i < mine.end; ++i) {
          float& value = act[m * neurons + i];
          if (std::fabs(value) <= block.tau[i]) value = 0.0f;
        }
      }
      compact(act, tokens, neurons, 0.0f, team_.parts, part, s);
    });
    team_.once([&] { *b_.active = join_shares(neurons, team_.parts, s); });
    const auto fill = [&](int part, Range mine) {
      gather_active(act, tokens, neurons, 0.0f, s.list, mine, s.h);
      if (!by_product) {
        rows(
            part, block.up, 1, [&](int64_t k) { return s.list[k]; }, mine, s_.normed,
            [&](int64_t k, int64_t token, float y) { s.h[k * tokens + token] *= y; });
      }
      float* low = b_.low_parts + part * b_.low_stride;
      std::fill_n(low, tokens * rank, 0.0f);
      for (int64_t k = mine.begin; k < mine.end && rank > 0; ++k) {
        for (int64_t m = 0; m < tokens; ++m) {
          add_scaled(s.h[k * tokens + m], block.down.lora_a + s.list[k] * rank, rank, low + m * rank);
        }
      }
    };
    const auto product = [&](int part, Range columns) {
      if (columns.begin == columns.end) return;
      const DecoderMatrix& down = block.down;
      if (down.code != nullptr) {
        return down_product4<FloatWord>(packed_form(down), *b_.active, tokens, columns, s,
                                        b_.scales + part * b_.scale_stride);
      }
      dispatch_dtype(static_cast<DType>(down.dtype), [&](auto t) {
        const Matrix<decltype(t)> w{static_cast<const decltype(t)*>(down.weight), down.stride};
        down_product<FloatWord>(w, *b_.active, tokens, columns, s, s.acc, s.acc_stride);
      });
    };
    const auto write = [&](int part, Range columns) { add_columns(part, block.down, columns); };
    down_stages<FloatWord>(team_, *b_.active, tokens, args_.width, s, fill, product, write);
  }

  // Adds columns of a sparse down projection to the stream.
  void add_columns(int part, const DecoderMatrix& down, Range columns) {
    const int64_t tokens = args_.tokens, rank = down.rank;
    float* low = b_.low_parts + (most_parts() + part) * b_.low_stride;  // each part sums what all have found
    std::fill_n(low, tokens * rank, 0.0f);
    for (int64_t p = 0; p < team_.parts && rank > 0; ++p) {
      add_scaled(*down.lora_scale, b_.low_parts + p * b_.low_stride, tokens * rank, low);
    }
    for (int64_t m = 0; m < tokens; ++m) {
      const float* from = b_.sparse.acc + m * b_.sparse.acc_stride;
      float* to = s_.stream + m * args_.width;
      for (int64_t j = columns.begin; j < columns.end; ++j) {
        const float term = rank == 0 ? 0.0f : dot(low + m * rank, down.lora_b + j * rank, rank);
        to[j] += from[j] + (down.bias == nullptr ? term : term + down.bias[j]);
      }
    }
  }

  static constexpr auto kSame = [](int64_t k) { return k; };
  const DecodeStepArgs& args_;
  const StepBuffers& b_;
};

}  // namespace

// ----------------------------------------------------------------------------

void DEFTCORE_KERNEL(decode_step)(const DecodeStepArgs& args) {
  Workspace room(args.workspace);
  const StepBuffers buffers = lay_out(args, room);
  parallel(parts_for(args.layers * args.width * args.neurons + args.vocabulary * args.width),
           [&](Team& team) { Step(args, team, buffers).run(); });
}

size_t DEFTCORE_KERNEL(decode_step_workspace)(const DecodeStepArgs& args) {
  return bytes_of([&](Workspace& room) { lay_out(args, room); });
}

}  // namespace deftcore::cpu
