// SPDX-License-Identifier: BSD-3-Clause
// gradient[e][m,n] = Σ_{s of e} left[s][m] · right[s][n]: the weight gradient, a product whose inner dimension is ragged. With
// `experts`, gradient[i] is that of expert experts[i].
#pragma once
#include "context.h"
#include "experts.h"

namespace switchgear::cpu {

struct WeightGradientArgs {
  const void* const* left;   // [S] rows of `rows` elements
  const void* const* right;  // [S] rows of `columns` elements
  DType dtype;
  const int32_t* expert_offsets;
  const int32_t* experts;  // [n], or null for all
  TensorView gradient;     // [E or n, rows, columns], one unit stride
  bool adds = false;       // the rounded gradient to the one that is there
};

void weight_gradient(const WeightGradientArgs& args, const Context& context);

}  // namespace switchgear::cpu
