// SPDX-License-Identifier: BSD-3-Clause
// Weights in floating-point numbers of 8 or 4 bits: fp8 (e4m3fn: no infinities) and mxfp4 (OCP Microscaling v1.0: e2m1 values
// with one e8m0 scale per 32), as DeepSeek-V3, Qwen3 and gpt-oss publish theirs.
//
//   w[r,c] = scale[r, c / group] · value[r,c]          fp8: float32 scales, group_size a multiple of 32, or 0: the whole row
//                                                      mxfp4: scales 2^(s - 127), group_size 32
//
// Storage: `parts` equal shares of the rows, each in B = ⌈rows / parts / 16⌉ blocks of 16 rows, the last one padded. A block
// has C = ⌈cols / 32⌉ steps of 32 columns, each 4 or 8 vectors of 64 bytes. Padding is zero.
//   fp8    data [E,parts·B,C,512]   byte 16·(r / 4) + 8·(j / 2) + 2·(r % 4) + j % 2 of vector q is value[r, 4·q + j], j < 4
//   mxfp4  data [E,parts·B,C,256]   byte 4·r + b of vector q, b < 4: value[r, 8·q + 4·(b % 2) + b / 2] in the lower half, and
//                                   value[r, 8·q + 4·(b % 2) + 2 + b / 2] in the upper one
//   scales [E,parts·B,G,16], G = ⌈cols / group_size⌉, float32 or uint8
#pragma once
#include <cstdint>

#include "switchgear/weight.h"

namespace switchgear {

inline constexpr int64_t kMinifloatRows = 16, kMinifloatColumns = 32;

constexpr int64_t minifloat_step_bytes(Format format) {
  return kMinifloatRows * kMinifloatColumns * bits_of(format) / 8;
}

}  // namespace switchgear
