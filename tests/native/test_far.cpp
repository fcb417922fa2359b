// Elements whose numbers pass 2^31: what strides reach that far gives what the same numbers side by side give.
#include <sys/mman.h>

#include "check.h"
#include "deftcore/ops.h"

using namespace deftcore;

namespace {

constexpr int64_t kFar = (int64_t{1} << 31) + 64;

// Rows of floats, apart in memory of which only the pages in use exist.
class Rows {
 public:
  // Normal numbers of a seed; of seed 0 NaN.
  Rows(bool far, int64_t rows, int64_t width, unsigned seed)
      : rows_(rows), width_(width), stride_(far ? kFar : width), bytes_(static_cast<size_t>(rows * stride_) * 4) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    data_ = static_cast<float*>(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, flags, -1, 0));
    if (data_ == MAP_FAILED) std::perror("rows"), std::abort();
    const std::vector<float> values = random_floats(static_cast<size_t>(rows * width), seed);
    for (size_t i = 0; i < values.size(); ++i) at(i) = seed == 0 ? NAN : values[i];
  }
  ~Rows() { munmap(data_, bytes_); }
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;

  float* data() const { return data_; }
  int64_t stride() const { return stride_; }
  void add_to(std::vector<float>& all) const {
    for (size_t i = 0; i < static_cast<size_t>(rows_ * width_); ++i) all.push_back(at(i));
  }

 private:
  float& at(size_t i) const {
    const auto n = static_cast<int64_t>(i);
    return data_[n / width_ * stride_ + n % width_];
  }

  int64_t rows_, width_, stride_;
  size_t bytes_;
  float* data_;
};

// float [kBatch, kLength, kChannels], with steps or channels apart.
constexpr int64_t kBatch = 2, kLength = 2, kChannels = 3, kStates = 2;

struct Layout {
  bool far, by_channel;
};

struct Tensor : Rows {
  bool by_channel;
  Tensor(Layout layout, unsigned seed)
      : Rows(layout.far, kBatch * (layout.by_channel ? kChannels : kLength), layout.by_channel ? kLength : kChannels,
             seed),
        by_channel(layout.by_channel) {}
  ScanTensor view() const {
    if (by_channel) return {data(), kChannels * stride(), 1, stride()};
    return {data(), kLength * stride(), stride(), 1};
  }
};

template <class Args>
Room with_workspace(Args& args, size_t (*workspace)(const Args&)) {
  Room room(workspace(args));
  args.workspace = room.data();
  return room;
}

std::vector<float> floats(int64_t count, unsigned seed) { return random_floats(static_cast<size_t>(count), seed); }

// ---------------------------------------------------------------------------- what each op gives

std::vector<float> sparse(Layout layout) {
  const int64_t neurons = 3, width = 5;
  const Rows gate(layout.far, neurons, width, 1), up(layout.far, neurons, width, 2),
      down(layout.far, neurons, width, 3);
  const std::vector<float> x = floats(width, 4), a = floats(neurons, 5);
  std::vector<float> y(static_cast<size_t>(width), NAN), more = y;
  int64_t rows_read = 0;
  SparseDownArgs one{a.data(), down.data(), nullptr,       y.data(), nullptr,         &rows_read, 1,
                     neurons,  width,       down.stride(), neurons,  DType::kFloat32, 0.0f};
  const Room room = with_workspace(one, device::sparse_down_workspace);
  device::sparse_down(one, nullptr);
  SparseMlpArgs mlp{x.data(),
                    nullptr,
                    gate.data(),
                    up.data(),
                    down.data(),
                    nullptr,
                    nullptr,
                    more.data(),
                    nullptr,
                    &rows_read,
                    1,
                    neurons,
                    width,
                    gate.stride(),
                    up.stride(),
                    down.stride(),
                    neurons,
                    DType::kFloat32,
                    Activation::kSilu,
                    0.0f};
  const Room mlp_room = with_workspace(mlp, device::sparse_mlp_workspace);
  device::sparse_mlp(mlp, nullptr);
  y.insert(y.end(), more.begin(), more.end());
  return y;
}

std::vector<float> gated(Layout layout) {
  const int64_t rows = 3, width = 5;
  const Rows gate(layout.far, rows, width, 1), up(layout.far, rows, width, 2);
  const std::vector<float> grad = floats(rows * width, 3);
  std::vector<float> a(grad.size(), NAN), grad_gate = a, grad_up = a;
  device::gated_act(
      {gate.data(), up.data(), a.data(), rows, width, gate.stride(), up.stride(), DType::kFloat32, Activation::kSilu},
      nullptr);
  device::gated_act_backward({gate.data(), up.data(), grad.data(), grad_gate.data(), grad_up.data(), rows, width,
                              gate.stride(), up.stride(), DType::kFloat32, Activation::kSilu},
                             nullptr);
  a.insert(a.end(), grad_gate.begin(), grad_gate.end());
  a.insert(a.end(), grad_up.begin(), grad_up.end());
  return a;
}

std::vector<float> scan(Layout layout) {
  const Tensor u(layout, 1), delta(layout, 2), z(layout, 3), out(layout, 0), grad(layout, 4), du(layout, 0),
      ddelta(layout, 0), dz(layout, 0), again(layout, 0);
  const std::vector<float> a = floats(kStates * kChannels, 5), b = floats(kBatch * kLength * kStates, 6),
                           c = floats(kBatch * kLength * kStates, 7);
  std::vector<float> last(static_cast<size_t>(kBatch * kStates * kChannels)), chunks = last, first = last;
  SelectiveScanArgs args{u.view(),  delta.view(), z.view(), out.view(),      a.data(),      b.data(), c.data(),
                         nullptr,   nullptr,      nullptr,  last.data(),     chunks.data(), kBatch,   kLength,
                         kChannels, kStates,      1,        DType::kFloat32, true,          false,    false};
  device::selective_scan(args, nullptr);
  args.out = grad.view();
  SelectiveScanBackwardArgs back{args,    du.view(), ddelta.view(), dz.view(), again.view(), nullptr,
                                 nullptr, nullptr,   nullptr,       nullptr,   first.data(), nullptr};
  const Room room = with_workspace(back, device::selective_scan_backward_workspace);
  device::selective_scan_backward(back, nullptr);
  for (const Tensor* t : {&out, &du, &ddelta, &dz, &again}) t->add_to(last);
  return last;
}

std::vector<float> conv(Layout layout) {
  const int64_t width = kLength + 1;  // so that what came before is as long
  const Tensor x(layout, 1), before(layout, 2), out(layout, 0), grad(layout, 3), dx(layout, 0), dbefore(layout, 0),
      stepped(layout, 0);
  const std::vector<float> weight = floats(width * kChannels, 4);
  CausalConv1dArgs args{x.view(), out.view(), before.view(), weight.data(), nullptr,         nullptr,
                        kBatch,   kLength,    kChannels,     width,         DType::kFloat32, true};
  device::causal_conv1d(args, nullptr);
  args.out = grad.view();
  device::causal_conv1d_backward({args, dx.view(), dbefore.view(), nullptr, nullptr}, nullptr);
  std::vector<float> window = floats(kBatch * kChannels * width, 5);
  device::causal_conv1d_update({x.view(), stepped.view(), window.data(), nullptr, weight.data(), nullptr, kBatch,
                                kLength, kChannels, width, width, DType::kFloat32, true},
                               nullptr);
  for (const Tensor* t : {&out, &dx, &dbefore, &stepped}) t->add_to(window);
  return window;
}

// Heads of one channel each.
std::vector<float> heads(Layout layout) {
  const Tensor x(layout, 1), out(layout, 0), grad(layout, 2), dx(layout, 0);
  const int64_t steps = kBatch * kLength;
  const std::vector<float> step = floats(steps * kChannels, 3), b = floats(steps * kStates, 4),
                           c = floats(steps * kStates, 5);
  std::vector<float> last(static_cast<size_t>(kBatch * kChannels * kStates)),
      first = last, dstep = step, ddecay = step, db = b, dc = c, stepped(static_cast<size_t>(kBatch * kChannels));
  SsdArgs args{x.view(),    out.view(), step.data(), step.data(), b.data(), c.data(), nullptr, nullptr,
               last.data(), kBatch,     kLength,     kChannels,   1,        kStates,  1,       DType::kFloat32};
  device::ssd(args, nullptr);
  args.out = grad.view();
  SsdBackwardArgs back{args,      dx.view(), dstep.data(), ddecay.data(), db.data(),
                       dc.data(), nullptr,   first.data(), nullptr};
  const Room room = with_workspace(back, device::ssd_backward_workspace);
  device::ssd_backward(back, nullptr);
  const ScanTensor view = x.view();
  const HeadTensor head{view.data, view.batch, view.channel, 0};
  device::selective_state_update({last.data(),
                                  nullptr,
                                  head,
                                  head,
                                  head,
                                  stepped.data(),
                                  {step.data(), 0, 1, 0},
                                  0,
                                  b.data(),
                                  c.data(),
                                  {},
                                  {},
                                  kBatch,
                                  kChannels,
                                  1,
                                  kStates,
                                  1,
                                  DType::kFloat32,
                                  DType::kFloat32,
                                  true},
                                 nullptr);
  out.add_to(stepped);
  dx.add_to(stepped);
  return stepped;
}

}  // namespace

int main() {
  return run_tests([] {
    for (const bool by_channel : {false, true}) {
      for (const auto run : {sparse, gated, scan, conv, heads}) {
        const std::vector<float> near = run({false, by_channel}), far = run({true, by_channel});
        for (const float value : near) CHECK(std::isfinite(value));
        CHECK(near == far);
      }
    }
  });
}
