// Selective scan (Mamba): h_t = exp(step a) h_{t-1} + step b u, out = (c . h + d u) silu(z). Bound by arithmetic, one
// exponential per state and step. A block of kWidth channels is one vector, so that no sum runs across lanes; its
// states stay in registers or L1 while time runs. Channels are shared out to the parts; chunks of kScanChunk steps
// pass through tiles, so that any memory layout of the tensors becomes [step, channel] at the cost of one copy through
// L1. The backward takes chunks from the last to the first: it recomputes a chunk's states from the saved one before
// it, then runs the adjoint g_t = c_t dy_t + a_{t+1} g_{t+1} back over them.
#include "deftcore/workspace.h"
#include "scan_tile.h"

namespace deftcore::cpu {
namespace {

// Channels of one group.
struct Block : Lanes {
  int64_t group;
};

Block block_of(const SelectiveScanArgs& args, int64_t index) {
  const int64_t size = args.channels / args.groups, per_group = (size + kWidth - 1) / kWidth;
  const int64_t group = index / per_group, offset = index % per_group * kWidth;
  return {{group * size + offset, std::min<int64_t>(size - offset, kWidth)}, group};
}

int64_t block_count(const SelectiveScanArgs& args) {
  const int64_t size = args.channels / args.groups;
  return args.groups * ((size + kWidth - 1) / kWidth);
}

// delta in place of which the step: delta + bias, through softplus.
void to_steps(const SelectiveScanArgs& args, const Block& block, int64_t steps, float* tile) {
  const Vec bias = args.delta_bias == nullptr ? Vec(0.0f) : load_some(args.delta_bias + block.first, block.count);
  for (int64_t t = 0; t < steps; ++t) {
    const Vec v = load(tile + t * kWidth) + bias;
    store(tile + t * kWidth, args.softplus ? math::softplus(v) : v);
  }
}

// b or c at one step and state: a number for the whole block, or its channels' own where fixed.
template <bool kFixed>
struct Coefficients {
  const float* base;
  int64_t time, state;  // strides
  int64_t count;
  Coefficients(const SelectiveScanArgs& args, const float* data, int64_t batch, int64_t start, const Block& block) {
    time = args.groups * args.states;
    state = kFixed ? args.channels : 1;
    base = data + (kFixed ? block.first : (batch * args.length + start) * time + block.group * args.states);
    count = block.count;
  }
  // From a copy as [states, kScanChunk].
  void read_from(const float* turned) {
    base = turned;
    time = 1;
    state = kScanChunk;
  }
  Vec at(int64_t t, int64_t n) const {
    if constexpr (kFixed) return load_some(base + n * state, count);
    return Vec(base[t * time + n * state]);
  }
};

// One block over one chunk; its states come from `last` and go back there.
template <int kStates, bool kFixedB, bool kFixedC, class T>
void scan_block(const SelectiveScanArgs& args, int64_t batch, int64_t chunk, const Block& block) {
  const int64_t states = kStates > 0 ? kStates : args.states, width = args.channels;
  const int64_t start = chunk * kScanChunk, steps = std::min(args.length - start, kScanChunk);
  alignas(64) float u[kTileFloats], step[kTileFloats], z[kTileFloats];
  Vec a[kStates > 0 ? kStates : kMaxStates], h[kStates > 0 ? kStates : kMaxStates];
  float* kept = args.last + batch * states * width + block.first;
  for (int64_t n = 0; n < states; ++n) {
    a[n] = load_some(args.a + n * width + block.first, block.count) * Vec(kLog2E);
    h[n] = load_some(kept + n * width, block.count);
  }
  if (args.chunks != nullptr) {
    float* saved = args.chunks + (batch * chunk_count(args.length) + chunk) * states * width + block.first;
    for (int64_t n = 0; n < states; ++n) store_some(saved + n * width, h[n], block.count);
  }
  read_tile<T>(args.u, batch, start, steps, block, u);
  read_tile<T>(args.delta, batch, start, steps, block, step);
  if (args.z.data != nullptr) read_tile<T>(args.z, batch, start, steps, block, z);
  to_steps(args, block, steps, step);
  const Vec d = args.d == nullptr ? Vec(0.0f) : load_some(args.d + block.first, block.count);
  const Coefficients<kFixedB> b(args, args.b, batch, start, block);
  const Coefficients<kFixedC> c(args, args.c, batch, start, block);
  for (int64_t t = 0; t < steps; ++t) {
    const Vec s = load(step + t * kWidth), ut = load(u + t * kWidth), su = s * ut;
    Vec even = d * ut, odd(0.0f);
#pragma GCC unroll 16
    for (int64_t n = 0; n < states; ++n) {
      h[n] = fma(exp2_decay(s * a[n]), h[n], su * b.at(t, n));
      Vec& sum = n % 2 ? odd : even;
      sum = fma(c.at(t, n), h[n], sum);
    }
    Vec y = even + odd;
    if (args.z.data != nullptr) y = y * math::activate<Activation::kSilu>(load(z + t * kWidth));
    store(u + t * kWidth, y);
  }
  write_tile<T>(args.out, batch, start, steps, block, u);
  for (int64_t n = 0; n < states; ++n) store_some(kept + n * width, h[n], block.count);
}

template <bool kFixedB, bool kFixedC, class T>
void scan(const SelectiveScanArgs& args) {
  const int64_t blocks = block_count(args), units = args.batch * blocks, plane = args.states * args.channels;
  const int64_t bytes = args.batch * args.length * args.channels * args.states;
  const int parts = parts_for(bytes);
  for_parts(parts, [&](int part) {
    const Range mine = share(units, parts, part);
    for (int64_t begin = mine.begin; begin < mine.end;) {
      const int64_t batch = begin / blocks, end = std::min(mine.end, (batch + 1) * blocks);
      for (int64_t i = begin; i < end; ++i) {
        const Block block = block_of(args, i % blocks);
        for (int64_t n = 0; n < args.states; ++n) {
          const int64_t place = batch * plane + n * args.channels + block.first;
          const Vec h = args.first == nullptr ? Vec(0.0f) : load_some(args.first + place, block.count);
          store_some(args.last + place, h, block.count);
        }
      }
      for (int64_t chunk = 0; chunk < chunk_count(args.length); ++chunk) {
        for (int64_t i = begin; i < end; ++i) {
          const Block block = block_of(args, i % blocks);
          if (args.states == 16) {
            scan_block<16, kFixedB, kFixedC, T>(args, batch, chunk, block);
          } else {
            scan_block<0, kFixedB, kFixedC, T>(args, batch, chunk, block);
          }
        }
      }
      begin = end;
    }
  });
}

// ---------------------------------------------------------------------------- backward

// A part's own memory. What the inner loops touch is laid out so that it always fits L1's sets: the two sums side by
// side, b and c turned so that a state's steps are neighbours.
struct Sums {
  Vec b, c;
};
struct Scratch {
  Sums* sums;  // [states, kScanChunk], over the blocks of a group
  float* b;    // [states, kScanChunk] of the chunk
  float* c;
  float* part_b;  // [length, states]
  float* part_c;
};

Scratch lay_out(const SelectiveScanArgs& args, Workspace& room) {
  const int64_t rows = kScanChunk * args.states, sums = args.length * args.states;
  Scratch own{};
  own.sums = room.take<Sums>(rows);
  for (float** turned : {&own.b, &own.c}) *turned = room.take<float>(rows);
  for (float** part : {&own.part_b, &own.part_c}) *part = room.take<float>(sums);
  return own;
}

int64_t bytes_of_part(const SelectiveScanArgs& args) {
  return static_cast<int64_t>(bytes_of([&](Workspace& room) { lay_out(args, room); }));
}

Scratch scratch_of(const SelectiveScanArgs& args, void* workspace, int part) {
  Workspace room(static_cast<char*>(workspace) + part * bytes_of_part(args));
  return lay_out(args, room);
}

// One block over one chunk; `carry` [states, channels] is a_{t+1} g_{t+1} on entry and a_start g_start on return.
template <bool kFixedB, bool kFixedC, class T>
void backward_block(const SelectiveScanBackwardArgs& back, int64_t batch, int64_t chunk, const Block& block,
                    float* carry, const Scratch& own) {
  const SelectiveScanArgs& args = back.forward;
  const int64_t states = args.states, start = chunk * kScanChunk, steps = std::min(args.length - start, kScanChunk);
  alignas(64) float u[kTileFloats], step[kTileFloats], raw[kTileFloats], z[kTileFloats], grad[kTileFloats];
  read_tile<T>(args.u, batch, start, steps, block, u);
  read_tile<T>(args.delta, batch, start, steps, block, raw);
  read_tile<T>(args.out, batch, start, steps, block, grad);
  if (args.z.data != nullptr) read_tile<T>(args.z, batch, start, steps, block, z);
  std::copy(raw, raw + steps * kWidth, step);
  to_steps(args, block, steps, step);
  Coefficients<kFixedB> b(args, args.b, batch, start, block);
  Coefficients<kFixedC> c(args, args.c, batch, start, block);
  if constexpr (!kFixedB) b.read_from(own.b);
  if constexpr (!kFixedC) c.read_from(own.c);
  const Vec zero(0.0f);
  const Vec d = args.d == nullptr ? zero : load_some(args.d + block.first, block.count);
  const float* saved = args.chunks + (batch * chunk_count(args.length) + chunk) * states * args.channels + block.first;
  Vec sum_d = zero, sum_bias = zero;
  Vec dy[kScanChunk], y[kScanChunk], grad_u[kScanChunk], grad_step[kScanChunk], gate_grad[kScanChunk];
  for (int64_t t = 0; t < steps; ++t) {
    const Vec ut = load(u + t * kWidth), dout = load(grad + t * kWidth);
    dy[t] = dout;
    if (args.z.data != nullptr) {
      const auto gate = math::activate_grad<Activation::kSilu>(load(z + t * kWidth));
      dy[t] = dout * gate.value;
      gate_grad[t] = dout * gate.grad;
      store(grad + t * kWidth, gate.value);
    }
    sum_d = fma(dy[t], ut, sum_d);
    y[t] = d * ut;
    grad_u[t] = zero;
    grad_step[t] = zero;
  }
  for (int64_t n = 0; n < states; ++n) {
    const Vec a = load_some(args.a + n * args.channels + block.first, block.count), a2 = a * Vec(kLog2E);
    Vec h[kScanChunk + 1], decay[kScanChunk];
    h[0] = load_some(saved + n * args.channels, block.count);
    for (int64_t t = 0; t < steps; ++t) {
      const Vec s = load(step + t * kWidth);
      decay[t] = exp2_decay(s * a2);
      h[t + 1] = fma(decay[t], h[t], s * load(u + t * kWidth) * b.at(t, n));
      y[t] = fma(c.at(t, n), h[t + 1], y[t]);
    }
    float* kept = carry + n * args.channels + block.first;
    Sums* sums = own.sums + n * kScanChunk;
    Vec g = load_some(kept, block.count), sum_a = zero, sum_b = zero, sum_c = zero;
    for (int64_t t = steps - 1; t >= 0; --t) {
      const Vec s = load(step + t * kWidth), ut = load(u + t * kWidth), bt = b.at(t, n);
      const Vec decayed = decay[t] * h[t];
      g = fma(c.at(t, n), dy[t], g);
      grad_u[t] = fma(g, bt, grad_u[t]);
      grad_step[t] = fma(g, fma(a, decayed, bt * ut), grad_step[t]);
      sum_a = fma(s * g, decayed, sum_a);
      const Vec into_b = g * (s * ut), into_c = dy[t] * h[t + 1];
      if constexpr (kFixedB) {
        sum_b = sum_b + into_b;
      } else {
        sums[t].b = sums[t].b + into_b;
      }
      if constexpr (kFixedC) {
        sum_c = sum_c + into_c;
      } else {
        sums[t].c = sums[t].c + into_c;
      }
      g = decay[t] * g;
    }
    store_some(kept, g, block.count);
    const int64_t place = n * args.channels + block.first;
    if (back.grad_a != nullptr) add_to(back.grad_a + place, sum_a, block.count);
    if (kFixedB && back.grad_b != nullptr) add_to(back.grad_b + place, sum_b, block.count);
    if (kFixedC && back.grad_c != nullptr) add_to(back.grad_c + place, sum_c, block.count);
  }
  if (args.z.data != nullptr) {
    for (int64_t t = 0; t < steps; ++t) {
      store(z + t * kWidth, gate_grad[t] * y[t]);
      store(grad + t * kWidth, load(grad + t * kWidth) * y[t]);
    }
  }
  const Vec bias = args.delta_bias == nullptr ? zero : load_some(args.delta_bias + block.first, block.count);
  for (int64_t t = 0; t < steps; ++t) {
    store(u + t * kWidth, fma(load(step + t * kWidth), grad_u[t], d * dy[t]));
    const Vec v = load(raw + t * kWidth) + bias;
    const Vec slope = where(v > Vec(math::kSoftplusLinear), Vec(1.0f), math::sigmoid(v));
    const Vec into_delta = args.softplus ? grad_step[t] * slope : grad_step[t];
    store(step + t * kWidth, into_delta);
    sum_bias = sum_bias + into_delta;
  }
  write_tile<T>(back.grad_u, batch, start, steps, block, u);
  write_tile<T>(back.grad_delta, batch, start, steps, block, step);
  if (args.z.data != nullptr) write_tile<T>(back.grad_z, batch, start, steps, block, z);
  if (back.out_again.data != nullptr) write_tile<T>(back.out_again, batch, start, steps, block, grad);
  if (back.grad_d != nullptr) add_to(back.grad_d + block.first, sum_d, block.count);
  if (back.grad_delta_bias != nullptr) add_to(back.grad_delta_bias + block.first, sum_bias, block.count);
}

// The sums over a group's channels, from lanes to the part's own, [steps, states].
void reduce_sums(const SelectiveScanArgs& args, int64_t start, int64_t steps, const Scratch& own) {
  for (int64_t t = 0; t < steps; ++t) {
    for (int64_t n = 0; n < args.states; ++n) {
      const Sums& sums = own.sums[n * kScanChunk + t];
      own.part_b[(start + t) * args.states + n] = reduce_add(sums.b);
      own.part_c[(start + t) * args.states + n] = reduce_add(sums.c);
    }
  }
}

// b or c of one group over a chunk, turned.
void turn(const SelectiveScanArgs& args, const float* data, int64_t batch, int64_t group, int64_t start, int64_t steps,
          float* turned) {
  for (int64_t t = 0; t < steps; ++t) {
    const float* row = data + ((batch * args.length + start + t) * args.groups + group) * args.states;
    for (int64_t n = 0; n < args.states; ++n) turned[n * kScanChunk + t] = row[n];
  }
}

// grad [batch, length, groups, states] of one batch and group: the parts' sums, added in their order.
void add_parts(const SelectiveScanArgs& args, void* workspace, int parts, bool is_c, int64_t batch, int64_t group,
               Range times, float* grad) {
  for (int part = 0; part < parts; ++part) {
    const Scratch own = scratch_of(args, workspace, part);
    for (int64_t t = times.begin; t < times.end; ++t) {
      float* to = grad + ((batch * args.length + t) * args.groups + group) * args.states;
      const float* sums = (is_c ? own.part_c : own.part_b) + t * args.states;
      for (int64_t n = 0; n < args.states; ++n) to[n] += sums[n];
    }
  }
}

template <bool kFixedB, bool kFixedC, class T>
void scan_backward(const SelectiveScanBackwardArgs& back) {
  const SelectiveScanArgs& args = back.forward;
  const int64_t per_group = block_count(args) / args.groups, plane = args.states * args.channels;
  const int64_t bytes = args.batch * args.length * args.channels * args.states;
  const int parts = parts_for(bytes);
  const auto sum_part = [&](int part, int64_t batch, int64_t group) {
    const Scratch own = scratch_of(args, back.workspace, part);
    const Range mine = share(per_group, parts, part);
    for (int64_t chunk = chunk_count(args.length) - 1; chunk >= 0; --chunk) {
      const int64_t start = chunk * kScanChunk, steps = std::min(args.length - start, kScanChunk);
      std::fill(own.sums, own.sums + kScanChunk * args.states, Sums{Vec(0.0f), Vec(0.0f)});
      if (!kFixedB) turn(args, args.b, batch, group, start, steps, own.b);
      if (!kFixedC) turn(args, args.c, batch, group, start, steps, own.c);
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        backward_block<kFixedB, kFixedC, T>(back, batch, chunk, block_of(args, group * per_group + i),
                                            back.grad_first + batch * plane, own);
      }
      if (!kFixedB || !kFixedC) reduce_sums(args, start, steps, own);
    }
  };
  parallel(parts, [&](Team& team) {
    for (int64_t batch = 0; batch < args.batch; ++batch) {
      for (int64_t group = 0; group < args.groups; ++group) {
        team.stage([&](int part) { sum_part(part, batch, group); });
        team.stage([&](int part) {
          const Range times = share(args.length, parts, part);
          if (!kFixedB && back.grad_b != nullptr) {
            add_parts(args, back.workspace, parts, false, batch, group, times, back.grad_b);
          }
          if (!kFixedC && back.grad_c != nullptr) {
            add_parts(args, back.workspace, parts, true, batch, group, times, back.grad_c);
          }
        });
      }
    }
  });
}

template <class Fn>
void dispatch_fixed(const SelectiveScanArgs& args, Fn&& fn) {
  using Yes = std::true_type;
  using No = std::false_type;
  if (args.fixed_b) return args.fixed_c ? fn(Yes{}, Yes{}) : fn(Yes{}, No{});
  return args.fixed_c ? fn(No{}, Yes{}) : fn(No{}, No{});
}

}  // namespace

// ----------------------------------------------------------------------------

void DEFTCORE_KERNEL(selective_scan)(const SelectiveScanArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) {
    dispatch_fixed(args, [&](auto fixed_b, auto fixed_c) { scan<fixed_b(), fixed_c(), decltype(t)>(args); });
  });
}

size_t DEFTCORE_KERNEL(selective_scan_backward_workspace)(const SelectiveScanBackwardArgs& args) {
  return static_cast<size_t>(most_parts() * bytes_of_part(args.forward));
}

void DEFTCORE_KERNEL(selective_scan_backward)(const SelectiveScanBackwardArgs& args) {
  dispatch_dtype(args.forward.dtype, [&](auto t) {
    dispatch_fixed(args.forward,
                   [&](auto fixed_b, auto fixed_c) { scan_backward<fixed_b(), fixed_c(), decltype(t)>(args); });
  });
}

}  // namespace deftcore::cpu
