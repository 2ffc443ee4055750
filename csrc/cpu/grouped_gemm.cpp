// SPDX-License-Identifier: BSD-3-Clause
// grouped_gemm: out[s] = x[r(s)]·weight[e(s)]ᵀ + bias[e(s)]; grouped_gemm_wgrad: its weight gradient.
//
//   x [R,C]   weight [E,N,C] or E matrices [N_e,C]   out [S,N]
//   work 2·S·C·N flop; traffic: touched weights once per 240 rows (384 with AMX), x from L2/L3, out once
//   memory-bound below ~20 rows per expert in bfloat16 (2 flop per weight byte and row), compute-bound above
#include <cstring>
#include <optional>
#include <vector>

#include "experts.h"
#include "layer_rows.h"
#include "ops.h"
#include "threads.h"
#include "weight_gradient.h"
#include "workspace.h"

namespace switchgear::cpu {

namespace {

constexpr int64_t kPieceRows = 48;  // per piece, at least: 8 tiles

// Columns and rows of a tile: less than a panel if few rows leave too few tiles for the threads, and fewer rows if narrow
// matrices do.
struct TileSize {
  int64_t columns, rows;

  TileSize(const int32_t* expert_offsets, int64_t num_experts, int64_t width, bool may_be_narrow,
           const Context& context)
      : columns(context.kernels.panel), rows(context.kernels.most_rows) {
    int64_t used = 0;
    for (int64_t e = 0; e < num_experts; ++e) used += expert_offsets[e] < expert_offsets[e + 1];
    if (has_few_rows(expert_offsets, num_experts)) {
      if (!may_be_narrow) return;
      const int64_t least = std::min(columns, kFewestColumns);
      columns =
          columns_for(columns, least, context.num_threads, [&](int64_t wide) { return used * ceil_div(width, wide); });
      return;
    }
    const int64_t panels = used * ceil_div(width, columns);
    if (panels >= 2 * context.num_threads) return;
    const int64_t pieces = ceil_div(2 * context.num_threads, panels);
    const int64_t slots = ceil_div(expert_offsets[num_experts], used);
    rows = std::clamp(piece_rows(slots, ceil_div(slots, pieces)), std::min(kPieceRows, rows), rows);
  }
};

// Streams in which all tiles of one plain matrix are read, each of which has an equal share of its columns; 1: tiles are read
// one after the other. A stream goes on where it was in the tile before, which processors that read in streams follow.
int64_t streams_of(const GroupedGemmArgs& args, int64_t width, const Context& context) {
  const Weight& weight = args.weight;
  const bool is_one = weight.num_experts() == 1 && weight.format == Format::kPlain && weight.data.stride[2] == 1;
  if (!is_one || args.input_gradient || width % context.kernels.panel != 0) return 1;
  const int64_t num_rows = args.expert_offsets.as<int32_t>()[1];
  return num_rows > 0 ? std::max(context.kernels.num_streams(args.x.dtype, num_rows), 1) : 1;
}

}  // namespace

void grouped_gemm(const GroupedGemmArgs& args, const Context& context) {
  if (args.transposed) return transposed_grouped_gemm(args, context);
  if (is_integer(args.weight.format)) return integer_grouped_gemm(args, context);
  const Kernels& k = context.kernels;
  const int64_t num_slots = args.out.shape[0], width = args.out.shape[1], depth = args.x.shape[1], panel = k.panel;
  const int64_t num_experts = args.weight.num_experts();
  const int32_t* const expert_offsets = args.expert_offsets.as<int32_t>();
  const int32_t* const token_indices = args.token_indices.as<int32_t>();
  const int64_t used_slots = expert_offsets[num_experts];
  const int num_threads = useful_threads(used_slots * width * depth, context.num_threads);

  // Copies of the rows. `multiply` reads them in place, and so are those of a table of which few are used. GGUF's types read
  // rounded ones, and panels sorted ones.
  std::optional<InputRows> x;
  const bool is_in_panels = args.weight.format == Format::kPanels;
  const bool copies = width >= kCopiedColumns && args.x.shape[0] <= 2 * used_slots;
  if (!args.input_gradient && (copies || is_in_panels || is_gguf(args.weight.format)))
    x.emplace(context, args.weight.format, args.x, used_slots, num_experts);
  const int64_t block_bytes =
      args.input_gradient ? 0 : gathered_block_bytes(k, args.weight.format, args.x.dtype, depth);
  const int64_t gathered_bytes = GatheredRows::bytes(block_bytes, num_slots);
  // Parts of the rows are stored separately, so no tile reaches into the next one.
  const int64_t parts = has_parts(args.weight.format) ? args.weight.parts : 1, part_width = width / parts;
  const bool may_be_narrow = !args.input_gradient && !is_in_panels && !is_decoded(args.weight.format);
  const TileSize size(expert_offsets, num_experts, part_width, may_be_narrow, context);
  const std::vector<Tile> tiles = make_tiles(expert_offsets, num_experts, part_width, size.columns, size.rows,
                                             gathered_bytes > 0 ? TileOrder::kRows : TileOrder::kPanels);
  const auto num_tiles = static_cast<int64_t>(tiles.size()), num_tasks = num_tiles * parts;
  const int64_t streams = streams_of(args, width, context), stream_columns = streams > 1 ? width / streams : 0;

  const int64_t pointer_bytes = Workspace::padded(used_slots * static_cast<int64_t>(sizeof(void*)));
  Workspace workspace(pointer_bytes + (x ? x->bytes() : 0) + num_threads * (ProductScratch::kBytes + gathered_bytes));
  const void** const rows = workspace.take<const void*>(used_slots);
  char* const memory = static_cast<char*>(workspace.take_bytes(num_threads * ProductScratch::kBytes));
  char* const gathered_memory = static_cast<char*>(workspace.take_bytes(num_threads * gathered_bytes));
  std::vector<GatheredRows> gathered;
  for (int i = 0; i < num_threads; ++i) gathered.emplace_back(gathered_memory + i * gathered_bytes, block_bytes);
  if (x) {
    x->fill(rows, workspace, expert_offsets, token_indices, num_experts, num_threads);
  } else {
    fill_row_pointers(rows, args.x, token_indices, used_slots);
  }

  const auto tile_of = [&](int64_t task) -> const Tile& { return tiles[static_cast<size_t>(task % num_tiles)]; };
  const auto column_of = [&](int64_t task) { return task / num_tiles * part_width + tile_of(task).column / streams; };
  const auto matrix_of = [&](int64_t task) { return ExpertMatrix(args.weight, tile_of(task).expert, args.x.dtype); };
  const auto operand = [&](int64_t task) { return matrix_of(task).rows_from(column_of(task)); };
  parallel_for_shares(num_threads, num_tasks, [&](int64_t task, int thread) {
    const Tile& tile = tile_of(task);
    const int64_t column = column_of(task);
    const ProductScratch scratch(memory + thread * ProductScratch::kBytes);
    const int64_t stored = std::min(size.columns, part_width - tile.column);
    const int64_t columns = std::clamp<int64_t>(matrix_of(task).rows() - column, 0, stored);  // the others are zero
    const Product product{.rows = rows + tile.first_row,
                          .num_rows = tile.num_rows,
                          .b = columns > 0 ? operand(task) : Matrix{.dtype = args.x.dtype, .n_stride = 1},
                          .num_columns = columns,
                          .depth = columns > 0 ? depth : 0,
                          .c = scratch.c,
                          .next = task + 1 < num_tasks ? operand(task + 1).start() : Start{},
                          .scratch = scratch.packing,
                          .sorted_rows = x && x->sorted().has(expert_offsets, tile.expert),
                          .rows_are_widened = x && x->are_widened(),
                          .gathered = gathered_bytes > 0 && columns > 0
                                          ? gathered[static_cast<size_t>(thread)].of(tile, k, rows, depth)
                                          : nullptr,
                          .stream_columns = stream_columns};
    args.input_gradient ? k.multiply(product) : dot_products(context, product);
    for (int64_t m = 0; m < tile.num_rows; ++m) {
      float* c = scratch.c + m * panel;
      for (int64_t i = 0, at_column = column; i < streams; ++i, at_column += stream_columns, c += stored / streams) {
        if (args.bias.defined()) {
          const char* const bias = at(args.bias, tile.expert, at_column);
          k.add_scaled_row(c, bias, args.bias.dtype, 1.0f, columns / streams);
        }
        k.store_row(at(args.out, tile.first_row + m, at_column), args.out.dtype, c, stored / streams);
      }
    }
  });
  zero_tail(args.out, used_slots);
}

void grouped_gemm_wgrad(const GroupedGemmWgradArgs& args, const Context& context) {
  const int32_t* const expert_offsets = args.expert_offsets.as<int32_t>();
  const int64_t used_slots = expert_offsets[args.expert_offsets.shape[0] - 1];
  const int64_t pointer_bytes = Workspace::padded(used_slots * static_cast<int64_t>(sizeof(void*)));
  Workspace workspace(2 * pointer_bytes);
  const void** const grad_rows = workspace.take<const void*>(used_slots);
  const void** const x_rows = workspace.take<const void*>(used_slots);
  fill_row_pointers(grad_rows, args.grad_out, nullptr, used_slots);
  fill_row_pointers(x_rows, args.x, args.token_indices.as<int32_t>(), used_slots);
  weight_gradient({.left = grad_rows,
                   .right = x_rows,
                   .dtype = args.x.dtype,
                   .expert_offsets = expert_offsets,
                   .experts = args.experts.as<int32_t>(),
                   .gradient = args.grad_weight},
                  context);
}

}  // namespace switchgear::cpu
