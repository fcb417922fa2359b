// Bytes that each op's kernels move at a small shape of real models' proportions, beside the least that its header
// names: build with DEFTCORE_CUDA=emulate and DEFTCORE_BUILD_BENCH=ON, run count_traffic. Prints markdown.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "deftcore/ops.h"
#include "traffic.h"

using namespace deftcore;

namespace {

struct Free {
  void operator()(void* data) const { std::free(data); }
};

// An op's tensors, all of them in counted memory, and the least that must be read and written of them.
class Tensors {
 public:
  int64_t read = 0, written = 0;

  template <class T>
  T* in(int64_t count, double share = 1.0) {
    read += least<T>(count, share);
    T* data = take<T>(count);
    for (int64_t i = 0; i < count; ++i) data[i] = random<T>();
    return data;
  }
  template <class T>
  T* out(int64_t count) {
    written += least<T>(count, 1.0);
    return take<T>(count);
  }
  template <class T>
  T* in_out(int64_t count) {
    written += least<T>(count, 1.0);
    return in<T>(count);
  }
  void* workspace(size_t bytes) { return take<char>(static_cast<int64_t>(bytes)); }

 private:
  template <class T>
  static int64_t least(int64_t count, double share) {
    return static_cast<int64_t>(share * static_cast<double>(count) * sizeof(T));
  }
  template <class T>
  T* take(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) / 256 + 1) * 256;
    memory_.emplace_back(std::aligned_alloc(256, bytes));
    std::memset(memory_.back().get(), 0, bytes);
    traffic::watch(memory_.back().get(), bytes);
    return static_cast<T*>(memory_.back().get());
  }
  template <class T>
  T random() {
    if constexpr (std::is_integral_v<T>) return static_cast<T>(engine_());
    const float value = normal_(engine_);
    if constexpr (std::is_floating_point_v<T>) return value;
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof bits);
    if constexpr (std::is_same_v<T, BFloat16>) return {static_cast<uint16_t>(bits >> 16)};
  }
  std::vector<std::unique_ptr<void, Free>> memory_;
  std::mt19937 engine_{1};
  std::normal_distribution<float> normal_;
};

bool g_failed = false;
std::vector<std::string> g_shown;

double kilobytes(int64_t bytes) { return static_cast<double>(bytes) / 1e3; }

// Runs one op and prints a line for it and one per launch. Its blocks may move `most` times the least; and less than
// the least would be a wrong statement.
template <class Run>
void show(const std::string& name, double most, Run&& run) {
  g_shown.push_back(name.substr(0, name.find(',')));
  Tensors tensors;
  run(tensors);
  const std::vector<traffic::Launch> launches = traffic::take();
  traffic::Bytes read, written;
  const auto add = [](traffic::Bytes& sum, const traffic::Bytes& more) {
    sum.asked += more.asked, sum.warp += more.warp, sum.block += more.block, sum.launch += more.launch;
  };
  for (const auto& launch : launches) add(read, launch.read), add(written, launch.written);
  const double least = static_cast<double>(tensors.read + tensors.written);
  const auto row = [](const char* text, const traffic::Bytes& r, const traffic::Bytes& w) {
    std::printf("| %s | %.1f | %.1f | %.1f | %.1f | %.1f | %.1f |", text, kilobytes(r.launch), kilobytes(r.block),
                kilobytes(r.warp), kilobytes(r.asked), kilobytes(w.launch), kilobytes(w.warp));
  };
  row(("**" + name + "**").c_str(), read, written);
  const double once = static_cast<double>(read.launch + written.launch) / least;
  const double blocks = static_cast<double>(read.block + written.block) / least;
  std::printf(" %.1f | %.1f | %.2f | %.2f |\n", kilobytes(tensors.read), kilobytes(tensors.written), once, blocks);
  if (once < 0.995 || blocks > most) {
    std::fprintf(stderr, "%s: moves %.3f and by blocks %.3f times the least, allowed are 1 and %.2f\n", name.c_str(),
                 once, blocks, most);
    g_failed = true;
  }
  for (const auto& launch : launches) {
    const auto& s = launch.shape;
    row((launch.kernel + ", " + std::to_string(s.grid.x * s.grid.y * s.grid.z) + " blocks").c_str(), launch.read,
        launch.written);
    std::printf(" | | | |\n");
  }
}

// ---------------------------------------------------------------------------- the ops

using T = BFloat16;
constexpr DType kDType = DType::kBFloat16;
constexpr int64_t kWidth = 1024, kNeurons = 2816, kBlock = 64;

Quant4 quantized(Tensors& t, int64_t rows, int64_t cols, double share = 1.0) {
  Quant4 q{};
  float* code = t.in<float>(16);
  std::memcpy(code, kNf4Code, sizeof kNf4Code);
  q.packed = t.in<uint8_t>(rows * cols / 2, share);
  q.code = code;
  q.absmax = t.in<float>(rows * cols / kBlock, share);
  q.rows = rows, q.cols = cols, q.block_size = kBlock;
  return q;
}

// [tokens, neurons] of which a tenth of the neurons are not zero, in all tokens.
T* sparse(Tensors& t, int64_t tokens) {
  T* a = t.in<T>(tokens * kNeurons);
  for (int64_t i = 0; i < tokens * kNeurons; ++i) a[i] = i % kNeurons % 10 == 0 ? T{0x3f80} : T{0};
  return a;
}

// A contiguous [batch, length, channels] tensor.
ScanTensor scan_tensor(T* data, int64_t length, int64_t channels) { return {data, length * channels, channels, 1}; }

void density_ops() {
  constexpr int64_t kRows = 64;
  show("act_density, 64 x 2816", 1.05, [](Tensors& t) {
    ActDensityArgs a{};
    a.z = t.in<T>(kRows * kNeurons), a.mask = t.in<uint8_t>(kRows), a.a = t.out<T>(kRows * kNeurons);
    a.surrogate_sum = t.out<float>(1), a.active_count = t.out<int64_t>(1);
    a.rows = kRows, a.width = kNeurons, a.dtype = kDType, a.surrogate_param = 1e-7f;
    cuda::act_density(a, nullptr);
  });
  show("act_density_backward", 1.05, [](Tensors& t) {
    ActDensityBackwardArgs a{};
    a.z = t.in<T>(kRows * kNeurons), a.grad_a = t.in<T>(kRows * kNeurons), a.grad_sum = t.in<float>(1);
    a.mask = t.in<uint8_t>(kRows), a.grad_z = t.out<T>(kRows * kNeurons);
    a.rows = kRows, a.width = kNeurons, a.dtype = kDType, a.surrogate_param = 1e-7f;
    cuda::act_density_backward(a, nullptr);
  });
  show("density", 1.05, [](Tensors& t) {
    DensityArgs a{};
    a.a = t.in<T>(kRows * kNeurons), a.active_count = t.out<int64_t>(1);
    a.rows = kRows, a.width = kNeurons, a.dtype = kDType;
    cuda::density(a, nullptr);
  });
}

void sparse_ops(int64_t tokens, double most_down, double most_mlp, double most_mlp_4bit) {
  const std::string suffix = ", 2816 to 1024, tokens: " + std::to_string(tokens);
  show("sparse_down" + suffix, most_down, [&](Tensors& t) {
    SparseDownArgs a{};
    a.a = sparse(t, tokens), a.w_down_t = t.in<T>(kNeurons * kWidth, 0.0), a.y = t.out<T>(tokens * kWidth);
    a.rows_read = t.out<int64_t>(1);
    a.tokens = tokens, a.neurons = a.capacity = kNeurons, a.width = a.w_stride = kWidth, a.dtype = kDType;
    a.workspace = t.workspace(cuda::sparse_down_workspace(a));
    cuda::sparse_down(a, nullptr);
    t.read += *a.rows_read * kWidth * 2;
  });
  show("sparse_mlp, gated" + suffix, most_mlp, [&](Tensors& t) {
    SparseMlpArgs a{};
    a.x = t.in<T>(tokens * kWidth), a.w_gate = t.in<T>(kNeurons * kWidth), a.w_up = t.in<T>(kNeurons * kWidth, 0.0);
    a.w_down_t = t.in<T>(kNeurons * kWidth, 0.0), a.y = t.out<T>(tokens * kWidth), a.rows_read = t.out<int64_t>(1);
    a.tokens = tokens, a.neurons = a.capacity = kNeurons, a.dtype = kDType, a.tau = 60.0f;  // about a thirtieth
    a.width = a.gate_stride = a.up_stride = a.down_stride = kWidth;
    a.workspace = t.workspace(cuda::sparse_mlp_workspace(a));
    cuda::sparse_mlp(a, nullptr);
    t.read += 2 * *a.rows_read * kWidth * 2;
  });
  show("sparse_mlp_4bit, gated" + suffix, most_mlp_4bit, [&](Tensors& t) {
    SparseMlp4bitArgs a{};
    a.x = t.in<T>(tokens * kWidth), a.z = sparse(t, tokens), a.y = t.out<T>(tokens * kWidth);
    a.w_up = quantized(t, kNeurons, kWidth, 0.0), a.w_down_t = quantized(t, kNeurons, kWidth, 0.0);
    a.rows_read = t.out<int64_t>(1);
    a.tokens = tokens, a.neurons = a.capacity = kNeurons, a.width = kWidth, a.dtype = kDType;
    a.workspace = t.workspace(cuda::sparse_mlp_4bit_workspace(a));
    cuda::sparse_mlp_4bit(a, nullptr);
    t.read += 2 * *a.rows_read * (kWidth / 2 + kWidth / kBlock * 4);
  });
}

void quant4_ops() {
  show("quantize_4bit, 1024 x 2816", 1.05, [](Tensors& t) {
    Quantize4bitArgs a{};
    a.w = t.in<T>(kWidth * kNeurons), a.packed = t.out<uint8_t>(kWidth * kNeurons / 2);
    a.absmax = t.out<float>(kWidth * kNeurons / kBlock);
    a.count = kWidth * kNeurons, a.block_size = kBlock, a.dtype = kDType;
    cuda::quantize_4bit(a, nullptr);
  });
  show("dequantize_4bit, 1024 x 2816", 1.05, [](Tensors& t) {
    cuda::dequantize_4bit({quantized(t, kWidth, kNeurons), t.out<T>(kWidth * kNeurons), kDType}, nullptr);
  });
  for (const auto& [tokens, most] : {std::pair<int64_t, double>{1, 1.15}, {4, 1.9}, {8, 2.75}}) {
    show("linear_4bit, 1024 to 2816, tokens: " + std::to_string(tokens), most, [tokens = tokens](Tensors& t) {
      Linear4bitArgs a{};
      a.w = quantized(t, kNeurons, kWidth), a.x = t.in<T>(tokens * kWidth), a.y = t.out<T>(tokens * kNeurons);
      a.tokens = tokens, a.dtype = kDType;
      cuda::linear_4bit(a, nullptr);
    });
  }
}

void partial_linear_ops() {
  constexpr int64_t kRows = 64;
  show("gated_act, 64 x 2816", 1.05, [](Tensors& t) {
    GatedActArgs a{};
    a.gate = t.in<T>(kRows * kNeurons), a.up = t.in<T>(kRows * kNeurons), a.a = t.out<T>(kRows * kNeurons);
    a.rows = kRows, a.width = a.gate_stride = a.up_stride = kNeurons, a.dtype = kDType;
    cuda::gated_act(a, nullptr);
  });
  show("gated_act_backward", 1.05, [](Tensors& t) {
    GatedActBackwardArgs a{};
    a.gate = t.in<T>(kRows * kNeurons), a.up = t.in<T>(kRows * kNeurons), a.grad = t.in<T>(kRows * kNeurons);
    a.grad_gate = t.out<T>(kRows * kNeurons), a.grad_up = t.out<T>(kRows * kNeurons);
    a.rows = kRows, a.width = a.gate_stride = a.up_stride = kNeurons, a.dtype = kDType;
    cuda::gated_act_backward(a, nullptr);
  });
  show("grouped_delta, 1024 to 1024, 8 tokens of 4 deltas, 16 rows of each kind", 2.15, [](Tensors& t) {
    constexpr int64_t kTokens = 8, kDeltas = 4, kRowsOfDelta = 16, kAll = kDeltas * kRowsOfDelta;
    GroupedDeltaArgs a{};
    int64_t* starts = t.in<int64_t>(kDeltas + 1);
    for (int64_t j = 0; j <= kDeltas; ++j) starts[j] = j * kRowsOfDelta;
    int32_t* index = t.in<int32_t>(kAll);
    for (int32_t i = 0; i < kAll; ++i) index[i] = 13 * i;
    int64_t* adapter = t.in<int64_t>(kTokens);
    for (int64_t i = 0; i < kTokens; ++i) adapter[i] = i % kDeltas;
    DeltaBank& b = a.bank;
    b.gather_start = b.scatter_start = b.low_start = starts, b.gather_index = b.scatter_index = index;
    b.gather_rows = t.in<T>(kAll * kWidth), b.scatter_rows = t.in<T>(kAll * kWidth);
    b.low_in = t.in<T>(kAll * kWidth), b.low_out = t.in<T>(kAll * kWidth);
    b.count = kDeltas, b.inputs = b.outputs = kWidth;
    a.x = t.in<T>(kTokens * kWidth), a.adapter = adapter, a.y = t.in_out<T>(kTokens * kWidth);
    a.tokens = kTokens, a.most = 3 * kRowsOfDelta, a.dtype = kDType;
    a.workspace = t.workspace(cuda::grouped_delta_workspace(a));
    cuda::grouped_delta(a, nullptr);
  });
}

void mask_ops() {
  constexpr int64_t kRows = 256;
  show("mask_units, 256 x 2816", 1.05, [](Tensors& t) {
    MaskUnitsArgs a{};
    a.x = t.in<T>(kRows * kNeurons), a.mask = t.in<float>(kNeurons), a.y = t.out<T>(kRows * kNeurons);
    a.rows = kRows, a.units = kNeurons, a.width = 1, a.dtype = kDType;
    cuda::mask_units(a, nullptr);
  });
  for (const int64_t width : {int64_t{1}, int64_t{64}}) {
    const int64_t units = kNeurons / width;
    show("mask_units_backward, 256 x 2816, units of " + std::to_string(width), 1.1, [=](Tensors& t) {
      MaskUnitsBackwardArgs a{};
      a.x = t.in<T>(kRows * kNeurons), a.grad = t.in<T>(kRows * kNeurons), a.mask = t.in<float>(units);
      a.grad_x = t.out<T>(kRows * kNeurons), a.grad_mask = t.out<float>(units);
      a.rows = kRows, a.units = units, a.width = width, a.dtype = kDType;
      a.activated = true, a.activation = Activation::kSilu;
      a.workspace = t.workspace(cuda::mask_units_backward_workspace(a));
      cuda::mask_units_backward(a, nullptr);
    });
  }
}

// ---------------------------------------------------------------------------- state-space models

constexpr int64_t kLength = 128, kChannels = 256, kStates = 16, kTaps = 4;

ScanTensor input(Tensors& t) { return scan_tensor(t.in<T>(kLength * kChannels), kLength, kChannels); }
ScanTensor output(Tensors& t) { return scan_tensor(t.out<T>(kLength * kChannels), kLength, kChannels); }

SelectiveScanArgs scan_args(Tensors& t) {
  SelectiveScanArgs a{};
  a.u = input(t), a.delta = input(t), a.z = input(t);
  float* decay = t.in<float>(kStates * kChannels);
  for (int64_t i = 0; i < kStates * kChannels; ++i) decay[i] = -1.0f;
  a.a = decay, a.b = t.in<float>(kLength * kStates), a.c = t.in<float>(kLength * kStates);
  a.d = t.in<float>(kChannels), a.delta_bias = t.in<float>(kChannels);
  a.batch = 1, a.length = kLength, a.channels = kChannels, a.states = kStates, a.groups = 1;
  a.dtype = kDType, a.softplus = true;
  return a;
}

void mamba_ops() {
  constexpr int64_t kSaved = kLength / kScanChunk * kStates * kChannels;
  show("selective_scan, 128 steps, 256 channels of 16 states", 1.2, [](Tensors& t) {
    SelectiveScanArgs a = scan_args(t);
    a.out = output(t), a.last = t.out<float>(kStates * kChannels), a.chunks = t.out<float>(kSaved);
    cuda::selective_scan(a, nullptr);
  });
  show("selective_scan_backward", 1.5, [](Tensors& t) {
    SelectiveScanBackwardArgs b{};
    b.forward = scan_args(t);
    b.forward.out = input(t), b.forward.chunks = t.in<float>(kSaved);
    b.grad_u = output(t), b.grad_delta = output(t), b.grad_z = output(t);
    b.grad_a = t.in_out<float>(kStates * kChannels);
    b.grad_b = t.out<float>(kLength * kStates), b.grad_c = t.out<float>(kLength * kStates);
    b.grad_d = t.in_out<float>(kChannels), b.grad_delta_bias = t.in_out<float>(kChannels);
    b.grad_first = t.in_out<float>(kStates * kChannels);
    b.workspace = t.workspace(cuda::selective_scan_backward_workspace(b));
    cuda::selective_scan_backward(b, nullptr);
  });
  show("selective_state_update, 4 sequences, 256 channels of 16 states", 1.7, [](Tensors& t) {
    constexpr int64_t kBatch = 4;
    StateUpdateArgs a{};
    a.state = t.in_out<float>(kBatch * kChannels * kStates), a.state_dtype = DType::kFloat32;
    a.x = {t.in<T>(kBatch * kChannels), kChannels, 0, 1}, a.dt = {t.in<T>(kBatch * kChannels), kChannels, 0, 1};
    a.z = {t.in<T>(kBatch * kChannels), kChannels, 0, 1}, a.out = t.out<T>(kBatch * kChannels);
    a.a = {t.in<float>(kChannels * kStates), 0, 0, kStates}, a.a_state = 1;
    a.b = t.in<T>(kBatch * kStates), a.c = t.in<T>(kBatch * kStates);
    a.d = {t.in<float>(kChannels), 0, 0, 1}, a.bias = {t.in<float>(kChannels), 0, 0, 1};
    a.batch = kBatch, a.heads = 1, a.head_dim = kChannels, a.states = kStates, a.groups = 1, a.dtype = kDType;
    cuda::selective_state_update(a, nullptr);
  });
}

CausalConv1dArgs conv_args(Tensors& t) {
  CausalConv1dArgs a{};
  a.x = input(t), a.weight = t.in<float>(kTaps * kChannels), a.bias = t.in<float>(kChannels);
  a.batch = 1, a.length = kLength, a.channels = kChannels, a.width = kTaps, a.dtype = kDType, a.silu = true;
  return a;
}

void conv1d_ops() {
  show("causal_conv1d, 128 steps, 256 channels, 4 taps", 7.3, [](Tensors& t) {
    CausalConv1dArgs a = conv_args(t);
    a.out = output(t);
    cuda::causal_conv1d(a, nullptr);
  });
  show("causal_conv1d_backward", 7.6, [](Tensors& t) {
    CausalConv1dBackwardArgs b{};
    b.forward = conv_args(t);
    b.forward.out = input(t), b.grad_x = output(t);
    b.grad_weight = t.in_out<float>(kTaps * kChannels), b.grad_bias = t.in_out<float>(kChannels);
    cuda::causal_conv1d_backward(b, nullptr);
  });
  show("causal_conv1d_update, 4 sequences, 256 channels", 1.65, [](Tensors& t) {
    constexpr int64_t kBatch = 4;
    CausalConv1dUpdateArgs a{};
    a.x = {t.in<T>(kBatch * kChannels), kChannels, 1, 1}, a.out = {t.out<T>(kBatch * kChannels), kChannels, 1, 1};
    a.state = t.in_out<T>(kBatch * kChannels * kTaps);
    a.weight = t.in<float>(kTaps * kChannels), a.bias = t.in<float>(kChannels);
    a.batch = kBatch, a.length = 1, a.channels = kChannels, a.width = a.window = kTaps, a.dtype = kDType;
    a.silu = true;
    cuda::causal_conv1d_update(a, nullptr);
  });
}

void mamba2_ops() {
  constexpr int64_t kHeadDim = 64, kHeads = kChannels / kHeadDim, kMany = 64;
  const auto args_of = [](Tensors& t) {
    SsdArgs a{};
    a.x = input(t);
    float* decay = t.in<float>(kLength * kHeads);
    for (int64_t i = 0; i < kLength * kHeads; ++i) decay[i] = -0.5f;
    a.step = t.in<float>(kLength * kHeads), a.log_decay = decay;
    a.b = t.in<float>(kLength * kMany), a.c = t.in<float>(kLength * kMany), a.d = t.in<float>(kChannels);
    a.batch = 1, a.length = kLength, a.heads = kHeads, a.head_dim = kHeadDim, a.states = kMany, a.groups = 1;
    a.dtype = kDType;
    return a;
  };
  show("ssd, 128 steps, 4 heads of 64 channels, 64 states", 2.1, [&](Tensors& t) {
    SsdArgs a = args_of(t);
    a.out = output(t), a.last = t.out<float>(kChannels * kMany);
    cuda::ssd(a, nullptr);
  });
  show("ssd_backward", 3.5, [&](Tensors& t) {
    SsdBackwardArgs b{};
    b.forward = args_of(t);
    b.forward.out = input(t), b.grad_x = output(t);
    b.grad_step = t.out<float>(kLength * kHeads), b.grad_log_decay = t.out<float>(kLength * kHeads);
    b.grad_b = t.in_out<float>(kLength * kMany), b.grad_c = t.in_out<float>(kLength * kMany);
    b.grad_d = t.in_out<float>(kChannels), b.grad_first = t.in_out<float>(kChannels * kMany);
    b.workspace = t.workspace(cuda::ssd_backward_workspace(b));
    cuda::ssd_backward(b, nullptr);
  });
}

void logit_ops() {
  constexpr int64_t kTokens = 16, kWords = 8192, kMost = 20, kRank = 10;
  const auto args_of = [](Tensors& t) {
    LogitRowsArgs a{};
    a.student = t.in<T>(kTokens * kWords), a.teacher = t.in<T>(kTokens * kWords), a.mask = nullptr;
    a.rows = kTokens, a.width = a.stride = kWords, a.dtype = kDType, a.sharpness = 0.5f;
    return a;
  };
  show("logit_rows, 16 tokens of 8192 words", 1.05, [&](Tensors& t) {
    LogitRowsArgs a = args_of(t);
    a.stats = t.out<float>(kTokens * kRowStats);
    cuda::logit_rows(a, nullptr);
  });
  show("logit_rows_backward, 20 of each kept, 10 singular vectors", 1.95, [&](Tensors& t) {
    LogitRowsBackwardArgs b{};
    b.forward = args_of(t);
    b.forward.stats = t.in<float>(kTokens * kRowStats), b.slopes = t.in<float>(3);
    int32_t* kept = t.in<int32_t>(kTokens * kMost);
    for (int32_t i = 0; i < kTokens * kMost; ++i) kept[i] = i * 389 % static_cast<int32_t>(kWords);
    b.kept = kept, b.kept_grad = t.in<float>(kTokens * kMost);
    b.left = t.in<float>(kTokens * kRank), b.right = t.in<float>(kRank * kWords), b.grad = t.out<T>(kTokens * kWords);
    b.end = kWords, b.most = kMost, b.rank = kRank;
    cuda::logit_rows_backward(b, nullptr);
  });
}

void galore_ops() {
  constexpr int64_t kCount = 128 * kWidth, kSteps = 20;
  show("galore_step, 1024 x 1024 at rank 128, window of 20", 1.05, [](Tensors& t) {
    static GaloreMatrix m;
    m = {};
    m.grad = t.in<float>(kCount), m.out = t.out<float>(kCount);
    m.exp_avg = t.in_out<float>(kCount), m.exp_avg_sq = t.in_out<float>(kCount);
    m.history = t.in<float>(kSteps * kCount, 2.0), m.gram = t.in_out<double>(kSteps * kSteps);
    for (int64_t i = 0; i < kSteps; ++i) m.gram[i * (kSteps + 1)] = 1e7;  // far enough from singular
    m.failures = t.out<int64_t>(1), m.outcome = t.out<int64_t>(1);
    t.written += kCount * 4;
    m.elements = kCount, m.rows = m.fill = kSteps, m.age = kSteps;
    GaloreStepArgs a{};
    a.matrices = &m, a.count = 1, a.elements = kCount, a.rows = kSteps;
    a.dtype = a.history_dtype = DType::kFloat32;
    a.damping = 0.1, a.beta1 = 0.9, a.beta2 = 0.99, a.eps = 1e-3;
    a.workspace = t.workspace(cuda::galore_step_workspace(a));
    cuda::galore_step(a, nullptr);
  });
  show("galore_step, whole", 1.05, [](Tensors& t) {
    static GaloreMatrix m;
    m = {};
    m.grad = t.in<T>(kCount), m.out = t.in_out<T>(kCount);
    m.exp_avg = t.in_out<float>(kCount), m.exp_avg_sq = t.in_out<float>(kCount);
    m.elements = kCount, m.age = 1;
    GaloreStepArgs a{};
    a.matrices = &m, a.count = 1, a.elements = kCount, a.dtype = kDType, a.whole = a.stochastic = true;
    a.beta1 = 0.9, a.beta2 = 0.99, a.eps = 1e-3;
    cuda::galore_step(a, nullptr);
  });
  show("galore_update, 1024 x 128", 1.05, [](Tensors& t) {
    cuda::galore_update({t.in_out<T>(kCount), t.in<float>(kCount), kCount, 1, kDType, true, 0.1f, 0.9f}, nullptr);
  });
}

void neighbour_ops() {
  constexpr int64_t kPoints = 1024, kCentres = 64, kNear = 32, kFeatures = 384;
  show("farthest_point_sample, 64 of 1024 points", 1.05, [](Tensors& t) {
    FarthestPointSampleArgs a{};
    a.points = t.in<float>(kPoints * 3), a.picks = t.out<int64_t>(kCentres);
    a.clouds = 1, a.size = kPoints, a.samples = kCentres;
    a.workspace = t.workspace(cuda::farthest_point_sample_workspace(a));
    cuda::farthest_point_sample(a, nullptr);
  });
  show("knn, 32 of 1024 points, 64 queries", 2.1, [](Tensors& t) {
    KnnArgs a{};
    a.points = t.in<float>(kPoints * 3), a.queries = t.in<float>(kCentres * 3);
    a.indices = t.out<int64_t>(kCentres * kNear), a.distances = t.out<float>(kCentres * kNear);
    a.clouds = 1, a.size = kPoints, a.count = kCentres, a.k = kNear;
    cuda::knn(a, nullptr);
  });
  show("ball_query, 32 of 1024 points, 64 queries", 2.3, [](Tensors& t) {
    BallQueryArgs a{};
    a.points = t.in<float>(kPoints * 3), a.queries = t.in<float>(kCentres * 3);
    a.indices = t.out<int64_t>(kCentres * kNear), a.mask = t.out<uint8_t>(kCentres * kNear);
    a.clouds = 1, a.size = kPoints, a.count = kCentres, a.k = kNear, a.square = 1.0f;
    cuda::ball_query(a, nullptr);
  });
  // Three centres for each point, one after another.
  const auto indices_of = [](Tensors& t) {
    int64_t* indices = t.in<int64_t>(kPoints * 3);
    for (int64_t i = 0; i < kPoints * 3; ++i) indices[i] = i % kCentres;
    return indices;
  };
  show("gather_points, 1024 x 384 from 3 of 64 each", 3.85, [=](Tensors& t) {
    GatherPointsArgs a{};
    a.features = t.in<T>(kCentres * kFeatures), a.indices = indices_of(t), a.weights = t.in<float>(kPoints * 3);
    a.out = t.out<T>(kPoints * kFeatures);
    a.clouds = 1, a.size = kCentres, a.rows = kPoints, a.k = 3, a.width = kFeatures, a.dtype = kDType;
    cuda::gather_points(a, nullptr);
  });
  show("gather_points_backward", 5.15, [=](Tensors& t) {
    GatherPointsBackwardArgs a{};
    a.grad = t.in<T>(kPoints * kFeatures), a.features = t.in<T>(kCentres * kFeatures), a.indices = indices_of(t);
    a.weights = t.in<float>(kPoints * 3), a.grad_features = t.out<T>(kCentres * kFeatures);
    a.grad_weights = t.out<float>(kPoints * 3);
    a.clouds = 1, a.size = kCentres, a.rows = kPoints, a.k = 3, a.width = kFeatures, a.dtype = kDType;
    a.workspace = t.workspace(cuda::gather_points_backward_workspace(a));
    cuda::gather_points_backward(a, nullptr);
  });
}

// Every op of ops.h that CUDA has must have been shown.
void check_complete() {
#define DEFTCORE_NAME(op, Args, room, devices, device) DEFTCORE_IF_##devices##_##device(#op, )
  for (const char* op : {DEFTCORE_OPS(DEFTCORE_NAME, cuda)}) {
    if (std::find(g_shown.begin(), g_shown.end(), op) != g_shown.end()) continue;
    std::fprintf(stderr, "%s: has no case here\n", op);
    g_failed = true;
  }
#undef DEFTCORE_NAME
}

}  // namespace

int main() {
  std::puts(
      "# Bytes that the CUDA kernels move\n\n"
      "Counted on the emulator, in kB of whole 32-byte sectors, bfloat16: each sector once for a launch (what device\n"
      "memory moves where the second cache holds the rest), once for a block (where the first cache does), once for a\n"
      "warp's access (what the first cache serves), and what threads ask for. The least is what the op's header says.\n"
      "The emulated device has 3 multiprocessors, so that what is cut by their number, sparse products' partial sums,\n"
      "is less here than on a GPU. Made by `count_traffic`, built with `DEFTCORE_CUDA=emulate` and\n"
      "`DEFTCORE_BUILD_BENCH=ON`.\n\n"
      "| op, and its launches | read once | by blocks | by warps | by threads | written once | by warps | least read | "
      "least written | once / least | by blocks / least |\n|---|---|---|---|---|---|---|---|---|---|---|");
  density_ops();
  sparse_ops(1, 1.2, 1.05, 1.45);
  sparse_ops(4, 1.65, 1.15, 2.55);
  quant4_ops();
  partial_linear_ops();
  mask_ops();
  mamba_ops();
  conv1d_ops();
  mamba2_ops();
  logit_ops();
  galore_ops();
  neighbour_ops();
  check_complete();
  return g_failed;
}
