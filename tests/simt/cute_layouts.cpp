// SPDX-License-Identifier: BSD-3-Clause
#include "cute_layouts.h"

#include <cute/atom/copy_traits_sm75.hpp>
#include <cute/atom/mma_traits_sm80.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/swizzle_layout.hpp>
#include <cute/tensor.hpp>

namespace cute_layouts {
namespace {

using namespace cute;

using Half = MMA_Traits<SM80_16x8x16_F32BF16BF16F32_TN>;
using Tf32 = MMA_Traits<SM80_16x8x8_F32TF32TF32F32_TN>;

// CuTe numbers elements of an operand column by column.
template <typename Layout>
Place place(Layout layout, int thread, int i, int rows) {
  const int index = layout(thread, i);
  return {index % rows, index / rows};
}

template <int kN>
Place accumulator(int thread, int i) {
  constexpr int kRows = 64;
  return place(SM90::GMMA::CLayout_64xN<kN>{}, thread, i, kRows);
}

template <typename Traits>
Place source_of(int lane, int i, int half) {
  const int bit = typename Traits::DstLayout{}(lane, 32 * i + 16 * half);
  for (int row = 0; row < 32; ++row) {
    for (int element = 0; element < 8; ++element) {
      if (typename Traits::SrcLayout{}(row, 16 * element) == bit) return {row, element};
    }
  }
  return {-1, -1};
}

}  // namespace

Place mma_a(int lane, int i, bool tf32) {
  return tf32 ? place(Tf32::ALayout{}, lane, i, 16) : place(Half::ALayout{}, lane, i, 16);
}
Place mma_b(int lane, int i, bool tf32) {
  return tf32 ? place(Tf32::BLayout{}, lane, i, 8) : place(Half::BLayout{}, lane, i, 8);
}
Place mma_d(int lane, int i, bool tf32) {
  return tf32 ? place(Tf32::CLayout{}, lane, i, 16) : place(Half::CLayout{}, lane, i, 16);
}

Place ldmatrix(int lane, int i, int half, bool transposed) {
  return transposed ? source_of<Copy_Traits<SM75_U16x8_LDSM_T>>(lane, i, half)
                    : source_of<Copy_Traits<SM75_U32x4_LDSM_N>>(lane, i, half);
}

Place wgmma_d(int n, int thread, int i) {
  switch (n) {
    case 8: return accumulator<8>(thread, i);
    case 64: return accumulator<64>(thread, i);
    case 128: return accumulator<128>(thread, i);
    case 192: return accumulator<192>(thread, i);
    default: return accumulator<256>(thread, i);
  }
}

int k_major(int i, int k) {
  const auto layout = as_position_independent_swizzle_layout(
      tile_to_shape(SM90::GMMA::Layout_K_SW128_Atom<bfloat16_t>{}, Shape<_64, _64>{}));
  return 2 * static_cast<int>(layout(i, k));
}

int mn_major(int i, int k) {
  const auto layout = as_position_independent_swizzle_layout(
      tile_to_shape(SM90::GMMA::Layout_MN_SW128_Atom<bfloat16_t>{}, Shape<_128, _64>{}, Step<_2, _1>{}));
  return 2 * static_cast<int>(layout(i, k));
}

}  // namespace cute_layouts
