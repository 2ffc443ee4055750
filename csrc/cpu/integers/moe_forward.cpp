// SPDX-License-Identifier: BSD-3-Clause
// moe_forward with integer weights: y[t] = Σ_k topk_weights[t,k] · (glu(x[t]·W_guᵀ + b_gu)·W_dᵀ + b_d)
//
//   work 6·S·H·I operations for gated experts; traffic: touched weights once per 240 rows of an expert, 1 or 1/2 byte each,
//   and at 4 bits 2/group_size bytes of scales
//   memory-bound below ~20 rows per expert at 8 bits, compute-bound above
//   reached on 2 cores of Zen 5: at 8 bits 90-96 % of a plain read of the weights with one token (50 MB; most of the rest is
//   the call from Python), 79 % of the dots with 64 rows per expert; at 4 bits 88 and 56 %
//
// 1. x [T,H] is rounded to int8, each token once.
// 2. Tiles (expert, columns of a, rows): gate and up products, bias, glu; a [S,I] rounded to the dtype of x.
// 3. a is rounded to int8.
//    An adapter is multiplied by x and a themselves, in the float kernels: u = s·(x·Aᵀ) and v = s·(a·Aᵀ), rounded to the dtype of
//    x, whose products with Bᵀ are added to the sums.
// 4. Tasks (columns of y, tokens) go through the experts in order and add the weighted products, as token_sum does.
// A thread has a contiguous share of the tasks. They are 64 columns wide if experts have many rows, and each product
// prefetches the weights of the thread's next one. With few rows they are as wide as 1 MB of weights, or a thread's share of
// y: bandwidth drops where one stream of loads ends and another begins (by a fifth with 128 KB each).
// Integers are exact and float sums have one order: deterministic, and a token's result does not depend on the other tokens.
#include <cstring>
#include <vector>

#include "cpu/adapter.h"
#include "cpu/gate_columns.h"
#include "cpu/integers/experts.h"
#include "cpu/ops.h"
#include "cpu/slots.h"
#include "cpu/threads.h"

namespace switchgear::cpu {
namespace {

constexpr int64_t kPanel = kIntegerPanel;
constexpr int64_t kTile = kIntegerRows * kPanel;    // floats of one product
constexpr int64_t kLongest = kTile / kFewRows;      // columns of one product of few rows
constexpr int64_t kRunBytes = int64_t{1} << 20;     // weights of one task with few rows: about 20 µs
constexpr int64_t kSumsBytes = int64_t{512} << 10;  // sums of one task: half of a thread's L2

inline int64_t in_panels(int64_t columns) { return ceil_div(columns, kPanel) * kPanel; }

// c = rows · b[..., column, column + columns)ᵀ, in products of the kernel's sizes. `next`: the weights multiplied afterwards.
void multiply_columns(const IntegerKernels& q, IntegerProduct product, const IntegerMatrix& matrix, int64_t column,
                      int64_t columns, const uint8_t* next) {
  const int64_t step = product.num_rows <= kFewRows ? columns : kPanel;
  for (int64_t begin = 0; begin < columns; begin += step, product.c += step) {
    product.b = matrix.from(column + begin);
    product.num_columns = std::min(step, columns - begin);
    product.next = begin + step < columns ? matrix.from(column + begin + step).values : next;
    q.multiply(product);
  }
}

struct FirstProjection {
  const MoeForwardArgs& args;
  IntegerRows x;
  const int32_t* token_indices;
  TensorView a;  // [S,I]
  const Kernels& k;
  const IntegerKernels& q;
  AdapterTerms adapter;

  int64_t first_column(const Tile& tile) const {  // first column of the products
    return args.options.gated && args.options.interleaved ? 2 * tile.column : tile.column;
  }
  const uint8_t* start(const Tile& tile) const {
    return IntegerMatrix(args.weights.gate_up_proj, tile.expert).from(first_column(tile)).values;
  }

  // `columns` of a from tile.column on; `next`: the weights multiplied afterwards; c: 2 · kTile floats, and then a
  // ProductScratch if there is an adapter.
  void run(const Tile& tile, int64_t columns, const uint8_t* next, float* c) const {
    columns = std::min(columns, a.shape[1] - tile.column);
    const int64_t step = tile.num_rows <= kFewRows ? columns : kPanel;
    for (int64_t j = 0; j < columns; j += step) {
      Tile piece = tile, after = tile;
      piece.column += j;
      after.column += j + step;
      multiply(piece, std::min(step, columns - j), j + step < columns ? start(after) : next, c);
    }
  }

  void multiply(const Tile& tile, int64_t columns, const uint8_t* next, float* c) const {
    const bool apart = args.options.gated && !args.options.interleaved;  // gates and ups are separate columns
    const int64_t width = args.options.gated && !apart ? 2 * columns : columns, stride = in_panels(width);
    const int64_t column = first_column(tile);
    const IntegerMatrix matrix(args.weights.gate_up_proj, tile.expert);
    IntegerProduct product{.rows = x,
                           .indices = token_indices + tile.first_row,
                           .num_rows = tile.num_rows,
                           .b = matrix.from(column),
                           .num_columns = width,
                           .c = c,
                           .c_stride = stride};
    if (apart) {
      IntegerProduct ups = product;
      ups.b = matrix.from(a.shape[1] + column);
      ups.c = c + kTile;
      if (tile.num_rows <= kFewRows) {
        q.multiply_pair(product, ups);
      } else {
        multiply_columns(q, product, matrix, column, width, ups.b.values);
        multiply_columns(q, ups, matrix, a.shape[1] + column, width, next);
      }
    } else {
      multiply_columns(q, product, matrix, column, width, next);
    }
    if (adapter.defined()) {
      add_term(tile, column, width, c, stride, c + 2 * kTile);
      if (apart) add_term(tile, a.shape[1] + column, width, c + kTile, stride, c + 2 * kTile);
    }
    for (int64_t m = 0; m < tile.num_rows; ++m) {
      for (int64_t j = 0; j < columns; j += kPanel) {
        float* const row = c + m * stride + (apart ? j : j * (width / columns));
        finish(tile.expert, tile.first_row + m, tile.column + j, std::min(kPanel, columns - j), row,
               apart ? row + kTile : row + kPanel);
      }
    }
  }

  void add_term(const Tile& tile, int64_t column, int64_t columns, float* c, int64_t stride, float* scratch) const {
    adapter.add_to_rows(c, stride, {tile.expert, tile.first_row, tile.num_rows, column, columns},
                        ProductScratch(scratch), k);
  }

  // Up to 64 columns of one row; part0 and part1 are its products.
  void finish(int64_t expert, int64_t slot, int64_t column, int64_t count, float* part0, float* part1) const {
    const GateColumns columns = gate_columns(args.options, a.shape[1], column, count, kPanel);
    float* const part[2] = {part0, part1};
    for (int i = 0; i < 2; ++i) {
      if (columns.count[i] == 0) continue;
      if (args.weights.gate_up_bias.defined()) {
        const void* const bias = at(args.weights.gate_up_bias, expert, columns.begin[i]);
        k.add_scaled_row(part[i], bias, args.weights.gate_up_bias.dtype, 1.0f, columns.count[i]);
      }
      if (args.h.defined()) k.store_row(at(args.h, slot, columns.begin[i]), args.h.dtype, part[i], columns.count[i]);
    }
    GateRow shuffled;
    const auto [gate, up] = split_gate(shuffled, part0, part1, args.options, columns, count);
    float activated[kPanel];
    k.glu_row(activated, gate, up, args.options, count);
    k.store_row(at(a, slot, column), a.dtype, activated, count);
  }
};

struct SecondProjection {
  const MoeForwardArgs& args;
  IntegerRows a;
  const Slots& slots;
  const Kernels& k;
  const IntegerKernels& q;
  AdapterTerms adapter;

  // Columns [column, column + columns) of the tokens [first_token, last_token).
  struct Block {
    int64_t column, columns, first_token, last_token;
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

  int64_t next_expert(const Block& block, int64_t e) const {  // the next one with rows of the block's tokens
    const int64_t num_experts = args.weights.down_proj.num_experts();
    for (++e; e < num_experts; ++e) {
      const auto [first, last] = slots_of(block, e);
      if (first < last) break;
    }
    return e;
  }

  // `sums` has a row of in_panels(columns) for each token; c has 2 · kTile floats, and then a ProductScratch if there is an
  // adapter.
  void run(const Block& block, float* sums, float* c) const {
    const int64_t num_experts = args.weights.down_proj.num_experts(), stride = in_panels(block.columns);
    start_sums(sums, stride, args.sums, block.first_token, block.last_token, block.column, block.columns);
    for (int64_t e = next_expert(block, -1), after; e < num_experts; e = after) {
      after = next_expert(block, e);
      const auto [first, last] = slots_of(block, e);
      for (int64_t s = first; s < last; s += kIntegerRows) {
        const int64_t rows = std::min<int64_t>(kIntegerRows, last - s),
                      step = rows <= kFewRows ? block.columns : kPanel;
        for (int64_t column = 0; column < block.columns; column += step) {
          // The next product has the next columns, the next rows, or the next expert.
          const bool more_columns = column + step < block.columns, more_rows = s + kIntegerRows < last;
          const int64_t expert = more_columns || more_rows ? e : after;
          const uint8_t* const next = expert < num_experts
                                          ? IntegerMatrix(args.weights.down_proj, expert)
                                                .from(block.column + (more_columns ? column + step : 0))
                                                .values
                                          : nullptr;
          add(block, e, {s, s + rows}, column, std::min(step, block.columns - column), next, sums + column, c);
        }
      }
    }
    for (int64_t t = block.first_token; t < block.last_token; ++t) {
      const float* const row = sums + (t - block.first_token) * stride;
      k.store_row(at(args.out(), t, block.column), args.out().dtype, row, block.columns);
    }
  }

  // Adds the weighted products of some slots of expert e, for `columns` columns from block.column + column on.
  void add(const Block& block, int64_t e, Range range, int64_t column, int64_t columns, const uint8_t* next,
           float* sums, float* c) const {
    const int64_t rows = range.last - range.first, stride = in_panels(columns), sums_stride = in_panels(block.columns);
    q.multiply({.rows = a.from(range.first),
                .indices = nullptr,
                .num_rows = rows,
                .b = IntegerMatrix(args.weights.down_proj, e).from(block.column + column),
                .num_columns = columns,
                .c = c,
                .c_stride = stride,
                .next = next});
    if (adapter.defined()) {
      adapter.add_to_rows(c, stride, {e, range.first, rows, block.column + column, columns},
                          ProductScratch(c + 2 * kTile), k);
    }
    for (int64_t m = 0; m < rows; ++m) {
      const int64_t slot = range.first + m;
      float* const row = c + m * stride;
      if (args.weights.down_bias.defined()) {
        const void* const bias = at(args.weights.down_bias, e, block.column + column);
        k.add_scaled_row(row, bias, args.weights.down_bias.dtype, 1.0f, columns);
      }
      k.add_scaled_row(sums + (slots.token_indices[slot] - block.first_token) * sums_stride, row, DType::kFloat32,
                       slots.weights[slot], columns);
    }
  }
};

// How the projections are cut into tasks: columns of each, and tokens of the second.
struct Cut {
  int64_t first_columns, second_columns, tokens;
};

Cut cut(const MoeForwardArgs& args, const int32_t* expert_offsets, int num_threads) {
  const int64_t num_experts = args.weights.down_proj.num_experts(), num_tokens = args.x.shape[0];
  const int64_t hidden_size = args.x.shape[1], intermediate_size = args.weights.down_proj.cols;
  int64_t active = 0;
  for (int64_t e = 0; e < num_experts; ++e) active += expert_offsets[e + 1] > expert_offsets[e];
  // With few rows tasks are long: they read weights in memory order.
  if (active > 0 && expert_offsets[num_experts] <= kFewRows * active && num_tokens * kPanel * 4 <= kSumsBytes) {
    // Several pieces of an expert for each thread; columns of y whose sums fit.
    const auto columns = [](int64_t size, int64_t pieces, int64_t most) {
      return std::max(kPanel, std::min(in_panels(ceil_div(size, pieces)), most / kPanel * kPanel));
    };
    const int64_t bytes =
        args.weights.gate_up_proj.rows * args.weights.gate_up_proj.cols * bits_of(args.weights.gate_up_proj.format) / 8;
    const int64_t pieces = std::max(ceil_div(bytes, kRunBytes), ceil_div(4 * num_threads, active));
    return {columns(intermediate_size, pieces, kLongest),
            columns(hidden_size, num_threads, std::min(kLongest, kSumsBytes / 4 / num_tokens)), num_tokens};
  }
  // 64 columns for about 2048 tokens, fewer tokens if columns alone do not occupy the threads
  const int64_t chunks = std::max<int64_t>(
      {ceil_div(num_tokens, 2048), 1,
       std::min<int64_t>(ceil_div(2 * num_threads, ceil_div(hidden_size, kPanel)), ceil_div(num_tokens, 64))});
  return {kPanel, kPanel, std::max<int64_t>(ceil_div(num_tokens, chunks), 1)};
}

}  // namespace

void integer_moe_forward(const MoeForwardArgs& args, const Context& context) {
  const int num_threads = context.num_threads;
  const int64_t num_experts = args.weights.down_proj.num_experts();
  const int64_t num_tokens = args.x.shape[0], hidden_size = args.x.shape[1];
  const int64_t intermediate_size = args.weights.down_proj.cols;
  const int64_t num_slots = args.topk_ids.shape[0] * args.topk_ids.shape[1];
  const int64_t row_bytes = intermediate_size * size_of(args.x.dtype);
  const Kernels& k = context.kernels;
  const IntegerKernels& q = context.integers;

  Workspace plan_workspace(Slots::bytes(num_slots, num_experts));
  const Slots slots = make_slots(plan_workspace, args.topk_ids, args.topk_weights, num_experts, context);
  const int64_t used_slots = slots.expert_offsets[num_experts];
  const Cut sizes = cut(args, slots.expert_offsets, num_threads);

  const bool has_adapters = args.weights.gate_up_adapter.defined() || args.weights.down_adapter.defined();
  const int64_t product_floats = 2 * kTile + (has_adapters ? ProductScratch::kBytes / 4 : 0);
  const int64_t thread_floats = product_floats + sizes.tokens * sizes.second_columns;
  Workspace workspace(integer_bytes(num_tokens, args.weights.gate_up_proj, q) +
                      Workspace::padded(num_slots * row_bytes) + integer_bytes(num_slots, args.weights.down_proj, q) +
                      ForwardAdapter::bytes(args.weights.gate_up_adapter, num_slots, args.x.dtype) +
                      ForwardAdapter::bytes(args.weights.down_adapter, num_slots, args.x.dtype) +
                      Workspace::padded(num_threads * thread_floats * 4));
  auto* const memory = static_cast<float*>(workspace.take_bytes(num_threads * thread_floats * 4));
  const auto own = [&](int thread) { return memory + thread * thread_floats; };
  const IntegerRows x = quantize_rows(workspace, args.x.data, args.x.stride[0] * size_of(args.x.dtype), args.x.dtype,
                                      num_tokens, args.weights.gate_up_proj, context);
  char* const a = static_cast<char*>(workspace.take_bytes(num_slots * row_bytes));

  const std::vector<Tile> tiles =
      make_tiles(slots.expert_offsets, num_experts, intermediate_size, sizes.first_columns, kIntegerRows);
  const ThreadMemory adapter_memory{reinterpret_cast<char*>(memory + 2 * kTile), thread_floats * 4};
  ForwardAdapter u(args.weights.gate_up_adapter, 0, slots, args.x.dtype, workspace);
  u.multiply(args.x, slots.token_indices, adapter_memory, context);
  const FirstProjection first{
      args, x, slots.token_indices, view(a, args.x.dtype, num_slots, intermediate_size), k, q, u.terms()};
  parallel_for_shares(num_threads, static_cast<int64_t>(tiles.size()), [&](int64_t i, int thread) {
    const auto at = static_cast<size_t>(i);
    const uint8_t* const next = at + 1 < tiles.size() ? first.start(tiles[at + 1]) : nullptr;
    first.run(tiles[at], sizes.first_columns, next, own(thread));
  });
  if (args.h.defined()) zero_tail(args.h, used_slots);
  if (num_tokens == 0) return;

  const IntegerRows integer_a =
      quantize_rows(workspace, a, row_bytes, args.x.dtype, used_slots, args.weights.down_proj, context);
  ForwardAdapter v(args.weights.down_adapter, 1, slots, args.x.dtype, workspace);
  v.multiply(view(a, args.x.dtype, num_slots, intermediate_size), nullptr, adapter_memory, context);
  const SecondProjection second{args, integer_a, slots, k, q, v.terms()};
  const int64_t column_blocks = ceil_div(hidden_size, sizes.second_columns);
  parallel_for_shares(num_threads, ceil_div(num_tokens, sizes.tokens) * column_blocks, [&](int64_t task, int thread) {
    const int64_t column = task % column_blocks * sizes.second_columns;
    const int64_t token = task / column_blocks * sizes.tokens;
    second.run({column, std::min(sizes.second_columns, hidden_size - column), token,
                std::min(num_tokens, token + sizes.tokens)},
               own(thread) + product_floats, own(thread));
  });
}

}  // namespace switchgear::cpu
