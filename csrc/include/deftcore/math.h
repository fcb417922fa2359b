// Scalar formulas, written once for the host, for CUDA and for the CPU vector type (V = float or Vec).
// A type V brings: + - * /, comparisons, where(mask, a, b), exp, normal_cdf, tanh, rcp, abs, at_most, at_least.
#pragma once

#include <cmath>

#include "deftcore/common.h"

#if defined(__CUDACC__)
#define DEFTCORE_HD __host__ __device__ inline
#else
#define DEFTCORE_HD inline
#endif

namespace deftcore::math {

DEFTCORE_HD float where(bool mask, float a, float b) { return mask ? a : b; }
// min and max that keep a NaN of x.
DEFTCORE_HD float at_most(float x, float bound) { return x > bound ? bound : x; }
DEFTCORE_HD float at_least(float x, float bound) { return x < bound ? bound : x; }
DEFTCORE_HD float exp(float x) { return expf(x); }
// Standard normal distribution function, and e^{-z^2 / 2}.
DEFTCORE_HD float normal_cdf(float z, float& bell) {
  bell = expf(-0.5f * z * z);
  return 0.5f * erfcf(z * -0.70710678118654752f);
}
DEFTCORE_HD float tanh(float x) { return tanhf(x); }
DEFTCORE_HD float rcp(float x) { return 1.0f / x; }
DEFTCORE_HD float abs(float x) { return fabsf(x); }
DEFTCORE_HD float sqrt(float x) { return sqrtf(x); }
DEFTCORE_HD double sqrt(double x) { return ::sqrt(x); }

template <class V>
struct ValueGrad {
  V value, grad;
};

inline constexpr float kInvSqrt2Pi = 0.39894228040143268f;
inline constexpr float kSqrt2OverPi = 0.79788456080286536f;
inline constexpr float kGeluCubic = 0.044715f;

// Above this a square is held, so that it stays finite.
inline constexpr float kMaxSquare = 1e30f;
inline constexpr float kMaxRoot = 1e15f;
// Beyond this every slope is 0 or 1 in float; holding z here keeps 0 * infinity out of the derivatives.
inline constexpr float kMaxSlope = 1e4f;
// The largest float. Holding z at its negative keeps infinity * 0 out of z sigmoid(z) and its like, and their sign.
inline constexpr float kLargest = 3.40282347e38f;

// 1 / (1 + e^-z), from the exponential that cannot overflow: also where the result is subnormal.
template <class V>
DEFTCORE_HD V sigmoid(V z) {
  const V one(1.0f), w = exp(V(0.0f) - abs(z));
  return where(z < V(0.0f), w, one) * rcp(one + w);
}

// f(z). NaN goes through all of these: at_most and at_least keep it, and comparisons with it are false.
template <Activation kF, class V>
DEFTCORE_HD V activate(V z) {
  const V zero(0.0f), one(1.0f), half(0.5f);
  if constexpr (kF == Activation::kRelu) {
    return at_least(z, zero);
  } else if constexpr (kF == Activation::kRelu2) {
    const V r = at_least(z, zero);
    return r * r;
  } else if constexpr (kF == Activation::kGeluErf) {
    V bell;
    return at_least(z, V(-kLargest)) * normal_cdf(z, bell);
  } else if constexpr (kF == Activation::kGeluTanh) {
    const V u = V(kSqrt2OverPi) * (z + V(kGeluCubic) * z * z * z);
    return half * at_least(z, V(-kLargest)) * (one + tanh(u));
  } else {
    return at_least(z, V(-kLargest)) * sigmoid(z);
  }
}

// f(z) and f'(z) together: the backward needs both, since the surrogate's slope is taken at a = f(z). For the smooth
// functions the value is that at z held to +-kMaxSlope, which every surrogate's slope takes alike.
template <Activation kF, class V>
DEFTCORE_HD ValueGrad<V> activate_grad(V z) {
  const V zero(0.0f), one(1.0f), half(0.5f);
  if constexpr (kF == Activation::kRelu) {
    return {at_least(z, zero), where(z <= zero, zero, one)};
  } else if constexpr (kF == Activation::kRelu2) {
    const V r = at_least(z, zero);
    return {r * r, r + r};
  } else {
    z = at_most(at_least(z, V(-kMaxSlope)), V(kMaxSlope));
    if constexpr (kF == Activation::kGeluErf) {
      V bell;
      const V cdf = normal_cdf(z, bell);
      return {z * cdf, cdf + z * (V(kInvSqrt2Pi) * bell)};
    } else if constexpr (kF == Activation::kGeluTanh) {
      const V z2 = z * z;
      const V t = tanh(V(kSqrt2OverPi) * (z + V(kGeluCubic) * z2 * z));
      const V slope = V(kSqrt2OverPi) * (one + V(3 * kGeluCubic) * z2);
      const V cdf = half * (one + t);
      return {z * cdf, cdf + half * z * (one - t * t) * slope};
    } else {
      const V s = sigmoid(z);
      return {z * s, s * (one + z * (one - s))};
    }
  }
}

template <class V>
struct GatedSlopes {
  V gate, up;
};

// Slopes of f(gate) * up: grad * up * f'(gate) and grad * f(gate).
template <Activation kF, class V>
DEFTCORE_HD GatedSlopes<V> gated_slopes(V gate, V up, V grad) {
  const auto f = activate_grad<kF>(gate);
  // The value above is that at a held argument, beyond which a smooth f is the identity.
  const V value = kF == Activation::kRelu2 ? f.value : where(gate > V(kMaxSlope), gate, f.value);
  return {grad * f.grad * up, grad * value};  // in this order no product overflows that a slope of 0 ends
}

// log(1 + e^x), x itself above 20 as in PyTorch. With w = e^-|x|: max(x, 0) + 2 atanh(w / (w + 2)), by its series,
// which seven terms give to float precision since w / (w + 2) <= 1/3.
inline constexpr float kSoftplusLinear = 20.0f;
template <class V>
DEFTCORE_HD V softplus(V x) {
  const V zero(0.0f), w = exp(zero - abs(x)), s = w * rcp(w + V(2.0f)), s2 = s * s;
  V sum = V(1.0f / 13) + s2 * V(1.0f / 15);
  sum = V(1.0f / 11) + s2 * sum;
  sum = V(1.0f / 9) + s2 * sum;
  sum = V(1.0f / 7) + s2 * sum;
  sum = V(1.0f / 5) + s2 * sum;
  sum = V(1.0f / 3) + s2 * sum;
  return where(x > V(kSoftplusLinear), x, at_least(x, zero) + V(2.0f) * s * (V(1.0f) + s2 * sum));
}

// Density surrogate s(a) and its slope s'(a); p is eps for l0, beta for tanh, unused for l1.
template <Surrogate kS, class V>
DEFTCORE_HD V surrogate(V a, V p) {
  if constexpr (kS == Surrogate::kL0) {
    const V square = at_most(a * a, V(kMaxSquare));
    return square * rcp(square + p);
  } else if constexpr (kS == Surrogate::kTanh) {
    return tanh(p * abs(a));
  } else {
    return abs(a);
  }
}

template <Surrogate kS, class V>
DEFTCORE_HD V surrogate_grad(V a, V p) {
  const V zero(0.0f), one(1.0f);
  if constexpr (kS == Surrogate::kL0) {
    const V held = at_most(at_least(a, V(-kMaxRoot)), V(kMaxRoot));  // its slope underflows to the exact 0
    const V r = rcp(held * held + p);
    return (held * r) * ((p + p) * r);
  } else {
    const V sign = where(a == zero, zero, where(a < zero, zero - one, one));
    if constexpr (kS == Surrogate::kL1) return sign;
    const V s = tanh(p * abs(a));
    return p * sign * (one - s * s);
  }
}

}  // namespace deftcore::math
