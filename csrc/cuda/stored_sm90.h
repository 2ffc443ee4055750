// SPDX-License-Identifier: BSD-3-Clause
// x·Wᵀ with weights in fewer bits on wgmma: stored_sm90.cuh. The launchers of the formats are in files of their own, so that
// they compile in parallel.
#pragma once
#include "stored.h"

namespace switchgear::cuda {

// On the current device. Sizes, strides and addresses must be multiples of eight elements, also an adapter's.
bool sm90_takes(const Gemm& g, const StoredOperand& w);
void stored_sm90(const Gemm& g, const StoredOperand& w, void* stream);

void stored_sm90_fp8(const Gemm& g, const StoredOperand& w, void* stream);
void stored_sm90_mxfp4(const Gemm& g, const StoredOperand& w, void* stream);
void stored_sm90_nf4(const Gemm& g, const StoredOperand& w, void* stream);
void stored_sm90_groups(const Gemm& g, const StoredOperand& w, void* stream);
void stored_sm90_int8(const Gemm& g, const StoredOperand& w, void* stream);
void stored_sm90_int4(const Gemm& g, const StoredOperand& w, void* stream);

}  // namespace switchgear::cuda
