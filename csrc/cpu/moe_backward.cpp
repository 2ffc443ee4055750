// SPDX-License-Identifier: BSD-3-Clause
// moe_backward: the gradients of moe_forward, computed only from x and the saved pre-activation h.
//
//   per slot s of token t and expert e, with g = grad_y[t]·W_d (so ∂/∂a without the weight), a = glu(h[s]), w = topk_weight:
//     grad_topk_weight = <g, a> + <grad_y[t], b_d>      grad_h = glu'(h[s], w·g)
//   grad_x[t] = Σ_s grad_h[s]·W_gu      grad_W_gu = Σ_s grad_h[s]ᵀ x[t]      grad_W_d = Σ_s grad_y[t]ᵀ (w·a)
//   work 2·S·H·(I + N + N + I) flop (12·S·H·I for gated experts); traffic: touched weights once per 240 rows of an expert
//   (384 with AMX), weight gradients written once; reached on 2 cores of Zen 5 in bfloat16: 78 % of the floor with 64 rows
//   per expert, 69 % with 32
//
// 1. Tiles (expert, panel of a, rows): g, then one pass over the tile for the activation's backward, the recomputed a and the
//    partial sums of grad_topk_weight (added afterwards in the order of the panels).
// 2. grad_x by token_sum, grad_W_gu and grad_W_d by weight_gradient; biases by adding rows.
// 3. Adapters (adapter.h), with m the mask of dropout: v' = s·(grad_y·B_d) before 1, whose tiles add m ⊙ (v'·A_d) to g;
//    u' = s·(grad_h·B_gu) before grad_x, whose tiles add m ⊙ (u'·A_gu); then grad_A_gu = Σ u'ᵀ(x ⊙ m), grad_B_gu = Σ grad_hᵀu,
//    grad_A_d = Σ v'ᵀ(w·a ⊙ m), grad_B_d = Σ grad_yᵀv with u = s·((x ⊙ m)·A_guᵀ) and v = s·((w·a ⊙ m)·A_dᵀ) recomputed.
// Stored projections are decoded to the dtype of x in 1 and for grad_x: in the product itself (stored_columns.inl), or 64
// columns at a time (decoded_columns.h).
// grad_h, w·a, u, v, u' and v' are rounded once to the dtype of x; everything else is float32. Deterministic.
#include <cstring>
#include <optional>
#include <vector>

#include "adapter.h"
#include "decoded_columns.h"
#include "experts.h"
#include "gate_columns.h"
#include "ops.h"
#include "slots.h"
#include "threads.h"
#include "token_sum.h"
#include "weight_gradient.h"
#include "wide_product.h"

namespace switchgear::cpu {
namespace {

struct ActivationBackward {
  const MoeBackwardArgs& args;
  const Slots& slots;
  const void* const* grad_y_rows;  // [S] gathered rows of grad_y
  TensorView grad_h;               // [S,N]
  TensorView weighted_a;           // [S,I]
  float* weight_parts;             // [S, panels of I]
  int64_t num_panels;
  int64_t wide;  // columns of a tile
  const Context& context;
  const Kernels& k;
  AdapterTerms adapter;  // of down_proj: v'

  // The start of the next tile's columns, for a prefetch.
  Start start(const Tile& tile) const {
    const Weight& down_proj = args.weights.down_proj;
    const DType dtype = args.grad_y.dtype;
    return in_place(down_proj, dtype, k) ? columns_in_place(down_proj, tile.expert, tile.column, dtype).start()
                                         : Start{};
  }

  void run(const Tile& tile, const Start& next, const WideScratch& scratch, void* adapter_scratch,
           DecodedColumns& down_proj) const {
    const int64_t width = std::min(wide, weighted_a.shape[1] - tile.column);
    const TermColumns term{tile.expert, tile.first_row, tile.num_rows, tile.column, width};
    if (adapter.defined()) adapter.prefetch(term);
    multiply_wide(k, {.rows = grad_y_rows + tile.first_row,
                      .num_rows = tile.num_rows,
                      .b = down_proj.of(tile.expert, tile.column, width, context),
                      .num_columns = width,
                      .depth = args.grad_y.shape[1],
                      .c = scratch.c,
                      .next = next,
                      .scratch = scratch.packing});
    if (adapter.defined()) adapter.add(scratch.c, term, ProductScratch(adapter_scratch), k);
    // Row by row, so that rows of h and of the results are read and written in runs.
    for (int64_t m = 0; m < tile.num_rows; ++m) {
      for (int64_t column = 0; column < width; column += k.panel) {
        finish(tile.first_row + m, tile.column + column, scratch.c + column * tile.num_rows + m * k.panel);
      }
    }
  }

 private:
  // One panel of columns of one slot; `g` is its product.
  void finish(int64_t slot, int64_t column, const float* g) const {
    const int64_t intermediate_size = weighted_a.shape[1];
    const int64_t count = std::min<int64_t>(k.panel, intermediate_size - column);
    const GateColumns columns = gate_columns(args.options, intermediate_size, column, count, k.panel);
    const float weight = slots.weights[slot];
    for (int i = 0; i < 2; ++i) {  // hardware prefetching restarts at each row
      const char* const ahead = at(args.h, std::min(slot + 2, args.h.shape[0] - 1), columns.begin[i]);
      for (int64_t b = 0; b < columns.count[i] * size_of(args.h.dtype); b += 64) __builtin_prefetch(ahead + b);
    }
    float part[2][kMaxPanel], a[kMaxPanel], scaled[kMaxPanel];
    for (int i = 0; i < 2; ++i) k.load_row(part[i], at(args.h, slot, columns.begin[i]), args.h.dtype, columns.count[i]);
    GateRow shuffled;
    const auto [gate, up] = split_gate(shuffled, part[0], part[1], args.options, columns, count);
    std::memset(scaled, 0, static_cast<size_t>(count) * sizeof(float));
    k.add_scaled_row(scaled, g, DType::kFloat32, weight, count);
    k.glu_backward_row(a, gate, up, scaled, gate, up, args.options, count);
    merge_gate(part[0], part[1], shuffled, args.options, columns, count);

    weight_parts[slot * num_panels + column / k.panel] = k.dot_rows(g, a, DType::kFloat32, count);
    for (int i = 0; i < 2; ++i) {
      k.store_row(at(grad_h, slot, columns.begin[i]), grad_h.dtype, part[i], columns.count[i]);
    }
    std::memset(scaled, 0, static_cast<size_t>(count) * sizeof(float));
    k.add_scaled_row(scaled, a, DType::kFloat32, weight, count);
    k.store_row(at(weighted_a, slot, column), weighted_a.dtype, scaled, count);
  }
};

void sum_weight_gradient(const ActivationBackward& stage, int num_threads) {
  const MoeBackwardArgs& args = stage.args;
  const Slots& slots = stage.slots;
  const int64_t top_k = args.topk_ids.shape[1];
  parallel_for_ranges(num_threads, args.topk_ids.shape[0], 64, [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin * top_k; i < end * top_k; ++i) {
      const int32_t slot = slots.plan.slot_indices.as<int32_t>()[i];
      float sum = 0.0f;
      if (slot >= 0) {
        for (int64_t p = 0; p < stage.num_panels; ++p) sum += stage.weight_parts[slot * stage.num_panels + p];
        const TensorView& bias = args.weights.down_bias;
        if (bias.defined()) {
          const int32_t expert = args.topk_ids.as<int32_t>()[i];
          sum += stage.k.dot_rows(row_of(args.grad_y, i / top_k), row_of(bias, expert), bias.dtype, bias.shape[1]);
        }
      }
      args.grad_topk_weights.as<float>()[i] = sum;
    }
  });
}

// grad_bias[e] = Σ_{s of e} weight[s]·rows[s], or grad_bias[i] that of experts[i]; all weights are 1 if null
void bias_gradient(const TensorView& grad_bias, const void* const* rows, DType dtype, const float* weights,
                   const int32_t* expert_offsets, const int32_t* experts, const Context& context) {
  const Kernels& k = context.kernels;
  const int64_t width = grad_bias.shape[1];
  parallel_for(context.num_threads, grad_bias.shape[0], [&](int64_t i, int) {
    const int64_t e = experts != nullptr ? experts[i] : i;
    std::vector<float> sum(static_cast<size_t>(width), 0.0f);
    for (int32_t s = expert_offsets[e]; s < expert_offsets[e + 1]; ++s) {
      k.add_scaled_row(sum.data(), rows[s], dtype, weights != nullptr ? weights[s] : 1.0f, width);
    }
    k.store_row(row_of(grad_bias, i), grad_bias.dtype, sum.data(), width);
  });
}

// One adapter in moe_backward: its products, and the small rows of gradients, u' or v'.
class BackwardAdapter {
 public:
  static int64_t bytes(const Adapter& adapter, int64_t num_slots, DType dtype) {
    return adapter.defined() ? SlotRows::bytes(num_slots, adapter.rank(), dtype) : 0;
  }
  BackwardAdapter(const Adapter& adapter, uint32_t projection, const Slots& slots, DType dtype, Workspace& workspace)
      : adapter_(adapter), slots_(slots), dtype_(dtype) {
    if (!adapter.defined()) return;
    products_.emplace(adapter, projection, slots.expert_offsets, slots.count, dtype);
    small_.emplace(workspace, slots.count, adapter.rank(), dtype);
  }

  AdapterTerms terms() const {
    if (!products_) return {};
    return {.products = &*products_, .side = AdapterSide::kB, .small_rows = small_->pointers()};
  }

  // From gradients [S] of the projection's result.
  void multiply(const void* const* gradients, const ThreadMemory& memory, const Context& context) {
    if (products_) products_->multiply(*small_, gradients, AdapterSide::kB, memory, context);
  }

  // The gradients of a and b, if defined. input: the rows [S] that A reads, before the mask; gradients: those of the
  // projection's result. A weight of the slot may be in one of them.
  void write(const TensorView& grad_a, const TensorView& grad_b, const void* const* input, const void* const* gradients,
             const ThreadMemory& memory, const Context& context) const {
    if (!grad_a.defined() && !grad_b.defined()) return;
    const int64_t rank = adapter_.rank();
    Workspace workspace(AdapterProducts::masked_bytes(adapter_, slots_.count, dtype_) +
                        SlotRows::bytes(slots_.count, rank, dtype_));
    const void* const* const rows = products_->masked(input, workspace, context);
    if (grad_a.defined()) {
      weight_gradient({small_->pointers(), rows, dtype_, slots_.expert_offsets, nullptr, grad_a}, context);
      products_->clear_past_ranks(grad_a, AdapterSide::kA);
    }
    if (grad_b.defined()) {
      const SlotRows low(workspace, slots_.count, rank, dtype_);
      products_->multiply(low, rows, AdapterSide::kA, memory, context);
      weight_gradient({gradients, low.pointers(), dtype_, slots_.expert_offsets, nullptr, grad_b}, context);
      products_->clear_past_ranks(grad_b, AdapterSide::kB);
    }
  }

 private:
  const Adapter& adapter_;
  const Slots& slots_;
  DType dtype_;
  std::optional<AdapterProducts> products_;
  std::optional<SlotRows> small_;
};

}  // namespace

void moe_backward(const MoeBackwardArgs& args, const Context& context) {
  const int num_threads = context.num_threads;
  const Kernels& k = context.kernels;
  const int64_t num_experts = args.weights.gate_up_proj.num_experts();
  const Weight& down_proj = args.weights.down_proj;
  const int64_t width = args.weights.gate_up_proj.num_rows(), intermediate_size = down_proj.num_cols();
  const int64_t num_slots = args.topk_ids.shape[0] * args.topk_ids.shape[1];
  const int64_t num_panels = ceil_div(intermediate_size, k.panel);
  const int64_t element = size_of(args.x.dtype);
  const auto pointers = num_slots * static_cast<int64_t>(sizeof(void*));
  const int64_t adapter_bytes = args.weights.down_adapter.defined() ? ProductScratch::kBytes : 0;
  const int64_t thread_bytes = WideScratch::kBytes + adapter_bytes + DecodedColumns::bytes(down_proj, args.x.dtype, k);

  Workspace workspace(
      Slots::bytes(num_slots, num_experts) + 4 * Workspace::padded(pointers) +
      Workspace::padded(num_slots * width * element) + Workspace::padded(num_slots * intermediate_size * element) +
      Workspace::padded(num_slots * num_panels * 4) +
      BackwardAdapter::bytes(args.weights.gate_up_adapter, num_slots, args.x.dtype) +
      BackwardAdapter::bytes(args.weights.down_adapter, num_slots, args.x.dtype) + num_threads * thread_bytes);
  const Slots slots = make_slots(workspace, args.topk_ids, args.topk_weights, num_experts, context);
  const int64_t used_slots = slots.expert_offsets[num_experts];
  const void** const x_rows = workspace.take<const void*>(num_slots);
  const void** const grad_y_rows = workspace.take<const void*>(num_slots);
  const void** const grad_h_rows = workspace.take<const void*>(num_slots);
  const void** const a_rows = workspace.take<const void*>(num_slots);
  char* const grad_h = static_cast<char*>(workspace.take_bytes(num_slots * width * element));
  char* const weighted_a = static_cast<char*>(workspace.take_bytes(num_slots * intermediate_size * element));
  float* const weight_parts = workspace.take<float>(num_slots * num_panels);
  char* const memory = static_cast<char*>(workspace.take_bytes(num_threads * thread_bytes));
  fill_row_pointers(x_rows, args.x, slots.token_indices, used_slots);
  fill_row_pointers(grad_y_rows, args.grad_y, slots.token_indices, used_slots);
  fill_row_pointers(grad_h_rows, grad_h, width * element, used_slots);
  fill_row_pointers(a_rows, weighted_a, intermediate_size * element, used_slots);

  static_assert(WideScratch::kBytes >= ProductScratch::kBytes);
  const ThreadMemory thread_memory{memory, thread_bytes};
  BackwardAdapter first(args.weights.gate_up_adapter, 0, slots, args.x.dtype, workspace);
  BackwardAdapter second(args.weights.down_adapter, 1, slots, args.x.dtype, workspace);
  second.multiply(grad_y_rows, thread_memory, context);

  const int64_t wide = in_place(down_proj, args.x.dtype, k)
                           ? wide_columns(intermediate_size, num_experts, k.panel, num_threads)
                           : kDecodedColumns;
  const std::vector<Tile> tiles = make_tiles(slots.expert_offsets, num_experts, intermediate_size, wide, k.most_rows);
  const ActivationBackward stage{.args = args,
                                 .slots = slots,
                                 .grad_y_rows = grad_y_rows,
                                 .grad_h = view(grad_h, args.x.dtype, num_slots, width),
                                 .weighted_a = view(weighted_a, args.x.dtype, num_slots, intermediate_size),
                                 .weight_parts = weight_parts,
                                 .num_panels = num_panels,
                                 .wide = wide,
                                 .context = context,
                                 .k = k,
                                 .adapter = second.terms()};
  std::vector<DecodedColumns> decoded;
  for (int i = 0; i < num_threads; ++i) {
    decoded.emplace_back(down_proj, args.x.dtype, memory + i * thread_bytes + WideScratch::kBytes + adapter_bytes);
  }
  const auto work = [&](int64_t i) {
    const Tile& tile = tiles[static_cast<size_t>(i)];
    if (tile.first_row > slots.expert_offsets[tile.expert]) return TaskWork{tile.expert, tile.num_rows, 0};
    const int64_t columns = std::min(wide, intermediate_size - tile.column);
    const Matrix matrix = ExpertMatrix(down_proj, tile.expert, args.x.dtype).rows_from(0);
    return TaskWork{tile.expert, tile.num_rows, bytes_of(matrix, columns, args.grad_y.shape[1])};
  };
  const auto run_tile = [&](int64_t i, int thread) {
    const Tile* const tile = &tiles[static_cast<size_t>(i)];
    char* const own = memory + thread * thread_bytes;
    stage.run(*tile, tile != &tiles.back() ? stage.start(tile[1]) : Start{}, WideScratch(own),
              own + WideScratch::kBytes, decoded[static_cast<size_t>(thread)]);
  };
  parallel_for_shares(num_threads, static_cast<int64_t>(tiles.size()), run_tile, Loop{"gradient of h", work});

  if (args.grad_topk_weights.defined()) sum_weight_gradient(stage, num_threads);
  if (args.grad_x.defined() || args.grad_gate_up_a.defined()) first.multiply(grad_h_rows, thread_memory, context);
  if (args.grad_x.defined()) {
    token_sum({.rows = grad_h_rows,
               .depth = width,
               .matrices = &args.weights.gate_up_proj,
               .transposed = true,
               .bias = {},
               .slot_weights = nullptr,
               .expert_offsets = slots.expert_offsets,
               .token_indices = slots.token_indices,
               .dtype = args.x.dtype,
               .out = args.grad_x,
               .accumulate = args.adds_x,
               .adapter = first.terms()},
              context);
  }
  const int32_t* const experts = args.experts.as<int32_t>();
  const auto weight_gradient_of = [&](const TensorView& gradient, const void* const* left, const void* const* right) {
    if (!gradient.defined()) return;
    weight_gradient({left, right, args.x.dtype, slots.expert_offsets, experts, gradient, args.adds}, context);
  };
  weight_gradient_of(args.grad_gate_up_proj, grad_h_rows, x_rows);
  weight_gradient_of(args.grad_down_proj, grad_y_rows, a_rows);
  first.write(args.grad_gate_up_a, args.grad_gate_up_b, x_rows, grad_h_rows, thread_memory, context);
  second.write(args.grad_down_a, args.grad_down_b, a_rows, grad_y_rows, thread_memory, context);
  if (args.grad_gate_up_bias.defined()) {
    bias_gradient(args.grad_gate_up_bias, grad_h_rows, args.x.dtype, nullptr, slots.expert_offsets, experts, context);
  }
  if (args.grad_down_bias.defined()) {
    bias_gradient(args.grad_down_bias, grad_y_rows, args.x.dtype, slots.weights, slots.expert_offsets, experts,
                  context);
  }
}

}  // namespace switchgear::cpu
