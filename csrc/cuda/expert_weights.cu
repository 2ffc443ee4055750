// SPDX-License-Identifier: BSD-3-Clause
// Resources, at most (registers a thread; tests/test_cuda_build.py reads this):
//   write_separate_kernel: 16 registers
#include "expert_weights.h"

#include "launch.h"
#include "switchgear/check.h"

namespace switchgear::cuda {

// Not in the unnamed namespace: nvcc would name the kernel by the path of this file, and no two builds would be equal.
__global__ void __launch_bounds__(kMaxSeparate)
    write_separate_kernel(const __grid_constant__ SeparateMatrices matrices, SeparateMatrix* out) {
  out[threadIdx.x].data = matrices.items[threadIdx.x].data;
  out[threadIdx.x].rows = matrices.items[threadIdx.x].rows;
}

ExpertOperand operand_of(const Weight& w, bool transposed, SeparateMatrix* separate) {
  if (w.format != Format::kPlain) return {.rows_are_n = transposed, .k_stride = transposed ? 1 : 0};
  const int64_t item = size_of(w.data.dtype);
  const int64_t wide_stride = w.data.stride[2] == 1 ? w.data.stride[1] : w.data.stride[2];
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  ExpertOperand b;
  b.rows_are_n = transposed;
  b.n_stride = w.data.stride[transposed ? 1 : 2];
  b.k_stride = w.data.stride[transposed ? 2 : 1];
  b.aligned = wide_stride * item % 16 == 0;
  if (w.base == nullptr) {
    b.data = w.data.data;
    b.expert_stride = w.data.stride[0];
    b.aligned = b.aligned && aligned(b.data) && (w.data.shape[0] == 1 || b.expert_stride * item % 16 == 0);
    return b;
  }
  b.separate = separate;
  b.list = {w.base, w.row_count};
  for (int64_t e = 0; e < w.data.shape[0]; ++e) {
    b.aligned = b.aligned && (w.row_count[e] == 0 || aligned(w.base[e]));
  }
  return b;
}

void check_separate(const char* name, const Weight& w) {
  SWITCHGEAR_CHECK(ValueError, separate_count(w) <= kMaxSeparate, name, ": expected at most ", kMaxSeparate,
                   " experts with matrices of their own on a CUDA device, got ", separate_count(w));
}

void write_separate(const ExpertOperand& b, int64_t num_experts, void* stream) {
  launch(write_separate_kernel, dim3(1), dim3(static_cast<unsigned>(num_experts)), 0, stream,
         SeparateMatrices(b.list, num_experts), b.separate);
}

}  // namespace switchgear::cuda
