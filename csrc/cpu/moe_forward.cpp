// SPDX-License-Identifier: BSD-3-Clause
// moe_forward: y[t] = Σ_k topk_weights[t,k] · (glu(x[t]·W_guᵀ + b_gu)·W_dᵀ + b_d)
//
//   x [T,H]   gate_up_proj [E,N,H]   down_proj [E,H,I]   y [T,H]   h [S,N] where training asks for it
//   work 2·S·H·(N + I) flop (6·S·H·I for gated experts); traffic: touched weights once per 240 rows of an expert (384 with AMX)
//   memory-bound below ~20 rows per expert in bfloat16, compute-bound above
//   reached in bfloat16 on 2 cores: 91 to 100 % of a plain read of the weights with one or two rows per expert, 105 to 130 % on
//   compact weights (Zen 4 and Zen 5); of the multiply-adds with 64 to 256 rows 76 to 80 % (Zen 5), 79 to 90 % (Zen 4). Products take 95 % of the
//   time, of which fetching weights from memory into L2 costs a tenth beside the multiplications; bias, glu and rounding the rest.
//
// Weights in panels (panels.h) meet rows that are sorted alike: x is copied once, `a` is stored so. An ISA that gathers rows
// (gathered.h) has its own order for both: each thread gathers the rows of x of an expert, `a` is stored so.
// 1. Tiles (expert, panel of `a`, rows): gate and up products of rows of x (pointers, no permuted copy in memory), then bias, glu
//    and rounding while the tile is in L1/L2. Only a [S,I] reaches memory, and h if it is to be saved.
// 2. token_sum: the second projection, weighted and summed per token where it is computed.
// Accumulates in float32; a and h are rounded once to the dtype of x, y once. Deterministic, and a token's result does not
// depend on the other tokens.
#include <algorithm>
#include <cstring>
#include <vector>

#include "experts.h"
#include "gate.h"
#include "gathered.h"
#include "ops.h"
#include "slots.h"
#include "threads.h"
#include "token_sum.h"

namespace switchgear::cpu {
namespace {

constexpr int64_t kManyRows = 12;  // of an expert, above which a copy of x with rows spread over L1 pays for itself

// A row as weights in panels meet it.
void sort_row(const Kernels& k, void* out, const void* row, DType dtype, int64_t depth) {
  float values[kMaxPanel];
  for (int64_t first = 0; first < depth; first += kMaxPanel) {
    const int64_t count = std::min<int64_t>(kMaxPanel, depth - first);
    k.load_row(values, static_cast<const char*>(row) + first * size_of(dtype), dtype, count);
    k.store_sorted(out, dtype, depth, first, values, count);
  }
}

struct FirstProjection {
  const MoeForwardArgs& args;
  const void* const* rows;   // [S] gathered rows of x
  TensorView a;              // [S,I], rows spread
  GatheredSlots gathered_a;  // instead, for an ISA that gathers rows
  bool sorts_a;
  const Kernels& k;

  // The first weights that a tile reads.
  const void* start(const Tile& tile) const {
    const GateColumns columns = gate_columns(args.options, a.shape[1], tile.column, 1, k.panel);
    return ExpertMatrix(args.weights.gate_up_proj, tile.expert, args.x.dtype).rows_from(columns.begin[0]).data;
  }

  void run(const Tile& tile, const void* next, const ProductScratch (&scratch)[2], const void* gathered_x) const {
    const int64_t intermediate_size = a.shape[1], panel = k.panel;
    const int64_t count = std::min(panel, intermediate_size - tile.column);
    const GateColumns columns = gate_columns(args.options, intermediate_size, tile.column, count, panel);
    const ExpertMatrix matrix(args.weights.gate_up_proj, tile.expert, args.x.dtype);
    for (int i = 0; i < 2; ++i) {
      if (columns.count[i] == 0) continue;
      k.dot_products({.rows = rows + tile.first_row,
                      .num_rows = tile.num_rows,
                      .b = matrix.rows_from(columns.begin[i]),
                      .num_columns = columns.count[i],
                      .depth = args.x.shape[1],
                      .c = scratch[i].c,
                      .next = i == 0 && columns.count[1] > 0 ? matrix.rows_from(columns.begin[1]).data : next,
                      .scratch = scratch[i].packing,
                      .gathered = gathered_x});
    }
    alignas(64) char last_rows[kGatheredRows][kMaxPanel * 2];  // of a, that are gathered next
    const void* pointers[kGatheredRows];
    for (int64_t m = 0; m < kGatheredRows; ++m) pointers[m] = last_rows[m];
    for (int64_t m = 0; m < tile.num_rows; ++m) {
      float* const part[2] = {scratch[0].c + m * panel, scratch[1].c + m * panel};
      const int64_t slot = tile.first_row + m;
      for (int i = 0; i < 2; ++i) {
        if (args.weights.gate_up_bias.defined()) {
          const void* const bias = at(args.weights.gate_up_bias, tile.expert, columns.begin[i]);
          k.add_scaled_row(part[i], bias, args.weights.gate_up_bias.dtype, 1.0f, columns.count[i]);
        }
        if (args.h.defined()) k.store_row(at(args.h, slot, columns.begin[i]), args.h.dtype, part[i], columns.count[i]);
      }
      GateRow shuffled;
      const auto [gate, up] = split_gate(shuffled, part[0], part[1], args.options, columns, count);
      float activated[kMaxPanel];
      k.glu_row(activated, gate, up, args.options, count);
      if (sorts_a) {
        k.store_sorted(row_of(a, slot), a.dtype, intermediate_size, tile.column, activated, count);
      } else if (gathered_a.defined()) {
        const int64_t i = m % kGatheredRows;
        k.store_row(last_rows[i], a.dtype, activated, count);
        if (i + 1 < kGatheredRows && m + 1 < tile.num_rows) continue;
        k.gather_rows(gathered_a.block(tile.expert, slot), pointers, i + 1, tile.column, count);
      } else {
        k.store_row(at(a, slot, tile.column), a.dtype, activated, count);
      }
    }
  }
};

}  // namespace

void moe_forward(const MoeForwardArgs& args, Execution exec) {
  const Kernels& k = kernels();
  const int num_threads = resolve_threads(exec.num_threads);
  const DType dtype = args.x.dtype;
  const int64_t num_experts = args.weights.gate_up_proj.packed.shape[0];
  const int64_t width = ExpertMatrix::rows_of(args.weights.gate_up_proj);
  const int64_t intermediate_size = args.options.gated ? width / 2 : width;
  const int64_t num_tokens = args.x.shape[0], hidden_size = args.x.shape[1];
  const int64_t num_slots = args.topk_ids.shape[0] * args.topk_ids.shape[1];
  const bool gathers = k.gathered_bytes(dtype, hidden_size) > 0;
  const bool sorts_x = !gathers && is_in_panels(args.weights.gate_up_proj.packed);
  const bool sorts_a = !gathers && is_in_panels(args.weights.down_proj.packed);
  const bool spreads_x =
      !sorts_x && !gathers && num_slots > kManyRows * num_experts && hidden_size * size_of(dtype) % 128 == 0;
  const int64_t x_block = k.gathered_bytes(dtype, hidden_size), a_block = k.gathered_bytes(dtype, intermediate_size);
  const int64_t gathered_x_bytes = GatheredRows::bytes(k, dtype, hidden_size, num_slots);
  const int64_t a_blocks = a_block > 0 ? GatheredSlots::most_blocks(num_slots, num_experts) : 0;
  const auto row_bytes = [&](bool sorted, int64_t depth) {
    return spread_row_bytes(sorted ? k.sorted_row_bytes(dtype, depth) : depth * size_of(dtype));
  };
  const int64_t x_bytes = row_bytes(sorts_x, hidden_size), a_bytes = row_bytes(sorts_a, intermediate_size);
  const int64_t copied_tokens = spreads_x || sorts_x ? num_tokens : 0;
  const auto pointers = num_slots * static_cast<int64_t>(sizeof(void*));

  const int64_t a_memory = a_block > 0 ? Workspace::padded(num_experts * 4) + a_blocks * a_block : num_slots * a_bytes;
  Workspace workspace(Slots::bytes(num_slots, num_experts) + 2 * Workspace::padded(pointers) + a_memory +
                      copied_tokens * x_bytes + num_threads * (2 * ProductScratch::kBytes + gathered_x_bytes));
  const Slots slots = make_slots(workspace, args.topk_ids, args.topk_weights, num_experts, exec);
  const int64_t used_slots = slots.expert_offsets[num_experts];
  const void** const x_rows = workspace.take<const void*>(num_slots);
  const void** const a_rows = workspace.take<const void*>(num_slots);
  TensorView a = view(nullptr, dtype, num_slots, intermediate_size);
  GatheredSlots gathered_a;
  if (a_block > 0) {
    int32_t* const first_blocks = workspace.take<int32_t>(num_experts);
    GatheredSlots::number_blocks(first_blocks, slots.expert_offsets, num_experts);
    gathered_a = {static_cast<char*>(workspace.take_bytes(a_blocks * a_block)), a_block, slots.expert_offsets,
                  first_blocks};
  } else {
    a.data = workspace.take_bytes(num_slots * a_bytes);
    a.stride[0] = a_bytes / size_of(dtype);
  }
  TensorView x = args.x;
  if (copied_tokens > 0) {
    x = view(workspace.take_bytes(num_tokens * x_bytes), dtype, num_tokens, hidden_size);
    x.stride[0] = x_bytes / size_of(dtype);
    parallel_for_ranges(num_threads, num_tokens, 16, [&](int64_t begin, int64_t end, int) {
      for (int64_t t = begin; t < end; ++t) {
        const void* const row = row_of(args.x, t);
        if (sorts_x) {
          sort_row(k, row_of(x, t), row, dtype, hidden_size);
        } else {
          std::memcpy(row_of(x, t), row, static_cast<size_t>(hidden_size * size_of(dtype)));
        }
      }
    });
  }
  char* const memory = static_cast<char*>(workspace.take_bytes(2 * num_threads * ProductScratch::kBytes));
  fill_row_pointers(x_rows, x, slots.token_indices, used_slots);
  if (!gathered_a.defined()) fill_row_pointers(a_rows, a, nullptr, used_slots);
  char* const gathered_memory = static_cast<char*>(workspace.take_bytes(num_threads * gathered_x_bytes));
  std::vector<GatheredRows> gathered_x;
  for (int i = 0; i < num_threads; ++i) gathered_x.emplace_back(gathered_memory + i * gathered_x_bytes);

  const std::vector<Tile> tiles = make_tiles(slots.expert_offsets, num_experts, intermediate_size, k.panel, k.most_rows,
                                             x_block > 0 ? TileOrder::kRows : TileOrder::kPanels);
  const FirstProjection first{args, x_rows, a, gathered_a, sorts_a, k};
  parallel_for_shares(num_threads, static_cast<int64_t>(tiles.size()), [&](int64_t i, int thread) {
    char* const own = memory + 2 * thread * ProductScratch::kBytes;
    const Tile* const tile = &tiles[static_cast<size_t>(i)];
    first.run(*tile, tile != &tiles.back() ? first.start(tile[1]) : nullptr,
              {ProductScratch(own), ProductScratch(own + ProductScratch::kBytes)},
              gathered_x[static_cast<size_t>(thread)].of(*tile, k, x_rows, dtype, hidden_size));
  });
  if (args.h.defined()) {
    for (int64_t s = used_slots; s < num_slots; ++s) {
      std::memset(row_of(args.h, s), 0, static_cast<size_t>(args.h.shape[1] * size_of(args.h.dtype)));
    }
  }

  token_sum({.rows = a_rows,
             .gathered = gathered_a,
             .depth = intermediate_size,
             .matrices = &args.weights.down_proj,
             .transposed = false,
             .bias = args.weights.down_bias,
             .slot_weights = slots.weights,
             .expert_offsets = slots.expert_offsets,
             .token_indices = slots.token_indices,
             .out = args.y},
            num_threads);
}

}  // namespace switchgear::cpu
