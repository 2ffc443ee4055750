// SPDX-License-Identifier: BSD-3-Clause
// A layer with adapters against the same layer with merged weights, W + s·B·A. All numbers are small integers, so sums are exact
// in any order and results have the same bits.
#include "layer.h"

namespace switchgear::test {
namespace {

constexpr int64_t kRank = 5;

// a [E,r,C], b [E,N,r], scales, ranks; padded rows, NaN past each expert's rank.
struct TestAdapter {
  TestAdapter(Random& random, DType dtype, int64_t E, int64_t N, int64_t C, int64_t kind)
      : a(dtype, {E, kRank, C}, 1),
        b(dtype, {E, N, kRank}, 2),
        scales(DType::kFloat32, {E}),
        ranks(DType::kInt32, {E}) {
    scales.fill([](int64_t e) { return e % 2 == 0 ? 1.0 : -2.0; });
    ranks.fill([&](int64_t e) { return kind == 0 ? kRank : (e + kind) % (kRank + 1); });
    a.fill([&](int64_t i) { return i / C % kRank < ranks.id(i / C / kRank) ? integer(random) : NAN; });
    b.fill([&](int64_t i) { return i % kRank < ranks.id(i / kRank / N) ? integer(random) : NAN; });
  }

  static double integer(Random& random) { return std::floor(random.normal() * 0.7 + 0.5); }  // mostly -1, 0 and 1
  double term(int64_t e, int64_t n, int64_t c) const {
    double sum = 0;
    for (int64_t j = 0; j < ranks.id(e); ++j) sum += b(e, n, j) * a(e, j, c);
    return e % 2 == 0 ? sum : -2.0 * sum;
  }
  Adapter view() const { return {.a = a, .b = b, .scales = scales, .ranks = ranks}; }

  Array a, b, scales, ranks;
};

}  // namespace

TEST(adapters_act_as_parts_of_weights) {
  int64_t kind = 0;
  for (const Case& c :
       {Case{"small", 9, 20, 12, 4, 2}, Case{"wide", 40, 136, 72, 3, 2}, Case{"many rows", 300, 33, 40, 2, 1}}) {
    for (const bool gated : {true, false}) {
      const GluOptions options{.activation = Activation::kRelu, .gated = gated, .interleaved = kind % 2 == 0};
      Layer l(c, DType::kFloat32, options, false, false, 77 + static_cast<uint64_t>(kind));
      const auto sparse = [&](int64_t) { return l.random.normal() > 1.5 ? TestAdapter::integer(l.random) : 0.0; };
      for (Array* array : {&l.x, &l.grad_y, &l.gate_up_proj, &l.down_proj}) array->fill(sparse);
      l.topk_weights.fill([](int64_t i) { return i % 3 == 0 ? 1.0 : 2.0; });
      const TestAdapter first(l.random, l.dtype, c.E, l.N, c.H, kind), second(l.random, l.dtype, c.E, c.H, c.I, kind);
      ++kind;
      Array merged_first(l.dtype, {c.E, l.N, c.H}), merged_second(l.dtype, {c.E, c.H, c.I});
      merged_first.fill([&](int64_t i) {
        const int64_t e = i / c.H / l.N, n = i / c.H % l.N, k = i % c.H;
        return l.gate_up_proj(e, n, k) + first.term(e, n, k);
      });
      merged_second.fill([&](int64_t i) {
        const int64_t e = i / c.I / c.H, n = i / c.I % c.H, k = i % c.I;
        return l.down_proj(e, n, k) + second.term(e, n, k);
      });
      ExpertWeights adapted = l.weights();
      adapted.gate_up_adapter = first.view();
      adapted.down_adapter = second.view();
      const ExpertWeights merged{.gate_up_proj = {.data = merged_first}, .down_proj = {.data = merged_second}};

      Array y(l.dtype, {c.T, c.H}, 2), h(l.dtype, {c.T * c.K, l.N}, 1), grad_x(l.dtype, {c.T, c.H}, 1);
      Array grad_a(l.dtype, {c.E, kRank, c.H}, 3), grad_b(l.dtype, {c.E, c.H, kRank}, 1);
      Array y_want(l.dtype, {c.T, c.H}, 2), h_want(l.dtype, {c.T * c.K, l.N}, 1), grad_x_want(l.dtype, {c.T, c.H}, 1);
      Array grad_first(l.dtype, {c.E, l.N, c.H}), grad_second(l.dtype, {c.E, c.H, c.I});
      const auto run = [&](const ExpertWeights& weights, MoeBackwardArgs back, Array& out, Array& pre, Execution exec) {
        moe_forward({.x = l.x,
                     .weights = weights,
                     .topk_ids = l.ids,
                     .topk_weights = l.topk_weights,
                     .options = options,
                     .y = out,
                     .h = pre},
                    exec);
        back.grad_y = l.grad_y, back.x = l.x, back.h = pre, back.weights = weights, back.topk_ids = l.ids;
        back.topk_weights = l.topk_weights, back.options = options;
        moe_backward(back, exec);
      };
      run(merged, {.grad_x = grad_x_want, .grad_gate_up_proj = grad_first, .grad_down_proj = grad_second}, y_want,
          h_want, {});
      for_each_isa(
          {&y, &h, &grad_x, &grad_a, &grad_b},
          [&](Execution exec) {
            run(adapted, {.grad_x = grad_x, .grad_gate_up_a = grad_a, .grad_down_b = grad_b}, y, h, exec);
          },
          [&] {
            CHECK(same_bits(y, y_want) && same_bits(h, h_want), "forward differs from merged weights");
            CHECK(same_bits(grad_x, grad_x_want), "grad_x differs from merged weights");
            for (int64_t e = 0; e < c.E; ++e) {
              const double scale = e % 2 == 0 ? 1.0 : -2.0;
              for (int64_t j = 0; j < kRank; ++j) {  // grad_A = s·Bᵀ·grad_W, grad_B = s·grad_W·Aᵀ
                const bool used = j < first.ranks.id(e);
                for (int64_t k = 0; k < c.H; ++k) {
                  double a = 0, b = 0;
                  for (int64_t n = 0; used && n < l.N; ++n) a += scale * first.b(e, n, j) * grad_first(e, n, k);
                  for (int64_t i = 0; used && i < c.I; ++i) b += scale * grad_second(e, k, i) * second.a(e, j, i);
                  CHECK(grad_a(e, j, k) == a, "grad_a of expert ", e, ": ", grad_a(e, j, k), " instead of ", a);
                  CHECK(grad_b(e, k, j) == b, "grad_b of expert ", e, ": ", grad_b(e, k, j), " instead of ", b);
                }
              }
            }
          });
    }
  }
}

}  // namespace switchgear::test
