// SPDX-License-Identifier: BSD-3-Clause
// Columns of an expert's matrix as the second operand of x·W: those of a plain weight in place, those of another format decoded
// to the dtype of x, 64 at a time. A whole matrix never exists in float.
#pragma once
#include "context.h"
#include "experts.h"
#include "workspace.h"

namespace switchgear::cpu {

constexpr int64_t kDecodedColumns = kIntegerPanel;

class DecodedColumns {
 public:
  // Bytes of memory of a thread: a panel of all rows, which stays in L2 (128 bytes · N in bfloat16).
  static int64_t bytes(const Weight& weight, DType dtype) {
    return weight.format == Format::kPlain ? 0 : Workspace::padded(weight.rows * kDecodedColumns * size_of(dtype));
  }
  DecodedColumns(const Weight& weight, DType dtype, void* memory) : weight_(weight), dtype_(dtype), memory_(memory) {}

  // Columns [column, column + columns) of the expert's matrix: at most kDecodedColumns from a multiple of them on, unless the
  // weight is plain. Valid until the next call.
  Matrix of(int64_t expert, int64_t column, int64_t columns, const Context& context);

 private:
  const Weight& weight_;
  DType dtype_;
  void* memory_;
  int64_t expert_ = -1, column_ = -1;  // of what is in memory
};

}  // namespace switchgear::cpu
