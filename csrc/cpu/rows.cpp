// SPDX-License-Identifier: BSD-3-Clause
#include "rows.h"

#include <string_view>

#include "kernels.h"

namespace switchgear::cpu {

const RowKernels& row_kernels() {
  [[maybe_unused]] const std::string_view isa = kernels().isa;
#if defined(SWITCHGEAR_HAVE_AVX512)
  if (isa.starts_with("avx512") || isa == "amx") return row_kernels_avx512();
#endif
#if defined(SWITCHGEAR_HAVE_AVX2)
  if (isa == "avx2") return row_kernels_avx2();
#endif
  return row_kernels_generic();  // also on AArch64: NEON needs no flags
}

}  // namespace switchgear::cpu
