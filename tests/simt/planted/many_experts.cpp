// SPDX-License-Identifier: BSD-3-Clause
// GEMMs with 32 and with 1024 experts, some of them empty, and unassigned rows. x has rows that are far apart, and blocks have
// shared memory at any multiple of 16 bytes.
#include <sys/mman.h>

#include <vector>

#include "gemm_sm80.cuh"
#include "gemm_sm90.cuh"
#include "launch.h"
#include "products.h"
#include "tensor_map.h"

using namespace simt::planted;
using namespace switchgear::cuda;

namespace {

constexpr int kN = 8, kC = 64, kUnassigned = 5, kTokens = 7, kBlocks = 4;
constexpr int64_t kRowStride = (int64_t{1} << 29) + 8;

float value(int64_t row, int64_t k) { return static_cast<float>((3 * row + k) % 5 - 2); }

// Untouched pages cost nothing.
Bf16* far_memory() {
  constexpr size_t kBytes = kTokens * kRowStride * sizeof(Bf16);
  static void* const memory =
      mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return static_cast<Bf16*>(memory);
}

// Every fourth expert has no rows; the others have one.
struct Experts {
  explicit Experts(int64_t num_experts) : num_experts(num_experts), weights(num_experts * kN, kC) {
    for (int64_t e = 0; e <= num_experts; ++e) offsets.push_back(static_cast<int32_t>(e - (e + 3) / 4));
    slots = offsets.back() + kUnassigned;
    for (int32_t s = 0; s < slots; ++s) indices.push_back(s % kTokens);
    weights.fill(4);
    out = std::vector<Bf16>(static_cast<size_t>(slots * kN), __float2bfloat16(NAN));
    for (int64_t t = 0; t < kTokens; ++t) {
      for (int64_t k = 0; k < kC; ++k) far_memory()[t * kRowStride + k] = __float2bfloat16(value(t, k));
    }
  }
  Gemm gemm() {
    Gemm g{.dtype = switchgear::DType::kBFloat16, .a = {far_memory(), kRowStride, kTokens, indices.data()}};
    g.b = {.data = weights.data(), .expert_stride = kN * kC, .n_stride = kC, .k_stride = 1, .aligned = true};
    g.expert_offsets = offsets.data();
    g.num_experts = num_experts;
    g.num_slots = slots;
    g.n = kN;
    g.c = kC;
    g.out = out.data();
    g.out_stride = kN;
    return g;
  }
  void check() const {
    for (int64_t e = 0; e <= num_experts; ++e) {
      const int64_t end = e < num_experts ? offsets[static_cast<size_t>(e + 1)] : slots;
      for (int64_t s = offsets[static_cast<size_t>(e)]; s < end; ++s) {
        for (int64_t n = 0; n < kN; ++n) {
          float sum = 0.0f;
          for (int64_t k = 0; k < kC && e < num_experts; ++k) sum += value(s % kTokens, k) * weights(e * kN + n, k);
          CHECK(__bfloat162float(out[static_cast<size_t>(s * kN + n)]) == sum, "slot ", s, " of expert ", e);
        }
      }
    }
  }

  int64_t num_experts;
  int32_t slots;
  std::vector<int32_t> offsets, indices;
  Matrix weights;
  std::vector<Bf16> out;
};

template <sm90::Shape kShape, int kRowsOfQ>
void multiply_on_sm90(int64_t num_experts) {
  using C = sm90::Config<kShape, kRowsOfQ, 2, false>;
  Experts experts(num_experts);
  sm90::GemmParams params{};
  params.g = experts.gemm();
  params.maps.weights = make_tensor_map(
      {experts.weights.data(), switchgear::DType::kBFloat16, {kC, kN, num_experts}, {kC, kN * kC}, C::kColumns});
  launch(sm90::gemm_sm90_kernel<Bf16, Epilogue::kStore, C>, kBlocks, sm90::kThreads,
         sm90::shared_bytes(kShape, kRowsOfQ, 2), nullptr, params);
  experts.check();
}

TEST(sm90) {
  simt::options().any_shared_base = true;
  multiply_on_sm90<sm90::Shape::kFewRows, 16>(32);
  for (int launch = 0; launch < 4; ++launch) {  // each from another base
    multiply_on_sm90<sm90::Shape::kFewRows, 16>(1024);
  }
  multiply_on_sm90<sm90::Shape::kRows, 128>(64);
}

TEST(sm80) {
  constexpr TileConfig kTile = kTiles[static_cast<int>(TileKind::k64)];
  for (const int64_t num_experts : {32, 64}) {
    Experts experts(num_experts);
    launch(gemm_kernel<MmaProduct<Bf16>, TileKind::k64, true>, kBlocks, kTile.threads(),
           static_cast<size_t>(kTile.shared_bytes()), nullptr, experts.gemm(),
           Alignment{.a = true, .b = true, .out = true, .h = true, .weighted_a = true});
    experts.check();
  }
}

}  // namespace
