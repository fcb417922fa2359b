// Decoding 4-bit weights in registers, shared by the dense products and the sparse MLPs.
//
// A chunk is 8 * kWidth elements in kWidth 32-bit words. Shifting the words by 4 s and looking their lowest nibble up
// gives element 8 l + (s ^ 1) of the chunk in lane l, since the even element is in the high nibble. So a chunk decodes
// without a shuffle into "positions" s * kWidth + l, and products take the other operand in that order. A lane's eight
// elements lie in one block (blocks are 32 or more), so that one vector holds a chunk's scales.
#pragma once

#include "deftcore/quant4.h"
#include "isa.h"

namespace deftcore::cpu {
namespace {

constexpr int64_t kChunk = 8 * kWidth;

// The element of a chunk at position p, and back.
inline int64_t element_at(int64_t p) { return 8 * (p % kWidth) + ((p / kWidth) ^ 1); }
inline int64_t position_of(int64_t element) { return ((element % 8) ^ 1) * kWidth + element / 8; }

inline int64_t chunks_of(int64_t cols) { return (cols + kChunk - 1) / kChunk; }

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
};
// kWidth elements in order, from kWidth / 2 bytes.
inline Words load_nibbles(const uint8_t* p) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, bytes));
  return _mm512_srlv_epi32(wide, _mm512_set_epi32(0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4, 0, 4));
}
// A chunk's scales, one per lane: lane l takes scales[lane[l]].
struct LaneScales {
  __m512i lane;
  explicit LaneScales(int64_t block) {
    alignas(64) int32_t index[16];
    for (int l = 0; l < 16; ++l) index[l] = static_cast<int32_t>(8 * l / block);
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
struct CodeBook {  // two lookups of three bits each, chosen by the fourth
  __m256 low, high;
  explicit CodeBook(const float* code) : low(_mm256_loadu_ps(code)), high(_mm256_loadu_ps(code + 8)) {}
  Vec operator()(Words w) const {
    const __m256 bit3 = _mm256_castsi256_ps(_mm256_slli_epi32(w, 28));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, w), _mm256_permutevar8x32_ps(high, w), bit3);
  }
};
inline Words load_nibbles(const uint8_t* p) {
  int32_t word;
  std::memcpy(&word, p, 4);
  const __m128i bytes = _mm_cvtsi32_si128(word);
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, bytes));
  return _mm256_srlv_epi32(wide, _mm256_set_epi32(0, 4, 0, 4, 0, 4, 0, 4));
}
struct LaneScales {
  __m256i lane;
  explicit LaneScales(int64_t block) {
    alignas(32) int32_t index[8];
    for (int l = 0; l < 8; ++l) index[l] = static_cast<int32_t>(8 * l / block);
    lane = _mm256_load_si256(reinterpret_cast<const __m256i*>(index));
  }
  Vec operator()(const float* scales) const { return _mm256_permutevar8x32_ps(_mm256_loadu_ps(scales), lane); }
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
};
struct LaneScales {
  explicit LaneScales(int64_t) {}
  Vec operator()(const float* scales) const { return *scales; }
};

#endif

// Calls fn(integral_constant s, values of positions s * kWidth...) for the eight positions of a chunk.
template <class Fn>
inline void decode_chunk(Words w, const CodeBook& book, Fn&& fn) {
  fn(std::integral_constant<int, 0>{}, book(w));
  fn(std::integral_constant<int, 1>{}, book(shift<1>(w)));
  fn(std::integral_constant<int, 2>{}, book(shift<2>(w)));
  fn(std::integral_constant<int, 3>{}, book(shift<3>(w)));
  fn(std::integral_constant<int, 4>{}, book(shift<4>(w)));
  fn(std::integral_constant<int, 5>{}, book(shift<5>(w)));
  fn(std::integral_constant<int, 6>{}, book(shift<6>(w)));
  fn(std::integral_constant<int, 7>{}, book(shift<7>(w)));
}

// scales[first, first + count) as floats.
inline void decode_scales(const Quant4& q, int64_t first, int64_t count, float* out) {
  if (q.nested_absmax == nullptr) {
    std::memcpy(out, static_cast<const float*>(q.absmax) + first, static_cast<size_t>(count) * 4);
    return;
  }
  const uint8_t* codes = static_cast<const uint8_t*>(q.absmax) + first;
  for (int64_t i = 0; i < count; ++i) out[i] = q.nested_code[codes[i]];
  const Vec offset(q.nested_offset);
  for (int64_t i = 0; i < count;) {  // pieces with one nested scale
    const int64_t piece = (first + i) / kNestedBlock, end = (piece + 1) * kNestedBlock - first;
    const int64_t stop = end < count ? end : count;
    const Vec scale(q.nested_absmax[piece]);
    for (; i + kWidth <= stop; i += kWidth) store(out + i, load(out + i) * scale + offset);
    for (; i < stop; ++i) out[i] = out[i] * q.nested_absmax[piece] + q.nested_offset;
  }
}

inline float scale_of(const Quant4& q, int64_t block) {
  float scale;
  decode_scales(q, block, 1, &scale);
  return scale;
}

// Rows that start on a block: the fast layout. Any other shape is decoded element by element.
inline bool is_regular(const Quant4& q) { return q.cols % q.block_size == 0; }

inline const uint8_t* packed_row(const Quant4& q, int64_t row) { return q.packed + row * (q.cols / 2); }

// Floats that hold a row's scales, and zeros for the lanes beyond.
inline int64_t row_scale_size(const Quant4& q) { return q.cols / q.block_size + 16; }

// The scales of a regular row's chunks [first, first + chunks), then 16 zeros. out[0] belongs to the block that chunk
// `first` starts in.
inline void decode_row_scales(const Quant4& q, int64_t row, int64_t first, int64_t chunks, float* out) {
  const int64_t per_row = q.cols / q.block_size, begin = first * kChunk / q.block_size;
  const int64_t last = ((first + chunks) * kChunk + q.block_size - 1) / q.block_size;
  const int64_t count = (last < per_row ? last : per_row) - begin;
  decode_scales(q, row * per_row + begin, count, out);
  for (int64_t i = count; i < count + 16; ++i) out[i] = 0.0f;
}

// out[0, chunks * kChunk) = the row's values in position order from chunk `first` on; zero beyond the row's end.
// `scales` is room for row_scale_size(q) floats.
inline void decode_row(const Quant4& q, const CodeBook& book, const LaneScales& lanes, int64_t row, int64_t first,
                       int64_t chunks, float* scales, float* out) {
  if (is_regular(q)) {
    decode_row_scales(q, row, first, chunks, scales);
    const int64_t begin = first * kChunk / q.block_size;
    const uint8_t* bytes = packed_row(q, row);
    for (int64_t c = first; c < first + chunks; ++c, out += kChunk) {
      const int64_t left = (q.cols - c * kChunk) / 2;
      const Words w =
          left >= kChunk / 2 ? load_words(bytes + c * kChunk / 2) : load_words(bytes + c * kChunk / 2, left);
      const Vec scale = lanes(scales + c * kChunk / q.block_size - begin);
      decode_chunk(w, book, [&](auto s, Vec v) { store(out + s() * kWidth, v * scale); });
    }
    return;
  }
  for (int64_t p = 0; p < chunks * kChunk; ++p) {
    const int64_t col = first * kChunk + p / kChunk * kChunk + element_at(p % kChunk);
    const int64_t flat = row * q.cols + col;
    out[p] =
        col >= q.cols ? 0.0f : q.code[q.packed[flat / 2] >> (flat % 2 ? 0 : 4) & 15] * scale_of(q, flat / q.block_size);
  }
}

}  // namespace
}  // namespace deftcore::cpu
