// SPDX-License-Identifier: BSD-3-Clause
// Layout of the rows that moe_forward's products read: x for the first projection, a for the second. The weight's format and
// the ISA decide.
#pragma once
#include <optional>

#include "gathered.h"
#include "slot_rows.h"
#include "slots.h"
#include "switchgear/panels.h"
#include "threads.h"
#include "workspace.h"

namespace switchgear::cpu {

enum class RowLayout : uint8_t {
  kInPlace,   // row after row
  kSpread,    // copied, an odd number of cache lines apart
  kSorted,    // words in the order of weights in panels, or of plain weights that are packed as such
  kGathered,  // blocks of rows from the ISA's gather_rows
};

struct RowPlan {
  RowLayout layout = RowLayout::kInPlace;
  int64_t row_bytes = 0;    // row stride of our own copies
  int64_t block_bytes = 0;  // for kGathered
};

inline RowPlan plan_rows(const Kernels& k, Format format, DType dtype, int64_t depth, int64_t num_slots,
                         int64_t num_experts) {
  const int64_t block_bytes = gathered_block_bytes(k, format, dtype, depth);
  if (block_bytes > 0) return {.layout = RowLayout::kGathered, .block_bytes = block_bytes};
  const bool is_packed = format == Format::kPlain && k.packing_rows > 0 && num_slots >= k.packing_rows * num_experts &&
                         depth % kPanelColumns == 0;
  const bool is_sorted = format == Format::kPanels || is_packed;
  return {.layout = is_sorted ? RowLayout::kSorted : RowLayout::kInPlace,
          .row_bytes = spread_row_bytes(is_sorted ? k.sorted_row_bytes(dtype, depth) : depth * size_of(dtype))};
}

// Copies a row in the word order of weights in panels.
inline void sort_row(const Kernels& k, void* out, const void* row, DType dtype, int64_t depth) {
  float values[kMaxPanel];
  for (int64_t first = 0; first < depth; first += kMaxPanel) {
    const int64_t count = std::min<int64_t>(kMaxPanel, depth - first);
    k.load_row(values, static_cast<const char*>(row) + first * size_of(dtype), dtype, count);
    k.store_sorted(out, dtype, depth, first, values, count);
  }
}

// x [T,H], in place or copied once.
class InputRows {
 public:
  InputRows(const Kernels& k, Format format, const TensorView& x, int64_t num_slots, int64_t num_experts)
      : k_(k), x_(x), plan_(plan_rows(k, format, x.dtype, x.shape[1], num_slots, num_experts)) {
    constexpr int64_t kManyRows = 12;  // of an expert; above, a copy that spreads rows over L1 pays for itself
    const bool is_many = num_slots > kManyRows * num_experts && x.shape[1] * size_of(x.dtype) % 128 == 0;
    if (plan_.layout == RowLayout::kInPlace && is_many) plan_.layout = RowLayout::kSpread;
  }

  int64_t block_bytes() const { return plan_.block_bytes; }
  bool is_sorted() const { return plan_.layout == RowLayout::kSorted; }
  int64_t bytes() const { return copies() ? x_.shape[0] * plan_.row_bytes : 0; }

  // pointers[s] = row of slot s
  void fill(const void** pointers, Workspace& workspace, const Slots& slots, int64_t used_slots, int num_threads) {
    fill_row_pointers(pointers, copies() ? copy(workspace, num_threads) : x_, slots.token_indices, used_slots);
  }

 private:
  bool copies() const { return plan_.layout == RowLayout::kSpread || plan_.layout == RowLayout::kSorted; }

  TensorView copy(Workspace& workspace, int num_threads) const {
    const int64_t num_tokens = x_.shape[0], depth = x_.shape[1];
    TensorView out = view(workspace.take_bytes(bytes()), x_.dtype, num_tokens, depth);
    out.stride[0] = plan_.row_bytes / size_of(x_.dtype);
    parallel_for_ranges(num_threads, num_tokens, 16, [&](int64_t begin, int64_t end, int) {
      for (int64_t t = begin; t < end; ++t) {
        if (plan_.layout == RowLayout::kSorted) {
          sort_row(k_, row_of(out, t), row_of(x_, t), x_.dtype, depth);
        } else {
          std::memcpy(row_of(out, t), row_of(x_, t), static_cast<size_t>(depth * size_of(x_.dtype)));
        }
      }
    });
    return out;
  }

  const Kernels& k_;
  TensorView x_;
  RowPlan plan_;
};

// a [S,I], which the first projection writes and the second reads.
class ActivationRows {
 public:
  ActivationRows(const Kernels& k, Format format, DType dtype, int64_t num_slots, int64_t width, int64_t num_experts)
      : k_(k),
        plan_(plan_rows(k, format, dtype, width, num_slots, num_experts)),
        num_experts_(num_experts),
        a_(view(nullptr, dtype, num_slots, width)) {}

  // Rows one after the other, besides those of another layout: for products with an adapter.
  void keep_plain() { keeps_plain_ = plan_.layout == RowLayout::kSorted || plan_.layout == RowLayout::kGathered; }
  const void* const* plain(const void* const* rows) const { return plain_ ? plain_->pointers() : rows; }

  int64_t bytes() const {
    const int64_t plain_bytes = keeps_plain_ ? SlotRows::bytes(a_.shape[0], width(), a_.dtype) : 0;
    return plain_bytes + (gathers() ? Workspace::padded(num_experts_ * 4) + block_bytes() : row_bytes());
  }
  void take(Workspace& workspace, const int32_t* expert_offsets) {
    if (keeps_plain_) plain_.emplace(workspace, a_.shape[0], width(), a_.dtype);
    if (!gathers()) {
      a_.data = workspace.take_bytes(row_bytes());
      a_.stride[0] = plan_.row_bytes / size_of(a_.dtype);
      return;
    }
    auto* const first_blocks = workspace.take<int32_t>(num_experts_);
    GatheredSlots::number_blocks(first_blocks, expert_offsets, num_experts_);
    gathered_ = {static_cast<char*>(workspace.take_bytes(block_bytes())), plan_.block_bytes, expert_offsets,
                 first_blocks};
  }

  int64_t width() const { return a_.shape[1]; }
  bool is_in_place() const { return plan_.layout == RowLayout::kInPlace; }
  bool is_sorted() const { return plan_.layout == RowLayout::kSorted; }
  const GatheredSlots& gathered() const { return gathered_; }
  // pointers[s] = row of slot s, unless rows are gathered
  void fill(const void** pointers, int64_t used_slots) const {
    if (!gathers()) fill_row_pointers(pointers, a_, nullptr, used_slots);
  }

  // Writes columns [tile.column, + count) of the tile's rows; row(m, out) computes one row of them in float32.
  template <typename Row>
  void store(const Tile& tile, int64_t count, Row&& row) const {
    alignas(64) char last_rows[kGatheredRows][kMaxPanel * 2];  // to gather next
    const void* pointers[kGatheredRows];
    for (int64_t i = 0; i < kGatheredRows; ++i) pointers[i] = last_rows[i];
    for (int64_t m = 0; m < tile.num_rows; ++m) {
      float activated[kMaxPanel];
      row(m, activated);
      const int64_t slot = tile.first_row + m, i = m % kGatheredRows;
      if (plain_) k_.store_row(plain_->row(slot) + tile.column * size_of(a_.dtype), a_.dtype, activated, count);
      switch (plan_.layout) {
        case RowLayout::kSorted:
          k_.store_sorted(row_of(a_, slot), a_.dtype, width(), tile.column, activated, count);
          break;
        case RowLayout::kGathered:
          k_.store_row(last_rows[i], a_.dtype, activated, count);
          if (i + 1 < kGatheredRows && m + 1 < tile.num_rows) break;
          k_.gather_rows(gathered_.block(tile.expert, slot), pointers, i + 1, tile.column, count);
          break;
        default: k_.store_row(at(a_, slot, tile.column), a_.dtype, activated, count);
      }
    }
  }

 private:
  bool gathers() const { return plan_.layout == RowLayout::kGathered; }
  int64_t row_bytes() const { return a_.shape[0] * plan_.row_bytes; }
  int64_t block_bytes() const { return GatheredSlots::most_blocks(a_.shape[0], num_experts_) * plan_.block_bytes; }

  const Kernels& k_;
  RowPlan plan_;
  int64_t num_experts_;
  TensorView a_;
  GatheredSlots gathered_;
  bool keeps_plain_ = false;
  std::optional<SlotRows> plain_;
};

}  // namespace switchgear::cpu
