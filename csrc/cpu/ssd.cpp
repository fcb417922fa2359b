// The scalar-decay scan of Mamba-2: h_t = a_t h_{t-1} + step_t x_t b_t^T, y_t = h_t c_t + d x_t. A head's states go
// through memory once a chunk: with h the state before it and M[t, s] the product of the decays after step s up to t,
//   y_t = a_1 .. a_t h c_t + sum_{s <= t} M[t, s] (c_t . b_s) step_s x_s + d x_t,
// where the products c_t . b_s belong to all heads of a group, and the state after the chunk is another such sum. That
// is two multiply-adds per state and step and half a chunk more per channel and step, where going step by step takes
// three, and all of it are products of register tiles. M comes from products of decays, not from differences of their
// logarithms: it loses nothing, and a decay of 0 is one.
#include "ssd_tile.h"

namespace deftcore::cpu {
namespace {

constexpr int kPanelLines = (kPanel * 4 + 63) / 64 + 1;  // of a row
constexpr int64_t kStateFloats = 32 * 1024;              // of the panels that go through time together

// A part's own memory.
struct Scratch {
  alignas(64) float states[kStateFloats];        // [panels, states, kPanel]
  alignas(64) float b[kScanChunk * kMaxStates];  // of a chunk, [kScanChunk, states]
  alignas(64) float c[kScanChunk * kMaxStates];
  alignas(64) float turned[kMaxStates * kScanChunk];    // b, [states, kScanChunk]
  alignas(64) float products[kScanChunk * kScanChunk];  // c_t . b_s
  alignas(64) float weights[kScanChunk * kScanChunk];   // those times M and step_s
  alignas(64) float x[kTileVecs * kTileFloats];
  alignas(64) float into[kTileVecs * kTileFloats];  // x times what of it reaches the end of the chunk
  alignas(64) float y[kTileVecs * kTileFloats];
  Decays decays;
};
static_assert(kMaxStates * kPanel <= kStateFloats);

// Channels of one head, at most kPanel.
struct Panel : Lanes {
  int64_t head;
};

Panel panel_of(const SsdArgs& args, int64_t index) {
  const int64_t per_head = (args.head_dim + kPanel - 1) / kPanel, offset = index % per_head * kPanel;
  const int64_t head = index / per_head;
  return {{head * args.head_dim + offset, std::min(args.head_dim - offset, kPanel)}, head};
}

// One panel over one chunk.
template <class T>
void scan_panel(const SsdArgs& args, int64_t batch, int64_t start, int64_t steps, const Panel& panel, Scratch& own,
                float* h) {
  const int64_t states = args.states;
  const TileRows x{own.x, kWidth, kTileFloats}, into{own.into, kWidth, kTileFloats}, held{h, kPanel, kWidth};
  Ahead<2 * kPanelLines> ahead;
  const int64_t next = panel.first + kPanel;
  for (const ScanTensor* tensor : {&args.x, &args.out}) {
    ahead.add_rows<T>(*tensor, batch, start, steps, next, std::min(kPanel, args.heads * args.head_dim - next));
  }
  ahead.spread_over((steps + states) / kTileRows);
  read_tile<T, false, kTileVecs>(args.x, batch, start, steps, panel, own.x);
  Vec d[kTileVecs];
  for (int v = 0; v < kTileVecs; ++v) {
    const Lanes lanes = vector_of(panel, v);
    d[v] = args.d == nullptr ? Vec(0.0f) : load_some(args.d + lanes.first, lanes.count);
    for (int64_t s = 0; s < steps; ++s) {
      const Vec factor(own.decays.to_end[s] * own.decays.step[s]);
      store(own.into + v * kTileFloats + s * kWidth, factor * x.at(s, v));
    }
  }
  for_tiles(steps, [&](auto& tile, int64_t t) {
    ahead.next(1).one();
    tile.clear();
    tile.add({own.c + t * states, states, 1}, held, 0, states);
    int64_t i = t;
    for (auto& sums : tile.sums) {
      for (int v = 0; v < kTileVecs; ++v) sums[v] = fma(Vec(own.decays.from_start[i]), sums[v], d[v] * x.at(i, v));
      ++i;
    }
    tile.add_lower({own.weights + t * kScanChunk, kScanChunk, 1}, x, t);
    tile.keep(own.y + t * kWidth, kWidth, kTileFloats);
  });
  write_tile<T, false, kTileVecs>(args.out, batch, start, steps, panel, own.y);
  const float whole = own.decays.whole(steps);
  for_tiles(states, [&](auto& tile, int64_t n) {
    ahead.next(1).one();
    tile.read(h + n * kPanel, kPanel);
    tile.scale(&whole, 0);
    tile.add({own.b + n, 1, states}, into, 0, steps);
    tile.keep(h + n * kPanel, kPanel);
  });
}

// Some panels of one group, all their steps.
template <class T>
void scan_panels(const SsdArgs& args, int64_t batch, int64_t group, Range panels, Scratch& own) {
  const int64_t states = args.states, row = args.groups * states, floats = states * kPanel;
  const auto each_vector = [&](auto&& fn) {
    for (int64_t i = panels.begin; i < panels.end; ++i) {
      for (int v = 0; v < kTileVecs; ++v) {
        const Lanes lanes = vector_of(panel_of(args, i), v);
        const int64_t at = (batch * args.heads * args.head_dim + lanes.first) * states;
        fn(own.states + (i - panels.begin) * floats + v * kWidth, at, lanes.count);
      }
    }
  };
  std::fill_n(own.states, (panels.end - panels.begin) * floats, 0.0f);
  if (args.first != nullptr) {
    each_vector([&](float* h, int64_t at, int64_t count) { turn(args.first + at, states, count, states, h, kPanel); });
  }
  for (int64_t start = 0; start < args.length; start += kScanChunk) {
    const int64_t steps = std::min(args.length - start, kScanChunk);
    const int64_t place = (batch * args.length + start) * row + group * states;
    for (int64_t t = 0; t < steps; ++t) {  // groups side by side may be a power of two apart
      std::copy_n(args.b + place + t * row, states, own.b + t * states);
      std::copy_n(args.c + place + t * row, states, own.c + t * states);
    }
    multiply_steps(own.c, states, own.b, states, steps, states, own.turned, own.products);
    int64_t head = -1;
    for (int64_t i = panels.begin; i < panels.end; ++i) {
      const Panel panel = panel_of(args, i);
      if (panel.head != head) {
        head = panel.head;
        own.decays.read(args, batch, head, start, steps);
        for (int64_t t = 0; t < steps; ++t) {
          for (int64_t s = 0; s <= t; s += kWidth) {
            const int64_t at = t * kScanChunk + s;
            const Vec reaches = load(own.decays.between + at) * load(own.decays.step + s);
            store(own.weights + at, reaches * load(own.products + at));
          }
        }
      }
      scan_panel<T>(args, batch, start, steps, panel, own, own.states + (i - panels.begin) * floats);
    }
  }
  each_vector(
      [&](const float* h, int64_t at, int64_t count) { turn(h, kPanel, states, count, args.last + at, states); });
}

}  // namespace

// ----------------------------------------------------------------------------

void DEFTCORE_KERNEL(ssd)(const SsdArgs& args) {
  const int64_t in_group = args.heads / args.groups * ((args.head_dim + kPanel - 1) / kPanel);
  const int64_t units = args.batch * args.groups * in_group, together = kStateFloats / (args.states * kPanel);
  const int parts = parts_for(args.batch * args.length * args.heads * args.head_dim * args.states);
  dispatch_dtype(args.dtype, [&](auto t) {
    for_parts(parts, [&](int part) {
      const Range mine = share(units, parts, part);
      Scratch own;
      for (int64_t begin = mine.begin; begin < mine.end;) {
        const int64_t index = begin / in_group, end = std::min({mine.end, (index + 1) * in_group, begin + together});
        const int64_t batch = index / args.groups, first = batch * args.groups * in_group;
        scan_panels<decltype(t)>(args, batch, index % args.groups, {begin - first, end - first}, own);
        begin = end;
      }
    });
  });
}

}  // namespace deftcore::cpu
