// SPDX-License-Identifier: BSD-3-Clause
#include "cpu/quantized/kernels.h"

#include "cpu/simd_avx512.h"

#include "cpu/quantized/dot.h"

#include "cpu/quantized/kernels.inl"

namespace switchgear::cpu {

const QuantizedKernels& quantized_avx512vnni() { return kTable; }

}  // namespace switchgear::cpu
