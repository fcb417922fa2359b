// Fused activation + density surrogate + active count (DEFT), and the density metric.
#pragma once

#include "deftcore/common.h"

namespace deftcore {

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
};

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
};

struct DensityArgs {
  const void* a;          // [rows, width], contiguous
  const uint8_t* mask;    // [rows] or null
  int64_t* active_count;  // [1], out
  int64_t rows, width;
  DType dtype;
  float tau;
};

namespace cpu {
void act_density(const ActDensityArgs& args, Stream stream);
void act_density_backward(const ActDensityBackwardArgs& args, Stream stream);
void density(const DensityArgs& args, Stream stream);
}  // namespace cpu

namespace cuda {
void act_density(const ActDensityArgs& args, Stream stream);
void act_density_backward(const ActDensityBackwardArgs& args, Stream stream);
void density(const DensityArgs& args, Stream stream);
}  // namespace cuda

}  // namespace deftcore
