// SPDX-License-Identifier: BSD-3-Clause
#include "kernels.h"

#include "simd_generic.h"

#include "kernels.inl"

namespace switchgear::cpu {

const Kernels& kernels_generic() {
  static constexpr Kernels kTable = make_table("generic");
  return kTable;
}

}  // namespace switchgear::cpu
