// SPDX-License-Identifier: BSD-3-Clause
// Weights in floating-point numbers of 8 or 4 bits: fp8 (e4m3fn: no infinities) and mxfp4 (OCP Microscaling v1.0: e2m1 values
// with one e8m0 scale per 32), as DeepSeek-V3, Qwen3 and gpt-oss publish theirs; nf4 (QLoRA, arXiv:2305.14314: 16 quantiles
// of the normal distribution from -1 to 1, the largest magnitude of 64 weights is the scale); nvfp4 (e2m1 values with an e4m3
// scale per 16 and one float32 for the tensor, as ModelOpt and compressed-tensors publish it).
//
//   w[r,c] = scale[r, c / group] · value[r,c]          fp8: float32 scales, group_size a multiple of 32, or 0: the whole row
//                                                      mxfp4: scales 2^(s - 127), group_size 32
//                                                      nf4: float32 scales, group_size 64
//   w[r,c] = (scale[r, c / 16] · row_scale[r]) · value[r,c]   nvfp4: e4m3 scales without a sign; the tensor's, for each row
//
// These products are float32, in this order.
//
// No code of fp8 is NaN (0x7f, 0xff): some kernels would read it as ±480.
//
// Storage: `parts` equal shares of the rows, each in B = ⌈rows / parts / 16⌉ blocks of 16 rows, the last one padded. A block
// has C = ⌈cols / 32⌉ steps of 32 columns, each 4 or 8 vectors of 64 bytes. Padding is zero.
//   fp8    data [E,parts·B,C,512]   byte 16·(r / 4) + 8·(j / 2) + 2·(r % 4) + j % 2 of vector q is value[r, 4·q + j], j < 4
//   mxfp4  data [E,parts·B,C,256]   byte 4·r + b of vector q, b < 4: value[r, 8·q + 4·(b % 2) + b / 2] in the lower half, and
//                                   value[r, 8·q + 4·(b % 2) + 2 + b / 2] in the upper one
//   nf4    as mxfp4, of codes XOR 7, so that 0 stands for the value 0
//   nvfp4  as mxfp4
//   scales [E,parts·B,G,16], G = ⌈cols / group_size⌉, float32 or uint8
//   row_scales [E,parts·B,16] float32: nvfp4
#pragma once
#include <cstdint>

#include "switchgear/weight.h"

namespace switchgear {

inline constexpr int64_t kMinifloatRows = 16, kMinifloatColumns = 32;

// Columns that share a scale; 0: any multiple of 32, or the whole row.
constexpr int64_t minifloat_group(Format format) { return format_row(format).group; }

// The values of nf4 by code, float32. The middle one of the 16 is zero: 7 quantiles are negative, 8 are positive.
inline constexpr int kNf4Zero = 7;
// clang-format off
inline constexpr float kNf4Values[] = {
    -1.0f,                 -0.6961928009986877f,  -0.5250730514526367f,  -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f,  0.16093020141124725f,  0.24611230194568634f,  0.33791524171829224f,
    0.44070982933044434f,  0.5626170039176941f,   0.7229568362236023f,   1.0f};
// clang-format on

constexpr int64_t minifloat_step_bytes(Format format) {
  return kMinifloatRows * kMinifloatColumns * bits_of(format) / 8;
}

}  // namespace switchgear
