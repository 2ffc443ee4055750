// SPDX-License-Identifier: BSD-3-Clause
// The launchers of gemm_sm80.cuh, one source file per dtype, so that the slow compilations run in parallel.
#pragma once
#include "gemm.h"

namespace switchgear::cuda {

void gemm_bf16(const Gemm& g, void* stream);
void gemm_f16(const Gemm& g, void* stream);
void gemm_tf32(const Gemm& g, void* stream);
void gemm_f32(const Gemm& g, void* stream);

void wgrad_bf16(const Wgrad& g, void* stream);
void wgrad_f16(const Wgrad& g, void* stream);
void wgrad_tf32(const Wgrad& g, void* stream);
void wgrad_f32(const Wgrad& g, void* stream);

}  // namespace switchgear::cuda
