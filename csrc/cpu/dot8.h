// Dot products of a few int8 tokens with rows of whole numbers: of a regular 4-bit matrix whose code book is int8 too,
// or of a matrix in int8.
//
// x is rounded by blocks: x8 = rint(x / absmax * 127), and so is the code book, by its largest value. A lane sums the
// products of neighbours as whole numbers; they lie in one block (blocks are 32 or more), so that a lane has one scale,
// with which its sum enters the total. A chunk of kChunk codes is looked up as bytes, even elements (high nibbles)
// apart from odd ones, and x8 stands in that order; lanes have the elements that they have in decode4.h.
#pragma once

#include "decode4.h"
#include "deftcore/decoder_matrix.h"

namespace deftcore::cpu {
namespace {

constexpr int64_t kBytes8 = 4 * kWidth;  // of a vector; a lane is four
constexpr int64_t kDot8Rows = 4;         // rows per group
// Tokens per pass over a group: the rows' totals stay in registers beside the codes of a row and a token's x.
constexpr int64_t kDot8Tokens = in_registers(4 * kDot8Rows, 8) ? 4 : 2;
static_assert(kChunk == 2 * kBytes8);

// The code book rounded to int8, and what one of its steps is worth.
struct Book8 {
  alignas(16) int8_t code[16];
  float step;
  explicit Book8(const float* book) {
    float largest = 0.0f;
    for (int i = 0; i < 16; ++i) largest = std::max(largest, std::fabs(book[i]));
    for (int i = 0; i < 16; ++i) {
      code[i] = static_cast<int8_t>(largest > 0 ? std::nearbyint(book[i] / largest * 127.0f) : 0.0f);
    }
    step = largest / 127.0f;
  }
};

// Of each level: a lane's sums (Sums8), a vector of x8 (Bytes8), one of what it meets (Codes8), and their products.
// Instructions that want one factor without sign get codes + 128, which the sums' beginning takes away again.

#if defined(__AVX512F__)

using Sums8 = __m512i;
using Codes8 = __m512i;
inline Vec to_vec(Sums8 sums) { return _mm512_cvtepi32_ps(sums); }

#if defined(__AVX512VNNI__)
constexpr int kLift8 = 128;
inline Sums8 load_begin(const int32_t* begin) { return _mm512_loadu_si512(begin); }
struct Bytes8 {
  __m512i v;
  explicit Bytes8(const int8_t* x) : v(_mm512_loadu_si512(x)) {}
};
inline Sums8 multiply(Bytes8 x, Codes8 codes, Sums8 sums) { return _mm512_dpbusd_epi32(sums, codes, x.v); }
#else
constexpr int kLift8 = 0;
inline Sums8 load_begin(const int32_t*) { return _mm512_setzero_si512(); }
struct Bytes8 {
  __m512i size;
  __mmask64 negative;
  explicit Bytes8(const int8_t* x) {
    const __m512i v = _mm512_loadu_si512(x);
    size = _mm512_abs_epi8(v);
    negative = _mm512_movepi8_mask(v);
  }
};
// Pairs are at most 2 * 127 * 127 = 32258: the 16-bit sums do not saturate.
inline Sums8 multiply(const Bytes8& x, Codes8 codes, Sums8 sums) {
  const __m512i turned = _mm512_mask_sub_epi8(codes, x.negative, _mm512_setzero_si512(), codes);
  return _mm512_add_epi32(sums, _mm512_madd_epi16(_mm512_maddubs_epi16(x.size, turned), _mm512_set1_epi16(1)));
}
#endif
inline Codes8 lifted(__m512i bytes) { return _mm512_add_epi8(bytes, _mm512_set1_epi8(static_cast<char>(kLift8))); }
inline Codes8 load_codes(const int8_t* w) { return lifted(_mm512_loadu_si512(w)); }
inline Codes8 load_codes(const int8_t* w, int64_t bytes) {  // of no matter beyond
  return lifted(_mm512_maskz_loadu_epi8((1ull << bytes) - 1, w));
}

struct Lookup8 {
  __m512i table;
  explicit Lookup8(const Book8& book)
      : table(lifted(_mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(book.code))))) {}
  Codes8 even(Words w) const { return odd(_mm512_srli_epi16(w, 4)); }
  Codes8 odd(Words w) const { return _mm512_shuffle_epi8(table, _mm512_and_si512(w, _mm512_set1_epi8(15))); }
};

// kWidth whole numbers as bytes: the even ones, then the odd ones, or in order.
inline void store_split(Vec v, int8_t* even, int8_t* odd) {
  const __m128i halves = _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  const __m128i bytes = _mm_shuffle_epi8(_mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v.v)), halves);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(even), bytes);
  _mm_storeh_pd(reinterpret_cast<double*>(odd), _mm_castsi128_pd(bytes));
}
inline void store_bytes(Vec v, int8_t* out) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v.v)));
}

#elif defined(__AVX2__)

using Sums8 = __m256i;
using Codes8 = __m256i;
constexpr int kLift8 = 0;
inline Vec to_vec(Sums8 sums) { return _mm256_cvtepi32_ps(sums); }
inline Sums8 load_begin(const int32_t*) { return _mm256_setzero_si256(); }
struct Bytes8 {
  __m256i v, size;
  explicit Bytes8(const int8_t* x)
      : v(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))), size(_mm256_abs_epi8(v)) {}
};
// Pairs are at most 2 * 127 * 127 = 32258: the 16-bit sums do not saturate.
inline Sums8 multiply(const Bytes8& x, Codes8 codes, Sums8 sums) {
  const __m256i pairs = _mm256_maddubs_epi16(x.size, _mm256_sign_epi8(codes, x.v));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
inline Codes8 load_codes(const int8_t* w) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w)); }
inline Codes8 load_codes(const int8_t* w, int64_t) { return load_codes(w); }  // 32 elements are a vector: no tails

struct Lookup8 {
  __m256i table;
  explicit Lookup8(const Book8& book)
      : table(_mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(book.code)))) {}
  Codes8 even(Words w) const { return odd(_mm256_srli_epi16(w, 4)); }
  Codes8 odd(Words w) const { return _mm256_shuffle_epi8(table, _mm256_and_si256(w, _mm256_set1_epi8(15))); }
};

inline __m128i narrowed(Vec v) {
  const __m256i whole = _mm256_cvtps_epi32(v.v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  return _mm_packs_epi16(words, words);
}
inline void store_split(Vec v, int8_t* even, int8_t* odd) {
  const __m128i halves = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 0, 0, 0, 0, 0, 0, 0, 0);
  const uint64_t bytes = static_cast<uint64_t>(_mm_cvtsi128_si64(_mm_shuffle_epi8(narrowed(v), halves)));
  std::memcpy(even, &bytes, 4);
  const uint32_t high = static_cast<uint32_t>(bytes >> 32);
  std::memcpy(odd, &high, 4);
}
inline void store_bytes(Vec v, int8_t* out) { _mm_storel_epi64(reinterpret_cast<__m128i*>(out), narrowed(v)); }

#else

struct Sums8 {
  int32_t lane[kWidth];
};
struct Codes8 {
  int8_t code[kBytes8];
};
constexpr int kLift8 = 0;
inline Vec to_vec(const Sums8& sums) {
  float lanes[kWidth];
  for (int i = 0; i < kWidth; ++i) lanes[i] = static_cast<float>(sums.lane[i]);
  return load(lanes);
}
inline Sums8 load_begin(const int32_t*) { return {}; }
struct Bytes8 {
  const int8_t* x;
  explicit Bytes8(const int8_t* from) : x(from) {}
};
inline Sums8 multiply(Bytes8 x, const Codes8& codes, Sums8 sums) {
  for (int64_t i = 0; i < kBytes8; ++i) sums.lane[i / 4] += x.x[i] * codes.code[i];
  return sums;
}
inline Codes8 load_codes(const int8_t* w, int64_t bytes = kBytes8) {
  Codes8 out{};
  std::memcpy(out.code, w, static_cast<size_t>(bytes));
  return out;
}
struct Lookup8 {
  int8_t code[16];
  explicit Lookup8(const Book8& book) { std::memcpy(code, book.code, 16); }
  Codes8 even(const Words& w) const { return codes(w, 4); }
  Codes8 odd(const Words& w) const { return codes(w, 0); }

 private:
  Codes8 codes(const Words& w, int shift) const {
    uint8_t bytes[kBytes8];
    std::memcpy(bytes, &w, sizeof(bytes));
    Codes8 out;
    for (int64_t i = 0; i < kBytes8; ++i) out.code[i] = code[bytes[i] >> shift & 15];
    return out;
  }
};
inline void store_bytes(Vec v, int8_t* out) {
  float lanes[kWidth];
  store(lanes, v);
  for (int i = 0; i < kWidth; ++i) {  // NaN: its block is marked, its bytes are of no matter
    out[i] = lanes[i] == lanes[i] ? static_cast<int8_t>(std::nearbyint(lanes[i])) : int8_t{0};
  }
}
inline void store_split(Vec v, int8_t* even, int8_t* odd) {
  int8_t bytes[kWidth];
  store_bytes(v, bytes);
  for (int i = 0; i < kWidth; i += 2) even[i / 2] = bytes[i];
  for (int i = 1; i < kWidth; i += 2) odd[i / 2] = bytes[i];
}

#endif

// Tokens in int8, of a chunk's elements the even ones first, or in order.
struct Tokens8 {
  int8_t* x;       // [tokens, x_stride], zero beyond a row
  int32_t* begin;  // [tokens, begin_stride], of the sums of a chunk, or of a vector
  float* steps;    // [tokens, step_stride], what the product of a block's step and a weight's is worth, zero beyond
  int64_t tokens, x_stride, begin_stride, step_stride;

  Tokens8 from(int64_t token) const {
    Tokens8 rest = *this;
    rest.x += token * x_stride;
    rest.begin += token * begin_stride;
    rest.steps += token * step_stride;
    rest.tokens -= token;
    return rest;
  }
  Tokens8 some(int64_t first, int64_t last) const {
    Tokens8 these = from(first);
    these.tokens = last - first;
    return these;
  }
};

inline Tokens8 take_tokens8(Workspace& room, int64_t tokens, int64_t cols) {
  Tokens8 t{};
  t.tokens = tokens;
  t.x_stride = round_up(cols, kChunk);
  t.begin_stride = kLift8 ? t.x_stride / 4 : 0;
  t.step_stride = cols / 32 + 16;  // blocks have 32 columns or more
  t.x = room.take<int8_t>(tokens * t.x_stride);
  t.begin = room.take<int32_t>(tokens * t.begin_stride);
  t.steps = room.take<float>(tokens * t.step_stride);
  return t;
}

// Rounds x [tokens, cols] for weights whose steps are worth `step`. A block that holds NaN or infinity becomes NaN.
template <bool kSplit, class T>
void to_int8(const T* x, int64_t cols, int64_t block, float step, const Tokens8& out) {
  constexpr int64_t kSpan = kSplit ? kChunk : kBytes8;
  const int64_t blocks = cols / block, spans = (cols + kSpan - 1) / kSpan;
  for (int64_t m = 0; m < out.tokens; ++m, x += cols) {
    const Tokens8 to = out.from(m);
    std::memset(to.x + (spans - 1) * kSpan, 0, static_cast<size_t>(kSpan));
    std::fill(to.steps + blocks, to.steps + to.step_stride, 0.0f);
    for (int64_t b = 0; b < blocks; ++b) {
      Vec largest(0.0f), bad(0.0f);
      for (int64_t i = b * block; i < (b + 1) * block; i += kWidth) {
        const Vec v = load(x + i);
        largest = at_least(abs(v), largest);
        bad = fma(v, Vec(0.0f), bad);
      }
      const float absmax = reduce_max(largest);
      to.steps[b] = absmax / 127.0f * step + reduce_add(bad);
      const Vec divisor(absmax > 0 ? absmax : 1.0f);
      for (int64_t i = b * block; i < (b + 1) * block; i += kWidth) {
        const Vec whole = load(x + i) / divisor * Vec(127.0f);
        if constexpr (!kSplit) {
          store_bytes(whole, to.x + i);
        } else if constexpr (kWidth > 1) {
          int8_t* even = to.x + i / kChunk * kChunk + i % kChunk / 2;
          store_split(whole, even, even + kBytes8);
        } else {
          store_bytes(whole, to.x + i / kChunk * kChunk + i % kChunk / 2 + i % 2 * kBytes8);
        }
      }
    }
#if defined(__AVX512VNNI__)
    for (int64_t s = 0; s < spans; ++s) {
      Sums8 sums = _mm512_setzero_si512();
      for (int64_t i = s * kSpan; i < (s + 1) * kSpan; i += kBytes8) {
        sums = multiply(Bytes8(to.x + i), lifted(_mm512_setzero_si512()), sums);
      }
      _mm512_storeu_si512(to.begin + s * kWidth, _mm512_sub_epi32(_mm512_setzero_si512(), sums));
    }
#endif
  }
}

// out[r][m] = x[m] . row r of a 4-bit matrix; `next` rows are prefetched alongside.
template <int kTokens>
void dot8_tile(const Quant4& q, const Lookup8& look_up, const LaneScales& lanes, const uint8_t* const* rows,
               const uint8_t* const* next, const float* scales, const Tokens8& x, float (*out)[kDot8Tokens]) {
  const int64_t scale_stride = row_scale_size(q);
  const int shift = block_shift(q);
  Vec total[kDot8Rows][kTokens];
  for (auto& row : total) {
    for (Vec& v : row) v = Vec(0.0f);
  }
  const auto chunk = [&](int64_t c, auto fetch) {
    const int64_t block = c * kChunk >> shift;
    Vec steps[kTokens];
    for (int m = 0; m < kTokens; ++m) steps[m] = lanes(x.steps + m * x.step_stride + block);
    for (int64_t r = 0; r < kDot8Rows; ++r) {
      const Words w = fetch(rows[r] + c * (kChunk / 2));
      const Codes8 even = look_up.even(w), odd = look_up.odd(w);
      const Vec scale = lanes(scales + r * scale_stride + block);
      for (int m = 0; m < kTokens; ++m) {
        const int8_t* from = x.x + m * x.x_stride + c * kChunk;
        Sums8 sums = load_begin(x.begin + m * x.begin_stride + c * kWidth);
        sums = multiply(Bytes8(from), even, sums);
        sums = multiply(Bytes8(from + kBytes8), odd, sums);
        total[r][m] = fma(to_vec(sums), scale * steps[m], total[r][m]);
      }
    }
  };
  const int64_t whole = q.cols / kChunk, left = q.cols % kChunk / 2;
  for (int64_t c = 0; c < whole; ++c) {
    for (int64_t r = 0; r < kDot8Rows; ++r) __builtin_prefetch(next[r] + c * (kChunk / 2), 0, 2);
    chunk(c, [](const uint8_t* p) { return load_words(p); });
  }
  if (left > 0) chunk(whole, [&](const uint8_t* p) { return load_words(p, left); });
  for (int64_t r = 0; r < kDot8Rows; ++r) {
    for (int m = 0; m < kTokens; ++m) out[r][m] = reduce_add(total[r][m]);
  }
}

// out[r][m] = x[m] . row r of an int8 matrix, unscaled; what lies `ahead` bytes further is prefetched alongside.
template <int kTokens>
void dense8_tile(const int8_t* const* rows, int64_t ahead, int64_t cols, const LaneScales& lanes, const Tokens8& x,
                 float (*out)[kDot8Tokens]) {
  Vec total[kDot8Rows][kTokens];
  for (auto& row : total) {
    for (Vec& v : row) v = Vec(0.0f);
  }
  const auto span = [&](int64_t s, auto fetch) {
    Codes8 codes[kDot8Rows];
    for (int64_t r = 0; r < kDot8Rows; ++r) codes[r] = fetch(rows[r] + s * kBytes8);
    for (int m = 0; m < kTokens; ++m) {
      const Bytes8 bytes(x.x + m * x.x_stride + s * kBytes8);
      const Vec steps = lanes(x.steps + m * x.step_stride + s * kBytes8 / kInt8Block);
      for (int64_t r = 0; r < kDot8Rows; ++r) {
        const Sums8 sums = multiply(bytes, codes[r], load_begin(x.begin + m * x.begin_stride + s * kWidth));
        total[r][m] = fma(to_vec(sums), steps, total[r][m]);
      }
    }
  };
  const int64_t whole = cols / kBytes8, left = cols % kBytes8;
  for (int64_t s = 0; s < whole; ++s) {
    for (int64_t r = 0; r < kDot8Rows; ++r) __builtin_prefetch(rows[r] + s * kBytes8 + ahead, 0, 2);
    span(s, [](const int8_t* p) { return load_codes(p); });
  }
  if (left > 0) span(whole, [&](const int8_t* p) { return load_codes(p, left); });
  for (int64_t r = 0; r < kDot8Rows; ++r) {
    for (int m = 0; m < kTokens; ++m) out[r][m] = reduce_add(total[r][m]);
  }
}

// Calls tile(first token, count) until all tokens have had theirs; count is a compile-time constant.
template <class Tile>
void token_tiles8(int64_t tokens, Tile&& tile) {
  for (int64_t m = 0; m < tokens; m += kDot8Tokens) {
    switch (std::min(kDot8Tokens, tokens - m)) {
      case 1: tile(m, std::integral_constant<int, 1>{}); break;
      case 2: tile(m, std::integral_constant<int, 2>{}); break;
      case 3: tile(m, std::integral_constant<int, std::min<int>(3, kDot8Tokens)>{}); break;
      default: tile(m, std::integral_constant<int, kDot8Tokens>{}); break;
    }
  }
}

// Calls sink(k, m, x[m] . row row_of(k)) for k in range and every token; row_of rises. `scales` holds
// kDot8Rows row_scale_size(q).
template <class RowOf, class Sink>
void dots8(const Quant4& q, const Book8& book, RowOf&& row_of, Range range, const Tokens8& x, float* scales,
           Sink&& sink) {
  const Lookup8 look_up(book);
  const LaneScales lanes(q.block_size);
  const int64_t last = range.end - 1, leap = rows_ahead(q.cols / 2, kDot8Rows);
  for (int64_t n = range.begin; n < range.end; n += kDot8Rows) {
    const uint8_t *rows[kDot8Rows], *next[kDot8Rows];
    for (int64_t r = 0; r < kDot8Rows; ++r) {  // past the end: repeat the last row, drop its result
      rows[r] = packed_row(q, row_of(std::min(n + r, last)));
      next[r] = packed_row(q, row_of(std::min(n + r + leap, last)));
    }
    decode_rows_scales(q, row_of, n, std::min(kDot8Rows, range.end - n), scales);
    token_tiles8(x.tokens, [&](int64_t m, auto count) {
      float out[kDot8Rows][kDot8Tokens];
      dot8_tile<count()>(q, look_up, lanes, rows, next, scales, x.from(m), out);
      for (int64_t r = 0; r < kDot8Rows && n + r <= last; ++r) {
        for (int i = 0; i < count(); ++i) sink(n + r, m + i, out[r][i]);
      }
    });
  }
}

// The same of rows in int8, weight [rows, cols] with a scale a row; x's blocks are kInt8Block.
template <class Sink>
void dense8(const int8_t* weight, const float* scales, int64_t cols, Range range, const Tokens8& x, Sink&& sink) {
  const LaneScales lanes(kInt8Block, 4);
  const int64_t leap = rows_ahead(cols, kDot8Rows);
  for (int64_t n = range.begin; n < range.end; n += kDot8Rows) {
    const int8_t* rows[kDot8Rows];
    const int64_t ahead = n + leap + kDot8Rows <= range.end ? leap * cols : 0;
    for (int64_t r = 0; r < kDot8Rows; ++r) rows[r] = weight + std::min(n + r, range.end - 1) * cols;
    token_tiles8(x.tokens, [&](int64_t m, auto count) {
      float out[kDot8Rows][kDot8Tokens];
      dense8_tile<count()>(rows, ahead, cols, lanes, x.from(m), out);
      for (int64_t r = 0; r < kDot8Rows && n + r < range.end; ++r) {
        for (int i = 0; i < count(); ++i) sink(n + r, m + i, out[r][i] * scales[n + r]);
      }
    });
  }
}

}  // namespace
}  // namespace deftcore::cpu
