// SPDX-License-Identifier: BSD-3-Clause
// Products with a low-rank adapter.
//
//   work 2·S·r·(C + N) flop; traffic: a and b of the touched experts once per 240 rows of an expert
//   A product has at most one panel of columns (small rows) or a depth of r (terms), so packing b costs as much as
//   multiplying a few rows. With one row per expert the bytes of a and b bind, so they are read as one stream each.
// Accumulates in float32; small rows are rounded once to the dtype of x. Each sum has one order: deterministic, and a row's
// result does not depend on the other rows.
#include "adapter.h"

#include <cstring>

#include "threads.h"
#include "wide_product.h"

namespace switchgear::cpu {
namespace {

// How far terms prefetch B. A panel is 1 to 8 KB of it, and prefetching only the next one would wait for memory's latency.
constexpr int64_t kLeadBytes = 16 << 10;

void prefetch_bytes(const void* data, int64_t bytes) {
  constexpr int64_t kLine = 64;
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(data) + i, 0, 2);
}

// Calls body(j, columns) for panels of columns, each from the j-th one on.
template <typename Body>
void for_panels(const TermColumns& all, int64_t panel, Body&& body) {
  for (int64_t j = 0; j < all.num_columns; j += panel) {
    TermColumns columns = all;
    columns.column += j;
    columns.num_columns = std::min(panel, all.num_columns - j);
    body(j, columns);
  }
}

}  // namespace

AdapterProducts::AdapterProducts(const Adapter& adapter, uint32_t projection, const int32_t* expert_offsets,
                                 int64_t num_slots, DType dtype)
    : adapter_(adapter),
      a_{.data = adapter.a},
      b_{.data = adapter.b},
      mask_(adapter, projection),
      expert_offsets_(expert_offsets),
      num_slots_(num_slots),
      dtype_(dtype) {}

int64_t AdapterProducts::masked_bytes(const Adapter& adapter, int64_t num_slots, DType dtype) {
  return adapter.defined() && adapter.dropout > 0 ? SlotRows::bytes(num_slots, adapter.a.shape[2], dtype) : 0;
}

const void* const* AdapterProducts::masked(const void* const* rows, Workspace& workspace,
                                           const Context& context) const {
  if (!drops()) return rows;
  const int64_t width = adapter_.a.shape[2];
  const SlotRows copies(workspace, num_slots_, width, dtype_);
  const int64_t used_slots = expert_offsets_[a_.num_experts()];
  parallel_for_ranges(context.num_threads, used_slots, 16, [&](int64_t begin, int64_t end, int) {
    for (int64_t s = begin; s < end; ++s) {
      char* const row = copies.row(s);
      std::memcpy(row, rows[s], static_cast<size_t>(width * size_of(dtype_)));
      if (dtype_ == DType::kFloat32) {
        mask_.apply(reinterpret_cast<float*>(row), s, 0, width);
      } else {
        mask_.apply(reinterpret_cast<uint16_t*>(row), s, 0, width);
      }
    }
  });
  return copies.pointers();
}

Matrix AdapterProducts::factor(int64_t expert, int64_t column, AdapterSide side) const {
  const ExpertMatrix matrix(side == AdapterSide::kA ? a_ : b_, expert, dtype_);
  return side == AdapterSide::kA ? matrix.rows_from(column) : matrix.columns_from(column);
}

void AdapterProducts::multiply_panel(const SlotRows& out, const void* const* rows, AdapterSide side, const Tile& tile,
                                     const Start& next, const ProductScratch& scratch, const Kernels& k) const {
  const int64_t rank = adapter_.rank(), panel = k.panel, element = size_of(dtype_);
  const int64_t columns = std::clamp<int64_t>(rank_of(tile.expert) - tile.column, 0, panel);
  const int64_t stored = std::min(panel, rank - tile.column);
  if (columns > 0) {
    const Product product{.rows = rows + tile.first_row,
                          .num_rows = tile.num_rows,
                          .b = factor(tile.expert, tile.column, side),
                          .num_columns = columns,
                          .depth = side == AdapterSide::kA ? adapter_.a.shape[2] : adapter_.b.shape[1],
                          .c = scratch.c,
                          .next = next,
                          .scratch = scratch.packing};
    // Columns of B run across memory. Few of them would leave most lanes of a panel empty, so they are transposed: as much
    // work as multiplying about 10 rows.
    const bool along_k = side == AdapterSide::kA || 2 * columns <= panel;
    along_k ? k.dot_products(product) : k.multiply(product);
  }
  const auto scale = static_cast<float>(adapter_.scales.as<const float>()[tile.expert] / (1.0 - adapter_.dropout));
  for (int64_t m = 0; m < tile.num_rows; ++m) {
    float* const c = scratch.c + m * panel;
    char* const row = out.row(tile.first_row + m) + tile.column * element;
    for (int64_t j = 0; j < columns; ++j) c[j] *= scale;
    k.store_row(row, dtype_, c, columns);
    std::memset(row + columns * element, 0, static_cast<size_t>((stored - columns) * element));
  }
}

void AdapterProducts::multiply(const SlotRows& out, const void* const* rows, AdapterSide side,
                               const ThreadMemory& memory, const Context& context) const {
  const Kernels& k = context.kernels;
  const std::vector<Tile> tiles = make_tiles(expert_offsets_, num_experts(), adapter_.rank(), k.panel, k.most_rows);
  parallel_for_shares(context.num_threads, static_cast<int64_t>(tiles.size()), [&](int64_t task, int thread) {
    const Tile* const tile = &tiles[static_cast<size_t>(task)];
    const Start next = tile != &tiles.back() ? factor(tile[1].expert, tile[1].column, side).start() : Start{};
    multiply_panel(out, rows, side, *tile, next, memory.of(thread), k);
  });
}

Matrix AdapterProducts::operand(const TermColumns& of, AdapterSide side) const {
  const ExpertMatrix matrix(side == AdapterSide::kA ? b_ : a_, of.expert, dtype_);
  return side == AdapterSide::kA ? matrix.rows_from(of.column) : matrix.columns_from(of.column);
}

Product AdapterProducts::product(const TermColumns& of, const void* const* small_rows, AdapterSide side,
                                 const ProductScratch& scratch) const {
  return {.rows = small_rows + of.first_slot,
          .num_rows = of.num_rows,
          .b = operand(of, side),
          .num_columns = of.num_columns,
          .depth = rank_of(of.expert),
          .c = nullptr,
          .scratch = scratch.packing};
}

void AdapterProducts::prefetch(const TermColumns& of, AdapterSide side) const {
  const Matrix b = operand(of, side);
  const bool along_k = b.k_stride == 1;  // else n runs along memory
  const int64_t depth = rank_of(of.expert), element = size_of(dtype_);
  const int64_t rows = along_k ? of.num_columns : depth, width = (along_k ? depth : of.num_columns) * element;
  const int64_t stride = (along_k ? b.n_stride : b.k_stride) * element;
  const char* row = static_cast<const char*>(b.data);
  if (stride == width) {
    prefetch_bytes(row, rows * width);
    return;
  }
  for (int64_t n = 0; n < rows; ++n, row += stride) prefetch_bytes(row, width);
}

void AdapterProducts::add_panel(float* c, int64_t stride, const TermColumns& to, const void* const* small_rows,
                                AdapterSide side, const ProductScratch& scratch, const Kernels& k) const {
  Product term = product(to, small_rows, side, scratch);
  term.c = scratch.c;
  k.multiply(term);
  for (int64_t m = 0; m < to.num_rows; ++m) {
    float* const row = scratch.c + m * k.panel;
    // the mask applies to the term alone
    if (side == AdapterSide::kB) mask_.apply(row, to.first_slot + m, to.column, to.num_columns);
    k.add_scaled_row(c + m * stride, row, DType::kFloat32, 1.0f, to.num_columns);
  }
}

void AdapterProducts::add(float* c, const TermColumns& to, const void* const* small_rows, AdapterSide side,
                          const ProductScratch& scratch, const Kernels& k) const {
  if (rank_of(to.expert) == 0) return;
  if (side == AdapterSide::kB && !drops()) {
    Product whole = product(to, small_rows, side, scratch);
    whole.c = c;
    whole.accumulate = true;
    multiply_wide(k, whole);
    return;
  }
  for_panels(to, k.panel, [&](int64_t j, const TermColumns& panel) {
    add_panel(c + j * to.num_rows, k.panel, panel, small_rows, side, scratch, k);
  });
}

void AdapterProducts::add_to_rows(float* c, int64_t stride, const TermColumns& to, const void* const* small_rows,
                                  const ProductScratch& scratch, const Kernels& k) const {
  if (rank_of(to.expert) == 0) return;
  for_panels(to, k.panel, [&](int64_t j, const TermColumns& panel) {
    add_panel(c + j, stride, panel, small_rows, AdapterSide::kA, scratch, k);
  });
}

template <typename StartAt>
void AdapterProducts::multiply_terms_of(float* terms, const SlotRows& small_rows, const Tile& tile, int64_t end,
                                        const ProductScratch& scratch, const Kernels& k, StartAt&& start_at) const {
  const int64_t width = adapter_.b.shape[1], panel = k.panel;
  const int64_t lead = ceil_div(kLeadBytes, adapter_.rank() * size_of(dtype_) * panel) * panel;
  if (rank_of(tile.expert) == 0) return;
  for (int64_t column = tile.column; column < end; column += panel) {
    const int64_t columns = std::min(panel, end - column);
    Product part = product({tile.expert, tile.first_row, tile.num_rows, column, columns}, small_rows.pointers(),
                           AdapterSide::kA, scratch);
    part.c = scratch.c;
    part.next = start_at(column + lead);
    k.multiply(part);
    for (int64_t m = 0; m < tile.num_rows; ++m) {
      std::memcpy(terms + (tile.first_row + m) * width + column, scratch.c + m * panel,
                  static_cast<size_t>(columns) * 4);
    }
  }
}

void AdapterProducts::multiply_terms(float* terms, const SlotRows& small_rows, const void* const* rows,
                                     const ThreadMemory& memory, const Context& context) const {
  const Kernels& k = context.kernels;
  const int num_threads = context.num_threads;
  const int64_t width = adapter_.b.shape[1], panel = k.panel, element = size_of(dtype_);
  const auto b_at = [&](int64_t expert, int64_t column) {
    return operand({expert, 0, 0, std::min(column, width - 1), 0}, AdapterSide::kA).start();
  };

  // An expert for a thread: A and B are one stream, and threads wait for each other once.
  const std::vector<Tile> experts = make_tiles(expert_offsets_, num_experts(), width, width, k.most_rows);
  const auto count = static_cast<int64_t>(experts.size());
  if (count % num_threads == 0 || count >= 4 * num_threads) {
    parallel_for_shares(num_threads, count, [&](int64_t i, int thread) {
      const Tile* const tile = &experts[static_cast<size_t>(i)];
      const ProductScratch scratch = memory.of(thread);
      if (rank_of(tile->expert) > 0) {  // the start of B, which its own prefetches skip
        prefetch_bytes(b_at(tile->expert, 0).data, std::min(kLeadBytes, width * adapter_.rank() * element));
      }
      for (int64_t column = 0; column < adapter_.rank(); column += panel) {
        const Start next = column + panel < adapter_.rank()
                               ? factor(tile->expert, column + panel, AdapterSide::kA).start()
                               : b_at(tile->expert, 0);
        multiply_panel(small_rows, rows, AdapterSide::kA, {tile->expert, column, tile->first_row, tile->num_rows}, next,
                       scratch, k);
      }
      multiply_terms_of(terms, small_rows, *tile, width, scratch, k, [&](int64_t column) -> Start {
        if (column < width || tile == &experts.back()) return b_at(tile->expert, column);
        const auto* const a = static_cast<const char*>(factor(tile[1].expert, 0, AdapterSide::kA).data);
        return {a + (column - width) * adapter_.rank() * element};
      });
    });
    return;
  }

  constexpr int64_t kColumns = 512;  // of a task: 8 KB of B at rank 8
  multiply(small_rows, rows, AdapterSide::kA, memory, context);
  const std::vector<Tile> tiles = make_tiles(expert_offsets_, num_experts(), width, kColumns, k.most_rows);
  const auto end_of = [&](const Tile& tile) { return std::min(width, tile.column + kColumns); };
  parallel_for_shares(num_threads, static_cast<int64_t>(tiles.size()), [&](int64_t task, int thread) {
    const auto index = static_cast<size_t>(task);
    // B from `column` of this tile on, which may be in one of the next tiles.
    const auto start_at = [&](int64_t column) {
      size_t i = index;
      for (; i + 1 < tiles.size() && column >= end_of(tiles[i]); ++i) column += tiles[i + 1].column - end_of(tiles[i]);
      return b_at(tiles[i].expert, column);
    };
    multiply_terms_of(terms, small_rows, tiles[index], end_of(tiles[index]), memory.of(thread), k, start_at);
  });
}

void AdapterProducts::clear_past_ranks(const TensorView& gradient, AdapterSide side) const {
  if (!adapter_.ranks.defined()) return;
  const int64_t element = size_of(gradient.dtype);
  for (int64_t e = 0; e < gradient.shape[0]; ++e) {
    const int64_t rank = rank_of(e);
    const int64_t first_row = side == AdapterSide::kA ? rank : 0, first_column = side == AdapterSide::kA ? 0 : rank;
    for (int64_t i = first_row; i < gradient.shape[1]; ++i) {
      char* const row = offset(gradient, e * gradient.stride[0] + i * gradient.stride[1]);
      if (gradient.stride[2] == 1) {
        std::memset(row + first_column * element, 0, static_cast<size_t>((gradient.shape[2] - first_column) * element));
        continue;
      }
      for (int64_t j = first_column; j < gradient.shape[2]; ++j) {
        std::memset(row + j * gradient.stride[2] * element, 0, static_cast<size_t>(element));
      }
    }
  }
}

// ---- terms -----------------------------------------------------------------------------------------------------------------

void AdapterTerms::prefetch(const TermColumns& of) const {
  if (ahead == nullptr) products->prefetch(of, side);
}

void AdapterTerms::add(float* c, const TermColumns& to, const ProductScratch& scratch, const Kernels& k) const {
  if (ahead == nullptr) return products->add(c, to, small_rows, side, scratch, k);
  for_panels(to, k.panel, [&](int64_t j, const TermColumns& panel) {
    add_to_rows(c + j * to.num_rows, k.panel, panel, scratch, k);
  });
}

void AdapterTerms::add_to_rows(float* c, int64_t stride, const TermColumns& to, const ProductScratch& scratch,
                               const Kernels& k) const {
  if (ahead == nullptr) return products->add_to_rows(c, stride, to, small_rows, scratch, k);
  const auto [expert, first_slot, num_rows, column, num_columns] = to;
  if (products->rank_of(expert) == 0) return;
  for (int64_t m = 0; m < num_rows; ++m) {
    k.add_scaled_row(c + m * stride, ahead + (first_slot + m) * width + column, DType::kFloat32, 1.0f, num_columns);
  }
}

// ---- forward ---------------------------------------------------------------------------------------------------------------

namespace {

// Whether the terms of all columns are computed ahead: while they stay in L2.
bool are_ahead(const Adapter& adapter, int64_t num_slots) {
  constexpr int64_t kMostBytes = 1 << 20;
  return num_slots * adapter.b.shape[1] * 4 <= kMostBytes;
}

}  // namespace

int64_t ForwardAdapter::bytes(const Adapter& adapter, int64_t num_slots, DType dtype) {
  if (!adapter.defined()) return 0;
  const int64_t term_bytes = are_ahead(adapter, num_slots) ? Workspace::padded(num_slots * adapter.b.shape[1] * 4) : 0;
  return term_bytes + SlotRows::bytes(num_slots, adapter.rank(), dtype) +
         AdapterProducts::masked_bytes(adapter, num_slots, dtype) +
         Workspace::padded(num_slots * static_cast<int64_t>(sizeof(void*)));
}

ForwardAdapter::ForwardAdapter(const Adapter& adapter, uint32_t projection, const Slots& slots, DType dtype,
                               Workspace& workspace)
    : slots_(slots), workspace_(workspace) {
  if (!adapter.defined()) return;
  products_.emplace(adapter, projection, slots.expert_offsets, slots.count, dtype);
  rows_.emplace(workspace, slots.count, adapter.rank(), dtype);
  pointers_ = workspace.take<const void*>(slots.count);
  width_ = adapter.b.shape[1];
  if (are_ahead(adapter, slots.count)) ahead_ = workspace.take<float>(slots.count * width_);
}

AdapterTerms ForwardAdapter::terms() const {
  if (!products_) return {};
  return {&*products_, AdapterSide::kA, rows_->pointers(), ahead_, width_};
}

void ForwardAdapter::multiply(const void* const* rows, const ThreadMemory& memory, const Context& context) {
  if (!products_) return;
  rows = products_->masked(rows, workspace_, context);
  if (ahead_ != nullptr) return products_->multiply_terms(ahead_, *rows_, rows, memory, context);
  products_->multiply(*rows_, rows, AdapterSide::kA, memory, context);
}

void ForwardAdapter::multiply(const TensorView& x, const int32_t* indices, const ThreadMemory& memory,
                              const Context& context) {
  if (!products_) return;
  fill_row_pointers(pointers_, x, indices, slots_.expert_offsets[products_->num_experts()]);
  multiply(pointers_, memory, context);
}

}  // namespace switchgear::cpu
