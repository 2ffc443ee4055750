// SPDX-License-Identifier: BSD-3-Clause
// Some tiles of gemm_sm90.cuh with a short ring, by one block and by two that share a counter. kernels.py compiles this with one
// line of the kernel changed.
#include <algorithm>

#include "gemm_sm90.cuh"
#include "gemm_sm90_wgrad.cuh"
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

// Boxes of what a warp of a cooperative tile stores.
CUtensorMap map_of_out(void* data, int64_t columns, int64_t rows, int64_t planes = 1) {
  const int64_t stride = stride_of(columns);
  return make_tensor_map({data, DType::kBFloat16, {columns, rows, planes}, {stride, rows * stride}, 16});
}

// Launches with one block and every tile, then twice with blocks that take tiles from a counter.
template <typename Launch>
void with_schedules(const Launch& launch_with) {
  launch_with(Schedule{}, 1);
  TileCounter counter{};
  for (int i = 0; i < 2; ++i) {
    launch_with(Schedule{.counter = &counter, .follows_kernel = true}, 2);
    CHECK(counter.taken == 0 && counter.done == 0, "the counter is not reset");
  }
}

template <Shape kShape, int kN, int kCluster = 1, bool kCooperative = false, bool kAlongN = false>
void multiply(Product p, bool gather) {
  using C = Config<kShape, kN, kRing, kAlongN, kCluster, kCooperative>;
  Gemm g = p.gemm(gather);
  GemmParams params{};
  Matrix along_n = p.weights_along_n();
  if constexpr (kAlongN) {
    g.b = {.data = along_n.data(), .expert_stride = g.c * stride_of(g.n), .n_stride = 1, .k_stride = stride_of(g.n)};
    params.maps.weights = make_tensor_map(
        {g.b.data, g.dtype, {g.n, g.c, g.num_experts}, {g.b.k_stride, g.b.expert_stride}, kDepth / kCluster});
  } else {
    params.maps.weights = make_tensor_map(
        {g.b.data, g.dtype, {g.c, g.n, g.num_experts}, {g.b.n_stride, g.b.expert_stride}, C::kColumns / kCluster});
  }
  if (!gather) params.maps.slots = map_of(g.a, g.c, C::kSlots);
  params.out.out = map_of_out(g.out, g.n, g.num_slots);
  params.g = g;
  with_schedules([&](const Schedule& schedule, int blocks) {
    params.g.schedule = schedule;
    p.out.fill(1);
    launch_dependent(schedule.follows_kernel, kCluster, gemm_sm90_kernel<Bf16, Epilogue::kStore, C>, blocks * kCluster,
                     kThreads, shared_bytes(kShape, kN, kRing), nullptr, params);
    p.check(gather);
  });
}

TEST(many_rows) {
  multiply<Shape::kRows, 128>(Product(130, 40, 5, 136, 264), true);
  multiply<Shape::kRows, 128>(Product(130, 40, 5, 136, 264), false);
}

// The table of tiles, also for multiples of 32 experts.
using Counted = Config<Shape::kRows, 128, kRing, false>;
__global__ void __launch_bounds__(kThreads) count_kernel(const __grid_constant__ Gemm g, int32_t* first_tiles) {
  SHARED_DYN(int32_t, table);
  const GemmTiles<Counted> tiles(g, table);
  tiles.count();
  __syncthreads();
  for (auto i = static_cast<int64_t>(threadIdx.x); i < g.num_experts + 2; i += kThreads) first_tiles[i] = table[i];
}
TEST(many_experts) {
  for (const int64_t num_experts : {1, 31, 32, 64, 100, 1024}) {
    std::vector<int32_t> offsets(1), first_tiles(static_cast<size_t>(num_experts) + 2, -1);
    for (int64_t e = 0; e < num_experts; ++e) offsets.push_back(offsets.back() + static_cast<int32_t>(e * 37 % 300));
    Gemm g{.expert_offsets = offsets.data(), .num_experts = num_experts, .num_slots = offsets.back() + 130, .n = 200};
    launch(count_kernel, 1, kThreads, (static_cast<size_t>(num_experts) + 2) * 4, nullptr, g, first_tiles.data());
    int32_t before = 0;
    for (int64_t e = 0; e <= num_experts; ++e) {
      CHECK(first_tiles[static_cast<size_t>(e)] == before, num_experts, " experts, expert ", e);
      const int64_t rows = e == num_experts ? 130 : e * 37 % 300;
      before += static_cast<int32_t>((rows + 127) / 128 * 2);
    }
    CHECK(first_tiles.back() == before, num_experts, " experts");
  }
}

TEST(few_rows) {
  multiply<Shape::kFewRows, 16>(Product(10, 20, 5, 136, 264), true);
  multiply<Shape::kFewRows, 16>(Product(10, 20, 5, 136, 264), false);
}

// The second expert in a tensor of its own, of fewer rows; then the first without any.
void check_separate(int64_t first_rows, int64_t second_rows) {
  using C = Config<Shape::kRows, 128, kRing, false>;
  Product p(130, 40, 5, 136, 72);
  Matrix second(second_rows, 72);  // nothing follows it
  for (int64_t e = 0; e < 2; ++e) {
    for (int64_t n = e == 0 ? first_rows : second_rows; n < 136; ++n) {
      for (int64_t k = 0; k < 72; ++k) p.weights.at(e * 136 + n, k) = __float2bfloat16(0.0f);
    }
  }
  for (int64_t n = 0; n < second_rows; ++n) {
    for (int64_t k = 0; k < 72; ++k) second.at(n, k) = p.weights.at(136 + n, k);
  }
  std::vector<SeparateMatrix> list(2);
  const void* const data[] = {first_rows == 0 ? nullptr : p.weights.data(), second.data()};
  const int64_t rows[] = {first_rows, second_rows};
  GemmParams params{};
  params.g = p.gemm(true);
  params.g.b.data = nullptr;
  params.g.b.separate = list.data();
  params.g.b.list = {data, rows};
  params.maps.weights = make_tensor_map({list.data(), DType::kBFloat16, {72, 136, 1}, {72, 72}, C::kColumns});
  write_maps(params.g.b, params.maps.weights, 2, nullptr);
  launch(gemm_sm90_kernel<Bf16, Epilogue::kStore, C>, 2, kThreads, shared_bytes(C::kShape, C::kN, kRing), nullptr,
         params);
  p.check(true);
}
TEST(separate_experts) {
  check_separate(136, 40);
  check_separate(0, 129);
}

TEST(pairs) {
  multiply<Shape::kRows, 128, 2>(Product(300, 40, 5, 136, 136), true);
  multiply<Shape::kRows, 128, 2>(Product(300, 40, 5, 304, 136), false);
  multiply<Shape::kRows, 128, 2, false, true>(Product(300, 40, 5, 304, 136), false);
}
TEST(cooperative_pairs) {
  multiply<Shape::kRows, 256, 2, true>(Product(300, 40, 5, 264, 136), true);
  multiply<Shape::kRows, 256, 2, true>(Product(140, 40, 300, 264, 264), false);
}

// a = relu(gate) · up of small integers: exact. Separate halves, pairs of neighbours, and plain experts; with bias and h.
void check_glu(bool gated, bool interleaved, int64_t n) {
  using C = Config<Shape::kRows, 256, kRing, false, 2, true>;
  Product p(200, 70, 5, n, 72);
  Matrix bias(2, n), h(p.slots, n), a(p.slots, gated ? n / 2 : n);
  bias.fill(2);
  GemmParams params{};
  Gemm& g = params.g = p.gemm(true);
  g.epilogue = Epilogue::kGlu;
  g.options = {.activation = switchgear::Activation::kRelu, .gated = gated, .interleaved = interleaved};
  g.bias = bias.data();
  g.bias_stride = stride_of(n);
  g.out = a.data();
  g.out_stride = stride_of(gated ? n / 2 : n);
  g.h = h.data();
  g.h_stride = stride_of(n);
  params.out = {.out = map_of_out(g.out, gated ? n / 2 : n, g.num_slots), .h = map_of_out(g.h, n, g.num_slots)};
  params.maps.weights =
      make_tensor_map({g.b.data, g.dtype, {g.c, g.n, g.num_experts}, {g.b.n_stride, g.b.expert_stride}, 128});
  launch_clusters(2, gemm_sm90_kernel<Bf16, Epilogue::kGlu, C>, 2, kThreads, shared_bytes(C::kShape, C::kN, kRing),
                  nullptr, params);
  const auto rounded = [](float value) { return __bfloat162float(__float2bfloat16(value)); };
  const int64_t width = gated ? n / 2 : n, used = p.offsets[2];
  for (int64_t s = 0; s < used; ++s) {
    const int64_t expert = s < p.offsets[1] ? 0 : 1;
    const auto sum = [&](int64_t column) {
      float total = bias(expert, column);
      for (int64_t k = 0; k < p.c; ++k)
        total += p.x(p.indices[static_cast<size_t>(s)], k) * p.weights(expert * n + column, k);
      return total;
    };
    for (int64_t i = 0; i < width; ++i) {
      const float gate = sum(interleaved ? 2 * i : i), up = !gated ? 1.0f : sum(interleaved ? 2 * i + 1 : width + i);
      CHECK(a(s, i) == rounded(std::max(gate, 0.0f) * up), "slot ", s, " column ", i);
    }
    for (int64_t i = 0; i < n; i += 7) CHECK(h(s, i) == rounded(sum(i)), "h of slot ", s, " column ", i);
  }
  CHECK(a.padding_holds() && h.padding_holds(), "wrote behind a row");
}
TEST(cooperative_glu) {
  check_glu(true, false, 304);
  check_glu(true, true, 304);
  check_glu(false, false, 264);
}

// A pair shares b, or a if b is gathered.
template <int kN, int kCluster = 1, bool kCooperative = false>
void check_weight_gradient() {
  using C = Config<Shape::kWgrad, kN, kRing, true, kCluster, kCooperative>;
  for (const bool gather : {false, true}) {
    Gradient gradient(300, 70, 5, 136, 72);
    WgradParams params{};
    params.g = gradient.wgrad(gather);
    params.a = map_of(params.g.a, params.g.m, kCluster > 1 && gather ? kDepth / 2 : kDepth);
    params.b = map_of(params.g.b, params.g.n, kCluster > 1 && !gather ? kDepth / 2 : kDepth);
    params.out = map_of_out(params.g.out, params.g.n, params.g.m, params.g.num_matrices);
    with_schedules([&](const Schedule& schedule, int blocks) {
      params.g.schedule = schedule;
      gradient.out.fill(1);
      launch_dependent(schedule.follows_kernel, kCluster, wgrad_sm90_kernel<Bf16, C>, blocks * kCluster, kThreads,
                       shared_bytes(C::kShape, C::kN, kRing), nullptr, params);
      gradient.check(gather);
    });
  }
}
TEST(weight_gradient) { check_weight_gradient<128>(); }
TEST(cooperative_weight_gradient) { check_weight_gradient<256, 2, true>(); }

}  // namespace
