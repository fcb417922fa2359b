// The product of few tokens rounded to int8 with a 4-bit matrix, bound by the packed bytes.
#include "deftcore/workspace.h"
#include "dot8.h"

namespace deftcore::cpu {
namespace {

struct Int8Buffers {
  Tokens8 x;
  float* scales;  // [parts, scale_stride]: of the rows of a group
  int64_t scale_stride;
};

Int8Buffers lay_out(const Linear4bitArgs& args, Workspace& room) {
  Int8Buffers b{};
  b.scale_stride = kDot8Rows * row_scale_size(args.w);
  b.x = take_tokens8(room, args.tokens, args.w.cols);
  b.scales = room.take<float>(most_parts() * b.scale_stride);
  return b;
}

template <class T>
void linear_int8(const Linear4bitArgs& args) {
  const Quant4& q = args.w;
  const T *x = static_cast<const T*>(args.x), *bias = static_cast<const T*>(args.bias);
  T* y = static_cast<T*>(args.y);
  Workspace room(args.workspace);
  const Int8Buffers b = lay_out(args, room);
  const Book8 book(q.code);
  to_int8<true>(x, q.cols, q.block_size, book.step, b.x);
  const int parts = parts_for(q.rows * q.cols / 2);
  for_parts(parts, [&](int part) {
    const auto same = [](int64_t row) { return row; };
    dots8(q, book, same, share(q.rows, parts, part, kDot8Rows), b.x, b.scales + part * b.scale_stride,
          [&](int64_t n, int64_t m, float dot) {
            if (bias != nullptr) dot += to_float(bias[n]);
            store_tail(y + m * q.rows + n, Vec(dot), 1);
          });
  });
}

}  // namespace

// ----------------------------------------------------------------------------

void DEFTCORE_KERNEL(linear_4bit_int8)(const Linear4bitArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) { linear_int8<decltype(t)>(args); });
}

size_t DEFTCORE_KERNEL(linear_4bit_int8_workspace)(const Linear4bitArgs& args) {
  return bytes_of([&](Workspace& room) { lay_out(args, room); });
}

}  // namespace deftcore::cpu
