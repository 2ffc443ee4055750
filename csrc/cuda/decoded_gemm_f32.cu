// SPDX-License-Identifier: BSD-3-Clause
#include "decoded_gemm.cuh"

namespace switchgear::cuda {

void decoded_gemm_f32(const Gemm& g, const StoredOperand& w, bool transposed, void* stream) {
  if (transposed) return launch_decoded_gemm<FmaProduct, true>(g, w, stream);
  launch_decoded_gemm<FmaProduct, false>(g, w, stream);
}

}  // namespace switchgear::cuda
