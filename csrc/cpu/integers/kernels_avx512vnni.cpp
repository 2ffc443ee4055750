// SPDX-License-Identifier: BSD-3-Clause
#include "cpu/integers/kernels.h"

#include "cpu/simd_avx512.h"

#include "cpu/integers/dot.h"

#include "cpu/integers/kernels.inl"

namespace switchgear::cpu {

const IntegerKernels& integer_avx512vnni() { return kTable; }

}  // namespace switchgear::cpu
