// SPDX-License-Identifier: BSD-3-Clause
// The table that each ISA fills for products with GGUF's blocks: see gguf_kernels.inl, and switchgear/gguf.h for the formats.
#pragma once
#include <cstdint>

#include "kernels.h"
#include "switchgear/gguf.h"

namespace switchgear::cpu {

// Where the parts of a row are: of activations in int8, and of weights taken apart. All numbers past the last column are zero.
struct GgufRow {
  int64_t sums;     // int16 of each 16 columns, or int32: factors of weights of as many, or of each 32 columns
  int64_t scales;   // float32 of each 32 columns at most
  int64_t offsets;  // the same
  int64_t bytes;

  explicit constexpr GgufRow(int64_t columns)
      : sums((columns + 511) / 512 * 512),
        scales(sums + (columns / 16 * 6 + 127) / 64 * 64),
        offsets(scales + (columns / 32 * 4 + 127) / 64 * 64),
        bytes(offsets + (columns / 32 * 4 + 127) / 64 * 64) {}
};

// Columns of activations that share a scale: those of a block.
constexpr int64_t gguf_group(Format format) { return gguf_type(format).columns; }

struct GgufKernels {
  // As Kernels::dot_products. Rows are those of quantize_row.
  void (*multiply)(const Product&);

  // A row of int8: scale = max |elements| / 127, values = round(elements / scale), ties to even, of each `group` columns, 32 or
  // 256. A group smaller than 2^-100 is zero; one with an infinity or a NaN has NaN as its scale.
  void (*quantize_row)(void* out, const void* row, DType dtype, int64_t columns, int64_t group);
};

const GgufKernels& gguf_generic();
const GgufKernels& gguf_avx2();
const GgufKernels& gguf_avx512();
const GgufKernels& gguf_avx512vnni();
const GgufKernels& gguf_neon();

}  // namespace switchgear::cpu
