// Decoding 4-bit weights in registers, shared by the dense products and the sparse MLPs.
//
// Dot products of few tokens (dot4.h) take a chunk of 8 * kWidth elements as kWidth 32-bit words. Shifting the words by
// 4 s and looking their lowest nibble up gives element 8 l + (s ^ 1) of the chunk in lane l, since the even element is
// in the high nibble. So a chunk decodes without a shuffle into "positions" s * kWidth + l, and x is put in that order
// once per call. A lane's eight elements lie in one block (blocks are 32 or more), so that one vector holds a chunk's
// scales. Everything else decodes in strips, whose vectors come in an order that costs nothing and are put in order
// where that matters.
//
// AVX2 has no lookup of 16 floats, but one of 16 bytes: the codes' four bytes are looked up apart, 32 elements at a
// time, and unpacked to floats, at three operations for a vector.
#pragma once

#include <algorithm>

#include "deftcore/format4.h"
#include "deftcore/workspace.h"
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
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int kStripVecs = 4;
#else
constexpr int kStripVecs = 2;
#endif
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
inline Strip strip_in_order(const CodeBook& book, const uint8_t* p) { return in_order(load_strip(book, p)); }

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

// Blocks are powers of two: column >> block_shift(q) is a column's block, for less than a division.
inline int block_shift(const Quant4& q) { return __builtin_ctzll(static_cast<unsigned long long>(q.block_size)); }

// How many rows, a multiple of `group`, lie between what is read and what is prefetched: of short rows many, or the
// bytes would come too late.
inline int64_t rows_ahead(int64_t row_bytes, int64_t group) {
  constexpr int64_t kBytesAhead = 4096;
  return round_up(std::max<int64_t>(kBytesAhead / std::max<int64_t>(row_bytes, 1), 1), group);
}

// Floats that hold a row's scales, and zeros for the lanes beyond.
inline int64_t row_scale_size(const Quant4& q) { return q.cols / q.block_size + 16; }

// The scales of a regular row's columns [first, first + count), then 16 zeros; `first` starts a block.
inline void decode_row_scales(const Quant4& q, int64_t row, int64_t first, int64_t count, float* out) {
  const int64_t blocks = (count + q.block_size - 1) / q.block_size;
  decode_scales(q, (row * q.cols + first) / q.block_size, blocks, out);
  for (int64_t i = blocks; i < blocks + 16; ++i) out[i] = 0.0f;
}

// All scales of `count` regular rows, as decode_row_scales leaves them for each. Rows may be short: their scales, which
// lie in a row, are decoded together.
inline void decode_rows_scales(const Quant4& q, int64_t row, int64_t count, float* out) {
  const int64_t blocks = q.cols / q.block_size, stride = row_scale_size(q);
  decode_scales(q, row * blocks, count * blocks, out);
  for (int64_t r = count - 1; r >= 0; --r) {
    std::memmove(out + r * stride, out + r * blocks, static_cast<size_t>(blocks) * sizeof(float));
    std::fill_n(out + r * stride + blocks, stride - blocks, 0.0f);
  }
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
    for (; j + kStrip <= count; j += kStrip) {
      const Strip codes = strip_in_order(book, bytes + j / 2);
      for (int v = 0; v < kStripVecs; ++v) {
        const int64_t i = j + v * kWidth;
        store(out + i, codes.v[v] * load(scale + i));
      }
    }
  }
  for (; j < count; ++j) out[j] = decode_one(q, row, first + j);
}

// The same of a regular matrix, whose bytes of these columns stand at `bytes`; first and count are multiples of 32.
// `scales` is room for count / block_size + 2 floats.
inline void decode_regular(const Quant4& q, const CodeBook& book, const uint8_t* bytes, int64_t row, int64_t first,
                           int64_t count, float* scales, float* out) {
  const int64_t begin = row * q.cols + first, block = begin / q.block_size;
  decode_scales(q, block, (begin + count - 1) / q.block_size - block + 1, scales);
  for (int64_t j = 0; j < count; ++scales) {
    const int64_t left = q.block_size - (begin + j) % q.block_size, end = left < count - j ? j + left : count;
    const Vec scale(*scales);
    for (; j < end; j += kStrip) {
      const Strip codes = strip_in_order(book, bytes + j / 2);
      for (int v = 0; v < kStripVecs; ++v) store(out + j + v * kWidth, codes.v[v] * scale);
    }
  }
}

// The same of any layout.
inline void decode_columns(const Quant4& q, const CodeBook& book, int64_t row, int64_t first, int64_t count,
                           float* scales, float* out) {
  if (q.column_blocks) return decode_column_blocks(q, book, row, first, count, out);
  if (is_regular(q)) {
    return decode_regular(q, book, packed_row(q, row) + first / 2, row, first, count, scales, out);
  }
  for (int64_t j = 0; j < count; ++j) out[j] = decode_one(q, row, first + j);
}

}  // namespace
}  // namespace deftcore::cpu
