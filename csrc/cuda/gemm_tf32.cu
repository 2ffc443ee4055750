// SPDX-License-Identifier: BSD-3-Clause
#include "gemm_launch.cuh"

namespace switchgear::cuda {

void gemm_tf32(const Gemm& g, void* stream) { launch_gemm<MmaProduct<float>>(g, stream); }
void wgrad_tf32(const Wgrad& g, void* stream) { launch_wgrad<MmaProduct<float>>(g, stream); }

}  // namespace switchgear::cuda
