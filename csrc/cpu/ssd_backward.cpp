// The backward of Mamba-2's scan, by chunks like the forward: it first runs forward again for the states between
// chunks, head by head, so that nothing but the inputs is kept, then takes the chunks from the last to the first. With
// g the gradient of the state after a chunk, h the state before it, u_s = step_s x_s and K[t, s] = dy_t . u_s:
//   du_s = a_{s+1} .. a_end g b_s + sum_{t >= s} M[t, s] (c_t . b_s) dy_t
//   db_s = a_{s+1} .. a_end g^T u_s + sum_{t >= s} M[t, s] K[t, s] c_t
//   dc_t = a_1 .. a_t h^T dy_t + sum_{s <= t} M[t, s] K[t, s] b_s
// The sums of the last two over the heads of a group need only their M K, added up. The gradient of a decay's logarithm
// is the sum of all terms that it multiplies; nothing is subtracted.
#include "deftcore/workspace.h"
#include "ssd_tile.h"

namespace deftcore::cpu {
namespace {

constexpr int64_t kSquare = kScanChunk * kScanChunk;
constexpr int kAsked = 16;  // lines of each step that are asked for ahead

// A part's own memory; states and channels are padded with zeros to whole panels.
struct Scratch {
  int64_t states, channels;
  Decays* decays;
  Ahead<kAsked>* ahead;
  float* b;  // [kScanChunk, states]; the next three likewise
  float* c;
  float* grad_b;
  float* grad_c;
  float* x;  // [kScanChunk, channels]; the next four likewise
  float* u;  // step x
  float* dy;
  float* du;
  float* faded;     // u or dy times the decay between it and the end or the start
  float* turned;    // [states or channels, kScanChunk]
  float* k;         // [kScanChunk, kScanChunk]; the next likewise
  float* into_u;    // M c . b
  float* g;         // [channels, states]
  float* g_turned;  // [states, channels]
  float* products;  // [chunks, kScanChunk, kScanChunk], c_t . b_s of the group; the next likewise
  float* mixed;     // M K, over the heads of a group
  float* sums;      // [2 partial groups, b or c, length, states] (see Targets)
  float* bounds;    // [chunks, at least 1, channels, states], states before each chunk
};

Scratch lay_out(const SsdArgs& args, Workspace& room) {
  const int64_t chunks = std::max<int64_t>(chunk_count(args.length), 1);
  Scratch s{};
  s.states = round_up(args.states, kPanel);
  s.channels = round_up(args.head_dim, kPanel);
  s.decays = room.take<Decays>(1);
  s.ahead = room.take<Ahead<kAsked>>(1);
  for (float** tile : {&s.b, &s.c, &s.grad_b, &s.grad_c}) *tile = room.take<float>(kScanChunk * s.states);
  for (float** tile : {&s.x, &s.u, &s.dy, &s.du, &s.faded}) *tile = room.take<float>(kScanChunk * s.channels);
  s.turned = room.take<float>(kScanChunk * std::max(s.states, s.channels));
  for (float** square : {&s.k, &s.into_u}) *square = room.take<float>(kSquare);
  for (float** plane : {&s.g, &s.g_turned}) *plane = room.take<float>(s.channels * s.states);
  for (float** squares : {&s.products, &s.mixed}) *squares = room.take<float>(chunks * kSquare);
  s.sums = room.take<float>(4 * args.length * args.states);
  s.bounds = room.take<float>(chunks * s.channels * s.states);
  return s;
}

int64_t bytes_of_part(const SsdArgs& args) {
  return static_cast<int64_t>(bytes_of([&](Workspace& room) { lay_out(args, room); }));
}

// A chunk of b or c of a group as [steps, states]: where it stands, or in `tile`.
const float* rows_of(const SsdArgs& args, const float* data, int64_t batch, int64_t group, int64_t start,
                     const Scratch& own, float* tile) {
  const int64_t states = args.states, row = args.groups * states;
  const float* from = data + (batch * args.length + start) * row + group * states;
  if (args.groups == 1 && states == own.states) return from;
  for (int64_t t = 0; t < std::min(args.length - start, kScanChunk); ++t) {
    std::copy_n(from + t * row, states, tile + t * own.states);
    std::fill(tile + t * own.states + states, tile + (t + 1) * own.states, 0.0f);
  }
  return tile;
}

// to[t] = factors[t] from[t], rows of `width`.
void scale_rows(const float* from, const float* factors, int64_t steps, int64_t width, float* to) {
  for (int64_t t = 0; t < steps; ++t) {
    for (int64_t i = t * width; i < (t + 1) * width; i += kWidth) store(to + i, Vec(factors[t]) * load(from + i));
  }
}

// to = whole from + sum over the steps of faded_t rows_t^T, [channels, states].
void move_on(const Scratch& own, int64_t channels, float whole, const float* from, const float* rows, int64_t steps,
             float* to) {
  for (int64_t n = 0; n < own.states; n += kPanel) {
    for_tiles(channels, [&](auto& tile, int64_t p) {
      own.ahead->next(1).one();
      tile.read(from + p * own.states + n, own.states);
      tile.scale(&whole, 0);
      tile.add({own.faded + p, 1, own.channels}, {rows + n, own.states, kWidth}, 0, steps);
      tile.keep(to + p * own.states + n, own.states);
    });
  }
}

// to[t] = factors[t] times the sum of x[t, k] matrix[k] over `count` rows of the matrix, [steps, width].
void multiply(const Scratch& own, const float* x, int64_t x_row, const float* matrix, int64_t count, int64_t width,
              const float* factors, int64_t steps, float* to) {
  for (int64_t j = 0; j < width; j += kPanel) {
    for_tiles(steps, [&](auto& tile, int64_t t) {
      own.ahead->next(1).one();
      tile.clear();
      tile.add({x + t * x_row, x_row, 1}, {matrix + j, width, kWidth}, 0, count);
      tile.scale(factors + t, 1);
      tile.keep(to + t * width + j, width);
    });
  }
}

// to[s] += sum over t >= s of square[t, s] rows[t], [steps, width].
void add_later(const float* square, const float* rows, int64_t width, int64_t steps, float* to) {
  for (int64_t j = 0; j < width; j += kPanel) {
    for_tiles(steps, [&](auto& tile, int64_t s) {
      tile.read(to + s * width + j, width);
      tile.add_upper({square + s, 1, kScanChunk}, {rows + j, width, kWidth}, s, steps);
      tile.keep(to + s * width + j, width);
    });
  }
}

// to[t] += sum over s <= t of square[t, s] rows[s].
void add_earlier(const float* square, const float* rows, int64_t width, int64_t steps, float* to) {
  for (int64_t j = 0; j < width; j += kPanel) {
    for_tiles(steps, [&](auto& tile, int64_t t) {
      tile.read(to + t * width + j, width);
      tile.add_lower({square + t * kScanChunk, kScanChunk, 1}, {rows + j, width, kWidth}, t);
      tile.keep(to + t * width + j, width);
    });
  }
}

float dot(const float* x, const float* y, int64_t count) {
  Vec sum(0.0f);
  for (int64_t i = 0; i < count; i += kWidth) sum = fma(load(x + i), load(y + i), sum);
  return reduce_add(sum);
}

// A chunk's M K, added to the group's, and M c . b; `crossing[t]` is the sum of M K c . b over the pairs with step t's
// decay between them.
void mix(const Scratch& own, int64_t chunk, int64_t steps, float* crossing) {
  alignas(64) float lanes[kWidth], after[kScanChunk] = {};  // sums over the rows from t on
  for (int i = 0; i < kWidth; ++i) lanes[i] = static_cast<float>(i);
  const Vec lane = load(lanes);
  float* mixed = own.mixed + chunk * kSquare;
  const float* products = own.products + chunk * kSquare;
  for (int64_t t = steps - 1; t >= 0; --t) {
    Vec sum(0.0f);
    for (int64_t s = 0; s <= t; s += kWidth) {
      const int64_t at = t * kScanChunk + s;
      const Vec decay = load(own.decays->between + at), both = decay * load(own.k + at), product = load(products + at);
      store(mixed + at, load(mixed + at) + both);
      store(own.into_u + at, decay * product);
      const Vec all = fma(both, product, load(after + s));
      store(after + s, all);
      sum = sum + where(lane < Vec(static_cast<float>(t - s)), all, Vec(0.0f));
    }
    crossing[t] = reduce_add(sum);
  }
}

// Where the sums of a part's heads for b and c go: straight to the result where it has the whole group, else to its
// sums.
struct Targets {
  float *b, *c;
  int64_t row;
};

void add_to_targets(const SsdArgs& args, const Scratch& own, int64_t start, int64_t steps, const Targets& targets) {
  for (int64_t t = 0; t < steps; ++t) {
    float *to_b = targets.b + (start + t) * targets.row, *to_c = targets.c + (start + t) * targets.row;
    for (int64_t n = 0; n < args.states; ++n) {
      to_b[n] += own.grad_b[t * own.states + n];
      to_c[n] += own.grad_c[t * own.states + n];
    }
  }
}

// One head's decays, x and u over a chunk.
template <class T>
void read_chunk(const SsdArgs& args, int64_t batch, int64_t head, int64_t start, int64_t steps, const Scratch& own) {
  own.decays->read(args, batch, head, start, steps);
  read_head<T>(args.x, batch, start, steps, head, args.head_dim, own.channels, own.x);
  scale_rows(own.x, own.decays->step, steps, own.channels, own.u);
}

// The gradients of a chunk's x, step and d from du; x and dy are in the tiles.
template <class T>
void finish_steps(const SsdBackwardArgs& back, int64_t batch, int64_t head, int64_t start, int64_t steps,
                  const Scratch& own) {
  const SsdArgs& args = back.forward;
  for (int64_t t = 0; t < steps; ++t) {
    const int64_t row = t * own.channels;
    const Vec step(own.decays->step[t]);
    Vec into_step(0.0f);
    each_vector(args.head_dim, [&](int64_t p, int64_t some) {
      const int64_t channel = head * args.head_dim + p;
      const Vec du = load_some(own.du + row + p, some), x = load(own.x + row + p), dy = load(own.dy + row + p);
      into_step = fma(du, x, into_step);
      Vec dx = step * du;
      if (args.d != nullptr) dx = fma(load_some(args.d + channel, some), dy, dx);
      if (back.grad_d != nullptr) add_to(back.grad_d + channel, dy * x, some);
      store(own.du + row + p, dx);
    });
    back.grad_step[(batch * args.length + start + t) * args.heads + head] = reduce_add(into_step);
    write_head<T>(back.grad_x, batch, start + t, head, args.head_dim, own.du + row);
  }
}

template <class T>
void backward_chunk(const SsdBackwardArgs& back, int64_t batch, int64_t head, int64_t chunk, const Scratch& own,
                    const Targets& targets) {
  const SsdArgs& args = back.forward;
  const int64_t start = chunk * kScanChunk, steps = std::min(args.length - start, kScanChunk), dim = args.head_dim;
  const int64_t group = head * args.groups / args.heads, width = own.channels;
  const Decays& decays = *own.decays;
  const float* h = own.bounds + chunk * own.channels * own.states;
  *own.ahead = {};
  if (chunk > 0) {
    for (const ScanTensor* x : {&args.x, &args.out, &back.grad_x}) {
      own.ahead->template add_rows<T>(*x, batch, start - kScanChunk, kScanChunk, head * dim, dim);
    }
  }
  own.ahead->spread_over((steps * (width + 2 * own.states) + dim * own.states) / (kTileRows * kPanel));
  read_chunk<T>(args, batch, head, start, steps, own);
  const float* b = rows_of(args, args.b, batch, group, start, own, own.b);
  const float* c = rows_of(args, args.c, batch, group, start, own, own.c);
  read_head<T>(args.out, batch, start, steps, head, dim, width, own.dy);
  float crossing[kScanChunk], into_start[kScanChunk];
  multiply_steps(own.dy, width, own.u, width, steps, dim, own.turned, own.k);
  mix(own, chunk, steps, crossing);
  turn(own.g, own.states, dim, args.states, own.g_turned, width);
  multiply(own, b, own.states, own.g_turned, args.states, width, decays.to_end, steps, own.du);
  add_later(own.into_u, own.dy, width, steps, own.du);
  multiply(own, own.u, width, own.g, dim, own.states, decays.to_end, steps, own.grad_b);
  multiply(own, own.dy, width, h, dim, own.states, decays.from_start, steps, own.grad_c);
  add_to_targets(args, own, start, steps, targets);
  // The decay of a step stands in what goes from before it to it or later, from before it to the end, from the start to
  // it or later, and from the start to the end.
  float from_start = 0.0f, to_end = decays.whole(steps) * dot(own.g, h, dim * own.states);
  for (int64_t t = steps - 1; t >= 0; --t) {
    from_start += dot(c + t * own.states, own.grad_c + t * own.states, own.states);
    into_start[t] = from_start;
  }
  for (int64_t t = 0; t < steps; ++t) {
    back.grad_log_decay[(batch * args.length + start + t) * args.heads + head] = crossing[t] + into_start[t] + to_end;
    to_end += dot(b + t * own.states, own.grad_b + t * own.states, own.states);
  }
  scale_rows(own.dy, decays.from_start, steps, width, own.faded);
  move_on(own, dim, decays.whole(steps), own.g, c, steps, own.g);
  finish_steps<T>(back, batch, head, start, steps, own);
}

template <class T>
void backward_head(const SsdBackwardArgs& back, int64_t batch, int64_t head, const Scratch& own,
                   const Targets& targets) {
  const SsdArgs& args = back.forward;
  const int64_t plane = own.channels * own.states, dim = args.head_dim;
  const int64_t place = (batch * args.heads + head) * dim * args.states;
  for (float* zeros : {own.bounds, own.g, own.g_turned}) std::fill(zeros, zeros + plane, 0.0f);
  for (int64_t p = 0; p < dim; ++p) {
    if (args.first != nullptr) {
      std::copy_n(args.first + place + p * args.states, args.states, own.bounds + p * own.states);
    }
    std::copy_n(back.grad_first + place + p * args.states, args.states, own.g + p * own.states);
  }
  for (int64_t chunk = 0; chunk + 1 < chunk_count(args.length); ++chunk) {
    *own.ahead = {};
    own.ahead->template add_rows<T>(args.x, batch, (chunk + 1) * kScanChunk,
                                    std::min(args.length - (chunk + 1) * kScanChunk, kScanChunk), head * dim, dim);
    own.ahead->spread_over(plane / (kTileRows * kPanel));
    read_chunk<T>(args, batch, head, chunk * kScanChunk, kScanChunk, own);
    scale_rows(own.u, own.decays->to_end, kScanChunk, own.channels, own.faded);
    float* bounds = own.bounds + chunk * plane;
    const float* b = rows_of(args, args.b, batch, head * args.groups / args.heads, chunk * kScanChunk, own, own.b);
    move_on(own, dim, own.decays->whole(kScanChunk), bounds, b, kScanChunk, bounds + plane);
  }
  for (int64_t chunk = chunk_count(args.length) - 1; chunk >= 0; --chunk) {
    backward_chunk<T>(back, batch, head, chunk, own, targets);
  }
  for (int64_t p = 0; p < dim; ++p) {
    std::copy_n(own.g + p * own.states, args.states, back.grad_first + place + p * args.states);
  }
}

// Some heads of one group.
template <class T>
void backward_heads(const SsdBackwardArgs& back, int64_t batch, int64_t group, Range heads, const Scratch& own,
                    const Targets& targets) {
  const SsdArgs& args = back.forward;
  const auto each_chunk = [&](auto&& fn) {
    for (int64_t start = 0; start < args.length; start += kScanChunk) {
      const float* b = rows_of(args, args.b, batch, group, start, own, own.b);
      const float* c = rows_of(args, args.c, batch, group, start, own, own.c);
      fn(start, std::min(args.length - start, kScanChunk), b, c);
    }
  };
  std::fill(own.mixed, own.mixed + chunk_count(args.length) * kSquare, 0.0f);
  each_chunk([&](int64_t start, int64_t steps, const float* b, const float* c) {
    multiply_steps(c, own.states, b, own.states, steps, args.states, own.turned, own.products + start * kScanChunk);
  });
  for (int64_t head = heads.begin; head < heads.end; ++head) backward_head<T>(back, batch, head, own, targets);
  each_chunk([&](int64_t start, int64_t steps, const float* b, const float* c) {
    const float* mixed = own.mixed + start * kScanChunk;
    for (float* zeros : {own.grad_b, own.grad_c}) std::fill(zeros, zeros + steps * own.states, 0.0f);
    add_later(mixed, c, own.states, steps, own.grad_b);
    add_earlier(mixed, b, own.states, steps, own.grad_c);
    add_to_targets(args, own, start, steps, targets);
  });
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
  const int64_t plane = args.length * args.states, per_part = bytes_of_part(args), size = args.heads / args.groups;
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
        for (int64_t head = heads.begin; head < heads.end;) {
          const int64_t group = head / size, end = std::min(heads.end, (group + 1) * size);
          const int64_t place = (batch * args.length * args.groups + group) * args.states;
          Targets targets{back.grad_b + place, back.grad_c + place, args.groups * args.states};
          if (group == shared.first) targets = {own.sums, own.sums + plane, args.states};
          if (group == shared.last) targets = {own.sums + 2 * plane, own.sums + 3 * plane, args.states};
          backward_heads<T>(back, batch, group, {head, end}, own, targets);
          head = end;
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

size_t DEFTCORE_KERNEL(ssd_backward_workspace)(const SsdBackwardArgs& args) {
  return static_cast<size_t>(most_parts() * bytes_of_part(args.forward));
}

void DEFTCORE_KERNEL(ssd_backward)(const SsdBackwardArgs& args) {
  dispatch_dtype(args.forward.dtype, [&](auto t) { backward<decltype(t)>(args); });
}

}  // namespace deftcore::cpu
