// SPDX-License-Identifier: BSD-3-Clause
#include "activation_grid.h"
#include "run_op.h"

namespace switchgear::test {
namespace {

struct Sizes {
  int64_t S, I;
};
constexpr Sizes kSizes[] = {{0, 3}, {1, 1}, {3, 7}, {5, 16}, {9, 65}, {2, 520}, {1, 2600}};

// Mostly ordinary values; some at and beyond the ends of every curve.
void fill_h(Array& h, Random& random) {
  constexpr float kSpecial[] = {0.0f, -0.0f, 1.5f, -1.5f, 12.0f, -12.0f, 100.0f, -100.0f, 1e4f, -1e4f, 1e-6f, -1e-6f};
  h.fill([&](int64_t) {
    return random.below(8) == 0 ? kSpecial[random.below(std::ssize(kSpecial))] : 3.0f * random.normal();
  });
}

template <typename Body>
void for_each_problem(Body&& body) {
  Random random(21);
  int variant = 0;
  for (const auto& [S, I] : kSizes) {
    for (const DType dtype : kFloatTypes) {
      for (const GluOptions& o : all_glu_options()) {
        for (const Rows rows : {Rows::kAnywhere, Rows::kAligned}) {
          note = join("S=", S, " I=", I, " ", name_of(dtype), describe(o), rows == Rows::kAligned ? " aligned" : "");
          if (!takes_variant(variant++)) continue;
          Array h = make_rows(rows, dtype, S, o.gated ? 2 * I : I);
          fill_h(h, random);
          body(S, I, dtype, o, rows, h, random);
        }
      }
    }
  }
  note.clear();
}

Gate gate_of(const Array& h, int64_t s, int64_t i, int64_t I, const GluOptions& o) {
  return apply_gate({h(s, gate_column(o, i))}, {o.gated ? h(s, up_column(o, I, i)) : 0.0}, o);
}

// float16 overflows to infinity past 65504. If the error bound crosses that, both results are right.
bool may_overflow(Bounded want, DType dtype) {
  return dtype == DType::kFloat16 && std::abs(want.value) + want.error >= 65504.0;
}

TEST(glu_matches_reference) {
  for_each_problem([](int64_t S, int64_t I, DType dtype, const GluOptions& o, Rows rows, const Array& h, Random&) {
    Array got = make_rows(rows, dtype, S, I);
    run_op({&got}, [&](Execution exec) { cuda::glu({.h = h, .options = o, .a = got}, exec); });
    for (int64_t s = 0; s < S; ++s) {
      for (int64_t i = 0; i < I; ++i) {
        const Bounded want = rounded(gate_of(h, s, i, I, o).a, dtype);
        if (!may_overflow(want, dtype)) CHECK_CLOSE(got(s, i), want, "gate ", h(s, gate_column(o, i)));
      }
    }
  });
}

TEST(glu_backward_matches_reference) {
  for_each_problem([](int64_t S, int64_t I, DType dtype, const GluOptions& o, Rows rows, const Array& h,
                      Random& random) {
    const Array grad_a = random_rows(rows, random, dtype, S, I);
    Array got = make_rows(rows, dtype, S, o.gated ? 2 * I : I);
    run_op({&got},
           [&](Execution exec) { cuda::glu_backward({.grad_a = grad_a, .h = h, .options = o, .grad_h = got}, exec); });
    const auto check = [&](int64_t s, int64_t column, float grad, Bounded slope) {
      Sum product;
      product.add({grad}, slope);
      const Bounded want = rounded(product.result(), dtype);
      if (!may_overflow(want, dtype)) CHECK_CLOSE(got(s, column), want, "h ", h(s, column));
    };
    for (int64_t s = 0; s < S; ++s) {
      for (int64_t i = 0; i < I; ++i) {
        const Gate gate = gate_of(h, s, i, I, o);
        check(s, gate_column(o, i), grad_a(s, i), gate.per_gate);
        if (o.gated) check(s, up_column(o, I, i), grad_a(s, i), gate.per_up);
      }
    }
  });
}

TEST(glu_is_right_for_gates_of_all_sizes) {
  for_each_gate_grid(61, [](const GateGrid& grid) {
    const auto S = std::ssize(grid.ups);
    Array a(grid.dtype, {S, grid.I}), grad_h(grid.dtype, {S, grid.h.size(1)}), grad_a = a;
    grad_a.fill([](int64_t) { return 1.0; });
    run_op({&a}, [&](Execution exec) { cuda::glu({.h = grid.h, .options = grid.options, .a = a}, exec); });
    grid.check_forward(a);
    run_op({&grad_h}, [&](Execution exec) {
      cuda::glu_backward({.grad_a = grad_a, .h = grid.h, .options = grid.options, .grad_h = grad_h}, exec);
    });
    grid.check_backward(grad_h);
  });
}

// A NaN must reach the output: nothing downstream could detect the error otherwise.
TEST(glu_keeps_nan) {
  for (const GluOptions& o : all_glu_options()) {
    note = describe(o);
    Array h(DType::kFloat32, {1, o.gated ? 4 : 2}), got(DType::kFloat32, {1, 2});
    h.fill([](int64_t) { return 0.5; });
    h.set(NAN, 0, gate_column(o, 1));
    run_op({&got}, [&](Execution exec) { cuda::glu({.h = h, .options = o, .a = got}, exec); });
    CHECK(std::isfinite(got(0, 0)));
    CHECK(std::isnan(got(0, 1)));
  }
}

}  // namespace
}  // namespace switchgear::test
