// SPDX-License-Identifier: BSD-3-Clause
// Encoding of weights in blocks of GGUF files: what reference/gguf.py defines, bit by bit.
#pragma once
#include "switchgear/ops.h"

namespace switchgear {

enum class BlockCode : uint8_t { kQ2K, kQ3K, kQ4K, kQ5K, kQ6K };

// numbers [R,C] float32, finite, C a multiple of 256; blocks [R, bytes of a row] uint8. Both are contiguous.
void encode_blocks(const TensorView& numbers, const TensorView& blocks, BlockCode code, Execution exec = {});

}  // namespace switchgear
