// Selective scan (Mamba): h_t = exp(step a) h_{t-1} + step b u, out = (c . h + d u) silu(z). Bound by arithmetic, one
// exponential per state and step. A block of kWidth channels is one vector, so that no sum runs across lanes; its
// states stay in L1 while time runs, and in a register over a few steps. Channels are shared out to the parts; chunks
// of kScanChunk steps pass through tiles, so that any memory layout of the tensors becomes [step, channel] at the cost
// of one copy through L1.
#include "ssm.h"

namespace deftcore::cpu {
namespace {

// Steps that a state takes at a time: it stays in a register for them, and their exponentials do not wait for each
// other.
constexpr int kTogether = 4;

// All states over some steps from `t`; y [steps, kWidth] collects c . h.
template <int kStates, int kSteps, bool kFixedB, bool kFixedC, class Decay>
void run_states(const Decay& decay, int64_t states, const Vec* a, const float* step, const float* su,
                const Coefficients<kFixedB>& b, const Coefficients<kFixedC>& c, int64_t t, Vec* h, float* y) {
  const int64_t count = kStates > 0 ? kStates : states;
  step += t * kWidth, su += t * kWidth, y += t * kWidth;
  Vec sums[kSteps];
#pragma GCC unroll 8
  for (int i = 0; i < kSteps; ++i) sums[i] = load(y + i * kWidth);
  for (int64_t n = 0; n < count; ++n) {
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

// One block over one chunk; its states come from `last` and go back there.
template <int kStates, bool kFixedB, bool kFixedC, class T>
void scan_block(const SelectiveScanArgs& args, int64_t batch, int64_t chunk, const Block& block) {
  const int64_t states = kStates > 0 ? kStates : args.states, width = args.channels;
  const int64_t start = chunk * kScanChunk, steps = std::min(args.length - start, kScanChunk);
  alignas(64) float su[kTileFloats], step[kTileFloats], z[kTileFloats], y[kTileFloats];
  Vec a[kStates > 0 ? kStates : kMaxStates], h[kStates > 0 ? kStates : kMaxStates];
  float* kept = args.last + batch * states * width + block.first;
  Vec fastest(0.0f);
  for (int64_t n = 0; n < states; ++n) {
    a[n] = load_some(args.a + n * width + block.first, block.count) * Vec(kLog2E);
    h[n] = load_some(kept + n * width, block.count);
    fastest = at_least(abs(a[n]), fastest);
  }
  if (args.chunks != nullptr) {
    float* saved = args.chunks + (batch * chunk_count(args.length) + chunk) * states * width + block.first;
    for (int64_t n = 0; n < states; ++n) store_some(saved + n * width, h[n], block.count);
  }
  read_tile<T, false>(args.u, batch, start, steps, block, su);
  read_tile<T, false>(args.delta, batch, start, steps, block, step);
  if (args.z.data != nullptr) read_tile<T, false>(args.z, batch, start, steps, block, z);
  const Vec longest = to_steps(args, block, steps, step);
  const Vec d = args.d == nullptr ? Vec(0.0f) : load_some(args.d + block.first, block.count);
  for (int64_t i = 0; i < steps * kWidth; i += kWidth) {
    const Vec u = load(su + i);
    store(y + i, d * u);
    store(su + i, load(step + i) * u);
  }
  const Coefficients<kFixedB> b(args, args.b, batch, start, block);
  const Coefficients<kFixedC> c(args, args.c, batch, start, block);
  with_decay(longest * fastest, [&](const auto& decay) {
    int64_t t = 0;
    for (; t + kTogether <= steps; t += kTogether) {
      for (const ScanTensor* x : {&args.u, &args.delta, &args.z, &args.out}) {
        ask_ahead<T>(*x, batch, start + t, kTogether, block);
      }
      run_states<kStates, kTogether>(decay, states, a, step, su, b, c, t, h, y);
    }
    for (; t < steps; ++t) run_states<kStates, 1>(decay, states, a, step, su, b, c, t, h, y);
  });
  for (int64_t i = 0; i < steps * kWidth && args.z.data != nullptr; i += kWidth) {
    store(y + i, load(y + i) * math::activate<Activation::kSilu>(load(z + i)));
  }
  write_tile<T, false>(args.out, batch, start, steps, block, y);
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

}  // namespace

// ----------------------------------------------------------------------------

void DEFTCORE_KERNEL(selective_scan)(const SelectiveScanArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) {
    dispatch_fixed(args, [&](auto fixed_b, auto fixed_c) { scan<fixed_b(), fixed_c(), decltype(t)>(args); });
  });
}

}  // namespace deftcore::cpu
