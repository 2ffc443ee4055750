// SPDX-License-Identifier: BSD-3-Clause
#include "gemm_f32.cuh"
#include "gemm_launch.cuh"

namespace switchgear::cuda {

void gemm_f32(const Gemm& g, void* stream) { launch_gemm<FmaProduct>(g, stream); }
void wgrad_f32(const Wgrad& g, void* stream) { launch_wgrad<FmaProduct>(g, stream); }

}  // namespace switchgear::cuda
