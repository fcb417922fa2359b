// The vector functions of one instruction set, and its conversions, against double at the ends of the float range:
// signed zeros, subnormals, the largest numbers, infinities and NaN. Built once per level.
#include <cfloat>

#include "check.h"
#include "isa.h"
#include "scan_tile.h"

using namespace deftcore;
using namespace deftcore::cpu;

namespace {

std::vector<float> hard_numbers() {
  std::vector<float> values = {NAN, INFINITY, -INFINITY};
  const float sizes[] = {0.0f,  1.5e-45f, 1e-40f, FLT_MIN, 1e-30f,  1e-15f, 1e-8f,  1e-4f,  0.1f,   0.59f,  0.61f,
                         1.0f,  2.5f,     5.0f,   9.9f,    15.1f,   20.0f,  20.5f,  50.0f,  87.0f,  88.2f,  88.4f,
                         88.7f, 88.8f,    95.0f,  103.9f,  104.1f,  110.0f, 126.5f, 127.9f, 128.0f, 148.0f, 149.9f,
                         151.f, 253.0f,   400.0f, 1e3f,    9e3f,    1.1e4f, 1e5f,   1e10f,  1e15f,  1e19f,  2e19f,
                         1e30f, 1e31f,    8e37f,  9e37f,   2.2e38f, 3e38f,  FLT_MAX};
  for (float size : sizes) {
    values.push_back(size);
    values.push_back(-size);
  }
  return values;
}

// fn of x in every lane; the lanes must agree.
template <class Fn>
float on_lanes(Fn&& fn, float x) {
  float lanes[kWidth];
  store(lanes, fn(Vec(x)));
  for (float lane : lanes) CHECK(std::memcmp(&lane, lanes, 4) == 0);
  return lanes[0];
}

// As near as `relative` and `absolute` say; infinite and NaN where the reference is; and a 0 has its sign.
void check_value(const char* name, float x, float ours, double exact, double relative, double absolute,
                 bool sign = true) {
  const float ref = static_cast<float>(exact);
  bool good;
  if (std::isnan(exact)) {
    good = std::isnan(ours);
  } else if (std::isinf(ref)) {
    good = ours == ref;
  } else {
    good = std::fabs(ours - exact) <= relative * std::fabs(exact) + absolute;
    if (sign && ours == 0.0f) good = good && std::signbit(ours) == std::signbit(exact);
  }
  if (!good) std::printf("%s(%.9g) is %.9g, must be %.9g\n", name, x, ours, exact);
  CHECK(good);
}

double sigmoid(double z) { return z < 0 ? std::exp(z) / (1 + std::exp(z)) : 1 / (1 + std::exp(-z)); }
double bell(double z) { return std::exp(-z * z / 2) / std::sqrt(2 * 3.14159265358979323846); }
double cdf(double z) { return std::erfc(-z / std::sqrt(2.0)) / 2; }
double tanh_argument(double z) { return std::sqrt(2 / 3.14159265358979323846) * (z + 0.044715 * z * z * z); }

// f(z) and f'(z), the limits at infinity included.
double activation(Activation f, double z) {
  if (z == -INFINITY) return f == Activation::kRelu || f == Activation::kRelu2 ? 0.0 : -0.0;
  switch (f) {
    case Activation::kRelu: return z > 0 ? z : z < 0 ? 0 : z;
    case Activation::kRelu2: return z > 0 ? z * z : z <= 0 ? 0 : z;
    case Activation::kGeluErf: return z * cdf(z);
    case Activation::kGeluTanh: return z * sigmoid(2 * tanh_argument(z));
    default: return z * sigmoid(z);
  }
}
double slope(Activation f, double z) {
  if (std::isinf(z)) return z < 0 ? 0 : f == Activation::kRelu2 ? INFINITY : 1;
  switch (f) {
    case Activation::kRelu: return z > 0 ? 1 : z <= 0 ? 0 : 1;
    case Activation::kRelu2: return z > 0 ? 2 * z : z <= 0 ? 0 : z;
    case Activation::kGeluErf: return std::fabs(z) > 1e4 ? z > 0 : cdf(z) + z * bell(z);
    case Activation::kGeluTanh: {
      if (std::fabs(z) > 1e4) return z > 0;
      const double s = sigmoid(2 * tanh_argument(z)), inner = std::sqrt(8 / 3.14159265358979323846);
      return s + z * s * (1 - s) * inner * (1 + 3 * 0.044715 * z * z);
    }
    default: return std::fabs(z) > 1e4 ? z > 0 : sigmoid(z) * (1 + z * (1 - sigmoid(z)));
  }
}

template <Activation kF>
void test_activation(float x) {
  // Two ulp of subnormals; the tail of a GELU comes from 1 - tanh or a squared argument.
  const bool gelu = kF == Activation::kGeluErf || kF == Activation::kGeluTanh;
  const double absolute = gelu ? 2e-6 : 1e-42;
  check_value("activation", x, on_lanes([](Vec v) { return math::activate<kF>(v); }, x), activation(kF, x), 5e-7,
              absolute);
  const float grad = on_lanes([](Vec v) { return math::activate_grad<kF>(v).grad; }, x);
  if (!(kF == Activation::kRelu && std::isnan(x))) check_value("slope", x, grad, slope(kF, x), 1e-6, 2e-6, false);
  for (float big : {1e30f, FLT_MAX}) {  // slopes of f(gate) * up: a slope of 0 ends them
    if (std::fabs(x) < 1e4f || std::isinf(x) || x != x) continue;
    const auto up = on_lanes([&](Vec v) { return math::gated_slopes<kF>(v, Vec(big), Vec(big)).gate; }, x);
    check_value("gated slope", x, up, x < 0 ? 0.0 : static_cast<double>(big) * big, 0, 0, false);
  }
}

template <class T>
void test_conversion(float x, double step, double smallest, double largest) {
  T narrow[kWidth], one[1];
  store_ieee(narrow, Vec(x));
  store_tail(one, Vec(x), 1);
  const float back = to_float(narrow[0]);
  float again[kWidth];
  store(again, load(narrow));
  CHECK(std::memcmp(again, &back, 4) == 0);  // reading keeps every bit, of subnormals too
  double exact = x;
  if (std::fabs(exact) > largest) exact = std::copysign(INFINITY, exact);
  check_value("rounded", x, back, exact, step, smallest);
  if (std::fabs(x) > 2e-38f) CHECK(to_float(one[0]) == back);  // the quick form may lose subnormals
}

void test_number(float x) {
  const double y = x;
  const auto function = [&](const char* name, auto fn, double exact, double relative, double absolute) {
    check_value(name, x, on_lanes(fn, x), exact, relative, absolute);
  };
  function("exp", [](Vec v) { return exp(v); }, std::exp(y), 3e-7, 2e-45);
  const bool flushed = kWidth == 8 && x < -126;  // AVX2 has no decays below the smallest normal number
  function("exp2", [](Vec v) { return exp2_decay(v); }, flushed ? 0 : std::exp2(y), 3e-7, flushed ? 0 : 2e-45);
  function("tanh", [](Vec v) { return tanh(v); }, std::tanh(y), 4e-7, 0);
  function("sigmoid", [](Vec v) { return math::sigmoid(v); }, sigmoid(y), 5e-7, 3e-45);
  function(
      "softplus", [](Vec v) { return math::softplus(v); },
      y > 0 ? y + std::log1p(std::exp(-y)) : std::log1p(std::exp(y)), 5e-7, 3e-45);
  const auto normal = [](Vec v) {
    Vec density;
    return normal_cdf(v, density);
  };
  const auto density = [](Vec v) {
    Vec found;
    normal_cdf(v, found);
    return found;
  };
  function("normal_cdf", normal, cdf(y), 1e-5, 1e-43);
  function("bell", density, std::exp(-y * y / 2), 1e-5, 1e-43);
  test_activation<Activation::kRelu>(x);
  test_activation<Activation::kRelu2>(x);
  test_activation<Activation::kGeluErf>(x);
  test_activation<Activation::kGeluTanh>(x);
  test_activation<Activation::kSilu>(x);
  const double square = std::isinf(y) ? 1 : y * y / (y * y + 1e-7f);
  function("l0", [](Vec v) { return math::surrogate<Surrogate::kL0>(v, Vec(1e-7f)); }, square, 4e-7, 1e-37);
  function(
      "tanh surrogate", [](Vec v) { return math::surrogate<Surrogate::kTanh>(v, Vec(20.0f)); },
      std::tanh(20 * std::fabs(y)), 4e-7, 1e-43);
  const double s = std::fabs(y),
               l0_slope = s > 1e15 ? std::copysign(0.0, y) : 2 * y * 1e-7f / ((y * y + 1e-7f) * (y * y + 1e-7f));
  function(
      "l0 slope", [](Vec v) { return math::surrogate_grad<Surrogate::kL0>(v, Vec(1e-7f)); }, l0_slope, 1e-6, 1e-37);
  test_conversion<float>(x, 0, 0, INFINITY);
  test_conversion<BFloat16>(x, 1.0 / 256, 5e-41, 3.3961e38);
  test_conversion<Float16>(x, 1.0 / 2048, 3e-8, 65519.99);
}

// Of small exponents: 1 at 0, never above 1 below it, rising but for the last bits, NaN kept.
void test_small_decay() {
  const SmallDecay decay;
  const auto of = [&](float s, float a) { return on_lanes([&](Vec v) { return decay(v, Vec(a)); }, s); };
  CHECK(of(0.0f, -3.0f) == 1.0f && of(5.0f, 0.0f) == 1.0f && of(1e-30f, -1e-10f) == 1.0f);
  CHECK(std::isnan(of(NAN, -1.0f)) && std::isnan(of(1.0f, NAN)) && std::isnan(of(-NAN, 1.0f)));
  float before = 0;
  for (int i = -125 * 512; i <= 125 * 512; ++i) {
    const float s = static_cast<float>(i) / 1536.0f, value = of(s, 3.0f);
    const float product = std::is_same_v<SmallDecay, AnyDecay> ? 6e-8f * std::fabs(3 * s) : 0;  // which that rounds
    check_value("small decay", s, value, std::exp2(3.0 * s), 2.4e-7 + product, 0);
    CHECK(value >= before * (1 - 2.4e-7f) && (i > 0 || value <= 1.0f));
    before = value;
  }
}

}  // namespace

int main() {
  return run_tests([] {
    isa_name();  // this machine may lack the level
    for (float x : hard_numbers()) test_number(x);
    test_small_decay();
  });
}
