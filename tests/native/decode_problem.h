// What test_decode_step.cpp decodes with: matrices of every form with what they are worth, a cache with a past.
#pragma once

#include <algorithm>
#include <deque>

#include "check.h"
#include "deftcore/ops.h"

using namespace deftcore;

namespace {

using Row = std::vector<double>;

size_t at(int64_t i) { return static_cast<size_t>(i); }

enum class Form { kFloat32, kBFloat16, kFloat16, kPacked, kNested, kPackedInt8, kInt8, kColumns };

// A matrix as the step reads it, and what it is worth.
struct Weights {
  DecoderMatrix native{};
  Row values;  // [rows, cols]
  Row bias, a, b;
  double lora_scale = 1;
  int64_t rank = 0;
};

struct Options {
  Form form = Form::kFloat32;  // of all matrices but the head
  Form down = Form::kFloat32;  // of W_down
  Form head = Form::kFloat32;
  int64_t rank = 0;
  bool bias = false, head_norms = false, mlp = true;
  float tau = -1.0f;  // below 0: dense
  int64_t window = INT64_MAX / 2;
  Activation activation = Activation::kSilu;
  double tolerance = 1e-4;
};

// A 16-bit number near x, by cutting bits off, and what it is worth: which number it is does not matter.
uint16_t half_of(float x, Form form, double& worth) {
  uint32_t word;
  std::memcpy(&word, &x, 4);
  const bool brain = form == Form::kBFloat16, tiny = !brain && std::fabs(x) < 0x1p-14f;
  word = tiny ? 0 : word & (brain ? 0xffff0000u : 0xffffe000u);
  std::memcpy(&x, &word, 4);
  worth = x;
  if (brain || tiny) return static_cast<uint16_t>(word >> 16);
  return static_cast<uint16_t>((word >> 16 & 0x8000u) | ((word >> 13 & 0x3ffffu) - ((127u - 15u) << 10)));
}

double activated(Activation f, double z) { return f == Activation::kRelu ? std::max(z, 0.0) : z / (1 + std::exp(-z)); }

// Sizes, weights, a cache with a past, and where sequences begin.
struct Problem {
  int64_t layers, sequences, steps, position, length, width, heads, kv_heads, size, neurons;
  Options options;
  int64_t vocabulary = 13, batch;
  std::deque<std::vector<float>> floats;  // what the structs point to
  std::deque<std::vector<uint16_t>> halves;
  std::deque<std::vector<uint8_t>> bytes;
  std::vector<std::vector<Weights>> matrices;  // q, k, v, o, gate, up, down of each layer
  std::vector<DecoderBlock> blocks;
  Weights head;
  const float* norm;
  std::vector<float> hidden, cosine, sine, keys, values;
  std::vector<int64_t> starts;
  static constexpr float kEps = 1e-3f, kScale = 0.4f;

  Problem(int64_t layers_, int64_t sequences_, int64_t steps_, int64_t position_, int64_t width_, int64_t heads_,
          int64_t kv_heads_, int64_t size_, int64_t neurons_, const Options& options_)
      : layers(layers_),
        sequences(sequences_),
        steps(steps_),
        position(position_),
        length(position_ + steps_ + 1),
        width(width_),
        heads(heads_),
        kv_heads(kv_heads_),
        size(size_),
        neurons(neurons_),
        options(options_),
        batch(sequences_ + 1) {
    const int64_t mixed = heads * size, kept = kv_heads * size;
    const bool sparse = options.tau >= 0;
    for (int64_t i = 0; i < layers; ++i) {
      const Form form = options.form;
      std::vector<Weights>& m = matrices.emplace_back();
      for (const int64_t rows : {mixed, kept, kept}) m.push_back(matrix(rows, width, form));
      m.push_back(matrix(width, mixed, form));
      for (int n = 0; n < 2; ++n) m.push_back(options.mlp ? matrix(neurons, width, form) : Weights{});
      m.push_back(!options.mlp ? Weights{}
                  : sparse     ? matrix(neurons, width, options.down, true)
                               : matrix(width, neurons, options.down));
      DecoderBlock b{};
      DecoderMatrix* const to[] = {&b.q, &b.k, &b.v, &b.o, &b.gate, &b.up, &b.down};
      for (size_t n = 0; n < m.size(); ++n) *to[n] = m[n].native;
      b.attention_norm = keep(width);
      b.mlp_norm = keep(width);
      b.q_norm = options.head_norms ? keep(size) : nullptr;
      b.k_norm = options.head_norms ? keep(size) : nullptr;
      b.window = options.window;
      b.tau = sparse ? floats.emplace_back(at(neurons), options.tau).data() : nullptr;
      blocks.push_back(b);
    }
    head = matrix(vocabulary, width, options.head);
    norm = keep(width);
    const auto some = [&](int64_t count) { return random_floats(at(count), seed()); };
    hidden = some(sequences * steps * width);
    cosine = some(length * size);
    sine = some(length * size + 1);
    keys = some(layers * batch * kv_heads * length * size);
    values = some(layers * batch * kv_heads * length * size + 1);
    for (int64_t s = 0; s < sequences; ++s) starts.push_back(s % 2 ? position + steps - 1 : std::min(s, position));
  }

  unsigned seed() const { return static_cast<unsigned>(floats.size() + halves.size() + bytes.size()) + 1; }
  const float* keep(int64_t count) { return floats.emplace_back(random_floats(at(count), seed())).data(); }
  const float* keep(Row& into, int64_t count) {
    const float* from = keep(count);
    into.assign(from, from + count);
    return from;
  }

  Weights matrix(int64_t rows, int64_t cols, Form form, bool neuron_major = false) {
    Weights w;
    DecoderMatrix& m = w.native;
    m.rows = rows;
    m.cols = m.stride = cols;
    keep(w.values, rows * cols);
    const int64_t inner = neuron_major ? rows : cols, outer = neuron_major ? cols : rows;
    for (double& v : w.values) v /= std::sqrt(static_cast<double>(inner));
    std::vector<float>& scaled = floats.emplace_back(w.values.begin(), w.values.end());
    if (form <= Form::kFloat16) {
      dense(w, scaled, form);
    } else if (form == Form::kInt8) {
      rounded(w, scaled);
    } else {
      pack(w, scaled, form);
    }
    if (options.bias) m.bias = keep(w.bias, outer);
    if (options.rank > 0 && !neuron_major) {
      w.rank = m.rank = options.rank;
      m.lora_a = keep(w.a, w.rank * cols);
      m.lora_b = keep(w.b, rows * w.rank);
    } else if (options.rank > 0) {  // [neurons, rank] and [width, rank]
      w.rank = m.rank = options.rank;
      m.lora_a = keep(w.a, rows * w.rank);
      m.lora_b = keep(w.b, cols * w.rank);
    }
    if (m.rank > 0) {
      w.lora_scale = 0.25;
      m.lora_scale = floats.emplace_back(1, 0.25f).data();
    }
    return w;
  }

  // Rows lie three elements apart; what is between them is NaN.
  void dense(Weights& w, const std::vector<float>& from, Form form) {
    DecoderMatrix& m = w.native;
    m.stride = m.cols + 3;
    m.dtype = static_cast<int64_t>(form == Form::kFloat32    ? DType::kFloat32
                                   : form == Form::kBFloat16 ? DType::kBFloat16
                                                             : DType::kFloat16);
    std::vector<float> wide(at(m.rows * m.stride - 3), NAN);
    std::vector<uint16_t> half(wide.size(), 0x7fff);
    for (int64_t i = 0; i < m.rows * m.cols; ++i) {
      const size_t place = at(i / m.cols * m.stride + i % m.cols);
      w.values[at(i)] = wide[place] = from[at(i)];
      if (form != Form::kFloat32) half[place] = half_of(from[at(i)], form, w.values[at(i)]);
    }
    if (form == Form::kFloat32) {
      m.weight = floats.emplace_back(std::move(wide)).data();
    } else {
      m.weight = halves.emplace_back(std::move(half)).data();
    }
  }

  void rounded(Weights& w, const std::vector<float>& from) {
    DecoderMatrix& m = w.native;
    m.dtype = kInt8Rows;
    std::vector<uint8_t> rows(from.size());
    std::vector<float> worth;
    for (int64_t r = 0; r < m.rows; ++r) {
      float most = 0;
      for (int64_t c = 0; c < m.cols; ++c) most = std::max(most, std::fabs(from[at(r * m.cols + c)]));
      worth.push_back(most / 127);
      for (int64_t i = r * m.cols; i < (r + 1) * m.cols; ++i) {
        const int whole = static_cast<int>(std::nearbyint(from[at(i)] / worth.back()));
        rows[at(i)] = static_cast<uint8_t>(whole);
        w.values[at(i)] = static_cast<double>(worth.back()) * whole;
      }
    }
    m.weight = bytes.emplace_back(std::move(rows)).data();
    m.absmax = floats.emplace_back(std::move(worth)).data();
  }

  void pack(Weights& w, std::vector<float>& from, Form form) {
    DecoderMatrix& m = w.native;
    const int64_t block = 32, count = m.rows * m.cols;
    std::vector<uint8_t>& packed = bytes.emplace_back(at(count / 2));
    std::vector<float>& absmax = floats.emplace_back(at(count / block));
    device::quantize_4bit({from.data(), packed.data(), absmax.data(), count, block, DType::kFloat32, QuantType::kNf4},
                          nullptr);
    m.weight = packed.data();
    m.code = kNf4Code;
    m.absmax = absmax.data();
    m.block_size = block;
    m.int8 = form == Form::kPackedInt8;
    m.column_blocks = form == Form::kColumns;
    if (form == Form::kNested) {
      std::vector<float>& book = floats.emplace_back(256);
      for (size_t i = 0; i < book.size(); ++i) book[i] = static_cast<float>(i) / 255.0f - 0.5f;
      std::vector<uint8_t>& codes = bytes.emplace_back(absmax.size());
      for (size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<uint8_t>(i * 37 + 3);
      m.absmax = codes.data();
      m.nested_code = book.data();
      m.nested_absmax = floats.emplace_back(codes.size() / 256 + 1, 0.5f).data();
      m.nested_offset = floats.emplace_back(1, 0.4f).data();
      for (size_t i = 0; i < codes.size(); ++i) absmax[i] = book[codes[i]] * 0.5f + 0.4f;
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t scale = m.column_blocks ? i / m.cols / block * m.cols + i % m.cols : i / block;
      const int nibble = packed[at(i / 2)] >> (i % 2 ? 0 : 4) & 15;
      w.values[at(i)] = static_cast<double>(kNf4Code[nibble]) * static_cast<double>(absmax[at(scale)]);
    }
  }

  DecodeStepArgs args(float* logits) {
    DecodeStepArgs args{};
    args.blocks = blocks.data();
    args.head = &head.native;
    args.norm = norm;
    args.hidden = hidden.data();
    args.cosine = cosine.data();
    args.sine = sine.data();
    args.starts = starts.data();
    args.keys = keys.data();
    args.values = values.data();
    args.logits = logits;
    args.layers = layers;
    args.tokens = sequences * steps;
    args.batch = batch;
    args.position = position;
    args.length = length;
    args.steps = steps;
    args.width = width;
    args.heads = heads;
    args.kv_heads = kv_heads;
    args.head_size = size;
    args.neurons = options.mlp ? neurons : 0;
    args.vocabulary = vocabulary;
    args.activation = options.activation;
    args.eps = kEps;
    args.scale = kScale;
    return args;
  }
};

}  // namespace
