// SPDX-License-Identifier: BSD-3-Clause
// What tests ask of the shim of the CUDA runtime.
#pragma once
#include <vector>

namespace simt {

// The stream of every launch, memset and copy since the last call of forget_streams.
std::vector<void*> used_streams();
void forget_streams();

}  // namespace simt
