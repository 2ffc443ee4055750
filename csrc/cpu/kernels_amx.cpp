// SPDX-License-Identifier: BSD-3-Clause
// dot_products of bfloat16 by AMX: C[m,n] = Σ_k A[m,k]·B[n,k], up to kMaxRows rows and one panel of columns. Everything else,
// float32, float16 and the backward products included, is that of avx512bf16.
//
//   work 2·M·N·K flop; traffic: B once; rows of A are pointers (gathering is free), and come from L2 or L3
//   TDPBF16PS adds products of 16 rows and 16 columns over 32 k: 16384 flop in 16 cycles, as Intel states. A step of 2 x 2 tiles of
//   sums takes two tiles of each operand, 4 loads of 8 cycles beside 64 of multiplications. Of a slice of 512 k, 32 rows of A stay
//   in L1 (32 KB of 48) for both halves of the panel: so L2 delivers 2 KB of B and half as much of A a step, 48 bytes a cycle.
//   A core does M flop for each byte of B, 1024 in a cycle: where memory delivers 4 bytes of B in a cycle it binds up to 256 rows.
//   Where B comes from L2 multiplications bind, and transposing A beside them: 64 shuffles for 16 rows and 32 k, which meet 4 tiles
//   of B in as many cycles, so that this scheme can reach half of the ceiling.
//   All this is counted: the kernels are compiled, their instructions checked in the module, and they run in emulation. They have
//   never run on a processor with AMX, and nothing of them is timed.
//
// Rows of B along k are the first operand, read where they lie. Rows of A are the second one, which has pairs of k for rows: a
// chunk of the depth of 16 rows is transposed at a time and serves the whole panel. So sums come out as Cᵀ, and are transposed
// behind the last chunk. B that runs along n, or is compact, is unpacked into the scratch, chunk by chunk, and read there. The
// last columns of a panel share a tile with some before them; rows of A that are not there and what the last 32 k lack are zeros.
//
// Order of each sum: for each 32 k, ascending, even and odd k are summed apart, from zero, by fused multiply-adds; the sum of both
// is added to C. It depends on the depth alone: not on M, N, chunks, or how B lies in memory, so a row's result does not depend on
// its neighbours. All is float32, rounded to nearest even; subnormal operands and results count as zeros.
//
// Tiles are configured and released once a product, beside reading up to 64 rows of B: a load of 64 bytes, and the end of what is
// in flight. So no tile is live in anyone else's code, and others, like torch's oneDNN, may configure their own.
#include "amx_tiles.h"
#include "compact.h"
#include "kernels.h"

#include "amx_dot_products.inl"
#include "amx_multiply.inl"

namespace switchgear::cpu {
namespace {

// As many flop in registers as 16 x 16 sums take in four tiles.
double multiply_rate(DType dtype, int64_t iterations) {
  if (dtype != DType::kBFloat16) return kernels_avx512bf16().multiply_rate(dtype, iterations);
  tile_configure(shapes(kTile));  // of zeros
  for (int64_t i = 0; i < iterations; ++i) {
    for_sums<2, 2>([]<int kF, int kS>() { tile_multiply<kSums<kF, kS>, kFirst + kF, kSecond + kS>(); });
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
