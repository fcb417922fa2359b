// Soft masks on heads and channels (Light-PEFT): y = x * mask, and the mask's gradient on the way back.
#pragma once

#include "deftcore/common.h"

namespace deftcore {

// Rows whose products are summed together, by one thread after another; their sums then meet in the workspace.
inline constexpr int64_t kMaskRows = 64;

// y = x * mask, a mask per unit of `width` columns. Least traffic: x and y once.
struct MaskUnitsArgs {
  const void* x;      // [rows, units * width], contiguous
  const float* mask;  // [units]
  void* y;            // [rows, units * width], out
  int64_t rows, units, width;
  DType dtype;

  DEFTCORE_FIELDS(x, mask, y, rows, units, width, dtype)
};

// grad_x = grad * mask * f'(x), and grad_mask the sum of grad * f(x) over rows and the unit's columns; f is the
// identity unless `activated`. Least traffic: x, grad and grad_x once.
struct MaskUnitsBackwardArgs {
  const void* x;      // [rows, units * width], contiguous
  const void* grad;   // [rows, units * width], contiguous
  const float* mask;  // [units]
  void* grad_x;       // [rows, units * width], out; may be grad itself
  float* grad_mask;   // [units], out
  void* workspace;    // 64-byte aligned
  int64_t rows, units, width;
  DType dtype;
  bool activated;
  Activation activation;

  DEFTCORE_FIELDS(x, grad, mask, grad_x, grad_mask, workspace, rows, units, width, dtype, activated, activation)
};

}  // namespace deftcore
