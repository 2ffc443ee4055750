// SPDX-License-Identifier: BSD-3-Clause
// quantized_moe_forward: y[t] = Σ_k topk_weights[t,k] · (glu(x[t]·W_guᵀ + b_gu)·W_dᵀ + b_d), weights in 8 or 4 bits
//
//   work 6·S·H·I operations for gated experts; traffic: touched weights once per 240 rows of an expert, 1 or 1/2 byte each,
//   and 2/group_size bytes for a scale of 4 bits
//   memory-bound below ~20 rows per expert at 8 bits, compute-bound above
//
// 1. x [T,H] in int8, each token once.
// 2. Tiles (expert, 64 columns of a, rows): gate and up products, bias, glu; a [S,I] rounded to the dtype of x.
// 3. a in int8.
// 4. Tasks (64 columns of y, tokens) walk the experts in order and add the weighted products up, as token_sum does.
// Integers are exact and float sums have one order: deterministic, and a token's result does not depend on the other tokens.
#include <cstring>
#include <vector>

#include "cpu/gate.h"
#include "cpu/ops.h"
#include "cpu/quantized/experts.h"
#include "cpu/slots.h"
#include "cpu/threads.h"

namespace switchgear::cpu {
namespace {

constexpr int64_t kPanel = kQuantizedPanel;
constexpr int64_t kTile = kMaxRows * kPanel;  // floats of one product

struct FirstProjection {
  const QuantizedMoeForwardArgs& args;
  QuantizedRows x;
  const int32_t* token_indices;
  TensorView a;  // [S,I]
  const Kernels& k;
  const QuantizedKernels& q;

  // The first weights that a tile reads.
  const uint8_t* start(const Tile& tile) const {
    const GateColumns columns = gate_columns(args.options, a.shape[1], tile.column, 1, kPanel);
    return QuantizedMatrix(args.gate_up_proj, tile.expert).from(columns.begin[0]).values;
  }

  void run(const Tile& tile, const uint8_t* next, float* c) const {
    const int64_t intermediate_size = a.shape[1];
    const int64_t count = std::min(kPanel, intermediate_size - tile.column);
    const GateColumns columns = gate_columns(args.options, intermediate_size, tile.column, count, kPanel);
    const QuantizedMatrix matrix(args.gate_up_proj, tile.expert);
    for (int i = 0; i < 2; ++i) {
      if (columns.count[i] == 0) continue;
      q.multiply({.rows = x,
                  .indices = token_indices + tile.first_row,
                  .num_rows = tile.num_rows,
                  .b = matrix.from(columns.begin[i]),
                  .num_columns = columns.count[i],
                  .c = c + i * kTile,
                  .next = i == 0 && columns.count[1] > 0 ? matrix.from(columns.begin[1]).values : next});
    }
    for (int64_t m = 0; m < tile.num_rows; ++m) {
      float* const part[2] = {c + m * kPanel, c + kTile + m * kPanel};
      const int64_t slot = tile.first_row + m;
      for (int i = 0; i < 2; ++i) {
        if (args.gate_up_bias.defined()) {
          const void* const bias = at(args.gate_up_bias, tile.expert, columns.begin[i]);
          k.add_scaled_row(part[i], bias, args.gate_up_bias.dtype, 1.0f, columns.count[i]);
        }
        if (args.h.defined()) k.store_row(at(args.h, slot, columns.begin[i]), args.h.dtype, part[i], columns.count[i]);
      }
      GateRow shuffled;
      const auto [gate, up] = split_gate(shuffled, part[0], part[1], args.options, columns, count);
      float activated[kPanel];
      k.glu_row(activated, gate, up, args.options, count);
      k.store_row(at(a, slot, tile.column), a.dtype, activated, count);
    }
  }
};

struct SecondProjection {
  const QuantizedMoeForwardArgs& args;
  QuantizedRows a;
  const Slots& slots;
  const Kernels& k;
  const QuantizedKernels& q;

  // Columns [column, column + 64) of the tokens [first_token, last_token).
  struct Block {
    int64_t column, first_token, last_token;
  };
  struct Range {  // slots
    int64_t first, last;
  };

  Range slots_of(const Block& block, int64_t e) const {
    const int32_t* const begin = slots.token_indices + slots.expert_offsets[e];
    const int32_t* const end = slots.token_indices + slots.expert_offsets[e + 1];
    if (begin == end) return {};
    return {std::lower_bound(begin, end, block.first_token) - slots.token_indices,
            std::lower_bound(begin, end, block.last_token) - slots.token_indices};
  }

  int64_t next_expert(const Block& block, int64_t e) const {  // the next one with rows of its tokens
    const int64_t num_experts = args.down_proj.values.shape[0];
    for (++e; e < num_experts; ++e) {
      const auto [first, last] = slots_of(block, e);
      if (first < last) break;
    }
    return e;
  }

  // The weights of expert e that a block reads; null past the last expert.
  const uint8_t* start(const Block& block, int64_t e) const {
    if (e == args.down_proj.values.shape[0]) return nullptr;
    return QuantizedMatrix(args.down_proj, e).from(block.column).values;
  }

  // `next`: what is read after this block; `sums` has a row of 64 for each token.
  void run(const Block& block, const uint8_t* next, float* sums, float* c) const {
    const auto [column, first_token, last_token] = block;
    const int64_t num_experts = args.down_proj.values.shape[0];
    const int64_t columns = std::min(kPanel, args.y.shape[1] - column);
    std::fill(sums, sums + (last_token - first_token) * kPanel, 0.0f);
    for (int64_t e = next_expert(block, -1), after; e < num_experts; e = after) {
      after = next_expert(block, e);
      const auto [first, last] = slots_of(block, e);
      for (int64_t s = first; s < last; s += kMaxRows) {
        const int64_t rows = std::min<int64_t>(kMaxRows, last - s);
        const QuantizedRows from{a.values + s * a.stride, a.stride, a.scales + s,
                                 a.corrections + s * args.down_proj.scales.shape[2]};
        q.multiply({.rows = from,
                    .indices = nullptr,
                    .num_rows = rows,
                    .b = QuantizedMatrix(args.down_proj, e).from(column),
                    .num_columns = columns,
                    .c = c,
                    .next = after < num_experts ? start(block, after) : next});
        for (int64_t m = 0; m < rows; ++m) {
          float* const row = c + m * kPanel;
          if (args.down_bias.defined()) {
            k.add_scaled_row(row, at(args.down_bias, e, column), args.down_bias.dtype, 1.0f, columns);
          }
          k.add_scaled_row(sums + (slots.token_indices[s + m] - first_token) * kPanel, row, DType::kFloat32,
                           slots.weights[s + m], columns);
        }
      }
    }
    for (int64_t t = first_token; t < last_token; ++t) {
      k.store_row(at(args.y, t, column), args.y.dtype, sums + (t - first_token) * kPanel, columns);
    }
  }
};

}  // namespace

void quantized_moe_forward(const QuantizedMoeForwardArgs& args, Execution exec) {
  const int num_threads = resolve_threads(exec.num_threads);
  const int64_t num_experts = args.down_proj.values.shape[0];
  const int64_t num_tokens = args.x.shape[0], hidden_size = args.x.shape[1];
  const int64_t intermediate_size = args.down_proj.cols;
  const int64_t num_slots = args.topk_ids.shape[0] * args.topk_ids.shape[1];
  const int64_t row_bytes = intermediate_size * size_of(args.x.dtype);

  // A task of the second projection: 64 columns for some 2048 tokens, fewer where columns alone would not fill the threads.
  const int64_t column_blocks = ceil_div(hidden_size, kPanel);
  const int64_t chunks =
      std::max<int64_t>({ceil_div(num_tokens, 2048), 1,
                         std::min<int64_t>(ceil_div(2 * num_threads, column_blocks), ceil_div(num_tokens, 64))});
  const int64_t chunk = std::max<int64_t>(ceil_div(num_tokens, chunks), 1);
  const int64_t thread_floats = 2 * kTile + chunk * kPanel;

  Workspace workspace(Slots::bytes(num_slots, num_experts) + quantized_bytes(num_tokens, args.gate_up_proj) +
                      Workspace::padded(num_slots * row_bytes) + quantized_bytes(num_slots, args.down_proj) +
                      Workspace::padded(num_threads * thread_floats * 4));
  const Slots slots = make_slots(workspace, args.topk_ids, args.topk_weights, num_experts, exec);
  const int64_t used_slots = slots.expert_offsets[num_experts];
  const Kernels& k = kernels();
  const QuantizedKernels& q = quantized_kernels();
  const QuantizedRows x = quantize_rows(workspace, args.x.data, args.x.stride[0] * size_of(args.x.dtype), args.x.dtype,
                                        num_tokens, args.gate_up_proj, num_threads);
  char* const a = static_cast<char*>(workspace.take_bytes(num_slots * row_bytes));

  const std::vector<Tile> tiles = make_tiles(slots.expert_offsets, num_experts, intermediate_size, kPanel);
  const FirstProjection first{args, x, slots.token_indices, view(a, args.x.dtype, num_slots, intermediate_size), k, q};
  float* memory = nullptr;
  const auto own = [&](int thread) { return memory + thread * thread_floats; };
  const QuantizedRows quantized_a = [&] {
    // taken before the rows of a, whose number is known only now
    memory = static_cast<float*>(workspace.take_bytes(num_threads * thread_floats * 4));
    const auto num_tiles = static_cast<int64_t>(tiles.size());
    parallel_for_ahead(num_threads, num_tiles, [&](int64_t i, int64_t next, int thread) {
      const uint8_t* const start = next >= 0 ? first.start(tiles[static_cast<size_t>(next)]) : nullptr;
      first.run(tiles[static_cast<size_t>(i)], start, own(thread));
    });
    return quantize_rows(workspace, a, row_bytes, args.x.dtype, used_slots, args.down_proj, num_threads);
  }();
  if (args.h.defined()) {
    for (int64_t s = used_slots; s < num_slots; ++s) {
      std::memset(row_of(args.h, s), 0, static_cast<size_t>(args.h.shape[1] * size_of(args.h.dtype)));
    }
  }
  if (num_tokens == 0) return;

  const SecondProjection second{args, quantized_a, slots, k, q};
  const auto block_of = [&](int64_t task) {
    const int64_t first_token = task / column_blocks * chunk;
    return SecondProjection::Block{task % column_blocks * kPanel, first_token,
                                   std::min(num_tokens, first_token + chunk)};
  };
  parallel_for_ahead(num_threads, ceil_div(num_tokens, chunk) * column_blocks,
                     [&](int64_t task, int64_t next, int thread) {
                       const uint8_t* start = nullptr;
                       if (next >= 0) start = second.start(block_of(next), second.next_expert(block_of(next), -1));
                       second.run(block_of(task), start, own(thread) + 2 * kTile, own(thread));
                     });
}

}  // namespace switchgear::cpu
