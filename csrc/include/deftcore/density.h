// Fused activation + density surrogate + active count (DEFT), and the density metric. Bound by memory; what each op
// must at least move through it stands beside its arguments, here and in the other families: count_traffic
// (tests/emulator) prints what the CUDA kernels do move.
#pragma once

#include "deftcore/common.h"

namespace deftcore {

// Least traffic: z and a once.
struct ActDensityArgs {
  const void* z;          // [rows, width], contiguous
  const uint8_t* mask;    // [rows], 0 leaves the row out of sum and count; null counts every row
  void* a;                // [rows, width], out
  float* surrogate_sum;   // [1], out
  int64_t* active_count;  // [1], out
  int64_t rows, width;
  DType dtype;
  Activation activation;
  Surrogate surrogate;
  float surrogate_param;  // eps of l0, beta of tanh
  float tau;              // counted when |a| > tau or a is NaN

  DEFTCORE_FIELDS(z, mask, a, surrogate_sum, active_count, rows, width, dtype, activation, surrogate, surrogate_param,
                  tau)
};

// Least traffic: z, grad_a and grad_z once.
struct ActDensityBackwardArgs {
  const void* z;          // [rows, width], contiguous
  const void* grad_a;     // [rows, width], or null for zero
  const float* grad_sum;  // [1], or null for zero; on the device of z
  const uint8_t* mask;    // [rows] or null
  void* grad_z;           // [rows, width], out
  int64_t rows, width;
  DType dtype;
  Activation activation;
  Surrogate surrogate;
  float surrogate_param;

  DEFTCORE_FIELDS(z, grad_a, grad_sum, mask, grad_z, rows, width, dtype, activation, surrogate, surrogate_param)
};

// Least traffic: a once.
struct DensityArgs {
  const void* a;          // [rows, width], contiguous
  const uint8_t* mask;    // [rows] or null
  int64_t* active_count;  // [1], out
  int64_t rows, width;
  DType dtype;
  float tau;

  DEFTCORE_FIELDS(a, mask, active_count, rows, width, dtype, tau)
};

}  // namespace deftcore
