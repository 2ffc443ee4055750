// SPDX-License-Identifier: BSD-3-Clause
// The experts' matrices as operands of products: x·Wᵀ or x·W, whatever their strides. Matrices with memory of their own are
// told to the device by a kernel whose parameter is the list, so that nothing is copied from the host's memory while it
// may change, and a CUDA graph keeps the list.
#pragma once
#include "gemm.h"

namespace switchgear::cuda {

// Entries that the list of separate matrices takes; 0 for a packed tensor.
inline int64_t separate_count(const Weight& w) { return w.base == nullptr ? 0 : w.data.shape[0]; }

// Queues the writing of the list. ValueError, naming the argument, for more matrices than a kernel's parameters can hold.
void write_separate(const char* name, const Weight& w, SeparateMatrix* separate, void* stream);

// W's element [row, column] is b[row, column] of x·Wᵀ (`transposed`), and b[column, row] of x·W.
ExpertOperand operand_of(const Weight& w, bool transposed, const SeparateMatrix* separate);

}  // namespace switchgear::cuda
