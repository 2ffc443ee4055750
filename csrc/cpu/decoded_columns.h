// SPDX-License-Identifier: BSD-3-Clause
// Columns of an expert's matrix as the second operand of x·W: in place if `multiply` takes them, i.e. those of plain weights
// and, on most ISAs, of integers and minifloats. Others are decoded to the dtype of x, 64 at a time. A whole matrix never
// exists in float.
#pragma once
#include "context.h"
#include "experts.h"
#include "workspace.h"

namespace switchgear::cpu {

constexpr int64_t kDecodedColumns = kIntegerPanel;

// Whether `multiply` takes the columns of a weight as they are stored. Then rows have no padding between them.
inline bool in_place(const Weight& weight, DType dtype, const Kernels& k) {
  if (weight.format == Format::kPlain) return true;
  const bool has_blocks = is_integer(weight.format) || is_minifloat(weight.format);
  const bool is_dense = weight.parts == 1 || weight.rows / weight.parts % kMinifloatRows == 0;
  return has_blocks && is_dense && k.multiplies_stored(dtype);
}

// Columns of such a weight from `column` on, a multiple of 8 unless it is plain.
Matrix columns_in_place(const Weight& weight, int64_t expert, int64_t column, DType dtype);

class DecodedColumns {
 public:
  // Bytes of memory of a thread: a panel of all rows, which stays in L2 (128 bytes · N in bfloat16).
  static int64_t bytes(const Weight& weight, DType dtype, const Kernels& k) {
    return in_place(weight, dtype, k) ? 0 : Workspace::padded(weight.rows * kDecodedColumns * size_of(dtype));
  }
  DecodedColumns(const Weight& weight, DType dtype, void* memory) : weight_(weight), dtype_(dtype), memory_(memory) {}

  // Columns [column, column + columns) of the expert's matrix: at most kDecodedColumns from a multiple of them on, unless they
  // are in place. Valid until the next call.
  Matrix of(int64_t expert, int64_t column, int64_t columns, const Context& context);

 private:
  const Weight& weight_;
  DType dtype_;
  void* memory_;
  int64_t expert_ = -1, column_ = -1;  // of what is in memory
};

}  // namespace switchgear::cpu
