// A step of decoding with Llama-like blocks against double-precision loops, on exactly sized buffers.
#include "decode_problem.h"

namespace {

// x W^T + bias + scale (x a^T) b^T; of a neuron-major matrix x W + bias + scale (x a) b^T.
Row product(const Weights& w, const Row& x, bool neuron_major = false) {
  const int64_t rows = w.native.rows, cols = w.native.cols, out = neuron_major ? cols : rows;
  Row y(at(out)), low(at(w.rank));
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; ++c) {
      y[at(neuron_major ? c : r)] += w.values[at(r * cols + c)] * x[at(neuron_major ? r : c)];
    }
  }
  for (size_t i = 0; i < x.size(); ++i) {
    for (int64_t r = 0; r < w.rank; ++r) {
      low[at(r)] += x[i] * w.a[neuron_major ? i * at(w.rank) + at(r) : at(r) * x.size() + i];
    }
  }
  for (int64_t o = 0; o < out; ++o) {
    if (!w.bias.empty()) y[at(o)] += w.bias[at(o)];
    for (int64_t r = 0; r < w.rank; ++r) y[at(o)] += w.lora_scale * low[at(r)] * w.b[at(o * w.rank + r)];
  }
  return y;
}

Row normed(const Row& x, const float* weight) {
  double squares = 0;
  for (double v : x) squares += v * v;
  const double factor = 1 / std::sqrt(squares / static_cast<double>(x.size()) + Problem::kEps);
  Row y(x);
  for (size_t i = 0; i < y.size(); ++i) y[i] *= factor * weight[i];
  return y;
}

// A head of `all` at a place that counts from its sequence's start.
Row rotated(const Problem& p, const Row& all, int64_t head, const float* norm, int64_t place) {
  const Row plain(all.begin() + head * p.size, all.begin() + (head + 1) * p.size);
  const Row x = norm == nullptr ? plain : normed(plain, norm);
  Row y(x.size());
  const int64_t half = p.size / 2;
  for (int64_t i = 0; i < p.size; ++i) {
    const double other = i < half ? -x[at(i + half)] : x[at(i - half)];
    y[at(i)] = x[at(i)] * p.cosine[at(place * p.size + i)] + other * p.sine[at(place * p.size + i)];
  }
  return y;
}

// All of a sequence's steps, one after another; the cache moves on. Returns the last stream.
Row sequence_ref(const Problem& p, int64_t sequence, Row& keys, Row& values) {
  Row stream;
  for (int64_t step = 0; step < p.steps; ++step) {
    const float* from = p.hidden.data() + (sequence * p.steps + step) * p.width;
    stream.assign(from, from + p.width);
    const int64_t now = p.position + step, start = p.starts[at(sequence)];
    for (int64_t layer = 0; layer < p.layers; ++layer) {
      const DecoderBlock& block = p.blocks[at(layer)];
      const std::vector<Weights>& m = p.matrices[at(layer)];
      const Row x = normed(stream, block.attention_norm);
      const Row q = product(m[0], x), k = product(m[1], x), v = product(m[2], x);
      const auto cached = [&](int64_t head, int64_t position) {
        return at((((layer * p.batch + sequence) * p.kv_heads + head) * p.length + position) * p.size);
      };
      for (int64_t head = 0; head < p.kv_heads; ++head) {
        const Row key = rotated(p, k, head, block.k_norm, std::max<int64_t>(now - start, 0));
        std::copy(key.begin(), key.end(), keys.begin() + static_cast<int64_t>(cached(head, now)));
        std::copy_n(v.begin() + head * p.size, p.size, values.begin() + static_cast<int64_t>(cached(head, now)));
      }
      Row mixed(at(p.heads * p.size));
      for (int64_t head = 0; head < p.heads && now >= start; ++head) {
        const Row query = rotated(p, q, head, block.q_norm, now - start);
        const int64_t shared = head / (p.heads / p.kv_heads), first = std::max(start, now - block.window + 1);
        double total = 0;
        for (int64_t j = first; j <= now; ++j) {
          double score = 0;
          for (int64_t i = 0; i < p.size; ++i) score += query[at(i)] * keys[cached(shared, j) + at(i)];
          const double weight = std::exp(Problem::kScale * score);
          total += weight;
          for (int64_t i = 0; i < p.size; ++i) {
            mixed[at(head * p.size + i)] += weight * values[cached(shared, j) + at(i)];
          }
        }
        for (int64_t i = 0; i < p.size; ++i) mixed[at(head * p.size + i)] /= total;
      }
      const Row attended = product(m[3], mixed);
      for (size_t i = 0; i < stream.size(); ++i) stream[i] += attended[i];
      if (!p.options.mlp) continue;
      const Row h = normed(stream, block.mlp_norm), z = product(m[4], h);
      Row u = product(m[5], h);
      for (size_t i = 0; i < u.size(); ++i) {
        const double f = activated(p.options.activation, z[i]);
        u[i] *= block.tau == nullptr || std::fabs(f) > block.tau[i] ? f : 0;
      }
      const Row added = product(m[6], u, block.tau != nullptr);
      for (size_t i = 0; i < stream.size(); ++i) stream[i] += added[i];
    }
  }
  return stream;
}

bool all_close(const std::vector<float>& ours, const Row& ref, double tolerance) {
  double most = 0, error = 0;
  for (size_t i = 0; i < ref.size(); ++i) {
    most = std::max(most, std::fabs(ref[i]));
    const double off = std::fabs(ours[i] - ref[i]);
    error = off <= error ? error : off;  // NaN stays
  }
  return error <= tolerance * (1 + most);
}

void test_step(Problem p) {
  Row keys(p.keys.begin(), p.keys.end()), values(p.values.begin(), p.values.end()), expected;
  for (int64_t s = 0; s < p.sequences; ++s) {
    for (double y : product(p.head, normed(sequence_ref(p, s, keys, values), p.norm))) expected.push_back(y);
  }
  std::vector<float> logits(at(p.sequences * p.vocabulary), NAN);
  DecodeStepArgs args = p.args(logits.data());
  const Room room(device::decode_step_workspace(args));
  args.workspace = room.data();
  device::decode_step(args, nullptr);
  const double tolerance = p.options.tolerance;
  CHECK(all_close(logits, expected, tolerance));
  for (int64_t s = 0; s < p.sequences; ++s) {  // keys of padding are of no matter to anybody
    for (int64_t row = 0; row < p.layers * p.kv_heads; ++row) {
      const int64_t place = ((row / p.kv_heads * p.batch + s) * p.kv_heads + row % p.kv_heads) * p.length;
      const int64_t first = (place + p.starts[at(s)]) * p.size, last = (place + p.length) * p.size;
      const auto same = [&](const std::vector<float>& ours, const Row& ref) {
        return all_close({ours.begin() + first, ours.begin() + last}, {ref.begin() + first, ref.begin() + last},
                         tolerance);
      };
      CHECK(same(p.keys, keys));
      CHECK(same(p.values, values));
    }
  }
}

// One and several positions, one and several sequences, with a past and without.
void test_steps(const Options& options) {
  test_step({1, 1, 1, 0, 32, 2, 1, 32, 64, options});
  test_step({2, 3, 1, 5, 64, 4, 2, 16, 96, options});
  test_step({1, 2, 3, 4, 96, 2, 2, 64, 32, options});
}

// Whether a step over a problem is refused once something of it is spoilt, and only then.
template <class Spoil>
bool spoilt(const Options& options, Spoil&& spoil) {
  const auto refuses = [&](auto&& change) {
    const int64_t width = options.head == Form::kInt8 ? 64 : 6;
    Problem p(2, 2, 1, 3, width, 2, 1, 4, 5, options);
    std::vector<float> logits(at(p.sequences * p.vocabulary));
    DecodeStepArgs args = p.args(logits.data());
    const Room room(device::decode_step_workspace(args));
    args.workspace = room.data();
    change(args, p);
    return refused("decode_step", [&] { device::decode_step(args, nullptr); });
  };
  return refuses(spoil) && !refuses([](DecodeStepArgs&, Problem&) {});
}

void test_checks() {
  const Options plain;
  CHECK(spoilt(plain, [](DecodeStepArgs& args, Problem&) { args.tokens = 0; }));
  CHECK(spoilt(plain, [](DecodeStepArgs& args, Problem&) { args.tokens = 4; }));
  CHECK(spoilt(plain, [](DecodeStepArgs& args, Problem&) { args.position = args.length; }));
  CHECK(spoilt(plain, [](DecodeStepArgs& args, Problem&) { args.kv_heads = 3; }));
  CHECK(spoilt(plain, [](DecodeStepArgs& args, Problem&) { args.head_size = 3; }));
  CHECK(spoilt(plain, [](DecodeStepArgs&, Problem& p) { p.starts[1] = 4; }));
  CHECK(spoilt(plain, [](DecodeStepArgs&, Problem& p) { p.blocks[1].window = 0; }));
  CHECK(spoilt(plain, [](DecodeStepArgs&, Problem& p) { p.blocks[1].down.cols = 6; }));
  CHECK(spoilt(plain, [](DecodeStepArgs&, Problem& p) { p.blocks[1].o.stride = 1; }));
  CHECK(spoilt(plain, [](DecodeStepArgs&, Problem& p) { p.blocks[1].v.weight = nullptr; }));
  CHECK(spoilt(plain, [](DecodeStepArgs&, Problem& p) { p.blocks[1].gate.weight = nullptr; }));
  CHECK(spoilt(plain, [](DecodeStepArgs&, Problem& p) { p.blocks[0].q.dtype = kInt8Rows + 1; }));
  CHECK(spoilt(plain, [](DecodeStepArgs&, Problem& p) { p.blocks[0].q.rank = 1; }));
  CHECK(spoilt(plain, [](DecodeStepArgs&, Problem& p) { p.blocks[0].q.rank = -1; }));
  CHECK(spoilt(plain, [](DecodeStepArgs&, Problem& p) {  // of 6 columns
    p.head.native.dtype = kInt8Rows;
    p.head.native.absmax = p.norm;
    p.head.native.stride = 6;
  }));
}

void test_checks_of_int8() {
  Options int8;
  int8.head = Form::kInt8;
  CHECK(spoilt(int8, [](DecodeStepArgs&, Problem& p) { p.head.native.absmax = nullptr; }));
  CHECK(spoilt(int8, [](DecodeStepArgs&, Problem& p) { p.head.native.stride = 96; }));
  CHECK(spoilt(int8, [](DecodeStepArgs&, Problem& p) { p.head.native.stride = 32; }));
  CHECK(spoilt(int8, [](DecodeStepArgs&, Problem& p) { p.head.native.code = kNf4Code; }));
  int8.tau = 0.1f;  // all rows of a matrix in int8 are read: of W_up and W_down it cannot be some
  const auto round = [](DecoderMatrix& m, const Problem& p) {
    m.dtype = kInt8Rows;
    m.stride = m.cols;
    m.absmax = p.norm;
  };
  CHECK(spoilt(int8, [&](DecodeStepArgs&, Problem& p) { round(p.blocks[0].up, p); }));
  CHECK(spoilt(int8, [&](DecodeStepArgs&, Problem& p) { round(p.blocks[0].down, p); }));
}

}  // namespace

int main() {
  return run_tests([] {
    Options plain;
    for (const int64_t width : {1, 7, 17, 33}) test_step({2, 2, 1, 3, width, 3, 1, 2 * width, width + 2, plain});
    test_step({1, 2, 5, 0, 9, 4, 2, 6, 11, plain});
    for (const Form form : {Form::kFloat32, Form::kBFloat16, Form::kFloat16, Form::kPacked, Form::kNested}) {
      Options options;
      options.form = options.head = form;
      options.down = form;
      test_steps(options);
      options.bias = options.head_norms = true;
      options.rank = 3;
      options.window = 2;
      options.activation = Activation::kRelu;
      test_steps(options);
      options.tau = 0.0f;
      test_steps(options);
      options.tau = 0.05f;
      options.activation = Activation::kSilu;
      test_steps(options);
      options.mlp = false;
      options.tau = -1.0f;
      test_steps(options);
    }
    Options columns;
    columns.form = Form::kPacked;
    columns.down = Form::kColumns;
    columns.tau = 0.0f;
    columns.activation = Activation::kRelu;
    test_steps(columns);
    Options rounded;  // what x loses is not in the reference
    rounded.form = rounded.down = Form::kPackedInt8;
    rounded.head = Form::kInt8;
    rounded.tolerance = 2e-2;
    test_steps(rounded);
    test_checks();
    test_checks_of_int8();
  });
}
