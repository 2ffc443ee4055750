// SPDX-License-Identifier: BSD-3-Clause
// Products with weights in fewer bits, the formats of weight.h that CUDA reads, in the storage of the CPU (minifloat.h,
// integers.h, groups.h), which is kept since it suits a GPU as it is. A step, 16 rows x 32 columns, is 64 bytes for
// each bit and contiguous, and so are the steps of a block of 16 rows: a copy of chunks of 16 bytes is coalesced, and a
// weight moves between devices as it is.
//
// `stored_gemm` picks one of two kernels:
//   stored_gemm.cuh    x·Wᵀ with x in 16 bits: codes become exact bfloat16 or float16 in registers, and go to mma.sync
//   decoded_gemm.cuh   all else, x·W for gradients and x·Wᵀ of float32: decoded into a tile in shared memory first
#pragma once
#include "gemm.h"
#include "workspace.h"

namespace switchgear::cuda {

// A weight on the device. Strides in bytes.
struct StoredOperand {
  Format format = Format::kPlain;
  int32_t bits = 8;         // of a code; groups have those of their expert
  int32_t scale_bytes = 0;  // of the scales of 16 rows of a group
  int32_t unit = 0;         // columns that a row is padded to a multiple of
  const std::byte* data = nullptr;
  const std::byte* scales = nullptr;
  const std::byte* row_scales = nullptr;  // in some formats
  const std::byte* zeros = nullptr;       // optional
  int64_t data_stride = 0, scales_stride = 0, row_scales_stride = 0, zeros_stride = 0;
  const int32_t* slots = nullptr;    // [E], optional: where each expert is stored
  const int32_t* records = nullptr;  // [num_stored,2]: groups
  int32_t num_stored = 0;
  int64_t data_bytes = 0;      // groups: from the first plane to the end of the last
  int64_t plane_bytes = 0;     // groups: of a plane of one expert
  int32_t rows = 0, cols = 0;  // of a matrix
  int32_t parts = 1;           // equal shares of the rows, each in blocks of its own
  int32_t part_rows = 0, part_blocks = 0;
  int32_t first_block = 0;             // of the rows in `rows`, if a launch multiplies one part
  int32_t groups = 0, group_size = 0;  // per row; columns
  int32_t group_steps = 0;             // steps per group, at least 1
  uint32_t group_magic = 0;            // __umulhi(2 · step, group_magic) is the group of a step; 0: one group
  const float* x_scales = nullptr;     // integers, x·Wᵀ: x is rounded to int8, and row r has scales [x_blocks],
  int32_t x_blocks = 0, x_shift = 0;   // of which step s has number s >> x_shift
};

// ValueError, naming the argument, for storage that kernels cannot read.
StoredOperand stored_operand(const char* name, const Weight& weight);

// out = g.a·Wᵀ, or g.a·W if `transposed`, with g's adapter term and epilogue; g.b is not read. Integers: x·Wᵀ takes
// rows that quantize_rows wrote, in bfloat16 whatever g.dtype is.
void stored_gemm(const Gemm& g, const StoredOperand& w, bool transposed, void* stream);

// Rows of activations rounded to int8, as integers.h says: values in bfloat16, which holds them, and the scales.
struct QuantizedRows {
  TensorView values;  // [R,C] bfloat16
  TensorView scales;  // [R,B] float32

  QuantizedRows() = default;
  // Takes memory for rows of a product with `weight`; for none if the weight is not of integers.
  QuantizedRows(Workspace& memory, const Weight& weight, int64_t rows);
  bool defined() const { return values.defined(); }
};
void quantize_rows(const Rows& x, DType dtype, const Weight& weight, const QuantizedRows& out, void* stream);

// x·Wᵀ with a weight of any format; g.b is operand_of(weight, true, …).
void forward_gemm(Gemm& g, const char* name, const Weight& weight, const QuantizedRows& quantized, void* stream);
// x·W; g.b is operand_of(weight, false, …).
void backward_gemm(const Gemm& g, const char* name, const Weight& weight, void* stream);

// ---- launchers, in files of their own so that they compile in parallel ---------------------------------------------------------

template <Format kFormat>
void stored_gemm_of(const Gemm& g, const StoredOperand& w, void* stream);
void decoded_gemm_bf16(const Gemm& g, const StoredOperand& w, bool transposed, void* stream);
void decoded_gemm_f16(const Gemm& g, const StoredOperand& w, bool transposed, void* stream);
void decoded_gemm_f32(const Gemm& g, const StoredOperand& w, bool transposed, void* stream);
void decoded_gemm_tf32(const Gemm& g, const StoredOperand& w, bool transposed, void* stream);

}  // namespace switchgear::cuda
