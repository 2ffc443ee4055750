// SPDX-License-Identifier: BSD-3-Clause
// The experts' matrices as operands of x·Wᵀ or x·W, for any strides. A list of matrices stored separately is passed to the
// device as a kernel parameter. So no copy reads host memory that may change meanwhile, and a CUDA graph keeps the list.
#pragma once
#include "gemm.h"

namespace switchgear::cuda {

// Number of entries in the list of separate matrices; 0 for a packed tensor.
inline int64_t separate_count(const Weight& w) { return w.base == nullptr ? 0 : w.data.shape[0]; }

// Queues the writing of the list. ValueError, naming the argument, if there are more matrices than kernel parameters can hold.
void write_separate(const char* name, const Weight& w, SeparateMatrix* separate, void* stream);

// W's element [row, column] is b[row, column] of x·Wᵀ (`transposed`), and b[column, row] of x·W. Of weights in other formats,
// which stored.h multiplies, it only has the layout that an adapter's matrix needs beside them.
ExpertOperand operand_of(const Weight& w, bool transposed, const SeparateMatrix* separate);

}  // namespace switchgear::cuda
