// SPDX-License-Identifier: BSD-3-Clause
#include "stored_gemm.cuh"

namespace switchgear::cuda {

void stored_gemm_int8(const Gemm& g, const StoredOperand& w, void* stream) {
  launch_integers<Format::kInt8>(g, w, stream);
}

}  // namespace switchgear::cuda
