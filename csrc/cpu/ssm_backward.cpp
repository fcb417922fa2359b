// The selective scan's backward takes chunks from the last to the first: it recomputes a chunk's states from the saved
// one before it, then runs the adjoint g_t = c_t dy_t + a_{t+1} g_{t+1} back over them, a few states at a time.
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

// Vectors and states that go through a chunk side by side: what they share is read and written once.
constexpr int kAbreast = kVectors % 2 == 0 ? 2 : 1;
constexpr int kBeside = kAbreast == 1 && kRegisters >= 32 ? 4 : 2;

// A block's tiles over a chunk, vector by vector.
struct Tiles {
  alignas(64) float u[kBlockFloats];      // then its gradient; so for the next two
  alignas(64) float slope[kBlockFloats];  // delta, then the slope of the step in it
  alignas(64) float z[kBlockFloats];      // then the slope of the gate, times the gradient of out
  alignas(64) float out[kBlockFloats];    // the gradient of out, then the gate, then out
  alignas(64) float step[kBlockFloats];
  alignas(64) float su[kBlockFloats];
  alignas(64) float dy[kBlockFloats];
  alignas(64) float y[kBlockFloats];  // sums over the states: c h; of the next two g b and a g a_t h_{t-1}
  alignas(64) float into_u[kBlockFloats];
  alignas(64) float into_step[kBlockFloats];
};

// kCount states from n on, of kWide vectors from v on, over a chunk, forward and back; `carry` is a_{t+1} g_{t+1} on
// entry and a_start g_start on return.
template <int kCount, int kWide, bool kFixedB, bool kFixedC, class Decay>
void backward_states(const Decay& decay, const SelectiveScanBackwardArgs& back, Lanes block, int64_t v, int64_t n,
                     int64_t steps, const Scratch& own, const float* saved, float* carry, Tiles& tiles, Asks asks) {
  const SelectiveScanArgs& args = back.forward;
  constexpr int kAll = kCount * kWide;
  Vec h[kScanChunk + 1][kAll], decays[kScanChunk][kAll], a[kAll], state[kAll];
  Lanes lanes[kWide];
  int64_t places[kAll];
  for (int w = 0; w < kWide; ++w) lanes[w] = vector_of(block, v + w);
  Sums* const sums = own.sums + n * kScanChunk;
  const float *const turned_b = own.b + n * kScanChunk, *const turned_c = own.c + n * kScanChunk;
  const auto b = [&](int64_t t, int i) {
    if constexpr (kFixedB) return load_some(args.b + places[i], lanes[i % kWide].count);
    return Vec(turned_b[i / kWide * kScanChunk + t]);
  };
  const auto c = [&](int64_t t, int i) {
    if constexpr (kFixedC) return load_some(args.c + places[i], lanes[i % kWide].count);
    return Vec(turned_c[i / kWide * kScanChunk + t]);
  };
#pragma GCC unroll 4
  for (int i = 0; i < kAll; ++i) {
    const Lanes& some = lanes[i % kWide];
    places[i] = (n + i / kWide) * args.channels + some.first;
    a[i] = load_some(args.a + places[i], some.count);
    h[0][i] = state[i] = load_some(saved + places[i], some.count);
  }
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t at = v * kTileFloats + t * kWidth;
#pragma GCC unroll 4
    for (int w = 0; w < kWide; ++w) {
      const Vec s = load(tiles.step + at + w * kTileFloats), su = load(tiles.su + at + w * kTileFloats);
      Vec y = load(tiles.y + at + w * kTileFloats);
#pragma GCC unroll 4
      for (int i = w; i < kAll; i += kWide) {
        const Vec kept = decay(s, a[i] * Vec(kLog2E));
        decays[t][i] = kept;
        h[t + 1][i] = state[i] = fma(kept, state[i], su * b(t, i));
        y = fma(c(t, i), state[i], y);
      }
      store(tiles.y + at + w * kTileFloats, y);
    }
  }
  Vec g[kAll], sum_a[kAll], sum_b[kAll], sum_c[kAll];
#pragma GCC unroll 4
  for (int i = 0; i < kAll; ++i) {
    g[i] = load_some(carry + places[i], lanes[i % kWide].count);
    sum_a[i] = sum_b[i] = sum_c[i] = Vec(0.0f);
  }
  for (int64_t t = steps - 1; t >= 0; --t) {
    asks.one();
    const int64_t at = v * kTileFloats + t * kWidth;
    Sums at_t[kCount];
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) at_t[i] = sums[i * kScanChunk + t];
#pragma GCC unroll 4
    for (int w = 0; w < kWide; ++w) {
      const Vec s = load(tiles.step + at + w * kTileFloats), su = load(tiles.su + at + w * kTileFloats);
      const Vec dy = load(tiles.dy + at + w * kTileFloats);
      Vec into_u = load(tiles.into_u + at + w * kTileFloats), into_step = load(tiles.into_step + at + w * kTileFloats);
#pragma GCC unroll 4
      for (int i = w; i < kAll; i += kWide) {
        Sums& both = at_t[i / kWide];
        g[i] = fma(c(t, i), dy, g[i]);
        into_u = fma(g[i], b(t, i), into_u);
        Vec &to_b = kFixedB ? sum_b[i] : both.b, &to_c = kFixedC ? sum_c[i] : both.c;
        to_b = fma(g[i], su, to_b);
        to_c = fma(dy, h[t + 1][i], to_c);
        g[i] = decays[t][i] * g[i];
        const Vec decayed = g[i] * h[t][i];
        into_step = fma(a[i], decayed, into_step);
        sum_a[i] = fma(s, decayed, sum_a[i]);
      }
      store(tiles.into_u + at + w * kTileFloats, into_u);
      store(tiles.into_step + at + w * kTileFloats, into_step);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) sums[i * kScanChunk + t] = at_t[i];
  }
#pragma GCC unroll 4
  for (int i = 0; i < kAll; ++i) {
    const int64_t count = lanes[i % kWide].count;
    store_some(carry + places[i], g[i], count);
    if (back.grad_a != nullptr) add_to(back.grad_a + places[i], sum_a[i], count);
    if (kFixedB && back.grad_b != nullptr) add_to(back.grad_b + places[i], sum_b[i], count);
    if (kFixedC && back.grad_c != nullptr) add_to(back.grad_c + places[i], sum_c[i], count);
  }
}

// What comes before the states of one vector, whose tiles begin at `offset`. Returns the largest exponent of its
// decays.
Vec begin_vector(const SelectiveScanBackwardArgs& back, int64_t steps, Lanes lanes, Tiles& tiles, int64_t offset) {
  const SelectiveScanArgs& args = back.forward;
  const Vec zero(0.0f), d = args.d == nullptr ? zero : load_some(args.d + lanes.first, lanes.count);
  const Vec longest = to_steps(args, lanes, steps, tiles.slope + offset, tiles.step + offset, tiles.slope + offset);
  Vec sum_d = zero, fastest = zero;
  for (int64_t i = offset; i < offset + steps * kWidth; i += kWidth) {
    const Vec u = load(tiles.u + i), dout = load(tiles.out + i);
    Vec through = dout;
    if (args.z.data != nullptr) {
      const auto gate = silu_grad(load(tiles.z + i));
      through = dout * gate.value;
      store(tiles.z + i, dout * gate.grad);
      store(tiles.out + i, gate.value);
    }
    store(tiles.dy + i, through);
    store(tiles.su + i, load(tiles.step + i) * u);
    sum_d = fma(through, u, sum_d);
    store(tiles.y + i, d * u);
    store(tiles.into_u + i, zero);
    store(tiles.into_step + i, zero);
  }
  if (back.grad_d != nullptr) add_to(back.grad_d + lanes.first, sum_d, lanes.count);
  for (int64_t n = 0; n < args.states; ++n) {
    fastest = at_least(abs(load_some(args.a + n * args.channels + lanes.first, lanes.count)), fastest);
  }
  return longest * fastest * Vec(kLog2E);
}

// What comes after them: the gradients, in place.
void end_vector(const SelectiveScanBackwardArgs& back, int64_t steps, Lanes lanes, Tiles& tiles, int64_t offset) {
  const SelectiveScanArgs& args = back.forward;
  const Vec d = args.d == nullptr ? Vec(0.0f) : load_some(args.d + lanes.first, lanes.count);
  Vec sum_bias(0.0f);
  for (int64_t i = offset; i < offset + steps * kWidth; i += kWidth) {
    if (args.z.data != nullptr) {
      const Vec y = load(tiles.y + i);
      store(tiles.z + i, load(tiles.z + i) * y);
      store(tiles.out + i, load(tiles.out + i) * y);
    }
    const Vec into_u = load(tiles.into_u + i), into = fma(load(tiles.u + i), into_u, load(tiles.into_step + i));
    const Vec into_delta = args.softplus ? into * load(tiles.slope + i) : into;
    store(tiles.u + i, fma(load(tiles.step + i), into_u, d * load(tiles.dy + i)));
    store(tiles.slope + i, into_delta);
    sum_bias = sum_bias + into_delta;
  }
  if (back.grad_delta_bias != nullptr) add_to(back.grad_delta_bias + lanes.first, sum_bias, lanes.count);
}

// One block over one chunk; `carry` [states, channels] as above.
template <bool kFixedB, bool kFixedC, class T>
void backward_block(const SelectiveScanBackwardArgs& back, int64_t batch, int64_t chunk, const Block& block,
                    float* carry, const Scratch& own) {
  const SelectiveScanArgs& args = back.forward;
  const int64_t start = chunk * kScanChunk, steps = std::min(args.length - start, kScanChunk), states = args.states;
  const int64_t vectors = block.vectors();
  const bool gated = args.z.data != nullptr;
  Tiles tiles;
  read_tile<T, false, kVectors>(args.u, batch, start, steps, block, tiles.u);
  read_tile<T, false, kVectors>(args.delta, batch, start, steps, block, tiles.slope);
  read_tile<T, false, kVectors>(args.out, batch, start, steps, block, tiles.out);
  if (gated) read_tile<T, false, kVectors>(args.z, batch, start, steps, block, tiles.z);
  const float* saved = args.chunks + (batch * chunk_count(args.length) + chunk) * states * args.channels;
  Ahead<12> ahead;  // of tensors, and of planes of states
  for (const ScanTensor* x :
       {&args.u, &args.delta, &args.out, &args.z, &back.grad_u, &back.grad_delta, &back.grad_z, &back.out_again}) {
    ahead.add<T>(*x, batch, start, steps, block.first, kRow);
  }
  for (const float* plane : {args.a, saved, static_cast<const float*>(carry), static_cast<const float*>(back.grad_a)}) {
    ahead.add<float>({const_cast<float*>(plane), 0, args.channels, 1}, 0, 0, states, block.first, kRow);
  }
  const int64_t groups = vectors / kAbreast + vectors % kAbreast;
  ahead.spread_over(steps * groups * (states / kBeside + states % kBeside));
  Vec largest(0.0f);
  for (int64_t v = 0; v < vectors; ++v) {
    largest = at_least(begin_vector(back, steps, vector_of(block, v), tiles, v * kTileFloats), largest);
  }
  with_decay(largest, [&](const auto& decay) {
    const auto run = [&](auto count, auto wide, int64_t n, int64_t v) {
      backward_states<count(), wide(), kFixedB, kFixedC>(decay, back, block, v, n, steps, own, saved, carry, tiles,
                                                         ahead.next(steps));
    };
    const auto run_all = [&](auto wide, int64_t v) {
      int64_t n = 0;
      for (; n + kBeside <= states; n += kBeside) run(std::integral_constant<int, kBeside>{}, wide, n, v);
      for (; n < states; ++n) run(std::integral_constant<int, 1>{}, wide, n, v);
    };
    int64_t v = 0;
    for (; v + kAbreast <= vectors; v += kAbreast) run_all(std::integral_constant<int, kAbreast>{}, v);
    for (; v < vectors; ++v) run_all(std::integral_constant<int, 1>{}, v);
  });
  for (int64_t v = 0; v < vectors; ++v) end_vector(back, steps, vector_of(block, v), tiles, v * kTileFloats);
  write_tile<T, false, kVectors>(back.grad_u, batch, start, steps, block, tiles.u);
  write_tile<T, false, kVectors>(back.grad_delta, batch, start, steps, block, tiles.slope);
  if (gated) write_tile<T, false, kVectors>(back.grad_z, batch, start, steps, block, tiles.z);
  if (back.out_again.data != nullptr) {
    write_tile<T, false, kVectors>(back.out_again, batch, start, steps, block, tiles.out);
  }
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
