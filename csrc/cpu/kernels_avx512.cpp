// SPDX-License-Identifier: BSD-3-Clause
#include "kernels.h"

#include "simd_avx512.h"

#include "kernels.inl"

namespace switchgear::cpu {

const Kernels& kernels_avx512() {
  static constexpr Kernels kTable = make_table("avx512");
  return kTable;
}

}  // namespace switchgear::cpu
