// The scalar-decay scan of Mamba-2, step by step: h_t = a_t h_{t-1} + step_t x_t b_t^T, y_t = h_t c_t + d x_t. With one
// decay per head the recurrence costs as many operations as the chunked form's matrix products, needs no exponential
// per state and no cumulative sums. The forward runs along channels (no sum crosses lanes), the backward along states,
// where the sums over channels that b and c need are plain accumulations. The backward first runs forward again for the
// states between chunks, head by head, so that nothing but the inputs is kept.
#include "deftcore/workspace.h"
#include "scan_tile.h"

namespace deftcore::cpu {
namespace {

constexpr int kStateBlock = kRegisters / 2;  // states in registers
constexpr int kQuad = 4;                     // channels side by side in the backward

// Some states of one block of channels over a chunk; y [steps, kWidth] collects c . h.
template <int kCount>
void run_states(const float* b, const float* c, int64_t row, const float* decay, const float* su, int64_t steps,
                int64_t count, Vec* h, float* y) {
  Vec state[kCount];
  for (int i = 0; i < kCount; ++i) state[i] = i < count ? h[i] : Vec(0.0f);
  for (int64_t t = 0; t < steps; ++t) {
    const Vec a(decay[t]), s = load(su + t * kWidth);
    Vec even = load(y + t * kWidth), odd(0.0f);
    for (int i = 0; i < kCount; ++i) {
      state[i] = fma(a, state[i], s * Vec(b[t * row + i]));
      Vec& sum = i % 2 ? odd : even;
      sum = fma(Vec(c[t * row + i]), state[i], sum);
    }
    store(y + t * kWidth, even + odd);
  }
  for (int i = 0; i < kCount && i < count; ++i) h[i] = state[i];
}

template <class T>
void forward_block(const SsdArgs& args, int64_t batch, int64_t head, Lanes lanes) {
  const int64_t states = args.states, group = head * args.groups / args.heads, row = args.groups * states;
  Vec h[kMaxStates];
  const int64_t plane = (batch * args.heads * args.head_dim + lanes.first) * states;
  for (int64_t n = 0; n < states; ++n) {
    alignas(64) float column[kWidth] = {};
    for (int64_t j = 0; j < lanes.count && args.first != nullptr; ++j) column[j] = args.first[plane + j * states + n];
    h[n] = load(column);
  }
  const Vec d = args.d == nullptr ? Vec(0.0f) : load_some(args.d + lanes.first, lanes.count);
  alignas(64) float su[kTileFloats], y[kTileFloats], decay[kScanChunk];
  for (int64_t start = 0; start < args.length; start += kScanChunk) {
    const int64_t steps = std::min(args.length - start, kScanChunk);
    read_tile<T>(args.x, batch, start, steps, lanes, su);
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t at = (batch * args.length + start + t) * args.heads + head;
      const Vec x = load(su + t * kWidth);
      decay[t] = std::exp(args.log_decay[at]);
      store(y + t * kWidth, d * x);
      store(su + t * kWidth, Vec(args.step[at]) * x);
    }
    const int64_t place = (batch * args.length + start) * row + group * states;
    int64_t n = 0;
    for (; n + kStateBlock <= states; n += kStateBlock) {
      run_states<kStateBlock>(args.b + place + n, args.c + place + n, row, decay, su, steps, kStateBlock, h + n, y);
    }
    for (; n < states; ++n) run_states<1>(args.b + place + n, args.c + place + n, row, decay, su, steps, 1, h + n, y);
    write_tile<T>(args.out, batch, start, steps, lanes, y);
  }
  for (int64_t n = 0; n < states; ++n) {
    alignas(64) float column[kWidth];
    store(column, h[n]);
    for (int64_t j = 0; j < lanes.count; ++j) args.last[plane + j * states + n] = column[j];
  }
}

// ---------------------------------------------------------------------------- backward

// A part's own memory; states and channels are padded with zeros to whole vectors and quads.
struct Scratch {
  int64_t states, channels;
  Vec* h;       // [kScanChunk + 1, kQuad]
  Vec* into_x;  // [kScanChunk, kQuad], sums of g b
  Vec* into_a;  // [kScanChunk], sums of a g h
  float* b;     // [kScanChunk, states]; the next three likewise
  float* c;
  float* sum_b;
  float* sum_c;
  float* x;   // [kScanChunk, channels]; the next three likewise
  float* sx;  // step x
  float* dy;
  float* dx;      // of step x
  float* g;       // [channels, states]
  float* sums;    // [2 partial groups, b or c, length, states] (see Targets)
  float* bounds;  // [chunks, at least 1, channels, states], states before each chunk
};

Scratch lay_out(const SsdArgs& args, Workspace& room) {
  Scratch s{};
  s.states = round_up(args.states, kWidth);
  s.channels = round_up(args.head_dim, kQuad);
  s.h = room.take<Vec>((kScanChunk + 1) * kQuad);
  s.into_x = room.take<Vec>(kScanChunk * kQuad);
  s.into_a = room.take<Vec>(kScanChunk);
  for (float** tile : {&s.b, &s.c, &s.sum_b, &s.sum_c}) *tile = room.take<float>(kScanChunk * s.states);
  for (float** tile : {&s.x, &s.sx, &s.dy, &s.dx}) *tile = room.take<float>(kScanChunk * s.channels);
  s.g = room.take<float>(s.channels * s.states);
  s.sums = room.take<float>(4 * args.length * args.states);
  s.bounds = room.take<float>(std::max<int64_t>(chunk_count(args.length), 1) * s.channels * s.states);
  return s;
}

int64_t bytes_of_part(const SsdArgs& args) {
  return static_cast<int64_t>(bytes_of([&](Workspace& room) { lay_out(args, room); }));
}

// [steps, channels] of one head as floats.
template <class T>
void read_head(const ScanTensor& x, int64_t batch, int64_t start, int64_t steps, int64_t head, int64_t count,
               int64_t width, float* tile) {
  const T* from = static_cast<const T*>(x.data) + batch * x.batch + start * x.time + head * count * x.channel;
  for (int64_t t = 0; t < steps; ++t) {
    for (int64_t p = 0; p < count; ++p) tile[t * width + p] = to_float(from[t * x.time + p * x.channel]);
    std::fill(tile + t * width + count, tile + (t + 1) * width, 0.0f);
  }
}

template <class T>
void write_head(const ScanTensor& x, int64_t batch, int64_t time, int64_t head, int64_t count, const float* row) {
  T* to = static_cast<T*>(x.data) + batch * x.batch + time * x.time + head * count * x.channel;
  for (int64_t p = 0; p < count; p += kWidth) {
    T narrow[kWidth];
    const int64_t some = std::min<int64_t>(count - p, kWidth);
    store(narrow, load_some(row + p, some));
    for (int64_t j = 0; j < some; ++j) to[(p + j) * x.channel] = narrow[j];
  }
}

void read_rows(const float* from, int64_t row, int64_t steps, int64_t count, int64_t width, float* tile) {
  for (int64_t t = 0; t < steps; ++t) {
    std::copy(from + t * row, from + t * row + count, tile + t * width);
    std::fill(tile + t * width + count, tile + (t + 1) * width, 0.0f);
  }
}

// Where a head's sums for b and c go: straight to the result where one part has the whole group, else to its sums.
struct Targets {
  float *b, *c;
  int64_t row;
};

// One head's step values over a chunk.
struct Steps {
  float step[kScanChunk], decay[kScanChunk];
};

template <class T>
void read_chunk(const SsdArgs& args, int64_t batch, int64_t head, int64_t start, int64_t steps, const Scratch& own,
                Steps& at) {
  const int64_t row = args.groups * args.states, group = head * args.groups / args.heads;
  const int64_t place = (batch * args.length + start) * row + group * args.states;
  read_rows(args.b + place, row, steps, args.states, own.states, own.b);
  read_head<T>(args.x, batch, start, steps, head, args.head_dim, own.channels, own.x);
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t i = (batch * args.length + start + t) * args.heads + head;
    at.step[t] = args.step[i];
    at.decay[t] = std::exp(args.log_decay[i]);
    for (int64_t p = 0; p < own.channels; ++p) own.sx[t * own.channels + p] = at.step[t] * own.x[t * own.channels + p];
  }
}

// The states of kQuad channels and one vector of states over a chunk, from `from`; all of them go to `h`.
void run_quad(const Scratch& own, const Steps& at, int64_t steps, int64_t p, int64_t n, const float* from, Vec* h) {
  for (int q = 0; q < kQuad; ++q) h[q] = load(from + q * own.states);
  for (int64_t t = 0; t < steps; ++t) {
    const Vec a(at.decay[t]), b = load(own.b + t * own.states + n);
    const float* sx = own.sx + t * own.channels + p;
    for (int q = 0; q < kQuad; ++q) h[(t + 1) * kQuad + q] = fma(a, h[t * kQuad + q], Vec(sx[q]) * b);
  }
}

// The adjoint over the same: g_t = c_t dy_t + a_{t+1} g_{t+1}; `g` comes and goes as a_{t+1} g_{t+1}.
void reverse_quad(const Scratch& own, const Steps& at, int64_t steps, int64_t p, int64_t n, float* carry) {
  Vec g[kQuad];
  for (int q = 0; q < kQuad; ++q) g[q] = load(carry + q * own.states);
  for (int64_t t = steps - 1; t >= 0; --t) {
    const Vec a(at.decay[t]), b = load(own.b + t * own.states + n), c = load(own.c + t * own.states + n);
    const float *sx = own.sx + t * own.channels + p, *dy = own.dy + t * own.channels + p;
    Vec sum_b = load(own.sum_b + t * own.states + n), sum_c = load(own.sum_c + t * own.states + n);
    Vec sum_a = own.into_a[t];
    for (int q = 0; q < kQuad; ++q) {
      const Vec d(dy[q]);
      g[q] = fma(c, d, g[q]);
      sum_b = fma(g[q], Vec(sx[q]), sum_b);
      sum_c = fma(own.h[(t + 1) * kQuad + q], d, sum_c);
      own.into_x[t * kQuad + q] = fma(g[q], b, own.into_x[t * kQuad + q]);
      g[q] = a * g[q];
      sum_a = fma(g[q], own.h[t * kQuad + q], sum_a);
    }
    store(own.sum_b + t * own.states + n, sum_b);
    store(own.sum_c + t * own.states + n, sum_c);
    own.into_a[t] = sum_a;
  }
  for (int q = 0; q < kQuad; ++q) store(carry + q * own.states, g[q]);
}

template <class T>
void backward_head(const SsdBackwardArgs& back, int64_t batch, int64_t head, const Scratch& own,
                   const Targets& targets) {
  const SsdArgs& args = back.forward;
  const int64_t plane = own.channels * own.states, width = own.channels, dim = args.head_dim;
  const int64_t row = args.groups * args.states, group = head * args.groups / args.heads;
  const int64_t place = (batch * args.heads + head) * dim * args.states;
  float* grad_first = back.grad_first + place;
  std::fill(own.bounds, own.bounds + plane, 0.0f);
  std::fill(own.g, own.g + plane, 0.0f);
  for (int64_t p = 0; p < dim; ++p) {
    if (args.first != nullptr) {
      std::copy_n(args.first + place + p * args.states, args.states, own.bounds + p * own.states);
    }
    std::copy_n(grad_first + p * args.states, args.states, own.g + p * own.states);
  }
  Steps at;
  for (int64_t chunk = 0; chunk + 1 < chunk_count(args.length); ++chunk) {
    read_chunk<T>(args, batch, head, chunk * kScanChunk, kScanChunk, own, at);
    for (int64_t p = 0; p < width; p += kQuad) {
      for (int64_t n = 0; n < own.states; n += kWidth) {
        const float* from = own.bounds + chunk * plane + p * own.states + n;
        run_quad(own, at, kScanChunk, p, n, from, own.h);
        for (int q = 0; q < kQuad; ++q) {
          store(own.bounds + (chunk + 1) * plane + (p + q) * own.states + n, own.h[kScanChunk * kQuad + q]);
        }
      }
    }
  }
  for (int64_t chunk = chunk_count(args.length) - 1; chunk >= 0; --chunk) {
    const int64_t start = chunk * kScanChunk, steps = std::min(args.length - start, kScanChunk);
    read_chunk<T>(args, batch, head, start, steps, own, at);
    const int64_t first = (batch * args.length + start) * row + group * args.states;
    read_rows(args.c + first, row, steps, args.states, own.states, own.c);
    read_head<T>(args.out, batch, start, steps, head, dim, width, own.dy);
    std::fill(own.sum_b, own.sum_b + steps * own.states, 0.0f);
    std::fill(own.sum_c, own.sum_c + steps * own.states, 0.0f);
    std::fill(own.into_a, own.into_a + steps, Vec(0.0f));
    for (int64_t p = 0; p < width; p += kQuad) {
      std::fill(own.into_x, own.into_x + steps * kQuad, Vec(0.0f));
      for (int64_t n = 0; n < own.states; n += kWidth) {
        run_quad(own, at, steps, p, n, own.bounds + chunk * plane + p * own.states + n, own.h);
        reverse_quad(own, at, steps, p, n, own.g + p * own.states + n);
      }
      for (int64_t i = 0; i < steps * kQuad; ++i) {
        own.dx[i / kQuad * width + p + i % kQuad] = reduce_add(own.into_x[i]);
      }
    }
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t i = (batch * args.length + start + t) * args.heads + head;
      float into_step = 0.0f;
      float* dx = own.dx + t * width;
      const float *x = own.x + t * width, *dy = own.dy + t * width;
      for (int64_t p = 0; p < dim; ++p) {
        into_step += dx[p] * x[p];
        dx[p] *= at.step[t];
        if (args.d != nullptr) dx[p] += args.d[head * dim + p] * dy[p];
        if (back.grad_d != nullptr) back.grad_d[head * dim + p] += dy[p] * x[p];
      }
      back.grad_step[i] = into_step;
      back.grad_log_decay[i] = reduce_add(own.into_a[t]);
      write_head<T>(back.grad_x, batch, start + t, head, dim, dx);
      float *to_b = targets.b + (start + t) * targets.row, *to_c = targets.c + (start + t) * targets.row;
      for (int64_t n = 0; n < args.states; ++n) {
        to_b[n] += own.sum_b[t * own.states + n];
        to_c[n] += own.sum_c[t * own.states + n];
      }
    }
  }
  for (int64_t p = 0; p < dim; ++p) {
    std::copy_n(own.g + p * own.states, args.states, grad_first + p * args.states);
  }
}

// A part's heads touch at most two groups that it shares with others: its first and its last.
struct Shared {
  int64_t first, last;  // -1: not shared
  Shared(const SsdArgs& args, Range heads) : first(-1), last(-1) {
    if (heads.begin >= heads.end) return;
    const int64_t size = args.heads / args.groups;
    if (heads.begin % size != 0 || heads.end < (heads.begin / size + 1) * size) first = heads.begin / size;
    if (heads.end % size != 0 && (heads.end - 1) / size != first) last = (heads.end - 1) / size;
  }
};

template <class T>
void backward(const SsdBackwardArgs& back) {
  const SsdArgs& args = back.forward;
  const int64_t plane = args.length * args.states, per_part = bytes_of_part(args);
  const int parts = parts_for(args.batch * args.length * args.heads * args.head_dim * args.states);
  const auto scratch_of = [&](int part) {
    Workspace room(static_cast<char*>(back.workspace) + part * per_part);
    return lay_out(args, room);
  };
  parallel(parts, [&](Team& team) {
    for (int64_t batch = 0; batch < args.batch; ++batch) {
      team.stage([&](int part) {
        const Scratch own = scratch_of(part);
        const Range heads = share(args.heads, parts, part);
        const Shared shared(args, heads);
        std::fill(own.sums, own.sums + 4 * plane, 0.0f);
        for (int64_t head = heads.begin; head < heads.end; ++head) {
          const int64_t group = head * args.groups / args.heads;
          const int64_t place = (batch * args.length * args.groups + group) * args.states;
          Targets targets{back.grad_b + place, back.grad_c + place, args.groups * args.states};
          if (group == shared.first) targets = {own.sums, own.sums + plane, args.states};
          if (group == shared.last) targets = {own.sums + 2 * plane, own.sums + 3 * plane, args.states};
          backward_head<T>(back, batch, head, own, targets);
        }
      });
      team.stage([&](int part) {
        const Range times = share(args.length, parts, part);
        for (int other = 0; other < parts; ++other) {
          const Scratch theirs = scratch_of(other);
          const Shared groups(args, share(args.heads, parts, other));
          for (int side = 0; side < 2; ++side) {
            const int64_t group = side == 0 ? groups.first : groups.last;
            if (group < 0) continue;
            const float* from = theirs.sums + 2 * side * plane;
            for (int64_t t = times.begin; t < times.end; ++t) {
              const int64_t to = ((batch * args.length + t) * args.groups + group) * args.states;
              for (int64_t n = 0; n < args.states; ++n) {
                back.grad_b[to + n] += from[t * args.states + n];
                back.grad_c[to + n] += from[plane + t * args.states + n];
              }
            }
          }
        }
      });
    }
  });
}

}  // namespace

// ----------------------------------------------------------------------------

void DEFTCORE_KERNEL(ssd)(const SsdArgs& args) {
  const int64_t blocks = (args.head_dim + kWidth - 1) / kWidth, units = args.batch * args.heads * blocks;
  const int64_t bytes = args.batch * args.length * args.heads * args.head_dim * args.states;
  dispatch_dtype(args.dtype, [&](auto t) {
    for_range(units, bytes, [&](int64_t i) {
      const int64_t head = i / blocks % args.heads, offset = i % blocks * kWidth;
      const Lanes lanes{head * args.head_dim + offset, std::min<int64_t>(args.head_dim - offset, kWidth)};
      forward_block<decltype(t)>(args, i / blocks / args.heads, head, lanes);
    });
  });
}

size_t DEFTCORE_KERNEL(ssd_backward_workspace)(const SsdBackwardArgs& args) {
  return static_cast<size_t>(most_parts() * bytes_of_part(args.forward));
}

void DEFTCORE_KERNEL(ssd_backward)(const SsdBackwardArgs& args) {
  dispatch_dtype(args.forward.dtype, [&](auto t) { backward<decltype(t)>(args); });
}

}  // namespace deftcore::cpu
