// SPDX-License-Identifier: BSD-3-Clause
// Grouped GEMM with weights of 1 to 8 bits on mma.sync: out[s,n] = Σ_k a[s,k] · w[e(s)][n,k] with an epilogue; a in 16
// bits.
//
//   work 2·S·N·C flop; traffic (touched experts)·N·C·(bits + those of scales) / 8, weights once per row tile, a once
//   per column tile from L2
//   Few rows: with 8 bits bound by memory; with 4 by instructions, 143 a warp for a step of 256 bytes (SASS, mxfp4): some
//   half of an A100's bandwidth or of an H100's. 64 rows: about 400 instructions for 32 mma, some 60 % of an A100's
//   tensor cores. Nothing of this is measured.
//
// Blocks take one tile after another, as in gemm_sm80.cuh. cp.async fills a ring with rows of a, gathered, and with the
// stored bytes of eight steps; for few rows it keeps 6 (4 bits) to 12 KB of weights of each of four blocks in flight,
// more than latency times bandwidth, without registers. Lanes of a warp read the codes of their own columns from shared
// memory, in the layout of the CPU: a quad shares a word of eight 4-bit codes, of which each lane turns out its pair.
// So no weight passes through shared memory twice, and none is decoded by a lane that does not multiply it.
//
// Numeric contract: codes become exact numbers of 16 bits (nf4: rounded to those of a). mma adds the products of a
// group of columns in float32, k ascending, 16 per instruction, from zero. That sum times the group's scale is added to
// the total in float32: one fused multiply-add, so a scale costs no bits of a weight. Both tiles do the same: the bits
// of a row do not depend on the number of rows. Integers: a holds integers up to 127 (quantize_rows), so the sums of
// groups are exact below 2^24, which 1040 columns reach at most and 2^16 random ones do not. An adapter's products are
// added at the end.
//
// Floors (Qwen3-30B-A3B's layer, one token, 8 experts, 37.7 M weights): mxfp4 20 MB, 10 us at the 2.0 TB/s of an A100;
// fp8 38 MB, 19 us.
//
// Resources, at most (registers a thread; static shared memory; tests/test_cuda_build.py reads this):
//   stored_kernel: 255 registers, 64 of local memory
// The local memory is read once per tile.
#pragma once
#include "gemm_f32.cuh"
#include "gemm_launch.cuh"
#include "stored_load.cuh"

namespace switchgear::cuda {

template <StoredKind kKind, Format kFormat>
struct StoredTile {
  static constexpr TileConfig kConfig = stored_tile(kKind);
  static constexpr int kRows = kConfig.rows, kColumns = kConfig.columns, kThreads = kConfig.threads();
  static constexpr int kDepthBytes = kConfig.depth_bytes, kStages = kConfig.stages;
  static constexpr int kWarpRows = kRows / kConfig.warps_m, kWarpColumns = kColumns / kConfig.warps_n;
  static constexpr int kMmaRows = kWarpRows / 16, kMmaColumns = kWarpColumns / 8;
  static constexpr int kABytes = kRows * kDepthBytes, kStageBytes = kConfig.stage_bytes();  // of an adapter's stage
  static constexpr int kSteps = kDepthBytes / (2 * kStepColumns);
  using Place = StepPlace<most_step_bytes(kFormat)>;
  static constexpr int kRing = kFormat == Format::kNf4 ? kTableBytes : 0;  // where the ring begins
  // A stage: rows of a, steps, and for integers the scales of the rows.
  static constexpr int kStageSteps = kColumns / kStepRows * kSteps;
  static constexpr int kXScales = kABytes + kStageSteps * Place::kAll;
  static constexpr int kStoredBytes = kXScales + (is_integer(kFormat) ? kRows * 4 : 0);
  static_assert(kThreads == kStoredThreads && kThreads >= kStageSteps * kThreadsPerStep);

  static constexpr int shared_bytes(bool adapter) {
    const int ring = kStages * kStoredBytes, staged = kRows * kColumns * 4, low = adapter ? kStages * kStageBytes : 0;
    return kRing + (ring > staged ? (ring > low ? ring : low) : staged > low ? staged : low);
  }
};

// Multiplies the steps of a tile.
template <Format kFormat, typename A, typename Tile>
struct StoredProduct {
  static constexpr bool kIntegers = is_integer(kFormat);
  static constexpr bool kCanHalve = kIntegers || minifloat_group(kFormat) == 16;  // two groups in a step
  using Place = typename Tile::Place;

  const StoredOperand& w;
  const StoredMatrix& m;
  const WarpPlace<Tile>& at;
  const Pairs<kFormat, A> pairs;
  Sums<Tile> part;  // of the current group

  // A warp's j-th eight columns of out are this row, and the next seven, of the step.
  __device__ int row_of(int j) const { return Tile::kMmaColumns == 1 ? at.column % kStepRows : j % 2 * 8; }
  __device__ const std::byte* step_of(const std::byte* stage, int block, int step) const {
    return stage + Tile::kABytes + ((at.column / kStepRows + block) * Tile::kSteps + step) * Place::kAll;
  }

  // The group's sums, times its scales, join the total.
  __device__ void add_group(Sums<Tile>& sums, const std::byte* stage, int step, int group) {
    float x_scales[2 * Tile::kMmaRows];
    if constexpr (kIntegers) {
#pragma unroll
      for (int i = 0; i < 2 * Tile::kMmaRows; ++i) {
        x_scales[i] = reinterpret_cast<const float*>(stage + Tile::kXScales)[at.row + at.lane / 4 + 8 * i];
      }
    }
#pragma unroll
    for (int j = 0; j < Tile::kMmaColumns; ++j) {
      const std::byte* const scales = step_of(stage, j / 2, step) + Place::kScales + group * kStepRows;
      const float2 scale = scale_pair<kFormat>(scales, row_of(j) + at.lane % 4 * 2);
#pragma unroll
      for (int i = 0; i < Tile::kMmaRows; ++i) {
#pragma unroll
        for (int v = 0; v < 4; ++v) {
          const float column_scale = v % 2 == 0 ? scale.x : scale.y;
          float& sum = sums.v[i][j][v];
          if constexpr (kIntegers) {
            sum = fmaf(part.v[i][j][v] * column_scale, x_scales[2 * i + v / 2], sum);
          } else {
            sum = fmaf(part.v[i][j][v], column_scale, sum);
          }
        }
      }
    }
    clear_sums(part);
  }

  // Step `step` of a stage; `ends`: the group's last one.
  __device__ void multiply(Sums<Tile>& sums, const std::byte* stage, int step, bool ends) {
    const bool two_groups = kCanHalve && w.group_size == 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[Tile::kMmaRows][4];
#pragma unroll
      for (int i = 0; i < Tile::kMmaRows; ++i)
        load_a<A, Tile, true>(a[i], stage, at.row + 16 * i, 2 * step + half, at.lane);
#pragma unroll
      for (int j = 0; j < Tile::kMmaColumns; ++j) {
        const std::byte* const codes = step_of(stage, j / 2, step);
        uint32_t shift = 0;
        if ((kIntegers || kFormat == Format::kGroups) && m.zeros != nullptr) {
          const std::byte* const zeros = codes + Place::kZeros + (two_groups ? half * kStepRows : 0);
          shift = pair_of<A>(zero_shift(kFormat, m.bits, zeros, row_of(j) + at.lane / 4));
        }
        const uint32_t b[2] = {pairs.word(codes, row_of(j), 2 * half, shift),
                               pairs.word(codes, row_of(j), 2 * half + 1, shift)};
#pragma unroll
        for (int i = 0; i < Tile::kMmaRows; ++i) MmaProduct<A>::mma(part.v[i][j], a[i], b);
      }
      if (half == 0 ? two_groups : ends) add_group(sums, stage, step, two_groups ? half : 0);
    }
  }
};

// sums += a · wᵀ over all depths, without the row scales of integers.
template <Format kFormat, typename A, typename Tile, typename LoadA, typename RowAt>
__device__ inline void multiply_stored(Sums<Tile>& sums, LoadA& load_a, const RowAt& row_at, const StoredOperand& w,
                                       const StoredMatrix& m, const TileColumns& columns, std::byte* shared,
                                       uint32_t* table, const WarpPlace<Tile>& at) {
  using Place = typename Tile::Place;
  using Product = StoredProduct<kFormat, A, Tile>;
  Product product{.w = w, .m = m, .at = at, .pairs = {at.lane, m.bits, table}};
  clear_sums(product.part);
  const int thread = static_cast<int>(threadIdx.x);
  const int32_t x_row = Product::kIntegers && thread < Tile::kRows ? row_at(thread) : -1;
  const int own = thread / kThreadsPerStep;  // the step that this thread helps to copy, if there are so many
  const bool copies = own < Tile::kStageSteps;
  const int32_t n = columns.column(own / Tile::kSteps * kStepRows);
  const bool used = copies && n < columns.end(own / Tile::kSteps * kStepRows);
  const int32_t steps = m.exists ? (w.cols + kStepColumns - 1) / kStepColumns : 0;
  StepCopy<Place::kScales> codes(w, m, used ? block_of(w, n) : 0, own % Tile::kSteps, used);
  int32_t next = 0;
  const auto load_next = [&](int stage) {
    if (next < steps) {
      std::byte* const to = shared + stage * Tile::kStoredBytes;
      load_a.load(to, next * kStepColumns, w.cols);
      if (copies) codes.copy(to + Tile::kABytes + own * Place::kAll);
      codes.advance(Tile::kSteps);
      if (Product::kIntegers && thread < Tile::kRows) {  // the steps of a stage have one block of activations
        const int32_t x_block = w.x_blocks == 1 ? 0 : next >> w.x_shift;
        const int64_t at_scale = static_cast<int64_t>(x_row < 0 ? 0 : x_row) * w.x_blocks + x_block;
        ptx::cp_async4(to + Tile::kXScales + 4 * thread, w.x_scales + at_scale, x_row >= 0);
      }
    }
    next += Tile::kSteps;
    ptx::cp_async_commit();
  };
#pragma unroll
  for (int stage = 0; stage < Tile::kStages - 1; ++stage) load_next(stage);
  int stage = 0;
  int32_t left = w.group_steps;
  for (int32_t first = 0; first < steps; first += Tile::kSteps) {
    ptx::cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // the stage has arrived for all threads, and all have read the stage refilled next
    load_next(stage == 0 ? Tile::kStages - 1 : stage - 1);
#pragma unroll
    for (int s = 0; s < Tile::kSteps; ++s) {
      if (first + s >= steps) continue;
      const bool ends = --left == 0 || first + s + 1 == steps;
      if (ends) left = w.group_steps;
      product.multiply(sums, shared + stage * Tile::kStoredBytes, s, ends);
    }
    stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
  }
}

// The scales of rows.
template <typename Tile>
__device__ inline void scale_rows(Sums<Tile>& sums, const StoredOperand& w, const StoredMatrix& m,
                                  const TileColumns& columns, const WarpPlace<Tile>& at) {
#pragma unroll
  for (int j = 0; j < Tile::kMmaColumns; ++j) {
    const int first = at.column / kStepRows * kStepRows + j / 2 * kStepRows;
    const int32_t n = columns.column(first);
    const bool used = m.exists && n < columns.end(first);
    const int eight = Tile::kMmaColumns == 1 ? at.column % kStepRows : j % 2 * 8;
    const int64_t row = used ? static_cast<int64_t>(block_of(w, n)) * kStepRows + eight + at.lane % 4 * 2 : 0;
    const float2 scale = used ? *reinterpret_cast<const float2*>(m.row_scales + row) : make_float2(0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < Tile::kMmaRows; ++i) {
#pragma unroll
      for (int v = 0; v < 4; ++v) sums.v[i][j][v] *= v % 2 == 0 ? scale.x : scale.y;
    }
  }
}

// T: of out; A: of g.a; Low: the product of an adapter.
template <Format kFormat, typename T, typename A, typename Low, StoredKind kKind>
__global__ void __launch_bounds__(kStoredThreads, stored_tile(kKind).blocks)
    stored_kernel(const __grid_constant__ Gemm g, const __grid_constant__ StoredOperand w, const Alignment aligned) {
  using Tile = StoredTile<kKind, kFormat>;
  SHARED_DYN(std::byte, all_shared);
  std::byte* const shared = all_shared + Tile::kRing;
  const int thread = static_cast<int>(threadIdx.x);
  const int out_width = out_tile_columns(g, Tile::kColumns);
  if constexpr (kFormat == Format::kNf4) {
    Pairs<kFormat, A>::fill(reinterpret_cast<uint32_t*>(all_shared));
    __syncthreads();
  }
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
    {
      const StoredMatrix m(w, tile.expert, !unassigned);
      const auto row_at = [&](int i) { return row_of(g.a, i); };
      DepthMajorTile<A, Tile::kRows, Tile::kDepthBytes, Tile::kThreads> load_a(static_cast<const A*>(g.a.data),
                                                                               g.a.stride, row_at, thread, aligned.a);
      multiply_stored<kFormat, A>(sums, load_a, row_at, w, m, columns, shared, reinterpret_cast<uint32_t*>(all_shared),
                                  at);
      if constexpr (format_row(kFormat).row_scales) scale_rows(sums, w, m, columns, at);
    }
    if (g.low.rank > 0) {
      __syncthreads();  // the last stage has been read
      const ExpertMatrix<T> matrix(g.low.b, g.n, g.low.rank, unassigned ? 0 : tile.expert);
      const auto row_at = [&](int i) { return row_of(g.low.a, i); };
      DepthMajorTile<T, Tile::kRows, Tile::kDepthBytes, Tile::kThreads> load_a(
          static_cast<const T*>(g.low.a.data), g.low.a.stride, row_at, thread, aligned.low_a);
      auto load_b = columns_loader<T, Tile, true>(g.low.b, matrix, columns, thread, aligned.low_b);
      multiply_tile<Low, Tile, true, true>(sums, load_a, load_b, 0, unassigned ? 0 : matrix.k_end, shared, at);
    }
    const StagedSums staged = stage_sums<Tile>(sums, shared, thread);
    run_epilogue<T>(g, aligned, tile, g.n, staged, Tile::kRows, Tile::kColumns, thread, Tile::kThreads);
    __syncthreads();  // the ring is free again
  }
}

// ---- launches ----------------------------------------------------------------------------------------------------------------

template <Format kFormat, typename T, typename A, typename Low, StoredKind kKind>
void launch_stored_tiles(const Gemm& g, const StoredOperand& w, const Alignment& aligned, void* stream) {
  using Tile = StoredTile<kKind, kFormat>;
  static_assert(Tile::shared_bytes(true) <= kLeastSharedBytes);
  const int shared = Tile::shared_bytes(g.low.rank > 0);
  launch(stored_kernel<kFormat, T, A, Low, kKind>, dim3(num_blocks(g, Tile::kConfig, shared)), dim3(Tile::kThreads),
         static_cast<size_t>(shared), stream, g, w, aligned);
}

// Whether to spread few tiles over twice the warps, of eight columns instead of 16. A warp alone on a scheduler waits most of
// the time, since it executes the instructions of a step one after another. Sums are those of 16 columns, bit for bit. More
// warps would split the inner dimension, where a token's bits would depend on the number of tokens.
inline bool spreads(const Gemm& g) {
  constexpr TileConfig kTile = stored_tile(StoredKind::kSpread);
  const int64_t width = g.epilogue == Epilogue::kGlu && g.options.gated ? kTile.columns / 2 : kTile.columns;
  const int64_t tiles = std::min(g.num_slots, g.num_experts) * ((out_columns(g) + width - 1) / width);
  return tiles <= resident_blocks(kTile.blocks, 0, g.schedule);
}

template <Format kFormat, typename T, typename A, typename Low>
void launch_stored(const Gemm& g, const StoredOperand& w, void* stream) {
  Alignment aligned = alignment_of(g);
  aligned.a = chunks_aligned(g.a, std::is_same_v<A, __nv_bfloat16> ? DType::kBFloat16 : DType::kFloat16);
  if (g.num_slots / g.num_experts > stored_tile(StoredKind::kFew).max_rows_per_expert) {
    launch_stored_tiles<kFormat, T, A, Low, StoredKind::kMany>(g, w, aligned, stream);
  } else if (spreads(g)) {
    launch_stored_tiles<kFormat, T, A, Low, StoredKind::kSpread>(g, w, aligned, stream);
  } else {
    launch_stored_tiles<kFormat, T, A, Low, StoredKind::kFew>(g, w, aligned, stream);
  }
}

// Minifloats and groups: rows of a in the dtype of out, in 16 bits.
template <Format kFormat>
void launch_decoded(const Gemm& g, const StoredOperand& w, void* stream) {
  if (g.dtype == DType::kBFloat16)
    return launch_stored<kFormat, __nv_bfloat16, __nv_bfloat16, MmaProduct<__nv_bfloat16>>(g, w, stream);
  launch_stored<kFormat, __half, __half, MmaProduct<__half>>(g, w, stream);
}

// Integers: rows of a from quantize_rows.
template <Format kFormat>
void launch_integers(const Gemm& g, const StoredOperand& w, void* stream) {
  using Bf16 = __nv_bfloat16;
  if (g.dtype == DType::kBFloat16) return launch_stored<kFormat, Bf16, Bf16, MmaProduct<Bf16>>(g, w, stream);
  if (g.dtype == DType::kFloat16) return launch_stored<kFormat, __half, Bf16, MmaProduct<__half>>(g, w, stream);
  launch_stored<kFormat, float, Bf16, FmaProduct>(g, w, stream);
}

template <Format kFormat>
void stored_gemm_of(const Gemm& g, const StoredOperand& w, void* stream) {
  if constexpr (is_integer(kFormat)) {
    launch_integers<kFormat>(g, w, stream);
  } else {
    launch_decoded<kFormat>(g, w, stream);
  }
}

}  // namespace switchgear::cuda
