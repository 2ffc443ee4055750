// SPDX-License-Identifier: BSD-3-Clause
// What routing does to rows of logits, once for each ISA and with the same bits on all: rows.inl, compiled with the flags of
// an ISA and -ffp-contract=off.
#pragma once
#include <cstdint>

#include "switchgear/ops.h"

namespace switchgear::cpu {

constexpr int64_t kRowBlock = 4;       // rows whose sums run side by side: one sum waits for each of its additions
constexpr int64_t kKeyLanes = 32;      // keys are padded to a multiple, with kNoKey
constexpr int64_t kMaxExtracted = 16;  // from here on sorting is faster
constexpr int64_t kNoKey = INT64_MIN;  // below every key

// Of a row: how many values are at least a bound, and the largest of the others.
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
  // The indices of the `count` largest keys, largest first; takes them out of the padded keys.
  void (*extract_best)(int64_t* keys, int64_t n, int64_t count, int32_t* indices);
  // Of n < 2^31 values; `next` is NaN where there are no others.
  Reaching (*reaching)(const float* values, int64_t n, float bound);
  // Σ exp(values[j] - highest) over the values that are not above it.
  double (*sum_of_powers)(const float* values, int64_t n, float highest);
  bool has_extract;  // whether the ISA compares vectors of 64-bit integers
};

const RowKernels& row_kernels();  // of the ISA in use

const RowKernels& row_kernels_generic();
const RowKernels& row_kernels_avx2();
const RowKernels& row_kernels_avx512();

}  // namespace switchgear::cpu
