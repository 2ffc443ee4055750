// SPDX-License-Identifier: BSD-3-Clause
// weight_gradient: work 2·S·M·N flop; traffic: E·M·N elements written once, rows read from L2/L3.
// With 64 slots per expert the writes take as long as the multiplications on a memory of 20 GB/s; with fewer they bind. It
// reaches 88 to 91 % of the multiplications' floor with 64 slots per expert (OLMoE, 512 tokens, 2 cores of Zen 5, bfloat16
// and float32) and 84 % with 32 (Qwen3-30B-A3B).
//
// A task is a block of rows of one expert's gradient. It transposes its part of `left` once and goes through the columns panel
// by panel, with the slots as inner dimension (weight_gradient.inl). Experts without slots get zeros.
#include "weight_gradient.h"

#include <cstring>
#include <utility>
#include <vector>

#include "threads.h"
#include "workspace.h"

namespace switchgear::cpu {
namespace {

constexpr int64_t kCachedBytes = 16 << 20;  // up to here an optimizer may still find gradients in a cache
constexpr int64_t kBlockBytes = 256 << 10;  // of a transposed block, which stays in L2
constexpr int64_t kMostRows = 2048, kFewestRows = 48;
constexpr int64_t kPackingBytes = kChunkWords * kMaxPanel * 4;

// Rows per block: as many as stay in L2, in nearly equal blocks. Each block packs `right` again, which costs as much as
// multiplying 5 rows.
int64_t block_rows(int64_t rows, int64_t slots) {
  const int64_t most = std::clamp(kBlockBytes / (4 * std::max<int64_t>(slots, 1)), kFewestRows, kMostRows);
  return ceil_div(rows, ceil_div(rows, most));
}

}  // namespace

void weight_gradient(const WeightGradientArgs& args, const Context& context) {
  const Kernels& k = context.kernels;
  const int num_threads = context.num_threads;
  const int64_t num_matrices = args.gradient.shape[0], panel = k.panel, element = size_of(args.gradient.dtype);
  int64_t rows = args.gradient.shape[1], columns = args.gradient.shape[2];
  int64_t row_stride = args.gradient.stride[1];
  const void *const *left = args.left, *const *right = args.right;
  if (args.gradient.stride[2] != 1 && columns > 1) {  // stored transposed: so is the product
    std::swap(rows, columns);
    std::swap(left, right);
    row_stride = args.gradient.stride[2];
  }
  if (num_matrices == 0 || rows == 0 || columns == 0) return;

  const auto is_whole_lines = [](int64_t bytes) { return bytes % 64 == 0; };
  const bool past_caches = num_matrices * rows * columns * element > kCachedBytes &&
                           is_whole_lines(static_cast<int64_t>(reinterpret_cast<uintptr_t>(args.gradient.data))) &&
                           (num_matrices == 1 || is_whole_lines(args.gradient.stride[0] * element)) &&
                           is_whole_lines(row_stride * element);
  std::vector<Tile> tiles;  // whose expert is the index of the matrix
  int64_t left_bytes = 0, carried_bytes = 0;
  const auto expert_of = [&](int64_t i) -> int64_t { return args.experts != nullptr ? args.experts[i] : i; };
  const auto slots_of = [&](int64_t i) {  // the first slot of matrix i, and their number
    const int64_t e = expert_of(i), first = args.expert_offsets[e];
    return std::pair<int64_t, int64_t>(first, args.expert_offsets[e + 1] - first);
  };
  for (int64_t i = 0; i < num_matrices; ++i) {
    const int64_t slots = slots_of(i).second, block = block_rows(rows, slots);
    left_bytes = std::max(left_bytes, Workspace::padded((block + kLeftPadding) * (slots + kLeftPadding) * 4));
    if (slots > kChunkWords) carried_bytes = std::max(carried_bytes, (block + kLeftPadding) * panel * 4);
    for (int64_t row = 0; row < rows; row += block) tiles.push_back({i, 0, row, std::min(block, rows - row)});
  }
  const int64_t thread_bytes = kPackingBytes + left_bytes + carried_bytes;
  Workspace workspace(num_threads * thread_bytes);
  char* const memory = static_cast<char*>(workspace.take_bytes(num_threads * thread_bytes));

  const auto work = [&](int64_t task) {
    const Tile& tile = tiles[static_cast<size_t>(task)];
    const int64_t bytes = tile.num_rows * columns * element;
    return TaskWork{expert_of(tile.expert), slots_of(tile.expert).second, args.adds ? 2 * bytes : bytes};
  };
  const auto run_tile = [&](int64_t task, int thread) {
    const Tile& tile = tiles[static_cast<size_t>(task)];
    char* const own = memory + thread * thread_bytes;
    float* const transposed = reinterpret_cast<float*>(own + kPackingBytes);
    const auto [first, slots] = slots_of(tile.expert);
    char* const out = offset(args.gradient, tile.expert * args.gradient.stride[0] + tile.first_row * row_stride);
    if (slots == 0) {
      if (args.adds) return;
      const auto bytes = static_cast<size_t>(columns * element);
      if (row_stride == columns) {
        std::memset(out, 0, bytes * static_cast<size_t>(tile.num_rows));
      } else {
        for (int64_t m = 0; m < tile.num_rows; ++m) std::memset(out + m * row_stride * element, 0, bytes);
      }
      return;
    }
    k.transpose(transposed, left + first, slots, tile.first_row, tile.num_rows, args.dtype);
    for (int64_t column = 0; column < columns; column += panel) {
      k.gradient_panel({.left = transposed,
                        .num_rows = tile.num_rows,
                        .right = right + first,
                        .num_slots = slots,
                        .dtype = args.dtype,
                        .first_column = column,
                        .num_columns = std::min(panel, columns - column),
                        .out = out + column * element,
                        .out_stride = row_stride,
                        .past_caches = past_caches,
                        .packing = reinterpret_cast<float*>(own),
                        .carried = reinterpret_cast<float*>(own + kPackingBytes + left_bytes),
                        .adds = args.adds});
    }
  };
  parallel_for(num_threads, static_cast<int64_t>(tiles.size()), run_tile, Loop{"weight gradient", work});
}

}  // namespace switchgear::cpu
