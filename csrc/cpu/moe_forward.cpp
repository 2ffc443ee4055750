// SPDX-License-Identifier: BSD-3-Clause
// moe_forward: y[t] = Σ_k topk_weights[t,k] · (glu(x[t]·W_guᵀ + b_gu)·W_dᵀ + b_d)
//
//   x [T,H]   gate_up_proj [E,N,H]   down_proj [E,H,I]   y [T,H]   h [S,N] if training needs it
//   work 2·S·H·(N + I) flop (6·S·H·I for gated experts); traffic: touched weights once per 240 rows of an expert (384 with AMX)
//   memory-bound below ~20 rows per expert in bfloat16, compute-bound above
//   reached in bfloat16 on 2 cores (Zen 4 and Zen 5): of a plain read of the weights 91 to 100 % with one or two rows per
//   expert, 105 to 130 % if compact; of the multiply-adds 76 to 80 % (Zen 5) and 79 to 90 % (Zen 4) with 64 to 256 rows.
//   Products take 95 % of the time, a tenth of it to fetch weights from memory into L2; bias, glu and rounding the rest.
//
// Weights in panels (panels.h), and plain ones that are packed as such (packed_products.inl), need rows in their word order: x is
// copied once in that order, and `a` is stored in it. Other 16-bit rows that the ISA multiplies in float32 are widened once. An
// ISA that gathers rows (gathered.h) has its own layout for both: each thread gathers an expert's rows of x.
// 1. Tiles (expert, panel of `a`, rows): gate and up products of rows of x (pointers, no permuted copy in memory), then bias,
//    glu and rounding while the tile is in L1/L2. Only a [S,I] reaches memory, and h if it is saved.
// 2. token_sum: the second projection, weighted and summed per token as it is computed. With `sums` it starts from them, and
//    stores its accumulators there in float32: an expert after the other, as in one call with all of them.
// An adapter (adapter.h) takes one more pass before each projection, u = s·(x·Aᵀ) and v = s·(a·Aᵀ), rounded to the dtype of x;
// tiles then add u·Bᵀ and v·Bᵀ to their own product, before the bias.
// Accumulates in float32; a, h and y are rounded once to the dtype of x. Deterministic, and a token's result does not depend
// on the other tokens.
#include <algorithm>
#include <cstring>
#include <vector>

#include "experts.h"
#include "gate_columns.h"
#include "layer_rows.h"
#include "ops.h"
#include "slots.h"
#include "token_sum.h"

namespace switchgear::cpu {
namespace {

struct FirstProjection {
  const MoeForwardArgs& args;
  const void* const* rows;  // [S] gathered rows of x
  SortedExperts sorted;
  bool are_widened;  // the other rows
  const int32_t* expert_offsets;
  const ActivationRows& a;
  const Kernels& k;
  const Context& context;
  AdapterTerms adapter;
  int64_t columns_per_tile;  // of a, at most a panel

  Start start(const Tile& tile) const {
    const GateColumns columns = gate_columns(args.options, a.width(), tile.column, 1, k.panel);
    return ExpertMatrix(args.weights.gate_up_proj, tile.expert, args.x.dtype).rows_from(columns.begin[0]).start();
  }

  // Later pieces of an expert's rows find the columns in a cache if they follow at once.
  TaskWork work(const Tile& tile, bool by_panels) const {
    if (by_panels && tile.first_row > expert_offsets[tile.expert]) return {tile.expert, tile.num_rows, 0};
    const int64_t count = std::min(columns_per_tile, a.width() - tile.column) * (args.options.gated ? 2 : 1);
    const ExpertMatrix matrix(args.weights.gate_up_proj, tile.expert, args.x.dtype);
    return {tile.expert, tile.num_rows, bytes_of(matrix.rows_from(0), count, args.x.shape[1])};
  }

  // adapter_scratch: its c is for terms of the adapter.
  void run(const Tile& tile, const Start& next, const ProductScratch (&scratch)[2],
           const ProductScratch& adapter_scratch, const void* gathered_x) const {
    const int64_t count = std::min(columns_per_tile, a.width() - tile.column);
    const GateColumns columns = gate_columns(args.options, a.width(), tile.column, count, k.panel);
    const ExpertMatrix matrix(args.weights.gate_up_proj, tile.expert, args.x.dtype);
    const auto term = [&](int i) {
      return TermColumns{tile.expert, tile.first_row, tile.num_rows, columns.begin[i], columns.count[i]};
    };
    for (int i = 0; i < 2 && adapter.defined(); ++i) adapter.prefetch(term(i));
    for (int i = 0; i < 2; ++i) {
      if (columns.count[i] == 0) continue;
      dot_products(context, {.rows = rows + tile.first_row,
                             .num_rows = tile.num_rows,
                             .b = matrix.rows_from(columns.begin[i]),
                             .num_columns = columns.count[i],
                             .depth = args.x.shape[1],
                             .c = scratch[i].c,
                             .next = i == 0 && columns.count[1] > 0 ? matrix.rows_from(columns.begin[1]).start() : next,
                             .scratch = scratch[i].packing,
                             .sorted_rows = sorted.has(expert_offsets, tile.expert),
                             .rows_are_widened = are_widened,
                             .gathered = gathered_x});
      if (adapter.defined()) adapter.add(scratch[i].c, term(i), adapter_scratch, k);
    }
    a.store(tile, count, [&](int64_t m, float* activated) {
      float* const part[2] = {scratch[0].c + m * k.panel, scratch[1].c + m * k.panel};
      finish(tile.expert, tile.first_row + m, columns, part);
      GateRow shuffled;
      const auto [gate, up] = split_gate(shuffled, part[0], part[1], args.options, columns, count);
      k.glu_row(activated, gate, up, args.options, count);
    });
  }

 private:
  // Adds the bias, and saves h if requested.
  void finish(int64_t expert, int64_t slot, const GateColumns& columns, float* const (&part)[2]) const {
    const TensorView& bias = args.weights.gate_up_bias;
    for (int i = 0; i < 2; ++i) {
      if (bias.defined()) {
        k.add_scaled_row(part[i], at(bias, expert, columns.begin[i]), bias.dtype, 1.0f, columns.count[i]);
      }
      if (args.h.defined()) k.store_row(at(args.h, slot, columns.begin[i]), args.h.dtype, part[i], columns.count[i]);
    }
  }
};

// Columns of `a` per tile: a panel, or a part of one if few rows leave too few tiles for the threads. Rows that are sorted or
// gathered are written a panel at a time.
int64_t tile_columns(const Weight& gate_up_proj, const ActivationRows& a, const int32_t* expert_offsets,
                     const Context& context) {
  const int64_t num_experts = gate_up_proj.num_experts(), panel = context.kernels.panel;
  if (gate_up_proj.format == Format::kPanels || a.sorted().least_rows == 0 || a.gathers() ||
      !has_few_rows(expert_offsets, num_experts)) {
    return panel;
  }
  int64_t used = 0;
  for (int64_t e = 0; e < num_experts; ++e) used += expert_offsets[e] < expert_offsets[e + 1];
  return columns_for(panel, std::min(panel, kFewestColumns), context.num_threads,
                     [&](int64_t columns) { return used * ceil_div(a.width(), columns); });
}

}  // namespace

void moe_forward(const MoeForwardArgs& args, const Context& context) {
  const Weight &gate_up_proj = args.weights.gate_up_proj, &down_proj = args.weights.down_proj;
  if (is_integer(gate_up_proj.format)) return integer_moe_forward(args, context);
  const Kernels& k = context.kernels;
  const int num_threads = context.num_threads;
  const DType dtype = args.x.dtype;
  const int64_t num_experts = gate_up_proj.num_experts(), hidden_size = args.x.shape[1];
  const int64_t intermediate_size = args.options.gated ? gate_up_proj.num_rows() / 2 : gate_up_proj.num_rows();
  const int64_t num_slots = args.topk_ids.shape[0] * args.topk_ids.shape[1];
  InputRows x(context, gate_up_proj.format, args.x, num_slots, num_experts);
  ActivationRows a(context, down_proj.format, dtype, num_slots, intermediate_size, num_experts);
  if (args.weights.down_adapter.defined()) a.keep_plain();
  const int64_t gathered_x_bytes = GatheredRows::bytes(x.block_bytes(), num_slots);
  const auto pointers = num_slots * static_cast<int64_t>(sizeof(void*));
  // Two products, one after the other, and a term of an adapter: they share their packing.
  const int64_t term_bytes = args.weights.gate_up_adapter.defined() ? ProductScratch::kTileBytes : 0;
  const int64_t thread_bytes = ProductScratch::kBytes + ProductScratch::kTileBytes + term_bytes;

  Workspace workspace(Slots::bytes(num_slots, num_experts) + 2 * Workspace::padded(pointers) + a.bytes() + x.bytes() +
                      ForwardAdapter::bytes(args.weights.gate_up_adapter, num_slots, dtype) +
                      ForwardAdapter::bytes(args.weights.down_adapter, num_slots, dtype) +
                      num_threads * (thread_bytes + gathered_x_bytes));
  const Slots slots = make_slots(workspace, args.topk_ids, args.topk_weights, num_experts, context);
  const int64_t used_slots = slots.expert_offsets[num_experts];
  const void** const x_rows = workspace.take<const void*>(num_slots);
  const void** const a_rows = workspace.take<const void*>(num_slots);
  a.take(workspace, slots.expert_offsets);
  x.fill(x_rows, workspace, slots.expert_offsets, slots.token_indices, num_experts, num_threads);
  a.fill(a_rows, used_slots);
  char* const memory = static_cast<char*>(workspace.take_bytes(num_threads * thread_bytes));
  char* const gathered_memory = static_cast<char*>(workspace.take_bytes(num_threads * gathered_x_bytes));
  std::vector<GatheredRows> gathered_x;
  for (int i = 0; i < num_threads; ++i)
    gathered_x.emplace_back(gathered_memory + i * gathered_x_bytes, x.block_bytes());

  const int64_t columns = tile_columns(gate_up_proj, a, slots.expert_offsets, context);
  const std::vector<Tile> tiles = make_tiles(slots.expert_offsets, num_experts, intermediate_size, columns, k.most_rows,
                                             x.block_bytes() > 0 ? TileOrder::kRows : TileOrder::kPanels);
  const ThreadMemory thread_memory{memory, thread_bytes};
  ForwardAdapter u(args.weights.gate_up_adapter, 0, slots, dtype, workspace);
  u.multiply(args.x, slots.token_indices, thread_memory, context);
  const FirstProjection first{args, x_rows, x.sorted(), x.are_widened(), slots.expert_offsets,
                              a,    k,      context,    u.terms(),       columns};
  const auto work = [&](int64_t i) { return first.work(tiles[static_cast<size_t>(i)], x.block_bytes() == 0); };
  const auto run_tile = [&](int64_t i, int thread) {
    char* const own = memory + thread * thread_bytes;
    ProductScratch scratch[2] = {ProductScratch(own), ProductScratch(own)}, adapter_scratch(own);
    scratch[1].c = reinterpret_cast<float*>(own + ProductScratch::kBytes);
    if (term_bytes > 0) adapter_scratch.c = scratch[1].c + ProductScratch::kTileBytes / 4;
    const Tile* const tile = &tiles[static_cast<size_t>(i)];
    first.run(*tile, tile != &tiles.back() ? first.start(tile[1]) : Start{}, scratch, adapter_scratch,
              gathered_x[static_cast<size_t>(thread)].of(*tile, k, x_rows, hidden_size));
  };
  parallel_for_shares(num_threads, static_cast<int64_t>(tiles.size()), run_tile, Loop{"first projection", work});
  if (args.h.defined()) zero_tail(args.h, used_slots);

  ForwardAdapter v(args.weights.down_adapter, 1, slots, dtype, workspace);
  v.multiply(a.plain(a_rows), thread_memory, context);
  token_sum({.rows = a.rounded(workspace, a_rows, used_slots, num_threads),
             .sorted = a.sorted(),
             .are_widened = a.are_widened(),
             .gathered = a.gathered(),
             .depth = intermediate_size,
             .matrices = &down_proj,
             .transposed = false,
             .bias = args.weights.down_bias,
             .slot_weights = slots.weights,
             .expert_offsets = slots.expert_offsets,
             .token_indices = slots.token_indices,
             .dtype = dtype,
             .out = args.out(),
             .accumulate = args.sums.defined(),
             .adapter = v.terms()},
            context);
}

}  // namespace switchgear::cpu
