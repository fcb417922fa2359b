// softplus and SiLU of the scans: next to an exponential per state, those of every step count as much as two or three
// states do. Both begin with w = e^-|x|; log(1 + w) is w times a
// polynomial (relative error below 4e-8, from a Lawson-weighted least-squares fit), in an order of few dependent steps.
#pragma once

#include "decay.h"

namespace deftcore::cpu {
namespace {

// From w = e^-|z|.
inline Vec sigmoid(Vec z, Vec w) {
  const Vec one(1.0f);
  return where(z < Vec(0.0f), w, one) * rcp(one + w);
}

struct Softplus {
  Vec value, w;
};
// log(1 + e^x), which is x to the last bit above 20, where PyTorch switches.
inline Softplus softplus(Vec x) {
  const Vec w = exp_minus_abs(x), w2 = w * w, w4 = w2 * w2;
  const Vec low = fma(w2, fma(w, Vec(-0.248571634f), Vec(0.33321324f)), fma(w, Vec(-0.499996483f), Vec(1.0f)));
  const Vec high =
      fma(w2, fma(w, Vec(-0.0300657861f), Vec(0.0792045221f)), fma(w, Vec(-0.137538016f), Vec(0.191536546f)));
  const Vec ratio = fma(w4, fma(w4, Vec(0.00536482269f), high), low);
  return {fma(w, ratio, at_least(x, Vec(0.0f))), w};
}

inline Vec silu(Vec z) { return at_least(z, Vec(-math::kLargest)) * sigmoid(z, exp_minus_abs(z)); }

// As math::activate_grad.
inline math::ValueGrad<Vec> silu_grad(Vec z) {
  z = at_most(at_least(z, Vec(-math::kMaxSlope)), Vec(math::kMaxSlope));
  const Vec one(1.0f), s = sigmoid(z, exp_minus_abs(z));
  return {z * s, s * fma(z, one - s, one)};
}

}  // namespace
}  // namespace deftcore::cpu
