// The selective scan's backward takes chunks from the last to the first: it recomputes a chunk's states from the saved
// one before it, then runs the adjoint g_t = c_t dy_t + a_{t+1} g_{t+1} back over them, two states at a time.
#include "deftcore/workspace.h"
#include "ssm.h"

namespace deftcore::cpu {
namespace {

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

constexpr int kPair = 2;  // states that go through a chunk side by side: what they share is read and written once

// A block's tiles over a chunk that its states share, a vector a step.
struct Shared {
  const float *step, *su, *dy;
  Vec *y, *into_u, *into_step;  // sums over the states: c h, g b, and a g a_t h_{t-1}
};

// kCount states from n on over a chunk, forward and back; `carry` is a_{t+1} g_{t+1} on entry and a_start g_start on
// return.
template <int kCount, bool kFixedB, bool kFixedC, class Decay>
void backward_states(const Decay& decay, const SelectiveScanBackwardArgs& back, const Block& block, int64_t n,
                     int64_t steps, const Coefficients<kFixedB>& b, const Coefficients<kFixedC>& c, const float* saved,
                     float* carry, const Shared& tiles, Sums* sums) {
  const int64_t width = back.forward.channels;
  Vec h[kScanChunk + 1][kCount], decays[kScanChunk][kCount], a[kCount], state[kCount];
  for (int i = 0; i < kCount; ++i) {
    a[i] = load_some(back.forward.a + (n + i) * width + block.first, block.count);
    h[0][i] = state[i] = load_some(saved + (n + i) * width, block.count);
  }
  for (int64_t t = 0; t < steps; ++t) {
    const Vec s = load(tiles.step + t * kWidth), su = load(tiles.su + t * kWidth);
    Vec y = tiles.y[t];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      const Vec kept = decay(s, a[i] * Vec(kLog2E));
      decays[t][i] = kept;
      h[t + 1][i] = state[i] = fma(kept, state[i], su * b.at(t, n + i));
      y = fma(c.at(t, n + i), state[i], y);
    }
    tiles.y[t] = y;
  }
  Vec g[kCount], sum_a[kCount], sum_b[kCount], sum_c[kCount];
  for (int i = 0; i < kCount; ++i) {
    g[i] = load_some(carry + (n + i) * width + block.first, block.count);
    sum_a[i] = sum_b[i] = sum_c[i] = Vec(0.0f);
  }
  for (int64_t t = steps - 1; t >= 0; --t) {
    const Vec s = load(tiles.step + t * kWidth), su = load(tiles.su + t * kWidth), dy = load(tiles.dy + t * kWidth);
    Vec into_u = tiles.into_u[t], into_step = tiles.into_step[t];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      Sums& both = sums[i * kScanChunk + t];
      g[i] = fma(c.at(t, n + i), dy, g[i]);
      into_u = fma(g[i], b.at(t, n + i), into_u);
      Vec &to_b = kFixedB ? sum_b[i] : both.b, &to_c = kFixedC ? sum_c[i] : both.c;
      to_b = fma(g[i], su, to_b);
      to_c = fma(dy, h[t + 1][i], to_c);
      g[i] = decays[t][i] * g[i];
      const Vec decayed = g[i] * h[t][i];
      into_step = fma(a[i], decayed, into_step);
      sum_a[i] = fma(s, decayed, sum_a[i]);
    }
    tiles.into_u[t] = into_u;
    tiles.into_step[t] = into_step;
  }
  for (int i = 0; i < kCount; ++i) {
    const int64_t place = (n + i) * width + block.first;
    store_some(carry + place, g[i], block.count);
    if (back.grad_a != nullptr) add_to(back.grad_a + place, sum_a[i], block.count);
    if (kFixedB && back.grad_b != nullptr) add_to(back.grad_b + place, sum_b[i], block.count);
    if (kFixedC && back.grad_c != nullptr) add_to(back.grad_c + place, sum_c[i], block.count);
  }
}

// One block over one chunk; `carry` [states, channels] as above.
template <bool kFixedB, bool kFixedC, class T>
void backward_block(const SelectiveScanBackwardArgs& back, int64_t batch, int64_t chunk, const Block& block,
                    float* carry, const Scratch& own) {
  const SelectiveScanArgs& args = back.forward;
  const int64_t states = args.states, start = chunk * kScanChunk, steps = std::min(args.length - start, kScanChunk);
  alignas(64) float u[kTileFloats], step[kTileFloats], raw[kTileFloats], z[kTileFloats], grad[kTileFloats];
  alignas(64) float su[kTileFloats], dy[kTileFloats];
  read_tile<T, false>(args.u, batch, start, steps, block, u);
  read_tile<T, false>(args.delta, batch, start, steps, block, raw);
  read_tile<T, false>(args.out, batch, start, steps, block, grad);
  if (args.z.data != nullptr) read_tile<T, false>(args.z, batch, start, steps, block, z);
  std::copy(raw, raw + steps * kWidth, step);
  const Vec longest = to_steps(args, block, steps, step);
  Coefficients<kFixedB> b(args, args.b, batch, start, block);
  Coefficients<kFixedC> c(args, args.c, batch, start, block);
  if constexpr (!kFixedB) b.read_from(own.b);
  if constexpr (!kFixedC) c.read_from(own.c);
  const Vec zero(0.0f);
  const Vec d = args.d == nullptr ? zero : load_some(args.d + block.first, block.count);
  const float* saved = args.chunks + (batch * chunk_count(args.length) + chunk) * states * args.channels + block.first;
  Vec sum_d = zero, sum_bias = zero, fastest = zero;
  Vec y[kScanChunk], into_u[kScanChunk], into_step[kScanChunk], gate_grad[kScanChunk];
  for (int64_t t = 0; t < steps; ++t) {
    const Vec ut = load(u + t * kWidth), dout = load(grad + t * kWidth);
    Vec through = dout;
    if (args.z.data != nullptr) {
      const auto gate = math::activate_grad<Activation::kSilu>(load(z + t * kWidth));
      through = dout * gate.value;
      gate_grad[t] = dout * gate.grad;
      store(grad + t * kWidth, gate.value);
    }
    store(dy + t * kWidth, through);
    store(su + t * kWidth, load(step + t * kWidth) * ut);
    sum_d = fma(through, ut, sum_d);
    y[t] = d * ut;
    into_u[t] = zero;
    into_step[t] = zero;
  }
  for (int64_t n = 0; n < states; ++n) {
    fastest = at_least(abs(load_some(args.a + n * args.channels + block.first, block.count)), fastest);
  }
  const Shared tiles{step, su, dy, y, into_u, into_step};
  with_decay(longest * fastest * Vec(kLog2E), [&](const auto& decay) {
    const auto run = [&](auto count, int64_t n) {
      const Range ask = share(steps, states, n), more = share(steps, states, n + count() - 1);
      for (const ScanTensor* x :
           {&args.u, &args.delta, &args.out, &args.z, &back.grad_u, &back.grad_delta, &back.grad_z, &back.out_again}) {
        ask_ahead<T>(*x, batch, start + ask.begin, more.end - ask.begin, block);
      }
      backward_states<count()>(decay, back, block, n, steps, b, c, saved, carry, tiles, own.sums + n * kScanChunk);
    };
    int64_t n = 0;
    for (; n + kPair <= states; n += kPair) run(std::integral_constant<int, kPair>{}, n);
    for (; n < states; ++n) run(std::integral_constant<int, 1>{}, n);
  });
  if (args.z.data != nullptr) {
    for (int64_t t = 0; t < steps; ++t) {
      store(z + t * kWidth, gate_grad[t] * y[t]);
      store(grad + t * kWidth, load(grad + t * kWidth) * y[t]);
    }
  }
  const Vec bias = args.delta_bias == nullptr ? zero : load_some(args.delta_bias + block.first, block.count);
  for (int64_t t = 0; t < steps; ++t) {
    const Vec v = load(raw + t * kWidth) + bias;
    const Vec slope = where(v > Vec(math::kSoftplusLinear), Vec(1.0f), math::sigmoid(v));
    const Vec into = fma(load(u + t * kWidth), into_u[t], into_step[t]);
    const Vec into_delta = args.softplus ? into * slope : into;
    store(u + t * kWidth, fma(load(step + t * kWidth), into_u[t], d * load(dy + t * kWidth)));
    store(step + t * kWidth, into_delta);
    sum_bias = sum_bias + into_delta;
  }
  write_tile<T, false>(back.grad_u, batch, start, steps, block, u);
  write_tile<T, false>(back.grad_delta, batch, start, steps, block, step);
  if (args.z.data != nullptr) write_tile<T, false>(back.grad_z, batch, start, steps, block, z);
  if (back.out_again.data != nullptr) write_tile<T, false>(back.out_again, batch, start, steps, block, grad);
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

}  // namespace

// ----------------------------------------------------------------------------

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
