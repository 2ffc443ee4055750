// SPDX-License-Identifier: BSD-3-Clause
// Turns the description of a product into a kernel launch: alignment, grid, tile.
#pragma once
#include <algorithm>

#include "gemm_decode.cuh"
#include "gemm_sm80.cuh"
#include "launch.h"

namespace switchgear::cuda {

// Whether rows of `stride` elements starting at `data` begin at multiples of 16 bytes.
inline bool rows_aligned(const void* data, int64_t stride, DType dtype) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * size_of(dtype) % 16 == 0;
}

// Whether chunks of rows can be copied whole (AlignedRows).
inline bool is_short(int64_t stride, DType dtype) { return stride * size_of(dtype) < int64_t{1} << 32; }
inline bool chunks_aligned(const Rows& rows, DType dtype) {
  return rows_aligned(rows.data, rows.stride, dtype) && is_short(rows.stride, dtype);
}
inline bool chunks_aligned(const ExpertOperand& b, DType dtype) {
  return b.aligned && is_short(b.k_contiguous() ? b.n_stride : b.k_stride, dtype);
}

inline Alignment alignment_of(const Gemm& g) {
  const bool gated_epilogue = g.epilogue != Epilogue::kStore && g.options.gated && !g.options.interleaved;
  const int64_t size = g.epilogue == Epilogue::kGlu ? out_columns(g) : g.n;  // I, if there is a gate
  const bool ups_aligned = !gated_epilogue || size * size_of(g.dtype) % 16 == 0;
  const bool b_halves = g.epilogue == Epilogue::kGlu && !g.b.k_contiguous();  // chunks of b run along gates and ups
  const bool out_halves = g.epilogue == Epilogue::kGluBackward;
  return {.a = chunks_aligned(g.a, g.dtype),
          .b = chunks_aligned(g.b, g.dtype) && (!b_halves || ups_aligned),
          .low_a = chunks_aligned(g.low.a, g.dtype),
          .low_b = chunks_aligned(g.low.b, g.dtype) && (!b_halves || ups_aligned),
          .out = rows_aligned(g.out, g.out_stride, g.dtype) && (!out_halves || ups_aligned),
          .h = rows_aligned(g.h, g.h_stride, g.dtype) && ups_aligned,
          .weighted_a = rows_aligned(g.weighted_a, g.weighted_a_stride, g.dtype)};
}

inline Alignment alignment_of(const Wgrad& g) {
  return {.a = chunks_aligned(g.a, g.dtype),
          .b = chunks_aligned(g.b, g.dtype),
          .out = rows_aligned(g.out, g.out_stride, g.dtype) && g.out_expert_stride * size_of(g.dtype) % 16 == 0};
}

// Number of blocks with so much shared memory that can run at the same time, of which registers allow `most` on a
// multiprocessor. More would wait with their share of the tiles until others end.
inline int64_t resident_blocks(int most, int shared_bytes, const Schedule& schedule) {
  int device = 0, multiprocessors = 0, shared = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  constexpr int kReserved = 1024;  // of shared memory, per block
  const int64_t left = std::max(1, multiprocessors - schedule.reserved_multiprocessors);
  return left * std::clamp(shared / (shared_bytes + kReserved), 1, most);
}

// Of a grid whose blocks take one tile after another.
inline unsigned num_blocks(const Gemm& g, const TileConfig& tile, int shared_bytes) {
  const int64_t width = g.epilogue == Epilogue::kGlu && g.options.gated ? tile.columns / 2 : tile.columns;
  const int64_t tiles = row_tile_bound(g.num_slots, g.num_experts, tile.rows) * ((out_columns(g) + width - 1) / width);
  return static_cast<unsigned>(std::min(tiles, resident_blocks(tile.blocks, shared_bytes, g.schedule)));
}

template <typename Product, TileKind kKind, bool kBDepthMajor>
void launch_gemm_tiles(const Gemm& g, void* stream) {
  constexpr TileConfig kTile = kTiles[static_cast<int>(kKind)];
  launch(gemm_kernel<Product, kKind, kBDepthMajor>, dim3(num_blocks(g, kTile, kTile.shared_bytes())),
         dim3(kTile.threads()), static_cast<size_t>(kTile.shared_bytes()), stream, g, alignment_of(g));
}

// Few slots, and usually few per expert. Experts with more than 16 slots read their weights again, from L2.
inline bool decode_takes(const Gemm& g) {
  const Alignment aligned = alignment_of(g);
  return size_of(g.dtype) == 2 && g.epilogue != Epilogue::kGluBackward && g.num_slots <= kDecodeSlots &&
         pick_tile(g.num_slots / g.num_experts) == TileKind::k16 && g.b.k_contiguous() && aligned.a && aligned.b &&
         aligned.low_a && (aligned.low_b || g.low.rank < 8);  // fewer than 8 depths are read one by one
}

template <typename T>
void launch_decode(const Gemm& g, void* stream) {
  const bool halves = g.epilogue == Epilogue::kGlu && g.options.gated && !g.options.interleaved;
  const int64_t width = halves ? kDecodeColumns / 2 : kDecodeColumns, columns = halves ? g.n / 2 : g.n;
  const int64_t groups = (columns + width - 1) / width;
  const dim3 grid(static_cast<unsigned>((groups + kDecodeWarps - 1) / kDecodeWarps),
                  static_cast<unsigned>(std::min(g.num_slots, g.num_experts) + 1));  // one more for the unassigned rows
  launch(decode_kernel<T>, grid, dim3(32 * kDecodeWarps), 0, stream, g);
}

template <typename Product>
void launch_gemm(const Gemm& g, void* stream) {
  using T = typename Product::Element;
  if constexpr (sizeof(T) == 2) {
    if (decode_takes(g)) return launch_decode<T>(g, stream);
  }
  const auto launch_kind = [&]<TileKind kKind>() {
    if (g.b.k_contiguous()) {
      launch_gemm_tiles<Product, kKind, true>(g, stream);
    } else {
      launch_gemm_tiles<Product, kKind, false>(g, stream);
    }
  };
  switch (pick_tile(g.num_slots / g.num_experts)) {
    case TileKind::k16: return launch_kind.template operator()<TileKind::k16>();
    case TileKind::k64: return launch_kind.template operator()<TileKind::k64>();
    case TileKind::k128: return launch_kind.template operator()<Product::kLargest>();
  }
}

// An expert's slots are the inner dimension here, so the size of the gradient picks the tile: 64 rows where 128 would be half
// empty.
template <typename Product>
void launch_wgrad(const Wgrad& g, void* stream) {
  const auto launch_kind = [&]<TileKind kKind>() {
    constexpr TileConfig kTile = kTiles[static_cast<int>(kKind)];
    const int64_t row_tiles = (g.m + kTile.rows - 1) / kTile.rows;
    const int64_t column_tiles = (g.n + kTile.columns - 1) / kTile.columns;
    launch(wgrad_kernel<Product, kKind>, dim3(static_cast<unsigned>(g.num_matrices * row_tiles * column_tiles)),
           dim3(kTile.threads()), static_cast<size_t>(kTile.shared_bytes()), stream, g, alignment_of(g));
  };
  if (g.m <= 64) {
    launch_kind.template operator()<TileKind::k64>();
  } else {
    launch_kind.template operator()<Product::kLargest>();
  }
}

}  // namespace switchgear::cuda
