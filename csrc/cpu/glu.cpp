// SPDX-License-Identifier: BSD-3-Clause
// glu: a = act(gate) ⊙ up, elementwise over h [S,N]; glu_backward: grad_h from grad_a.
// Memory-bound: (N + I) elements per row, about 30 flop each for the exponential.
#include "experts.h"
#include "gate_columns.h"
#include "ops.h"
#include "threads.h"

namespace switchgear::cpu {
namespace {

constexpr int64_t kRowGrain = 16;

// Calls body(s, column, count, parts) for each row of h in blocks of a panel's columns; parts: the columns of gate and up.
template <typename Body>
void for_each_block(const TensorView& a, const GluOptions& options, int num_threads, Body&& body) {
  const int64_t intermediate_size = a.shape[1];
  parallel_for_ranges(num_threads, a.shape[0], kRowGrain, [&](int64_t begin, int64_t end, int) {
    for (int64_t s = begin; s < end; ++s) {
      for (int64_t column = 0; column < intermediate_size; column += kMaxPanel) {
        const int64_t count = std::min<int64_t>(kMaxPanel, intermediate_size - column);
        body(s, column, count, gate_columns(options, intermediate_size, column, count, kMaxPanel));
      }
    }
  });
}

struct Parts {
  float part[2][kMaxPanel];
};

void load_parts(const Kernels& k, Parts& parts, const TensorView& h, int64_t s, const GateColumns& columns) {
  for (int i = 0; i < 2; ++i) k.load_row(parts.part[i], at(h, s, columns.begin[i]), h.dtype, columns.count[i]);
}

}  // namespace

void glu(const GluArgs& args, const Context& context) {
  const Kernels& k = context.kernels;
  for_each_block(args.a, args.options, context.num_threads,
                 [&](int64_t s, int64_t column, int64_t count, const GateColumns& columns) {
                   Parts h;
                   load_parts(k, h, args.h, s, columns);
                   GateRow shuffled;
                   const auto [gate, up] = split_gate(shuffled, h.part[0], h.part[1], args.options, columns, count);
                   float a[kMaxPanel];
                   k.glu_row(a, gate, up, args.options, count);
                   k.store_row(at(args.a, s, column), args.a.dtype, a, count);
                 });
}

void glu_backward(const GluBackwardArgs& args, const Context& context) {
  const Kernels& k = context.kernels;
  for_each_block(args.grad_a, args.options, context.num_threads,
                 [&](int64_t s, int64_t column, int64_t count, const GateColumns& columns) {
                   Parts h;
                   load_parts(k, h, args.h, s, columns);
                   GateRow shuffled;
                   const auto [gate, up] = split_gate(shuffled, h.part[0], h.part[1], args.options, columns, count);
                   float a[kMaxPanel], grad_a[kMaxPanel];
                   k.load_row(grad_a, at(args.grad_a, s, column), args.grad_a.dtype, count);
                   k.glu_backward_row(a, gate, up, grad_a, gate, up, args.options, count);
                   merge_gate(h.part[0], h.part[1], shuffled, args.options, columns, count);
                   for (int i = 0; i < 2; ++i) {
                     k.store_row(at(args.grad_h, s, columns.begin[i]), args.grad_h.dtype, h.part[i], columns.count[i]);
                   }
                 });
}

}  // namespace switchgear::cpu
