// SPDX-License-Identifier: BSD-3-Clause
// quantized_grouped_gemm: out[s] = x[r(s)]·W_e(s)ᵀ + bias in int8; transposed: out[s] = x[r(s)]·W_e(s) in float.
//
//   work 2·S·C·N; traffic: touched weights once per 240 rows, x from L2/L3, out once
//   The transposed product writes 64 columns of W at a time, all rows, into a panel of the dtype of x (128 bytes · N in
//   bfloat16), which stays in L2, and multiplies as for plain weights: there is never a whole matrix in float.
#include <cstring>
#include <vector>

#include "cpu/ops.h"
#include "cpu/quantized/experts.h"
#include "cpu/threads.h"

namespace switchgear::cpu {
namespace {

constexpr int64_t kPanel = kQuantizedPanel;

void zero_tail(const TensorView& out, int64_t used_slots) {
  for (int64_t s = used_slots; s < out.shape[0]; ++s) {
    std::memset(row_of(out, s), 0, static_cast<size_t>(out.shape[1] * size_of(out.dtype)));
  }
}

void multiply_in_integers(const QuantizedGroupedGemmArgs& args, int num_threads) {
  const Kernels& k = kernels();
  const QuantizedKernels& q = quantized_kernels();
  const int64_t num_experts = args.weight.values.shape[0], part_rows = args.weight.rows / args.weight.parts;
  const int32_t* const expert_offsets = args.expert_offsets.as<int32_t>();
  const int64_t num_rows = args.x.shape[0];

  constexpr int64_t kTileBytes = kQuantizedRows * kPanel * 4;
  Workspace workspace(quantized_bytes(num_rows, args.weight) + num_threads * kTileBytes);
  const QuantizedRows x = quantize_rows(workspace, args.x.data, args.x.stride[0] * size_of(args.x.dtype), args.x.dtype,
                                        num_rows, args.weight, num_threads);
  float* const memory = static_cast<float*>(workspace.take_bytes(num_threads * kTileBytes));
  const std::vector<Tile> tiles = make_tiles(expert_offsets, num_experts, part_rows, kPanel, kQuantizedRows);
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
                .b = QuantizedMatrix(args.weight, tile.expert).from(column),
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

// panel[n, j] = W[n, column + j] in `dtype`, for all rows of an expert.
void dequantize_columns(void* panel, DType dtype, const QuantizedMatrices& weight, int64_t expert, int64_t column,
                        int64_t columns) {
  const Kernels& k = kernels();
  const QuantizedMatrix matrix(weight, expert);
  const int64_t part_rows = matrix.part_rows(), row_bytes = kPanel * size_of(dtype);
  float block[kBlockRows * kPanel];
  for (int64_t part = 0; part < weight.parts; ++part) {
    const QuantizedPanel blocks = matrix.from(part * part_rows);
    for (int64_t row = 0; row < part_rows; row += kBlockRows) {
      quantized_kernels().dequantize(block, kPanel, blocks, row, column, columns);
      for (int64_t i = 0; i < std::min(kBlockRows, part_rows - row); ++i) {
        char* const out = static_cast<char*>(panel) + (part * part_rows + row + i) * row_bytes;
        k.store_row(out, dtype, block + i * kPanel, columns);
      }
    }
  }
}

void multiply_transposed(const QuantizedGroupedGemmArgs& args, int num_threads) {
  const Kernels& k = kernels();
  const DType dtype = args.x.dtype;
  const int64_t num_experts = args.weight.values.shape[0], depth = args.weight.rows, width = args.weight.cols;
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
  const std::vector<Tile> tiles = make_tiles(expert_offsets, num_experts, width, kPanel, kQuantizedRows);
  parallel_for(num_threads, static_cast<int64_t>(tiles.size()), [&](int64_t task, int thread) {
    const Tile& tile = tiles[static_cast<size_t>(task)];
    char* const own = memory + thread * thread_bytes;
    const ProductScratch scratch(own);
    char* const panel = own + ProductScratch::kBytes;
    const int64_t columns = std::min(kPanel, width - tile.column);
    dequantize_columns(panel, dtype, args.weight, tile.expert, tile.column, columns);
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

}  // namespace

void quantized_grouped_gemm(const QuantizedGroupedGemmArgs& args, Execution exec) {
  const int num_threads = resolve_threads(exec.num_threads);
  args.transposed ? multiply_transposed(args, num_threads) : multiply_in_integers(args, num_threads);
}

}  // namespace switchgear::cpu
