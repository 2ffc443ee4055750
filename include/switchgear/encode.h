// SPDX-License-Identifier: BSD-3-Clause
// Encoding of weights in the formats that round: what the files of switchgear/reference define, bit by bit.
#pragma once
#include "switchgear/ops.h"

namespace switchgear {

struct Encoded {
  bool is_finite;  // all numbers are; if not, the weight is unspecified
  bool is_exact;   // of minifloats: it decodes to the numbers, bit for bit; false in other formats
};

// Writes numbers [N,C] float32, bfloat16 or float16, whose rows are contiguous, to `weight`, which has one expert, no slots, and
// a format of integers, minifloats, groups or GGUF. scale_rows: of fp8, the rows of a part that share a scale, 1 or a multiple
// of 16.
Encoded encode_weight(const TensorView& numbers, const Weight& weight, int64_t scale_rows = 1, Execution exec = {});

}  // namespace switchgear
