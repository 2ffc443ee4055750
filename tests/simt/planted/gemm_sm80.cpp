// SPDX-License-Identifier: BSD-3-Clause
// Some tiles of gemm_sm80.cuh and the decode kernel. kernels.py compiles this with one line of the kernels changed.
#include "gemm_sm80.cuh"
#include "gemm_decode.cuh"
#include "launch.h"
#include "products.h"

using namespace simt::planted;
using namespace switchgear::cuda;

namespace {

constexpr Alignment kAligned{.a = true, .b = true, .out = true, .h = true, .weighted_a = true};

template <TileKind kKind>
void multiply(bool gather, int64_t first, int64_t second) {
  constexpr TileConfig kTile = kTiles[static_cast<int>(kKind)];
  Product p(first, second, 5, 130, 180);
  const auto before = simt::statistics().bank_conflicts;
  launch(gemm_kernel<MmaProduct<Bf16>, kKind, true>, 2, kTile.threads(), static_cast<size_t>(kTile.shared_bytes()),
         nullptr, p.gemm(gather), kAligned);
  p.check(gather);
  CHECK(simt::statistics().bank_conflicts == before, simt::statistics().bank_conflicts - before, " bank conflicts");
}
TEST(tiles) {
  multiply<TileKind::k64>(true, 69, 30);
  multiply<TileKind::k64>(false, 69, 30);
}

TEST(tiles_stored_in_two_passes) {
  static_assert(kTiles[static_cast<int>(TileKind::k128)].passes() == 2);
  multiply<TileKind::k128>(true, 131, 30);
}

TEST(weight_gradient) {
  constexpr TileConfig kTile = kTiles[static_cast<int>(TileKind::k64)];
  Gradient g(150, 30, 5, 60, 100);
  launch(wgrad_kernel<MmaProduct<Bf16>, TileKind::k64>, 2, kTile.threads(), static_cast<size_t>(kTile.shared_bytes()),
         nullptr, g.wgrad(true), kAligned);
  g.check(true);
}

TEST(decoding) {
  Product p(7, 20, 2, 70, 100);
  launch(decode_kernel<Bf16>, dim3(2, 3), 32 * kDecodeWarps, 0, nullptr, p.gemm(true));
  p.check(true);
}

}  // namespace
