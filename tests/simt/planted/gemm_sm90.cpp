// SPDX-License-Identifier: BSD-3-Clause
// Some tiles of gemm_sm90.cuh with a short ring, all computed by one block. kernels.py compiles this with one line of the
// kernel changed.
#include "gemm_sm90.cuh"
#include "launch.h"
#include "products.h"
#include "tensor_map.h"

using namespace simt::planted;
using namespace switchgear::cuda;
using namespace switchgear::cuda::sm90;

namespace {

constexpr int kRing = 3;  // stages

CUtensorMap map_of(const Rows& rows, int64_t columns, int box_rows) {
  return make_tensor_map({rows.data, DType::kBFloat16, {columns, rows.count, 1}, {rows.stride, rows.stride}, box_rows});
}

template <Shape kShape, int kN>
void multiply(Product p, bool gather) {
  using C = Config<kShape, kN, kRing, false>;
  const Gemm g = p.gemm(gather);
  GemmParams params{};
  params.maps.weights =
      make_tensor_map({g.b.data, g.dtype, {g.c, g.n, g.num_experts}, {g.b.n_stride, g.b.expert_stride}, C::kColumns});
  if (!gather) params.maps.slots = map_of(g.a, g.c, C::kSlots);
  params.g = g;
  launch(gemm_sm90_kernel<Bf16, Epilogue::kStore, C>, 1, kThreads, shared_bytes(kShape, kN, kRing), nullptr, params);
  p.check(gather);
}
TEST(many_rows) {
  multiply<Shape::kRows, 128>(Product(130, 40, 5, 136, 264), true);
  multiply<Shape::kRows, 128>(Product(130, 40, 5, 136, 264), false);
}
TEST(few_rows) {
  multiply<Shape::kFewRows, 16>(Product(10, 20, 5, 136, 264), true);
  multiply<Shape::kFewRows, 16>(Product(10, 20, 5, 136, 264), false);
}

TEST(weight_gradient) {
  using C = Config<Shape::kWgrad, 128, kRing, true>;
  for (const bool gather : {false, true}) {
    Gradient gradient(300, 70, 5, 136, 72);
    WgradParams params{};
    params.g = gradient.wgrad(gather);
    params.a = map_of(params.g.a, params.g.m, kDepth);
    params.b = map_of(params.g.b, params.g.n, kDepth);
    launch(wgrad_sm90_kernel<Bf16, C>, 1, kThreads, shared_bytes(C::kShape, C::kN, kRing), nullptr, params);
    gradient.check(gather);
  }
}

}  // namespace
