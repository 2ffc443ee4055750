// SPDX-License-Identifier: BSD-3-Clause
// weight_gradient: work 2·S·M·N flop; traffic: E·M·N elements written once, rows read from L2/L3.
// With 64 rows per expert the writes cost as much as the multiplications; below that they bind. Of the multiplications' floor
// it reaches 61 % with 64 slots per expert (OLMoE, 512 tokens, 2 cores of Zen 5) and 48 % with 32 (Qwen3-30B-A3B).
// Tiles of 6 rows are rounded and written as they are finished, past the caches where the gradient is larger than those.
//
// A task is a block of rows of one expert's gradient. It transposes its part of `left` once, so that the block becomes an
// ordinary product with the slots as inner dimension, and walks the columns panel by panel. Experts without rows get zeros.
#include "weight_gradient.h"

#include <cstring>
#include <utility>
#include <vector>

#include "threads.h"
#include "workspace.h"

namespace switchgear::cpu {
namespace {

constexpr int64_t kCachedBytes = 16 << 20;  // what an optimizer may still find in a cache afterwards

// Rows of a block: enough to pay for packing `right` (24 and more), few enough that the transposed block stays in L2.
int64_t block_rows(int64_t slots) {
  constexpr int64_t kBytes = 512 << 10;
  return std::clamp<int64_t>(kBytes / (4 * std::max<int64_t>(slots, 1)) / 6 * 6, 48, kMaxRows);
}

}  // namespace

void weight_gradient(const WeightGradientArgs& args, int num_threads) {
  const Kernels& k = kernels();
  const int64_t num_experts = args.gradient.shape[0], panel = k.panel;
  int64_t rows = args.gradient.shape[1], columns = args.gradient.shape[2];
  int64_t row_stride = args.gradient.stride[1];
  const void *const *left = args.left, *const *right = args.right;
  if (args.gradient.stride[2] != 1 && columns > 1) {  // stored transposed: so is the product
    std::swap(rows, columns);
    std::swap(left, right);
    row_stride = args.gradient.stride[2];
  }
  if (num_experts == 0 || rows == 0 || columns == 0) return;

  const bool is_large = num_experts * rows * columns * size_of(args.gradient.dtype) > kCachedBytes;
  std::vector<Tile> tiles;
  int64_t transposed_bytes = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t slots = args.expert_offsets[e + 1] - args.expert_offsets[e], block = block_rows(slots);
    transposed_bytes = std::max(transposed_bytes, Workspace::padded(block * slots * 4));
    for (int64_t row = 0; row < rows; row += block) tiles.push_back({e, 0, row, std::min(block, rows - row)});
  }
  const int64_t thread_bytes = ProductScratch::kBytes + transposed_bytes;
  Workspace workspace(num_threads * thread_bytes);
  char* const memory = static_cast<char*>(workspace.take_bytes(num_threads * thread_bytes));

  parallel_for(num_threads, static_cast<int64_t>(tiles.size()), [&](int64_t task, int thread) {
    const Tile& tile = tiles[static_cast<size_t>(task)];
    const ProductScratch scratch(memory + thread * thread_bytes);
    char* const transposed = memory + thread * thread_bytes + ProductScratch::kBytes;
    const int64_t first = args.expert_offsets[tile.expert], slots = args.expert_offsets[tile.expert + 1] - first;
    const auto target = [&](int64_t row, int64_t column) {
      return offset(args.gradient,
                    tile.expert * args.gradient.stride[0] + (tile.first_row + row) * row_stride + column);
    };
    if (slots == 0) {
      const auto bytes = static_cast<size_t>(columns * size_of(args.gradient.dtype));
      for (int64_t m = 0; m < tile.num_rows; ++m) std::memset(target(m, 0), 0, bytes);
      return;
    }
    const DType row_dtype =
        k.transpose(transposed, slots, left + first, slots, tile.first_row, tile.num_rows, args.dtype);
    const void* transposed_rows[kMaxRows];
    fill_row_pointers(transposed_rows, transposed, slots * size_of(row_dtype), tile.num_rows);

    for (int64_t column = 0; column < columns; column += panel) {
      const int64_t count = std::min(panel, columns - column);
      k.multiply({.rows = transposed_rows,
                  .row_dtype = row_dtype,
                  .num_rows = tile.num_rows,
                  .b = {.dtype = args.dtype, .k_rows = right + first, .n_begin = column},
                  .num_columns = count,
                  .depth = slots,
                  .c = scratch.c,
                  .scratch = scratch.packing,
                  .sink = {target(0, column), row_stride, args.gradient.dtype, is_large}});
    }
  });
}

}  // namespace switchgear::cpu
