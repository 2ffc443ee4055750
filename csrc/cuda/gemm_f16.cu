// SPDX-License-Identifier: BSD-3-Clause
#include "gemm_launch.cuh"

namespace switchgear::cuda {

void gemm_f16(const Gemm& g, void* stream) { launch_gemm<MmaProduct<__half>>(g, stream); }
void wgrad_f16(const Wgrad& g, void* stream) { launch_wgrad<MmaProduct<__half>>(g, stream); }

}  // namespace switchgear::cuda
