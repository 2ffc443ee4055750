// SPDX-License-Identifier: BSD-3-Clause
// Layout of the experts' matrices and rows: small accessors that the GEMM drivers share.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "kernels.h"
#include "switchgear/compact.h"
#include "switchgear/ops.h"

namespace switchgear::cpu {

inline char* offset(const TensorView& t, int64_t elements) { return t.as<char>() + elements * size_of(t.dtype); }
inline char* row_of(const TensorView& t, int64_t row) { return offset(t, row * t.stride[0]); }
inline char* at(const TensorView& t, int64_t row, int64_t column) {
  return offset(t, row * t.stride[0] + column * t.stride[1]);
}

// The matrix [rows, cols] of expert e as the B operand of a product with rows of `dtype`.
class ExpertMatrix {
 public:
  ExpertMatrix(const Weight& w, int64_t e, DType dtype)
      : rows_(w.base != nullptr ? w.row_count[e] : w.num_rows()), part_rows_(w.num_rows() / w.parts) {
    const int64_t slot = w.slot_of(e);
    whole_ = {.dtype = dtype, .format = w.format};
    if (is_gguf(w.format)) {
      part_bytes_ = w.data.stride[1];
      whole_.n_stride = w.data.shape[3];
      whole_.k_stride = 1;
      whole_.data = row_of(w.data, slot);
      return;
    }
    switch (w.format) {
      case Format::kPlain:
        whole_.data = w.base != nullptr ? w.base[e] : row_of(w.data, slot);
        whole_.n_stride = w.data.stride[1];
        whole_.k_stride = w.data.stride[2];
        return;
      case Format::kPanels: whole_.n_stride = w.cols * size_of(dtype); break;
      case Format::kCompact:
        whole_.n_stride = w.data.shape[2];
        whole_.compact_bytes = static_cast<int>(w.element_bytes);
        break;
      default: {  // minifloats and groups
        const int64_t blocks = w.data.shape[1], groups = w.scales.shape[2];
        part_blocks_ = blocks / w.parts;
        whole_.n_stride = w.data.shape[2] * w.data.shape[3];
        int64_t plane = slot;
        if (w.format == Format::kGroups) {
          const int32_t* const record = w.records.as<const int32_t>() + 2 * slot;
          plane = record[0];
          whole_.format = format_of_bits(record[1]);
          if (w.zeros.defined()) whole_.zeros = row_of(w.zeros, slot);
        }
        whole_.data = row_of(w.data, plane);
        if (w.format == Format::kGroups) whole_.n_stride *= bits_of(whole_.format);
        whole_.scale_stride = groups * kMinifloatRows * size_of(w.scales.dtype);
        whole_.scales = row_of(w.scales, slot);
        if (w.row_scales.defined()) {
          whole_.row_scales = w.row_scales.as<const float>() + slot * w.row_scales.stride[0];
        }
        whole_.group_size = w.group_size > 0 ? w.group_size : w.data.shape[2] * kMinifloatColumns;
        return;
      }
    }
    whole_.k_stride = 1;
    whole_.data = row_of(w.data, slot);
  }

  int64_t rows() const { return rows_; }

  // B[n,k] = W[first + n, k]: x·Wᵀ
  Matrix rows_from(int64_t first) const {
    if (is_gguf(whole_.format)) {
      Matrix part = whole_;
      part.data = static_cast<const char*>(whole_.data) + first / part_rows_ * part_bytes_;
      return part.from(first % part_rows_);
    }
    if (!is_decoded(whole_.format)) return whole_.from(first);
    return whole_.from(first / part_rows_ * part_blocks_ * kMinifloatRows + first % part_rows_);
  }
  // B[n,k] = W[k, first + n]: x·W, for plain weights
  Matrix columns_from(int64_t first) const {
    Matrix columns = whole_;
    columns.data = static_cast<const char*>(whole_.data) + first * whole_.k_stride * size_of(whole_.dtype);
    std::swap(columns.n_stride, columns.k_stride);
    return columns;
  }

 private:
  Matrix whole_;
  int64_t rows_, part_rows_;
  int64_t part_blocks_ = 0, part_bytes_ = 0;
};

// The accumulators of tokens [first, last), `stride` apart, before the first expert: columns of float32 `from` if it is
// defined, else zeros.
inline void start_sums(float* sums, int64_t stride, const TensorView& from, int64_t first, int64_t last, int64_t column,
                       int64_t columns) {
  if (!from.defined()) {
    std::fill_n(sums, (last - first) * stride, 0.0f);
    return;
  }
  for (int64_t t = first; t < last; ++t, sums += stride) {
    std::copy_n(reinterpret_cast<const float*>(at(from, t, column)), columns, sums);
  }
}

// Rows past the last used slot are zero.
inline void zero_tail(const TensorView& out, int64_t used_slots) {
  for (int64_t s = used_slots; s < out.shape[0]; ++s) {
    std::memset(row_of(out, s), 0, static_cast<size_t>(out.shape[1] * size_of(out.dtype)));
  }
}

// pointers[s] = row of slot s: x[token_indices[s]], or x[s] without indices; `count` slots.
inline void fill_row_pointers(const void** pointers, const TensorView& x, const int32_t* token_indices, int64_t count) {
  for (int64_t s = 0; s < count; ++s) pointers[s] = row_of(x, token_indices != nullptr ? token_indices[s] : s);
}

inline void fill_row_pointers(const void** pointers, const void* data, int64_t row_bytes, int64_t count) {
  for (int64_t s = 0; s < count; ++s) pointers[s] = static_cast<const char*>(data) + s * row_bytes;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether every expert's rows fit into one tile. Then reading the weights is nearly all of the work.
inline bool has_few_rows(const int32_t* expert_offsets, int64_t num_experts) {
  for (int64_t e = 0; e < num_experts; ++e) {
    if (expert_offsets[e + 1] - expert_offsets[e] > kTileRows) return false;
  }
  return true;
}

// The experts whose rows are in the word order of weights in panels: those with at least so many rows.
struct SortedExperts {
  static constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  int64_t least_rows = kNone;
  bool is_none() const { return least_rows == kNone; }
  bool has(const int32_t* expert_offsets, int64_t expert) const {
    return expert_offsets[expert + 1] - expert_offsets[expert] >= least_rows;
  }
};

// Row stride of internal buffers: an odd number of cache lines. Rows a power of two apart share a few sets of L1, and the
// rows of a tile would evict each other.
constexpr int64_t spread_row_bytes(int64_t bytes) { return ((bytes + 63) / 64 | 1) * 64; }

// Memory of one thread for one product.
struct ProductScratch {
  void* packing;
  float* c;

  static constexpr int64_t kTileBytes = kMaxRows * kMaxPanel * 4;
  static constexpr int64_t kBytes = kProductScratch + kTileBytes;
  explicit ProductScratch(void* memory)
      : packing(memory), c(reinterpret_cast<float*>(static_cast<char*>(memory) + kProductScratch)) {}
};

// Bytes of `columns` columns of b, for recordings; without scales.
inline int64_t bytes_of(const Matrix& b, int64_t columns, int64_t depth) {
  return columns * (b.format == Format::kPlain ? depth * size_of(b.dtype) : b.row_bytes());
}

// Columns per task: `most`, halved down to `least` while there are fewer than two tasks per thread and their number is no
// multiple of the threads. tasks(columns): the number of tasks.
template <typename Tasks>
int64_t columns_for(int64_t most, int64_t least, int num_threads, Tasks&& tasks) {
  int64_t columns = most;
  while (columns > least && tasks(columns) < 2 * num_threads && tasks(columns) % num_threads != 0)
    columns = std::max(columns / 2, least);
  return columns;
}

// Threads that `multiplications` are worth: fewer than 2^17 take 2 to 4 µs.
inline int useful_threads(int64_t multiplications, int num_threads) {
  return static_cast<int>(std::clamp<int64_t>(multiplications >> 17, 1, num_threads));
}

// The narrowest task of products with few rows: a cache line of float32, and a tile of AMX.
constexpr int64_t kFewestColumns = 16;

// A piece of one expert's product: slots [first_row, first_row + num_rows), columns from `column` on.
struct Tile {
  int64_t expert, column, first_row, num_rows;
};

// Rows per piece if `count` rows are split into nearly equal products of whole blocks.
inline int64_t piece_rows(int64_t count, int64_t most_rows) {
  const int64_t pieces = std::max<int64_t>(ceil_div(count, most_rows), 1);
  return ceil_div(ceil_div(count, pieces), kGatheredRows) * kGatheredRows;
}

// The inner loop over an expert's tiles: all pieces of rows of a panel, which then comes from memory once, or all panels of a
// piece, whose rows are gathered once.
enum class TileOrder { kPanels, kRows };

// Tiles of `panel` columns out of `width` and at most `most_rows` rows, expert by expert.
inline std::vector<Tile> make_tiles(const int32_t* expert_offsets, int64_t num_experts, int64_t width, int64_t panel,
                                    int64_t most_rows, TileOrder order = TileOrder::kPanels) {
  std::vector<Tile> tiles;
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t begin = expert_offsets[e], end = expert_offsets[e + 1];
    if (begin == end) continue;
    const int64_t piece = piece_rows(end - begin, most_rows),
                  rows_at_once = order == TileOrder::kRows ? piece : end - begin;
    for (int64_t first = begin; first < end; first += rows_at_once) {
      for (int64_t column = 0; column < width; column += panel) {
        for (int64_t row = first; row < std::min(end, first + rows_at_once); row += piece) {
          tiles.push_back({e, column, row, std::min(piece, end - row)});
        }
      }
    }
  }
  return tiles;
}

}  // namespace switchgear::cpu
