// SPDX-License-Identifier: BSD-3-Clause
// What an op of the CPU backend runs with: the kernels of one ISA. Each call gets its context from backend.cpp, for the ISA
// that checked the arguments, and hands it down. Another thread may choose another ISA meanwhile, and buffers laid out for
// one ISA must not be read by kernels of another.
#pragma once
#include "gguf_kernels.h"
#include "integers/kernels.h"
#include "kernels.h"
#include "rows.h"

namespace switchgear::cpu {

struct Context {
  const Kernels& kernels;
  const IntegerKernels& integers;
  const RowKernels& rows;
  const GgufKernels& gguf;
  int num_threads;  // at least 1
};

// The products of rows with the rows of b in any format but integers.
inline void dot_products(const Context& context, const Product& product) {
  (is_gguf(product.b.format) ? context.gguf.multiply : context.kernels.dot_products)(product);
}

}  // namespace switchgear::cpu
