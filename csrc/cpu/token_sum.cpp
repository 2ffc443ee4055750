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

// A task: columns [column, column + columns) of tokens [first_token, last_token).
struct Block {
  int64_t column, columns, first_token, last_token;
};

// How a call is cut into tasks: chunks of tokens, and those into blocks of columns.
struct Cut {
  int64_t num_tokens, width;
  int64_t wide, chunk;  // columns and tokens of a block

  int64_t column_blocks() const { return ceil_div(width, wide); }
  int64_t num_tasks() const { return ceil_div(num_tokens, chunk) * column_blocks(); }
  Block block(int64_t task) const {
    const int64_t column = task % column_blocks() * wide, first_token = task / column_blocks() * chunk;
    return {column, std::min(wide, width - column), first_token, std::min(num_tokens, first_token + chunk)};
  }
};

Cut make_cut(const TokenSumArgs& args, bool decodes, const Context& context) {
  const int64_t num_tokens = args.out.shape[0], width = args.out.shape[1], panel = context.kernels.panel;
  const int num_threads = context.num_threads;
  int64_t wide = kDecodedColumns, most_tokens = kTokenChunk;
  if (!args.transposed) {
    const bool few_rows = has_few_rows(args.expert_offsets, args.matrices->num_experts());
    const int64_t most = few_rows                  ? 2 * panel  // longer runs of memory
                         : args.gathered.defined() ? gathered_columns(num_tokens, width, panel, num_threads)
                                                   : panel;
    wide = row_columns(*args.matrices, num_tokens, width, most, panel, num_threads);
  } else if (!decodes && (args.matrices->format == Format::kPlain || num_tokens <= kWideTokenChunk)) {
    // Columns that each product decodes again pay for few products: those of many tokens are as narrow as decoded ones.
    most_tokens = kWideTokenChunk;
    wide = wide_columns(width, ceil_div(num_tokens, kWideTokenChunk), panel, num_threads);
  }
  return {num_tokens, width, wide, tokens_per_task(num_tokens, most_tokens, ceil_div(width, wide), num_threads)};
}

// One call. Its methods are those of tasks, and run on any thread.
class TokenSum {
 public:
  TokenSum(const TokenSumArgs& args, const Context& context)
      : args_(args),
        context_(context),
        num_experts_(args.matrices->num_experts()),
        decodes_(args.transposed && !in_place(*args.matrices, args.dtype, context.kernels)),
        cut_(make_cut(args, decodes_, context)),
        adapter_at_(kSumsAt + Workspace::padded(cut_.chunk * cut_.wide * 4)),
        decoded_at_(adapter_at_ + (args.adapter.defined() ? ProductScratch::kBytes : 0)),
        thread_bytes_(decoded_at_ +
                      (decodes_ ? DecodedColumns::bytes(*args.matrices, args.dtype, context.kernels) : 0)),
        workspace_(context.num_threads * thread_bytes_),
        memory_(static_cast<char*>(workspace_.take_bytes(context.num_threads * thread_bytes_))) {
    for (int i = 0; i < context.num_threads && decodes_; ++i) {
      decoded_.emplace_back(*args.matrices, args.dtype, memory_ + i * thread_bytes_ + decoded_at_);
    }
  }

  int64_t num_tasks() const { return cut_.num_tasks(); }

  TaskWork work(int64_t task) const {
    const Block block = cut_.block(task);
    TaskWork sum;
    for (int64_t e = next_expert(block, -1); e < num_experts_; e = next_expert(block, e)) {
      sum.rows += first_slot(e, block.last_token) - first_slot(e, block.first_token);
      sum.bytes += bytes_of(ExpertMatrix(*args_.matrices, e, args_.dtype).rows_from(0), block.columns, args_.depth);
    }
    return sum;
  }

  void run(int64_t task, int thread) {
    const Block block = cut_.block(task);
    float* const sums = reinterpret_cast<float*>(memory_of(thread) + kSumsAt);
    start_sums(sums, cut_.wide, args_.accumulate ? args_.out : TensorView{}, block.first_token, block.last_token,
               block.column, block.columns);
    for (int64_t e = next_expert(block, -1), next; e < num_experts_; e = next) {
      next = next_expert(block, e);
      add_expert(block, e, next < num_experts_ ? start(block, next) : start_of_task(task + 1), thread);
    }
    for (int64_t t = block.first_token; t < block.last_token; ++t) {
      context_.kernels.store_row(at(args_.out, t, block.column), args_.out.dtype,
                                 sums + (t - block.first_token) * cut_.wide, block.columns);
    }
  }

 private:
  // A thread's memory: WideScratch, the sums of a block, an adapter's ProductScratch, and decoded columns.
  static constexpr int64_t kSumsAt = WideScratch::kBytes;
  char* memory_of(int thread) const { return memory_ + thread * thread_bytes_; }

  int64_t first_slot(int64_t e, int64_t token) const {
    const int32_t* const begin = args_.token_indices + args_.expert_offsets[e];
    const int32_t* const end = args_.token_indices + args_.expert_offsets[e + 1];
    return std::lower_bound(begin, end, token) - args_.token_indices;
  }
  bool has_rows(const Block& block, int64_t e) const {
    // Most experts of a short batch are empty; they need no search.
    return args_.expert_offsets[e] < args_.expert_offsets[e + 1] &&
           first_slot(e, block.first_token) < first_slot(e, block.last_token);
  }
  int64_t next_expert(const Block& block, int64_t e) const {
    while (++e < num_experts_ && !has_rows(block, e)) {
    }
    return e;
  }

  Matrix operand(const Block& block, int64_t e) const {
    if (args_.transposed) return columns_in_place(*args_.matrices, e, block.column, args_.dtype);
    return ExpertMatrix(*args_.matrices, e, args_.dtype).rows_from(block.column);
  }
  Start start(const Block& block, int64_t e) const {
    return e < num_experts_ && !decodes_ ? operand(block, e).start() : Start{};
  }
  Start start_of_task(int64_t task) const {
    if (task >= num_tasks()) return {};
    const Block block = cut_.block(task);
    return start(block, next_expert(block, -1));
  }

  // Adds the rows of an expert to the sums of a block; `next` is read afterwards.
  void add_expert(const Block& block, int64_t e, const Start& next, int thread) {
    const Kernels& k = context_.kernels;
    char* const own = memory_of(thread);
    const WideScratch scratch(own);
    const auto [column, columns, first_token, last_token] = block;
    const int64_t first = first_slot(e, first_token), last = first_slot(e, last_token),
                  piece = piece_rows(last - first, k.most_rows);
    const Matrix b =
        decodes_ ? decoded_[static_cast<size_t>(thread)].of(e, column, columns, context_) : operand(block, e);
    const int64_t begin = args_.gathered.defined() ? args_.gathered.block_begin(e, first) : first;
    for (int64_t s = begin; s < last; s += piece) {
      const int64_t rows = std::min(piece, last - s);
      const Product product{.rows = args_.rows + s,
                            .num_rows = rows,
                            .b = b,
                            .num_columns = columns,
                            .depth = args_.depth,
                            .c = scratch.c,
                            .next = s + piece < last ? b.start() : next,
                            .scratch = scratch.packing,
                            .sorted_rows = args_.sorted.has(args_.expert_offsets, e),
                            .rows_are_widened = args_.are_widened,
                            .gathered = args_.gathered.defined() ? args_.gathered.block(e, s) : nullptr};
      const TermColumns term{e, s, rows, column, columns};
      if (args_.adapter.defined()) args_.adapter.prefetch(term);
      args_.transposed ? multiply_wide(k, product) : dot_products_wide(context_, product);
      if (args_.adapter.defined()) args_.adapter.add(scratch.c, term, ProductScratch(own + adapter_at_), k);
      add_rows(block, e, s, std::max<int64_t>(first - s, 0), rows, thread);  // the first block may begin before `first`
    }
  }

  // Adds rows [begin, end) of the product of slots from s on to the sums of their tokens.
  void add_rows(const Block& block, int64_t e, int64_t s, int64_t begin, int64_t end, int thread) const {
    const Kernels& k = context_.kernels;
    const int64_t panel = k.panel;
    char* const own = memory_of(thread);
    for (int64_t first_column = 0; first_column < block.columns; first_column += panel) {
      const int64_t count = std::min(panel, block.columns - first_column);
      for (int64_t m = begin; m < end; ++m) {
        float* const c = WideScratch(own).c + first_column * end + m * panel;
        float* const sum = reinterpret_cast<float*>(own + kSumsAt) +
                           (args_.token_indices[s + m] - block.first_token) * cut_.wide + first_column;
        if (args_.bias.defined()) {
          k.add_scaled_row(c, at(args_.bias, e, block.column + first_column), args_.bias.dtype, 1.0f, count);
        }
        k.add_scaled_row(sum, c, DType::kFloat32, args_.slot_weights != nullptr ? args_.slot_weights[s + m] : 1.0f,
                         count);
      }
    }
  }

  const TokenSumArgs& args_;
  const Context& context_;
  int64_t num_experts_;
  bool decodes_;
  Cut cut_;
  int64_t adapter_at_, decoded_at_, thread_bytes_;
  Workspace workspace_;
  char* memory_;
  std::vector<DecodedColumns> decoded_;
};

}  // namespace

void token_sum(const TokenSumArgs& args, const Context& context) {
  if (args.out.numel() == 0) return;
  TokenSum sum(args, context);
  parallel_for_shares(
      context.num_threads, sum.num_tasks(), [&](int64_t task, int thread) { sum.run(task, thread); },
      Loop{args.transposed ? "gradient of x" : "second projection", [&](int64_t task) { return sum.work(task); }});
}

}  // namespace switchgear::cpu
