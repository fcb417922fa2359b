// One step of decoding, bound by the weights' bytes: all blocks in one parallel region of seven stages a block, each
// of which ends where the next one's threads read what others wrote.
#include "cached_attention.h"
#include "step_stages.h"

namespace deftcore::cpu {
namespace {

struct StepBuffers {
  StageBuffers stages;
  Activations mixed, gated;        // [heads head_size], [neurons]: what products read
  float *queries, *keys, *values;  // [tokens, heads head_size], of this position
  float *scores, *heads;           // per part
  int64_t score_stride, head_stride;
};

StepBuffers lay_out(const DecodeStepArgs& args, Workspace& room) {
  const int64_t tokens = args.tokens, parts = most_parts();
  const int64_t mixed = args.heads * args.head_size, kept = args.kv_heads * args.head_size;
  StepBuffers b{};
  b.stages = take_stages(room, tokens, args.width, std::max({args.width, mixed, args.neurons}));
  b.mixed = take_activations(room, tokens, mixed);
  b.gated = take_activations(room, tokens, args.neurons);
  b.queries = room.take<float>(tokens * mixed);
  b.keys = room.take<float>(tokens * kept);
  b.values = room.take<float>(tokens * kept);
  b.score_stride = round_up(args.length, 16);
  b.head_stride = round_up(3 * args.head_size, 16);
  b.scores = room.take<float>(parts * b.score_stride);
  b.heads = room.take<float>(parts * b.head_stride);
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
      norm(block.mlp_norm, args_.eps);
      gate(block);
      add(block.down, b_.gated);
    }
    keep_last(args_.steps);
    norm(args_.norm, args_.eps);
    project_out(*args_.head, args_.logits);
  }

 private:
  void project(const DecoderBlock& block) {
    team_.stage([&](int part) {
      const auto into = [](const DecoderMatrix& m, float* out) {
        return [&m, out](int64_t row, int64_t token, float y) { out[token * m.rows + row] = y; };
      };
      rows(part, block.q, s_.normed, into(block.q, b_.queries));
      rows(part, block.k, s_.normed, into(block.k, b_.keys));
      rows(part, block.v, s_.normed, into(block.v, b_.values));
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

  // Rows of the gate wait where their products will stand.
  void gate(const DecoderBlock& block) {
    dispatch(args_.activation, [&](auto f) {
      team_.stage([&](int part) {
        rows(part, block.gate, s_.normed,
             [&](int64_t row, int64_t token, float y) { b_.gated.plain[token * args_.neurons + row] = y; });
        rows(part, block.up, s_.normed, [&](int64_t row, int64_t token, float y) {
          const float z = b_.gated.plain[token * args_.neurons + row];
          b_.gated.set(token, row, math::activate<f(), float>(z) * y);
        });
      });
    });
  }

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
