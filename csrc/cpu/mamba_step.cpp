// One step of decoding with Mamba or Mamba-2, bound by the weights' bytes: all layers in one parallel region of five
// stages a layer, each of which ends where the next one's threads read what others wrote. What a part makes of its own
// rows (the convolution of its channels, the states of its channels) it goes on with at once.
#include "deftcore/mamba_step.h"

#include "conv_taps.h"
#include "state_update.h"
#include "step_stages.h"

namespace deftcore::cpu {
namespace {

struct MambaBuffers {
  StageBuffers stages;
  Activations u, low, gated;  // [channels], [rank], [channels]: what products read; u and low of Mamba
  float* projected;           // [tokens, rows of `in`]
  float *mixed, *b, *c;       // [tokens, channels] (of Mamba-2), [tokens, groups, states]
  float *step, *y;            // [tokens, channels], of Mamba; likewise, of Mamba-2
};

// Rows of `in`, and where its parts begin.
struct Parts {
  int64_t x, z, dt, rows;
  explicit Parts(const MambaStepArgs& args) {
    const bool second = args.rank == 0;
    x = second ? args.channels : 0;
    z = second ? 0 : args.channels;
    dt = args.channels + args.mixed();
    rows = dt + (second ? args.heads : 0);
  }
};

MambaBuffers lay_out(const MambaStepArgs& args, Workspace& room) {
  const int64_t tokens = args.tokens, coefficients = tokens * args.groups * args.states;
  const bool second = args.rank == 0;
  MambaBuffers b{};
  b.stages = take_stages(room, tokens, args.width, std::max({args.width, args.channels, args.rank}));
  b.u = take_activations(room, tokens, second ? 0 : args.channels);
  b.low = take_activations(room, tokens, args.rank);
  b.gated = take_activations(room, tokens, args.channels);
  b.projected = room.take<float>(tokens * Parts(args).rows);
  b.mixed = room.take<float>(second ? tokens * args.channels : 0);
  b.b = room.take<float>(coefficients);
  b.c = room.take<float>(coefficients);
  b.step = room.take<float>(second ? 0 : tokens * args.channels);
  b.y = room.take<float>(second ? tokens * args.channels : 0);
  return b;
}

class MambaStep : public StepStages {
 public:
  MambaStep(const MambaStepArgs& args, Team& team, const MambaBuffers& buffers)
      : StepStages(team, buffers.stages), args_(args), b_(buffers), at_(args) {}

  void run() {
    begin(args_.hidden, {&b_.u, &b_.low, &b_.gated});
    for (int64_t i = 0; i < args_.count; ++i) {
      const MambaLayer& layer = args_.layers[i];
      norm(layer.norm, args_.eps);
      project(layer, args_.windows + i * args_.batch * (args_.taps - 1) * args_.mixed());
      float* memory = args_.memory + i * args_.batch * args_.channels * args_.states;
      if (args_.rank > 0) {
        select(layer);
        scan_channels(layer, memory);
      } else {
        scan_heads(layer, memory);
        norm_gated(layer.gated_norm);
      }
      add(layer.out, b_.gated);
    }
    norm(args_.norm, args_.eps);
    project_out(*args_.head, args_.logits);
  }

 private:
  // A part's channels of the convolution follow on the products that they are made of.
  void project(const MambaLayer& layer, float* windows) {
    const int64_t mixed = args_.mixed(), channels = args_.channels, coefficients = args_.groups * args_.states;
    team_.stage([&](int part) {
      const auto keep = [&](int64_t row, int64_t token, float y) { b_.projected[token * at_.rows + row] = y; };
      const Range mine = share(mixed, team_.parts, part, kRowGroup);
      own_rows(part, layer.in, {at_.x + mine.begin, at_.x + mine.end}, s_.normed, keep);
      rows(part, layer.in, {at_.z, at_.z + channels}, s_.normed, keep);
      rows(part, layer.in, {at_.dt, at_.rows}, s_.normed, keep);
      for (int64_t t = 0; t < s_.tokens; ++t) {
        const float* x = b_.projected + t * at_.rows + at_.x;
        convolve_next(layer, x, windows + t * (args_.taps - 1) * mixed, mine, [&](int64_t channel, float u) {
          const int64_t beyond = channel - channels;
          if (args_.rank > 0) return b_.u.set(t, channel, u);
          if (beyond < 0) {
            b_.mixed[t * channels + channel] = u;
          } else if (beyond < coefficients) {
            b_.b[t * coefficients + beyond] = u;
          } else {
            b_.c[t * coefficients + beyond - coefficients] = u;
          }
        });
      }
    });
  }

  // silu of the convolution behind x at some channels; the window moves on.
  template <class Sink>
  void convolve_next(const MambaLayer& layer, const float* x, float* window, Range mine, Sink&& sink) {
    const int64_t mixed = args_.mixed(), reach = args_.taps - 1;
    alignas(64) float inputs[kMaxConvWidth * kWidth], out[kWidth];
    for (int64_t first = mine.begin; first < mine.end; first += kWidth) {
      const Lanes lanes{first, std::min<int64_t>(mine.end - first, kWidth)};
      const Taps taps = taps_of(layer.taps, layer.taps_bias, args_.taps, mixed, lanes);
      for (int64_t k = 0; k < reach; ++k) {
        store(inputs + k * kWidth, load_some(window + k * mixed + first, lanes.count));
      }
      store(inputs + reach * kWidth, load_some(x + first, lanes.count));
      store(out, math::activate<Activation::kSilu>(convolve<0>(taps, inputs, args_.taps, reach)));
      for (int64_t k = 0; k < reach; ++k) {
        store_some(window + k * mixed + first, load(inputs + (k + 1) * kWidth), lanes.count);
      }
      for (int64_t j = 0; j < lanes.count; ++j) sink(first + j, out[j]);
    }
  }

  // Mamba: what dt is made of, b and c.
  void select(const MambaLayer& layer) {
    const int64_t rank = args_.rank, states = args_.states;
    rows(layer.x, b_.u, [&](int64_t row, int64_t token, float y) {
      const int64_t beyond = row - rank;
      if (beyond < 0) return b_.low.set(token, row, y);
      float* to = beyond < states ? b_.b + beyond : b_.c + beyond - states;
      to[token * states] = y;
    });
  }

  StateUpdateArgs update(float* memory) const {
    StateUpdateArgs update{};
    const int64_t size = args_.channels / args_.heads;
    update.state = memory;
    update.z = {b_.projected + at_.z, at_.rows, size, 1};
    update.b = b_.b;
    update.c = b_.c;
    update.batch = s_.tokens;
    update.heads = args_.heads;
    update.head_dim = size;
    update.states = args_.states;
    update.groups = args_.groups;
    update.dtype = update.state_dtype = DType::kFloat32;
    update.softplus = true;
    return update;
  }

  // Mamba: a part's channels follow on their steps.
  void scan_channels(const MambaLayer& layer, float* memory) {
    const int64_t channels = args_.channels;
    StateUpdateArgs scan = update(memory);
    scan.x = {b_.u.plain, channels, 0, 1};
    scan.dt = {b_.step, channels, 0, 1};
    scan.out = b_.gated.plain;
    scan.a = {layer.a, 0, 0, args_.states};
    scan.a_state = 1;
    scan.d = {layer.d, 0, 0, 1};
    scan.bias = {layer.dt_bias, 0, 0, 1};
    team_.stage([&](int part) {
      const Range mine = share(channels, team_.parts, part, kWidth);
      own_rows(part, layer.dt, mine, b_.low,
               [&](int64_t row, int64_t token, float y) { b_.step[token * channels + row] = y; });
      for (int64_t t = 0; t < s_.tokens; ++t) {
        for (int64_t first = mine.begin; first < mine.end; first += kWidth) {
          update_block<float, float>(scan, t, 0, {first, std::min<int64_t>(mine.end - first, kWidth)});
        }
        for (int64_t i = mine.begin; i < mine.end; ++i) b_.gated.set(t, i, b_.gated.plain[t * channels + i]);
      }
    });
  }

  // Mamba-2: heads have one step and one decay each.
  void scan_heads(const MambaLayer& layer, float* memory) {
    const int64_t size = args_.channels / args_.heads, blocks = (size + kWidth - 1) / kWidth;
    StateUpdateArgs scan = update(memory);
    scan.x = {b_.mixed, args_.channels, size, 1};
    scan.dt = {b_.projected + at_.dt, at_.rows, 1, 0};
    scan.out = b_.y;
    scan.a = {layer.a, 0, 1, 0};
    scan.d = {layer.d, 0, 1, 0};
    scan.bias = {layer.dt_bias, 0, 1, 0};
    team_.stage([&](int part) {
      const Range mine = share(s_.tokens * args_.heads * blocks, team_.parts, part);
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        const int64_t unit = i / blocks, first = i % blocks * kWidth;
        update_block<float, float>(scan, unit / args_.heads, unit % args_.heads,
                                   {first, std::min<int64_t>(size - first, kWidth)});
      }
    });
  }

  void norm_gated(const float* weight) {
    const int64_t size = args_.channels / args_.norm_groups;
    team_.stage([&](int part) {
      const Range mine = share(s_.tokens * args_.norm_groups, team_.parts, part);
      for (int64_t unit = mine.begin; unit < mine.end; ++unit) {
        const int64_t token = unit / args_.norm_groups, first = unit % args_.norm_groups * size;
        const float* y = b_.y + unit * size;
        const float factor = inverse_rms(y, size, args_.eps);
        for (int64_t i = 0; i < size; ++i) b_.gated.set(token, first + i, y[i] * factor * weight[first + i]);
      }
    });
  }

  const MambaStepArgs& args_;
  const MambaBuffers& b_;
  const Parts at_;
};

}  // namespace

// ----------------------------------------------------------------------------

void DEFTCORE_KERNEL(mamba_step)(const MambaStepArgs& args) {
  Workspace room(args.workspace);
  const MambaBuffers buffers = lay_out(args, room);
  parallel(parts_for(args.count * args.width * args.channels + args.vocabulary * args.width),
           [&](Team& team) { MambaStep(args, team, buffers).run(); });
}

size_t DEFTCORE_KERNEL(mamba_step_workspace)(const MambaStepArgs& args) {
  return bytes_of([&](Workspace& room) { lay_out(args, room); });
}

}  // namespace deftcore::cpu
