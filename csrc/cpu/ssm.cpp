// Selective scan (Mamba): h_t = exp(step a) h_{t-1} + step b u, out = (c . h + d u) silu(z). Bound by arithmetic, one
// exponential per state and step. Lanes are channels, so that no sum runs across lanes; a block's states stay in L1
// while time runs, and in a register over a few steps. Channels are shared out to the parts; chunks of kScanChunk steps
// pass through tiles, so that any memory layout of the tensors becomes [step, channel] at the cost of one copy through
// L1.
//
// The least that it takes: per vector of a state's step nine operations of the two multiply-add pipes on AVX2 (three
// for the recurrence, six for the decay, whose other four run beside them), hence 4.5 cycles. Measured there, of 16
// states: 5.1 in the loop over the states, 1.7 in passes over the tiles, 1.5 in softplus and SiLU, 0.5 for memory.
#include "ssm.h"

namespace deftcore::cpu {
namespace {

// Steps that a state takes at a time: it stays in a register for them, and their exponentials do not wait for each
// other.
constexpr int kTogether = 4;

// b and c of a group over a chunk, see `turn`; not filled where fixed.
struct Turned {
  alignas(64) float b[kMaxStates * kScanChunk];
  alignas(64) float c[kMaxStates * kScanChunk];
};

// All states of one vector over some steps from `t`; y [steps, kWidth] collects c . h.
template <int kStates, int kSteps, bool kFixedB, bool kFixedC, class Decay>
void run_states(const Decay& decay, int64_t states, const Vec* a, const float* step, const float* su,
                const Coefficients<kFixedB>& b, const Coefficients<kFixedC>& c, int64_t t, Asks asks, Vec* h,
                float* y) {
  const int64_t count = kStates > 0 ? kStates : states;
  step += t * kWidth, su += t * kWidth, y += t * kWidth;
  Vec sums[kSteps];
#pragma GCC unroll 8
  for (int i = 0; i < kSteps; ++i) sums[i] = load(y + i * kWidth);
  for (int64_t n = 0; n < count; ++n) {
    asks.one();
    const Vec rate = a[n];
    Vec state = h[n];
#pragma GCC unroll 8
    for (int i = 0; i < kSteps; ++i) {
      state = fma(decay(load(step + i * kWidth), rate), state, load(su + i * kWidth) * b.at(t + i, n));
      sums[i] = fma(c.at(t + i, n), state, sums[i]);
    }
    h[n] = state;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kSteps; ++i) store(y + i * kWidth, sums[i]);
}

// A block's tiles over a chunk, vector by vector.
struct Tiles {
  alignas(64) float su[kBlockFloats];  // u, then step u
  alignas(64) float step[kBlockFloats];
  alignas(64) float z[kBlockFloats];
  alignas(64) float y[kBlockFloats];
};

// One vector of a block over one chunk, whose tiles begin at `offset`; its states come from `last` and go back there.
template <int kStates, bool kFixedB, bool kFixedC>
void scan_vector(const SelectiveScanArgs& args, int64_t batch, int64_t chunk, int64_t steps, Lanes lanes,
                 const Turned& turned, Tiles& tiles, int64_t offset, Ahead<4>& ahead) {
  const int64_t states = kStates > 0 ? kStates : args.states, width = args.channels;
  float *su = tiles.su + offset, *step = tiles.step + offset, *z = tiles.z + offset, *y = tiles.y + offset;
  Vec a[kStates > 0 ? kStates : kMaxStates], h[kStates > 0 ? kStates : kMaxStates];
  float* kept = args.last + batch * states * width + lanes.first;
  Vec fastest(0.0f);
  for (int64_t n = 0; n < states; ++n) {
    a[n] = load_some(args.a + n * width + lanes.first, lanes.count) * Vec(kLog2E);
    h[n] = load_some(kept + n * width, lanes.count);
    fastest = at_least(abs(a[n]), fastest);
  }
  if (args.chunks != nullptr) {
    float* saved = args.chunks + (batch * chunk_count(args.length) + chunk) * states * width + lanes.first;
    for (int64_t n = 0; n < states; ++n) store_some(saved + n * width, h[n], lanes.count);
  }
  const Vec longest = to_steps(args, lanes, steps, step, step, nullptr);
  const Vec d = args.d == nullptr ? Vec(0.0f) : load_some(args.d + lanes.first, lanes.count);
  for (int64_t i = 0; i < steps * kWidth; i += kWidth) {
    const Vec u = load(su + i);
    store(y + i, d * u);
    store(su + i, load(step + i) * u);
  }
  const Coefficients<kFixedB> b(args, args.b, turned.b, lanes);
  const Coefficients<kFixedC> c(args, args.c, turned.c, lanes);
  with_decay(longest * fastest, [&](const auto& decay) {
    int64_t t = 0;
    for (; t + kTogether <= steps; t += kTogether) {
      run_states<kStates, kTogether>(decay, states, a, step, su, b, c, t, ahead.next(states), h, y);
    }
    for (; t < steps; ++t) run_states<kStates, 1>(decay, states, a, step, su, b, c, t, ahead.next(states), h, y);
  });
  for (int64_t i = 0; i < steps * kWidth && args.z.data != nullptr; i += kWidth) {
    store(y + i, load(y + i) * silu(load(z + i)));
  }
  for (int64_t n = 0; n < states; ++n) store_some(kept + n * width, h[n], lanes.count);
}

template <int kStates, bool kFixedB, bool kFixedC, class T>
void scan_block(const SelectiveScanArgs& args, int64_t batch, int64_t chunk, const Block& block, const Turned& turned) {
  const int64_t start = chunk * kScanChunk, steps = std::min(args.length - start, kScanChunk);
  const int64_t vectors = block.vectors();
  Tiles tiles;
  read_tile<T, false, kVectors>(args.u, batch, start, steps, block, tiles.su);
  read_tile<T, false, kVectors>(args.delta, batch, start, steps, block, tiles.step);
  if (args.z.data != nullptr) read_tile<T, false, kVectors>(args.z, batch, start, steps, block, tiles.z);
  Ahead<4> ahead;
  for (const ScanTensor* x : {&args.u, &args.delta, &args.z, &args.out}) {
    ahead.add<T>(*x, batch, start, steps, block.first, kRow);
  }
  ahead.spread_over(vectors * args.states * (steps / kTogether + steps % kTogether));
  for (int64_t v = 0; v < vectors; ++v) {
    scan_vector<kStates, kFixedB, kFixedC>(args, batch, chunk, steps, vector_of(block, v), turned, tiles,
                                           v * kTileFloats, ahead);
  }
  write_tile<T, false, kVectors>(args.out, batch, start, steps, block, tiles.y);
}

template <bool kFixedB, bool kFixedC, class T>
void scan(const SelectiveScanArgs& args) {
  const int64_t blocks = block_count(args), units = args.batch * blocks, plane = args.states * args.channels;
  const int64_t bytes = args.batch * args.length * args.channels * args.states;
  const int parts = parts_for(bytes);
  for_parts(parts, [&](int part) {
    const Range mine = share(units, parts, part);
    Turned turned;
    for (int64_t begin = mine.begin; begin < mine.end;) {
      const int64_t batch = begin / blocks, end = std::min(mine.end, (batch + 1) * blocks);
      for (int64_t i = begin; i < end; ++i) {
        const Block block = block_of(args, i % blocks);
        for (int64_t n = 0; n < args.states; ++n) {
          const int64_t place = batch * plane + n * args.channels + block.first;
          if (args.first == nullptr) {
            std::fill_n(args.last + place, block.count, 0.0f);
          } else {
            std::copy_n(args.first + place, block.count, args.last + place);
          }
        }
      }
      for (int64_t chunk = 0; chunk < chunk_count(args.length); ++chunk) {
        const int64_t start = chunk * kScanChunk, steps = std::min(args.length - start, kScanChunk);
        int64_t group = -1;
        for (int64_t i = begin; i < end; ++i) {
          const Block block = block_of(args, i % blocks);
          if (block.group != group) {
            group = block.group;
            if (!kFixedB) turn(args, args.b, batch, group, start, steps, turned.b);
            if (!kFixedC) turn(args, args.c, batch, group, start, steps, turned.c);
          }
          if (args.states == 16) {
            scan_block<16, kFixedB, kFixedC, T>(args, batch, chunk, block, turned);
          } else {
            scan_block<0, kFixedB, kFixedC, T>(args, batch, chunk, block, turned);
          }
        }
      }
      begin = end;
    }
  });
}

}  // namespace

// ----------------------------------------------------------------------------

void DEFTCORE_KERNEL(selective_scan)(const SelectiveScanArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) {
    dispatch_fixed(args, [&](auto fixed_b, auto fixed_c) { scan<fixed_b(), fixed_c(), decltype(t)>(args); });
  });
}

}  // namespace deftcore::cpu
