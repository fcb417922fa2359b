// y = x * mask, and its backward in one pass over x and its output's gradient, both bound by memory traffic (and by exp
// where an activation is inside). Sums over rows are float within kMaskRows rows and double across them: neither
// depends on the number of threads.
#include <algorithm>

#include "deftcore/workspace.h"
#include "isa.h"

namespace deftcore::cpu {
namespace {

constexpr int64_t kPiece = 1024;  // columns at a time: masks and sums of a piece stay in L1

// Columns [first, first + count) of some rows.
struct Piece {
  int64_t row, rows, first, count;
};

// Pieces of kMaskRows rows and kPiece columns, row after row of them.
struct Pieces {
  int64_t rows, columns;
  int64_t across() const { return (columns + kPiece - 1) / kPiece; }
  int64_t down() const { return (rows + kMaskRows - 1) / kMaskRows; }
  int64_t count() const { return across() * down(); }
  Piece operator[](int64_t i) const {
    const int64_t row = i / across() * kMaskRows, first = i % across() * kPiece;
    return {row, std::min(rows - row, kMaskRows), first, std::min(columns - first, kPiece)};
  }
};

// A mask per column.
void spread(const float* mask, int64_t width, const Piece& piece, float* out) {
  for (int64_t i = 0; i < piece.count; ++i) out[i] = mask[(piece.first + i) / width];
}

template <class T>
void mask_piece(const MaskUnitsArgs& args, const Piece& piece) {
  alignas(64) float mask[kPiece];
  spread(args.mask, args.width, piece, mask);
  for (int64_t r = piece.row; r < piece.row + piece.rows; ++r) {
    const int64_t offset = r * args.units * args.width + piece.first;
    const T* x = static_cast<const T*>(args.x) + offset;
    T* y = static_cast<T*>(args.y) + offset;
    int64_t i = 0;
    for (; i + kWidth <= piece.count; i += kWidth) store_ieee(y + i, load(x + i) * load(mask + i));
    if (i < piece.count) {
      T tail[kWidth];
      store_ieee(tail, load_tail(x + i, piece.count - i) * load_tail(mask + i, piece.count - i));
      std::memcpy(y + i, tail, static_cast<size_t>(piece.count - i) * sizeof(T));
    }
  }
}

// The slopes of m f(x): grad m f'(x) for x, and grad f(x) for m.
struct Identity {
  static math::GatedSlopes<Vec> slopes(Vec x, Vec mask, Vec grad) { return {grad * mask, grad * x}; }
};
template <Activation kF>
struct Activated {
  static math::GatedSlopes<Vec> slopes(Vec x, Vec mask, Vec grad) { return math::gated_slopes<kF>(x, mask, grad); }
};

// `sums` is the piece's own row of sums, [columns].
template <class F, class T>
void backward_piece(const MaskUnitsBackwardArgs& args, const Piece& piece, float* sums) {
  alignas(64) float mask[kPiece], total[kPiece] = {};
  spread(args.mask, args.width, piece, mask);
  for (int64_t r = piece.row; r < piece.row + piece.rows; ++r) {
    const int64_t offset = r * args.units * args.width + piece.first;
    const T* x = static_cast<const T*>(args.x) + offset;
    const T* grad = static_cast<const T*>(args.grad) + offset;
    T* grad_x = static_cast<T*>(args.grad_x) + offset;
    int64_t i = 0;
    for (; i + kWidth <= piece.count; i += kWidth) {
      const auto f = F::slopes(load(x + i), load(mask + i), load(grad + i));
      store(grad_x + i, f.gate);
      store(total + i, load(total + i) + f.up);
    }
    if (const int64_t n = piece.count - i; n > 0) {
      const auto f = F::slopes(load_tail(x + i, n), load_tail(mask + i, n), load_tail(grad + i, n));
      store_tail(grad_x + i, f.gate, n);
      store_tail(total + i, load_tail(total + i, n) + f.up, n);
    }
  }
  std::copy(total, total + piece.count, sums + piece.first);
}

// The workspace: a row of sums for every kMaskRows rows.
float* lay_out(const MaskUnitsBackwardArgs& args, Workspace& room) {
  const Pieces pieces{args.rows, args.units * args.width};
  return room.take<float>(pieces.down() * pieces.columns);
}

template <class F, class T>
void backward(const MaskUnitsBackwardArgs& args) {
  Workspace room(args.workspace);
  float* sums = lay_out(args, room);
  const Pieces pieces{args.rows, args.units * args.width};
  const int64_t columns = pieces.columns, bytes = args.rows * columns * 3 * static_cast<int64_t>(sizeof(T));
  parallel(parts_for(bytes), [&](Team& team) {
    team.each(pieces.count(), [&](int64_t i) {
      const Piece piece = pieces[i];
      backward_piece<F, T>(args, piece, sums + piece.row / kMaskRows * columns);
    });
    team.stage([&](int part) {
      const Range mine = share(args.units, team.parts, part);
      for (int64_t u = mine.begin; u < mine.end; ++u) {
        double total = 0;
        for (int64_t k = 0; k < pieces.down(); ++k) {
          const float* row = sums + k * columns + u * args.width;
          for (int64_t i = 0; i < args.width; ++i) total += static_cast<double>(row[i]);
        }
        args.grad_mask[u] = static_cast<float>(total);
      }
    });
  });
}

}  // namespace

// ----------------------------------------------------------------------------

void DEFTCORE_KERNEL(mask_units)(const MaskUnitsArgs& args) {
  const Pieces pieces{args.rows, args.units * args.width};
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    for_range(pieces.count(), args.rows * pieces.columns * 2 * static_cast<int64_t>(sizeof(T)),
              [&](int64_t i) { mask_piece<T>(args, pieces[i]); });
  });
}

size_t DEFTCORE_KERNEL(mask_units_backward_workspace)(const MaskUnitsBackwardArgs& args) {
  return bytes_of([&](Workspace& room) { lay_out(args, room); });
}

void DEFTCORE_KERNEL(mask_units_backward)(const MaskUnitsBackwardArgs& args) {
  dispatch_dtype(args.dtype, [&](auto t) {
    using T = decltype(t);
    if (!args.activated) return backward<Identity, T>(args);
    dispatch(args.activation, [&](auto f) { backward<Activated<f()>, T>(args); });
  });
}

}  // namespace deftcore::cpu
