// SPDX-License-Identifier: BSD-3-Clause
// What routing does to rows of logits: rows.inl, compiled for each ISA with its flags and -ffp-contract=off.
// All ISAs give the same bits.
#pragma once
#include <cstdint>

#include "switchgear/ops.h"

namespace switchgear::cpu {

constexpr int64_t kRowBlock = 4;       // rows summed side by side: a single sum waits for each addition
constexpr int64_t kKeyLanes = 32;      // keys are padded to a multiple of it with kNoKey
constexpr int64_t kMaxExtracted = 16;  // above, sorting is faster
constexpr int64_t kNoKey = INT64_MIN;  // below every key

// For a row: how many values are at least a bound, and the largest of the others.
struct Reaching {
  int64_t count;
  float next;
};

struct RowKernels {
  void (*sanitise)(float* values, int64_t n);

  // numerators[j] = exp(logits[j] - max), and their sum in float64, j ascending; for each of `rows` <= kRowBlock rows of n.
  void (*softmax_numerators)(const float* logits, float* numerators, double* sums, int64_t n, int64_t rows);
  // The scores of such rows.
  void (*scores)(ScoreFunction function, const float* logits, float* scores, int64_t n, int64_t rows);

  // keys[j] = key_of(values[j], j), and kNoKey up to the next multiple of kKeyLanes.
  void (*make_keys)(const float* values, int64_t* keys, int64_t n);
  // Writes the indices of the `count` largest of the padded keys, largest first, and replaces these keys by kNoKey.
  void (*extract_best)(int64_t* keys, int64_t n, int64_t count, int32_t* indices);
  // For n < 2^31 values; `next` is NaN if there are no others.
  Reaching (*reaching)(const float* values, int64_t n, float bound);
  // Σ exp(values[j] - highest) over the values up to `highest`.
  double (*sum_of_powers)(const float* values, int64_t n, float highest);
  bool has_extract;  // whether the ISA compares vectors of 64-bit integers
};

const RowKernels& rows_generic();
const RowKernels& rows_avx2();
const RowKernels& rows_avx512();

}  // namespace switchgear::cpu
