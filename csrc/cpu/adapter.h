// SPDX-License-Identifier: BSD-3-Clause
// Products with a low-rank adapter (switchgear/adapter.h), for moe_forward and moe_backward.
//
//   small rows [S,r]   u = s_e·(x·Aᵀ) and q = s_e·(g·B), computed once and rounded to the dtype of x
//   terms              u·Bᵀ and q·A, of depth r, added to a tile of the projection's own product while it is in L1/L2
//   masks              of dropout: rows that A reads, and the terms of their gradient
#pragma once
#include <optional>

#include "context.h"
#include "experts.h"
#include "slot_rows.h"
#include "slots.h"
#include "switchgear/adapter.h"

namespace switchgear::cpu {

// The mask of dropout of one projection: python/switchgear/reference/layer.py specifies it.
class DropoutMask {
 public:
  DropoutMask(const Adapter& adapter, uint32_t projection)
      : start_(mix(mix(static_cast<uint32_t>(adapter.seed)) + static_cast<uint32_t>(adapter.seed >> 32)) + projection),
        threshold_(static_cast<uint32_t>(adapter.dropout * 4294967296.0)) {}

  // Sets elements that are dropped to zero: columns [column, column + count) of a slot's row.
  template <typename T>
  void apply(T* row, int64_t slot, int64_t column, int64_t count) const {
    const uint32_t first = mix(start_ + 2 * static_cast<uint32_t>(slot)) + static_cast<uint32_t>(column) * kColumn;
    for (int64_t j = 0; j < count; ++j) {
      row[j] = mix(first + static_cast<uint32_t>(j) * kColumn) >= threshold_ ? row[j] : T{};
    }
  }

 private:
  static constexpr uint32_t kColumn = 0x9E3779B9u;
  static uint32_t mix(uint32_t n) {
    n += 0x6A09E667u;
    n = (n ^ (n >> 16)) * 0x85EBCA6Bu;
    n = (n ^ (n >> 13)) * 0xC2B2AE35u;
    return n ^ (n >> 16);
  }

  uint32_t start_, threshold_;
};

// Which rows an adapter's small rows are made of: those that A reads, or gradients of the projection's result.
enum class AdapterSide : uint8_t { kA, kB };

// Memory of the threads of a call: that of a thread starts with ProductScratch::kBytes.
struct ThreadMemory {
  char* data;
  int64_t stride;  // bytes

  ProductScratch of(int thread) const { return ProductScratch(data + thread * stride); }
};

// The part of a projection's product that a term is added to.
struct TermColumns {
  int64_t expert, first_slot, num_rows, column, num_columns;
};

// The adapter of a projection in one call.
class AdapterProducts {
 public:
  AdapterProducts(const Adapter& adapter, uint32_t projection, const int32_t* expert_offsets, int64_t num_slots,
                  DType dtype);

  int64_t rank_of(int64_t expert) const { return adapter_.rank_of(expert); }
  int64_t num_experts() const { return a_.num_experts(); }
  bool drops() const { return adapter_.dropout > 0; }

  // The rows that A reads: `rows` [S], or masked copies, which take masked_bytes of the workspace.
  const void* const* masked(const void* const* rows, Workspace& workspace, const Context& context) const;
  static int64_t masked_bytes(const Adapter& adapter, int64_t num_slots, DType dtype);
  // out[s] = s_e · rows[s]·A_eᵀ, or s_e · rows[s]·B_e; zeros from the expert's rank on.
  void multiply(const SlotRows& out, const void* const* rows, AdapterSide side, const ThreadMemory& memory,
                const Context& context) const;

  // Prefetches what `add` reads: called before the projection's own product, which takes as long as memory needs.
  void prefetch(const TermColumns& of, AdapterSide side) const;
  // Adds small rows [S] times B_eᵀ (of side kA), or times A_e and masked (of side kB), to columns of a product: panels as
  // multiply_wide leaves them. Of side kA it is summed on its own first, in scratch.c, as multiply_terms does: the same
  // bits for any number of rows.
  void add(float* c, const TermColumns& to, const void* const* small_rows, AdapterSide side,
           const ProductScratch& scratch, const Kernels& k) const;
  // The same for side kA and a product whose rows are `stride` apart.
  void add_to_rows(float* c, int64_t stride, const TermColumns& to, const void* const* small_rows,
                   const ProductScratch& scratch, const Kernels& k) const;
  // multiply of side kA, and then small rows times B_eᵀ, all columns: terms[s] has as many floats as B_e has rows. Of an expert
  // of rank 0 they are undefined.
  void multiply_terms(float* terms, const SlotRows& small_rows, const void* const* rows, const ThreadMemory& memory,
                      const Context& context) const;

  // Zeros in the gradient of a, or b, past each expert's rank, whatever x holds.
  void clear_past_ranks(const TensorView& gradient, AdapterSide side) const;

 private:
  // What rows are multiplied by to make small rows of a side, from a column on.
  Matrix factor(int64_t expert, int64_t column, AdapterSide side) const;
  // A tile of `multiply`: at most a panel of columns. `next` is read afterwards.
  void multiply_panel(const SlotRows& out, const void* const* rows, AdapterSide side, const Tile& tile,
                      const Start& next, const ProductScratch& scratch, const Kernels& k) const;
  // A tile of terms, of all columns up to `end`. start_at(column) is where B or what is read afterwards continues.
  template <typename StartAt>
  void multiply_terms_of(float* terms, const SlotRows& small_rows, const Tile& tile, int64_t end,
                         const ProductScratch& scratch, const Kernels& k, StartAt&& start_at) const;
  // What small rows of a side are multiplied by to make a term, and that product without its c.
  Matrix operand(const TermColumns& of, AdapterSide side) const;
  Product product(const TermColumns& of, const void* const* small_rows, AdapterSide side,
                  const ProductScratch& scratch) const;
  // `add` for at most a panel of columns and rows of c that are `stride` apart.
  void add_panel(float* c, int64_t stride, const TermColumns& to, const void* const* small_rows, AdapterSide side,
                 const ProductScratch& scratch, const Kernels& k) const;

  const Adapter& adapter_;
  Weight a_, b_;
  DropoutMask mask_;
  const int32_t* expert_offsets_;
  int64_t num_slots_;
  DType dtype_;
};

// What the tiles of a projection add to their own products; by default nothing. `ahead`: terms of all columns, computed
// before, in rows of `width`. Else each tile multiplies the small rows itself.
struct AdapterTerms {
  const AdapterProducts* products = nullptr;
  AdapterSide side = AdapterSide::kA;
  const void* const* small_rows = nullptr;  // [S]
  const float* ahead = nullptr;
  int64_t width = 0;

  bool defined() const { return products != nullptr; }
  // Prefetches what `add` reads: called before the projection's own product, which takes as long as memory needs.
  void prefetch(const TermColumns& of) const;
  // To panels as multiply_wide leaves them, or to rows `stride` apart. scratch.c is not c.
  void add(float* c, const TermColumns& to, const ProductScratch& scratch, const Kernels& k) const;
  void add_to_rows(float* c, int64_t stride, const TermColumns& to, const ProductScratch& scratch,
                   const Kernels& k) const;
};

// The small rows of one projection in moe_forward; without an adapter, nothing. They take `bytes` of the call's workspace:
// with blocks of their own, calls would use more than are kept (workspace.h). Terms of few rows are computed ahead: A and B are
// then read as one stream instead of in pieces between those of the weights.
class ForwardAdapter {
 public:
  static int64_t bytes(const Adapter& adapter, int64_t num_slots, DType dtype);
  ForwardAdapter(const Adapter& adapter, uint32_t projection, const Slots& slots, DType dtype, Workspace& workspace);

  AdapterTerms terms() const;
  // Computes them from rows [S], or from rows of x: x[indices[s]], or x[s] without indices. Once.
  void multiply(const void* const* rows, const ThreadMemory& memory, const Context& context);
  void multiply(const TensorView& x, const int32_t* indices, const ThreadMemory& memory, const Context& context);

 private:
  const Slots& slots_;
  Workspace& workspace_;
  const void** pointers_ = nullptr;
  float* ahead_ = nullptr;
  int64_t width_ = 0;  // of `ahead`
  std::optional<AdapterProducts> products_;
  std::optional<SlotRows> rows_;
};

}  // namespace switchgear::cpu
