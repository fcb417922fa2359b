// Products of matrices in 16 bits, for processors that have no instructions for them.
#pragma once

#include "deftcore/common.h"

namespace deftcore {

// c <- beta c + alpha a b + bias, summed in float32 and rounded once. Of each of a and b one stride is 1: either may be
// a transposed view. Least traffic: a, b and c once.
struct ProductArgs {
  const void* a;     // [rows, inner]
  const void* b;     // [inner, columns]
  const void* bias;  // [columns] or null
  void* c;           // [rows, columns]; where beta is 0 only written
  void* workspace;   // 64-byte aligned
  int64_t rows, inner, columns;
  int64_t a_row, a_inner, b_inner, b_column, c_row;  // strides in elements; a row of c is contiguous
  float alpha, beta;
  DType dtype;

  DEFTCORE_FIELDS(a, b, bias, c, workspace, rows, inner, columns, a_row, a_inner, b_inner, b_column, c_row, alpha, beta,
                  dtype)
};

}  // namespace deftcore
