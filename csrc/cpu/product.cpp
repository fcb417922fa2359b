// c <- beta c + alpha a b + bias in 16 bits. The compute type is float32: blocks of both operands are decoded into the
// caches and multiplied by quant4_gemm's micro-kernel, a of one broadcast number and b of vectors of columns at a time.
//   a [rows, inner]     decoded as it lies, rows or columns along memory
//   b [inner, columns]  panels of columns; where memory runs along the sum instead (x W^T), transposed on the way
// Products of a few rows wait for memory, those with a short sum for c: both decode b in registers, for dot products
// where memory runs along the sum, else row by row into sums that stay in the first level.
// Parts own elements of c, whose sums do not depend on how many parts there are.
#include "deftcore/workspace.h"
#include "matrix_rows.h"
#include "micro4.h"

namespace deftcore::cpu {
namespace {

constexpr int64_t kBlockRows = 256;             // of a, decoded at a time: with kDepth a share of the second level
constexpr int64_t kDepth = 256;                 // of the sum: a panel of b stays in the first level
constexpr int64_t kGroup = 4 * kPanelTokens;    // columns of b, decoded at a time
constexpr int64_t kColumns = 16 * kGroup;       // of c, in float32 while several blocks of the sum go by
constexpr int64_t kFewRows = 8;                 // up to which x W^T takes dot products
constexpr int64_t kRowTile = 4;                 // rows of a pass over b's rows, and up to which all products are
constexpr int64_t kShortSum = 8;                // or up to this depth
constexpr int64_t kSums = 4096;                 // of a tile of such rows: half of the first level
constexpr int64_t kApart = 64 / sizeof(float);  // columns of a lie so much more apart: on other cache sets
static_assert(kBlockRows % kMicroRows == 0 && kGroup % kWidth == 0);

// What a part has of its own.
struct Own {
  float *a, *b, *c;
};

enum class Path { kDots, kRows, kBlocks };

Path path_of(const ProductArgs& args) {
  if (args.b_column != 1) return args.rows <= kFewRows ? Path::kDots : Path::kBlocks;
  return args.rows <= kRowTile || args.inner <= kShortSum ? Path::kRows : Path::kBlocks;
}

int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

// Columns whose sums are kept while the blocks of the sum go by.
int64_t kept_columns(const ProductArgs& args) { return args.inner <= kDepth ? kGroup : kColumns; }

Own lay_out_part(const ProductArgs& args, Workspace& room) {
  Own own{};
  if (path_of(args) != Path::kBlocks) {
    own.a = room.take<float>(least(args.rows, kFewRows) * args.inner);
    own.c = room.take<float>(path_of(args) == Path::kRows ? kSums : 0);
    return own;
  }
  const int64_t rows = round_up(least(args.rows, kBlockRows), kMicroRows), depth = least(args.inner, kDepth);
  own.a = room.take<float>((rows + kApart) * depth);
  own.b = room.take<float>(least(round_up(args.columns, kPanelTokens), kGroup) * depth);
  own.c = room.take<float>(rows * least(round_up(args.columns, kWidth), kept_columns(args)));
  return own;
}

// Decodes `count` numbers that lie side by side.
template <class T>
void decode_row(const T* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, load(from + i));
  if (i < count) store_tail(to + i, load_tail(from + i, count - i), count - i);
}

// A block of a, and how it lies; rows up to whole tiles are zero.
template <class T>
Tile decode_a(const ProductArgs& args, Range rows, Range inner, const float* one, float* a) {
  const T* from = static_cast<const T*>(args.a) + rows.begin * args.a_row + inner.begin * args.a_inner;
  const int64_t count = rows.end - rows.begin, padded = round_up(count, kMicroRows), depth = inner.end - inner.begin;
  if (args.a_inner == 1) {
    for (int64_t i = 0; i < count; ++i) decode_row(from + i * args.a_row, depth, a + i * depth);
    std::memset(a + count * depth, 0, static_cast<size_t>((padded - count) * depth) * sizeof(float));
    return {depth, 1, INT64_MAX, one, 0};
  }
  const int64_t stride = padded + kApart;
  for (int64_t r = 0; r < depth; ++r) {
    decode_row(from + r * args.a_inner, count, a + r * stride);
    std::memset(a + r * stride + count, 0, static_cast<size_t>(padded - count) * sizeof(float));
  }
  return {1, stride, INT64_MAX, one, 0};
}

// Eight rows of eight numbers, `stride` apart, as eight columns, `lanes` apart.
template <class T>
void transpose8(const T* from, int64_t stride, float* to, int64_t lanes) {
#if defined(__AVX2__)
  __m256 v[8], pairs[8];
  for (int i = 0; i < 8; ++i) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * stride));
      v[i] = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    } else if constexpr (std::is_same_v<T, Float16>) {
      v[i] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * stride)));
    } else {
      v[i] = _mm256_loadu_ps(from + i * stride);
    }
  }
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    v[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    v[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    v[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    v[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(to + i * lanes, _mm256_permute2f128_ps(v[i], v[i + 4], 0x20));
    _mm256_storeu_ps(to + (i + 4) * lanes, _mm256_permute2f128_ps(v[i], v[i + 4], 0x31));
  }
#else
  for (int64_t i = 0; i < 8; ++i) {
    for (int64_t r = 0; r < 8; ++r) to[r * lanes + i] = to_float(from[i * stride + r]);
  }
#endif
}

// Columns of b as micro4.h's panels: of panel p, row r at b + p * kPanelTokens * depth + r * lanes.
template <class T>
void decode_b(const ProductArgs& args, Range inner, int64_t first, TokenPanels panels, float* b) {
  const T* from = static_cast<const T*>(args.b) + inner.begin * args.b_inner + first * args.b_column;
  const int64_t depth = inner.end - inner.begin;
  if (args.b_column == 1) {
    constexpr int64_t kLine = 64 / sizeof(T);
    const int64_t ahead = first + 2 * kGroup <= args.columns ? kGroup : 0;
    for (int64_t r = 0; r < depth; ++r) {
      const T* row = from + r * args.b_inner;
      for (int64_t line = 0; line < ahead; line += kLine) __builtin_prefetch(row + ahead + line, 0, 2);
      for (int64_t p = 0; p < panels.count(); ++p) {
        const int64_t begin = p * kPanelTokens, vecs = panels.vecs(p);
        float* to = b + begin * depth + r * vecs * kWidth;
        for (int64_t v = 0; v < vecs; ++v) {
          const int64_t column = begin + v * kWidth, left = panels.tokens - column;
          store(to + v * kWidth, left >= kWidth ? load(row + column) : load_tail(row + column, left));
        }
      }
    }
    return;
  }
  for (int64_t p = 0; p < panels.count(); ++p) {
    const int64_t begin = p * kPanelTokens, lanes = panels.vecs(p) * kWidth, here = least(lanes, panels.tokens - begin);
    float* to = b + begin * depth;
    for (int64_t j = 0; j < lanes; j += 8) {
      const T* rows = from + (begin + j) * args.b_column;
      int64_t r = 0;
      if (j + 8 <= here) {
        for (; r + 8 <= depth; r += 8) transpose8(rows + r, args.b_column, to + r * lanes + j, lanes);
      }
      for (; r < depth; ++r) {
        for (int64_t i = 0; i < 8 && j + i < lanes; ++i) {
          to[r * lanes + j + i] = j + i < here ? to_float(rows[i * args.b_column + r]) : 0.0f;
        }
      }
    }
  }
}

// Rounds a row's sums into c.
template <class T>
void finish(const ProductArgs& args, int64_t row, int64_t first, int64_t count, const float* sums) {
  T* c = static_cast<T*>(args.c) + row * args.c_row + first;
  const T* bias = args.bias == nullptr ? nullptr : static_cast<const T*>(args.bias) + first;
  const Vec alpha(args.alpha), beta(args.beta);
  for (int64_t j = 0; j < count; j += kWidth) {
    const int64_t n = least(kWidth, count - j);
    const auto read = [n](const T* p) { return n == kWidth ? load(p) : load_tail(p, n); };
    Vec v = alpha * load(sums + j);
    if (bias != nullptr) v = v + read(bias + j);
    if (args.beta != 0) v = fma(beta, read(c + j), v);
    if (n == kWidth) {
      store(c + j, v);
    } else {
      store_tail(c + j, v, n);
    }
  }
}

template <class T>
void by_blocks(const ProductArgs& args, Range rows, Range columns, const Own& own) {
  const float one = 1.0f;
  const int64_t kept = kept_columns(args);
  for (int64_t r0 = rows.begin; r0 < rows.end; r0 += kBlockRows) {
    const Range block{r0, least(rows.end, r0 + kBlockRows)};
    const int64_t padded = round_up(block.end - r0, kMicroRows);
    for (int64_t c0 = columns.begin; c0 < columns.end; c0 += kept) {
      const int64_t end = least(columns.end, c0 + kept), stride = round_up(end - c0, kWidth);
      std::memset(own.c, 0, static_cast<size_t>(padded * stride) * sizeof(float));
      for (int64_t k0 = 0; k0 < args.inner; k0 += kDepth) {
        const Range inner{k0, least(args.inner, k0 + kDepth)};
        const Tile tile = decode_a<T>(args, block, inner, &one, own.a);
        for (int64_t j = c0; j < end; j += kGroup) {
          const TokenPanels panels{least(kGroup, end - j)};
          decode_b<T>(args, inner, j, panels, own.b);
          multiply_tile<FloatWord>(own.a, tile, padded, own.b, panels, inner.end - k0, 0, inner.end - k0,
                                   own.c + (j - c0), stride);
        }
      }
      for (int64_t i = r0; i < block.end; ++i) finish<T>(args, i, c0, end - c0, own.c + (i - r0) * stride);
    }
  }
}

// Rows [first, first + count) of a as floats, [count, inner].
template <class T>
void decode_rows(const ProductArgs& args, int64_t first, int64_t count, float* to) {
  const T* a = static_cast<const T*>(args.a) + first * args.a_row;
  for (int64_t m = 0; m < count; ++m, a += args.a_row, to += args.inner) {
    if (args.a_inner == 1) {
      decode_row(a, args.inner, to);
    } else {
      for (int64_t k = 0; k < args.inner; ++k) to[k] = to_float(a[k * args.a_inner]);
    }
  }
}

// c[m, 0 .. count) += sum of a[m, s] b[s, ...] over kSteps rows of b.
template <int kRows, int kSteps, class T>
void add_rows(const float* a, int64_t a_row, const T* b, int64_t b_row, float* c, int64_t c_row, int64_t count) {
  const auto step = [&](int64_t j, auto read) {
    Vec sum[kRows];
    for (int m = 0; m < kRows; ++m) sum[m] = load(c + m * c_row + j);
    for (int s = 0; s < kSteps; ++s) {
      const Vec w = read(b + s * b_row + j);
      for (int m = 0; m < kRows; ++m) sum[m] = fma(Vec(a[m * a_row + s]), w, sum[m]);
    }
    for (int m = 0; m < kRows; ++m) store(c + m * c_row + j, sum[m]);
  };
  int64_t j = 0;
  for (; j + kWidth <= count; j += kWidth) step(j, [](const T* p) { return load(p); });
  if (j < count) step(j, [&](const T* p) { return load_tail(p, count - j); });
}

template <class T>
void by_rows(const ProductArgs& args, Range rows, Range columns, const Own& own) {
  const T* b = static_cast<const T*>(args.b);
  for (int64_t r0 = rows.begin; r0 < rows.end; r0 += kRowTile) {
    const int64_t count = least(kRowTile, rows.end - r0), chunk = kSums / count / kWidth * kWidth;
    decode_rows<T>(args, r0, count, own.a);
    for (int64_t c0 = columns.begin; c0 < columns.end; c0 += chunk) {
      const int64_t n = least(chunk, columns.end - c0), stride = round_up(n, kWidth);
      std::memset(own.c, 0, static_cast<size_t>(count * stride) * sizeof(float));
      const auto over_inner = [&](auto tile) {
        int64_t k = 0;
        const auto add = [&](auto steps) {
          const T* row = b + k * args.b_inner + c0;
          add_rows<tile(), steps()>(own.a + k, args.inner, row, args.b_inner, own.c, stride, n);
          k += steps();
        };
        while (k + 4 <= args.inner) add(std::integral_constant<int, 4>{});
        while (k < args.inner) add(std::integral_constant<int, 1>{});
      };
      static_assert(kRowTile == 4);
      switch (count) {
        case 1: over_inner(std::integral_constant<int, 1>{}); break;
        case 2: over_inner(std::integral_constant<int, 2>{}); break;
        case 3: over_inner(std::integral_constant<int, 3>{}); break;
        default: over_inner(std::integral_constant<int, 4>{}); break;
      }
      for (int64_t m = 0; m < count; ++m) finish<T>(args, r0 + m, c0, n, own.c + m * stride);
    }
  }
}

template <class T>
void by_dots(const ProductArgs& args, Range columns, const Own& own) {
  const T* b = static_cast<const T*>(args.b);
  decode_rows<T>(args, 0, args.rows, own.a);
  constexpr int64_t kGather = kWidth > kRowGroup ? kWidth : kRowGroup;
  for (int64_t j0 = columns.begin; j0 < columns.end; j0 += kGather) {
    const int64_t count = least(kGather, columns.end - j0);
    float sums[kFewRows][kGather];
    for (int64_t j = 0; j < count; j += kRowGroup) {
      const T* rows[kRowGroup];
      for (int64_t r = 0; r < kRowGroup; ++r) rows[r] = b + (j0 + least(j + r, count - 1)) * args.b_column;
      for (int64_t m = 0; m < args.rows; m += kTokenGroup) {
        float out[kRowGroup][kTokenGroup];
        const float* from = own.a + m * args.inner;
        const int64_t tokens = least(kTokenGroup, args.rows - m);
        if (tokens == 1) {
          dense_tile<1>(rows, from, args.inner, out);
        } else {
          dense_tile<kTokenGroup>(rows, from, args.inner, out);
        }
        for (int64_t r = 0; r < kRowGroup; ++r) {
          for (int64_t i = 0; i < tokens; ++i) sums[m + i][j + r] = out[r][i];
        }
      }
    }
    for (int64_t m = 0; m < args.rows; ++m) finish<T>(args, m, j0, count, sums[m]);
  }
}

int parts_of(const ProductArgs& args) { return parts_for(args.rows * args.inner * args.columns / 16); }

}  // namespace

// ----------------------------------------------------------------------------

void DEFTCORE_KERNEL(product)(const ProductArgs& args) {
  const int parts = parts_of(args);
  const int64_t bytes = static_cast<int64_t>(bytes_of([&](Workspace& room) { lay_out_part(args, room); }));
  const Path path = path_of(args);
  const bool along_rows = path != Path::kDots && args.columns < parts * kPanelTokens;
  for_parts(parts, [&](int part) {
    Workspace room(static_cast<char*>(args.workspace) + part * bytes);
    const Own own = lay_out_part(args, room);
    const Range rows = along_rows ? share(args.rows, parts, part, kMicroRows) : Range{0, args.rows};
    const Range columns = along_rows ? Range{0, args.columns} : share(args.columns, parts, part, kPanelTokens);
    dispatch_dtype(args.dtype, [&](auto t) {
      using T = decltype(t);
      switch (path) {
        case Path::kDots: return by_dots<T>(args, columns, own);
        case Path::kRows: return by_rows<T>(args, rows, columns, own);
        case Path::kBlocks: return by_blocks<T>(args, rows, columns, own);
      }
    });
  });
}

size_t DEFTCORE_KERNEL(product_workspace)(const ProductArgs& args) {
  return parts_of(args) * bytes_of([&](Workspace& room) { lay_out_part(args, room); });
}

}  // namespace deftcore::cpu
