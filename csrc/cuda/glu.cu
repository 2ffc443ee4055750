// SPDX-License-Identifier: BSD-3-Clause
#include "glu.cuh"

#include "launch.h"
#include "ops.h"

namespace switchgear::cuda {
namespace {

// If not interleaved, the vectors of ups start I columns after those of gates.
bool gates_aligned(const TensorView& h, const GluOptions& options, int64_t intermediate_size) {
  const bool side_by_side = options.gated && !options.interleaved;
  return rows_aligned(h) && (!side_by_side || intermediate_size * size_of(h.dtype) % 16 == 0);
}

}  // namespace

void glu(const GluArgs& args, Execution exec) {
  const TensorView& a = args.a;
  if (a.shape[0] == 0) return;
  with_element_type(a.dtype, [&]<typename T>() {
    const GluParams<T> params{.h = args.h.as<const T>(),
                              .h_stride = args.h.stride[0],
                              .out = a.as<T>(),
                              .a_stride = a.stride[0],
                              .num_rows = a.shape[0],
                              .intermediate_size = a.shape[1],
                              .options = args.options,
                              .aligned = rows_aligned(a) && gates_aligned(args.h, args.options, a.shape[1])};
    const RowBlocks blocks = row_blocks(a.shape[0], vectors_of<T>(a.shape[1]));
    launch(glu_kernel<T>, blocks.grid, blocks.block, 0, exec.stream, params);
  });
}

void glu_backward(const GluBackwardArgs& args, Execution exec) {
  const TensorView& grad_a = args.grad_a;
  if (grad_a.shape[0] == 0) return;
  with_element_type(grad_a.dtype, [&]<typename T>() {
    const GluParams<T> params{.h = args.h.as<const T>(),
                              .h_stride = args.h.stride[0],
                              .grad_a = grad_a.as<const T>(),
                              .out = args.grad_h.as<T>(),
                              .a_stride = grad_a.stride[0],
                              .grad_h_stride = args.grad_h.stride[0],
                              .num_rows = grad_a.shape[0],
                              .intermediate_size = grad_a.shape[1],
                              .options = args.options,
                              .aligned = rows_aligned(grad_a) && gates_aligned(args.h, args.options, grad_a.shape[1]) &&
                                         gates_aligned(args.grad_h, args.options, grad_a.shape[1])};
    const RowBlocks blocks = row_blocks(grad_a.shape[0], vectors_of<T>(grad_a.shape[1]));
    launch(glu_backward_kernel<T>, blocks.grid, blocks.block, 0, exec.stream, params);
  });
}

}  // namespace switchgear::cuda
