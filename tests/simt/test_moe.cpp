// SPDX-License-Identifier: BSD-3-Clause
#include "layer.h"
#include "run_op.h"
#include "runtime.h"

namespace switchgear::test {
namespace {

// In addition to the cases of all ops: experts with too many rows for the small tiles, and sizes that are whole vectors.
constexpr Case kLayerCases[] = {
    {"vectors throughout", 24, 64, 32, 4, 2},
    {"more than 16 rows", 60, 40, 72, 2, 1},
    {"more than 80 rows", 100, 24, 40, 1, 1},
    {"more than 80 rows, holes", 90, 48, 136, 2, 3, Ids::kEmptySlots},
};

// Whole vectors everywhere, as sm_90's kernels need. Each kind of tile, several tiles per block, and an empty expert.
constexpr Case kHopperLayers[] = {
    {"up to 16 rows", 20, 72, 40, 4, 2},
    {"up to 64 rows", 40, 64, 136, 3, 2, Ids::kEvenExperts},
    {"more than 64 rows", 100, 136, 72, 1, 1},
    {"more than 64 rows, holes", 60, 24, 200, 2, 4, Ids::kEmptySlots},
    {"nothing chosen", 5, 16, 24, 3, 2, Ids::kNone},
};

// Layers with 16-bit types on sm_90; each kind of gate occurs in at least two of them.
template <typename Body>
void for_each_hopper_layer(Body&& body) {
  simt::device() = simt::sm_90();
  simt::device().multiprocessors = 2;
  const std::vector<GluOptions> all = all_glu_options();
  size_t variant = 0;
  for (const Case& c : kHopperLayers) {
    for (size_t i = 0; i < (c.ids == Ids::kNone ? 2 : 13); ++i, ++variant) {
      const GluOptions& o = all[variant * 5 % all.size()];
      const DType dtype = variant % 2 == 0 ? DType::kBFloat16 : DType::kFloat16;
      note = join("sm_90 ", c.name, " ", name_of(dtype), describe(o), variant % 3 == 0 ? " transposed" : "");
      if (!takes_variant(static_cast<int64_t>(variant))) continue;
      const Layer l(c, dtype, o, variant % 4 != 0, variant % 3 == 0, 31 + variant, true);
      const uint64_t before = simt::statistics().wgmma;
      body(l);
      CHECK((simt::statistics().wgmma > before) == (c.ids != Ids::kNone));
    }
  }
  simt::device() = simt::sm_90();
}

template <typename Body>
void for_each_layer(int per_dtype, Body&& body) {
  const std::vector<GluOptions> all = all_glu_options();
  size_t variant = 0;
  const auto run = [&](const Case& c) {
    for (const DType dtype : kFloatTypes) {
      for (int i = 0; i < (c.H > 1000 ? 1 : per_dtype); ++i, ++variant) {
        const GluOptions& o = all[variant * 7 % all.size()];
        if (!takes_variant(static_cast<int64_t>(variant))) continue;
        const Layer l(c, dtype, o, variant % 2 == 0, variant % 3 == 0, 31 + variant, variant % 4 != 0);
        note = join(c.name, " ", name_of(dtype), describe(o), l.transposed ? " transposed" : "",
                    l.aligned ? " aligned" : "");
        simt::device() = variant % 2 == 0 ? simt::sm_86() : simt::sm_80();
        body(l);
      }
    }
  };
  for (const Case& c : kCases) run(c);
  for (const Case& c : kLayerCases) run(c);
}

// With h over 0xff, which is NaN, so that the reference shows what is not written; without h over 0x00.
void check_forward(const Layer& l) {
  const Case& c = l.c;
  const ForwardTables want = reference_forward(l, Slots::kRounded);
  Array y = l.empty({c.T, c.H}, 2), h = l.empty({c.T * c.K, l.N}, 1), y_alone = l.empty({c.T, c.H}, 0);
  MoeForwardArgs args{.x = l.x,
                      .weights = l.weights(),
                      .topk_ids = l.ids,
                      .topk_weights = l.topk_weights,
                      .options = l.options,
                      .y = y,
                      .h = h};
  const auto run = [&](Execution exec) { cuda::moe_forward(args, exec); };
  run_over(0xff, {&y, &h}, run);
  check_table(y, want.y, "y");
  check_table(h, want.h, "h");
  args.h = {};
  args.y = y_alone;
  run_over(0x00, {&y_alone}, run);
  CHECK(same_bits(y, y_alone), "saving h changes y");
}
TEST(moe_forward_matches_reference) { for_each_layer(3, check_forward); }
TEST(moe_forward_on_sm90_matches_reference) { for_each_hopper_layer(check_forward); }

void check_backward(const Layer& l) {
  Array h = l.empty({l.c.T * l.c.K, l.N}, 1);
  const Table values = h_table(l);
  h.fill([&](int64_t i) { return values[static_cast<size_t>(i)].value; });
  const GradientTables want = reference_gradients(l, h, Slots::kRounded);
  Gradients got(l);
  const MoeBackwardArgs args{.grad_y = l.grad_y,
                             .x = l.x,
                             .h = h,
                             .weights = l.weights(),
                             .topk_ids = l.ids,
                             .topk_weights = l.topk_weights,
                             .options = l.options,
                             .grad_x = got.x,
                             .grad_gate_up_proj = l.matrices_of(got.gate_up_proj),
                             .grad_down_proj = l.matrices_of(got.down_proj),
                             .grad_gate_up_bias = got.gate_up_bias,
                             .grad_down_bias = got.down_bias,
                             .grad_topk_weights = got.topk_weights};
  const std::initializer_list<Array*> outputs = {&got.x,         &got.gate_up_proj, &got.down_proj, &got.gate_up_bias,
                                                 &got.down_bias, &got.topk_weights};
  // bfloat16 runs over 0x00 below, gradient by gradient; 0xff is NaN, so the reference shows what is not written.
  const bool alone_too = l.dtype == DType::kBFloat16;
  const auto run = [&](Execution exec) { cuda::moe_backward(args, exec); };
  if (alone_too) run_over(0xff, outputs, run);
  if (!alone_too) run_op(outputs, run);
  check_table(got.x, want.x, "grad_x");
  check_table(got.gate_up_proj, want.gate_up_proj, "grad_gate_up_proj", l.transposed);
  check_table(got.down_proj, want.down_proj, "grad_down_proj", l.transposed);
  check_table(got.gate_up_bias, want.gate_up_bias, "grad_gate_up_bias");
  check_table(got.down_bias, want.down_bias, "grad_down_bias");
  check_table(got.topk_weights, want.topk_weights, "grad_topk_weights");

  if (!alone_too) return;  // which work is skipped does not depend on the dtype
  // Each gradient by itself has the same bits.
  Gradients alone(l);
  const auto only = [&](TensorView MoeBackwardArgs::* field, Array& array, const TensorView& output) {
    MoeBackwardArgs one = args;
    one.grad_x = one.grad_gate_up_proj = one.grad_down_proj = {};
    one.grad_gate_up_bias = one.grad_down_bias = one.grad_topk_weights = {};
    one.*field = output;
    run_over(0x00, {&array}, [&](Execution exec) { cuda::moe_backward(one, exec); });
  };
  only(&MoeBackwardArgs::grad_x, alone.x, alone.x);
  only(&MoeBackwardArgs::grad_gate_up_proj, alone.gate_up_proj, l.matrices_of(alone.gate_up_proj));
  only(&MoeBackwardArgs::grad_down_proj, alone.down_proj, l.matrices_of(alone.down_proj));
  only(&MoeBackwardArgs::grad_gate_up_bias, alone.gate_up_bias, alone.gate_up_bias);
  only(&MoeBackwardArgs::grad_down_bias, alone.down_bias, alone.down_bias);
  only(&MoeBackwardArgs::grad_topk_weights, alone.topk_weights, alone.topk_weights);
  CHECK(same_bits(alone.x, got.x));
  CHECK(same_bits(alone.gate_up_proj, got.gate_up_proj));
  CHECK(same_bits(alone.down_proj, got.down_proj));
  CHECK(same_bits(alone.gate_up_bias, got.gate_up_bias));
  CHECK(same_bits(alone.down_bias, got.down_bias));
  CHECK(same_bits(alone.topk_weights, got.topk_weights));

  // So have those of some experts.
  const Array experts = every_second(l.c.E);
  Gradients some(l, experts.size(0));
  MoeBackwardArgs few = args;
  few.experts = experts;
  few.grad_x = few.grad_topk_weights = {};
  few.grad_gate_up_proj = l.matrices_of(some.gate_up_proj);
  few.grad_down_proj = l.matrices_of(some.down_proj);
  few.grad_gate_up_bias = some.gate_up_bias;
  few.grad_down_bias = some.down_bias;
  OpMemory memory(0xff);
  cuda::moe_backward(few, memory.execution());
  CHECK(same_experts(got.gate_up_proj, some.gate_up_proj, experts));
  CHECK(same_experts(got.down_proj, some.down_proj, experts));
  CHECK(same_experts(got.gate_up_bias, some.gate_up_bias, experts));
  CHECK(same_experts(got.down_bias, some.down_bias, experts));
}
TEST(moe_backward_matches_reference) { for_each_layer(2, check_backward); }
TEST(moe_backward_on_sm90_matches_reference) { for_each_hopper_layer(check_backward); }

// A token's y and gradients depend neither on the other tokens nor on the kernels picked for their number.
TEST(moe_tokens_do_not_depend_on_their_number) {
  simt::device() = simt::sm_80();
  const Case c{"batches", 150, 40, 40, 2, 1};
  for (const DType dtype : kFloatTypes) {
    const Layer l(c, dtype, {}, true, false, 3, true);
    Array first_y, first_grad_x, first_weights;
    for (const int64_t T : {150, 40, 9, 1}) {
      note = join(name_of(dtype), " ", T, " tokens");
      const auto some = [&](const TensorView& all) {
        TensorView view = all;
        view.shape[0] = T;
        return view;
      };
      Array y = l.empty({T, c.H}, 0), h = l.empty({T, l.N}, 0), grad_x = l.empty({T, c.H}, 0);
      Array weights(DType::kFloat32, {T, c.K});
      OpMemory memory(0xff);
      cuda::moe_forward({.x = some(l.x),
                         .weights = l.weights(),
                         .topk_ids = some(l.ids),
                         .topk_weights = some(l.topk_weights),
                         .options = l.options,
                         .y = y,
                         .h = h},
                        memory.execution());
      cuda::moe_backward({.grad_y = some(l.grad_y),
                          .x = some(l.x),
                          .h = h,
                          .weights = l.weights(),
                          .topk_ids = some(l.ids),
                          .topk_weights = some(l.topk_weights),
                          .options = l.options,
                          .grad_x = grad_x,
                          .grad_topk_weights = weights},
                         memory.execution());
      if (!first_y.defined()) first_y = y, first_grad_x = grad_x, first_weights = weights;
      for (int64_t t = 0; t < T; ++t) {
        for (int64_t i = 0; i < c.H; ++i) {
          CHECK(y(t, i) == first_y(t, i), "y of token ", t);
          CHECK(grad_x(t, i) == first_grad_x(t, i), "grad_x of token ", t);
        }
        CHECK(weights(t, 0) == first_weights(t, 0), "grad_topk_weights of token ", t);
      }
    }
  }
}

// Ids outside [0,E) are empty slots.
TEST(moe_counts_ids_out_of_range_as_empty) {
  simt::device() = simt::sm_80();
  const Case c{"wild ids", 12, 24, 16, 3, 2, Ids::kEmptySlots};
  const Layer l(c, DType::kBFloat16, {}, true, false, 8, true);
  Array wild = l.ids;
  wild.fill([&](int64_t i) {
    const int32_t id = l.ids.id(i / c.K, i % c.K);
    return id >= 0 ? id : i % 3 == 0 ? 3 : i % 3 == 1 ? -7 : 1 << 30;
  });
  Array y[2] = {l.empty({c.T, c.H}, 0), l.empty({c.T, c.H}, 0)};
  for (int i = 0; i < 2; ++i) {
    OpMemory memory(0xff);
    cuda::moe_forward({.x = l.x,
                       .weights = l.weights(),
                       .topk_ids = i == 0 ? l.ids : wild,
                       .topk_weights = l.topk_weights,
                       .options = l.options,
                       .y = y[i]},
                      memory.execution());
  }
  CHECK(same_bits(y[0], y[1]));
}

}  // namespace
}  // namespace switchgear::test
