// SPDX-License-Identifier: BSD-3-Clause
#include "stored_sm90.cuh"

namespace switchgear::cuda {

void stored_sm90_fp8(const Gemm& g, const StoredOperand& w, void* stream) {
  sm90::launch_stored_sm90<Format::kFp8>(g, w, stream);
}

}  // namespace switchgear::cuda
