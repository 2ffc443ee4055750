// SPDX-License-Identifier: BSD-3-Clause
#include "gemm_launch.cuh"

namespace switchgear::cuda {

void gemm_bf16(const Gemm& g, void* stream) { launch_gemm<MmaProduct<__nv_bfloat16>>(g, stream); }
void wgrad_bf16(const Wgrad& g, void* stream) { launch_wgrad<MmaProduct<__nv_bfloat16>>(g, stream); }

}  // namespace switchgear::cuda
