// Decoding 4-bit weights in registers, shared by the dense products and the sparse MLPs.
//
// Dot products of few tokens (dot4.h) take a chunk of 8 * kWidth elements as kWidth 32-bit words. Shifting the words by
// 4 s and looking their lowest nibble up gives element 8 l + (s ^ 1) of the chunk in lane l, since the even element is
// in the high nibble. So a chunk decodes without a shuffle into "positions" s * kWidth + l, and x is put in that order
// once per call. A lane's eight elements lie in one block (blocks are 32 or more), so that one vector holds a chunk's
// scales. Everything else decodes in order.
#pragma once

#include <algorithm>

#include "deftcore/format4.h"
#include "isa.h"

namespace deftcore::cpu {
namespace {

constexpr int64_t kChunk = 8 * kWidth;

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
inline Words load_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline void interleave(Vec even, Vec odd, Vec& first, Vec& second) {
  const __m256 low = _mm256_unpacklo_ps(even.v, odd.v), high = _mm256_unpackhi_ps(even.v, odd.v);
  first = _mm256_permute2f128_ps(low, high, 0x20);
  second = _mm256_permute2f128_ps(low, high, 0x31);
}
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
inline Words load_bytes(const uint8_t* p) { return *p; }
inline void interleave(Vec even, Vec odd, Vec& first, Vec& second) {
  first = even;
  second = odd;
}
inline Vec gather(const float* table, const uint8_t* index) { return table[*index]; }
struct LaneScales {
  explicit LaneScales(int64_t) {}
  Vec operator()(const float* scales) const { return *scales; }
};

#endif

inline float scale_of(const Quant4& q, int64_t block) {
  if (q.nested_absmax == nullptr) return static_cast<const float*>(q.absmax)[block];
  return q.nested_code[static_cast<const uint8_t*>(q.absmax)[block]] * q.nested_absmax[block / kNestedBlock] +
         q.nested_offset;
}

// scales[first, first + count) as floats.
inline void decode_scales(const Quant4& q, int64_t first, int64_t count, float* out) {
  if (q.nested_absmax == nullptr) {
    std::copy_n(static_cast<const float*>(q.absmax) + first, count, out);  // from nowhere where a matrix is empty
    return;
  }
  const uint8_t* codes = static_cast<const uint8_t*>(q.absmax) + first;
  const Vec offset(q.nested_offset);
  for (int64_t i = 0; i < count;) {  // pieces with one nested scale
    const int64_t piece = (first + i) / kNestedBlock, end = (piece + 1) * kNestedBlock - first;
    const int64_t stop = end < count ? end : count;
    const Vec scale(q.nested_absmax[piece]);
    for (; i + kWidth <= stop; i += kWidth) store(out + i, gather(q.nested_code, codes + i) * scale + offset);
    for (; i < stop; ++i) out[i] = scale_of(q, first + i);
  }
}

// Rows that start on a block: the fast layout. Any other shape is decoded element by element.
inline bool is_regular(const Quant4& q) { return !q.column_blocks && q.cols % q.block_size == 0; }

// The scales of columns [col, ...) of a row of a matrix with column blocks.
inline const float* column_scales(const Quant4& q, int64_t row, int64_t col) {
  return static_cast<const float*>(q.absmax) + row / q.block_size * q.cols + col;
}

inline const uint8_t* packed_row(const Quant4& q, int64_t row) { return q.packed + row * (q.cols / 2); }

// Floats that hold a row's scales, and zeros for the lanes beyond.
inline int64_t row_scale_size(const Quant4& q) { return q.cols / q.block_size + 16; }

// The scales of a regular row's columns [first, first + count), then 16 zeros; `first` starts a block.
inline void decode_row_scales(const Quant4& q, int64_t row, int64_t first, int64_t count, float* out) {
  const int64_t blocks = (count + q.block_size - 1) / q.block_size;
  decode_scales(q, (row * q.cols + first) / q.block_size, blocks, out);
  for (int64_t i = blocks; i < blocks + 16; ++i) out[i] = 0.0f;
}

// One weight of any layout.
inline float decode_one(const Quant4& q, int64_t row, int64_t col) {
  const int64_t flat = row * q.cols + col;
  const float scale = q.column_blocks ? *column_scales(q, row, col) : scale_of(q, flat / q.block_size);
  return q.code[q.packed[flat / 2] >> (flat % 2 ? 0 : 4) & 15] * scale;
}

// Values of columns [first, first + count) of a row of a matrix with column blocks, in order; `first` is even.
inline void decode_column_blocks(const Quant4& q, const CodeBook& book, int64_t row, int64_t first, int64_t count,
                                 float* out) {
  int64_t j = 0;
  if (q.cols % 2 == 0) {
    const uint8_t* bytes = packed_row(q, row) + first / 2;
    const float* scale = column_scales(q, row, first);
    for (; j + 2 * kWidth <= count; j += 2 * kWidth) {
      const Words w = load_bytes(bytes + j / 2);
      Vec low, high;
      interleave(book(shift<1>(w)), book(w), low, high);
      store(out + j, low * load(scale + j));
      store(out + j + kWidth, high * load(scale + j + kWidth));
    }
  }
  for (; j < count; ++j) out[j] = decode_one(q, row, first + j);
}

#if defined(__AVX2__) || defined(__AVX512F__)
// The same of a regular matrix, whose bytes of these columns stand at `bytes`; first and count are multiples of 32.
// `scales` is room for count / block_size + 2 floats.
inline void decode_regular(const Quant4& q, const CodeBook& book, const uint8_t* bytes, int64_t row, int64_t first,
                           int64_t count, float* scales, float* out) {
  const int64_t begin = row * q.cols + first, block = begin / q.block_size;
  decode_scales(q, block, (begin + count - 1) / q.block_size - block + 1, scales);
  for (int64_t j = 0; j < count; ++scales) {
    const int64_t left = q.block_size - (begin + j) % q.block_size, end = left < count - j ? j + left : count;
    const Vec scale(*scales);
    for (; j < end; j += kWidth) store(out + j, book(load_nibbles(bytes + j / 2)) * scale);
  }
}
#endif

// The same of any layout.
inline void decode_columns(const Quant4& q, const CodeBook& book, int64_t row, int64_t first, int64_t count,
                           float* scales, float* out) {
  if (q.column_blocks) return decode_column_blocks(q, book, row, first, count, out);
#if defined(__AVX2__) || defined(__AVX512F__)
  if (is_regular(q)) {
    return decode_regular(q, book, packed_row(q, row) + first / 2, row, first, count, scales, out);
  }
#else
  (void)scales;
#endif
  for (int64_t j = 0; j < count; ++j) out[j] = decode_one(q, row, first + j);
}

}  // namespace
}  // namespace deftcore::cpu
