// SPDX-License-Identifier: BSD-3-Clause
// The table that each ISA fills for weights of 8 or 4 bits: see kernels.inl, and switchgear/integers.h for the format.
#pragma once
#include <cstdint>

#include "switchgear/integers.h"
#include "switchgear/ops.h"

namespace switchgear::cpu {

constexpr int64_t kBlockRows = 16;     // rows of a weight that are stored together
constexpr int64_t kIntegerRows = 240;  // most rows of one product
constexpr int64_t kIntegerPanel = 64;  // columns of one product: four blocks

// Activations in int8, in blocks of columns that share a scale: block b of row r is scales[r, b] · values[r·stride + k].
// Zeros follow the last column. Wide rows hold int16: of each four columns 0, 2, 1 and 3.
struct IntegerRows {
  int8_t* values;
  int64_t stride;        // bytes, a multiple of 64
  float* scales;         // [rows, blocks]
  int32_t* corrections;  // [rows, groups]: factor · Σ values over each group of the weights
  int64_t blocks, groups;
  bool wide;

  IntegerRows from(int64_t row) const {
    return {values + row * stride, stride, scales + row * blocks, corrections + row * groups, blocks, groups, wide};
  }
};

// The blocks of up to 64 rows of a weight, as columns of a product.
struct IntegerPanel {
  const uint8_t* values;  // blocks are contiguous
  const int8_t* scales;
  const float* row_scales;
  const uint8_t* zeros;  // null for symmetric weights
  int64_t words;         // 4 columns of the weight each, even
  int64_t group_words;
  int64_t groups;
  int64_t block_groups;  // groups per scale of the activations
  int bits;
};

constexpr int64_t kFewRows = 6;  // up to here products are memory-bound

// c[m, n] = row_scale[n] · Σ_blocks rows.scales[r, b] · Σ_groups scale[n] · Σ_k value[r, k] · (q[n, k] - zero[n]) for
// n < ⌈num_columns / 16⌉ · 16; r = indices[m] (m if null). Inner sums are exact, the others float32 in ascending order.
struct IntegerProduct {
  IntegerRows rows;
  const int32_t* indices;
  int64_t num_rows;
  IntegerPanel b;
  int64_t num_columns;  // <= kIntegerPanel, or any number for up to kFewRows rows
  float* c;             // [num_rows, c_stride]
  int64_t c_stride = kIntegerPanel;
  const uint8_t* next = nullptr;  // the values of this thread's next product, as wide, if num_rows > kFewRows: a hint
};

struct IntegerKernels {
  bool has_dot;  // else rows for weights of 8 bits are wide

  void (*multiply)(const IntegerProduct&);

  // Two products of the same few rows with equally many columns; their weights are read in turns.
  void (*multiply_pair)(const IntegerProduct& first, const IntegerProduct& second);

  // Writes row r of `out` from n elements, `block` by block: scale = max |elements| / 127, values = round(elements / scale),
  // ties to even. A block smaller than 2^-100 is zero; one with an infinity or a NaN has NaN as its scale. `group`: columns
  // per group, whose values make one correction.
  void (*quantize_row)(const IntegerRows& out, int64_t r, const void* row, DType dtype, int64_t n, int64_t block,
                       int64_t group, int32_t factor);

  // out[i, j] = element (first_row + i, first_column + j) of the weight that starts at `b`, in float32: all 16 rows of a block
  // and `columns` <= 64 columns. first_row and first_column are multiples of 16.
  void (*dequantize)(float* out, int64_t out_stride, const IntegerPanel& b, int64_t first_row, int64_t first_column,
                     int64_t columns);

  double (*multiply_rate)(int bits, int64_t iterations);  // as in Kernels, for weights of 8 or 4 bits
};

const IntegerKernels& integer_kernels();  // of the ISA in use, for probes
const IntegerKernels& integers_generic();
const IntegerKernels& integers_avx2();
const IntegerKernels& integers_avxvnni();
const IntegerKernels& integers_avx512();
const IntegerKernels& integers_avx512vnni();
const IntegerKernels& integers_amx();
const IntegerKernels& integers_neon();
const IntegerKernels& integers_neondot();

}  // namespace switchgear::cpu
