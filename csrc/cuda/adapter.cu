// SPDX-License-Identifier: BSD-3-Clause
#include "adapter.h"

#include "adapter.cuh"
#include "expert_weights.h"
#include "launch.h"

namespace switchgear::cuda {
namespace {

unsigned blocks_of(int64_t count) { return static_cast<unsigned>((count + kAdapterThreads - 1) / kAdapterThreads); }

int64_t eights(int64_t count) { return (count + 7) / 8 * 8; }

bool starts_vectors(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

}  // namespace

ProjectionAdapter::ProjectionAdapter(Workspace& memory, const Adapter& adapter, uint32_t projection,
                                     const Weight& weight, bool forward)
    : adapter_(adapter), forward_(forward) {
  if (!defined()) return;
  mask_ = {.seed = adapter.seed,
           .device_seed = adapter.device_seed.as<const int64_t>(),
           .projection = projection,
           .threshold = dropout_threshold(adapter.dropout)};
  along_rank_ = operand_of(weight, forward, nullptr).k_contiguous();
  given_[0] = matrix_of(adapter.a, Side::kA);
  given_[1] = matrix_of(adapter.b, Side::kB);
  const bool hopper = size_of(adapter.a.dtype) == 2 && on_hopper();
  pads_ = hopper && !(tma_takes(given_[0]) && tma_takes(given_[1]));
  width_ = pads_ ? eights(adapter.rank()) : adapter.rank();
  for (int side = 0; side < 2; ++side) {
    const bool is_term = (side == 1) == forward;
    const bool copies = pads_ || (is_term && !fits(given_[side]));
    used_[side] = copies ? copy_of(memory, given_[side]) : given_[side];
  }
}

ProjectionAdapter::Matrix ProjectionAdapter::matrix_of(const TensorView& view, Side side) {
  const int rank = side == Side::kA ? 1 : 2, other = 3 - rank;
  return {view.data, view.stride[0], view.stride[rank], view.stride[other], view.shape[other]};
}

// Whether the product that has the matrix's term can read it.
bool ProjectionAdapter::fits(const Matrix& m) const {
  return along_rank_ ? m.rank_stride == 1 || adapter_.rank() == 1 : m.stride == 1 || m.length == 1;
}

bool ProjectionAdapter::tma_takes(const Matrix& m) const {
  const bool has_one_unit = (m.rank_stride == 1) != (m.stride == 1);
  const int64_t wide = m.rank_stride == 1 ? m.stride : m.rank_stride;
  return !adapter_.ranks.defined() && adapter_.rank() % 8 == 0 && has_one_unit && starts_vectors(m.data) &&
         wide % 8 == 0 && m.expert_stride % 8 == 0 && m.expert_stride > 0;
}

ProjectionAdapter::Matrix ProjectionAdapter::copy_of(Workspace& memory, const Matrix& m) const {
  const int64_t rank = eights(adapter_.rank()), length = eights(m.length);
  Matrix copy = m;
  copy.expert_stride = along_rank_ ? m.length * rank : rank * length;
  copy.rank_stride = along_rank_ ? 1 : length;
  copy.stride = along_rank_ ? rank : 1;
  copy.data = memory.take<std::byte>(adapter_.a.shape[0] * copy.expert_stride * size_of(adapter_.a.dtype));
  return copy;
}

void ProjectionAdapter::copy_matrices(const int32_t* expert_offsets, int64_t num_slots, void* stream) const {
  if (!defined()) return;
  for (int side = 0; side < 2; ++side) {
    if (used_[side].data != given_[side].data) copy(given_[side], used_[side], expert_offsets, num_slots, stream);
  }
}

void ProjectionAdapter::copy(const Matrix& from, const Matrix& to, const int32_t* expert_offsets, int64_t num_slots,
                             void* stream) const {
  const int64_t rank = eights(adapter_.rank()), num_experts = adapter_.a.shape[0];
  const unsigned blocks = blocks_of(rank * from.length);
  with_element_type(adapter_.a.dtype, [&]<typename T>() {
    const CopyMatrixParams<T> params{.from = static_cast<const T*>(from.data),
                                     .to = static_cast<T*>(const_cast<void*>(to.data)),
                                     .from_strides = {from.expert_stride, from.rank_stride, from.stride},
                                     .to_strides = {to.expert_stride, to.rank_stride, to.stride},
                                     .ranks = adapter_.ranks.as<const int32_t>(),
                                     .expert_offsets = expert_offsets,
                                     .num_experts = static_cast<int32_t>(num_experts),
                                     .num_slots = static_cast<int32_t>(num_slots),
                                     .rank = static_cast<int32_t>(adapter_.rank()),
                                     .padded_rank = static_cast<int32_t>(rank),
                                     .length = static_cast<int32_t>(from.length),
                                     .blocks = static_cast<int32_t>(blocks),
                                     .along_rank = along_rank_};
    launch(copy_matrix_kernel<T>, dim3(static_cast<unsigned>(num_experts) * blocks), dim3(kAdapterThreads), 0, stream,
           params);
  });
}

void ProjectionAdapter::mask(const Rows& rows, const TensorView& out, void* stream) const {
  const DType dtype = adapter_.a.dtype;
  const int64_t num_slots = out.shape[0], width = out.shape[1], vector = 16 / size_of(dtype);
  if (num_slots == 0) return;
  const bool aligned = starts_vectors(rows.data) && rows.stride * size_of(dtype) % 16 == 0;  // `out` always is
  with_element_type(dtype, [&]<typename T>() {
    const MaskRowsParams<T> params{.rows = rows,
                                   .out = out.as<T>(),
                                   .out_stride = out.stride[0],
                                   .num_slots = num_slots,
                                   .width = static_cast<int32_t>(width),
                                   .mask = mask_,
                                   .aligned = aligned};
    launch(mask_rows_kernel<T>, dim3(blocks_of(num_slots * ((width + vector - 1) / vector))), dim3(kAdapterThreads), 0,
           stream, params);
  });
}

Rows ProjectionAdapter::multiply(Side side, const Rows& rows, const TensorView& out, const Gemm& like,
                                 void* stream) const {
  const Matrix& m = used_[static_cast<int>(side)];
  Gemm g{.dtype = like.dtype, .allow_tf32 = like.allow_tf32, .a = rows, .b = operand(m, true, m.stride == 1)};
  g.scales = adapter_.scales.as<const float>();
  g.scale_divisor = static_cast<float>(1.0 - adapter_.dropout);
  g.expert_offsets = like.expert_offsets;
  g.num_experts = like.num_experts;
  g.num_slots = like.num_slots;
  g.n = width_;
  g.c = m.length;
  g.out = out.data;
  g.out_stride = out.stride[0];
  gemm(g, stream);
  return {out.data, out.stride[0], like.num_slots, nullptr};
}

LowRank ProjectionAdapter::term(const Rows& small_rows) const {
  if (!defined()) return {};
  const Matrix& m = used_[forward_ ? 1 : 0];
  return {
      .a = small_rows, .b = operand(m, false, along_rank_), .rank = width_, .mask = forward_ ? DropoutMask{} : mask_};
}

ExpertOperand ProjectionAdapter::operand(const Matrix& m, bool ranks_are_n, bool k_contiguous) const {
  const int64_t item = size_of(adapter_.a.dtype);
  ExpertOperand b{.data = m.data, .expert_stride = m.expert_stride};
  b.ends = pads_ ? nullptr : adapter_.ranks.as<const int32_t>();
  b.rows_are_n = ranks_are_n;
  b.n_stride = ranks_are_n ? m.rank_stride : m.stride;
  b.k_stride = ranks_are_n ? m.stride : m.rank_stride;
  const int64_t wide = k_contiguous ? b.n_stride : b.k_stride;
  b.aligned =
      starts_vectors(m.data) && wide * item % 16 == 0 && (adapter_.a.shape[0] == 1 || m.expert_stride * item % 16 == 0);
  return b;
}

void ProjectionAdapter::clear_ranks(Side side, const TensorView& gradient, void* stream) const {
  if (!defined() || !gradient.defined() || !adapter_.ranks.defined()) return;
  const Matrix m = matrix_of(gradient, side);
  const unsigned blocks = blocks_of(adapter_.rank() * m.length);
  with_element_type(gradient.dtype, [&]<typename T>() {
    const ClearRanksParams<T> params{.gradient = gradient.as<T>(),
                                     .strides = {m.expert_stride, m.rank_stride, m.stride},
                                     .ranks = adapter_.ranks.as<const int32_t>(),
                                     .rank = static_cast<int32_t>(adapter_.rank()),
                                     .length = static_cast<int32_t>(m.length),
                                     .blocks = static_cast<int32_t>(blocks)};
    launch(clear_ranks_kernel<T>, dim3(static_cast<unsigned>(gradient.shape[0]) * blocks), dim3(kAdapterThreads), 0,
           stream, params);
  });
}

}  // namespace switchgear::cuda
