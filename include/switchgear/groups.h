// SPDX-License-Identifier: BSD-3-Clause
// Weights in integers of 1 to 4 bits with float16 scales, as GPTQ, AWQ and compressed-tensors publish them. Each expert has its
// own number of bits. Products decode them to floating point; activations are not rounded.
//
//   w[r,c] = scale[r, c / group] · (q[r,c] - zero[r, c / group])        0 <= q < 2^bits
//
// Without zeros a zero is 2^(bits-1). One bit has none, those in the storage are ignored: w = ±scale, q - zero is -1 or 1.
// group_size is a multiple of 32, or 0 for the whole row.
//
// Storage, in the blocks and steps of minifloat.h: 16 rows x 32 columns, 64 bytes for each bit. The code of a weight is q - 2^(bits-1) in
// two's complement, or for one bit its sign, so that padding with zeros is padding with a value.
//   data     [P,parts·B,C,64] uint8, P planes: an expert of b bits is [parts·B, C, b·64] in b planes, which
//            are consecutive even if the data has strides: then `first` counts strides, and the last byte is within the data
//   records  [S,2] int32: the first plane of each stored expert, and its bits
//   scales   [S,parts·B,G,16] float16
//   zeros    [S,parts·B,G,16] uint8, optional
// Half h of word r of each vector of a step is 16 bits that hold columns 2·i + h of row r, i ascending:
//   1, 2 and 4 bits   16 / bits of them, the first in the lowest bits
//   3 bits            5 of them, the first in the lowest bits. Bit 15 of vector q is bit q of the code of i = 15.
#pragma once
#include "switchgear/minifloat.h"

namespace switchgear {

inline constexpr int64_t kMostBits = 4;
inline constexpr int64_t kPlaneBytes = kMinifloatRows * kMinifloatColumns / 8;  // of a step, for each bit

}  // namespace switchgear
