// SPDX-License-Identifier: BSD-3-Clause
#include "rows.h"

#include "rows.inl"

namespace switchgear::cpu {

const RowKernels& row_kernels_avx512() {
  static constexpr RowKernels kTable = make_row_table(true);
  return kTable;
}

}  // namespace switchgear::cpu
