// SPDX-License-Identifier: BSD-3-Clause
#include "kernels.h"

#include "simd_avx2.h"

#include "kernels.inl"

namespace switchgear::cpu {

const Kernels& kernels_avx2() {
  static constexpr Kernels kTable = make_table("avx2");
  return kTable;
}

}  // namespace switchgear::cpu
