// The vector type of isa.h as DEFTCORE_LANES lanes of plain C++, with the registers of AVX-512. Only test builds have
// such a level: it takes any machine through what is shaped for AVX-512. Read inside isa.h's namespace.
#pragma once

constexpr int kWidth = DEFTCORE_LANES;
constexpr int kRegisters = 32;

struct Vec {
  float v[kWidth];
  Vec() = default;
  explicit Vec(float x) {
    for (float& lane : v) lane = x;
  }
};
struct Mask {
  uint32_t bits;
};
template <class Fn>
inline Vec lanes_of(Fn&& fn) {
  Vec out;
  for (int i = 0; i < kWidth; ++i) out.v[i] = fn(i);
  return out;
}
template <class Fn>
inline Mask mask_of(Fn&& fn) {
  uint32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= static_cast<uint32_t>(fn(i)) << i;
  return {bits};
}
inline Vec operator+(Vec a, Vec b) {
  return lanes_of([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
  return lanes_of([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
  return lanes_of([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec operator/(Vec a, Vec b) {
  return lanes_of([&](int i) { return a.v[i] / b.v[i]; });
}
inline Mask operator>(Vec a, Vec b) {
  return mask_of([&](int i) { return a.v[i] > b.v[i]; });
}
inline Mask operator<(Vec a, Vec b) {
  return mask_of([&](int i) { return a.v[i] < b.v[i]; });
}
inline Mask operator<=(Vec a, Vec b) {
  return mask_of([&](int i) { return a.v[i] <= b.v[i]; });
}
inline Mask operator==(Vec a, Vec b) {
  return mask_of([&](int i) { return a.v[i] == b.v[i]; });
}
inline Vec where(Mask m, Vec a, Vec b) {
  return lanes_of([&](int i) { return m.bits >> i & 1 ? a.v[i] : b.v[i]; });
}
inline Vec fma(Vec a, Vec b, Vec c) {
  return lanes_of([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); });
}
inline Vec at_most(Vec x, Vec bound) { return where(bound < x, bound, x); }
inline Vec at_least(Vec x, Vec bound) { return where(bound > x, bound, x); }
inline Vec abs(Vec a) {
  return lanes_of([&](int i) { return std::fabs(a.v[i]); });
}
inline Vec sqrt(Vec a) {
  return lanes_of([&](int i) { return std::sqrt(a.v[i]); });
}
inline Vec round(Vec a) {
  return lanes_of([&](int i) { return std::nearbyint(a.v[i]); });
}
inline Vec scale2(Vec a, Vec n) {
  return lanes_of([&](int i) { return n.v[i] == n.v[i] ? std::ldexp(a.v[i], static_cast<int>(n.v[i])) : n.v[i]; });
}
inline Vec rcp(Vec a) { return Vec(1.0f) / a; }
inline float reduce_add(Vec a) {  // halves onto each other
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  }
  return a.v[0];
}
inline float reduce_max(Vec a) {
  float most = a.v[0];
  for (float lane : a.v) most = lane > most ? lane : most;
  return most;
}
inline uint32_t bits_of(Mask m) { return m.bits; }
inline uint32_t active_bits(Vec a, Vec tau) { return (abs(a) <= tau).bits ^ ((1u << kWidth) - 1); }

template <class T>
inline Vec load(const T* p) {
  return lanes_of([&](int i) { return to_float(p[i]); });
}
inline void store(float* p, Vec a) { std::memcpy(p, a.v, sizeof(a.v)); }
inline void store(BFloat16* p, Vec a) {
  for (int i = 0; i < kWidth; ++i) p[i] = to_bfloat16(a.v[i]);
}
inline void store(Float16* p, Vec a) {
  for (int i = 0; i < kWidth; ++i) p[i] = to_float16(a.v[i]);
}
inline void compress(int32_t* out, uint32_t bits, int32_t base) {
  for (; bits; bits &= bits - 1) *out++ = base + __builtin_ctz(bits);
}
