// SPDX-License-Identifier: BSD-3-Clause
// x·Wᵀ with weights in fewer bits on wgmma: stored_sm90.cuh. CMake writes a file for the launcher of each format, so that they
// compile in parallel.
#pragma once
#include "stored.h"

namespace switchgear::cuda {

// On the current device. Sizes, strides and addresses must be multiples of eight elements, also an adapter's.
bool sm90_takes(const Gemm& g, const StoredOperand& w);
void stored_sm90(const Gemm& g, const StoredOperand& w, void* stream);

template <Format kFormat>
void stored_sm90_of(const Gemm& g, const StoredOperand& w, void* stream);

}  // namespace switchgear::cuda
