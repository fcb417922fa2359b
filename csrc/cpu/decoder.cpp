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

  // Each head of queries rotates its key anew, which saves a stage; the first one of a group keeps it.
  void attention(const DecoderBlock& block, int64_t layer) {
    const int64_t size = args_.head_size, group = args_.heads / args_.kv_heads;
    team_.stage([&](int part) {
      float *query = b_.heads + part * b_.head_stride, *key = query + size, *out = key + size;
      const Range mine = share(args_.tokens * args_.heads, team_.parts, part);
      for (int64_t unit = mine.begin; unit < mine.end; ++unit) {
        const int64_t t = unit / args_.heads, head = unit % args_.heads, source = t * args_.kv_heads + head / group;
        const int64_t place = args_.position - args_.starts[t];
        const float *cosine = args_.cosine + place * size, *sine = args_.sine + place * size;
        rotate_head(b_.queries + unit * size, block.q_norm, args_.eps, cosine, sine, size, query);
        rotate_head(b_.keys + source * size, block.k_norm, args_.eps, cosine, sine, size, key);
        const float* value = b_.values + source * size;
        const int64_t row = (layer * args_.batch * args_.kv_heads + source) * args_.length;
        float *keys = args_.keys + row * size, *values = args_.values + row * size;
        const int64_t first = std::max(args_.starts[t], args_.position - block.window + 1);
        attend(query, keys + first * size, values + first * size, key, value, args_.position - first + 1, size,
               args_.scale, b_.scores + part * b_.score_stride, out);
        for (int64_t i = 0; i < size; ++i) b_.mixed.set(t, head * size + i, out[i]);
        if (head % group == 0) {
          std::copy_n(key, size, keys + args_.position * size);
          std::copy_n(value, size, values + args_.position * size);
        }
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
