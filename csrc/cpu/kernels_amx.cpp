// SPDX-License-Identifier: BSD-3-Clause
// Products of bfloat16 by AMX: dot_products (amx_dot_products.inl), multiply and gradient_panel (amx_multiply.inl), with what they
// share in amx_block.h and amx_tiles.h. Everything else, float32 and float16 included, is that of avx512bf16.
//
//   work 2·M·N·K flop; traffic: B once, rows of A from L2 or L3
//   TDPBF16PS adds products of 16 rows and 16 columns over 32 k: 16384 flop in 16 cycles, 6.3 ns. A step of 2 x 2 tiles of sums
//   takes two tiles of each operand, one of them twice: 5 loads of 8 cycles beside 64 of multiplications.
//   A core does M flop for each byte of B, 1024 in a cycle: where memory delivers 5 bytes of B in a cycle it binds up to 200 rows.
//   reached on 2 cores of a Xeon (family 6, model 207): a step in 25 to 29 ns with operands in L1, 2.6 TFLOP/s a core, 38 ns where
//   rows of B are 4 KB apart. When another machine is at work on the same core, tiles are loaded three to four times as slowly
//   (amx_block.h). Whole layers: docs/performance_amx.md.
//
// Order of each sum: for each 32 k, ascending, even and odd k are summed apart, from zero, by fused multiply-adds; the sum of both
// is added to C. It depends on the depth alone: not on M, N, chunks, or how B lies in memory, so a row's result does not depend on
// its neighbours. All is float32, rounded to nearest even; subnormal operands and results count as zeros.
//
// Tiles are configured and released once a product, beside reading up to 64 rows of B: a load of 64 bytes, and the end of what is
// in flight, 140 ns together. So no tile is live in anyone else's code, and others, like torch's oneDNN, may configure their own.
#include "amx_tiles.h"
#include "compact.h"
#include "kernels.h"

// on tiles
#include "amx_dot_products.inl"
#include "amx_multiply.inl"

namespace switchgear::cpu {
namespace {

// As many flop in registers as 16 x 16 sums take in four tiles.
double multiply_rate(DType dtype, int64_t iterations) {
  if (dtype != DType::kBFloat16) return kernels_avx512bf16().multiply_rate(dtype, iterations);
  tile_configure(shapes(kTile));  // of zeros
  for (int64_t i = 0; i < iterations; ++i) {
    for_sums<2, 2>([]<int kF, int kS>() { tile_multiply<kSums<kF, kS>, kFirst, kSecond>(); });
  }
  tile_release();
  return static_cast<double>(iterations) * 4 * kTile * kTile * kStep * 2;
}

}  // namespace

const Kernels& kernels_amx() {
  static const Kernels table = [] {
    Kernels own = kernels_avx512bf16();
    own.isa = "amx";
    own.most_rows = kMaxRows;
    own.multiply = multiply;
    own.dot_products = dot_products;
    own.gathered_bytes = gathered_bytes;
    own.gather_rows = gather_rows;
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
