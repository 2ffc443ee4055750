// SPDX-License-Identifier: BSD-3-Clause
// The first projection: x [T,H], gathered into slots, times [E,2I,H].
#include "bench.h"

namespace switchgear::bench {
namespace {

struct Products {
  explicit Products(const Case& c)
      : c(c),
        routed(c),
        x(Tensor(c.dtype, c.T, c.H).random(1.0, 6)),
        weight(Tensor(c.dtype, c.E, c.N(), c.H).random(1.0 / std::sqrt(c.H), 7)),
        out(Tensor(c.dtype, c.S(), c.N()).random(1.0, 8)) {}

  double flop() const { return 2.0 * static_cast<double>(c.S()) * static_cast<double>(c.N() * c.H); }
  int64_t token_of(int64_t slot) const { return routed.token_indices.as<int32_t>()[slot]; }

  Case c;
  Routed routed;
  Tensor x, weight, out;
};

struct GroupedGemm : Products {
  static constexpr const char* kName = "grouped_gemm";
  using Products::Products;

  void run() {
    grouped_gemm({.x = x,
                  .weight = {.data = weight},
                  .expert_offsets = routed.expert_offsets,
                  .token_indices = routed.token_indices,
                  .out = out},
                 c.exec);
  }
  bool verify() const {
    return sample(out.numel(), 256, [&](int64_t i) {
      const int64_t slot = i / c.N(), row = routed.expert_of(slot) * c.N() + i % c.N();
      test::Sum sum;
      for (int64_t h = 0; h < c.H; ++h) sum.add({x[token_of(slot) * c.H + h]}, {weight[row * c.H + h]});
      return test::close(out[i], test::rounded(sum.result(), c.dtype));
    });
  }
  Work work() const {
    const double touched =
        static_cast<double>(weight.bytes()) / static_cast<double>(c.E) * static_cast<double>(routed.experts_hit());
    return {flop(), touched + static_cast<double>(x.bytes() + out.bytes())};
  }
};

struct GroupedGemmWgrad : Products {
  static constexpr const char* kName = "grouped_gemm_wgrad";
  using Products::Products;

  void run() {
    grouped_gemm_wgrad({.grad_out = out,
                        .x = x,
                        .expert_offsets = routed.expert_offsets,
                        .token_indices = routed.token_indices,
                        .grad_weight = weight},
                       c.exec);
  }
  bool verify() const {
    const auto* offsets = routed.expert_offsets.as<int32_t>();
    return sample(weight.numel(), 256, [&](int64_t i) {
      const int64_t e = i / (c.N() * c.H), n = i / c.H % c.N(), h = i % c.H;
      test::Sum sum;
      for (int64_t s = offsets[e]; s < offsets[e + 1]; ++s) sum.add({out[s * c.N() + n]}, {x[token_of(s) * c.H + h]});
      return test::close(weight[i], test::rounded(sum.result(), c.dtype));
    });
  }
  Work work() const { return {flop(), static_cast<double>(weight.bytes() + x.bytes() + out.bytes())}; }
};

}  // namespace
}  // namespace switchgear::bench

int main(int argc, char** argv) {
  using namespace switchgear::bench;
  return bench_main<GroupedGemm, GroupedGemmWgrad>(argc, argv);
}
