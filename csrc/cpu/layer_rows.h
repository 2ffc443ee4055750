// SPDX-License-Identifier: BSD-3-Clause
// Layout of the rows that products of grouped_gemm and moe_forward read: x, and `a` for the second projection. The weight's
// format and the ISA decide.
#pragma once
#include <optional>

#include "context.h"
#include "gathered.h"
#include "slot_rows.h"
#include "slots.h"
#include "switchgear/panels.h"
#include "threads.h"
#include "workspace.h"

namespace switchgear::cpu {

// Columns of a product from which a copy of its rows pays, sorted or widened.
constexpr int64_t kCopiedColumns = 128;

// Besides rows in place: an ISA's blocks of gathered rows, or per expert the word order of panels. Or 16-bit rows that the ISA
// multiplies in float32 are widened, once for all panels. Or rows are rounded to int8, for GGUF's blocks.
struct RowPlan {
  int64_t block_bytes = 0;  // of the ISA's gather_rows; 0: rows are not gathered
  int64_t row_bytes = 0;    // row stride of our own copies
  bool widens = false;      // rows that are neither gathered nor sorted
  int64_t group = 0;        // columns that share a scale of rounded rows; 0: rows are not rounded
  SortedExperts sorted;     // if not gathered
};

inline RowPlan plan_rows(const Kernels& k, Format format, DType dtype, int64_t depth, int64_t num_slots) {
  if (is_gguf(format)) return {.row_bytes = spread_row_bytes(GgufRow(depth).bytes), .group = gguf_group(format)};
  const int64_t block_bytes = gathered_block_bytes(k, format, dtype, depth);
  if (block_bytes > 0) return {.block_bytes = block_bytes};
  const int64_t packing_rows = k.packing_rows(dtype);
  SortedExperts sorted;
  if (format == Format::kPanels) {
    sorted.least_rows = 0;
  } else if (format == Format::kPlain && packing_rows > 0 && num_slots >= packing_rows && depth % kPanelColumns == 0) {
    sorted.least_rows = packing_rows;
  }
  const int64_t bytes = depth * size_of(dtype), word_bytes = k.word_bytes(dtype, depth);
  const bool widens = (format == Format::kPlain || format == Format::kCompact) && word_bytes > bytes;
  return {.row_bytes = spread_row_bytes(widens || !sorted.is_none() ? word_bytes : bytes),
          .widens = widens,
          .sorted = sorted};
}

inline int64_t count_sorted_slots(SortedExperts sorted, const int32_t* expert_offsets, int64_t num_experts) {
  int64_t count = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    if (sorted.has(expert_offsets, e)) count += expert_offsets[e + 1] - expert_offsets[e];
  }
  return count;
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

// x [T,H], in place or copied: sorted, and for other experts widened, or with an odd number of cache lines between rows.
class InputRows {
 public:
  InputRows(const Context& context, Format format, const TensorView& x, int64_t num_slots, int64_t num_experts)
      : k_(context.kernels), gguf_(context.gguf), x_(x), plan_(plan_rows(k_, format, x.dtype, x.shape[1], num_slots)) {
    constexpr int64_t kManyRows = 12;  // of an expert; above, a copy that spreads rows over L1 pays for itself
    const bool is_many = num_slots > kManyRows * num_experts && row_bytes() % 128 == 0;
    copies_ = plan_.widens || plan_.group > 0 || (plan_.block_bytes == 0 && plan_.sorted.least_rows > 0 && is_many);
  }

  int64_t block_bytes() const { return plan_.block_bytes; }
  SortedExperts sorted() const { return plan_.sorted; }
  bool are_widened() const { return plan_.widens; }
  int64_t bytes() const {
    const int64_t num_tokens = x_.shape[0];
    return (copies_ ? Workspace::padded(num_tokens * copy_row_bytes()) : 0) +
           (plan_.sorted.is_none() ? 0 : Workspace::padded(num_tokens * plan_.row_bytes));
  }

  // pointers[s] = row of slot s: token_indices[s], or s without indices
  void fill(const void** pointers, Workspace& workspace, const int32_t* offsets, const int32_t* token_indices,
            int64_t num_experts, int num_threads) {
    const int64_t used_slots = offsets[num_experts];
    const int64_t sorted_slots = count_sorted_slots(plan_.sorted, offsets, num_experts);
    if (sorted_slots < used_slots) {
      const TensorView rows = copies_ ? copy(workspace, copy_row_bytes(), false, num_threads) : x_;
      fill_row_pointers(pointers, rows, token_indices, used_slots);
    }
    if (sorted_slots == 0) return;
    const TensorView rows = copy(workspace, plan_.row_bytes, true, num_threads);
    for (int64_t e = 0; e < num_experts; ++e) {
      if (!plan_.sorted.has(offsets, e)) continue;
      for (int64_t s = offsets[e]; s < offsets[e + 1]; ++s) {
        pointers[s] = row_of(rows, token_indices != nullptr ? token_indices[s] : s);
      }
    }
  }

 private:
  int64_t row_bytes() const { return x_.shape[1] * size_of(x_.dtype); }
  int64_t copy_row_bytes() const {
    return plan_.widens || plan_.group > 0 ? plan_.row_bytes : spread_row_bytes(row_bytes());
  }

  TensorView copy(Workspace& workspace, int64_t stride, bool sorts, int num_threads) const {
    const int64_t num_tokens = x_.shape[0], depth = x_.shape[1];
    TensorView out = view(workspace.take_bytes(num_tokens * stride), x_.dtype, num_tokens, depth);
    out.stride[0] = stride / size_of(x_.dtype);
    parallel_for_ranges(num_threads, num_tokens, 16, [&](int64_t begin, int64_t end, int) {
      for (int64_t t = begin; t < end; ++t) {
        if (sorts) {
          sort_row(k_, row_of(out, t), row_of(x_, t), x_.dtype, depth);
        } else if (plan_.group > 0) {
          gguf_.quantize_row(row_of(out, t), row_of(x_, t), x_.dtype, depth, plan_.group);
        } else if (plan_.widens) {
          k_.load_row(reinterpret_cast<float*>(row_of(out, t)), row_of(x_, t), x_.dtype, depth);
        } else {
          std::memcpy(row_of(out, t), row_of(x_, t), static_cast<size_t>(row_bytes()));
        }
      }
    });
    return out;
  }

  const Kernels& k_;
  const GgufKernels& gguf_;
  TensorView x_;
  RowPlan plan_;
  bool copies_ = false;  // rows that are not sorted
};

// a [S,I], which the first projection writes and the second reads.
class ActivationRows {
 public:
  ActivationRows(const Context& context, Format format, DType dtype, int64_t num_slots, int64_t width,
                 int64_t num_experts)
      : k_(context.kernels),
        gguf_(context.gguf),
        plan_(plan_rows(k_, format, dtype, width, num_slots)),
        num_experts_(num_experts),
        a_(view(nullptr, dtype, num_slots, width)) {}

  // Rows one after the other, besides those of another layout: for products with an adapter.
  void keep_plain() { keeps_plain_ = gathers() || plan_.widens || !plan_.sorted.is_none(); }
  const void* const* plain(const void* const* rows) const { return plain_ ? plain_->pointers() : rows; }

  int64_t bytes() const {
    const int64_t plain_bytes = keeps_plain_ ? SlotRows::bytes(a_.shape[0], width(), a_.dtype) : 0;
    return plain_bytes + rounded_bytes() +
           (gathers() ? Workspace::padded(num_experts_ * 4) + block_bytes() : row_bytes());
  }
  void take(Workspace& workspace, const int32_t* expert_offsets) {
    expert_offsets_ = expert_offsets;
    const bool is_plain =
        !gathers() && !plan_.widens && count_sorted_slots(plan_.sorted, expert_offsets, num_experts_) == 0;
    if (keeps_plain_ && !is_plain) plain_.emplace(workspace, a_.shape[0], width(), a_.dtype);
    if (!gathers()) {
      a_.data = workspace.take_bytes(row_bytes());
      const int64_t element = size_of(a_.dtype);  // shorter rows are on fewer pages
      a_.stride[0] = (is_plain ? spread_row_bytes(width() * element) : plan_.row_bytes) / element;
      return;
    }
    auto* const first_blocks = workspace.take<int32_t>(num_experts_);
    GatheredSlots::number_blocks(first_blocks, expert_offsets, num_experts_);
    gathered_ = {static_cast<char*>(workspace.take_bytes(block_bytes())), plan_.block_bytes, expert_offsets,
                 first_blocks};
  }

  int64_t width() const { return a_.shape[1]; }
  bool gathers() const { return plan_.block_bytes > 0; }
  SortedExperts sorted() const { return plan_.sorted; }
  bool are_widened() const { return plan_.widens; }
  const GatheredSlots& gathered() const { return gathered_; }
  // pointers[s] = row of slot s, unless rows are gathered
  void fill(const void** pointers, int64_t used_slots) const {
    if (!gathers()) fill_row_pointers(pointers, a_, nullptr, used_slots);
  }

  // What the second projection reads: the rows, rounded to int8 if it multiplies them so.
  const void* const* rounded(Workspace& workspace, const void* const* rows, int64_t used_slots, int num_threads) const {
    if (plan_.group == 0) return rows;
    const void** const pointers = workspace.take<const void*>(a_.shape[0]);
    auto* const memory = static_cast<char*>(workspace.take_bytes(a_.shape[0] * plan_.row_bytes));
    fill_row_pointers(pointers, memory, plan_.row_bytes, used_slots);
    parallel_for_ranges(num_threads, used_slots, 8, [&](int64_t begin, int64_t end, int) {
      for (int64_t s = begin; s < end; ++s) {
        gguf_.quantize_row(memory + s * plan_.row_bytes, rows[s], a_.dtype, width(), plan_.group);
      }
    });
    return pointers;
  }

  // Writes columns [tile.column, + count) of the tile's rows; row(m, out) computes one row of them in float32.
  template <typename Row>
  void store(const Tile& tile, int64_t count, Row&& row) const {
    alignas(64) char last_rows[kGatheredRows][kMaxPanel * 2];  // rounded, to gather or widen next
    const void* pointers[kGatheredRows];
    const bool is_sorted = !gathers() && plan_.sorted.has(expert_offsets_, tile.expert);
    for (int64_t i = 0; i < kGatheredRows; ++i) pointers[i] = last_rows[i];
    for (int64_t m = 0; m < tile.num_rows; ++m) {
      float activated[kMaxPanel];
      row(m, activated);
      const int64_t slot = tile.first_row + m, i = m % kGatheredRows;
      if (plain_) k_.store_row(plain_->row(slot) + tile.column * size_of(a_.dtype), a_.dtype, activated, count);
      if (is_sorted) {
        k_.store_sorted(row_of(a_, slot), a_.dtype, width(), tile.column, activated, count);
      } else if (plan_.widens) {
        k_.store_row(last_rows[0], a_.dtype, activated, count);
        k_.load_row(reinterpret_cast<float*>(row_of(a_, slot)) + tile.column, last_rows[0], a_.dtype, count);
      } else if (!gathers()) {
        k_.store_row(at(a_, slot, tile.column), a_.dtype, activated, count);
      } else {
        k_.store_row(last_rows[i], a_.dtype, activated, count);
        if (i + 1 < kGatheredRows && m + 1 < tile.num_rows) continue;
        k_.gather_rows(gathered_.block(tile.expert, slot), pointers, i + 1, tile.column, count);
      }
    }
  }

 private:
  int64_t row_bytes() const {
    const int64_t plain_bytes = spread_row_bytes(width() * size_of(a_.dtype));
    return a_.shape[0] * (plan_.group > 0 ? plain_bytes : plan_.row_bytes);
  }
  int64_t rounded_bytes() const {
    if (plan_.group == 0) return 0;
    const auto pointers = a_.shape[0] * static_cast<int64_t>(sizeof(void*));
    return Workspace::padded(pointers) + Workspace::padded(a_.shape[0] * plan_.row_bytes);
  }
  int64_t block_bytes() const { return GatheredSlots::most_blocks(a_.shape[0], num_experts_) * plan_.block_bytes; }

  const Kernels& k_;
  const GgufKernels& gguf_;
  RowPlan plan_;
  int64_t num_experts_;
  TensorView a_;
  const int32_t* expert_offsets_ = nullptr;
  GatheredSlots gathered_;
  bool keeps_plain_ = false;
  std::optional<SlotRows> plain_;
};

}  // namespace switchgear::cpu
