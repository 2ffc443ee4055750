// SPDX-License-Identifier: BSD-3-Clause
// The weight of all experts of a projection: a matrix [rows, cols] each, in one of several formats (exceptions: see ops.h).
//
//   format   data                                   scales, row_scales, zeros                       header
//   plain    [E,rows,cols] float, any strides                                                       here
//   panels   bytes in the order of an ISA's kernels                                                 panels.h
//   compact  rows of bytes, lossless                                                                compact.h
//   int8     [E,parts·B,W,64] uint8                 int8 per group, float32 per row, uint8 zeros    integers.h
//   int4     the same, two per byte                 the same                                        integers.h
//   fp8      [E,parts·B,C,512] uint8                float32 per group                               minifloat.h
//   mxfp4    [E,parts·B,C,256] uint8                e8m0 per 32 columns                             minifloat.h
//   nf4      [E,parts·B,C,256] uint8                float32 per 64 columns                          minifloat.h
#pragma once
#include <cstdint>

#include "switchgear/tensor.h"

namespace switchgear {

enum class Format : uint8_t { kPlain, kPanels, kCompact, kInt8, kInt4, kFp8, kMxfp4, kNf4 };
inline constexpr Format kLastFormat = Format::kNf4;

const char* name_of(Format format);  // "plain", "panels", …

struct Weight {
  Format format = Format::kPlain;
  TensorView data;                     // with `base`: describes the matrices as [E,most rows,cols]; data unused
  TensorView scales;                   // int8, int4, fp8, mxfp4, nf4
  TensorView row_scales;               // int8, int4
  TensorView zeros;                    // int8, int4; optional
  int64_t rows = 0, cols = 0;          // of a matrix; plain weights have those of `data`
  int64_t parts = 1;                   // equal shares of the rows, stored separately: 2 if all gates precede all ups
  int64_t group_size = 0;              // columns that share a scale; 0: the whole row
  const void* const* base = nullptr;   // [E] plain matrices, each with its own base pointer and number of rows
  const int64_t* row_count = nullptr;  // [E], each <= data.shape[1]
  TensorView slots;  // [E] int32 on the host, optional: the data of expert e is at slots[e] in [0, data.shape[0])

  int64_t num_experts() const { return slots.defined() ? slots.shape[0] : data.shape[0]; }
  int64_t num_rows() const { return format == Format::kPlain ? data.shape[1] : rows; }
  int64_t num_cols() const { return format == Format::kPlain ? data.shape[2] : cols; }
  int64_t slot_of(int64_t expert) const { return slots.defined() ? slots.as<const int32_t>()[expert] : expert; }
};

constexpr bool is_integer(Format format) { return format == Format::kInt8 || format == Format::kInt4; }
constexpr bool is_minifloat(Format format) {
  return format == Format::kFp8 || format == Format::kMxfp4 || format == Format::kNf4;
}
constexpr int64_t bits_of(Format format) {
  return format == Format::kInt4 || format == Format::kMxfp4 || format == Format::kNf4 ? 4 : 8;
}

}  // namespace switchgear
