// One step of decoding, bound by the weights' bytes: all blocks in one parallel region of seven stages a block, each
// of which ends where the next one's threads read what others wrote.
#include "cached_attention.h"
#include "deftcore/workspace.h"
#include "matrix_rows.h"

namespace deftcore::cpu {
namespace {

struct StepBuffers {
  Activations normed, mixed, gated;  // [width], [heads head_size], [neurons]: what products read
  float* stream;                     // [tokens, width]: what blocks add to
  float *queries, *keys, *values;    // [tokens, heads head_size], of this position
  float *scales, *scores, *heads;    // per part
  int64_t scale_stride, score_stride, head_stride;
};

StepBuffers lay_out(const DecodeStepArgs& args, Workspace& room) {
  const int64_t tokens = args.tokens, parts = most_parts();
  const auto activations = [&](int64_t size) {
    Activations a{};
    a.size = size;
    a.placed_stride = chunks_of(size) * kChunk;
    a.plain = room.take<float>(tokens * size);
    a.placed = room.take<float>(tokens * a.placed_stride);
    return a;
  };
  StepBuffers b{};
  const int64_t mixed = args.heads * args.head_size, kept = args.kv_heads * args.head_size;
  b.normed = activations(args.width);
  b.mixed = activations(mixed);
  b.gated = activations(args.neurons);
  b.stream = room.take<float>(tokens * args.width);
  b.queries = room.take<float>(tokens * mixed);
  b.keys = room.take<float>(tokens * kept);
  b.values = room.take<float>(tokens * kept);
  const int64_t longest = std::max({args.width, mixed, args.neurons});
  b.scale_stride = kDot4Rows * round_up(longest / 32 + 16, 16);  // blocks have 32 columns or more
  b.score_stride = round_up(args.length, 16);
  b.head_stride = round_up(3 * args.head_size, 16);
  b.scales = room.take<float>(parts * b.scale_stride);
  b.scores = room.take<float>(parts * b.score_stride);
  b.heads = room.take<float>(parts * b.head_stride);
  return b;
}

class Step {
 public:
  Step(const DecodeStepArgs& args, Team& team, StepBuffers& buffers) : args_(args), team_(team), b_(buffers) {}

  void run() {
    clear();
    for (int64_t layer = 0; layer < args_.layers; ++layer) {
      const DecoderBlock& block = args_.blocks[layer];
      norm(block.attention_norm);
      project(block);
      attention(block, layer);
      add(block.o, b_.mixed);
      norm(block.mlp_norm);
      gate(block);
      add(block.down, b_.gated);
    }
    norm(args_.norm);
    rows(*args_.head, b_.normed,
         [&](int64_t row, int64_t token, float y) { args_.logits[token * args_.vocabulary + row] = y; });
  }

 private:
  void clear() {
    team_.once([&] {
      std::copy_n(args_.hidden, args_.tokens * args_.width, b_.stream);
      for (Activations* a : {&b_.normed, &b_.mixed, &b_.gated}) {
        std::fill_n(a->placed, args_.tokens * a->placed_stride, 0.0f);
      }
    });
  }

  // A part's rows of x W^T + bias.
  template <class Sink>
  void rows(int part, const DecoderMatrix& m, const Activations& x, Sink&& sink) {
    matrix_rows(m, share(m.rows, team_.parts, part, kRowGroup), x, args_.tokens, b_.scales + part * b_.scale_stride,
                sink);
  }
  template <class Sink>
  void rows(const DecoderMatrix& m, const Activations& x, Sink&& sink) {
    team_.stage([&](int part) { rows(part, m, x, sink); });
  }

  void norm(const float* weight) {
    team_.stage([&](int part) {
      const Range mine = share(args_.tokens, team_.parts, part);
      for (int64_t t = mine.begin; t < mine.end; ++t) {
        const float* x = b_.stream + t * args_.width;
        const float factor = inverse_rms(x, args_.width, args_.eps);
        for (int64_t i = 0; i < args_.width; ++i) b_.normed.set(t, i, x[i] * factor * weight[i]);
      }
    });
  }

  void project(const DecoderBlock& block) {
    team_.stage([&](int part) {
      const auto into = [](const DecoderMatrix& m, float* out) {
        return [&m, out](int64_t row, int64_t token, float y) { out[token * m.rows + row] = y; };
      };
      rows(part, block.q, b_.normed, into(block.q, b_.queries));
      rows(part, block.k, b_.normed, into(block.k, b_.keys));
      rows(part, block.v, b_.normed, into(block.v, b_.values));
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

  void add(const DecoderMatrix& m, const Activations& x) {
    rows(m, x, [&](int64_t row, int64_t token, float y) { b_.stream[token * args_.width + row] += y; });
  }

  // Rows of the gate wait where their products will stand.
  void gate(const DecoderBlock& block) {
    dispatch(args_.activation, [&](auto f) {
      team_.stage([&](int part) {
        rows(part, block.gate, b_.normed,
             [&](int64_t row, int64_t token, float y) { b_.gated.plain[token * args_.neurons + row] = y; });
        rows(part, block.up, b_.normed, [&](int64_t row, int64_t token, float y) {
          const float z = b_.gated.plain[token * args_.neurons + row];
          b_.gated.set(token, row, math::activate<f(), float>(z) * y);
        });
      });
    });
  }

  const DecodeStepArgs& args_;
  Team& team_;
  StepBuffers& b_;
};

}  // namespace

// ----------------------------------------------------------------------------

void DEFTCORE_KERNEL(decode_step)(const DecodeStepArgs& args) {
  Workspace room(args.workspace);
  StepBuffers buffers = lay_out(args, room);
  parallel(parts_for(args.layers * args.width * args.neurons + args.vocabulary * args.width),
           [&](Team& team) { Step(args, team, buffers).run(); });
}

size_t DEFTCORE_KERNEL(decode_step_workspace)(const DecodeStepArgs& args) {
  return bytes_of([&](Workspace& room) { lay_out(args, room); });
}

}  // namespace deftcore::cpu
