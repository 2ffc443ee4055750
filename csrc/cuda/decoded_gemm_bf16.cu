// SPDX-License-Identifier: BSD-3-Clause
#include <stdexcept>

#include "decoded_gemm.cuh"

namespace switchgear::cuda {

void decoded_gemm_bf16(const Gemm& g, const StoredOperand& w, bool transposed, void* stream) {
  if (!transposed) throw std::logic_error("decoded_gemm: stored_gemm multiplies x·Wᵀ of 16 bits");
  launch_decoded_gemm<MmaProduct<__nv_bfloat16>, true>(g, w, stream);
}

}  // namespace switchgear::cuda
