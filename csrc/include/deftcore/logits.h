// Penalties on logits (BA-LoRA): what softmaxes and entropies of a row need, the gradient of the logits from that, the
// largest logits of a row, and products of all rows with a few vectors. Sums are in float32 or wider; no array in it is
// as large as the logits.
#pragma once

#include "deftcore/common.h"

namespace deftcore {

// What is known of a row; of one that is left out all are 0.
enum RowStat : int {
  kLargest = 0,         // of the student's logits
  kLogSum = 1,          // log of the sum of exp((z - largest) sharpness)
  kTeacherLargest = 2,  // the same of the teacher
  kTeacherLogSum = 3,
  kDivergence = 4,     // KL(teacher | student), both times sharpness
  kEntropyLogSum = 5,  // log of the sum of exp((z - largest) entropy_sharpness)
  kEntropy = 6,
  kSquares = 7,  // sum of z^2
};
inline constexpr int64_t kRowStats = 8;

// Minus infinity has no probability and counts as 0 in squares and products. Least traffic: student and teacher once.
struct LogitRowsArgs {
  const void* student;  // [rows, stride], the first `width` columns count
  const void* teacher;  // the same; null leaves its statistics and the student's log sum at 0
  const uint8_t* mask;  // [rows], 0 leaves the row out; null takes every row
  float* stats;         // [rows, kRowStats], out
  int64_t rows, width, stride;
  DType dtype;
  float sharpness, entropy_sharpness;  // 1 / temperature; an entropy_sharpness of 0 leaves the entropy out

  DEFTCORE_FIELDS(student, teacher, mask, stats, rows, width, stride, dtype, sharpness, entropy_sharpness)
};

// The gradient of the columns begin to end, with q, p, and e the softmaxes of student, teacher and entropy:
//   slopes[0] (q - p) + slopes[1] e (log e + entropy) + slopes[2] z + left right,  and kept_grad at the columns kept.
// Least traffic: student, teacher and grad once.
struct LogitRowsBackwardArgs {
  LogitRowsArgs forward;
  const float* slopes;     // [3], on the device of the logits
  const int32_t* kept;     // [rows, most] columns, -1 where there is none; null without
  const float* kept_grad;  // [rows, most]
  const float* left;       // [rows, rank]; null without
  const float* right;      // [rank, end - begin]
  void* grad;              // [rows, stride], out; of rows left out zeros
  int64_t begin, end, most, rank;

  DEFTCORE_FIELDS(forward, slopes, kept, kept_grad, left, right, grad, begin, end, most, rank)
};

// The columns of each row's largest logits, of equal ones the first. Least traffic: the logits once.
struct TopLogitsArgs {
  const void* logits;   // [rows, stride], the first `width` columns count
  const uint8_t* mask;  // [rows] or null
  int32_t* top;         // [rows, most], out, in no order; -1 in rows left out, and behind the last above minus infinity
  int64_t rows, width, stride, most;
  DType dtype;

  DEFTCORE_FIELDS(logits, mask, top, rows, width, stride, most, dtype)
};

// Products with the columns begin to end of the logits Z:
//   of_rows [rows, rank] = Z of_columns^T,  or with `transposed`  of_columns [rank, end - begin] = of_rows^T Z.
// Least traffic: the logits once.
struct LogitProductArgs {
  const void* logits;   // [rows, stride]
  const uint8_t* mask;  // [rows] or null: rows left out are zero
  float* of_rows;
  float* of_columns;
  int64_t rows, stride, begin, end, rank;
  DType dtype;
  bool transposed;

  DEFTCORE_FIELDS(logits, mask, of_rows, of_columns, rows, stride, begin, end, rank, dtype, transposed)
};

}  // namespace deftcore
