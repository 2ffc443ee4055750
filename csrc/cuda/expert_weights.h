// SPDX-License-Identifier: BSD-3-Clause
// The experts' matrices as operands of x·Wᵀ or x·W, for any strides. A list of matrices stored separately is passed to the
// device as a kernel parameter. So no copy reads host memory that may change meanwhile, and a CUDA graph keeps the list. Each
// product queues one small kernel that writes the list, for gemm_sm90 with a tensor map per expert (gemm_sm90_separate.cuh).
#pragma once
#include "gemm.h"

namespace switchgear::cuda {

// Number of entries in the list of separate matrices; 0 for a packed tensor.
inline int64_t separate_count(const Weight& w) { return w.base == nullptr ? 0 : w.data.shape[0]; }

// ValueError, naming the argument, if there are more matrices than kernel parameters can hold.
void check_separate(const char* name, const Weight& w);

constexpr int kMaxSeparate = 512;  // 8 KB of kernel parameters; the limit is 32,764 bytes

struct SeparateMatrices {
  struct Item {
    const void* data;
    int64_t rows;
  };
  Item items[kMaxSeparate];

  SeparateMatrices() = default;
  SeparateMatrices(const SeparateList& list, int64_t count) : items() {
    for (int64_t e = 0; e < count; ++e) items[e] = {list.data[e], list.rows[e]};
  }
};

// Queues the writing of b.separate from b.list: without tensor maps, or with maps like `like`.
void write_separate(const ExpertOperand& b, int64_t num_experts, void* stream);

// W's element [row, column] is b[row, column] of x·Wᵀ (`transposed`), and b[column, row] of x·W. Of weights in other formats,
// which stored.h multiplies, it only has the layout that an adapter's matrix needs beside them.
ExpertOperand operand_of(const Weight& w, bool transposed, SeparateMatrix* separate);

}  // namespace switchgear::cuda
