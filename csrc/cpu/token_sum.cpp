// SPDX-License-Identifier: BSD-3-Clause
// token_sum: work 2·S·depth·columns flop; traffic: the touched matrices once per token chunk, rows from L2/L3, out once.
//
// A task owns one or more panels of output columns for a chunk of tokens and goes through all experts in order. So the sum over
// a token's slots needs no atomics, no [S, columns] buffer and no barrier, and has one order for any number of threads. Its
// accumulators (chunk · columns float32: 512 KB for a panel, 1 MB for 512 columns of x·W) stay in L2.
#include "token_sum.h"

#include "decoded_columns.h"
#include "threads.h"
#include "wide_product.h"
#include "workspace.h"

namespace switchgear::cpu {
namespace {

constexpr int64_t kTokenChunk = 2048, kWideTokenChunk = 512;
constexpr int64_t kMostGatheredColumns = 256, kSumsBytes = 1 << 20;

// Tokens per task: a whole chunk, or fewer if the column blocks alone do not occupy the threads. Tasks of fewer tokens read the
// weights again.
int64_t tokens_per_task(int64_t num_tokens, int64_t most, int64_t column_blocks, int num_threads) {
  int64_t chunks = ceil_div(num_tokens, most);
  const int64_t tasks = chunks * column_blocks;
  if (tasks < 2 * num_threads && tasks % num_threads != 0)
    chunks = std::max(chunks, std::min(ceil_div(2 * num_threads, column_blocks), ceil_div(num_tokens, 64)));
  return ceil_div(num_tokens, std::max<int64_t>(chunks, 1));
}

// Columns per task for gathered rows. Each task reads all rows from L3, which wide products hide: as many columns as keep the
// sums in L2 and leave tasks for all threads.
int64_t gathered_columns(int64_t num_tokens, int64_t width, int64_t panel, int num_threads) {
  int64_t wide = kMostGatheredColumns;
  while (wide > panel &&
         (std::min(num_tokens, kTokenChunk) * wide * 4 > kSumsBytes || ceil_div(width, wide) < 2 * num_threads))
    wide /= 2;
  return wide;
}

// Columns per task, at most `most`, so that there are tasks for all threads.
int64_t row_columns(const Weight& matrices, int64_t num_tokens, int64_t width, int64_t most, int64_t panel,
                    int num_threads) {
  const int64_t least = matrices.format == Format::kPanels ? panel : std::min(panel, kFewestColumns);
  return columns_for(most, least, num_threads,
                     [&](int64_t columns) { return ceil_div(num_tokens, kTokenChunk) * ceil_div(width, columns); });
}

}  // namespace

void token_sum(const TokenSumArgs& args, const Context& context) {
  const Kernels& k = context.kernels;
  const int num_threads = context.num_threads;
  const int64_t num_tokens = args.out.shape[0], width = args.out.shape[1], panel = k.panel;
  const int64_t num_experts = args.matrices->num_experts();
  if (num_tokens == 0 || width == 0) return;
  const bool few_rows = has_few_rows(args.expert_offsets, num_experts);
  const DType dtype = args.dtype;
  const bool decodes = args.transposed && !in_place(*args.matrices, dtype, k);
  // Columns that each product decodes again pay for few products: those of many tokens are as narrow as decoded ones.
  const bool is_narrow =
      decodes || (args.transposed && args.matrices->format != Format::kPlain && num_tokens > kWideTokenChunk);
  const int64_t many = args.gathered.defined() ? gathered_columns(num_tokens, width, panel, num_threads) : panel;
  const int64_t most = few_rows ? 2 * panel : many;  // few rows: longer runs of memory
  const int64_t wide = is_narrow ? kDecodedColumns
                       : args.transposed
                           ? wide_columns(width, ceil_div(num_tokens, kWideTokenChunk), panel, num_threads)
                           : row_columns(*args.matrices, num_tokens, width, most, panel, num_threads);
  const int64_t column_blocks = ceil_div(width, wide);
  const int64_t most_tokens = args.transposed && !is_narrow ? kWideTokenChunk : kTokenChunk;
  const int64_t chunk = tokens_per_task(num_tokens, most_tokens, column_blocks, num_threads);
  const int64_t chunks = ceil_div(num_tokens, chunk);

  const int64_t accumulator_bytes = Workspace::padded(chunk * wide * 4);
  const int64_t adapter_bytes = args.adapter.defined() ? ProductScratch::kBytes : 0;
  const int64_t decoded_bytes = decodes ? DecodedColumns::bytes(*args.matrices, dtype, k) : 0;
  const int64_t thread_bytes = WideScratch::kBytes + accumulator_bytes + adapter_bytes + decoded_bytes;
  Workspace workspace(num_threads * thread_bytes);
  char* const memory = static_cast<char*>(workspace.take_bytes(num_threads * thread_bytes));

  std::vector<DecodedColumns> decoded;
  for (int i = 0; i < num_threads && decodes; ++i) {
    decoded.emplace_back(*args.matrices, dtype, memory + (i + 1) * thread_bytes - decoded_bytes);
  }

  struct Block {
    int64_t column, columns, first_token, last_token;
  };
  const auto block_of = [&](int64_t task) {
    const int64_t column = task % column_blocks * wide, first_token = task / column_blocks * chunk;
    return Block{column, std::min(wide, width - column), first_token, std::min(num_tokens, first_token + chunk)};
  };
  const auto first_slot = [&](int64_t e, int64_t token) {
    const int32_t* const begin = args.token_indices + args.expert_offsets[e];
    const int32_t* const end = args.token_indices + args.expert_offsets[e + 1];
    return std::lower_bound(begin, end, token) - args.token_indices;
  };
  const auto has_rows = [&](const Block& block, int64_t e) {
    // Most experts of a short batch are empty; they need no search.
    return args.expert_offsets[e] < args.expert_offsets[e + 1] &&
           first_slot(e, block.first_token) < first_slot(e, block.last_token);
  };
  const auto next_expert = [&](const Block& block, int64_t e) {
    while (++e < num_experts && !has_rows(block, e)) {
    }
    return e;
  };
  const auto operand = [&](const Block& block, int64_t e) {
    if (args.transposed) return columns_in_place(*args.matrices, e, block.column, dtype);
    return ExpertMatrix(*args.matrices, e, dtype).rows_from(block.column);
  };
  const auto start = [&](const Block& block, int64_t e) {
    return e < num_experts && !decodes ? operand(block, e).start() : Start{};
  };

  const auto work = [&](int64_t task) {
    const Block block = block_of(task);
    TaskWork sum;
    for (int64_t e = next_expert(block, -1); e < num_experts; e = next_expert(block, e)) {
      sum.rows += first_slot(e, block.last_token) - first_slot(e, block.first_token);
      sum.bytes += bytes_of(ExpertMatrix(*args.matrices, e, dtype).rows_from(0), block.columns, args.depth);
    }
    return sum;
  };
  const auto run_block = [&](int64_t task, int thread) {
    char* const own = memory + thread * thread_bytes;
    const WideScratch scratch(own);
    char* const adapter_scratch = own + WideScratch::kBytes + accumulator_bytes;
    float* const sums = reinterpret_cast<float*>(own + WideScratch::kBytes);
    const Block block = block_of(task);
    const auto [column, columns, first_token, last_token] = block;
    start_sums(sums, wide, args.accumulate ? args.out : TensorView{}, first_token, last_token, column, columns);
    for (int64_t e = next_expert(block, -1), next; e < num_experts; e = next) {
      next = next_expert(block, e);
      const int64_t first = first_slot(e, first_token), last = first_slot(e, last_token),
                    piece = piece_rows(last - first, k.most_rows);
      Start next_start = start(block, next);
      if (next == num_experts && task + 1 < chunks * column_blocks) {
        const Block next_block = block_of(task + 1);
        next_start = start(next_block, next_expert(next_block, -1));
      }
      const Matrix b =
          decodes ? decoded[static_cast<size_t>(thread)].of(e, column, columns, context) : operand(block, e);
      const int64_t begin = args.gathered.defined() ? args.gathered.block_begin(e, first) : first;
      for (int64_t s = begin; s < last; s += piece) {
        const int64_t rows = std::min(piece, last - s);
        const Product product{.rows = args.rows + s,
                              .num_rows = rows,
                              .b = b,
                              .num_columns = columns,
                              .depth = args.depth,
                              .c = scratch.c,
                              .next = s + piece < last ? b.start() : next_start,
                              .scratch = scratch.packing,
                              .sorted_rows = args.sorted.has(args.expert_offsets, e),
                              .rows_are_widened = args.are_widened,
                              .gathered = args.gathered.defined() ? args.gathered.block(e, s) : nullptr};
        const AdapterTerms::Columns term{e, s, rows, column, columns};
        if (args.adapter.defined()) args.adapter.prefetch(term);
        args.transposed ? multiply_wide(k, product) : dot_products_wide(k, product);
        if (args.adapter.defined()) args.adapter.add(scratch.c, term, ProductScratch(adapter_scratch), k);
        for (int64_t first_column = 0; first_column < columns; first_column += panel) {
          const int64_t count = std::min(panel, columns - first_column);
          for (int64_t m = std::max<int64_t>(first - s, 0); m < rows; ++m) {  // a block may begin before the first
            float* const c = scratch.c + first_column * rows + m * panel;
            float* const sum = sums + (args.token_indices[s + m] - first_token) * wide + first_column;
            if (args.bias.defined()) {
              k.add_scaled_row(c, at(args.bias, e, column + first_column), args.bias.dtype, 1.0f, count);
            }
            k.add_scaled_row(sum, c, DType::kFloat32, args.slot_weights != nullptr ? args.slot_weights[s + m] : 1.0f,
                             count);
          }
        }
      }
    }
    for (int64_t t = first_token; t < last_token; ++t) {
      k.store_row(at(args.out, t, column), args.out.dtype, sums + (t - first_token) * wide, columns);
    }
  };
  parallel_for_shares(num_threads, chunks * column_blocks, run_block,
                      Loop{args.transposed ? "gradient of x" : "second projection", work});
}

}  // namespace switchgear::cpu
