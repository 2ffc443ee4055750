// SPDX-License-Identifier: BSD-3-Clause
// attend: causal attention of new tokens over a cache.
//
//   q [B,T,N,D]   keys [B,J,C,D]   values [B,J,C,V]   out [B,T,N,V]; row t sees L positions
//   work 2·B·T·N·L·(D + V) flop; traffic B·J·L·(D + V) elements, once for up to 48 rows that share a head of the cache
//   memory-bound for T = 1 up to some 16 heads per head of the cache, compute-bound for a prompt
//
// Positions are cut into blocks of 128 from the sequence's start. A block has its own largest score, sum of weights and weighted
// sum of values; the blocks of a row are merged in ascending order. So a row's bits do not depend on which other rows are in the
// call, where its sequence starts in the cache, or on threads. A task is a tile of rows; if there are too few tiles for the
// threads, as for one new token, it is some blocks of a tile, and rows are merged afterwards.
#include <algorithm>
#include <limits>

#include "exp.h"
#include "experts.h"
#include "ops.h"
#include "threads.h"
#include "workspace.h"

namespace switchgear::cpu {
namespace {

constexpr int64_t kBlock = 128;  // positions; 32 KB of keys in bfloat16 with D = 128
constexpr int64_t kMostRows =
    48;  // of a tile: their scores and sums stay in L2, and K is read for 8 tiles of registers
constexpr int64_t kThreadBytes = 1 << 16;  // 3 to 6 µs: fewer bytes of the cache are not worth another thread
constexpr float kNone = -std::numeric_limits<float>::infinity();

struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

Span common(const Span& a, const Span& b) { return {std::max(a.begin, b.begin), std::min(a.end, b.end)}; }

// Rows of q that share a head of the cache: `num_tokens` tokens of sequence b, with all heads of q that use head j. Row
// r is token first_token + r / heads.
struct QueryTile {
  int64_t b, j, first_token, num_tokens;
};

// Sums over a block, or over several, for the rows of a tile.
struct Sums {
  Softmax* weights;  // [rows]
  float* values;     // [rows, width]
};

class Attention {
 public:
  Attention(const AttendArgs& args, const Kernels& kernels)
      : args_(args),
        k_(kernels),
        heads_(args.q.shape[2] / args.keys.shape[1]),
        depth_(args.q.shape[3]),
        width_(args.values.shape[3]),
        tile_tokens_(std::clamp<int64_t>(kMostRows / heads_, 1, std::max<int64_t>(args.q.shape[1], 1))),
        tiles_down_(ceil_div(args.q.shape[1], tile_tokens_)) {}

  int64_t num_tiles() const { return args_.q.shape[0] * args_.keys.shape[1] * tiles_down_; }
  int64_t most_rows() const { return tile_tokens_ * heads_; }
  int64_t width() const { return width_; }

  // The tiles whose rows see most come first.
  QueryTile tile(int64_t index) const {
    const int64_t heads = args_.q.shape[0] * args_.keys.shape[1], head = index % heads;
    const int64_t first = (tiles_down_ - 1 - index / heads) * tile_tokens_;
    return {.b = head / args_.keys.shape[1],
            .j = head % args_.keys.shape[1],
            .first_token = first,
            .num_tokens = std::min(tile_tokens_, args_.q.shape[1] - first)};
  }

  int64_t rows_of(const QueryTile& tile) const { return tile.num_tokens * heads_; }

  // The blocks that some row of the tile sees.
  Span blocks(const QueryTile& tile) const {
    const Span seen = positions(tile), from_start{seen.begin - start(tile.b), seen.end - start(tile.b)};
    return seen.size() <= 0 ? Span{0, 0} : Span{from_start.begin / kBlock, ceil_div(from_start.end, kBlock)};
  }

  // Memory of a thread for `sum_block`: rows of q in float32, and their scores.
  int64_t scratch_bytes(int64_t rows) const { return rows * (q_stride() + kBlock) * 4; }

  // The tile's rows of q, for `sum_block`.
  void load(const QueryTile& tile, char* memory) const {
    const TensorView& q = args_.q;
    for (int64_t r = 0; r < rows_of(tile); ++r) {
      const int64_t token = tile.first_token + r / heads_, head = tile.j * heads_ + r % heads_;
      k_.load_row(reinterpret_cast<float*>(memory) + r * q_stride(),
                  offset(q, tile.b * q.stride[0] + token * q.stride[1] + head * q.stride[2]), q.dtype, depth_);
    }
  }

  // The sums of one block. Rows that see nothing of it have no weights.
  void sum_block(const QueryTile& tile, int64_t block, char* memory, const Sums& out) const {
    const int64_t rows = rows_of(tile), first = start(tile.b) + block * kBlock;
    const Span whole{first, first + kBlock}, seen = common(positions(tile), whole);
    float* const scores = multiply(tile, seen, first, memory);
    std::fill_n(out.values, rows * width_, 0.0f);
    for_groups(rows, [&](int64_t row, int64_t count) {
      Span own[kTileRows], shared = seen;
      for (int64_t i = 0; i < count; ++i) {
        own[i] = common(positions_of(tile.b, tile.first_token + (row + i) / heads_), whole);
        Softmax& weights = out.weights[row + i];
        if (own[i].size() <= 0) {
          own[i] = {seen.end, seen.end};
          weights = {kNone, 0.0f};
        } else {
          float* const at = scores + (row + i) * kBlock;
          weights = k_.softmax_weights(at, own[i].begin - first, own[i].end - first, args_.scale);
        }
        shared = common(shared, own[i]);
      }
      add_values(tile, row, {own, own + count}, shared, scores - first, out.values);
    });
  }

  // Merges the sums of the next block into those of the blocks before it.
  void merge(int64_t rows, const Sums& total, const Sums& block) const {
    for (int64_t r = 0; r < rows; ++r) {
      const auto [own, other] = merge_weights(total.weights[r], block.weights[r]);
      k_.merge_rows(total.values + r * width_, own, block.values + r * width_, other, width_);
    }
  }

  void start(int64_t rows, const Sums& total) const {
    std::fill_n(total.weights, rows, Softmax{kNone, 0.0f});
    std::fill_n(total.values, rows * width_, 0.0f);
  }

  void store(const QueryTile& tile, const Sums& total) const {
    for (int64_t r = 0; r < rows_of(tile); ++r) {
      const int64_t token = tile.first_token + r / heads_, head = tile.j * heads_ + r % heads_;
      Softmax weights = total.weights[r];
      float* const values = total.values + r * width_;
      const bool sees = positions_of(tile.b, token).size() > 0;
      float own = 1.0f;
      if (args_.sinks.defined() && sees) {
        own = merge_weights(weights, {args_.sinks.as<const float>()[head], 1.0f}).own;
      }
      k_.merge_rows(values, sees ? own / weights.sum : 0.0f, values, 0.0f, width_);
      const TensorView& out = args_.out;
      k_.store_row(offset(out, tile.b * out.stride[0] + token * out.stride[1] + head * out.stride[2]), out.dtype,
                   values, width_);
    }
  }

 private:
  // Calls body(first row, count) for groups of nearly equal size that fit into registers.
  template <typename Body>
  static void for_groups(int64_t rows, Body&& body) {
    const int64_t groups = ceil_div(rows, kTileRows);
    for (int64_t group = 0, row = 0; group < groups; ++group) {
      const int64_t count = (rows - row) / (groups - group);
      body(row, count);
      row += count;
    }
  }

  struct Factors {
    float own, other;
  };

  static Factors merge_weights(Softmax& total, const Softmax& other) {
    const float max = other.max > total.max ? other.max : total.max, shift = max == kNone ? 0.0f : max;
    const Factors factors{exp_f32(total.max - shift), exp_f32(other.max - shift)};
    total = {max, total.sum * factors.own + other.sum * factors.other};
    return factors;
  }

  int64_t start(int64_t b) const { return args_.starts.defined() ? args_.starts.as<const int32_t>()[b] : 0; }

  // What a row sees, and what some row of a tile sees, as indices of the cache.
  Span positions_of(int64_t b, int64_t token) const {
    const int64_t own = args_.length - args_.q.shape[1] + token;
    int64_t begin = std::max<int64_t>(start(b), 0);
    if (args_.window > 0) begin = std::max(begin, own - args_.window + 1);
    return {begin, own + 1};
  }
  Span positions(const QueryTile& tile) const {
    return {positions_of(tile.b, tile.first_token).begin,
            positions_of(tile.b, tile.first_token + tile.num_tokens - 1).end};
  }

  int64_t q_stride() const { return ceil_div(depth_, 16) * 16; }

  char* key(const QueryTile& tile, int64_t p) const {
    const TensorView& keys = args_.keys;
    return offset(keys, tile.b * keys.stride[0] + tile.j * keys.stride[1] + p * keys.stride[2]);
  }
  char* value(const QueryTile& tile, int64_t p) const {
    const TensorView& values = args_.values;
    return offset(values, tile.b * values.stride[0] + tile.j * values.stride[1] + p * values.stride[2]);
  }

  // Scores of the tile's rows for the positions `seen`, [rows, kBlock] from position `first` on. The values of these positions
  // are read next.
  float* multiply(const QueryTile& tile, const Span& seen, int64_t first, char* memory) const {
    const int64_t rows = rows_of(tile);
    float *const q = reinterpret_cast<float*>(memory), *const scores = q + rows * q_stride();
    for_groups(rows, [&](int64_t row, int64_t count) {
      k_.score_rows({.rows = q + row * q_stride(),
                     .row_stride = q_stride(),
                     .num_rows = count,
                     .keys = key(tile, seen.begin),
                     .dtype = args_.keys.dtype,
                     .key_stride = args_.keys.stride[2],
                     .count = seen.size(),
                     .depth = depth_,
                     .ahead = row == 0 ? value(tile, seen.begin) : key(tile, seen.begin),
                     .ahead_stride = (row == 0 ? args_.values : args_.keys).stride[2] * size_of(args_.keys.dtype),
                     .out = scores + row * kBlock + seen.begin - first,
                     .out_stride = kBlock});
    });
    return scores;
  }

  struct Rows {
    const Span* begin;
    const Span* end;
  };

  // Adds the weighted values of what each row from `row` on sees: those that all see together, before and after them the others,
  // row by row. A row never reads what it does not see, so nothing there, not even NaN, changes it.
  void add_values(const QueryTile& tile, int64_t row, Rows own, const Span& shared, const float* scores,
                  float* out) const {
    const TensorView& values = args_.values;
    const auto add = [&](int64_t first, int64_t count, const Span& span) {
      if (span.size() <= 0) return;
      const bool is_first =
          first == 0 && span.end + kBlock <= args_.length;  // of all rows: the next keys are read then
      k_.add_weighted_rows({.weights = scores + first * kBlock + span.begin,
                            .weight_stride = kBlock,
                            .num_rows = count,
                            .values = value(tile, span.begin),
                            .dtype = values.dtype,
                            .value_stride = values.stride[2],
                            .count = span.size(),
                            .columns = width_,
                            .ahead = is_first ? key(tile, span.begin + kBlock) : value(tile, span.begin),
                            .ahead_stride = (is_first ? args_.keys : values).stride[2] * size_of(values.dtype),
                            .out = out + first * width_,
                            .out_stride = width_});
    };
    const bool is_shared = shared.size() > 0;
    for (const Span* span = own.begin; span != own.end; ++span) {
      add(row + (span - own.begin), 1, is_shared ? Span{span->begin, shared.begin} : *span);
    }
    if (!is_shared) return;
    add(row, own.end - own.begin, shared);
    for (const Span* span = own.begin; span != own.end; ++span) {
      add(row + (span - own.begin), 1, {shared.end, span->end});
    }
  }

  const AttendArgs& args_;
  const Kernels& k_;
  const int64_t heads_, depth_, width_;  // heads: of q for one of the cache
  const int64_t tile_tokens_, tiles_down_;
};

}  // namespace

void attend(const AttendArgs& args, const Context& context) {
  const Attention attention(args, context.kernels);
  const int64_t num_tiles = attention.num_tiles(), most_rows = attention.most_rows(), width = attention.width();
  if (num_tiles == 0) return;
  const int64_t bytes =
      args.q.shape[0] * args.keys.shape[1] * args.length * (args.q.shape[3] + width) * size_of(args.q.dtype);
  const int64_t worth = std::max<int64_t>(bytes * ceil_div(args.q.shape[1], kTileRows) / kThreadBytes, 1);
  const int num_threads = static_cast<int>(std::min<int64_t>(worth, context.num_threads));

  // Blocks of a tile per task: all of them, unless there are few tiles.
  int64_t most_blocks = 0;
  for (int64_t i = 0; i < num_tiles; ++i)
    most_blocks = std::max(most_blocks, attention.blocks(attention.tile(i)).size());
  const int64_t parts = num_tiles >= 2 * num_threads || num_threads == 1
                            ? 1
                            : std::min(ceil_div(2 * num_threads, num_tiles), most_blocks);

  const int64_t scratch_bytes = Workspace::padded(attention.scratch_bytes(most_rows));
  const int64_t weight_bytes = Workspace::padded(most_rows * static_cast<int64_t>(sizeof(Softmax)));
  const int64_t sum_bytes = weight_bytes + Workspace::padded(most_rows * width * 4);
  const int64_t kept_blocks = parts > 1 ? num_tiles * most_blocks : 0;
  const int64_t thread_bytes = scratch_bytes + 2 * sum_bytes,
                total = num_threads * thread_bytes + kept_blocks * sum_bytes;
  Workspace workspace(total);
  char* const memory = static_cast<char*>(workspace.take_bytes(total));
  const auto sums_at = [&](char* at) {
    return Sums{reinterpret_cast<Softmax*>(at), reinterpret_cast<float*>(at + weight_bytes)};
  };
  const auto sums_of_thread = [&](int thread, int which) {
    return sums_at(memory + thread * thread_bytes + scratch_bytes + which * sum_bytes);
  };
  const auto sums_of_block = [&](int64_t tile, int64_t block) {
    return sums_at(memory + num_threads * thread_bytes + (tile * most_blocks + block) * sum_bytes);
  };

  if (parts <= 1) {
    return parallel_for(num_threads, num_tiles, [&](int64_t index, int thread) {
      const QueryTile tile = attention.tile(index);
      const Span blocks = attention.blocks(tile);
      const int64_t rows = attention.rows_of(tile);
      const Sums sums = sums_of_thread(thread, 0), part = sums_of_thread(thread, 1);
      attention.load(tile, memory + thread * thread_bytes);
      attention.start(rows, sums);
      for (int64_t block = blocks.begin; block < blocks.end; ++block) {
        attention.sum_block(tile, block, memory + thread * thread_bytes, part);
        attention.merge(rows, sums, part);
      }
      attention.store(tile, sums);
    });
  }
  parallel_for_shares(num_threads, num_tiles * parts, [&](int64_t task, int thread) {
    const int64_t index = task / parts, part = task % parts;
    const QueryTile tile = attention.tile(index);
    const Span blocks = attention.blocks(tile);
    const int64_t end = blocks.size() * (part + 1) / parts;
    attention.load(tile, memory + thread * thread_bytes);
    for (int64_t i = blocks.size() * part / parts; i < end; ++i) {
      attention.sum_block(tile, blocks.begin + i, memory + thread * thread_bytes, sums_of_block(index, i));
    }
  });
  parallel_for(num_threads, num_tiles, [&](int64_t index, int thread) {
    const QueryTile tile = attention.tile(index);
    const int64_t rows = attention.rows_of(tile), count = attention.blocks(tile).size();
    const Sums sums = sums_of_thread(thread, 0);
    attention.start(rows, sums);
    for (int64_t i = 0; i < count; ++i) attention.merge(rows, sums, sums_of_block(index, i));
    attention.store(tile, sums);
  });
}

}  // namespace switchgear::cpu
