// Sparse MLPs over 4-bit weights: packed rows of inactive neurons are not read, and active ones are decoded in
// registers (few tokens) or once per panel (more). The stages are those of sparse_down.h; the caller has computed the
// first product. Bound by decoding, about three vector operations per kWidth weights, more than by the packed bytes;
// with x rounded to int8 the products with W_up's rows are dot8.h's.
#include "dot4.h"
#include "dot8.h"
#include "sparse_down4.h"

namespace deftcore::cpu {
namespace {

template <class T>
struct Mlp4Buffers : Buffers {
  float* act;                      // [tokens, neurons]
  typename WordOf<T>::Element* x;  // [tokens, x_stride] in the dot form's order; gated MLP only, as is the next
  Tokens8 rounded;                 // x in int8, in place of the former
  float* low;                      // [tokens, low_stride]
  float* scales;                   // [parts, scale_stride]
  int64_t x_stride, low_stride, scale_stride;
  float* scales_of(int part) const { return scales + part * scale_stride; }
};

template <class T, bool kInt8>
Mlp4Buffers<T> lay_out(const SparseMlp4bitArgs& args, Workspace& room) {
  Mlp4Buffers<T> b{};
  static_cast<Buffers&>(b) = lay_out(args.tokens, args.neurons, args.width, room);
  // Rows whose scales a part holds at once: of W_up in one stage, of W_down in the next.
  const int64_t up = args.w_up.packed == nullptr ? 0 : kDot4Rows * row_scale_size(args.w_up);
  const int64_t down = down_scales<WordOf<T>>(args.w_down_t);
  b.x_stride = up == 0 || kInt8 ? 0 : chunks_of(args.width) * kChunk;
  b.low_stride = sum_stride(args.down_rank);
  b.scale_stride = round_up(std::max(up, down), 16);
  b.act = room.take<float>(args.tokens * args.neurons);
  b.x = room.take<typename WordOf<T>::Element>(args.tokens * b.x_stride);
  if (up != 0 && kInt8) b.rounded = take_tokens8(room, args.tokens, args.width);
  b.low = room.take<float>(args.tokens * b.low_stride);
  b.scales = room.take<float>(most_parts() * b.scale_stride);
  return b;
}

template <class T, bool kInt8>
void sparse_mlp_4bit(const SparseMlp4bitArgs& args) {
  using Word = WordOf<T>;
  const bool gated = args.w_up.packed != nullptr;
  const Quant4 &w_up = args.w_up, &w_down = args.w_down_t;
  const T *x = static_cast<const T*>(args.x), *z = static_cast<const T*>(args.z);
  const T *up_low = static_cast<const T*>(args.up_low), *up_lora = static_cast<const T*>(args.up_lora);
  const int64_t tokens = args.tokens, neurons = args.neurons, width = args.width;
  const int parts = parts_for(neurons * (width / 8 + tokens) * 2);
  Workspace room(args.workspace);
  const Mlp4Buffers<T> b = lay_out<T, kInt8>(args, room);
  const Book8 book(gated ? w_up.code : kNf4Code);

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
        if constexpr (kInt8) {
          to_int8<true>(x + turn.begin * width, width, w_up.block_size, book.step,
                        b.rounded.some(turn.begin, turn.end));
        } else {
          for (int64_t m = turn.begin; m < turn.end; ++m) {
            to_positions<Word>(x + m * width, width, b.x + m * b.x_stride);
          }
        }
      }
      compact(b.act, tokens, neurons, args.tau, parts, part, b);
    });
    team.once([&] { active = join_shares(neurons, parts, b); });
    if (active > args.capacity) return;
    const auto fill = [&](int part, Range rows) {
      gather_active(b.act, tokens, neurons, args.tau, b.list, rows, b.h);
      if (!gated) return;
      const auto row_of = [&](int64_t k) { return b.list[k]; };
      const auto times = [&](int64_t k, int64_t m, float dot) {
        for (int64_t r = 0; r < args.up_rank; ++r) {
          dot += to_float(up_low[m * args.up_rank + r]) * to_float(up_lora[b.list[k] * args.up_rank + r]);
        }
        b.h[k * tokens + m] *= dot;
      };
      if constexpr (kInt8) {
        dots8(w_up, book, row_of, rows, b.rounded, b.scales_of(part), times);
      } else {
        dots4<Word>(w_up, row_of, rows, b.x, b.x_stride, tokens, b.scales_of(part), times);
      }
    };
    const auto product = [&](int part, Range columns) {
      if (part == 0 && args.down_rank > 0) {
        const Range ranks{0, args.down_rank};
        for (int64_t i = 0; i < tokens * b.low_stride; ++i) b.low[i] = 0.0f;
        const Matrix<T> lora{static_cast<const T*>(args.down_lora), args.down_rank};
        down_product<Word>(lora, active, tokens, ranks, b, b.low, b.low_stride);
        write_output<T>(b.low, b.low_stride, nullptr, tokens, args.down_rank, ranks, static_cast<T*>(args.down_low));
      }
      if (columns.begin == columns.end) return;
      down_product4<Word>(w_down, active, tokens, columns, b, b.scales_of(part));
    };
    const auto write = [&](int, Range columns) {
      write_output(b.acc, b.acc_stride, static_cast<const T*>(args.b_down), tokens, width, columns,
                   static_cast<T*>(args.y));
    };
    down_stages<Word>(team, active, tokens, width, b, fill, product, write);
  });
  *args.rows_read = active;
}

}  // namespace

// ----------------------------------------------------------------------------

size_t DEFTCORE_KERNEL(sparse_mlp_4bit_workspace)(const SparseMlp4bitArgs& args) {
  return bytes_of(
      [&](Workspace& room) { dispatch_dtype(args.dtype, [&](auto t) { lay_out<decltype(t), false>(args, room); }); });
}

void DEFTCORE_KERNEL(sparse_mlp_4bit)(const SparseMlp4bitArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) { sparse_mlp_4bit<decltype(t), false>(args); });
}

size_t DEFTCORE_KERNEL(sparse_mlp_4bit_int8_workspace)(const SparseMlp4bitArgs& args) {
  return bytes_of(
      [&](Workspace& room) { dispatch_dtype(args.dtype, [&](auto t) { lay_out<decltype(t), true>(args, room); }); });
}

void DEFTCORE_KERNEL(sparse_mlp_4bit_int8)(const SparseMlp4bitArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) { sparse_mlp_4bit<decltype(t), true>(args); });
}

}  // namespace deftcore::cpu
