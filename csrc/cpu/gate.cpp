// SPDX-License-Identifier: BSD-3-Clause
// gate: router_logits[t] = x[t]·weightᵀ + bias, the product of a linear router, and of any other linear.
//
//   x [T,H]   weight [E,H]   router_logits [T,E]
//   work 2·T·H·E flop; traffic: the weight once per piece of rows, from L2 or L3 after the first; x once per piece of columns
//   memory-bound below ~20 tokens, compute-bound above; with few experts (E = 8) reading x binds
//
// dot_products has one order of sums for any number of rows and columns, so a token's logits have the same bits alone and in
// any batch. Many tokens are split among threads by rows, few by columns. x is widened, piece by piece, for a weight in float32.
// A wide matrix is that of the only expert of grouped_gemm, which has the same order of sums.
#include <algorithm>
#include <limits>

#include "layer_rows.h"
#include "ops.h"
#include "threads.h"
#include "workspace.h"

namespace switchgear::cpu {
namespace {

constexpr int64_t kPieceRows = 48;  // per piece: 8 tiles, so that the weight is mostly read from L2
constexpr int64_t kMostRows = 144;  // at H = 2048 and in bfloat16 they stay in L2 for all panels of the weight
constexpr int64_t kColumnStep = 4;  // columns of a tile
constexpr int64_t kRouterColumns = 512;

// How the logits are cut into pieces.
struct Pieces {
  int64_t rows, columns;  // of a piece
  int64_t down, across;   // numbers of pieces
  int num_threads;

  Pieces(int64_t num_tokens, int64_t num_experts, int64_t depth, int64_t most_rows, int threads) {
    num_threads = useful_threads(num_tokens * num_experts * depth, threads);
    down = ceil_div(num_tokens, most_rows);
    if (num_tokens >= kPieceRows * num_threads) down = ceil_div(down, num_threads) * num_threads;  // equal shares
    rows = piece_rows(num_tokens, ceil_div(num_tokens, down));
    down = ceil_div(num_tokens, rows);
    const int64_t shares = ceil_div(num_threads, down);
    columns = ceil_div(ceil_div(num_experts, shares), kColumnStep) * kColumnStep;
    across = ceil_div(num_experts, columns);
  }
};

bool is_wide(const GateArgs& args, const Kernels& k) {
  const int64_t least = k.packing_rows(args.x.dtype) > 0 ? kCopiedColumns : kRouterColumns + 1;
  const bool has_offsets = args.x.shape[0] <= std::numeric_limits<int32_t>::max();
  return args.weight.shape[0] >= least && args.weight.dtype == args.x.dtype && has_offsets;
}

void multiply_wide(const GateArgs& args, const Context& context) {
  const int64_t end = args.x.shape[0];
  int32_t offsets[2] = {0, static_cast<int32_t>(end)};
  const auto stacked = [](const TensorView& t) {  // of one expert
    TensorView all = t;
    all.ndim = t.ndim + 1;
    for (int i = t.ndim; i > 0; --i) all.shape[i] = t.shape[i - 1], all.stride[i] = t.stride[i - 1];
    all.shape[0] = 1;
    return all;
  };
  grouped_gemm({.x = args.x,
                .weight = {.data = stacked(args.weight)},
                .bias = args.bias.defined() ? stacked(args.bias) : TensorView{},
                .expert_offsets = view(offsets, DType::kInt32, 2),
                .out = args.router_logits},
               context);
}

}  // namespace

void gate(const GateArgs& args, const Context& context) {
  const Kernels& k = context.kernels;
  const TensorView &x = args.x, &weight = args.weight, &logits = args.router_logits;
  const int64_t num_tokens = x.shape[0], depth = x.shape[1], num_experts = weight.shape[0], panel = k.panel;
  if (num_tokens == 0) return;
  if (is_wide(args, k)) return multiply_wide(args, context);
  const bool widens = x.dtype != weight.dtype;
  const Pieces pieces(num_tokens, num_experts, depth, widens ? kPieceRows : kMostRows, context.num_threads);

  const int64_t pointer_bytes = Workspace::padded(pieces.rows * static_cast<int64_t>(sizeof(void*)));
  const int64_t row_bytes = widens ? spread_row_bytes(depth * 4) : 0;
  const int64_t thread_bytes = ProductScratch::kBytes + pointer_bytes + pieces.rows * row_bytes;
  Workspace workspace(pieces.num_threads * thread_bytes);
  char* const memory = static_cast<char*>(workspace.take_bytes(pieces.num_threads * thread_bytes));

  parallel_for(pieces.num_threads, pieces.down * pieces.across, [&](int64_t task, int thread) {
    char* const own = memory + thread * thread_bytes;
    const ProductScratch scratch(own);
    const void** const rows = reinterpret_cast<const void**>(own + ProductScratch::kBytes);
    char* const widened = own + ProductScratch::kBytes + pointer_bytes;
    const int64_t first_row = task / pieces.across * pieces.rows, first_column = task % pieces.across * pieces.columns;
    const int64_t num_rows = std::min(pieces.rows, num_tokens - first_row);
    const int64_t end = std::min(first_column + pieces.columns, num_experts);
    for (int64_t m = 0; m < num_rows; ++m) {
      rows[m] = row_of(x, first_row + m);
      if (!widens) continue;
      float* const row = reinterpret_cast<float*>(widened + m * row_bytes);
      k.load_row(row, rows[m], x.dtype, depth);
      rows[m] = row;
    }
    for (int64_t column = first_column; column < end; column += panel) {
      const int64_t columns = std::min(panel, end - column), next = column + panel;
      k.dot_products(
          {.rows = rows,
           .num_rows = num_rows,
           .b = {.data = row_of(weight, column), .dtype = weight.dtype, .n_stride = weight.stride[0], .k_stride = 1},
           .num_columns = columns,
           .depth = depth,
           .c = scratch.c,
           .next = {.data = next < end ? row_of(weight, next) : nullptr},
           .scratch = scratch.packing});
      for (int64_t m = 0; m < num_rows; ++m) {
        float* const c = scratch.c + m * panel;
        if (args.bias.defined()) k.add_scaled_row(c, offset(args.bias, column), args.bias.dtype, 1.0f, columns);
        k.store_row(at(logits, first_row + m, column), logits.dtype, c, columns);
      }
    }
  });
}

}  // namespace switchgear::cpu
