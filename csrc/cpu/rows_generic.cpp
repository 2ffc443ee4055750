// SPDX-License-Identifier: BSD-3-Clause
#include "rows.h"

#include "rows.inl"

namespace switchgear::cpu {

const RowKernels& row_kernels_generic() {
  static constexpr RowKernels kTable = make_row_table(false);
  return kTable;
}

}  // namespace switchgear::cpu
