// SPDX-License-Identifier: BSD-3-Clause
// Weights in integers of 8 or 4 bits, multiplied by activations that are rounded to int8.
//
//   w[r,c] = row_scale[r] · scale[r, c / group] · (q[r,c] - zero[r, c / group] · 2^(bits-8))
//
// zero is 128 if there are none (symmetric weights). group_size is a power of two from 16 on, or 0 for the whole row; the
// last group may be shorter. Each row of x is rounded to int8 with a scale of max |block| / 127 for each block of columns
// (the whole row if group_size is 0), and multiplied in integers. Products for gradients multiply in float, with weights
// rounded to the dtype of x.
//
// Storage: `parts` equal shares of the rows, each in B blocks of 16 rows, the last one padded. A block is W words of 16 rows
// x 4 columns, with columns padded to a multiple of 8 by any q:
//   int8        data [E,parts·B,W,64] uint8   byte 4·r + j of word w is q[r, 4·w + j]                        W = ⌈cols / 8⌉ · 2
//   int4        data [E,parts·B,W,64] uint8   byte 4·r + j of word w is q[r, 8·w + j] | q[r, 8·w + 4 + j] << 4   W = ⌈cols / 8⌉
//   scales      [E,parts·B,G,16] int8, G = ⌈cols / group_size⌉
//   row_scales  [E,parts·B,16] float32
//   zeros       [E,parts·B,G,16] uint8, optional
#pragma once
#include <cstdint>

namespace switchgear {

// Columns of activations that share a scale if weights have groups: this many, or a larger group.
inline constexpr int64_t kActivationBlock = 256;

}  // namespace switchgear
