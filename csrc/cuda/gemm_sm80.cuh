// SPDX-License-Identifier: BSD-3-Clause
// Grouped GEMMs on mma.sync: out[s,n] = Σ_k a[s,k] · b[e(s)][n,k] with an epilogue, and out[e][m,n] = Σ_{s of e} a[s,m] · b[s,n].
//
//   work 2·S·N·C flop; traffic (touched experts)·N·C weights once per band of row tiles, a once per column tile from L2
//   bound by reading weights below about 150 (A100) or 300 (H100) rows per expert, by the tensor cores above
//
// A block takes one tile after another (TileWalker). cp.async fills a ring of stages in shared memory and gathers the rows of
// a on the way. ldmatrix (.trans if an operand is not contiguous along the inner dimension) feeds mma, and runs ahead of it
// (FragmentReader). Then the float32 sums go through the ring's memory to the epilogue, which reads and writes whole vectors.
// Two blocks per SM: while one is in its epilogue or waits for its first stage, the other multiplies. Weight gradients have
// one block per tile, since the host knows the tiles; their inner dimension is the slots of an expert. An adapter (g.low) adds its
// products to the same sums before: no pass of its own over out, S·N·r flop more, r padded to a stage of 64 depths (float32: 16).
//
// Numeric contract: one float32 accumulator per element, the products of g.low first; k ascends, 16 terms (tf32: 8) per
// instruction. Every tile of kTiles, both layouts of b and gemm_decode.cuh do the same: the bits of a row depend neither on the
// other rows nor on their number.
// tf32 first rounds both factors to nearest. No atomics.
//
// Floors (bf16, Mixtral 8x7B's layer, 4096 tokens, 2.9 TFLOP of first and second projection): 9.2 ms at the 312 TFLOP/s of an
// A100; 2.9 ms at the 989 of an H100 (which takes gemm_sm90).
//
// Resources, at most (registers a thread; static shared memory; tests/test_cuda_build.py reads this):
//   gemm_kernel: 255 registers, 232 of local memory
//   wgrad_kernel: 254 registers
// The local memory is that of 128 x 128 tiles, written and read a few times per tile, never between the products.
#pragma once
#include <type_traits>

#include "dropout.cuh"
#include "gemm_epilogue.cuh"
#include "gemm_load.cuh"

namespace switchgear::cuda {

// ---- products of a stage -------------------------------------------------------------------------------------------------

template <TileKind kKind>
struct Tile {
  static constexpr TileConfig kConfig = kTiles[static_cast<int>(kKind)];
  static constexpr int kRows = kConfig.rows, kColumns = kConfig.columns, kThreads = kConfig.threads();
  static constexpr int kDepthBytes = kConfig.depth_bytes, kStages = kConfig.stages;
  static constexpr int kWarpRows = kRows / kConfig.warps_m, kWarpColumns = kColumns / kConfig.warps_n;
  static constexpr int kMmaRows = kWarpRows / 16, kMmaColumns = kWarpColumns / 8;
  static constexpr int kABytes = kRows * kDepthBytes, kStageBytes = kConfig.stage_bytes();
  static constexpr int kPasses = kConfig.passes();  // of the epilogue
  static_assert(kConfig.shared_bytes() <= kLeastSharedBytes &&
                kRows * kColumns * 4 / kPasses <= kConfig.shared_bytes());
};

// sums[i][j][v]: row 16 i + lane / 4 + 8 (v / 2), column 8 j + 2 (lane % 4) + v % 2 of the warp's part of the tile
template <typename Tile>
struct Sums {
  float v[Tile::kMmaRows][Tile::kMmaColumns][4];
};

// Start of a warp's part of the tile.
template <typename Tile>
struct WarpPlace {
  int row, column, lane;
  __device__ explicit WarpPlace(int thread)
      : row(thread / 32 / Tile::kConfig.warps_n * Tile::kWarpRows),
        column(thread / 32 % Tile::kConfig.warps_n * Tile::kWarpColumns),
        lane(thread % 32) {}
};

// The operands of one step, 32 bytes of depth: chunks 2·step and 2·step + 1 of depth-major tiles, or 16 (tf32: 8) depths.
template <typename T, typename Tile, bool kDepthMajor>
__device__ inline void load_a(uint32_t (&a)[4], const std::byte* tile, int row, int step, int lane) {
  if constexpr (kDepthMajor) {
    ptx::ldmatrix_x4(a, tile + depth_major_offset<Tile::kDepthBytes>(row + lane % 16, 2 * step + lane / 16));
  } else if constexpr (sizeof(T) == 2) {
    const int depth = 16 * step + lane % 8 + lane / 16 * 8;
    ptx::ldmatrix_x4_trans(a, tile + row_major_offset<T, Tile::kRows>(depth, row / 8 + lane / 8 % 2));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = row + lane / 4 + 8 * (i & 1), depth = 8 * step + lane % 4 + 4 * (i >> 1);
      a[i] = *reinterpret_cast<const uint32_t*>(tile + row_major_offset<T, Tile::kRows>(depth, at / 4) + at % 4 * 4);
    }
  }
}

// 16 columns: b[0], b[1] for the first eight, b[2], b[3] for the others.
template <typename T, typename Tile, bool kDepthMajor>
__device__ inline void load_b(uint32_t (&b)[4], const std::byte* tile, int column, int step, int lane) {
  if constexpr (kDepthMajor) {
    const int at = column + lane % 8 + lane / 16 * 8;
    ptx::ldmatrix_x4(b, tile + depth_major_offset<Tile::kDepthBytes>(at, 2 * step + lane / 8 % 2));
  } else if constexpr (sizeof(T) == 2) {
    const int depth = 16 * step + lane % 16;
    ptx::ldmatrix_x4_trans(b, tile + row_major_offset<T, Tile::kColumns>(depth, column / 8 + lane / 16));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = column + lane / 4 + 8 * (i >> 1), depth = 8 * step + lane % 4 + 4 * (i & 1);
      b[i] = *reinterpret_cast<const uint32_t*>(tile + row_major_offset<T, Tile::kColumns>(depth, at / 4) + at % 4 * 4);
    }
  }
}

// A warp's fragments of one step, in pairs of columns of mma. A warp with one column of them reads its neighbour's too.
template <typename Product, typename Tile, bool kADepthMajor, bool kBDepthMajor>
struct Fragments {
  using T = typename Product::Element;
  static constexpr bool kHalf = Tile::kMmaColumns == 1;
  static constexpr int kPairs = kHalf ? 1 : Tile::kMmaColumns / 2;
  uint32_t a[Tile::kMmaRows][4], b[kPairs][4];

  __device__ void read_a(int i, const std::byte* stage, int step, const WarpPlace<Tile>& at) {
    load_a<T, Tile, kADepthMajor>(a[i], stage, at.row + 16 * i, step, at.lane);
    Product::round(a[i]);
  }
  __device__ void read_b(int j, const std::byte* b_tile, int step, const WarpPlace<Tile>& at) {
    load_b<T, Tile, kBDepthMajor>(b[j], b_tile, at.column / 16 * 16 + 16 * j, step, at.lane);
    if (kHalf && at.column % 16 != 0) b[j][0] = b[j][2], b[j][1] = b[j][3];
    Product::round(b[j]);
  }
  __device__ void multiply(Sums<Tile>& sums, int j) const {
#pragma unroll
    for (int i = 0; i < Tile::kMmaRows; ++i) {
#pragma unroll
      for (int half = 0; half < (kHalf ? 1 : 2); ++half) {
        const uint32_t columns[2] = {b[j][2 * half], b[j][2 * half + 1]};
        Product::mma(sums.v[i][2 * j + half], a[i], columns);
      }
    }
  }
};

// Reads fragments before the products that come before theirs: a pair of columns ahead, rows a step ahead. So ldmatrix runs
// while the tensor cores multiply. The last step of a stage is read before the stage is given up, and multiplied while the
// next stage's first step is read.
template <typename Product, typename Tile, bool kADepthMajor, bool kBDepthMajor>
class FragmentReader {
  using Step = Fragments<Product, Tile, kADepthMajor, kBDepthMajor>;
  static constexpr int kSteps = Tile::kDepthBytes / 32, kRows = Tile::kMmaRows, kPairs = Step::kPairs;
  static_assert(kSteps % 2 == 0, "the fragments of the first step would change place");

 public:
  __device__ explicit FragmentReader(const WarpPlace<Tile>& at) : at_(at) {}

  // Reads the beginning of the first stage.
  __device__ void start(const std::byte* a, const std::byte* b) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) step_[0].read_a(i, a, 0, at_);
    step_[0].read_b(0, b, 0, at_);
  }

  // Multiplies a stage but for its last step, and reads the rest of it.
  __device__ void multiply(Sums<Tile>& sums, const std::byte* a, const std::byte* b) {
#pragma unroll
    for (int step = 0; step + 1 < kSteps; ++step) {
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        if (j + 1 < kPairs) step_[step % 2].read_b(j + 1, b, step, at_);
        read_ahead(j, step + 1, a, b);
        step_[step % 2].multiply(sums, j);
      }
    }
#pragma unroll
    for (int j = 1; j < kPairs; ++j) step_[1].read_b(j, b, kSteps - 1, at_);
  }

  // Multiplies the last step, and reads the beginning of the next stage. Behind the last stage it reads what is never used.
  __device__ void finish(Sums<Tile>& sums, const std::byte* next_a, const std::byte* next_b) {
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      read_ahead(j, 0, next_a, next_b);
      step_[1].multiply(sums, j);
    }
  }

 private:
  // With pair j of the columns of a step: its share of the rows of the next, and with the last one the first columns.
  __device__ void read_ahead(int j, int step, const std::byte* a, const std::byte* b) {
#pragma unroll
    for (int i = j * kRows / kPairs; i < (j + 1) * kRows / kPairs; ++i) step_[step % 2].read_a(i, a, step, at_);
    if (j + 1 == kPairs) step_[step % 2].read_b(0, b, step, at_);
  }

  const WarpPlace<Tile>& at_;
  Step step_[2];
};

// Multiplies stage by stage; nothing is read ahead.
template <typename Product, typename Tile, bool kADepthMajor, bool kBDepthMajor>
class StageReader {
 public:
  __device__ explicit StageReader(const WarpPlace<Tile>& at) : at_(at) {}
  __device__ void start(const std::byte*, const std::byte*) {}
  __device__ void multiply(Sums<Tile>& sums, const std::byte* a, const std::byte* b) {
    Product::template multiply_stage<Tile, kADepthMajor, kBDepthMajor>(sums, a, b, at_);
  }
  __device__ void finish(Sums<Tile>&, const std::byte*, const std::byte*) {}

 private:
  const WarpPlace<Tile>& at_;
};

// The product of two fragments of a dtype. Element is the type in memory.
template <typename T>
struct MmaProduct {
  using Element = T;
  static constexpr TileKind kLargest = TileKind::k128;

  static __device__ void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
      ptx::mma_bf16(d, a, b);
    } else if constexpr (std::is_same_v<T, __half>) {
      ptx::mma_f16(d, a, b);
    } else {
      ptx::mma_tf32(d, a, b);
    }
  }

  static __device__ void round(uint32_t (&factors)[4]) {
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll
      for (int i = 0; i < 4; ++i) factors[i] = ptx::cvt_tf32(__uint_as_float(factors[i]));
    }
  }

  template <typename Tile, bool kADepthMajor, bool kBDepthMajor>
  using Reader = FragmentReader<MmaProduct, Tile, kADepthMajor, kBDepthMajor>;

  // A stage by itself.
  template <typename Tile, bool kADepthMajor, bool kBDepthMajor>
  static __device__ void multiply_stage(Sums<Tile>& sums, const std::byte* a_tile, const std::byte* b_tile,
                                        const WarpPlace<Tile>& at) {
    constexpr int kSteps = Tile::kDepthBytes / 32;
    constexpr int kUnroll = std::is_same_v<T, float> ? 1 : kSteps;  // tf32 needs an address per word
#pragma unroll kUnroll
    for (int step = 0; step < kSteps; ++step) {
      Fragments<MmaProduct, Tile, kADepthMajor, kBDepthMajor> fragments;
#pragma unroll
      for (int i = 0; i < Tile::kMmaRows; ++i) fragments.read_a(i, a_tile, step, at);
#pragma unroll
      for (int j = 0; j < Tile::kMmaColumns / 2; ++j) fragments.read_b(j, b_tile, step, at);
#pragma unroll
      for (int j = 0; j < Tile::kMmaColumns / 2; ++j) fragments.multiply(sums, j);
    }
  }
};

// ---- one tile ------------------------------------------------------------------------------------------------------------

template <typename Tile>
__device__ inline void clear_sums(Sums<Tile>& sums) {
#pragma unroll
  for (int i = 0; i < Tile::kMmaRows; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kMmaColumns; ++j) {
#pragma unroll
      for (int v = 0; v < 4; ++v) sums.v[i][j][v] = 0.0f;
    }
  }
}

// sums += Σ over depths [begin, end) of the products of what the loaders copy.
template <typename Product, typename Tile, bool kADepthMajor, bool kBDepthMajor, typename LoadA, typename LoadB>
__device__ inline void multiply_tile(Sums<Tile>& sums, LoadA& load_a, LoadB& load_b, int32_t begin, int32_t end,
                                     std::byte* shared, const WarpPlace<Tile>& at) {
  constexpr int kDepth = Tile::kDepthBytes / static_cast<int>(sizeof(typename Product::Element));
  int32_t next = begin;
  const auto load_next = [&](int stage) {
    if (next < end) {
      load_a.load(shared + stage * Tile::kStageBytes, next, end);
      load_b.load(shared + stage * Tile::kStageBytes + Tile::kABytes, next, end);
    }
    next += kDepth;
    ptx::cp_async_commit();  // an empty group at the end keeps the count of groups right
  };
#pragma unroll
  for (int stage = 0; stage < Tile::kStages; ++stage) load_next(stage);
  ptx::cp_async_wait<Tile::kStages - 1>();
  __syncthreads();  // the first stage has arrived for all threads
  typename Product::template Reader<Tile, kADepthMajor, kBDepthMajor> reader(at);
  reader.start(shared, shared + Tile::kABytes);
  int stage = 0;
  for (int32_t depth = begin; depth < end; depth += kDepth) {
    const int next_stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
    const std::byte* const a = shared + stage * Tile::kStageBytes;
    const std::byte* const next_a = shared + next_stage * Tile::kStageBytes;
    reader.multiply(sums, a, a + Tile::kABytes);
    ptx::cp_async_wait<Tile::kStages - 2>();
    __syncthreads();  // the next stage has arrived for all threads, and all have read this one
    load_next(stage);
    reader.finish(sums, next_a, next_a + Tile::kABytes);
    stage = next_stage;
  }
}

// Applies the mask of dropout to the sums of a tile that begins at (slot, column).
template <typename Tile>
__device__ inline void mask_sums(Sums<Tile>& sums, const DropoutMask& mask, int32_t slot, int32_t column,
                                 const WarpPlace<Tile>& at) {
#pragma unroll
  for (int i = 0; i < 2 * Tile::kMmaRows; ++i) {
    const DropoutRow row(mask, slot + at.row + 8 * i + at.lane / 4);
#pragma unroll
    for (int j = 0; j < Tile::kMmaColumns; ++j) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        float& sum = sums.v[i / 2][j][i % 2 * 2 + v];
        sum = row.keeps(column + at.column + 8 * j + at.lane % 4 * 2 + v) ? sum : 0.0f;
      }
    }
  }
}

// Stores the accumulators of all warps in the ring's memory.
template <typename Tile>
__device__ inline StagedSums stage_sums(const Sums<Tile>& sums, std::byte* shared, int thread) {
  const StagedSums staged(reinterpret_cast<float*>(shared), Tile::kColumns);
  const WarpPlace<Tile> at(thread);
  ptx::cp_async_wait<0>();
  __syncthreads();  // no warp reads the last stage any more
#pragma unroll
  for (int i = 0; i < Tile::kMmaRows; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kMmaColumns; ++j) {
      const int row = at.row + 16 * i + at.lane / 4, column = at.column + 8 * j + at.lane % 4 * 2;
      staged.pair(row, column) = make_float2(sums.v[i][j][0], sums.v[i][j][1]);
      staged.pair(row + 8, column) = make_float2(sums.v[i][j][2], sums.v[i][j][3]);
    }
  }
  __syncthreads();
  return staged;
}

// Passes the accumulators through the ring's memory: store(staged, first, rows) for rows [first, first + rows) of the tile.
// In two passes, each warp stages half of its rows.
template <typename Tile, typename Store>
__device__ inline void store_tile(const Sums<Tile>& sums, std::byte* shared, int thread, const Store& store) {
  if constexpr (Tile::kPasses == 1) {
    store(stage_sums<Tile>(sums, shared, thread), 0, Tile::kRows);
  } else {
    constexpr int kPassRows = Tile::kWarpRows / Tile::kPasses, kMmas = Tile::kMmaRows / Tile::kPasses;
    float* const memory = reinterpret_cast<float*>(shared);
    const StagedSums staged(memory, Tile::kColumns);
    const WarpPlace<Tile> at(thread);
    ptx::cp_async_wait<0>();
#pragma unroll
    for (int pass = 0; pass < Tile::kPasses; ++pass) {
      __syncthreads();  // the last stage, or the last pass, has been read
#pragma unroll
      for (int i = 0; i < kMmas; ++i) {
#pragma unroll
        for (int j = 0; j < Tile::kMmaColumns; ++j) {
          const int row = at.row / Tile::kPasses + 16 * i + at.lane / 4, column = at.column + 8 * j + at.lane % 4 * 2;
          const float (&sum)[4] = sums.v[pass * kMmas + i][j];
          staged.pair(row, column) = make_float2(sum[0], sum[1]);
          staged.pair(row + 8, column) = make_float2(sum[2], sum[3]);
        }
      }
      __syncthreads();
#pragma unroll 1
      for (int band = 0; band < Tile::kConfig.warps_m; ++band) {
        store(StagedSums(memory + band * kPassRows * Tile::kColumns, Tile::kColumns),
              band * Tile::kWarpRows + pass * kPassRows, kPassRows);
      }
    }
  }
}

// ---- kernels -------------------------------------------------------------------------------------------------------------

// Expert e's matrix: its start and its numbers of columns n and depths k (rows_are_n says which one its rows bound).
template <typename T>
struct ExpertMatrix {
  const T* data;
  int32_t n_end, k_end;

  __device__ ExpertMatrix(const ExpertOperand& b, int64_t n, int64_t k, int32_t e)
      : n_end(static_cast<int32_t>(n)), k_end(static_cast<int32_t>(k)) {
    data = static_cast<const T*>(b.data) + e * b.expert_stride;
    if (b.separate != nullptr) {
      data = static_cast<const T*>(b.separate[e].data);
      bound(b, static_cast<int32_t>(b.separate[e].rows));
    }
    if (b.ends != nullptr) bound(b, b.ends[e]);
  }

 private:
  __device__ void bound(const ExpertOperand& b, int32_t rows) {
    rows = rows > 0 ? rows : 0;
    if (b.rows_are_n) n_end = rows < n_end ? rows : n_end;
    if (!b.rows_are_n) k_end = rows < k_end ? rows : k_end;
  }
};

// Loader of a tile's columns of an expert's matrix, up to `depth`.
template <typename T, typename Tile, bool kDepthMajor>
__device__ inline auto columns_loader(const ExpertOperand& b, const ExpertMatrix<T>& matrix, const TileColumns& columns,
                                      int thread, bool aligned) {
  if constexpr (kDepthMajor) {
    const auto column_at = [&](int j) -> int32_t {
      const int32_t column = columns.column(j);
      return column < columns.end(j) && column < matrix.n_end ? column : -1;
    };
    return DepthMajorTile<T, Tile::kColumns, Tile::kDepthBytes, Tile::kThreads>(matrix.data, b.n_stride, column_at,
                                                                                thread, aligned);
  } else {
    using Load = RowMajorTile<T, Tile::kColumns, Tile::kDepthBytes, Tile::kThreads>;
    const int j = Load::chunk_row(thread);
    const int32_t column = columns.column(j), end = columns.end(j);
    return Load({.data = matrix.data, .stride = b.k_stride, .count = matrix.k_end}, column,
                (end < matrix.n_end ? end : matrix.n_end) - column, thread, aligned, 0, matrix.k_end);
  }
}

// A tile multiplies the operands of g.low, then those of g. The ring runs empty in between, an estimated 3 % of a tile at C = 2048:
// one loop over both spills registers of the largest tile.
template <typename Product, TileKind kKind, bool kBDepthMajor>
__global__ void __launch_bounds__(Tile<kKind>::kThreads, Tile<kKind>::kConfig.blocks)
    gemm_kernel(const __grid_constant__ Gemm g, const Alignment aligned) {
  using T = typename Product::Element;
  using Tile = Tile<kKind>;
  SHARED_DYN(std::byte, shared);
  const int thread = static_cast<int>(threadIdx.x);
  const int out_width = out_tile_columns(g, Tile::kColumns);
  TileWalker<Tile::kConfig.band> walker(g, Tile::kRows,
                                        static_cast<int32_t>((out_columns(g) + out_width - 1) / out_width));
  RowTile tile;
  for (int64_t index = blockIdx.x; walker.find(index, tile); index += gridDim.x) {
    const bool unassigned = tile.expert == g.num_experts;
    Sums<Tile> sums;
    clear_sums(sums);
    // Compiled for each pair of operands, so that strides and bases are constants, not registers.
    const auto multiply = [&](const Rows& rows, const ExpertOperand& b, int64_t depth, bool a_aligned, bool b_aligned) {
      const ExpertMatrix<T> matrix(b, g.n, depth, unassigned ? 0 : tile.expert);
      const TileColumns columns = tile_columns(g, tile.column, Tile::kColumns);
      const auto row_at = [&](int i) -> int32_t {
        return i < tile.rows && !unassigned ? source_row(rows, tile.first_row + i) : -1;
      };
      DepthMajorTile<T, Tile::kRows, Tile::kDepthBytes, Tile::kThreads> load_a(static_cast<const T*>(rows.data),
                                                                               rows.stride, row_at, thread, a_aligned);
      auto load_b = columns_loader<T, Tile, kBDepthMajor>(b, matrix, columns, thread, b_aligned);
      multiply_tile<Product, Tile, true, kBDepthMajor>(sums, load_a, load_b, 0, unassigned ? 0 : matrix.k_end, shared,
                                                       WarpPlace<Tile>(thread));
    };
    if (g.low.rank > 0) {
      multiply(g.low.a, g.low.b, g.low.rank, aligned.low_a, aligned.low_b);
      if (g.low.mask.drops()) {
        const int32_t column = tile_columns(g, tile.column, Tile::kColumns).first;
        mask_sums(sums, g.low.mask, tile.first_row, column, WarpPlace<Tile>(thread));
      }
      __syncthreads();  // the adapter's last stage has been read
    }
    multiply(g.a, g.b, g.c, aligned.a, aligned.b);
    const int32_t n_end = ExpertMatrix<T>(g.b, g.n, g.c, unassigned ? 0 : tile.expert).n_end;
    store_tile(sums, shared, thread, [&](const StagedSums& staged, int first, int rows) {
      const RowTile part{tile.expert, tile.first_row + first, tile.rows - first, tile.column};
      run_epilogue<T>(g, aligned, part, n_end, staged, rows, Tile::kColumns, thread, Tile::kThreads);
    });
    __syncthreads();  // the ring is free again
  }
}

template <typename Product, TileKind kKind>
__global__ void __launch_bounds__(Tile<kKind>::kThreads, Tile<kKind>::kConfig.blocks)
    wgrad_kernel(const __grid_constant__ Wgrad g, const Alignment aligned) {
  using T = typename Product::Element;
  using Tile = Tile<kKind>;
  using LoadA = RowMajorTile<T, Tile::kRows, Tile::kDepthBytes, Tile::kThreads>;
  using LoadB = RowMajorTile<T, Tile::kColumns, Tile::kDepthBytes, Tile::kThreads>;
  SHARED_DYN(std::byte, shared);
  const int thread = static_cast<int>(threadIdx.x);
  const auto row_tiles = static_cast<int32_t>((g.m + Tile::kRows - 1) / Tile::kRows);
  const auto column_tiles = static_cast<int32_t>((g.n + Tile::kColumns - 1) / Tile::kColumns);
  const int64_t tiles = static_cast<int64_t>(row_tiles) * column_tiles;
  const auto matrix = static_cast<int32_t>(blockIdx.x / tiles);
  const TilePosition position = banded<Tile::kConfig.band>(blockIdx.x % tiles, row_tiles, column_tiles);
  const int32_t first_row = position.row * Tile::kRows, first_column = position.column * Tile::kColumns;
  const SlotRange slots = slots_of_matrix(g.expert_offsets, g.experts, matrix, static_cast<int32_t>(g.num_experts),
                                          static_cast<int32_t>(g.num_slots));

  const int32_t row = first_row + LoadA::chunk_row(thread), column = first_column + LoadB::chunk_row(thread);
  LoadA load_a(g.a, row, static_cast<int32_t>(g.m) - row, thread, aligned.a, slots.begin, slots.end);
  LoadB load_b(g.b, column, static_cast<int32_t>(g.n) - column, thread, aligned.b, slots.begin, slots.end);
  Sums<Tile> sums;
  clear_sums(sums);
  multiply_tile<Product, Tile, false, false>(sums, load_a, load_b, slots.begin, slots.end, shared,
                                             WarpPlace<Tile>(thread));
  T* const out = static_cast<T*>(g.out) + matrix * g.out_expert_stride;
  constexpr int kBlocks = Tile::kColumns / kBlock;
  store_tile(sums, shared, thread, [&](const StagedSums& staged, int first, int rows) {
    for (int i = thread; i < rows * kBlocks; i += Tile::kThreads) {
      const int64_t m = first_row + first + i / kBlocks, n = first_column + i % kBlocks * kBlock;
      if (m >= g.m || n >= g.n) continue;
      float values[kBlock];
      staged.block(values, i / kBlocks, i % kBlocks * kBlock);
      const int count = static_cast<int>(g.n - n < kBlock ? g.n - n : kBlock);
      store_block(out + m * g.out_stride + n, values, count, aligned.out);
    }
  });
}

}  // namespace switchgear::cuda
