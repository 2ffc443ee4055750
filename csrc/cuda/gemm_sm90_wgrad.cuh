// SPDX-License-Identifier: BSD-3-Clause
// Weight gradients on Hopper: out[e][m,n] = Σ_{s of e} a[s,m] · b[s,n]. Ring, roles and products are those of gemm_sm90.cuh; the
// inner dimension is an expert's slots, whose last stage cp.async copies with zeros after them.
//
// Resources, at most (registers a thread; static shared memory; tests/test_cuda_build.py reads this):
//   wgrad_sm90_kernel: 168 registers, 8 of local memory
#pragma once
#include "gemm_sm90.cuh"

namespace switchgear::cuda::sm90 {

struct WgradParams {
  CUtensorMap a, b;
  CUtensorMap out;  // for cooperative tiles
  Wgrad g;
};

// A tile of one expert's gradient and the slots it sums over.
struct WgradTile {
  int32_t matrix;
  TilePosition position;
  SlotRange slots;

  __device__ int num_stages() const { return (slots.end - slots.begin + kDepth - 1) / kDepth; }
  // Whether a stage extends past the expert's slots.
  __device__ bool has_tail(int stage) const { return slots.begin + (stage + 1) * kDepth > slots.end; }
};

template <typename C>
struct WgradTiles {
  const Wgrad& g;

  // Whether a cluster shares columns of b, and so has two tiles of rows; else rows of a.
  __device__ bool shares_b() const { return C::kCluster > 1 && g.b.indices == nullptr; }
  __device__ bool shares_a() const { return C::kCluster > 1 && !shares_b() && g.a.indices == nullptr; }
  // Numbers of tiles, or of pairs of them; rows and columns per expert.
  __device__ int32_t rows() const { return ceil_div(g.m, shares_a() ? kP : kP * C::kCluster); }
  __device__ int32_t columns() const { return ceil_div(g.n, shares_a() ? C::kN * C::kCluster : C::kN); }
  __device__ int32_t size() const { return static_cast<int32_t>(g.num_matrices) * rows() * columns(); }
  __device__ WgradTile operator[](int32_t t) const {
    const int32_t each = rows() * columns(), matrix = t / each;
    TilePosition position = banded<C::kBand>(t - matrix * each, rows(), columns());
    int32_t& paired = shares_a() ? position.column : position.row;
    paired = paired * C::kCluster + static_cast<int32_t>(rank_in_cluster<C::kCluster>());
    return {matrix, position,
            slots_of_matrix(g.expert_offsets, g.experts, matrix, static_cast<int32_t>(g.num_experts),
                            static_cast<int32_t>(g.num_slots))};
  }

 private:
  __device__ static int32_t ceil_div(int64_t size, int32_t width) {
    return (static_cast<int32_t>(size) + width - 1) / width;
  }
};

// Indices of gathered rows, read a stage ahead: a load from L2 takes as long as a third of the products of a stage.
struct StageRows {
  int32_t rows[kDepth / 16];

  __device__ void read(const Rows& operand, int32_t first, int32_t end) {
#pragma unroll
    for (int i = 0; i < kDepth / 16; ++i) {
      const int32_t slot = first + static_cast<int>(threadIdx.x) / 8 + 16 * i;
      rows[i] = slot >= end ? -1 : operand.indices != nullptr ? operand.indices[slot] : slot;
    }
  }
  // Rows out of range become -1. Not done on reading, which would wait for the load.
  __device__ void check(const Rows& operand) {
#pragma unroll
    for (int i = 0; i < kDepth / 16; ++i) {
      if (rows[i] >= operand.count) rows[i] = -1;
    }
  }
};

// Loads 64 slots of kWidth columns of one operand, in blocks of 64 columns. `shared`: with TMA, a block of the cluster loads
// half of the slots, for both.
template <typename T, int kWidth>
__device__ inline void load_slots(unsigned char* to, const CUtensorMap* map, uint64_t* full, const Rows& rows,
                                  const StageRows& source, int column, int width, int32_t first, bool by_row,
                                  bool shared) {
  if (!by_row) {
    if (threadIdx.x != 0) return;
    if (shared) {
      const int skipped = static_cast<int>(ptx::cluster_rank()) * (kDepth / 2);
#pragma unroll
      for (int i = 0; i < kWidth / 64; ++i) {
        ptx::tma_load_3d_multicast(to + i * kBlockBytes + skipped * kRowBytes, map, full, column + 64 * i,
                                   first + skipped, 0, kBothBlocks);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kWidth / 64; ++i) {
      ptx::tma_load_3d(to + i * kBlockBytes, map, full, column + 64 * i, first, 0);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kWidth / 64; ++i) copy_rows<T>(to + i * kBlockBytes, rows, source.rows, column + 64 * i, width);
}

template <typename T, typename C>
__device__ inline void produce(const WgradParams& params, const Ring<C>& ring, const WgradTiles<C>& tiles) {
  const Wgrad& g = params.g;
  const bool gather_a = g.a.indices != nullptr, gather_b = g.b.indices != nullptr;
  const TileSource<C::kCluster> source{g.schedule.counter};
  const auto stages_of = [&](int32_t t) { return tiles[t].num_stages(); };
  produce_tiles(source, ring.queue(), tiles.size(), true, stages_of, [&](int32_t t, uint32_t position) {
    const WgradTile tile = tiles[t];
    StageRows next_a{}, next_b{};
    if (gather_a) next_a.read(g.a, tile.slots.begin, tile.slots.end);
    if (gather_b) next_b.read(g.b, tile.slots.begin, tile.slots.end);
    for (int stage = 0; stage < tile.num_stages(); ++stage, ++position) {
      uint64_t* const full = ring.full + ring.index(position);
      const bool tail = tile.has_tail(stage);
      const bool copy_a = tail || gather_a, copy_b = tail || gather_b;
      const int32_t first = tile.slots.begin + stage * kDepth, end = tile.slots.end;
      StageRows rows_a = next_a, rows_b = next_b;
      if (gather_a) {
        next_a.read(g.a, first + kDepth, end);
      } else if (tail) {
        rows_a.read(g.a, first, end);
      }
      if (gather_b) {
        next_b.read(g.b, first + kDepth, end);
      } else if (tail) {
        rows_b.read(g.b, first, end);
      }
      rows_a.check(g.a);
      rows_b.check(g.b);
      ptx::mbar_wait(ring.empty + ring.index(position), ring.parity(position) ^ 1);
      if (threadIdx.x == 0) ptx::mbar_expect_tx(full, ((copy_a ? 0 : kP) + (copy_b ? 0 : C::kN)) * kRowBytes);
      load_slots<T, kP>(ring.p(position), &params.a, full, g.a, rows_a, tile.position.row * kP, static_cast<int>(g.m),
                        first, copy_a, tiles.shares_a());
      load_slots<T, C::kN>(ring.q(position), &params.b, full, g.b, rows_b, tile.position.column * C::kN,
                           static_cast<int>(g.n), first, copy_b, tiles.shares_b());
      ptx::cp_async_mbar_arrive(full);
    }
  });
}

template <typename T, typename C>
__device__ inline void finish(const WgradParams& params, int32_t matrix, TilePosition position,
                              Accumulators<C::kN, C::kBlocks>& acc, const Staging& staging) {
  const Wgrad& g = params.g;
  const int first_row = position.row * kP, column = position.column * C::kN, rows = static_cast<int>(g.m);
  if constexpr (C::kCooperative) {
    if (staging.lent != nullptr) {  // rows and columns past the last are outside the tensor
      const int row = first_row + first_row_of_warp<1>(0);
      return store_boxes<T, C::kN>(acc, staging, &params.out, column, row, matrix, AsIs{});
    }
  }
  T* const out = static_cast<T*>(g.out) + matrix * g.out_expert_stride;
  store_lines<T, C::kN, C::kBlocks>(acc, staging.own, column, static_cast<int>(g.n), AsIs{}, [&](int r) -> T* {
    return first_row + r < rows ? out + int64_t{first_row + r} * g.out_stride : nullptr;
  });
}

template <typename T, typename C>
__device__ inline void consume(const WgradParams& params, const Ring<C>& ring, const WgradTiles<C>& tiles) {
  const Wgrad& g = params.g;
  const int consumer = static_cast<int>(threadIdx.x) / 128 - 1;
  const bool gather = g.a.indices != nullptr || g.b.indices != nullptr;
  constexpr uint32_t kStep = C::kCooperative ? 1 : kConsumers;
  for (auto n = C::kCooperative ? 0 : static_cast<uint32_t>(consumer);; n += kStep) {
    const QueuedTile queued = ring.queue().wait(n);
    if (queued.tile >= tiles.size()) break;
    const WgradTile tile = tiles[queued.tile];
    const int num_stages = tile.num_stages();
    const uint32_t end = queued.position + static_cast<uint32_t>(num_stages);
    *ring.kept() = make_int4(tile.matrix, tile.position.row, tile.position.column, 0);
    ring.queue().release(n, true);
    Accumulators<C::kN, C::kBlocks> acc;
    wait_for_turn(ring, consumer, n / kConsumers);
    multiply<T>(
        acc, ring, queued.position, num_stages, [&](int stage) { return gather || tile.has_tail(stage); }, NoMask{});
    const int4 kept = *ring.kept();
    __syncwarp();  // before other lanes stage rows there
    finish<T, C>(params, kept.x, {kept.y, kept.z}, acc, ring.staging(num_stages, end));
    release_last(ring, num_stages, end);
  }
}

template <typename T, typename C>
__global__ void __launch_bounds__(kThreads, 1) wgrad_sm90_kernel(const __grid_constant__ WgradParams params) {
  SHARED_DYN(unsigned char, memory);
  const Ring<C> ring(memory);
  if (threadIdx.x == 0) ring.init(true);
  ptx::wait_for_kernel_before();
  __syncthreads();
  sync_cluster<C::kCluster>();  // as in gemm_sm90_kernel
  const WgradTiles<C> tiles{params.g};
  if (threadIdx.x < kProducers) {
    ptx::setmaxnreg_dec<C::kProducerRegisters>();
    produce<T>(params, ring, tiles);
  } else {
    ptx::setmaxnreg_inc<C::kConsumerRegisters>();
    consume<T>(params, ring, tiles);
  }
  sync_cluster<C::kCluster>();
}

}  // namespace switchgear::cuda::sm90
