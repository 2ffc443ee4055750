// SPDX-License-Identifier: BSD-3-Clause
// The table that each ISA fills to encode weights: encode_rows.inl and encode_blocks.inl, compiled for each ISA with its flags and
// -ffp-contract=off. All ISAs give the same bits.
#pragma once
#include <cstdint>

#include "switchgear/encode.h"

namespace switchgear::cpu {

constexpr int64_t kEncodedRows = 16;  // of a block

// Rows of a matrix, and the block of a weight in integers, minifloats or groups that they become.
struct RowsToEncode {
  Format format;  // of groups: kBits1 to kBits4
  DType dtype;
  const void* numbers;
  int64_t stride;  // elements from one row to the next
  int64_t rows;    // up to kEncodedRows; the rest of the block becomes padding
  int64_t columns;
  int64_t group_size;  // columns that share a scale, at least 1
  uint8_t* data;
  void* scales;       // of fp8: read
  float* row_scales;  // of nvfp4: read
  uint8_t* zeros;     // null if symmetric
  float* scratch;     // scratch_floats(columns, group_size), aligned to 64 bytes
  bool compares;      // whether to compare minifloats with the numbers
};

// Numbers, levels and half a tree of terms of a group, and the fits of a row's groups.
constexpr int64_t scratch_floats(int64_t columns, int64_t group_size) {
  return kEncodedRows * (3 * ((group_size + 15) / 16 * 16) + 2 * ((columns + group_size - 1) / group_size));
}

struct EncodeKernels {
  Encoded (*encode_rows)(const RowsToEncode& rows);

  // A row in blocks of a type of GGUF; whether all numbers are finite.
  bool (*encode_blocks)(Format format, DType dtype, const void* numbers, int64_t columns, uint8_t* out);

  // max |number|; an infinity or a NaN if one is not finite.
  float (*find_largest)(DType dtype, const void* numbers, int64_t count);
};

const EncodeKernels& encoders_generic();
const EncodeKernels& encoders_avx2();
const EncodeKernels& encoders_avx512();

const EncodeKernels& encode_kernels();  // of the ISA in use

}  // namespace switchgear::cpu
