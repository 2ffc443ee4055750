// SPDX-License-Identifier: BSD-3-Clause
#include "layer.h"

namespace switchgear::test {
namespace {

TEST(moe_forward_matches_reference) {
  const std::vector<GluOptions> all = all_glu_options();
  size_t variant = 0;
  for_each_case([&](const Case& c) {
    const std::string name = note;
    for (const DType dtype : kFloatTypes) {
      for (int i = 0; i < 4; ++i, ++variant) {
        const GluOptions& o = all[variant * 7 % all.size()];
        const Layer l(c, dtype, o, variant % 2 == 0, variant % 3 == 0, 31 + variant);
        note = name + " " + name_of(dtype) + describe(o);

        const ForwardTables want = reference_forward(l, Slots::kExact);

        Array y(dtype, {c.T, c.H}, 2), h_got(dtype, {c.T * c.K, l.N}, 1), y_alone(dtype, {c.T, c.H});
        MoeForwardArgs args{.x = l.x,
                            .weights = l.weights(),
                            .topk_ids = l.ids,
                            .topk_weights = l.topk_weights,
                            .options = o,
                            .y = y,
                            .h = h_got};
        for_each_isa(
            {&y, &h_got}, [&](Execution exec) { moe_forward(args, exec); },
            [&] {
              check_table(y, want.y, "y");
              check_table(h_got, want.h, "h");
              MoeForwardArgs inference = args;
              inference.h = {};
              inference.y = y_alone;
              moe_forward(inference, {2});
              CHECK(same_bits(y, y_alone), "saving h changes y");
            });
      }
    }
  });
}

// Rows [first, last) of a matrix.
TensorView some_rows(const TensorView& all, int64_t first, int64_t last) {
  TensorView rows = all;
  rows.data = all.as<char>() + first * all.stride[0] * size_of(all.dtype);
  rows.shape[0] = last - first;
  return rows;
}

// Kernels choose how to read weights by the number of rows of an expert.
TEST(moe_forward_gives_a_token_the_same_bits_in_any_batch) {
  constexpr Case kBatches[] = {{"hidden size of two chunks, columns past the panels", 26, 1056, 70, 1, 1},
                               {"intermediate size of two chunks", 26, 38, 1056, 1, 1},
                               {"both short", 150, 32, 96, 3, 1},
                               {"all to one", 90, 64, 64, 3, 1, Ids::kOneExpert},
                               {"7 rows and more of some experts", 60, 64, 64, 9, 1},
                               {"24 rows and more of some experts", 96, 64, 64, 4, 1}};
  uint64_t seed = 0;
  for (const Case& c : kBatches) {
    for (const DType dtype : kFloatTypes) {
      const bool transposed = ++seed % 2 == 0;
      note = std::string(c.name) + ", " + name_of(dtype) + (transposed ? ", transposed" : "");
      const Layer l(c, dtype, {}, true, transposed, seed);
      Array y(dtype, {c.T, c.H}, 2), in_parts(dtype, {c.T, c.H});
      const auto forward = [&](const TensorView& out, int64_t first, int64_t last, Execution exec) {
        moe_forward({.x = some_rows(l.x, first, last),
                     .weights = l.weights(),
                     .topk_ids = some_rows(l.ids, first, last),
                     .topk_weights = some_rows(l.topk_weights, first, last),
                     .y = some_rows(out, first, last)},
                    exec);
      };
      for_each_isa(
          {&y}, [&](Execution exec) { forward(y, 0, c.T, exec); },
          [&] {
            for (int64_t t = 0; t < c.T; t += 5) forward(in_parts, t, std::min(t + 5, c.T), {2});
            CHECK(same_bits(y, in_parts));
          });
    }
  }
}

void check_doubled(const Array& twice, const Array& once) {
  const int64_t rows = once.size(1), columns = once.size(2);
  for (int64_t i = 0; i < once.numel(); ++i) {
    const int64_t e = i / (rows * columns), r = i / columns % rows, column = i % columns;
    CHECK(twice(e, r, column) == 2 * once(e, r, column), twice(e, r, column), " is not twice ", once(e, r, column));
  }
}

TEST(moe_backward_matches_reference) {
  const std::vector<GluOptions> all = all_glu_options();
  size_t variant = 0;
  for_each_case([&](const Case& c) {
    const std::string name = note;
    for (const DType dtype : kFloatTypes) {
      for (int i = 0; i < (c.H > 1000 ? 1 : 2); ++i, ++variant) {
        const GluOptions& o = all[variant * 7 % all.size()];
        const Layer l(c, dtype, o, variant % 3 != 0, variant % 2 == 0, 57 + variant);
        note = name + " " + name_of(dtype) + describe(o);
        Array h(dtype, {c.T * c.K, l.N}, 1);
        const Table h_values = h_table(l);
        h.fill([&](int64_t j) { return h_values[static_cast<size_t>(j)].value; });
        const GradientTables want = reference_gradients(l, h, Slots::kExact);

        Gradients got(l);
        const MoeBackwardArgs args{.grad_y = l.grad_y,
                                   .x = l.x,
                                   .h = h,
                                   .weights = l.weights(),
                                   .topk_ids = l.ids,
                                   .topk_weights = l.topk_weights,
                                   .options = o,
                                   .grad_x = got.x,
                                   .grad_gate_up_proj = l.matrices_of(got.gate_up_proj),
                                   .grad_down_proj = l.matrices_of(got.down_proj),
                                   .grad_gate_up_bias = got.gate_up_bias,
                                   .grad_down_bias = got.down_bias,
                                   .grad_topk_weights = got.topk_weights};
        for_each_isa(
            {&got.x, &got.gate_up_proj, &got.down_proj, &got.gate_up_bias, &got.down_bias, &got.topk_weights},
            [&](Execution exec) { moe_backward(args, exec); },
            [&] {
              check_table(got.x, want.x, "grad_x");
              check_table(got.gate_up_proj, want.gate_up_proj, "grad_gate_up_proj", l.transposed);
              check_table(got.down_proj, want.down_proj, "grad_down_proj", l.transposed);
              check_table(got.gate_up_bias, want.gate_up_bias, "grad_gate_up_bias");
              check_table(got.down_bias, want.down_bias, "grad_down_bias");
              check_table(got.topk_weights, want.topk_weights, "grad_topk_weights");

              // Each gradient has the same bits if it is the only one requested.
              Gradients alone(l);
              const auto only = [&](TensorView MoeBackwardArgs::* field, const TensorView& output) {
                MoeBackwardArgs one = args;
                one.grad_x = one.grad_gate_up_proj = one.grad_down_proj = {};
                one.grad_gate_up_bias = one.grad_down_bias = one.grad_topk_weights = {};
                one.*field = output;
                moe_backward(one, {2});
              };
              only(&MoeBackwardArgs::grad_x, alone.x);
              only(&MoeBackwardArgs::grad_gate_up_proj, l.matrices_of(alone.gate_up_proj));
              only(&MoeBackwardArgs::grad_down_bias, alone.down_bias);
              only(&MoeBackwardArgs::grad_topk_weights, alone.topk_weights);
              CHECK(same_bits(alone.x, got.x));
              CHECK(same_bits(alone.gate_up_proj, got.gate_up_proj));
              CHECK(same_bits(alone.down_bias, got.down_bias));
              CHECK(same_bits(alone.topk_weights, got.topk_weights));

              // Added to themselves they are twice as large, which needs no rounding.
              Gradients twice = got;
              MoeBackwardArgs added = args;
              added.grad_x = added.grad_gate_up_bias = added.grad_down_bias = added.grad_topk_weights = {};
              added.grad_gate_up_proj = l.matrices_of(twice.gate_up_proj);
              added.grad_down_proj = l.matrices_of(twice.down_proj);
              added.adds = true;
              moe_backward(added, {2});
              check_doubled(twice.gate_up_proj, got.gate_up_proj);
              check_doubled(twice.down_proj, got.down_proj);

              // So have those of some experts.
              const Array experts = every_second(c.E);
              Gradients some(l, experts.size(0));
              MoeBackwardArgs few = args;
              few.experts = experts;
              few.grad_x = few.grad_topk_weights = {};
              few.grad_gate_up_proj = l.matrices_of(some.gate_up_proj);
              few.grad_down_proj = l.matrices_of(some.down_proj);
              few.grad_gate_up_bias = some.gate_up_bias;
              few.grad_down_bias = some.down_bias;
              moe_backward(few, {2});
              CHECK(same_experts(got.gate_up_proj, some.gate_up_proj, experts));
              CHECK(same_experts(got.down_proj, some.down_proj, experts));
              CHECK(same_experts(got.gate_up_bias, some.gate_up_bias, experts));
              CHECK(same_experts(got.down_bias, some.down_bias, experts));
            });
      }
    }
  });
}

}  // namespace
}  // namespace switchgear::test
