// SPDX-License-Identifier: BSD-3-Clause
#include "stored_gemm.cuh"

namespace switchgear::cuda {

void stored_gemm_groups(const Gemm& g, const StoredOperand& w, void* stream) {
  launch_decoded<Format::kGroups>(g, w, stream);
}

}  // namespace switchgear::cuda
