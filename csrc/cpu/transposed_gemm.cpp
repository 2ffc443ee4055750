// SPDX-License-Identifier: BSD-3-Clause
// grouped_gemm of x·W with integer or minifloat weights: out[s] = x[r(s)]·W_e(s), as gradients of x need it.
//
//   work 2·S·C·N; traffic: touched weights once per 240 rows, x from L2/L3, out once
//   64 columns of W at a time, all rows, are decoded into a panel of the dtype of x (128 bytes · N in bfloat16), which stays
//   in L2, and multiplied like plain weights. A whole matrix never exists in float.
#include <vector>

#include "integers/experts.h"
#include "ops.h"
#include "threads.h"

namespace switchgear::cpu {
namespace {

constexpr int64_t kPanel = kIntegerPanel;

// panel[n, j] = W[n, column + j] in `dtype`, for all rows of an expert.
void decode_integers(const Context& context, void* panel, DType dtype, const Weight& weight, int64_t expert,
                     int64_t column, int64_t columns) {
  const IntegerMatrix matrix(weight, expert);
  const int64_t part_rows = matrix.part_rows(), row_bytes = kPanel * size_of(dtype);
  float block[kBlockRows * kPanel];
  for (int64_t part = 0; part < weight.parts; ++part) {
    const IntegerPanel blocks = matrix.from(part * part_rows);
    for (int64_t row = 0; row < part_rows; row += kBlockRows) {
      context.integers.dequantize(block, kPanel, blocks, row, column, columns);
      for (int64_t i = 0; i < std::min(kBlockRows, part_rows - row); ++i) {
        char* const out = static_cast<char*>(panel) + (part * part_rows + row + i) * row_bytes;
        context.kernels.store_row(out, dtype, block + i * kPanel, columns);
      }
    }
  }
}

void decode(const Context& context, void* panel, DType dtype, const Weight& weight, int64_t expert, int64_t column,
            int64_t columns) {
  if (is_integer(weight.format)) return decode_integers(context, panel, dtype, weight, expert, column, columns);
  const ExpertMatrix matrix(weight, expert, dtype);
  const int64_t part_rows = weight.rows / weight.parts, row_bytes = kPanel * size_of(dtype);
  for (int64_t row = 0; row < weight.rows; row += part_rows) {
    context.kernels.expand_minifloats(static_cast<char*>(panel) + row * row_bytes, kPanel, dtype, matrix.rows_from(row),
                                      part_rows, column, columns);
  }
}

}  // namespace

void transposed_grouped_gemm(const GroupedGemmArgs& args, const Context& context) {
  const int num_threads = context.num_threads;
  const Kernels& k = context.kernels;
  const DType dtype = args.x.dtype;
  const int64_t num_experts = args.weight.num_experts(), depth = args.weight.rows, width = args.weight.cols;
  const int32_t* const expert_offsets = args.expert_offsets.as<int32_t>();
  const int64_t used_slots = expert_offsets[num_experts];

  const int64_t pointer_bytes = Workspace::padded(used_slots * static_cast<int64_t>(sizeof(void*)));
  const int64_t panel_bytes = Workspace::padded(depth * kPanel * size_of(dtype));
  const int64_t thread_bytes = ProductScratch::kBytes + panel_bytes;
  Workspace workspace(pointer_bytes + num_threads * thread_bytes);
  const void** const rows = workspace.take<const void*>(used_slots);
  char* const memory = static_cast<char*>(workspace.take_bytes(num_threads * thread_bytes));
  fill_row_pointers(rows, args.x, args.token_indices.as<int32_t>(), used_slots);

  // Tiles of kPanel columns, so that a panel of weights serves all column blocks of narrower kernels.
  const std::vector<Tile> tiles = make_tiles(expert_offsets, num_experts, width, kPanel, kIntegerRows);
  parallel_for(num_threads, static_cast<int64_t>(tiles.size()), [&](int64_t task, int thread) {
    const Tile& tile = tiles[static_cast<size_t>(task)];
    char* const own = memory + thread * thread_bytes;
    const ProductScratch scratch(own);
    char* const panel = own + ProductScratch::kBytes;
    const int64_t columns = std::min(kPanel, width - tile.column);
    decode(context, panel, dtype, args.weight, tile.expert, tile.column, columns);
    for (int64_t column = 0; column < columns; column += k.panel) {
      const int64_t count = std::min<int64_t>(k.panel, columns - column);
      k.multiply({.rows = rows + tile.first_row,
                  .num_rows = tile.num_rows,
                  .b = {.data = panel + column * size_of(dtype), .dtype = dtype, .n_stride = 1, .k_stride = kPanel},
                  .num_columns = count,
                  .depth = depth,
                  .c = scratch.c,
                  .scratch = scratch.packing});
      for (int64_t m = 0; m < tile.num_rows; ++m) {
        k.store_row(at(args.out, tile.first_row + m, tile.column + column), args.out.dtype, scratch.c + m * k.panel,
                    count);
      }
    }
  });
  zero_tail(args.out, used_slots);
}

}  // namespace switchgear::cpu
