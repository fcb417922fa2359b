// Every op only enqueues. What it is given is out of the host's reach until the stream runs, and a recording that is
// run over and over, the inputs changed in place, gives what direct calls give: so a CUDA graph may hold any of them.
#include <sys/mman.h>

#include <algorithm>
#include <initializer_list>

#include "check.h"
#include "deftcore/ops.h"
#include "emulator.h"

namespace deftcore {
namespace {

// The device's memory: arrays whose contents a seed draws, or that start as 0xff bytes.
class Memory {
 public:
  Memory() : base_(static_cast<char*>(mmap(nullptr, kBytes, kOpen, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0))) {
    if (base_ == MAP_FAILED) std::abort();
  }
  ~Memory() { munmap(base_, kBytes); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  float* floats(int64_t count) {
    return take<float>(count, [](std::mt19937& random) { return std::normal_distribution<float>()(random); });
  }
  double* doubles(int64_t count) {
    return take<double>(count, [](std::mt19937& random) { return std::normal_distribution<double>()(random); });
  }
  template <class T>
  T* numbers(int64_t count, int low, int high) {
    return take<T>(count, [=](std::mt19937& random) {
      return static_cast<T>(std::uniform_int_distribution<int>(low, high)(random));
    });
  }
  // Each of `from` once, in an order that is drawn.
  template <class T>
  T* order(std::vector<T> from) {
    T* data = reserve<T>(from.size());
    fills_.push_back([data, from](std::mt19937& random) {
      std::copy(from.begin(), from.end(), data);
      std::shuffle(data, data + from.size(), random);
    });
    return data;
  }
  int64_t* starts(std::initializer_list<int64_t> list) {
    return take<int64_t>(static_cast<int64_t>(list.size()),
                         [=, i = size_t{0}, values = std::vector<int64_t>(list)](std::mt19937&) mutable {
                           return values[i++ % values.size()];
                         });
  }
  template <class T>
  T* out(int64_t count) {
    return reserve<T>(static_cast<size_t>(count));
  }
  ScanTensor tensor(float* data, int64_t rows, int64_t channels) { return {data, rows * channels, channels, 1}; }

  void fill(unsigned seed) {
    std::memset(base_, 0xff, used_);
    std::mt19937 random(seed);
    for (const auto& one : fills_) one(random);
  }
  std::vector<char> contents() const { return {base_, base_ + used_}; }
  void shut() { mprotect(base_, kBytes, PROT_NONE); }
  void open() { mprotect(base_, kBytes, kOpen); }

 private:
  static constexpr size_t kBytes = 1 << 20;
  static constexpr int kOpen = PROT_READ | PROT_WRITE;

  template <class T>
  T* reserve(size_t count) {
    T* data = reinterpret_cast<T*>(base_ + used_);
    used_ += (count * sizeof(T) + 255) / 256 * 256;
    if (used_ > kBytes) std::abort();
    return data;
  }
  template <class T, class Draw>
  T* take(int64_t count, Draw draw) {
    T* data = reserve<T>(static_cast<size_t>(count));
    fills_.push_back([=](std::mt19937& random) mutable {
      for (int64_t i = 0; i < count; ++i) data[i] = draw(random);
    });
    return data;
  }

  char* base_;
  size_t used_ = 0;
  std::vector<std::function<void(std::mt19937&)>> fills_;
};

// ---------------------------------------------------------------------------- a small problem for each op

constexpr int64_t kRows = 3, kWidth = 37;
constexpr int64_t kBatch = 2, kLength = 35, kGroups = 2, kDim = 5, kChannels = kGroups * kDim, kStates = 17, kTaps = 4;

void make(ActDensityArgs& args, Memory& m) {
  const int64_t count = kRows * kWidth;
  args = {m.floats(count),
          m.numbers<uint8_t>(kRows, 0, 1),
          m.out<float>(count),
          m.out<float>(1),
          m.out<int64_t>(1),
          kRows,
          kWidth,
          DType::kFloat32,
          Activation::kSilu,
          Surrogate::kTanh,
          2.0f,
          0.1f};
}

void make(ActDensityBackwardArgs& args, Memory& m) {
  const int64_t count = kRows * kWidth;
  args = {m.floats(count),
          m.floats(count),
          m.floats(1),
          m.numbers<uint8_t>(kRows, 0, 1),
          m.out<float>(count),
          kRows,
          kWidth,
          DType::kFloat32,
          Activation::kSilu,
          Surrogate::kTanh,
          2.0f};
}

void make(DensityArgs& args, Memory& m) {
  args = {m.floats(kRows * kWidth),
          m.numbers<uint8_t>(kRows, 0, 1),
          m.out<int64_t>(1),
          kRows,
          kWidth,
          DType::kFloat32,
          0.5f};
}

void make(SparseDownArgs& args, Memory& m) {
  const int64_t neurons = 300;
  args = {m.floats(kRows * neurons),
          m.floats(neurons * kWidth),
          m.floats(kWidth),
          m.out<float>(kRows * kWidth),
          nullptr,
          m.out<int64_t>(1),
          kRows,
          neurons,
          kWidth,
          kWidth,
          neurons,
          DType::kFloat32,
          0.5f};
}

void make(SparseMlpArgs& args, Memory& m) {
  const int64_t neurons = 70, count = neurons * kWidth;
  args = {m.floats(kRows * kWidth),
          nullptr,
          m.floats(count),
          m.floats(count),
          m.floats(count),
          nullptr,
          nullptr,
          m.out<float>(kRows * kWidth),
          nullptr,
          m.out<int64_t>(1),
          kRows,
          neurons,
          kWidth,
          kWidth,
          kWidth,
          kWidth,
          neurons,
          DType::kFloat32,
          Activation::kRelu,
          0.0f};
}

// Scales of 8 bits, with scales of their own.
Quant4 weight(Memory& m, int64_t rows, int64_t cols) {
  const int64_t blocks = rows * cols / 32;
  return {m.numbers<uint8_t>(rows * cols / 2, 0, 255),
          m.floats(16),
          m.numbers<uint8_t>(blocks, 0, 255),
          m.floats((blocks + kNestedBlock - 1) / kNestedBlock),
          m.floats(256),
          0.25f,
          rows,
          cols,
          32};
}

void make(SparseMlp4bitArgs& args, Memory& m) {
  const int64_t neurons = 64, width = 96, rank = 2;
  args = {m.floats(kRows * width),
          m.floats(kRows * neurons),
          weight(m, neurons, width),
          weight(m, neurons, width),
          m.floats(kRows * rank),
          m.floats(neurons * rank),
          m.floats(neurons * rank),
          m.out<float>(kRows * rank),
          m.floats(width),
          m.out<float>(kRows * width),
          nullptr,
          m.out<int64_t>(1),
          kRows,
          neurons,
          width,
          rank,
          rank,
          neurons,
          DType::kFloat32,
          Activation::kRelu,
          false,
          0.0f};
}

void make(Quantize4bitArgs& args, Memory& m) {
  args = {m.floats(101), m.out<uint8_t>(51), m.out<float>(4), 101, 32, DType::kFloat32, QuantType::kFp4};
}

void make(Dequantize4bitArgs& args, Memory& m) {
  args = {weight(m, kRows, 96), m.out<float>(kRows * 96), DType::kFloat32};
}

void make(Linear4bitArgs& args, Memory& m) {
  const int64_t outputs = 11, rank = 2;
  args = {weight(m, outputs, 96),
          m.floats(kRows * 96),
          m.floats(outputs),
          m.floats(kRows * rank),
          m.floats(outputs * rank),
          m.out<float>(kRows * outputs),
          nullptr,
          kRows,
          rank,
          DType::kFloat32};
}

void make(GatedActArgs& args, Memory& m) {
  const int64_t count = kRows * kWidth;
  args = {m.floats(count), m.floats(count), m.out<float>(count), kRows, kWidth, kWidth,
          kWidth,          DType::kFloat32, Activation::kSilu};
}

void make(GatedActBackwardArgs& args, Memory& m) {
  const int64_t count = kRows * kWidth;
  args = {m.floats(count), m.floats(count), m.floats(count), m.out<float>(count), m.out<float>(count), kRows,
          kWidth,          kWidth,          kWidth,          DType::kFloat32,     Activation::kSilu};
}

void make(MaskUnitsArgs& args, Memory& m) {
  const int64_t units = 7, count = kRows * units * kDim;
  args = {m.floats(count), m.floats(units), m.out<float>(count), kRows, units, kDim, DType::kFloat32};
}

void make(MaskUnitsBackwardArgs& args, Memory& m) {
  const int64_t rows = kMaskRows + 6, units = 7, count = rows * units * kDim;
  args = {m.floats(count),
          m.floats(count),
          m.floats(units),
          m.out<float>(count),
          m.out<float>(units),
          nullptr,
          rows,
          units,
          kDim,
          DType::kFloat32,
          true,
          Activation::kSilu};
}

// Two deltas, of two gathered, two scattered and one low-rank row each.
void make(GroupedDeltaArgs& args, Memory& m) {
  const int64_t inputs = 19, outputs = 130, tokens = 4;
  const DeltaBank bank{m.starts({0, 2, 4}),
                       m.numbers<int32_t>(4, 0, inputs - 1),
                       m.floats(4 * outputs),
                       m.starts({0, 2, 4}),
                       m.order<int32_t>({0, 7, 64, 129}),
                       m.floats(4 * inputs),
                       m.starts({0, 1, 2}),
                       m.floats(2 * inputs),
                       m.floats(2 * outputs),
                       2,
                       inputs,
                       outputs};
  args = {bank,
          m.floats(tokens * inputs),
          m.numbers<int64_t>(tokens, -1, 2),
          m.floats(tokens * outputs),
          nullptr,
          tokens,
          5,
          DType::kFloat32};
}

void make(SelectiveScanArgs& args, Memory& m) {
  const int64_t count = kBatch * kLength * kChannels, states = kBatch * kStates * kChannels;
  const auto input = [&] { return m.tensor(m.floats(count), kLength, kChannels); };
  args = {input(),
          input(),
          input(),
          m.tensor(m.out<float>(count), kLength, kChannels),
          m.floats(kStates * kChannels),
          m.floats(kBatch * kLength * kGroups * kStates),
          m.floats(kStates * kChannels),
          m.floats(kChannels),
          m.floats(kChannels),
          m.floats(states),
          m.out<float>(states),
          m.out<float>(2 * states),
          kBatch,
          kLength,
          kChannels,
          kStates,
          kGroups,
          DType::kFloat32,
          true,
          false,
          true};
}

void make(SelectiveScanBackwardArgs& args, Memory& m) {
  make(args.forward, m);
  const int64_t count = kBatch * kLength * kChannels, states = kBatch * kStates * kChannels;
  const auto output = [&] { return m.tensor(m.out<float>(count), kLength, kChannels); };
  args.forward.out = m.tensor(m.floats(count), kLength, kChannels);
  args.forward.chunks = m.floats(2 * states);
  args.grad_u = output();
  args.grad_delta = output();
  args.grad_z = output();
  args.out_again = output();
  args.grad_a = m.floats(kStates * kChannels);
  args.grad_b = m.out<float>(kBatch * kLength * kGroups * kStates);
  args.grad_c = m.floats(kStates * kChannels);
  args.grad_d = m.floats(kChannels);
  args.grad_delta_bias = m.floats(kChannels);
  args.grad_first = m.floats(states);
}

void make(StateUpdateArgs& args, Memory& m) {
  const int64_t width = kGroups * kDim, rows = 3;
  args = {m.floats(rows * width * kStates),
          m.order<int64_t>({0, -1, 2}),
          {m.floats(rows * width), width, kDim, 1},
          {m.floats(rows * width), width, kDim, 1},
          {m.floats(rows * width), width, kDim, 1},
          m.out<float>(rows * width),
          {m.floats(kGroups), 0, 1, 0},
          0,
          m.floats(rows * kGroups * kStates),
          m.floats(rows * kGroups * kStates),
          {m.floats(width), 0, kDim, 1},
          {m.floats(kGroups), 0, 1, 0},
          rows,
          kGroups,
          kDim,
          kStates,
          kGroups,
          DType::kFloat32,
          DType::kFloat32,
          true};
}

void make(CausalConv1dArgs& args, Memory& m) {
  const int64_t count = kBatch * kLength * kChannels;
  args = {m.tensor(m.floats(count), kLength, kChannels),
          m.tensor(m.out<float>(count), kLength, kChannels),
          m.tensor(m.floats(kBatch * (kTaps - 1) * kChannels), kTaps - 1, kChannels),
          m.floats(kTaps * kChannels),
          m.floats(kChannels),
          m.numbers<int32_t>(kBatch * kLength, 0, 1),
          kBatch,
          kLength,
          kChannels,
          kTaps,
          DType::kFloat32,
          true};
}

void make(CausalConv1dBackwardArgs& args, Memory& m) {
  make(args.forward, m);
  const int64_t count = kBatch * kLength * kChannels;
  args.forward.out = m.tensor(m.floats(count), kLength, kChannels);
  args.grad_x = m.tensor(m.out<float>(count), kLength, kChannels);
  args.grad_first = m.tensor(m.out<float>(kBatch * (kTaps - 1) * kChannels), kTaps - 1, kChannels);
  args.grad_weight = m.floats(kTaps * kChannels);
  args.grad_bias = m.floats(kChannels);
}

void make(CausalConv1dUpdateArgs& args, Memory& m) {
  const int64_t rows = 3, steps = 2;
  args = {m.tensor(m.floats(rows * steps * kChannels), steps, kChannels),
          m.tensor(m.out<float>(rows * steps * kChannels), steps, kChannels),
          m.floats(rows * kChannels * kTaps),
          m.order<int64_t>({0, -1, 2}),
          m.floats(kTaps * kChannels),
          m.floats(kChannels),
          rows,
          steps,
          kChannels,
          kTaps,
          kTaps,
          DType::kFloat32,
          true};
}

void make(SsdArgs& args, Memory& m) {
  const int64_t heads = 2 * kGroups, width = heads * kDim, count = kBatch * kLength * width;
  args = {m.tensor(m.floats(count), kLength, width),
          m.tensor(m.out<float>(count), kLength, width),
          m.floats(kBatch * kLength * heads),
          m.floats(kBatch * kLength * heads),
          m.floats(kBatch * kLength * kGroups * kStates),
          m.floats(kBatch * kLength * kGroups * kStates),
          m.floats(width),
          m.floats(kBatch * width * kStates),
          m.out<float>(kBatch * width * kStates),
          kBatch,
          kLength,
          heads,
          kDim,
          kStates,
          kGroups,
          DType::kFloat32};
}

void make(SsdBackwardArgs& args, Memory& m) {
  make(args.forward, m);
  const SsdArgs& f = args.forward;
  const int64_t width = f.heads * kDim, count = kBatch * kLength * width;
  args.forward.out = m.tensor(m.floats(count), kLength, width);
  args.grad_x = m.tensor(m.out<float>(count), kLength, width);
  args.grad_step = m.out<float>(kBatch * kLength * f.heads);
  args.grad_log_decay = m.out<float>(kBatch * kLength * f.heads);
  args.grad_b = m.floats(kBatch * kLength * kGroups * kStates);
  args.grad_c = m.floats(kBatch * kLength * kGroups * kStates);
  args.grad_d = m.floats(width);
  args.grad_first = m.floats(kBatch * width * kStates);
}

void make(LogitRowsArgs& args, Memory& m) {
  args = {m.floats(kRows * kWidth),
          m.floats(kRows * kWidth),
          m.numbers<uint8_t>(kRows, 0, 1),
          m.out<float>(kRows * kRowStats),
          kRows,
          kWidth - 2,
          kWidth,
          DType::kFloat32,
          0.5f,
          1.0f};
}

void make(LogitRowsBackwardArgs& args, Memory& m) {
  const int64_t begin = 3, most = 2, rank = 3;
  make(args.forward, m);
  args.forward.stats = m.floats(kRows * kRowStats);
  args.slopes = m.floats(3);
  args.kept = m.order<int32_t>({-1, 3, 5, 9, 20, kWidth - 3});
  args.kept_grad = m.floats(kRows * most);
  args.left = m.floats(kRows * rank);
  args.right = m.floats(rank * (args.forward.width - begin));
  args.grad = m.out<float>(kRows * kWidth);
  args.begin = begin, args.end = args.forward.width, args.most = most, args.rank = rank;
}

// Two matrices, one with a window; their records are the host's.
void make(GaloreStepArgs& args, Memory& m) {
  static GaloreMatrix matrices[2];
  const int64_t count = kRows * kWidth, rows = 3;
  for (GaloreMatrix& matrix : matrices) {
    matrix = {m.floats(count),
              m.out<float>(count),
              m.floats(count),
              m.floats(count),
              nullptr,
              nullptr,
              nullptr,
              nullptr,
              count,
              0,
              0,
              0,
              2,
              5};
  }
  matrices[1].history = m.floats(rows * count);
  matrices[1].gram = m.doubles(rows * rows);
  matrices[1].failures = m.numbers<int64_t>(1, 0, 9);
  matrices[1].outcome = m.out<int64_t>(1);
  matrices[1].rows = matrices[1].fill = rows;
  args = {
      matrices, nullptr, 2,    2 * count, rows, DType::kFloat32, DType::kFloat32, false, false, true, false, false, 0.5,
      0.9,      0.99,    1e-3, 0.1f,      0.9f};
}

void make(GaloreUpdateArgs& args, Memory& m) {
  const int64_t count = kRows * kWidth;
  args = {m.floats(count), m.floats(count), count, 5, DType::kFloat32, false, 0.1f, 0.9f};
}

// Clouds of more points than registers hold of one, of which all but `kWidth` are padding.
void make(FarthestPointSampleArgs& args, Memory& m) {
  const int64_t clouds = 2, size = 7000, samples = 9;
  args = {m.floats(clouds * size * 3),
          m.numbers<int64_t>(clouds, 5, kWidth),
          m.out<int64_t>(clouds * samples),
          nullptr,
          clouds,
          size,
          samples,
          2,
          true};
}

// A cloud's points, queries and lengths, and their numbers, for a search of either kind.
template <class Args>
void make_search(Args& args, Memory& m) {
  args.clouds = 2, args.size = kWidth, args.count = 5, args.k = 3;
  args.points = m.floats(args.clouds * args.size * 3);
  args.queries = m.floats(args.clouds * args.count * 3);
  args.lengths = m.numbers<int64_t>(args.clouds, 2, kWidth);
  args.indices = m.out<int64_t>(args.clouds * args.count * args.k);
}

void make(KnnArgs& args, Memory& m) {
  make_search(args, m);
  args.distances = m.out<float>(args.clouds * args.count * args.k);
}

void make(BallQueryArgs& args, Memory& m) {
  make_search(args, m);
  args.mask = m.out<uint8_t>(args.clouds * args.count * args.k);
  args.square = 1.0f;
}

void make(GatherPointsArgs& args, Memory& m) {
  const int64_t clouds = 2, size = 7, k = 3;
  args = {m.floats(clouds * size * kWidth),
          m.numbers<int64_t>(clouds * kRows * k, 0, size - 1),
          m.floats(clouds * kRows * k),
          m.out<float>(clouds * kRows * kWidth),
          clouds,
          size,
          kRows,
          k,
          kWidth,
          DType::kFloat32};
}

void make(GatherPointsBackwardArgs& args, Memory& m) {
  const int64_t clouds = 2, size = 7, k = 3;
  args = {m.floats(clouds * kRows * kWidth),
          m.floats(clouds * size * kWidth),
          m.numbers<int64_t>(clouds * kRows * k, 0, size - 1),
          m.floats(clouds * kRows * k),
          m.out<float>(clouds * size * kWidth),
          m.out<float>(clouds * kRows * k),
          nullptr,
          clouds,
          size,
          kRows,
          k,
          kWidth,
          DType::kFloat32};
}

// ----------------------------------------------------------------------------

template <class Args, class GiveRoom>
void test_op(const char* name, void (*op)(const Args&, Stream), GiveRoom&& give_room) {
  std::printf("%s\n", name);  // the last one is whose host code a fault is in
  std::fflush(stdout);
  Memory memory;
  Args args{};
  make(args, memory);
  give_room(args, memory);
  std::vector<char> wanted[2];
  for (const unsigned seed : {0u, 1u}) {
    memory.fill(seed);
    op(args, nullptr);
    wanted[seed] = memory.contents();
  }
  CHECK(wanted[0] != wanted[1]);
  emulator::Stream stream;
  memory.shut();
  op(args, &stream);
  memory.open();
  CHECK(memory.contents() == wanted[1]);
  args = {};
  for (const unsigned seed : {0u, 1u, 0u}) {
    memory.fill(seed);
    CHECK(stream.replay() == nullptr);
    CHECK(memory.contents() == wanted[seed]);
  }
}

}  // namespace
}  // namespace deftcore

int main() {
  using namespace deftcore;
#define TEST_OP(op, Args, room, devices, where)                                                                   \
  DEFTCORE_IF_##devices##_cuda(                                                                                   \
      test_op<Args>(#op, cuda::op, [](Args& args, [[maybe_unused]] Memory& m) {                                   \
        DEFTCORE_IF_##room(args.workspace = m.out<char>(static_cast<int64_t>(cuda::op##_workspace(args)));)(void) \
            args;                                                                                                 \
      });)
  return run_tests([] { DEFTCORE_OPS(TEST_OP, ) });
}
