// SPDX-License-Identifier: BSD-3-Clause
#include "activation_grid.h"

namespace switchgear::test {
namespace {

struct Sizes {
  int64_t S, I;
};
constexpr Sizes kSizes[] = {{0, 3}, {1, 1}, {3, 7}, {5, 16}, {17, 64}, {18, 65}, {33, 129}, {4, 520}};

// Mostly ordinary values, some at and beyond the ends of every curve.
Array make_h(Random& random, DType dtype, int64_t S, int64_t N) {
  constexpr float kSpecial[] = {0.0f, -0.0f, 1.5f, -1.5f, 12.0f, -12.0f, 100.0f, -100.0f, 1e4f, -1e4f, 1e-6f, -1e-6f};
  Array h(dtype, {S, N}, 3);
  h.fill([&](int64_t) {
    return random.below(8) == 0 ? kSpecial[random.below(std::ssize(kSpecial))] : 3.0f * random.normal();
  });
  return h;
}

template <typename Body>
void for_each_problem(Body&& body) {
  Random random(21);
  for (const auto& [S, I] : kSizes) {
    for (const DType dtype : kFloatTypes) {
      for (const GluOptions& o : all_glu_options()) {
        note = join("S=", S, " I=", I, " ", name_of(dtype), describe(o));
        body(S, I, dtype, o, make_h(random, dtype, S, o.gated ? 2 * I : I), random);
      }
    }
  }
  note.clear();
}

Gate gate_of(const Array& h, int64_t s, int64_t i, int64_t I, const GluOptions& o) {
  return apply_gate({h(s, gate_column(o, i))}, {o.gated ? h(s, up_column(o, I, i)) : 0.0}, o);
}

// float16 overflows to infinity past 65504; if the bound crosses that, both results are right.
bool may_overflow(Bounded want, DType dtype) {
  return dtype == DType::kFloat16 && std::abs(want.value) + want.error >= 65504.0;
}

TEST(glu_matches_reference) {
  for_each_problem([](int64_t S, int64_t I, DType dtype, const GluOptions& o, const Array& h, Random&) {
    Array got(dtype, {S, I}, 1);
    for_each_isa(
        {&got}, [&](Execution exec) { glu({.h = h, .options = o, .a = got}, exec); },
        [&] {
          for (int64_t s = 0; s < S; ++s) {
            for (int64_t i = 0; i < I; ++i) {
              const Bounded want = rounded(gate_of(h, s, i, I, o).a, dtype);
              if (!may_overflow(want, dtype)) CHECK_CLOSE(got(s, i), want, "gate ", h(s, gate_column(o, i)));
            }
          }
        });
  });
}

TEST(glu_backward_matches_reference) {
  for_each_problem([](int64_t S, int64_t I, DType dtype, const GluOptions& o, const Array& h, Random& random) {
    const Array grad_a = random_array(random, dtype, {S, I}, 1.0, 2);
    Array got(dtype, {S, o.gated ? 2 * I : I}, 1);
    const auto run = [&](Execution exec) {
      glu_backward({.grad_a = grad_a, .h = h, .options = o, .grad_h = got}, exec);
    };
    const auto check = [&](int64_t s, int64_t column, float grad, Bounded slope) {
      Sum product;
      product.add({grad}, slope);
      const Bounded want = rounded(product.result(), dtype);
      if (!may_overflow(want, dtype)) CHECK_CLOSE(got(s, column), want, "h ", h(s, column));
    };
    for_each_isa({&got}, run, [&] {
      for (int64_t s = 0; s < S; ++s) {
        for (int64_t i = 0; i < I; ++i) {
          const Gate gate = gate_of(h, s, i, I, o);
          check(s, gate_column(o, i), grad_a(s, i), gate.per_gate);
          if (o.gated) check(s, up_column(o, I, i), grad_a(s, i), gate.per_up);
        }
      }
    });
  });
}

TEST(glu_is_right_for_all_gates) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  constexpr int64_t kStep = 61;
#else
  constexpr int64_t kStep = 1;
#endif
  for_each_gate_grid(kStep, [](const GateGrid& grid) {
    const auto S = std::ssize(grid.ups);
    Array a(grid.dtype, {S, grid.I}), grad_h(grid.dtype, {S, grid.h.size(1)}), grad_a = a;
    grad_a.fill([](int64_t) { return 1.0; });
    for_each_isa(
        {&a, &grad_h},
        [&](Execution exec) {
          glu({.h = grid.h, .options = grid.options, .a = a}, exec);
          glu_backward({.grad_a = grad_a, .h = grid.h, .options = grid.options, .grad_h = grad_h}, exec);
        },
        [&] {
          grid.check_forward(a);
          grid.check_backward(grad_h);
        });
  });
}

// A NaN must reach the output: it is the only sign downstream that something went wrong.
TEST(glu_keeps_nan) {
  for (const GluOptions& o : all_glu_options()) {
    note = describe(o);
    Array h(DType::kFloat32, {1, o.gated ? 4 : 2}), got(DType::kFloat32, {1, 2});
    h.fill([](int64_t) { return 0.5; });
    h.set(NAN, 0, gate_column(o, 1));
    for_each_isa(
        {&got}, [&](Execution exec) { glu({.h = h, .options = o, .a = got}, exec); },
        [&] {
          CHECK(std::isfinite(got(0, 0)));
          CHECK(std::isnan(got(0, 1)));
        });
  }
}

}  // namespace
}  // namespace switchgear::test
