// SPDX-License-Identifier: BSD-3-Clause
// Picks the kernel for a product.
#include "gemm.h"

#include <initializer_list>
#include <limits>
#include <stdexcept>

#include "expert_weights.h"
#include "switchgear/check.h"

namespace switchgear::cuda {

namespace {

// Kernels count rows, columns and depths in 32 bits. Products of two of them take 64 bits.
void check_sizes(std::initializer_list<int64_t> sizes) {
  for (const int64_t size : sizes) {
    SWITCHGEAR_CHECK(ValueError, size <= std::numeric_limits<int32_t>::max() - 128,
                     "weight: expected rows and columns below 2^31 on a CUDA device, got ", size);
  }
}

// The tiles read both matrices in one layout. A matrix of one row or column has both.
bool layouts_match(const Gemm& g) {
  if (g.b.k_contiguous()) return g.low.b.k_stride == 1 || g.low.rank == 1;
  return g.low.b.n_stride == 1 || g.n == 1;
}

}  // namespace

void gemm(const Gemm& g, void* stream) {
  if (g.num_slots == 0) return;
  check_sizes({g.n, g.c, g.low.rank});
  if (g.low.rank > 0 && !layouts_match(g)) throw std::logic_error("gemm: the matrices have different layouts");
  if (sm90_takes(g)) return gemm_sm90(g, stream);
  if (g.b.separate != nullptr) write_separate(g.b, g.num_experts, stream);
  switch (g.dtype) {
    case DType::kBFloat16: return gemm_bf16(g, stream);
    case DType::kFloat16: return gemm_f16(g, stream);
    case DType::kFloat32: return g.allow_tf32 ? gemm_tf32(g, stream) : gemm_f32(g, stream);
    default: throw std::logic_error("gemm: not a floating dtype");
  }
}

void wgrad(const Wgrad& g, void* stream) {
  if (g.num_matrices == 0) return;
  check_sizes({g.m, g.n});
  if (sm90_takes(g)) return wgrad_sm90(g, stream);
  switch (g.dtype) {
    case DType::kBFloat16: return wgrad_bf16(g, stream);
    case DType::kFloat16: return wgrad_f16(g, stream);
    case DType::kFloat32: return g.allow_tf32 ? wgrad_tf32(g, stream) : wgrad_f32(g, stream);
    default: throw std::logic_error("wgrad: not a floating dtype");
  }
}

}  // namespace switchgear::cuda
