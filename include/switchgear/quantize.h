// SPDX-License-Identifier: BSD-3-Clause
// Levels, scales and zeros of weights in integers: what reference/integers.py and reference/groups.py define, bit by bit.
//
// Rows are [R,C] float32, finite. A group of `group_size` columns of a row, 0 for all, has a scale and a zero; G groups cover a
// row. Levels are uint8. All arrays are contiguous.
#pragma once
#include "switchgear/ops.h"

namespace switchgear {

struct LevelOptions {
  int64_t bits;
  int64_t group_size;
};

// 4 or 8 bits: levels [R,C], scales [R,G] int8, row_scales [R] float32, zeros [R,G] uint8, or none if symmetric.
void quantize_integers(const TensorView& rows, const std::array<TensorView, 4>& levels, LevelOptions options,
                       Execution exec = {});

// 1 to 4 bits: levels [R,C], scales [R,G] float32 that float16 holds, zeros [R,G] uint8, or none if symmetric.
void quantize_groups(const TensorView& rows, const std::array<TensorView, 3>& levels, LevelOptions options,
                     Execution exec = {});

}  // namespace switchgear
