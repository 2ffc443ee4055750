// SPDX-License-Identifier: BSD-3-Clause
// The adapter of one projection in a call of moe_forward or moe_backward, on the host.
//
//   small rows  u [S,r] = s_e · (x·Aᵀ) and q [S,r] = s_e · (g·B), a grouped GEMM each, rounded to the dtype of x
//   term        u·Bᵀ or q·A, the first part of the inner dimension of the projection's own product (Gemm::low)
//   masks       of dropout: a copy of the rows that A reads; in the accumulators for the term q·A
//
// The product reads A or B in the layout of the weight. A matrix in the other one is copied, and on Hopper both are if TMA
// cannot describe them: ranks of their own, a rank that is no multiple of 8, other strides. Copies are adapter-sized: at most
// E·(r + 7)·(N + C + 14) elements, of which the experts with slots are written.
#pragma once
#include "gemm.h"
#include "workspace.h"

namespace switchgear::cuda {

class ProjectionAdapter {
 public:
  enum class Side : uint8_t { kA, kB };  // x·Aᵀ or g·B

  // `forward`: for products x·Wᵀ, else x·W. Takes memory for copies.
  ProjectionAdapter(Workspace& memory, const Adapter& adapter, uint32_t projection, const Weight& weight, bool forward);

  bool defined() const { return adapter_.defined() && adapter_.rank() > 0; }
  bool drops() const { return mask_.drops(); }
  // Columns of small rows.
  int64_t width() const { return width_; }

  // Queues the copies.
  void copy_matrices(const int32_t* expert_offsets, int64_t num_slots, void* stream) const;
  // out = the masked rows.
  void mask(const Rows& rows, const TensorView& out, void* stream) const;
  // out [S,width] = s_e · rows·Aᵀ or s_e · rows·B; dtype, offsets and sizes are those of `like`.
  Rows multiply(Side side, const Rows& rows, const TensorView& out, const Gemm& like, void* stream) const;
  // The term for the projection's product.
  LowRank term(const Rows& small_rows) const;
  // Zeros past each expert's rank in the gradient of A or B.
  void clear_ranks(Side side, const TensorView& gradient, void* stream) const;

 private:
  // A matrix [E,r,L] with any strides.
  struct Matrix {
    const void* data = nullptr;
    int64_t expert_stride = 0, rank_stride = 0, stride = 0, length = 0;
  };

  static Matrix matrix_of(const TensorView& view, Side side);
  bool fits(const Matrix& matrix) const;
  bool tma_takes(const Matrix& matrix) const;
  Matrix copy_of(Workspace& memory, const Matrix& matrix) const;
  void copy(const Matrix& from, const Matrix& to, const int32_t* expert_offsets, int64_t num_slots, void* stream) const;
  ExpertOperand operand(const Matrix& matrix, bool ranks_are_n, bool k_contiguous) const;

  Adapter adapter_;
  DropoutMask mask_;
  bool forward_;
  bool along_rank_ = false;  // the contiguous dimension of the term's matrix, and of copies
  bool pads_ = false;        // both are copies, with zeros up to a multiple of 8 and past each expert's rank
  int64_t width_ = 0;
  Matrix given_[2], used_[2];  // by side
};

}  // namespace switchgear::cuda
