// A step of decoding with Mamba and Mamba-2 against double-precision loops, on exactly sized buffers.
#include "check.h"
#include "deftcore/ops.h"

using namespace deftcore;

namespace {

size_t at(int64_t i) { return static_cast<size_t>(i); }
double silu(double v) { return v / (1 + std::exp(-v)); }

// Sizes, weights and states; rank 0: Mamba-2.
struct Problem {
  int64_t count, tokens, batch, width, channels, states, taps, rank, heads, groups, norm_groups;
  int64_t vocabulary = 7, mixed, projected;
  std::vector<std::vector<float>> kept;  // what the structs point to
  std::vector<MambaLayer> layers;
  DecoderMatrix head{};
  const float* norm;
  std::vector<float> hidden, windows, memory;
  static constexpr float kEps = 1e-3f;

  Problem(int64_t count_, int64_t tokens_, int64_t width_, int64_t channels_, int64_t states_, int64_t taps_,
          int64_t rank_, int64_t heads_ = 1, int64_t groups_ = 1, int64_t norm_groups_ = 1)
      : count(count_),
        tokens(tokens_),
        batch(tokens_ + 1),
        width(width_),
        channels(channels_),
        states(states_),
        taps(taps_),
        rank(rank_),
        heads(heads_),
        groups(groups_),
        norm_groups(norm_groups_) {
    const bool second = rank == 0;
    mixed = channels + (second ? 2 * groups * states : 0);
    projected = channels + mixed + (second ? heads : 0);
    const int64_t steps = second ? heads : channels;
    for (int64_t i = 0; i < count; ++i) {
      MambaLayer layer{};
      layer.in = matrix(projected, width);
      if (!second) {
        layer.x = matrix(rank + 2 * states, channels);
        layer.dt = matrix(channels, rank);
      }
      layer.out = matrix(width, channels);
      layer.norm = keep(width);
      layer.taps = keep(taps * mixed);
      layer.taps_bias = i % 2 ? nullptr : keep(mixed);
      std::vector<float>& a = kept.emplace_back(random_floats(at(second ? heads : channels * states), seed()));
      for (float& v : a) v = -std::fabs(v);
      layer.a = a.data();
      layer.d = keep(steps);
      layer.dt_bias = i % 2 ? nullptr : keep(steps);
      layer.gated_norm = second ? keep(channels) : nullptr;
      layers.push_back(layer);
    }
    head = matrix(vocabulary, width);
    norm = keep(width);
    hidden = random_floats(at(tokens * width), seed());
    windows = random_floats(at(count * batch * (taps - 1) * mixed), seed());
    memory = random_floats(at(count * batch * channels * states), seed());
  }

  unsigned seed() const { return static_cast<unsigned>(kept.size()) + 1; }
  const float* keep(int64_t size) { return kept.emplace_back(random_floats(at(size), seed())).data(); }
  DecoderMatrix matrix(int64_t rows, int64_t cols) {
    DecoderMatrix m{};
    m.weight = keep(rows * cols);
    m.bias = keep(rows);
    m.rows = rows;
    m.cols = m.stride = cols;
    m.dtype = static_cast<int64_t>(DType::kFloat32);
    return m;
  }

  MambaStepArgs args(float* logits) {
    MambaStepArgs args{};
    args.layers = layers.data();
    args.head = &head;
    args.norm = norm;
    args.hidden = hidden.data();
    args.windows = windows.data();
    args.memory = memory.data();
    args.logits = logits;
    args.count = count;
    args.tokens = tokens;
    args.batch = batch;
    args.width = width;
    args.channels = channels;
    args.states = states;
    args.taps = taps;
    args.vocabulary = vocabulary;
    args.rank = rank;
    args.heads = heads;
    args.groups = groups;
    args.norm_groups = norm_groups;
    args.eps = kEps;
    return args;
  }
};

using Row = std::vector<double>;

Row product(const DecoderMatrix& m, const Row& x) {
  Row y(at(m.rows));
  const float* weight = static_cast<const float*>(m.weight);
  for (int64_t r = 0; r < m.rows; ++r) {
    y[at(r)] = m.bias == nullptr ? 0 : m.bias[r];
    for (int64_t c = 0; c < m.cols; ++c) y[at(r)] += weight[r * m.cols + c] * x[at(c)];
  }
  return y;
}

// x[first, first + size) over its root mean square, times weight.
void normed(Row& x, int64_t first, int64_t size, const float* weight) {
  double squares = 0;
  for (int64_t i = first; i < first + size; ++i) squares += x[at(i)] * x[at(i)];
  const double factor = 1 / std::sqrt(squares / static_cast<double>(size) + Problem::kEps);
  for (int64_t i = first; i < first + size; ++i) x[at(i)] *= factor * weight[i];
}

// One layer over one token's stream; its window and memory move on.
void layer_ref(const Problem& p, const MambaLayer& layer, Row& stream, double* window, double* memory) {
  const bool second = p.rank == 0;
  Row x = stream;
  normed(x, 0, p.width, layer.norm);
  const Row parts = product(layer.in, x);
  const int64_t from = second ? p.channels : 0, gate = second ? 0 : p.channels, reach = p.taps - 1;
  Row u(at(p.mixed));
  for (int64_t i = 0; i < p.mixed; ++i) {
    double sum = layer.taps_bias == nullptr ? 0 : layer.taps_bias[i];
    for (int64_t k = 0; k < p.taps; ++k) {
      sum += layer.taps[k * p.mixed + i] * (k < reach ? window[k * p.mixed + i] : parts[at(from + i)]);
    }
    for (int64_t k = 0; k < reach; ++k) {
      window[k * p.mixed + i] = k + 1 < reach ? window[(k + 1) * p.mixed + i] : parts[at(from + i)];
    }
    u[at(i)] = silu(sum);
  }
  Row selected, steps;
  if (second) {
    selected.assign(u.begin() + p.channels, u.end());
    steps.assign(parts.begin() + p.channels + p.mixed, parts.end());
  } else {
    const Row all = product(layer.x, u);
    selected.assign(all.begin() + p.rank, all.end());
    steps = product(layer.dt, Row(all.begin(), all.begin() + p.rank));
  }
  Row y(at(p.channels));
  const int64_t size = p.channels / p.heads;
  for (int64_t i = 0; i < p.channels; ++i) {
    const int64_t own = second ? i / size : i, group = i / size * p.groups / p.heads;
    const double raw = steps[at(own)] + (layer.dt_bias == nullptr ? 0 : layer.dt_bias[own]);
    const double step = std::log1p(std::exp(raw));
    double sum = layer.d[own] * u[at(i)];
    for (int64_t n = 0; n < p.states; ++n) {
      const double b = selected[at(group * p.states + n)], c = selected[at((p.groups + group) * p.states + n)];
      double& h = memory[i * p.states + n];
      h = std::exp(step * layer.a[second ? own : i * p.states + n]) * h + step * b * u[at(i)];
      sum += c * h;
    }
    y[at(i)] = sum * silu(parts[at(gate + i)]);
  }
  for (int64_t g = 0; second && g < p.norm_groups; ++g) {
    const int64_t each = p.channels / p.norm_groups;
    normed(y, g * each, each, layer.gated_norm);
  }
  const Row added = product(layer.out, y);
  for (int64_t i = 0; i < p.width; ++i) stream[at(i)] += added[at(i)];
}

bool all_close(const std::vector<float>& ours, const Row& ref) {
  double most = 0, error = 0;
  for (size_t i = 0; i < ref.size(); ++i) {
    most = std::max(most, std::fabs(ref[i]));
    error = std::max(error, std::fabs(ours[i] - ref[i]));
  }
  return error <= 1e-4 * (1 + most);
}

void test_step(Problem p) {
  Row windows(p.windows.begin(), p.windows.end()), memory(p.memory.begin(), p.memory.end()), expected;
  for (int64_t t = 0; t < p.tokens; ++t) {
    Row stream(p.hidden.begin() + t * p.width, p.hidden.begin() + (t + 1) * p.width);
    for (int64_t i = 0; i < p.count; ++i) {
      const int64_t sequence = i * p.batch + t;
      layer_ref(p, p.layers[at(i)], stream, windows.data() + sequence * (p.taps - 1) * p.mixed,
                memory.data() + sequence * p.channels * p.states);
    }
    normed(stream, 0, p.width, p.norm);
    for (double y : product(p.head, stream)) expected.push_back(y);
  }
  std::vector<float> logits(at(p.tokens * p.vocabulary), NAN);
  MambaStepArgs args = p.args(logits.data());
  const Room room(device::mamba_step_workspace(args));
  args.workspace = room.data();
  device::mamba_step(args, nullptr);
  CHECK(all_close(logits, expected));
  CHECK(all_close(p.windows, windows));
  CHECK(all_close(p.memory, memory));
}

void test_checks() {
  const auto spoilt = [](auto&& spoil) {
    Problem p(2, 2, 5, 6, 3, 4, 2);
    std::vector<float> logits(at(p.tokens * p.vocabulary));
    MambaStepArgs args = p.args(logits.data());
    spoil(args, p);
    return refused("mamba_step", [&] { device::mamba_step(args, nullptr); });
  };
  CHECK(spoilt([](MambaStepArgs& args, Problem&) { args.tokens = 4; }));
  CHECK(spoilt([](MambaStepArgs& args, Problem&) { args.states = 257; }));
  CHECK(spoilt([](MambaStepArgs& args, Problem&) { args.taps = 17; }));
  CHECK(spoilt([](MambaStepArgs& args, Problem&) { args.heads = 0; }));
  CHECK(spoilt([](MambaStepArgs& args, Problem&) { args.heads = 2; }));
  CHECK(spoilt([](MambaStepArgs& args, Problem&) { args.rank = 3; }));
  CHECK(spoilt([](MambaStepArgs&, Problem& p) { p.layers[1].out.cols = 5; }));
  CHECK(spoilt([](MambaStepArgs&, Problem& p) { p.layers[1].out.rank = 1; }));
  CHECK(spoilt([](MambaStepArgs&, Problem& p) { p.layers[1].out.dtype = kInt8Rows; }));
  CHECK(spoilt([](MambaStepArgs&, Problem& p) { p.layers[1].x.weight = nullptr; }));
}

}  // namespace

int main() {
  return run_tests([] {
    for (const int64_t channels : {1, 15, 17, 48}) {
      for (const int64_t states : {1, 5, 16}) test_step({2, 2, 9, channels, states, 4, 3});
    }
    test_step({1, 3, 1, 33, 16, 1, 1});
    test_step({2, 1, 16, 40, 40, 2, 5});
    test_step({2, 2, 9, 12, 5, 4, 0, 6, 3, 2});
    test_step({2, 3, 16, 34, 16, 4, 0, 2, 1, 1});
    test_step({1, 1, 7, 51, 33, 3, 0, 3, 3, 3});
    test_step({1, 2, 7, 4, 1, 1, 0, 4, 2, 4});
    test_checks();
  });
}
