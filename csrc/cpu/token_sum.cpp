// SPDX-License-Identifier: BSD-3-Clause
// token_sum: work 2·S·depth·columns flop; traffic: the touched matrices once per token chunk, rows from L2/L3, out once.
//
// A task owns a panel of output columns for a chunk of tokens and walks all experts in order, so the sum over a token's slots
// needs no atomics, no [S, columns] buffer and no barrier, and its order is the same for any number of threads. Its
// accumulators (chunk · panel float32, at most 512 KB) stay in L2.
#include "token_sum.h"

#include "threads.h"
#include "workspace.h"

namespace switchgear::cpu {
namespace {

constexpr int64_t kTokenChunk = 2048;

// Tokens per task: all of a chunk, fewer where the column blocks alone would not fill the threads.
int64_t tokens_per_task(int64_t num_tokens, int64_t column_blocks, int num_threads) {
  const int64_t chunks =
      std::max<int64_t>(ceil_div(num_tokens, kTokenChunk),
                        std::min<int64_t>(ceil_div(2 * num_threads, column_blocks), ceil_div(num_tokens, 64)));
  return ceil_div(num_tokens, std::max<int64_t>(chunks, 1));
}

}  // namespace

void token_sum(const TokenSumArgs& args, int num_threads) {
  const Kernels& k = kernels();
  const int64_t num_tokens = args.out.shape[0], width = args.out.shape[1], panel = k.panel;
  const int64_t num_experts = args.matrices->packed.shape[0];
  if (num_tokens == 0 || width == 0) return;
  const int64_t column_blocks = ceil_div(width, panel);
  const int64_t chunk = tokens_per_task(num_tokens, column_blocks, num_threads);
  const int64_t chunks = ceil_div(num_tokens, chunk);

  const int64_t accumulator_bytes = Workspace::padded(chunk * panel * 4);
  Workspace workspace(num_threads * (ProductScratch::kBytes + accumulator_bytes));
  char* const memory =
      static_cast<char*>(workspace.take_bytes(num_threads * (ProductScratch::kBytes + accumulator_bytes)));

  parallel_for(num_threads, chunks * column_blocks, [&](int64_t task, int thread) {
    char* const own = memory + thread * (ProductScratch::kBytes + accumulator_bytes);
    const ProductScratch scratch(own);
    float* const sums = reinterpret_cast<float*>(own + ProductScratch::kBytes);
    const int64_t column = task % column_blocks * panel, columns = std::min(panel, width - column);
    const int64_t first_token = task / column_blocks * chunk, last_token = std::min(num_tokens, first_token + chunk);
    std::fill(sums, sums + (last_token - first_token) * panel, 0.0f);

    const auto first_slot = [&](int64_t e, int64_t token) {
      const int32_t* const begin = args.token_indices + args.expert_offsets[e];
      const int32_t* const end = args.token_indices + args.expert_offsets[e + 1];
      return std::lower_bound(begin, end, token) - args.token_indices;
    };
    const auto next_expert = [&](int64_t e) {  // the next one with rows of this task's tokens
      while (++e < num_experts && first_slot(e, first_token) == first_slot(e, last_token)) {
      }
      return e;
    };
    const auto operand = [&](int64_t e) {
      const ExpertMatrix matrix(*args.matrices, e, args.panel);
      return args.transposed ? matrix.columns_from(column) : matrix.rows_from(column);
    };
    for (int64_t e = next_expert(-1), next; e < num_experts; e = next) {
      next = next_expert(e);
      const int64_t first = first_slot(e, first_token), last = first_slot(e, last_token);
      for (int64_t s = first; s < last; s += kMaxRows) {
        const int64_t rows = std::min<int64_t>(kMaxRows, last - s);
        k.multiply({.rows = args.rows + s,
                    .row_dtype = args.row_dtype,
                    .num_rows = rows,
                    .b = operand(e),
                    .num_columns = columns,
                    .depth = args.depth,
                    .c = scratch.c,
                    .next = next < num_experts ? operand(next).data : nullptr,
                    .scratch = scratch.packing});
        for (int64_t m = 0; m < rows; ++m) {
          float* const c = scratch.c + m * panel;
          if (args.bias.defined()) k.add_scaled_row(c, at(args.bias, e, column), args.bias.dtype, 1.0f, columns);
          const float weight = args.slot_weights != nullptr ? args.slot_weights[s + m] : 1.0f;
          k.add_scaled_row(sums + (args.token_indices[s + m] - first_token) * panel, c, DType::kFloat32, weight,
                           columns);
        }
      }
    }
    for (int64_t t = first_token; t < last_token; ++t) {
      k.store_row(at(args.out, t, column), args.out.dtype, sums + (t - first_token) * panel, columns);
    }
  });
}

}  // namespace switchgear::cpu
