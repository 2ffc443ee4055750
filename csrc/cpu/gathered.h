// SPDX-License-Identifier: BSD-3-Clause
// Rows in the layout of an ISA's gather_rows, for products of the same rows with many panels: the rows of one expert that a
// thread works on, or those of all slots.
#pragma once
#include "experts.h"

namespace switchgear::cpu {

// Bytes per block of rows for products of this format; 0 if they read rows in place.
inline int64_t gathered_block_bytes(const Kernels& k, Format format, DType dtype, int64_t depth) {
  return is_decoded(format) || is_gguf(format) ? 0 : k.gathered_bytes(dtype, depth);
}

inline void gather_blocks(const Kernels& k, char* out, int64_t block_bytes, const void* const* rows, int64_t num_rows,
                          int64_t depth) {
  for (int64_t m = 0; m < num_rows; m += kGatheredRows, out += block_bytes) {
    k.gather_rows(out, rows + m, std::min(kGatheredRows, num_rows - m), 0, depth);
  }
}

// The gathered rows of one thread; gathered again when a tile starts at another row.
class GatheredRows {
 public:
  // Bytes for the rows of one tile, out of `num_slots`.
  static int64_t bytes(int64_t block_bytes, int64_t num_slots) {
    return ceil_div(std::min(num_slots, kMaxRows), kGatheredRows) * block_bytes;
  }
  GatheredRows(char* memory, int64_t block_bytes) : memory_(memory), block_bytes_(block_bytes) {}

  // rows[tile.first_row …], gathered; null if products read rows in place
  const void* of(const Tile& tile, const Kernels& k, const void* const* rows, int64_t depth) {
    if (block_bytes_ == 0) return nullptr;
    if (tile.first_row != first_row_) {
      first_row_ = tile.first_row;
      gather_blocks(k, memory_, block_bytes_, rows + first_row_, tile.num_rows, depth);
    }
    return memory_;
  }

 private:
  char* memory_;
  int64_t block_bytes_;
  int64_t first_row_ = -1;
};

// The gathered rows of all slots. An expert's blocks begin at its first slot. Undefined if block_bytes is 0.
struct GatheredSlots {
  char* data = nullptr;
  int64_t block_bytes = 0;
  const int32_t* expert_offsets = nullptr;
  const int32_t* first_blocks = nullptr;  // [E]: each expert's first block

  static int64_t most_blocks(int64_t num_slots, int64_t num_experts) {
    return ceil_div(num_slots, kGatheredRows) + std::min(num_slots, num_experts);
  }
  static void number_blocks(int32_t* first_blocks, const int32_t* expert_offsets, int64_t num_experts) {
    for (int64_t e = 0, block = 0; e < num_experts; ++e) {
      first_blocks[e] = static_cast<int32_t>(block);
      block += ceil_div(expert_offsets[e + 1] - expert_offsets[e], kGatheredRows);
    }
  }

  bool defined() const { return block_bytes > 0; }
  // The first slot of the block of this expert that contains `slot`.
  int64_t block_begin(int64_t expert, int64_t slot) const {
    return slot - (slot - expert_offsets[expert]) % kGatheredRows;
  }
  char* block(int64_t expert, int64_t slot) const {
    return data + (first_blocks[expert] + (slot - expert_offsets[expert]) / kGatheredRows) * block_bytes;
  }
};

}  // namespace switchgear::cpu
