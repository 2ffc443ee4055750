// SPDX-License-Identifier: BSD-3-Clause
// bfloat16 products with AMX: dot_products (amx_dot_products.inl), multiply and gradient_panel (amx_multiply.inl); what they
// share is in amx_block.h and amx_tiles.h. Everything else, including float32 and float16, is that of avx512bf16.
//
//   work 2·M·N·K flop; traffic: B once, rows of A from L2 or L3
//   TDPBF16PS adds products of 16 rows and 16 columns over 32 k: 16384 flop in 16 cycles, 6.3 ns. A step of 2 x 2 tiles of
//   sums loads two tiles of each operand, one of them twice: 5 loads of 8 cycles beside 64 cycles of multiplications.
//   A core does M flop per byte of B, 1024 per cycle: if memory delivers 5 bytes of B per cycle it binds up to 200 rows.
//   reached on 2 cores of a Xeon (family 6, model 207): a step in 25 to 29 ns with operands in L1, 2.6 TFLOP/s per core; 38
//   ns if rows of B are 4 KB apart. While another virtual machine uses the same core, tile loads are three to four times
//   slower (amx_block.h). Whole layers: docs/performance.md.
//
// Order of each sum: for each 32 k, ascending, even and odd k are summed separately, from zero, by fused multiply-adds; the
// sum of both is added to C. It depends only on the depth, not on M, N, chunks or the layout of B, so a row's result does not
// depend on its neighbours. All is float32, rounded to nearest even; subnormal operands and results count as zeros.
//
// Tiles are configured and released once per product, which reads up to 64 rows of B: loading 64 bytes and draining what is
// in flight take 140 ns together. So no tile is live in other code, and others, like torch's oneDNN, may configure their own.
#include "amx_tiles.h"
#include "compact.h"
#include "kernels.h"

// these need amx_tiles.h
#include "amx_dot_products.inl"
#include "amx_multiply.inl"

namespace switchgear::cpu {
namespace {

// The multiply-adds of 2 x 2 tiles of 16 x 16 sums, in registers.
double multiply_rate(DType dtype, int64_t iterations) {
  if (dtype != DType::kBFloat16) return kernels_avx512bf16().multiply_rate(dtype, iterations);
  tile_configure(shapes(kTile));  // tiles of zeros
  for (int64_t i = 0; i < iterations; ++i) {
    for_sums<2, 2>([]<int kF, int kS>() { tile_multiply<kSums<kF, kS>, kFirst, kSecond>(); });
  }
  tile_release();
  return static_cast<double>(iterations) * 4 * kTile * kTile * kStep * 2;
}

// Rows in panels of tiles: [panel][pair of tiles of rows][step of 32 k][tile of the pair][16 rows][32 k].
void expand_tiles(void* out, int64_t stride, const Matrix& b, int64_t depth, int64_t num_rows, int64_t first,
                  int64_t count) {
  if (b.dtype != DType::kBFloat16 || b.format != Format::kPanels) {
    return kernels_avx512bf16().expand_rows(out, stride, b, depth, num_rows, first, count);
  }
  const int64_t steps = depth / kStep;
  for (int64_t n = 0; n < num_rows; ++n) {
    for (int64_t c = 0; c < count; c += kStep) {
      const int64_t tile = (n / (2 * kTile) * steps + (first + c) / kStep) * 2 + n / kTile % 2;
      __builtin_memcpy(static_cast<char*>(out) + (n * stride + c) * 2,
                       static_cast<const char*>(b.data) + tile * kTileBytes + n % kTile * kStep * 2, kStep * 2);
    }
  }
}

}  // namespace

const Kernels& kernels_amx() {
  static const Kernels table = [] {
    Kernels own = kernels_avx512bf16();
    own.isa = "amx";
    own.most_rows = kMaxRows;
    own.multiply = multiply;
    own.multiplies_stored = [](DType dtype) { return dtype != DType::kBFloat16; };
    own.dot_products = dot_products;
    own.gathered_bytes = gathered_bytes;
    own.gather_rows = gather_rows;
    own.expand_rows = expand_tiles;
    own.transpose = transpose_left;
    own.gradient_panel = gradient_panel;
    own.panel_vector_bytes = [](DType dtype) {
      return dtype == DType::kBFloat16 ? kTileBytes : kernels_avx512bf16().panel_vector_bytes(dtype);
    };
    own.multiply_rate = multiply_rate;
    return own;
  }();
  return table;
}

}  // namespace switchgear::cpu
