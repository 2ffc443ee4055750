// SPDX-License-Identifier: BSD-3-Clause
#include "kernels.h"

#include "simd_neon.h"

#include "kernels.inl"

namespace switchgear::cpu {

const Kernels& kernels_neon() {
  static constexpr Kernels kTable = make_table("neon");
  return kTable;
}

}  // namespace switchgear::cpu
