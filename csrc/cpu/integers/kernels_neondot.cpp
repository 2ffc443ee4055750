// SPDX-License-Identifier: BSD-3-Clause
#include "cpu/integers/kernels.h"

#include "cpu/simd_neon.h"

#include "cpu/integers/dot.h"

#include "cpu/integers/kernels.inl"

namespace switchgear::cpu {

const IntegerKernels& integer_neondot() { return kTable; }

}  // namespace switchgear::cpu
