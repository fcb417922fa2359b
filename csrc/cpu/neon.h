// The vector type of isa.h for ARM64's NEON, which every such processor has. Read inside isa.h's namespace.
#pragma once

constexpr int kWidth = 4;
constexpr int kRegisters = 32;

struct Vec {
  float32x4_t v;
  Vec() = default;
  Vec(float32x4_t x) : v(x) {}
  explicit Vec(float x) : v(vdupq_n_f32(x)) {}
};
struct Mask {
  uint32x4_t m;
};
inline Vec operator+(Vec a, Vec b) { return vaddq_f32(a.v, b.v); }
inline Vec operator-(Vec a, Vec b) { return vsubq_f32(a.v, b.v); }
inline Vec operator*(Vec a, Vec b) { return vmulq_f32(a.v, b.v); }
inline Vec operator/(Vec a, Vec b) { return vdivq_f32(a.v, b.v); }
inline Mask operator>(Vec a, Vec b) { return {vcgtq_f32(a.v, b.v)}; }
inline Mask operator<(Vec a, Vec b) { return {vcltq_f32(a.v, b.v)}; }
inline Mask operator<=(Vec a, Vec b) { return {vcleq_f32(a.v, b.v)}; }
inline Mask operator==(Vec a, Vec b) { return {vceqq_f32(a.v, b.v)}; }
inline Vec where(Mask m, Vec a, Vec b) { return vbslq_f32(m.m, a.v, b.v); }
inline Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c.v, a.v, b.v); }
// x where one is NaN, or both are zeros: the instructions' own choice is another one.
inline Vec at_most(Vec x, Vec bound) { return where(bound < x, bound, x); }
inline Vec at_least(Vec x, Vec bound) { return where(bound > x, bound, x); }
inline Vec abs(Vec a) { return vabsq_f32(a.v); }
inline Vec sqrt(Vec a) { return vsqrtq_f32(a.v); }
inline Vec round(Vec a) { return vrndnq_f32(a.v); }
inline Vec scale2(Vec a, Vec n) {  // |n| <= 252, in two halves so that neither factor leaves the normal range
  const int32x4_t k = vcvtq_s32_f32(n.v), half = vshrq_n_s32(k, 1), bias = vdupq_n_s32(127);
  const auto pow2 = [&](int32x4_t e) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(e, bias), 23)); };
  return vmulq_f32(vmulq_f32(a.v, pow2(half)), pow2(vsubq_s32(k, half)));
}
inline Vec rcp(Vec a) { return vdivq_f32(vdupq_n_f32(1.0f), a.v); }
inline float reduce_add(Vec a) { return vaddvq_f32(a.v); }
inline float reduce_max(Vec a) { return vmaxvq_f32(a.v); }
inline uint32_t bits_of(Mask m) {
  const uint32_t kBits[4] = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(m.m, vld1q_u32(kBits)));
}
// Bit i set where !(|a| <= tau): NaN counts as active.
inline uint32_t active_bits(Vec a, Vec tau) { return bits_of(abs(a) <= tau) ^ 15; }

inline Vec load(const float* p) { return vld1q_f32(p); }
inline Vec load(const BFloat16* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p)), 16));
}
inline Vec load(const Float16* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
}
inline void store(float* p, Vec a) { vst1q_f32(p, a.v); }
inline void store(BFloat16* p, Vec a) {  // as to_bfloat16
  const uint32x4_t bits = vreinterpretq_u32_f32(a.v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
  const uint32x4_t kept = vbslq_u32(vceqq_f32(a.v, a.v), rounded, quiet);
  vst1_u16(reinterpret_cast<uint16_t*>(p), vshrn_n_u32(kept, 16));
}
inline void store(Float16* p, Vec a) {
  vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(a.v)));
}
// Writes base + i for each set bit, in order. May write up to kWidth entries past the last.
inline void compress(int32_t* out, uint32_t bits, int32_t base) {
  static constexpr uint32_t kPlaces[16] = {0,     0,       1,       0x100,    // of each set of bits the places
                                           2,     0x200,   0x201,   0x20100,  // of those that are set, a byte
                                           3,     0x300,   0x301,   0x30100,  // each
                                           0x302, 0x30200, 0x30201, 0x3020100};
  const uint8x8_t places = vreinterpret_u8_u32(vdup_n_u32(kPlaces[bits]));
  const uint32x4_t lanes = vmovl_u16(vget_low_u16(vmovl_u8(places)));
  vst1q_s32(out, vaddq_s32(vreinterpretq_s32_u32(lanes), vdupq_n_s32(base)));
}
