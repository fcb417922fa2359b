// 4-bit weights: quantise and decode, bound by the traffic of the unpacked side, and the product for few tokens, bound
// by the packed bytes for one. Products of many tokens, and those of the backward, are in quant4_gemm.cpp.
#include "deftcore/workspace.h"
#include "dot4.h"

namespace deftcore::cpu {
namespace {

// ---------------------------------------------------------------------------- quantise

// The largest |w| of a block, or NaN if a value is not finite.
template <class T>
float block_absmax(const T* w, int64_t n) {
  Vec largest(0.0f), bad(0.0f);
  const auto step = [&](Vec v) {
    largest = at_least(abs(v), largest);
    bad = fma(v, Vec(0.0f), bad);
  };
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) step(load(w + i));
  if (i < n) step(load_tail(w + i, n - i));
  float lanes[kWidth], most = 0.0f;
  store(lanes, largest);
  for (float v : lanes) most = v > most ? v : most;
  return reduce_add(bad) == 0.0f ? most : NAN;
}

// Number of thresholds strictly below v, as bytes.
inline void count_below(Vec v, const float* thresholds, uint8_t* out) {
  Vec count(0.0f);
  for (int j = 0; j < 15; ++j) count = where(v > Vec(thresholds[j]), count + Vec(1.0f), count);
  float lanes[kWidth];
  store(lanes, count);
  for (int l = 0; l < kWidth; ++l) out[l] = static_cast<uint8_t>(lanes[l]);
}

template <class T>
void quantize_block(const T* w, int64_t n, int64_t block_size, const float* thresholds, const uint8_t* order,
                    uint8_t* packed, float* absmax) {
  constexpr float kSmallest = 1e-38f;
  const float largest = block_absmax(w, n);
  const bool whole = n == block_size;
  const float floored = largest > kSmallest ? largest : kSmallest;
  *absmax = whole || largest != largest ? largest : floored;
  const Vec inverse(1.0f / floored), divisor(floored), one(1.0f), minus(-1.0f);
  // Whole blocks multiply by the reciprocal and a short last one divides, as bitsandbytes on CPUs does.
  const auto scaled = [&](Vec v) { return whole ? at_most(at_least(v * inverse, minus), one) : v / divisor; };
  uint8_t index[kMaxBlock + kWidth];
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) count_below(scaled(load(w + i)), thresholds, index + i);
  if (i < n) count_below(scaled(load_tail(w + i, n - i)), thresholds, index + i);
  if (n % 2) count_below(Vec(0.0f), thresholds, index + n);  // the pad of an odd count
  for (int64_t j = 0; j < (n + 1) / 2; ++j) {
    packed[j] = static_cast<uint8_t>(order[index[2 * j]] << 4 | order[index[2 * j + 1]]);
  }
}

template <class T>
void quantize(const Quantize4bitArgs& args) {
  const T* w = static_cast<const T*>(args.w);
  const float* book = code_book(args.type);
  const uint8_t* order = code_order(args.type);
  float thresholds[15];
  for (int j = 0; j < 15; ++j) thresholds[j] = (book[order[j]] + book[order[j + 1]]) * 0.5f;
  const int64_t size = args.block_size, blocks = (args.count + size - 1) / size;
  for_range(blocks, args.count * 4, [&](int64_t b) {
    const int64_t first = b * size, n = args.count - first < size ? args.count - first : size;
    quantize_block(w + first, n, size, thresholds, order, args.packed + first / 2, args.absmax + b);
  });
}

// ---------------------------------------------------------------------------- dequantise

template <class T>
void dequantize(const Dequantize4bitArgs& args) {
  const Quant4& q = args.w;
  const CodeBook book(q.code);
  T* out = static_cast<T*>(args.out);
  const int64_t count = q.rows * q.cols, blocks = (count + q.block_size - 1) / q.block_size;
  if (q.column_blocks) {
    for_range(q.rows, count * 2, [&](int64_t r) {
      constexpr int64_t kPiece = 256;
      float values[kPiece];
      for (int64_t c = 0; c < q.cols; c += kPiece) {
        const int64_t n = q.cols - c < kPiece ? q.cols - c : kPiece;
        decode_column_blocks(q, book, r, c, n, values);
        for (int64_t j = 0; j < n; j += kWidth) {
          T lanes[kWidth];
          const int64_t left = n - j < kWidth ? n - j : kWidth;
          store_ieee(lanes, load_tail(values + j, left));
          std::memcpy(out + r * q.cols + c + j, lanes, static_cast<size_t>(left) * sizeof(T));
        }
      }
    });
  } else {
    for_range(blocks, count * 2, [&](int64_t b) {
      const float scale = scale_of(q, b);
      const int64_t first = b * q.block_size, end = count - first < q.block_size ? count : first + q.block_size;
      int64_t i = first;
      for (; i + kStrip <= end; i += kStrip) {
        const Strip codes = strip_in_order(book, q.packed + i / 2);
        for (int v = 0; v < kStripVecs; ++v) store_ieee(out + i + v * kWidth, codes.v[v] * Vec(scale));
      }
      for (; i < end; ++i) {
        T lanes[kWidth];
        store_ieee(lanes, Vec(q.code[q.packed[i / 2] >> (i % 2 ? 0 : 4) & 15] * scale));
        out[i] = lanes[0];
      }
    });
  }
}

// ---------------------------------------------------------------------------- few tokens

// Most tokens that take dot products. Beyond them the vectors over tokens of quant4_gemm.cpp are half full, and
// decoding once pays; chosen by that count, not measured per machine.
constexpr int64_t kMostDotTokens = kWidth / 2 > 4 ? kWidth / 2 : 4;

bool is_few(const Linear4bitArgs& args) { return args.tokens <= kMostDotTokens && is_regular(args.w); }

template <class T>
struct FewBuffers {
  typename WordOf<T>::Element* x;  // [tokens, x_stride] in the dot form's order
  float* scales;                   // [parts, scale_stride]: of the rows of a group
  int64_t x_stride, scale_stride;
};

template <class T>
FewBuffers<T> lay_out(const Linear4bitArgs& args, Workspace& room) {
  FewBuffers<T> b{};
  b.x_stride = chunks_of(args.w.cols) * kChunk;
  b.scale_stride = kDot4Rows * row_scale_size(args.w);
  b.x = room.take<typename WordOf<T>::Element>(args.tokens * b.x_stride);
  b.scales = room.take<float>(most_parts() * b.scale_stride);
  return b;
}

template <class T>
void linear_few(const Linear4bitArgs& args) {
  using Word = WordOf<T>;
  const Quant4& q = args.w;
  const int64_t tokens = args.tokens, rank = args.rank;
  const T *low = static_cast<const T*>(args.low), *lora = static_cast<const T*>(args.lora);
  const T* bias = static_cast<const T*>(args.bias);
  T* y = static_cast<T*>(args.y);
  Workspace room(args.workspace);
  const FewBuffers<T> b = lay_out<T>(args, room);
  for (int64_t m = 0; m < tokens; ++m) {
    to_positions<Word>(static_cast<const T*>(args.x) + m * q.cols, q.cols, b.x + m * b.x_stride);
  }
  const int parts = parts_for(q.rows * q.cols / 2);
  for_parts(parts, [&](int part) {
    const Range rows = share(q.rows, parts, part, kDot4Rows);
    dots4<Word>(
        q, [](int64_t n) { return n; }, rows, b.x, b.x_stride, tokens, b.scales + part * b.scale_stride,
        [&](int64_t n, int64_t m, float dot) {
          if (bias != nullptr) dot += to_float(bias[n]);
          for (int64_t r = 0; r < rank; ++r) dot += to_float(low[m * rank + r]) * to_float(lora[n * rank + r]);
          store_tail(y + m * q.rows + n, Vec(dot), 1);
        });
  });
}

}  // namespace

// ----------------------------------------------------------------------------

void DEFTCORE_KERNEL(quantize_4bit)(const Quantize4bitArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) { quantize<decltype(t)>(args); });
}

void DEFTCORE_KERNEL(dequantize_4bit)(const Dequantize4bitArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) { dequantize<decltype(t)>(args); });
}

// In quant4_gemm.cpp.
void DEFTCORE_KERNEL(linear_4bit_many)(const Linear4bitArgs& args);
size_t DEFTCORE_KERNEL(linear_4bit_many_workspace)(const Linear4bitArgs& args);

void DEFTCORE_KERNEL(linear_4bit)(const Linear4bitArgs& args) {
  if (!is_few(args)) return DEFTCORE_KERNEL(linear_4bit_many)(args);
  dispatch_dtype(args.dtype, [&](auto t) { linear_few<decltype(t)>(args); });
}

size_t DEFTCORE_KERNEL(linear_4bit_workspace)(const Linear4bitArgs& args) {
  if (!is_few(args)) return DEFTCORE_KERNEL(linear_4bit_many_workspace)(args);
  return bytes_of(
      [&](Workspace& room) { dispatch_dtype(args.dtype, [&](auto t) { lay_out<decltype(t)>(args, room); }); });
}

}  // namespace deftcore::cpu
