// SPDX-License-Identifier: BSD-3-Clause
// grouped_gemm with integer weights: out[s] = x[r(s)]·W_e(s)ᵀ + bias, x rounded to int8.
//
//   work 2·S·C·N; traffic: touched weights once per 240 rows, x from L2/L3, out once
#include <cstring>
#include <vector>

#include "cpu/integers/experts.h"
#include "cpu/ops.h"
#include "cpu/threads.h"

namespace switchgear::cpu {
namespace {

constexpr int64_t kPanel = kIntegerPanel;

}  // namespace

void integer_grouped_gemm(const GroupedGemmArgs& args, const Context& context) {
  const int num_threads = context.num_threads;
  const Kernels& k = context.kernels;
  const IntegerKernels& q = context.integers;
  const int64_t num_experts = args.weight.num_experts(), part_rows = args.weight.rows / args.weight.parts;
  const int32_t* const expert_offsets = args.expert_offsets.as<int32_t>();
  const int64_t num_rows = args.x.shape[0];

  constexpr int64_t kTileBytes = kIntegerRows * kPanel * 4;
  Workspace workspace(integer_bytes(num_rows, args.weight, q) + num_threads * kTileBytes);
  const IntegerRows x = quantize_rows(workspace, args.x.data, args.x.stride[0] * size_of(args.x.dtype), args.x.dtype,
                                      num_rows, args.weight, context);
  float* const memory = static_cast<float*>(workspace.take_bytes(num_threads * kTileBytes));
  const std::vector<Tile> tiles = make_tiles(expert_offsets, num_experts, part_rows, kPanel, kIntegerRows);
  const auto num_tiles = static_cast<int64_t>(tiles.size());

  parallel_for(num_threads, num_tiles * args.weight.parts, [&](int64_t task, int thread) {
    const Tile& tile = tiles[static_cast<size_t>(task % num_tiles)];
    float* const c = memory + thread * (kTileBytes / 4);
    const int64_t column = task / num_tiles * part_rows + tile.column,
                  columns = std::min(kPanel, part_rows - tile.column);
    const int64_t first = args.token_indices.defined() ? 0 : tile.first_row;
    q.multiply({.rows = x.from(first),
                .indices = args.token_indices.defined() ? args.token_indices.as<int32_t>() + tile.first_row : nullptr,
                .num_rows = tile.num_rows,
                .b = IntegerMatrix(args.weight, tile.expert).from(column),
                .num_columns = columns,
                .c = c});
    for (int64_t m = 0; m < tile.num_rows; ++m) {
      float* const row = c + m * kPanel;
      if (args.bias.defined()) {
        k.add_scaled_row(row, at(args.bias, tile.expert, column), args.bias.dtype, 1.0f, columns);
      }
      k.store_row(at(args.out, tile.first_row + m, column), args.out.dtype, row, columns);
    }
  });
  zero_tail(args.out, expert_offsets[num_experts]);
}

}  // namespace switchgear::cpu
