// Sparse MLPs over 4-bit weights: packed rows of inactive neurons are not read, and active ones are decoded in
// registers (few tokens) or once per panel (more). The stages are those of sparse_down.h; the caller has computed the
// first product. Bound by decoding, about three vector operations per kWidth weights, more than by the packed bytes.
#include "dot4.h"
#include "sparse_down.h"

namespace deftcore::cpu {
namespace {

constexpr int64_t kDecodeTokens = 4;  // tokens that share one decode in registers
// Up to here rows are decoded in registers, at most twice; beyond, once per panel. Chosen by that count.
constexpr int64_t kDirectTokens = 8;

// Rows of the active list that one pass over the columns takes, and what each is multiplied by.
struct Piece {
  const uint8_t *rows[kStreamRows], *next[kStreamRows];  // packed; `next` is prefetched alongside
  int64_t count;
  const float* factors;  // [count, tokens, factor_stride]: by the number of the block, from that of column 0
  int64_t factor_stride;
  int block_shift;      // log2 of the block size; 63 for one factor per row
  const float* scales;  // of column 0 onwards, or null: what the piece's sum is multiplied by
};

// acc[m, j ...] += sum_r factor * code[row r, j ...] for kStrips strips.
template <int kTokens, int kStrips>
void down_tile4(const CodeBook& book, const Piece& p, int64_t j, float* acc, int64_t acc_stride) {
  Strip sums[kTokens][kStrips];
  for (auto& of_token : sums) {
    for (Strip& sum : of_token) {
      for (Vec& v : sum.v) v = Vec(0.0f);
    }
  }
  for (int64_t r = 0; r < p.count; ++r) {
    const uint8_t* bytes = p.rows[r] + j / 2;
    const float* factors = p.factors + r * kTokens * p.factor_stride;
    __builtin_prefetch(p.next[r] + j / 2, 0, 2);
    for (int i = 0; i < kStrips; ++i) {
      const Strip codes = load_strip(book, bytes + i * (kStrip / 2));
      const int64_t block = (j + i * kStrip) >> p.block_shift;
      for (int m = 0; m < kTokens; ++m) {
        const Vec factor(factors[m * p.factor_stride + block]);
        for (int v = 0; v < kStripVecs; ++v) sums[m][i].v[v] = fma(codes.v[v], factor, sums[m][i].v[v]);
      }
    }
  }
  for (int m = 0; m < kTokens; ++m) {
    for (int i = 0; i < kStrips; ++i) {
      const Strip sum = in_order(sums[m][i]);
      for (int v = 0; v < kStripVecs; ++v) {
        const int64_t column = j + i * kStrip + v * kWidth;
        float* out = acc + m * acc_stride + column;
        store(out, load(out) + (p.scales != nullptr ? sum.v[v] * load(p.scales + column) : sum.v[v]));
      }
    }
  }
}

// Strips of a tile: sums in half of the registers, where more were measured slower.
constexpr int strips_of_tile(int tokens) {
  int strips = 4;
  while (strips > 1 && kStripVecs * strips * tokens > kRegisters / 2) --strips;
  return strips;
}

// acc[m, j] += sum_k h[k, m] w[list[k], j] for kTokens tokens of h [active, tokens] and j in columns, which start at a
// multiple of kColumnUnit. `factors` is room for kStreamRows * kTokens rows of scales.
template <int kTokens>
void down_few4(const Quant4& q, const int32_t* list, int64_t active, const float* h, int64_t tokens, Range columns,
               float* factors, float* acc, int64_t acc_stride) {
  constexpr int kStrips = strips_of_tile(kTokens);
  const CodeBook book(q.code);
  Piece p{};
  p.factors = factors;
  p.factor_stride = q.column_blocks ? 1 : row_scale_size(q);
  p.block_shift = q.column_blocks ? 63 : __builtin_ctzll(static_cast<unsigned long long>(q.block_size));
  for (int64_t k0 = 0; k0 < active; k0 += p.count) {
    const int64_t group = list[k0] / q.block_size;
    p.count = 0;
    while (p.count < kStreamRows && k0 + p.count < active) {
      const int64_t k = k0 + p.count, row = list[k], ahead = k + kStreamRows;
      if (q.column_blocks && row / q.block_size != group) break;  // rows of one group share their scales
      p.rows[p.count] = packed_row(q, row);
      p.next[p.count] = packed_row(q, list[ahead < active ? ahead : active - 1]);
      float* mine = factors + p.count * kTokens * p.factor_stride;
      if (q.column_blocks) {
        for (int m = 0; m < kTokens; ++m) mine[m] = h[k * tokens + m];
      } else {
        const int64_t first = columns.begin / q.block_size, blocks = (columns.end - 1) / q.block_size - first + 1;
        float* last = mine + (kTokens - 1) * p.factor_stride + first;
        decode_scales(q, row * q.cols / q.block_size + first, blocks, last);
        for (int m = 0; m < kTokens; ++m) {  // the last in place
          float* out = mine + m * p.factor_stride + first;
          for (int64_t b = 0; b < blocks; ++b) out[b] = last[b] * h[k * tokens + m];
        }
      }
      ++p.count;
    }
    p.scales = q.column_blocks ? column_scales(q, list[k0], 0) : nullptr;
    int64_t j = columns.begin;
    for (; j + kStrips * kStrip <= columns.end; j += kStrips * kStrip) {
      down_tile4<kTokens, kStrips>(book, p, j, acc, acc_stride);
    }
    for (; j + kStrip <= columns.end; j += kStrip) down_tile4<kTokens, 1>(book, p, j, acc, acc_stride);
    for (; j < columns.end; ++j) {  // a ragged width, with column blocks only
      for (int64_t r = 0; r < p.count; ++r) {
        const float w = decode_one(q, list[k0 + r], j);
        for (int m = 0; m < kTokens; ++m) acc[m * acc_stride + j] += h[(k0 + r) * tokens + m] * w;
      }
    }
  }
}

// Panels of decoded rows. `scales` is room for a panel's rows of scales, decoded when a new set of rows begins.
template <class Word>
auto fill_from4(const Quant4& q, const CodeBook& book, const int32_t* list, Range columns, float* scales) {
  return [&q, &book, list, columns, scales](Panel<Word>& panel, int64_t k0, int64_t count, int64_t j) {
    const int64_t stride = row_scale_size(q);
    if (j == columns.begin && !q.column_blocks) {
      for (int64_t r = 0; r < count; ++r) {
        const int64_t first = j / q.block_size, row = list[k0 + r];
        decode_scales(q, row * q.cols / q.block_size + first, (columns.end - 1) / q.block_size - first + 1,
                      scales + r * stride + first);
      }
    }
    const int shift = __builtin_ctzll(static_cast<unsigned long long>(q.block_size));
    fill_values(panel, count, [&](int64_t r, int v) {
      const int64_t row = list[k0 + r], col = j + v * kWidth, left = columns.end - col;
      if (v == 0) __builtin_prefetch(packed_row(q, row) + (j + kTileColumns) / 2 + 32, 0, 2);
      if (left < kWidth || (kWidth == 1 && q.column_blocks)) {
        float lanes[kWidth] = {};
        for (int64_t l = 0; l < left && l < kWidth; ++l) lanes[l] = decode_one(q, row, col + l);
        return load(lanes);
      }
#if defined(DEFTCORE_VECTORS)
      const Vec value = book(load_nibbles(packed_row(q, row) + col / 2));
#else
      const Vec value = book(static_cast<Words>(packed_row(q, row)[col / 2] >> (col % 2 ? 0 : 4)));
#endif
      return value * (q.column_blocks ? load(column_scales(q, row, col)) : Vec(scales[r * stride + (col >> shift)]));
    });
  };
}

template <class T>
struct Mlp4Buffers : Buffers {
  float* act;                      // [tokens, neurons]
  typename WordOf<T>::Element* x;  // [tokens, x_stride] in the dot form's order; gated MLP only
  float* low;                      // [tokens, low_stride]
  float* scales;                   // [parts, scale_stride]
  int64_t x_stride, low_stride, scale_stride;
  float* scales_of(int part) const { return scales + part * scale_stride; }
};

template <class T>
Mlp4Buffers<T> lay_out(const SparseMlp4bitArgs& args, Workspace& room) {
  Mlp4Buffers<T> b{};
  static_cast<Buffers&>(b) = lay_out(args.tokens, args.neurons, args.width, room);
  // Rows whose scales a part holds at once: of W_up in one stage, in the next a panel's of W_down or a piece's, for
  // each of its tokens.
  const int64_t up = args.w_up.packed == nullptr ? 0 : kDot4Rows * row_scale_size(args.w_up);
  const int64_t down = std::max(Panel<WordOf<T>>::kRows, kStreamRows * kDecodeTokens) * row_scale_size(args.w_down_t);
  b.x_stride = up == 0 ? 0 : chunks_of(args.width) * kChunk;
  b.low_stride = sum_stride(args.down_rank);
  b.scale_stride = round_up(std::max(up, down), 16);
  b.act = room.take<float>(args.tokens * args.neurons);
  b.x = room.take<typename WordOf<T>::Element>(args.tokens * b.x_stride);
  b.low = room.take<float>(args.tokens * b.low_stride);
  b.scales = room.take<float>(most_parts() * b.scale_stride);
  return b;
}

template <class T>
void sparse_mlp_4bit(const SparseMlp4bitArgs& args) {
  using Word = WordOf<T>;
  const bool gated = args.w_up.packed != nullptr;
  const Quant4 &w_up = args.w_up, &w_down = args.w_down_t;
  const T *x = static_cast<const T*>(args.x), *z = static_cast<const T*>(args.z);
  const T *up_low = static_cast<const T*>(args.up_low), *up_lora = static_cast<const T*>(args.up_lora);
  const int64_t tokens = args.tokens, neurons = args.neurons, width = args.width;
  const int parts = parts_for(neurons * (width / 8 + tokens) * 2);
  Workspace room(args.workspace);
  const Mlp4Buffers<T> b = lay_out<T>(args, room);

  int64_t active = 0;
  parallel(parts, [&](Team& team) {
    team.stage([&](int part) {
      const Range mine = share(neurons, parts, part, 16);
      for (int64_t m = 0; m < tokens; ++m) {
        float* act = b.act + m * neurons + mine.begin;
        to_floats(z + m * neurons + mine.begin, mine.end - mine.begin, act);
        if (!args.activated) activate_row(args.activation, act, mine.end - mine.begin);
      }
      if (gated) {
        const Range turn = share(tokens, parts, part);
        for (int64_t m = turn.begin; m < turn.end; ++m) to_positions<Word>(x + m * width, width, b.x + m * b.x_stride);
      }
      compact(b.act, tokens, neurons, args.tau, parts, part, b);
    });
    team.once([&] { active = join_shares(neurons, parts, b); });
    if (active > args.capacity) return;
    const auto fill = [&](int part, Range rows) {
      gather_active(b.act, tokens, neurons, args.tau, b.list, rows, b.h);
      if (!gated) return;
      dots4<Word>(
          w_up, [&](int64_t k) { return b.list[k]; }, rows, b.x, b.x_stride, tokens, b.scales_of(part),
          [&](int64_t k, int64_t m, float dot) {
            for (int64_t r = 0; r < args.up_rank; ++r) {
              dot += to_float(up_low[m * args.up_rank + r]) * to_float(up_lora[b.list[k] * args.up_rank + r]);
            }
            b.h[k * tokens + m] *= dot;
          });
    };
    const auto product = [&](int part, Range columns) {
      if (part == 0 && args.down_rank > 0) {
        const Range ranks{0, args.down_rank};
        for (int64_t i = 0; i < tokens * b.low_stride; ++i) b.low[i] = 0.0f;
        const Matrix<T> lora{static_cast<const T*>(args.down_lora), args.down_rank};
        down_product(lora, active, tokens, ranks, b, b.low, b.low_stride);
        write_output<T>(b.low, b.low_stride, nullptr, tokens, args.down_rank, ranks, static_cast<T*>(args.down_low));
      }
      if (columns.begin == columns.end) return;
      float* scales = b.scales_of(part);
      if (tokens > kDirectTokens) {
        const CodeBook book(w_down.code);
        return down_tokens<Word>(active, b.template words<Word>(), tokens, columns, b.acc, b.acc_stride,
                                 fill_from4<Word>(w_down, book, b.list, columns, scales));
      }
      for (int64_t m = 0; m < tokens; m += kDecodeTokens) {
        const auto few = [&](auto n) {
          down_few4<n()>(w_down, b.list, active, b.h + m, tokens, columns, scales, b.acc + m * b.acc_stride,
                         b.acc_stride);
        };
        using std::integral_constant;
        switch (tokens - m) {
          case 1: few(integral_constant<int, 1>{}); break;
          case 2: few(integral_constant<int, 2>{}); break;
          case 3: few(integral_constant<int, 3>{}); break;
          default: few(integral_constant<int, 4>{}); break;
        }
      }
    };
    down_stages(team, static_cast<const T*>(args.b_down), active, tokens, width, b, static_cast<T*>(args.y), fill,
                product);
  });
  *args.rows_read = active;
}

}  // namespace

// ----------------------------------------------------------------------------

size_t DEFTCORE_KERNEL(sparse_mlp_4bit_workspace)(const SparseMlp4bitArgs& args) {
  return bytes_of(
      [&](Workspace& room) { dispatch_dtype(args.dtype, [&](auto t) { lay_out<decltype(t)>(args, room); }); });
}

void DEFTCORE_KERNEL(sparse_mlp_4bit)(const SparseMlp4bitArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) { sparse_mlp_4bit<decltype(t)>(args); });
}

}  // namespace deftcore::cpu
