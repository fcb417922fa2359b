// Codes of 4-bit weights, looked up in registers: what of decode4.h differs between the levels.
//
// AVX2 and NEON have no lookup of 16 floats, but one of 16 bytes: the codes' four bytes are looked up apart, for four
// vectors at a time, and unpacked to floats, at three operations for a vector.
#pragma once

#include <algorithm>

#include "isa.h"

namespace deftcore::cpu {
namespace {

#if defined(__AVX512F__)

using Words = __m512i;
inline Words load_words(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Words load_words(const uint8_t* p, int64_t bytes) {  // zero beyond
  return _mm512_maskz_loadu_epi8(bytes >= 64 ? ~0ull : (1ull << bytes) - 1, p);
}
template <int kShift>
inline Words shift(Words w) {
  return _mm512_srli_epi32(w, 4 * kShift);
}
struct CodeBook {  // the lookup uses four bits of each word and ignores the rest
  __m512 table;
  explicit CodeBook(const float* code) : table(_mm512_loadu_ps(code)) {}
  Vec operator()(Words w) const { return _mm512_permutexvar_ps(w, table); }
  static constexpr int kAtOnce = 1;  // steps of a chunk that are looked up together: kPart, kPart + 8 / kAtOnce, ...
  static constexpr int kHeld = 1;    // registers
  template <int kPart>
  void steps(Words w, Vec* values) const {
    values[0] = (*this)(shift<kPart>(w));
  }
};
// kWidth bytes, one per word: the lowest nibbles are odd elements, the next ones even.
inline Words load_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
// Even and odd elements into order.
inline void interleave(Vec even, Vec odd, Vec& first, Vec& second) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  first = _mm512_permutex2var_ps(even.v, low, odd.v);
  second = _mm512_permutex2var_ps(even.v, _mm512_add_epi32(low, _mm512_set1_epi32(8)), odd.v);
}
// kWidth elements in order, from kWidth / 2 bytes.
inline Words load_nibbles(const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, bytes));
  return _mm512_srlv_epi32(wide, _mm512_set_epi32(0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4));
}
inline Vec gather(const float* table, const uint8_t* index) {
  return _mm512_i32gather_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(index))), table, 4);
}
// A chunk's scales, one per lane of `each` elements: lane l takes scales[lane[l]].
struct LaneScales {
  __m512i lane;
  explicit LaneScales(int64_t block, int64_t each = 8) {
    alignas(64) int32_t index[16];
    for (int l = 0; l < 16; ++l) index[l] = static_cast<int32_t>(each * l / block);
    lane = _mm512_load_si512(index);
  }
  Vec operator()(const float* scales) const { return _mm512_permutexvar_ps(lane, _mm512_loadu_ps(scales)); }
};

#elif defined(__AVX2__)

using Words = __m256i;
inline Words load_words(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Words load_words(const uint8_t* p, int64_t bytes) {
  if (bytes >= 32) return load_words(p);
  alignas(32) uint8_t buffer[32] = {};
  std::memcpy(buffer, p, static_cast<size_t>(bytes));
  return load_words(buffer);
}
template <int kShift>
inline Words shift(Words w) {
  return _mm256_srli_epi32(w, 4 * kShift);
}
struct CodeBook {
  __m256 low, high;   // the codes, for one vector: two lookups of three bits each, chosen by the fourth
  __m256i planes[4];  // their bytes, twice
  explicit CodeBook(const float* code) : low(_mm256_loadu_ps(code)), high(_mm256_loadu_ps(code + 8)) {
    uint8_t bytes[64], plane[16];
    std::memcpy(bytes, code, 64);
    for (int k = 0; k < 4; ++k) {
      for (int i = 0; i < 16; ++i) plane[i] = bytes[4 * i + k];
      planes[k] = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(plane)));
    }
  }
  Vec operator()(Words w) const {
    const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(w, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, w), _mm256_permutevar8x32_ps(high, w), bit3);
  }
  // The codes of 32 bytes below 16: vector k has those of bytes 4 k .. 4 k + 3 of either half.
  void lookup(__m256i index, Vec* values) const {
    const __m256i b0 = _mm256_shuffle_epi8(planes[0], index), b1 = _mm256_shuffle_epi8(planes[1], index);
    const __m256i b2 = _mm256_shuffle_epi8(planes[2], index), b3 = _mm256_shuffle_epi8(planes[3], index);
    const __m256i front = _mm256_unpacklo_epi8(b0, b1), back = _mm256_unpacklo_epi8(b2, b3);
    values[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(front, back));
    values[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(front, back));
    const __m256i front2 = _mm256_unpackhi_epi8(b0, b1), back2 = _mm256_unpackhi_epi8(b2, b3);
    values[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(front2, back2));
    values[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(front2, back2));
  }
  static constexpr int kAtOnce = 4, kHeld = 4;
  template <int kPart>
  void steps(Words w, Vec* values) const {  // the bytes of four words, turned, lie as `lookup` takes them
    const __m256i turn = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                          0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i bytes = _mm256_shuffle_epi8(w, turn);
    lookup(_mm256_and_si256(kPart == 0 ? bytes : _mm256_srli_epi16(bytes, 4), _mm256_set1_epi8(15)), values);
  }
};
inline Words load_nibbles(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  const __m128i bytes = _mm_cvtsi32_si128(word);
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, bytes));
  return _mm256_srlv_epi32(wide, _mm256_set_epi32(0, 4, 0, 4, 0, 4, 0, 4));
}
inline Vec gather(const float* table, const uint8_t* index) {
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(index)));
  return _mm256_i32gather_ps(table, wide, 4);
}
struct LaneScales {
  __m256i lane;
  explicit LaneScales(int64_t block, int64_t each = 8) {
    alignas(32) int32_t index[8];
    for (int l = 0; l < 8; ++l) index[l] = static_cast<int32_t>(each * l / block);
    lane = _mm256_load_si256(reinterpret_cast<const __m256i*>(index));
  }
  Vec operator()(const float* scales) const { return _mm256_permutevar8x32_ps(_mm256_loadu_ps(scales), lane); }
};

#elif defined(DEFTCORE_NEON)

using Words = uint32x4_t;
inline Words load_words(const uint8_t* p) { return vreinterpretq_u32_u8(vld1q_u8(p)); }
inline Words load_words(const uint8_t* p, int64_t bytes) {
  if (bytes >= 16) return load_words(p);
  alignas(16) uint8_t buffer[16] = {};
  std::memcpy(buffer, p, static_cast<size_t>(bytes));
  return load_words(buffer);
}
struct CodeBook {
  uint8x16x4_t floats;   // the codes, for one vector: their bytes in order
  uint8x16_t planes[4];  // and apart
  explicit CodeBook(const float* code) {
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(code);
    const uint8x16x4_t apart = vld4q_u8(bytes);
    for (int k = 0; k < 4; ++k) {
      floats.val[k] = vld1q_u8(bytes + 16 * k);
      planes[k] = apart.val[k];
    }
  }
  Vec operator()(Words w) const {  // code n stands in bytes 4 n .. 4 n + 3
    const uint32x4_t nibble = vandq_u32(w, vdupq_n_u32(15));
    const uint32x4_t index = vmlaq_n_u32(vdupq_n_u32(0x03020100), nibble, 0x04040404);
    return vreinterpretq_f32_u8(vqtbl4q_u8(floats, vreinterpretq_u8_u32(index)));
  }
  // The codes of 16 bytes below 16, in order.
  void lookup(uint8x16_t index, Vec* values) const {
    const uint8x16_t b0 = vqtbl1q_u8(planes[0], index), b1 = vqtbl1q_u8(planes[1], index);
    const uint8x16_t b2 = vqtbl1q_u8(planes[2], index), b3 = vqtbl1q_u8(planes[3], index);
    const auto pairs = [](uint8x16_t x) { return vreinterpretq_u16_u8(x); };
    const uint16x8_t front = pairs(vzip1q_u8(b0, b1)), back = pairs(vzip1q_u8(b2, b3));
    values[0] = vreinterpretq_f32_u16(vzip1q_u16(front, back));
    values[1] = vreinterpretq_f32_u16(vzip2q_u16(front, back));
    const uint16x8_t front2 = pairs(vzip2q_u8(b0, b1)), back2 = pairs(vzip2q_u8(b2, b3));
    values[2] = vreinterpretq_f32_u16(vzip1q_u16(front2, back2));
    values[3] = vreinterpretq_f32_u16(vzip2q_u16(front2, back2));
  }
  static constexpr int kAtOnce = 4, kHeld = 4;
  template <int kPart>
  void steps(Words w, Vec* values) const {  // the bytes of four words, turned, lie as `lookup` takes them
    static constexpr uint8_t kTurn[16] = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};
    const uint8x16_t bytes = vqtbl1q_u8(vreinterpretq_u8_u32(w), vld1q_u8(kTurn));
    lookup(kPart == 0 ? vandq_u8(bytes, vdupq_n_u8(15)) : vshrq_n_u8(bytes, 4), values);
  }
};
inline Words load_nibbles(const uint8_t* p) {
  const int32_t kDown[4] = {-4, 0, -12, -8};
  return vshlq_u32(vdupq_n_u32(p[0] | static_cast<uint32_t>(p[1]) << 8), vld1q_s32(kDown));
}
inline Vec gather(const float* table, const uint8_t* index) {
  const float values[4] = {table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
  return load(values);
}
struct LaneScales {
  int64_t block, each;
  explicit LaneScales(int64_t size, int64_t elements = 8) : block(size), each(elements) {}
  Vec operator()(const float* scales) const {
    float values[4];
    for (int l = 0; l < 4; ++l) values[l] = scales[each * l / block];
    return load(values);
  }
};

#elif defined(DEFTCORE_LANES)

struct Words {
  uint32_t w[kWidth];
};
template <class Fn>
inline Words words_of(Fn&& fn) {
  Words out;
  for (int i = 0; i < kWidth; ++i) out.w[i] = fn(i);
  return out;
}
inline Words load_words(const uint8_t* p, int64_t bytes = 4 * kWidth) {
  Words out{};
  std::memcpy(out.w, p, static_cast<size_t>(std::min<int64_t>(bytes, 4 * kWidth)));
  return out;
}
template <int kShift>
inline Words shift(Words w) {
  return words_of([&](int i) { return w.w[i] >> (4 * kShift); });
}
struct CodeBook {
  const float* code;
  explicit CodeBook(const float* book) : code(book) {}
  Vec operator()(Words w) const {
    return lanes_of([&](int i) { return code[w.w[i] & 15]; });
  }
  static constexpr int kAtOnce = 1, kHeld = 1;
  template <int kPart>
  void steps(Words w, Vec* values) const {
    values[0] = (*this)(shift<kPart>(w));
  }
};
inline Words load_bytes(const uint8_t* p) {
  return words_of([&](int i) { return p[i]; });
}
inline void interleave(Vec even, Vec odd, Vec& first, Vec& second) {
  const auto lane = [&](int i) { return i % 2 ? odd.v[i / 2] : even.v[i / 2]; };
  first = lanes_of(lane);
  second = lanes_of([&](int i) { return lane(i + kWidth); });
}
inline Words load_nibbles(const uint8_t* p) {
  return words_of([&](int i) { return static_cast<uint32_t>(p[i / 2]) >> (i % 2 ? 0 : 4); });
}
inline Vec gather(const float* table, const uint8_t* index) {
  return lanes_of([&](int i) { return table[index[i]]; });
}
struct LaneScales {
  int64_t block, each;
  explicit LaneScales(int64_t size, int64_t elements = 8) : block(size), each(elements) {}
  Vec operator()(const float* scales) const {
    return lanes_of([&](int i) { return scales[each * i / block]; });
  }
};

#else

using Words = uint32_t;
inline Words load_words(const uint8_t* p, int64_t bytes = 4) {
  Words w = 0;
  std::memcpy(&w, p, static_cast<size_t>(bytes < 4 ? bytes : 4));
  return w;
}
template <int kShift>
inline Words shift(Words w) {
  return w >> (4 * kShift);
}
struct CodeBook {
  const float* code;
  explicit CodeBook(const float* book) : code(book) {}
  Vec operator()(Words w) const { return code[w & 15]; }
  static constexpr int kAtOnce = 1, kHeld = 1;
  template <int kPart>
  void steps(Words w, Vec* values) const {
    values[0] = (*this)(shift<kPart>(w));
  }
};
inline Words load_bytes(const uint8_t* p) { return *p; }
inline void interleave(Vec even, Vec odd, Vec& first, Vec& second) {
  first = even;
  second = odd;
}
inline Vec gather(const float* table, const uint8_t* index) { return table[*index]; }
struct LaneScales {
  explicit LaneScales(int64_t, int64_t = 8) {}
  Vec operator()(const float* scales) const { return *scales; }
};

#endif

// Neighbouring elements that are looked up together, in vectors.
constexpr int kStripVecs = CodeBook::kAtOnce == 4 ? 4 : 2;
constexpr int64_t kStrip = kStripVecs * kWidth;
struct Strip {
  Vec v[kStripVecs];
};

#if defined(__AVX2__) && !defined(__AVX512F__)
inline Strip load_strip(const CodeBook& book, const uint8_t* p) {
  const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i spread = _mm256_setr_epi8(0, 0, 1, 1, 4, 4, 5, 5, 8, 8, 9, 9, 12, 12, 13, 13,  //
                                          2, 2, 3, 3, 6, 6, 7, 7, 10, 10, 11, 11, 14, 14, 15, 15);
  const __m256i twice = _mm256_shuffle_epi8(bytes, spread);  // a byte for each of its elements, the even one first
  const __m256i even = _mm256_and_si256(_mm256_srli_epi16(twice, 4), _mm256_set1_epi16(0x000f));
  const __m256i odd = _mm256_and_si256(twice, _mm256_set1_epi16(0x0f00));
  Strip s;
  book.lookup(_mm256_or_si256(even, odd), s.v);
  return s;
}
inline Strip in_order(Strip s) { return s; }
#elif defined(DEFTCORE_NEON)
inline Strip load_strip(const CodeBook& book, const uint8_t* p) {
  const uint8x8_t bytes = vld1_u8(p), even = vshr_n_u8(bytes, 4), odd = vand_u8(bytes, vdup_n_u8(15));
  Strip s;
  book.lookup(vcombine_u8(vzip1_u8(even, odd), vzip2_u8(even, odd)), s.v);
  return s;
}
inline Strip in_order(Strip s) { return s; }
#else
inline Strip load_strip(const CodeBook& book, const uint8_t* p) {  // even elements, then odd ones
  const Words w = load_bytes(p);
  return {{book(shift<1>(w)), book(w)}};
}
inline Strip in_order(Strip s) {
  Strip out;
  interleave(s.v[0], s.v[1], out.v[0], out.v[1]);
  return out;
}
#endif

}  // namespace
}  // namespace deftcore::cpu
