// SPDX-License-Identifier: BSD-3-Clause
// grouped_gemm of x·W with integer or minifloat weights: out[s] = x[r(s)]·W_e(s), as gradients of x need it.
//
//   work 2·S·C·N; traffic: touched weights once per 240 rows, x from L2/L3, out once
//   64 columns of W at a time are multiplied as they are stored, or decoded before (decoded_columns.h).
#include <vector>

#include "decoded_columns.h"
#include "ops.h"
#include "threads.h"

namespace switchgear::cpu {

void transposed_grouped_gemm(const GroupedGemmArgs& args, const Context& context) {
  const int num_threads = context.num_threads;
  const Kernels& k = context.kernels;
  const DType dtype = args.x.dtype;
  const int64_t num_experts = args.weight.num_experts(), depth = args.weight.rows, width = args.weight.cols;
  const int32_t* const expert_offsets = args.expert_offsets.as<int32_t>();
  const int64_t used_slots = expert_offsets[num_experts];

  const int64_t pointer_bytes = Workspace::padded(used_slots * static_cast<int64_t>(sizeof(void*)));
  const int64_t panel_bytes = DecodedColumns::bytes(args.weight, dtype, k);
  const int64_t thread_bytes = ProductScratch::kBytes + panel_bytes;
  Workspace workspace(pointer_bytes + num_threads * thread_bytes);
  const void** const rows = workspace.take<const void*>(used_slots);
  char* const memory = static_cast<char*>(workspace.take_bytes(num_threads * thread_bytes));
  fill_row_pointers(rows, args.x, args.token_indices.as<int32_t>(), used_slots);

  std::vector<DecodedColumns> decoded;
  for (int i = 0; i < num_threads; ++i) {
    decoded.emplace_back(args.weight, dtype, memory + i * thread_bytes + ProductScratch::kBytes);
  }

  // Tiles of kDecodedColumns columns, so that a panel of weights serves all column blocks of narrower kernels.
  const std::vector<Tile> tiles = make_tiles(expert_offsets, num_experts, width, kDecodedColumns, kIntegerRows);
  parallel_for(num_threads, static_cast<int64_t>(tiles.size()), [&](int64_t task, int thread) {
    const Tile& tile = tiles[static_cast<size_t>(task)];
    char* const own = memory + thread * thread_bytes;
    const ProductScratch scratch(own);
    const int64_t columns = std::min(kDecodedColumns, width - tile.column);
    const Matrix b = decoded[static_cast<size_t>(thread)].of(tile.expert, tile.column, columns, context);
    for (int64_t column = 0; column < columns; column += k.panel) {
      const int64_t count = std::min<int64_t>(k.panel, columns - column);
      k.multiply({.rows = rows + tile.first_row,
                  .num_rows = tile.num_rows,
                  .b = columns_at(b, column, 0),
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
