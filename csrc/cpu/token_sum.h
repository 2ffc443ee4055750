// SPDX-License-Identifier: BSD-3-Clause
// out[t] = Σ_{slots s of t} weight[s] · (rows[s]·B_e + bias_e), experts ascending: the second projection with combine, and the
// input gradient of the first. An adapter adds its term to each product.
#pragma once
#include "adapter.h"
#include "context.h"
#include "gathered.h"

namespace switchgear::cpu {

struct TokenSumArgs {
  const void* const* rows;  // [S]
  SortedExperts sorted;     // those whose rows are sorted: see Product
  bool are_widened;         // the others' rows: see Product
  GatheredSlots gathered;   // the same rows, for an ISA that gathers them
  int64_t depth;
  const Weight* matrices;
  bool transposed;            // B = the matrix itself (x·W) instead of its transpose (x·Wᵀ)
  TensorView bias;            // [E, columns] or undefined
  const float* slot_weights;  // [S] or null
  const int32_t* expert_offsets;
  const int32_t* token_indices;
  DType dtype;      // of the rows
  TensorView out;   // [T, columns]
  bool accumulate;  // adds to `out`, which is float32
  AdapterTerms adapter = {};
};

void token_sum(const TokenSumArgs& args, const Context& context);

}  // namespace switchgear::cpu
