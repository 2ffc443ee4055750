// SPDX-License-Identifier: BSD-3-Clause
// Which tile of a grouped GEMM a block works on. Only the device knows the number of rows per expert, so blocks count tiles
// themselves. The host launches blocks for at most ⌈S/rows⌉ + E + 1 row tiles (row_tile_bound), and a block takes every
// gridDim.x-th tile until none is left.
//
// Tiles are numbered expert by expert. After the last expert come the tiles of the unassigned rows, past expert_offsets[E],
// which are zeroed. Within an expert, bands of row tiles go through all columns (kBand in tiles_sm80.h).
#pragma once
#include "gemm.h"
#include "platform.cuh"

namespace switchgear::cuda {

// Slots [first_row, first_row + rows) and column tile `column`. expert == E: unassigned rows.
struct RowTile {
  int32_t expert;
  int32_t first_row;
  int32_t rows;
  int32_t column;
};

// Row r(s) of an operand, or -1 for a row out of range.
__device__ inline int32_t source_row(const Rows& rows, int32_t slot) {
  const int32_t row = rows.indices != nullptr ? rows.indices[slot] : slot;
  return row >= 0 && row < rows.count ? row : -1;
}

// Slots [begin, end) of expert e, clamped to [0, S] for any offsets.
struct SlotRange {
  int32_t begin, end;
};

__device__ inline SlotRange slots_of(const int32_t* expert_offsets, int32_t e, int32_t num_experts, int32_t num_slots) {
  const int32_t first = expert_offsets[e], last = e < num_experts ? expert_offsets[e + 1] : num_slots;
  const int32_t begin = first < 0 ? 0 : first < num_slots ? first : num_slots;
  return {begin, last < begin ? begin : last < num_slots ? last : num_slots};
}

// The slots that matrix i of a weight gradient sums; none for an expert out of range.
__device__ inline SlotRange slots_of_matrix(const int32_t* expert_offsets, const int32_t* experts, int32_t i,
                                            int32_t num_experts, int32_t num_slots) {
  const int32_t expert = experts != nullptr ? experts[i] : i;
  if (expert < 0 || expert >= num_experts) return {};
  return slots_of(expert_offsets, expert, num_experts, num_slots);
}

// Position `index` of a grid of row tiles x column tiles, in bands of kRowTiles row tiles.
struct TilePosition {
  int32_t row, column;
};

template <int kRowTiles>
__device__ inline TilePosition banded(int64_t index, int32_t row_tiles, int32_t column_tiles) {
  const auto band = static_cast<int32_t>(index / (kRowTiles * static_cast<int64_t>(column_tiles)));
  const auto rest = static_cast<int32_t>(index - band * kRowTiles * static_cast<int64_t>(column_tiles));
  const int32_t height = row_tiles - band * kRowTiles < kRowTiles ? row_tiles - band * kRowTiles : kRowTiles;
  return {band * kRowTiles + rest % height, rest / height};
}

// Each warp goes through the experts by itself, 32 at a time, and only forward: a block's tiles ascend. The numbers of slots
// and of row tiles are below 2^31.
template <int kBandTiles>
class TileWalker {
 public:
  __device__ TileWalker(const Gemm& g, int tile_rows, int32_t column_tiles)
      : offsets_(g.expert_offsets),
        num_experts_(static_cast<int32_t>(g.num_experts)),
        num_slots_(static_cast<int32_t>(g.num_slots)),
        column_tiles_(column_tiles),
        tile_rows_(tile_rows) {
    read_chunk();
  }

  // Finds tile `index`, at least that of the last call; false past the last tile. All lanes of a warp call it together.
  __device__ bool find(int64_t index, RowTile& tile) {
    const auto row_tile = static_cast<int32_t>(index / column_tiles_);
    while (row_tile >= tiles_before_ + chunk_tiles_) {
      if (chunk_ + 32 > num_experts_) return false;
      tiles_before_ += chunk_tiles_;
      chunk_ += 32;
      read_chunk();
    }
    const unsigned owners = __ballot_sync(0xffffffffu, tiles_through_ > row_tile - tiles_before_);
    const int owner = __ffs(static_cast<int>(owners)) - 1;
    const int32_t begin = __shfl_sync(0xffffffffu, range_.begin, owner);
    const int32_t end = __shfl_sync(0xffffffffu, range_.end, owner);
    const int32_t tiles = ceil_div(end - begin);
    const int32_t first = tiles_before_ + __shfl_sync(0xffffffffu, tiles_through_, owner) - tiles;
    const TilePosition position =
        banded<kBandTiles>(index - static_cast<int64_t>(first) * column_tiles_, tiles, column_tiles_);
    tile.expert = chunk_ + owner;
    tile.first_row = begin + position.row * tile_rows_;
    tile.rows = end - tile.first_row < tile_rows_ ? end - tile.first_row : tile_rows_;
    tile.column = position.column;
    return true;
  }

 private:
  __device__ int32_t ceil_div(int32_t rows) const { return rows / tile_rows_ + (rows % tile_rows_ != 0); }

  // One lane per expert; the unassigned rows count as expert E.
  __device__ void read_chunk() {
    const int lane = static_cast<int>(threadIdx.x % 32);
    range_ = chunk_ + lane <= num_experts_ ? slots_of(offsets_, chunk_ + lane, num_experts_, num_slots_) : SlotRange{};
    tiles_through_ = ceil_div(range_.end - range_.begin);
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int32_t below = __shfl_up_sync(0xffffffffu, tiles_through_, step);
      if (lane >= step) tiles_through_ += below;
    }
    chunk_tiles_ = __shfl_sync(0xffffffffu, tiles_through_, 31);
  }

  const int32_t* offsets_;
  int32_t num_experts_, num_slots_, column_tiles_;
  int tile_rows_;
  int32_t chunk_ = 0, tiles_before_ = 0,
          chunk_tiles_ = 0;  // experts [chunk_, chunk_ + 32), row tiles before and in them
  SlotRange range_{};
  int32_t tiles_through_ = 0;  // row tiles of this lane's expert and of all lower lanes
};

// Upper bound on the number of row tiles, unassigned rows included.
constexpr int64_t row_tile_bound(int64_t num_slots, int64_t num_experts, int64_t tile_rows) {
  return (num_slots + tile_rows - 1) / tile_rows + num_experts + 1;
}

}  // namespace switchgear::cuda
