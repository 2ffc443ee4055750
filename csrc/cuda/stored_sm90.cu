// SPDX-License-Identifier: BSD-3-Clause
// Which products with stored weights Hopper's kernel takes. Host code.
#include "stored_sm90.h"

#include <stdexcept>

#include "gemm_sm90.h"

namespace switchgear::cuda {
namespace {

bool eights(int64_t elements) { return elements % 8 == 0; }
bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

bool takes_out(const Gemm& g) {
  if (!aligned(g.out) || !eights(g.out_stride) || !eights(g.n)) return false;
  if (g.bias != nullptr && (!aligned(g.bias) || !eights(g.bias_stride))) return false;
  if (g.epilogue == Epilogue::kStore) return true;
  if (g.epilogue != Epilogue::kGlu) return false;
  return (g.h == nullptr || (aligned(g.h) && eights(g.h_stride))) && (!sm90::gate_halves(g) || eights(g.n / 2));
}

bool takes_low(const LowRank& low) {
  if (low.rank == 0) return true;
  return eights(low.rank) && low.a.indices == nullptr && aligned(low.a.data) && eights(low.a.stride) &&
         !low.mask.drops() && low.b.separate == nullptr && low.b.ends == nullptr && low.b.k_stride == 1 &&
         low.b.n_stride % 2 == 0 && low.b.expert_stride % 2 == 0 && reinterpret_cast<uintptr_t>(low.b.data) % 4 == 0;
}

}  // namespace

bool sm90_takes(const Gemm& g, const StoredOperand& w) {
  constexpr int kHalfGroup = 16;  // columns: two groups in a step
  return (g.dtype == DType::kBFloat16 || g.dtype == DType::kFloat16) && g.num_experts > 0 &&
         g.num_experts <= sm90::kMaxExperts && takes_low(g.low) && has_wgmma_kernels(w.format) &&
         w.group_size != kHalfGroup && eights(w.cols) && aligned(g.a.data) && eights(g.a.stride) && takes_out(g) &&
         on_hopper();
}

void stored_sm90(const Gemm& g, const StoredOperand& w, void* stream) {
  if (!with_format<has_wgmma_kernels>(w.format, [&]<Format kFormat>() { stored_sm90_of<kFormat>(g, w, stream); })) {
    throw std::logic_error("stored_sm90: no kernel for this format");
  }
}

}  // namespace switchgear::cuda
