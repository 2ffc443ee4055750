// SPDX-License-Identifier: BSD-3-Clause
// How the experts' matrices and rows are laid out: small accessors that the GEMM drivers share.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "switchgear/compact.h"
#include "switchgear/ops.h"
#include "switchgear/panels.h"

namespace switchgear::cpu {

inline char* offset(const TensorView& t, int64_t elements) { return t.as<char>() + elements * size_of(t.dtype); }
inline char* row_of(const TensorView& t, int64_t row) { return offset(t, row * t.stride[0]); }
inline char* at(const TensorView& t, int64_t row, int64_t column) {
  return offset(t, row * t.stride[0] + column * t.stride[1]);
}

// [rows, cols] matrix of expert e as the B operand of a product with rows of `dtype`: its own, or that of its elements where it
// is compact or in panels.
class ExpertMatrix {
 public:
  ExpertMatrix(const ExpertMatrices& m, int64_t e, DType dtype)
      : data_(m.base != nullptr ? static_cast<const char*>(m.base[e]) : offset(m.packed, e * m.packed.stride[0])),
        rows_(m.base != nullptr ? m.row_count[e] : rows_of(m)),
        row_stride_(row_stride_of(m)),
        column_stride_(m.packed.stride[2]),
        dtype_(dtype),
        stored_(m.packed.dtype),
        format_(stored_ != DType::kUInt8 ? Format::kPlain
                : is_in_panels(m.packed) ? Format::kPanels
                                         : Format::kCompact),
        compact_bytes_(format_ == Format::kCompact ? m.packed.as<uint8_t>()[kCompactElementBytes] : 0) {}

  static int64_t rows_of(const ExpertMatrices& m) {
    return is_in_panels(m.packed) ? m.packed.shape[1] * kernels().panel : m.packed.shape[1];
  }

  int64_t rows() const { return rows_; }

  // B[n,k] = W[first + n, k]: x·Wᵀ
  Matrix rows_from(int64_t first) const {
    return {.data = data_ + first * row_stride_ * size_of(stored_),
            .dtype = dtype_,
            .n_stride = row_stride_,
            .k_stride = column_stride_,
            .format = format_,
            .compact_bytes = compact_bytes_};
  }
  // B[n,k] = W[k, first + n]: x·W
  Matrix columns_from(int64_t first) const {
    return {.data = data_ + first * column_stride_ * size_of(stored_),
            .dtype = dtype_,
            .n_stride = column_stride_,
            .k_stride = row_stride_};
  }

 private:
  static int64_t row_stride_of(const ExpertMatrices& m) {
    if (is_in_panels(m.packed)) return m.packed.shape[2] * m.packed.shape[3] / kernels().panel;
    // a single row has any stride, but that of compact rows is also their size
    return m.packed.dtype == DType::kUInt8 ? m.packed.shape[2] : m.packed.stride[1];
  }

  const char* data_;
  int64_t rows_;
  int64_t row_stride_, column_stride_;
  DType dtype_, stored_;
  Format format_;
  int compact_bytes_;
};

// pointers[s] = row of slot s: x[token_indices[s]], or x[s] without indices; `count` slots.
inline void fill_row_pointers(const void** pointers, const TensorView& x, const int32_t* token_indices, int64_t count) {
  for (int64_t s = 0; s < count; ++s) pointers[s] = row_of(x, token_indices != nullptr ? token_indices[s] : s);
}

inline void fill_row_pointers(const void** pointers, const void* data, int64_t row_bytes, int64_t count) {
  for (int64_t s = 0; s < count; ++s) pointers[s] = static_cast<const char*>(data) + s * row_bytes;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether every expert's rows fit into one tile: then reading the weights is nearly all of the work.
inline bool has_few_rows(const int32_t* expert_offsets, int64_t num_experts) {
  for (int64_t e = 0; e < num_experts; ++e) {
    if (expert_offsets[e + 1] - expert_offsets[e] > kTileRows) return false;
  }
  return true;
}

// From one row to the next in memory of our own: an odd number of cache lines. Rows a power of two apart share a few sets of
// L1, and those of a tile would evict each other.
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

// A piece of one expert's product: rows [first_row, first_row + num_rows) of the slots, columns from `column`.
struct Tile {
  int64_t expert, column, first_row, num_rows;
};

// Rows of the pieces, nearly equal and of whole blocks, in which one product after the other takes `count` rows.
inline int64_t piece_rows(int64_t count, int64_t most_rows) {
  const int64_t pieces = std::max<int64_t>(ceil_div(count, most_rows), 1);
  return ceil_div(ceil_div(count, pieces), kGatheredRows) * kGatheredRows;
}

// What comes first in the order of an expert's tiles: all pieces of rows of a panel, which then comes from memory once, or all
// panels of a piece, whose rows are gathered once.
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
