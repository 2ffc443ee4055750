// SPDX-License-Identifier: BSD-3-Clause
#include "cpu/quantized/kernels.h"

#include "cpu/simd_neon.h"

#include "cpu/quantized/dot.h"

#include "cpu/quantized/kernels.inl"

namespace switchgear::cpu {

const QuantizedKernels& quantized_neondot() { return kTable; }

}  // namespace switchgear::cpu
