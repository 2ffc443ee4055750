// SPDX-License-Identifier: BSD-3-Clause
// quantize_rows: traffic num_rows · (bytes of a row + 1 byte per element), little beside the products.
#include "cpu/integers/experts.h"
#include "cpu/threads.h"

namespace switchgear::cpu {

IntegerRows quantize_rows(Workspace& workspace, const void* data, int64_t row_bytes, DType dtype, int64_t num_rows,
                          const Weight& weight, const Context& context) {
  const IntegerKernels& k = context.integers;
  const int64_t stride = integer_stride(weight, k), groups = weight.scales.shape[2];
  const int64_t blocks = ceil_div(weight.cols, block_columns(weight));
  const IntegerRows rows{.values = workspace.take<int8_t>(num_rows * stride),
                         .stride = stride,
                         .scales = workspace.take<float>(num_rows * blocks),
                         .corrections = workspace.take<int32_t>(num_rows * groups),
                         .blocks = blocks,
                         .groups = groups,
                         .wide = rows_are_wide(weight, k)};
  // Values of weights are stored unsigned; one term per row and group makes them symmetric.
  const int32_t factor = weight.zeros.defined() ? 1 : -(1 << (bits_of(weight.format) - 1));
  constexpr int64_t kGrain = 8;
  parallel_for_ranges(context.num_threads, num_rows, kGrain, [&](int64_t begin, int64_t end, int) {
    for (int64_t r = begin; r < end; ++r) {
      k.quantize_row(rows, r, static_cast<const char*>(data) + r * row_bytes, dtype, weight.cols, block_columns(weight),
                     group_columns(weight), factor);
    }
  });
  return rows;
}

}  // namespace switchgear::cpu
