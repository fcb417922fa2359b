// Chooses the instruction set once per process: the best that the machine has, or DEFTCORE_CPU_ISA.
#include "isa.h"

#include <cstdlib>

namespace deftcore::cpu {

#define DEFTCORE_DECLARE_ONE(kernel, Args, isa) void kernel##_##isa(const Args&);
#define DEFTCORE_DECLARE_WORKSPACE(kernel, Args, isa) void kernel##_##isa(const Args&, size_t*);
#define DEFTCORE_DECLARE(isa)                    \
  DEFTCORE_KERNELS_OF(isa, DEFTCORE_DECLARE_ONE) \
  DEFTCORE_WORKSPACES_OF(isa, DEFTCORE_DECLARE_WORKSPACE)
#define DEFTCORE_ENTRY(kernel, Args, isa) kernel##_##isa,
#define DEFTCORE_TABLE(isa) {#isa, DEFTCORE_KERNELS_OF(isa, DEFTCORE_ENTRY) DEFTCORE_WORKSPACES_OF(isa, DEFTCORE_ENTRY)}

DEFTCORE_DECLARE(scalar)
#if defined(DEFTCORE_X86)
DEFTCORE_DECLARE(avx2)
DEFTCORE_DECLARE(avx512)
DEFTCORE_DECLARE(avx512bf16)
#endif

namespace {

struct Level {
  Kernels kernels;
  bool available;
};

// Plainest first.
const Level* levels(int* count) {
#if defined(DEFTCORE_X86)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const Level all[] = {
      {DEFTCORE_TABLE(scalar), true},
      {DEFTCORE_TABLE(avx2), avx2},
      {DEFTCORE_TABLE(avx512), avx512},
      {DEFTCORE_TABLE(avx512bf16), avx512 && __builtin_cpu_supports("avx512bf16")},
  };
#else
  static const Level all[] = {{DEFTCORE_TABLE(scalar), true}};
#endif
  *count = sizeof(all) / sizeof(all[0]);
  return all;
}

const Kernels& choose() {
  int count;
  const Level* all = levels(&count);
  const char* forced = std::getenv("DEFTCORE_CPU_ISA");
  if (forced != nullptr && *forced != '\0') {
    for (int i = 0; i < count; ++i) {
      if (std::string(forced) == all[i].kernels.name && all[i].available) return all[i].kernels;
    }
    throw std::invalid_argument("DEFTCORE_CPU_ISA: this machine has " + isa_available() + ", got '" + forced + "'");
  }
  int best = 0;
  for (int i = 0; i < count; ++i) {
    if (all[i].available) best = i;
  }
  return all[best].kernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* isa_name() { return kernels().name; }

std::string isa_available() {
  int count;
  const Level* all = levels(&count);
  std::string names;
  for (int i = 0; i < count; ++i) {
    if (all[i].available) names += (names.empty() ? "" : " ") + std::string(all[i].kernels.name);
  }
  return names;
}

namespace {

void check_quant(const Quant4& q, const char* op) {
  require(q.rows >= 0 && q.cols >= 0, op, "rows and cols must not be negative");
  require(q.block_size >= 32 && (q.block_size & (q.block_size - 1)) == 0, op,
          "block_size must be a power of two, at least 32");
}

// int32 neuron numbers and int64 offsets; the Python layer checks shapes, this keeps a C++ caller from a crash.
template <class Args>
void check_sparse(const Args& args, const char* op) {
  require(args.tokens >= 0 && args.tokens <= kMaxSparseTokens, op, "tokens must be in 0..64");
  require(args.neurons >= 0 && args.neurons < INT32_MAX, op, "neurons must be below 2^31");
  require(args.width >= 0, op, "width must not be negative");
  require(args.tau >= 0, op, "tau must not be negative");
}

size_t align64(size_t bytes) { return (bytes + 63) & ~static_cast<size_t>(63); }

}  // namespace

void act_density(const ActDensityArgs& args, Stream) { kernels().act_density(args); }
void act_density_backward(const ActDensityBackwardArgs& args, Stream) { kernels().act_density_backward(args); }
void density(const DensityArgs& args, Stream) { kernels().density(args); }

void sparse_down(const SparseDownArgs& args, Stream) {
  check_sparse(args, "sparse_down");
  kernels().sparse_down(args);
}

void sparse_mlp(const SparseMlpArgs& args, Stream) {
  check_sparse(args, "sparse_mlp");
  kernels().sparse_mlp(args);
}

void sparse_mlp_4bit(const SparseMlp4bitArgs& args, Stream) {
  check_sparse(args, "sparse_mlp_4bit");
  const auto check_rows = [&](const Quant4& q, bool columns) {
    check_quant(q, "sparse_mlp_4bit");
    require(q.rows == args.neurons && q.cols == args.width, "sparse_mlp_4bit", "weights must be [neurons, width]");
    require(q.column_blocks ? columns && q.cols % 2 == 0 && q.rows % q.block_size == 0 : q.cols % q.block_size == 0,
            "sparse_mlp_4bit", "rows must be whole blocks");
  };
  if (args.w_up.packed != nullptr) check_rows(args.w_up, false);
  check_rows(args.w_down_t, true);
  kernels().sparse_mlp_4bit(args);
}

void quantize_4bit(const Quantize4bitArgs& args, Stream) {
  require(args.block_size >= 32 && args.block_size <= 4096 && (args.block_size & (args.block_size - 1)) == 0,
          "quantize_4bit", "block_size must be a power of two in 32..4096");
  kernels().quantize_4bit(args);
}

void dequantize_4bit(const Dequantize4bitArgs& args, Stream) {
  check_quant(args.w, "dequantize_4bit");
  kernels().dequantize_4bit(args);
}

size_t linear_4bit_workspace(const Linear4bitArgs& args) {
  size_t bytes = 0;
  kernels().linear_4bit_workspace(args, &bytes);
  return bytes;
}

void linear_4bit(const Linear4bitArgs& args, Stream) {
  check_quant(args.w, "linear_4bit");
  kernels().linear_4bit(args);
}

void linear_4bit_backward(const Linear4bitArgs& args, Stream) {
  check_quant(args.w, "linear_4bit_backward");
  kernels().linear_4bit_backward(args);
}

void gated_act(const GatedActArgs& args, Stream) { kernels().gated_act(args); }
void gated_act_backward(const GatedActBackwardArgs& args, Stream) { kernels().gated_act_backward(args); }

// In order (see partial_linear.cpp): tiles, tokens sorted by delta, dots of low-rank rows.
size_t grouped_delta_workspace(const GroupedDeltaArgs& args) {
  const size_t tokens = static_cast<size_t>(args.tokens);
  return tokens * (7 * sizeof(int64_t) + 4 * static_cast<size_t>(args.most) * sizeof(float)) + 64;
}

void grouped_delta(const GroupedDeltaArgs& args, Stream) {
  require(args.tokens >= 0 && args.most >= 0, "grouped_delta", "tokens and most must not be negative");
  kernels().grouped_delta(args);
}

namespace {

void check_scan(const SelectiveScanArgs& args, const char* op) {
  require(args.states >= 1 && args.states <= 256, op, "states must be in 1..256");
  require(args.groups >= 1 && args.channels % args.groups == 0, op, "groups must divide channels");
}

}  // namespace

void selective_scan(const SelectiveScanArgs& args, Stream) {
  check_scan(args, "selective_scan");
  kernels().selective_scan(args);
}

size_t selective_scan_workspace(const SelectiveScanArgs& args) {
  size_t bytes = 0;
  kernels().selective_scan_workspace(args, &bytes);
  return bytes;
}

void selective_scan_backward(const SelectiveScanBackwardArgs& args, Stream) {
  check_scan(args.forward, "selective_scan_backward");
  const bool empty = args.forward.batch == 0 || args.forward.length == 0 || args.forward.channels == 0;
  require(args.forward.chunks != nullptr || empty, "selective_scan_backward", "chunks are needed");
  kernels().selective_scan_backward(args);
}

namespace {

void check_heads(int64_t heads, int64_t groups, const char* op) {
  require(groups >= 1 && heads % groups == 0, op, "groups must divide heads");
}

void check_ssd(const SsdArgs& args, const char* op) {
  require(args.states >= 1 && args.states <= 256, op, "states must be in 1..256");
  check_heads(args.heads, args.groups, op);
}

void check_width(int64_t width, const char* op) {
  require(width >= 1 && width <= kMaxConvWidth, op, "width must be in 1..16");
}

}  // namespace

void selective_state_update(const StateUpdateArgs& args, Stream) {
  check_heads(args.heads, args.groups, "selective_state_update");
  require(args.a_state == 0 || args.a_state == 1, "selective_state_update", "a's stride over states must be 0 or 1");
  kernels().selective_state_update(args);
}

void causal_conv1d(const CausalConv1dArgs& args, Stream) {
  check_width(args.width, "causal_conv1d");
  kernels().causal_conv1d(args);
}

void causal_conv1d_backward(const CausalConv1dBackwardArgs& args, Stream) {
  check_width(args.forward.width, "causal_conv1d_backward");
  kernels().causal_conv1d_backward(args);
}

void causal_conv1d_update(const CausalConv1dUpdateArgs& args, Stream) {
  check_width(args.width, "causal_conv1d_update");
  require(args.window >= args.width - 1, "causal_conv1d_update", "the window must hold width - 1 steps");
  kernels().causal_conv1d_update(args);
}

void ssd(const SsdArgs& args, Stream) {
  check_ssd(args, "ssd");
  kernels().ssd(args);
}

size_t ssd_workspace(const SsdArgs& args) {
  size_t bytes = 0;
  kernels().ssd_workspace(args, &bytes);
  return bytes;
}

void ssd_backward(const SsdBackwardArgs& args, Stream) {
  check_ssd(args.forward, "ssd_backward");
  kernels().ssd_backward(args);
}

// In order: active list, counts per part, h and its bfloat16 pairs, output accumulators (see sparse_mlp.cpp).
size_t sparse_down_workspace(const SparseDownArgs& args) {
  const size_t parts = static_cast<size_t>(most_parts()), neurons = static_cast<size_t>(args.neurons) + 64,
               tokens = static_cast<size_t>(args.tokens), width = static_cast<size_t>(args.width) + 80;
  return align64(neurons * 4) + align64(parts * 8) + align64((neurons * tokens + 64) * 4) +
         align64((neurons * tokens / 2 + 64) * 4) + align64(tokens * width * 4);
}

// Further: activations and inputs as float.
size_t sparse_mlp_workspace(const SparseMlpArgs& args) {
  SparseDownArgs down{};
  down.tokens = args.tokens;
  down.neurons = args.neurons;
  down.width = args.width;
  const size_t tokens = static_cast<size_t>(args.tokens);
  return sparse_down_workspace(down) + align64(tokens * static_cast<size_t>(args.neurons) * 4) +
         align64(tokens * (static_cast<size_t>(args.width) + 80) * 4);
}

// Further: inputs in the order of the dots, the low-rank output and, per part, scales of a panel's and a group's
// rows.
size_t sparse_mlp_4bit_workspace(const SparseMlp4bitArgs& args) {
  SparseMlpArgs plain{};
  plain.tokens = args.tokens;
  plain.neurons = args.neurons;
  plain.width = args.width;
  const size_t tokens = static_cast<size_t>(args.tokens), width = static_cast<size_t>(args.width),
               rank = static_cast<size_t>(args.down_rank), parts = static_cast<size_t>(most_parts());
  return sparse_mlp_workspace(plain) + 4 * (tokens * (width + 128 + rank + 80) + parts * 132 * (width / 32 + 16));
}

}  // namespace deftcore::cpu
