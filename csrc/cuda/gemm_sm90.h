// SPDX-License-Identifier: BSD-3-Clause
// Picks the tile of gemm_sm90 for a product, from the rows of tiles_sm90.h.
#pragma once
#include <cstdint>

#include "gemm.h"
#include "tiles_sm90.h"

namespace switchgear::cuda::sm90 {

constexpr int kMaxExperts = 1024;  // for which a block keeps the tile table

// Whether gates and ups are separate halves of b's columns: a tile then takes columns of both.
__host__ __device__ constexpr bool gate_halves(const Gemm& g) {
  return g.epilogue == Epilogue::kGlu && g.options.gated && !g.options.interleaved;
}

constexpr unsigned bit_of(Epilogue epilogue) {
  return epilogue == Epilogue::kGlu ? kGlu : epilogue == Epilogue::kGluBackward ? kGluBackward : kStore;
}

// Indices into kTiles.
constexpr int pick_tile(const Gemm& g) {
  return pick_tile(GemmSize{.rows_per_expert = (g.num_slots + g.num_experts - 1) / g.num_experts,
                            .columns = g.n,
                            .depth = g.c,
                            .epilogue = bit_of(g.epilogue),
                            .half_blocks = gate_halves(g) && !g.b.k_contiguous()});
}
constexpr int pick_tile(const Wgrad& g) {
  return pick_tile(WgradSize{.m = g.m,
                             .n = g.n,
                             .depth = g.num_slots / (g.num_experts > 0 ? g.num_experts : 1),
                             .shares_a = g.a.indices == nullptr,
                             .shares_b = g.b.indices == nullptr});
}

}  // namespace switchgear::cuda::sm90
