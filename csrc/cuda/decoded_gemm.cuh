// SPDX-License-Identifier: BSD-3-Clause
// Grouped GEMM with weights of 1 to 8 bits, decoded into a tile of the dtype of a in shared memory, whose products are
// those of plain weights: out[s,c] = Σ_n a[s,n] · w[e(s)][n,c] for gradients of frozen weights, and x·Wᵀ of float32.
//
//   work 2·S·N·C flop; traffic as stored_gemm.cuh, plus a write and reads of the decoded tile in shared memory: 4096
//   numbers for
//   64·4096 multiply-adds
//   bound by decoding, some 10 instructions a number, and by the products of gemm_sm80.cuh or gemm_f32.cuh
//
// cp.async fills a ring with rows of a and with eight stored steps: 128 columns x 32 depths. All threads decode them,
// eight numbers of a row at a time; a barrier; then the products of a stage read both tiles. Layouts and products are
// those of plain weights, so every dtype and both directions share one kernel. Codes decode with the format as an
// argument: a switch for eight numbers.
//
// Numeric contract: scale · (q - zero) in float32, rounded to the dtype of a as the specification decodes it; products
// and their order are those of gemm_sm80.cuh and gemm_f32.cuh, an adapter's first.
//
// Resources, at most (registers a thread; static shared memory; tests/test_cuda_build.py reads this):
//   decoded_kernel: 255 registers, 64 of local memory
// The local memory is that of the table of nf4, read once per block.
#pragma once
#include <stdexcept>

#include "gemm_f32.cuh"
#include "gemm_launch.cuh"
#include "stored_load.cuh"

namespace switchgear::cuda {

template <typename T>
struct DecodedTile {
  static constexpr TileConfig kConfig = kDecodedTiles[sizeof(T) == 2 ? 0 : 1];
  static constexpr int kRows = kConfig.rows, kColumns = kConfig.columns, kThreads = kConfig.threads();
  static constexpr int kDepthBytes = kConfig.depth_bytes, kStages = kConfig.stages;
  static constexpr int kWarpRows = kRows / kConfig.warps_m, kWarpColumns = kColumns / kConfig.warps_n;
  static constexpr int kMmaRows = kWarpRows / 16, kMmaColumns = kWarpColumns / 8;
  static constexpr int kABytes = kRows * kDepthBytes, kStageBytes = kConfig.stage_bytes();
  using Place = StepPlace<512>;
  static constexpr int kStoredBytes = kABytes + kStageSteps * Place::kAll, kDecodedBytes = kColumns * kDepthBytes;
  static_assert(kThreads == kStoredThreads && kDepthBytes == kStepColumns * static_cast<int>(sizeof(T)));

  static constexpr int shared_bytes(bool adapter) {
    const int ring = kStages * kStoredBytes + kDecodedBytes, staged = kRows * kColumns * 4,
              low = adapter ? kStages * kStageBytes : 0;
    return kTableBytes + (ring > staged ? (ring > low ? ring : low) : staged > low ? staged : low);
  }
};

// Where the eight steps of a stage are: blocks of 16 columns of out (x·Wᵀ), or two blocks of depths and four steps of
// columns (x·W).
template <bool kTransposed>
struct StagePlaces {
  const StoredOperand& w;
  const TileColumns& columns;
  int32_t first_row, end_row;  // kTransposed: the rows of W that are multiplied

  struct Step {
    int32_t block, step;
    bool used;
  };
  __device__ Step at(int i, int32_t depth) const {
    if constexpr (kTransposed) {
      const int32_t row = depth + i / 4 * kStepRows, step = columns.first / kStepColumns + i % 4;
      const bool used = row < end_row - first_row && step * kStepColumns < w.cols;
      return {used ? block_of(w, first_row + row) : 0, step, used};
    } else {
      const int32_t n = columns.column(i * kStepRows), step = depth / kStepColumns;
      const bool used = n < columns.end(i * kStepRows) && depth < w.cols;
      return {used ? block_of(w, n) : 0, step, used};
    }
  }
};

// Writes the stage's numbers to `tile`: [columns][depth], or [depth][columns] if kTransposed.
template <typename T, bool kTransposed>
__device__ inline void decode_stage(std::byte* tile, const std::byte* steps, const StagePlaces<kTransposed>& places,
                                    const StoredMatrix& m, int32_t depth, const float* nf4) {
  using Tile = DecodedTile<T>;
  using Place = typename Tile::Place;
  const StoredOperand& w = places.w;
  constexpr int kItems = kStepRows * kStepChunks;  // of a step
  const int row = static_cast<int>(threadIdx.x) / kStepChunks % kStepRows,
            chunk = static_cast<int>(threadIdx.x) % kStepChunks;
#pragma unroll
  for (int i = static_cast<int>(threadIdx.x) / kItems; i < kStageSteps; i += kStoredThreads / kItems) {
    const std::byte* const step = steps + i * Place::kAll;
    const auto [block, number, used] = places.at(i, depth);
    // Rows of padding may have any scale; here they are depths, and NaN times zero would reach the sums.
    const bool inside = used && (!kTransposed || depth + i / 4 * kStepRows + row < places.end_row - places.first_row);
    float v[8] = {};
    if (inside) {
      const int group = w.group_size == 16 ? chunk / 2 * kStepRows : 0;
      float scale = scale_at(w.format, step + Place::kScales + group, row);
      if (w.row_scales != nullptr) scale *= m.row_scales[static_cast<int64_t>(block) * kStepRows + row];
      const float shift =
          zero_shift(w.format, m.bits, m.zeros == nullptr ? nullptr : step + Place::kZeros + group, row);
      decode_chunk(v, w.format, m.bits, step, row, chunk, nf4);
#pragma unroll
      for (int j = 0; j < 8; ++j) v[j] = (v[j] + shift) * scale;
    }
#pragma unroll
    for (int first = 0; first < 8; first += kVectorSize<T>) {
      float part[kVectorSize<T>];
#pragma unroll
      for (int j = 0; j < kVectorSize<T>; ++j) part[j] = v[first + j];
      const Words words = pack<T>(part);
      const int at = chunk * (8 / kVectorSize<T>)+first / kVectorSize<T>;
      const int offset = kTransposed ? row_major_offset<T, Tile::kColumns>(i / 4 * kStepRows + row,
                                                                           i % 4 * 4 * (8 / kVectorSize<T>)+at)
                                     : depth_major_offset<Tile::kDepthBytes>(i * kStepRows + row, at);
      *reinterpret_cast<uint4*>(tile + offset) = make_uint4(words.w[0], words.w[1], words.w[2], words.w[3]);
    }
  }
}

// sums += the product of a's columns, from `a_first` on, and the rows or columns of W that `places` has.
template <typename Product, bool kTransposed, typename Tile, typename LoadA>
__device__ inline void multiply_decoded(Sums<Tile>& sums, LoadA& load_a, const StagePlaces<kTransposed>& places,
                                        const StoredMatrix& m, std::byte* shared, const float* nf4,
                                        const WarpPlace<Tile>& at) {
  using T = typename Product::Element;
  using Place = typename Tile::Place;
  const int own = static_cast<int>(threadIdx.x) / kThreadsPerStep;
  std::byte* const decoded = shared + Tile::kStages * Tile::kStoredBytes;
  const int32_t end = !m.exists ? 0 : kTransposed ? places.end_row - places.first_row : places.w.cols;
  int32_t next = 0;
  const auto load_next = [&](int stage) {
    if (next < end) {
      std::byte* const to = shared + stage * Tile::kStoredBytes;
      const auto [block, step, used] = places.at(own, next);
      load_a.load(to, next, end);
      StepCopy<Place::kScales>(places.w, m, block, step, used).copy(to + Tile::kABytes + own * Place::kAll);
    }
    next += kStepColumns;
    ptx::cp_async_commit();
  };
#pragma unroll
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) load_next(stage);
  int stage = 0;
  for (int32_t depth = 0; depth < end; depth += kStepColumns) {
    ptx::cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // the stage has arrived for all threads; all have read the stage refilled next and the decoded tile
    load_next(stage == 0 ? Tile::kStages - 1 : stage - 1);
    const std::byte* const a = shared + stage * Tile::kStoredBytes;
    decode_stage<T, kTransposed>(decoded, a + Tile::kABytes, places, m, depth, nf4);
    __syncthreads();
    Product::template multiply_stage<Tile, true, !kTransposed>(sums, a, decoded, at);
    stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
  }
}

template <typename Product, bool kTransposed>
__global__ void __launch_bounds__(kStoredThreads, 2)
    decoded_kernel(const __grid_constant__ Gemm g, const __grid_constant__ StoredOperand w, const Alignment aligned) {
  using T = typename Product::Element;
  using Tile = DecodedTile<T>;
  SHARED_DYN(std::byte, all_shared);
  std::byte* const shared = all_shared + kTableBytes;
  float* const nf4 = reinterpret_cast<float*>(all_shared);
  fill_nf4(nf4);
  __syncthreads();
  const int thread = static_cast<int>(threadIdx.x);
  const int out_width = out_tile_columns(g, Tile::kColumns);
  TileWalker<Tile::kConfig.band> walker(g, Tile::kRows,
                                        static_cast<int32_t>((out_columns(g) + out_width - 1) / out_width));
  RowTile tile;
  for (int64_t index = blockIdx.x; walker.find(index, tile); index += gridDim.x) {
    const bool unassigned = tile.expert == g.num_experts;
    const WarpPlace<Tile> at(thread);
    const TileColumns columns = tile_columns(g, tile.column, Tile::kColumns);
    const auto row_of = [&](const Rows& rows, int i) -> int32_t {
      return i < tile.rows && !unassigned ? source_row(rows, tile.first_row + i) : -1;
    };
    Sums<Tile> sums;
    clear_sums(sums);
    if (g.low.rank > 0) {
      const ExpertMatrix<T> matrix(g.low.b, g.n, g.low.rank, unassigned ? 0 : tile.expert);
      const auto row_at = [&](int i) { return row_of(g.low.a, i); };
      DepthMajorTile<T, Tile::kRows, Tile::kDepthBytes, Tile::kThreads> load_a(
          static_cast<const T*>(g.low.a.data), g.low.a.stride, row_at, thread, aligned.low_a);
      auto load_b = columns_loader<T, Tile, !kTransposed>(g.low.b, matrix, columns, thread, aligned.low_b);
      multiply_tile<Product, Tile, true, !kTransposed>(sums, load_a, load_b, 0, unassigned ? 0 : matrix.k_end, shared,
                                                       at);
      if (g.low.mask.drops()) mask_sums(sums, g.low.mask, tile.first_row, columns.first, at);
      __syncthreads();  // the adapter's last stage has been read
    }
    const StoredMatrix m(w, tile.expert, !unassigned);
    const int32_t parts = kTransposed ? w.parts : 1;
    // Blocks do not cross parts, so the depths of each are multiplied by themselves.
    for (int32_t part = 0; part < parts; ++part) {
      const int32_t first = part * w.part_rows;
      const StagePlaces<kTransposed> places{w, columns, first, first + w.part_rows};
      const T* const a = static_cast<const T*>(g.a.data) + (kTransposed ? first : 0);
      const bool a_aligned = aligned.a && (!kTransposed || first * sizeof(T) % kChunkBytes == 0);
      DepthMajorTile<T, Tile::kRows, Tile::kDepthBytes, Tile::kThreads> load_a(
          a, g.a.stride, [&](int i) { return row_of(g.a, i); }, thread, a_aligned);
      if (part > 0) __syncthreads();  // the last stage has been read
      multiply_decoded<Product, kTransposed>(sums, load_a, places, m, shared, nf4, at);
    }
    const StagedSums staged = stage_sums<Tile>(sums, shared, thread);
    run_epilogue<T>(g, aligned, tile, g.n, staged, Tile::kRows, Tile::kColumns, thread, Tile::kThreads);
    __syncthreads();  // the ring is free again
  }
}

template <typename Product, bool kTransposed>
void launch_decoded_gemm(const Gemm& g, const StoredOperand& w, void* stream) {
  using Tile = DecodedTile<typename Product::Element>;
  static_assert(Tile::shared_bytes(true) <= kLeastSharedBytes);
  const int shared = Tile::shared_bytes(g.low.rank > 0);
  launch(decoded_kernel<Product, kTransposed>, dim3(num_blocks(g, Tile::kConfig, shared)), dim3(Tile::kThreads),
         static_cast<size_t>(shared), stream, g, w, alignment_of(g));
}

template <typename Product>
void launch_decoded_gemm(const Gemm& g, const StoredOperand& w, bool transposed, void* stream) {
  if (transposed) return launch_decoded_gemm<Product, true>(g, w, stream);
  if constexpr (sizeof(typename Product::Element) == 4) {
    launch_decoded_gemm<Product, false>(g, w, stream);
  } else {
    throw std::logic_error("decoded_gemm: stored_gemm multiplies x·Wᵀ of 16 bits");
  }
}

}  // namespace switchgear::cuda
