// SPDX-License-Identifier: BSD-3-Clause
// The most blocks of a launch whose blocks loop over their work. tests/simt compiles a small number, so that loops turn twice.
#pragma once
#include <cstdint>

namespace switchgear::cuda {

#if defined(SWITCHGEAR_CUDA_MAX_BLOCKS)
constexpr int64_t kMaxBlocks = SWITCHGEAR_CUDA_MAX_BLOCKS;
#else
constexpr int64_t kMaxBlocks = 1 << 16;
#endif

}  // namespace switchgear::cuda
