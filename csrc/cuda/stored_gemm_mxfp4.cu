// SPDX-License-Identifier: BSD-3-Clause
#include "stored_gemm.cuh"

namespace switchgear::cuda {

void stored_gemm_mxfp4(const Gemm& g, const StoredOperand& w, void* stream) {
  launch_decoded<Format::kMxfp4>(g, w, stream);
}

}  // namespace switchgear::cuda
