// SPDX-License-Identifier: BSD-3-Clause
// The products of stored_gemm.cuh on Hopper: out[s,n] = Σ_k a[s,k] · w[e(s)][n,k] with weights of 1 to 8 bits, which are wgmma's
// register operand.
//
//   work 2·S·N·C flop; traffic (touched experts)·N·C·(bits + those of scales) / 8, weights once per row tile, a once per 128
//   columns from L2
//   128 slots: the tensor cores need 128 cycles a warpgroup for a step of 16 x 32 a warp. A scheduler, with a warp of each
//   consumer, issues about 50 instructions to decode it and 64 (integers 150) to add a group's sums: with groups of 32 columns
//   as many cycles as the products, with 128 half. L2: 16 KB of a and 5 to 10 KB of weights for 512 cycles.
//   Few slots: bound by memory.
//
// The product is transposed. A warpgroup multiplies 64 columns of out by 16, 64 or 128 slots: the columns are wgmma's 64 rows,
// so each warp owns a block of 16 rows of the weight as it is stored, and a step of 16 x 32 is two fragments. Lanes decode their
// own pairs (stored_decode.cuh), once per row tile; x comes from shared memory. One tile for all numbers of rows, so the bits
// of a row do not depend on them.
//
// Roles, ring and queue are those of gemm_sm90.cuh: a producer warpgroup copies rows of a, gathered, and stored bytes by
// cp.async; two consumers share a tile of 128 columns. A stage is 64 depths: rows of 128 bytes with the 128-byte swizzle, and
// two steps of each of eight blocks. While the products of a step run, the next step is decoded into other registers; only at
// the end of a group does a consumer wait for its products, and the other consumer's run meanwhile.
//
// An adapter's stages come last: its small rows in shared memory, its matrix in registers, into the same sums.
//
// Numeric contract: that of stored_gemm.cuh. The products of a group from zero, k ascending in steps of 16; times the group's
// scale, added in float32; then an adapter's products. Results are rounded once, when stored. No atomics; nothing depends on the
// grid.
//
// Resources, at most (registers a thread; static shared memory; tests/test_cuda_build.py reads this):
//   stored_sm90_kernel: 168 registers
// setmaxnreg changes them to 88 for producers and 208 for consumers.
#pragma once
#include <utility>

#include "gemm_launch.cuh"
#include "gemm_sm90.cuh"
#include "stored_load.cuh"
#include "stored_sm90.h"

namespace switchgear::cuda::sm90 {

template <Format kFormatOf, typename Element, size_t kRow>
struct StoredConfig {
  static constexpr Format kFormat = kFormatOf;
  using A = Element;  // of rows of a and decoded weights
  static constexpr StoredRow kTile = kStoredTiles[kRow];
  static constexpr int kSlots = kTile.slots, kColumns = 128, kCluster = 1, kBand = kTile.band;
  static constexpr bool kIntegers = is_integer(kFormat);
  using Place = StepPlace<most_step_bytes(kFormat)>;
  static constexpr int kSteps = kDepth / kStepColumns, kBlocks = kColumns / kStepRows;
  // A stage: rows of a, steps, and for integers the scales of the rows.
  static constexpr int kStepsAt = kSlots * kRowBytes, kXScales = kStepsAt + kBlocks * kSteps * Place::kAll;
  static constexpr int kStageBytes = (kXScales + (kIntegers ? kSlots * 4 : 0) + 1023) / 1024 * 1024;
  static constexpr int kScratchBytes = kSlots * kScratchPitch * 4;
  static constexpr int kOthers = 1024 + kTableBytes + kScratchBytes + kQueueBytes + (kMaxExperts + 2) * 4;
  static constexpr int kFit = ((227 << 10) - kOthers) / (kStageBytes + 16);
  static constexpr int kStages = kFit < kTile.stages ? kFit : kTile.stages;
  static constexpr int kSharedBytes = kOthers + kStages * (kStageBytes + 16);
  static constexpr int kConsumerRegisters = 208, kProducerRegisters = 88;
  static_assert(kBlocks * kThreadsPerStep == kProducers && kStages >= 4);
};

// From a multiple of 1024: stages, the epilogue's scratch memory, nf4's table, barriers, queue, first tiles.
template <typename C>
struct StoredRing {
  unsigned char* stages;
  uint64_t* full;
  uint64_t* empty;

  __device__ explicit StoredRing(unsigned char* memory) {
    const uint32_t address = ptx::smem_u32(memory);
    stages = memory + ((address + 1023u) / 1024u * 1024u - address);
    full = reinterpret_cast<uint64_t*>(stages + C::kStages * C::kStageBytes + C::kScratchBytes + kTableBytes);
    empty = full + C::kStages;
  }
  __device__ void init() const {
    for (int s = 0; s < C::kStages; ++s) {
      ptx::mbar_init(full + s, kProducers);
      ptx::mbar_init(empty + s, 4 * kConsumers);
    }
    queue().init(4 * kConsumers + kProducers / 32);
    ptx::fence_barrier_init();
  }
  __device__ float* scratch() const { return reinterpret_cast<float*>(stages + C::kStages * C::kStageBytes); }
  __device__ uint32_t* table() const {
    return reinterpret_cast<uint32_t*>(stages + C::kStages * C::kStageBytes + C::kScratchBytes);
  }
  __device__ TileQueue<1> queue() const { return TileQueue<1>(empty + C::kStages); }
  __device__ int32_t* first_tiles() const {
    return reinterpret_cast<int32_t*>(reinterpret_cast<unsigned char*>(empty + C::kStages) + kQueueBytes);
  }
  __device__ static uint32_t index(uint32_t position) { return position % C::kStages; }
  __device__ static uint32_t parity(uint32_t position) { return position / C::kStages & 1; }
  __device__ unsigned char* stage(uint32_t position) const { return stages + index(position) * C::kStageBytes; }
  // Step `step` of a block in a stage.
  __device__ std::byte* step(uint32_t position, int block, int step) const {
    return reinterpret_cast<std::byte*>(stage(position)) + C::kStepsAt + (block * C::kSteps + step) * C::Place::kAll;
  }
};

// A tile's stages: first those of the weight, none for experts whose slot or record is out of range, then those of an adapter.
// Unassigned rows have none.
struct StoredStages {
  int stored, low;

  __device__ StoredStages(const Gemm& g, const StoredOperand& w, int32_t expert)
      : stored(StoredMatrix(w, expert, expert < g.num_experts).exists ? (w.cols + kDepth - 1) / kDepth : 0),
        low(expert < g.num_experts ? num_low_stages(g) : 0) {}
};

// ---- producer ------------------------------------------------------------------------------------------------------------

template <typename T, typename C>
__device__ inline void produce_stored(const Gemm& g, const StoredOperand& w, const StoredRing<C>& ring,
                                      const GemmTiles<C>& tiles) {
  const int thread = static_cast<int>(threadIdx.x), block = thread / kThreadsPerStep;
  const TileSource<1> source{g.schedule.counter};
  const auto stages_of = [&](int32_t t) {
    const StoredStages stages(g, w, tiles[t].expert);
    return stages.stored + stages.low;
  };
  produce_tiles(source, ring.queue(), tiles.size(), true, stages_of, [&](int32_t t, uint32_t position) {
    const RowTile tile = tiles[t];
    const StoredStages stages(g, w, tile.expert);
    const auto row_at = [&](int i) { return i < tile.rows ? source_row(g.a, tile.first_row + i) : -1; };
    int32_t rows[C::kSlots / 16];
#pragma unroll
    for (int i = 0; i < C::kSlots / 16; ++i) rows[i] = row_at(thread / 8 + 16 * i);
    const int32_t x_row = C::kIntegers && thread < C::kSlots ? row_at(thread) : -1;
    const StoredMatrix m(w, tile.expert, stages.stored > 0);
    const TileColumns columns = tile_columns(g, tile.column, C::kColumns);
    const int32_t n = columns.column(block * kStepRows);
    const bool used = n < columns.end(block * kStepRows);
    StepCopy<C::Place::kScales> codes(w, m, used ? block_of(w, n) : 0, 0, used);
    for (int stage = 0; stage < stages.stored; ++stage, ++position) {
      ptx::mbar_wait(ring.empty + ring.index(position), ring.parity(position) ^ 1);
      copy_rows<typename C::A>(ring.stage(position), g.a, rows, stage * kDepth, w.cols);
#pragma unroll
      for (int step = 0; step < C::kSteps; ++step) {
        codes.copy(ring.step(position, block, step));
        codes.advance(1);
      }
      if (C::kIntegers && thread < C::kSlots) {  // a stage has one block of activations
        const int32_t x_block = w.x_blocks == 1 ? 0 : stage * C::kSteps >> w.x_shift;
        const int64_t at = static_cast<int64_t>(x_row < 0 ? 0 : x_row) * w.x_blocks + x_block;
        ptx::cp_async4(ring.stage(position) + C::kXScales + 4 * thread, w.x_scales + at, x_row >= 0);
      }
      ptx::cp_async_mbar_arrive(ring.full + ring.index(position));
    }
    if (stages.low == 0) return;
#pragma unroll
    for (int i = 0; i < C::kSlots / 16; ++i) {
      const int r = thread / 8 + 16 * i;
      rows[i] = r < tile.rows ? source_row(g.low.a, tile.first_row + r) : -1;
    }
    for (int stage = 0; stage < stages.low; ++stage, ++position) {
      ptx::mbar_wait(ring.empty + ring.index(position), ring.parity(position) ^ 1);
      copy_rows<T>(ring.stage(position), g.low.a, rows, stage * kDepth, static_cast<int>(g.low.rank));
      ptx::cp_async_mbar_arrive(ring.full + ring.index(position));
    }
  });
}

// ---- consumers -----------------------------------------------------------------------------------------------------------

// What a warp multiplies: a block of 16 columns of out.
template <typename C>
struct StoredProduct {
  using A = typename C::A;
  using Fragments = uint32_t[C::kSteps][2][4];  // of a stage: each step is two products of 16 depths
  using Sums = float[C::kSlots / 2];

  const StoredOperand& w;
  const StoredMatrix& m;
  const StoredRing<C>& ring;
  uint32_t* table;
  const int block, lane;

  // A step's fragments: rows lane / 4 and 8 more, pairs of columns. Numbers of bits as constants save most instructions.
  __device__ void decode(uint32_t (&a)[2][4], uint32_t position, int step) const {
    using Decoder = Pairs<C::kFormat, A>;
    const std::byte* const codes = ring.step(position, block, step);
    if constexpr (C::kFormat == Format::kGroups) {
      switch (m.bits) {
        case 1: return decode_by(a, Decoder(lane, 1, table), codes);
        case 2: return decode_by(a, Decoder(lane, 2, table), codes);
        case 3: return decode_by(a, Decoder(lane, 3, table), codes);
        default: return decode_by(a, Decoder(lane, 4, table), codes);
      }
    } else {
      decode_by(a, Decoder(lane, m.bits, table), codes);
    }
  }
  __device__ void decode_by(uint32_t (&a)[2][4], const Pairs<C::kFormat, A>& pairs, const std::byte* codes) const {
    const auto decode_with = [&](uint32_t low, uint32_t high) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[half][i] = pairs.word(codes, i % 2 * 8, 2 * half + i / 2, i % 2 == 0 ? low : high);
        }
      }
    };
    if ((C::kIntegers || C::kFormat == Format::kGroups) && m.zeros != nullptr) {
      const auto shift_at = [&](int row) {
        return pair_of<A>(zero_shift(C::kFormat, m.bits, codes + C::Place::kZeros, row + lane / 4));
      };
      decode_with(shift_at(0), shift_at(8));
    } else {
      decode_with(0, 0);  // constants: fewer instructions
    }
  }

  // part = (`goes_on`: part +) the step's products, queued.
  __device__ void multiply(Sums& part, const uint32_t (&a)[2][4], uint32_t position, int step, bool goes_on) const {
    const uint32_t x = ptx::smem_u32(ring.stage(position));
    ptx::wgmma_fence();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      ptx::wgmma<A, C::kSlots>(part, a[half], operand<false>(x, 2 * step + half), half > 0 || goes_on);
    }
    ptx::wgmma_commit();
  }

  // The sums of a group, times its scales, join the total.
  __device__ void add_group(Sums& total, Sums& part, uint32_t position, int step) const {
    ptx::wgmma_wait<0>();
    ptx::wgmma_registers(part);
    const std::byte* const scales = ring.step(position, block, step) + C::Place::kScales;
    const float scale[2] = {scale_at(C::kFormat, scales, lane / 4), scale_at(C::kFormat, scales, lane / 4 + 8)};
    const auto* const x_scales = reinterpret_cast<const float*>(ring.stage(position) + C::kXScales) + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < C::kSlots / 8; ++j) {
      float2 x_scale{};
      if constexpr (C::kIntegers) x_scale = *reinterpret_cast<const float2*>(x_scales + 8 * j);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& sum = total[4 * j + i];
        if constexpr (C::kIntegers) {
          sum = fmaf(part[4 * j + i] * scale[i / 2], i % 2 == 0 ? x_scale.x : x_scale.y, sum);
        } else {
          sum = fmaf(part[4 * j + i], scale[i / 2], sum);
        }
      }
    }
  }
};

// Frees a stage. Unlike those of gemm_sm90.cuh, lanes have read it themselves.
template <typename C>
__device__ inline void release_stored(const StoredRing<C>& ring, uint32_t position) {
  __syncwarp();
  release<1>(ring.empty + ring.index(position));
}

// total = the tile's sums over the stages from `position` on, without the row scales of integers.
template <typename C>
__device__ inline void multiply_stored(typename StoredProduct<C>::Sums& total, const StoredProduct<C>& product,
                                       uint32_t position, int num_stages) {
  const StoredRing<C>& ring = product.ring;
  const auto arrive_at = [&](uint32_t at) {
    ptx::mbar_wait(ring.full + ring.index(at), ring.parity(at));
    ptx::fence_proxy_async();
  };
#pragma unroll
  for (int j = 0; j < C::kSlots / 2; ++j) total[j] = 0.0f;
  typename StoredProduct<C>::Sums part;
  typename StoredProduct<C>::Fragments a;
  int32_t left = product.w.group_steps;
  bool goes_on = false;
  if (num_stages > 0) {
    arrive_at(position);
    product.decode(a[0], position, 0);
  }
  for (int stage = 0; stage < num_stages; ++stage, ++position) {
#pragma unroll
    for (int step = 0; step < C::kSteps; ++step) {
      product.multiply(part, a[step], position, step, goes_on);
      // The products before are done: the other registers are free and, after a stage's last step, its memory.
      ptx::wgmma_wait<1>();
      if (step == 0) {
        if (stage > 0) release_stored<C>(ring, position - 1);
        product.decode(a[1], position, 1);
      } else if (stage + 1 < num_stages) {
        arrive_at(position + 1);
        product.decode(a[0], position + 1, 0);
      }
      goes_on = --left > 0;
      if (!goes_on || (step == C::kSteps - 1 && stage + 1 == num_stages)) {
        product.add_group(total, part, position, step);
        left = product.w.group_steps;
      }
    }
  }
  if (num_stages > 0) release_stored<C>(ring, position - 1);
}

// The scales of rows of integers.
template <typename C>
__device__ inline void scale_stored_rows(float (&total)[C::kSlots / 2], const StoredProduct<C>& product,
                                         const TileColumns& columns) {
  const int first = product.block * kStepRows;
  const int32_t n = columns.column(first);
  const bool used = product.m.exists && n < columns.end(first);
  const int64_t row = used ? static_cast<int64_t>(block_of(product.w, n)) * kStepRows + product.lane / 4 : 0;
  const float scale[2] = {used ? product.m.row_scales[row] : 0.0f, used ? product.m.row_scales[row + 8] : 0.0f};
#pragma unroll
  for (int j = 0; j < C::kSlots / 2; ++j) total[j] *= scale[j / 2 % 2];
}

// total += an adapter's small rows times its matrix. Lanes load their pairs of the matrix themselves: they are few.
template <typename T, typename C>
__device__ inline void add_low(float (&total)[C::kSlots / 2], const Gemm& g, int32_t expert,
                               const StoredProduct<C>& product, const TileColumns& columns, uint32_t position,
                               int num_stages) {
  const StoredRing<C>& ring = product.ring;
  const T* const matrix = static_cast<const T*>(g.low.b.data) + expert * g.low.b.expert_stride;
  const auto pair_at = [&](int i, int k) -> uint32_t {
    const int at = product.block * kStepRows + i % 2 * 8 + product.lane / 4;
    const int32_t n = columns.column(at);
    if (n >= columns.end(at) || k >= static_cast<int>(g.low.rank)) return 0;
    return *reinterpret_cast<const uint32_t*>(matrix + n * g.low.b.n_stride + k);
  };
  for (int stage = 0; stage < num_stages; ++stage, ++position) {
    uint32_t a[kDepth / 16][4];
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[k][i] = pair_at(i, stage * kDepth + 16 * k + i / 2 * 8 + product.lane % 4 * 2);
    }
    ptx::mbar_wait(ring.full + ring.index(position), ring.parity(position));
    ptx::fence_proxy_async();
    const uint32_t x = ptx::smem_u32(ring.stage(position));
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) ptx::wgmma<T, C::kSlots>(total, a[k], operand<false>(x, k), 1);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    ptx::wgmma_registers(total);
    release_stored<C>(ring, position);
  }
}

template <typename T, typename C>
__device__ inline void finish_stored(const Gemm& g, const RowTile& tile, const float (&total)[C::kSlots / 2],
                                     const StoredRing<C>& ring) {
  const int thread = static_cast<int>(threadIdx.x) - kProducers, lane = thread % 32, block = thread / 32;
  const int row = lane / 4;
  float* const scratch = ring.scratch();
#pragma unroll
  for (int j = 0; j < C::kSlots / 2; ++j) {
    const int slot = j / 4 * 8 + lane % 4 * 2 + j % 2;
    scratch[slot * kScratchPitch + block * kStepRows + row + j / 2 % 2 * 8] = total[j];
  }
  ptx::bar_sync(1, kConsumers * 128);
#pragma unroll 1
  for (int first = 0; first < C::kSlots; first += kConsumers * 32) {  // one quad per slot
    const int r = first + thread / 4;
    if (first + thread / 32 * 8 >= C::kSlots) break;
    const SharedRuns runs{scratch + r * kScratchPitch};
    if (g.epilogue == Epilogue::kStore) {
      finish_row<Epilogue::kStore, T>(g, tile, r, runs);
    } else {
      finish_row<Epilogue::kGlu, T>(g, tile, r, runs);
    }
  }
  ptx::bar_sync(1, kConsumers * 128);  // before the next tile is written there
}

template <typename T, typename C>
__device__ inline void consume_stored(const Gemm& g, const StoredOperand& w, const StoredRing<C>& ring,
                                      const GemmTiles<C>& tiles) {
  const int thread = static_cast<int>(threadIdx.x) - kProducers;
  for (uint32_t n = 0;; ++n) {
    const QueuedTile queued = ring.queue().wait(n);
    if (queued.tile >= tiles.size()) break;
    const RowTile tile = tiles[queued.tile];
    const StoredMatrix m(w, tile.expert, tile.expert < g.num_experts);
    const StoredProduct<C> product{
        .w = w, .m = m, .ring = ring, .table = ring.table(), .block = thread / 32, .lane = thread % 32};
    float total[C::kSlots / 2];
    const StoredStages stages(g, w, tile.expert);
    const TileColumns columns = tile_columns(g, tile.column, C::kColumns);
    multiply_stored<C>(total, product, queued.position, stages.stored);
    if constexpr (C::kIntegers) scale_stored_rows<C>(total, product, columns);
    add_low<T, C>(total, g, tile.expert, product, columns, queued.position + static_cast<uint32_t>(stages.stored),
                  stages.low);
    finish_stored<T, C>(g, tile, total, ring);
    ring.queue().release(n, true);
  }
}

// T: of out.
template <typename T, typename C>
__global__ void __launch_bounds__(kThreads, 1)
    stored_sm90_kernel(const __grid_constant__ Gemm g, const __grid_constant__ StoredOperand w) {
  SHARED_DYN(unsigned char, memory);
  const StoredRing<C> ring(memory);
  const GemmTiles<C> tiles(g, ring.first_tiles());
  if (threadIdx.x == 0) ring.init();
  Pairs<C::kFormat, typename C::A>::fill(ring.table());
  tiles.count();
  __syncthreads();
  if (threadIdx.x < kProducers) {
    ptx::setmaxnreg_dec<C::kProducerRegisters>();
    produce_stored<T, C>(g, w, ring, tiles);
  } else {
    ptx::setmaxnreg_inc<C::kConsumerRegisters>();
    consume_stored<T, C>(g, w, ring, tiles);
  }
}

// ---- launches ------------------------------------------------------------------------------------------------------------

template <typename T, typename C>
void launch_stored_sm90(const Gemm& g, const StoredOperand& w, void* stream) {
  constexpr TileConfig kTile{kAnyRows, C::kSlots, C::kColumns, kThreads / 32, 1, kRowBytes, C::kStages, 1};
  launch(stored_sm90_kernel<T, C>, dim3(num_blocks(g, kTile, C::kSharedBytes)), dim3(kThreads),
         static_cast<size_t>(C::kSharedBytes), stream, g, w);
}

template <Format kFormat, typename T>
void launch_stored_sm90(const Gemm& g, const StoredOperand& w, void* stream) {
  using A = std::conditional_t<is_integer(kFormat), __nv_bfloat16, T>;  // rows of integers come in bfloat16
  const int64_t rows_per_expert = (g.num_slots + g.num_experts - 1) / g.num_experts;
  size_t picked = 0;
  while (rows_per_expert > kStoredTiles[picked].max_rows_per_expert) ++picked;
  [&]<size_t... kRows>(std::index_sequence<kRows...>) {
    ((picked == kRows ? launch_stored_sm90<T, StoredConfig<kFormat, A, kRows>>(g, w, stream) : void()), ...);
  }(std::make_index_sequence<std::size(kStoredTiles)>());
}

template <Format kFormat>
void launch_stored_sm90(const Gemm& g, const StoredOperand& w, void* stream) {
  if (g.dtype == DType::kFloat16) return launch_stored_sm90<kFormat, __half>(g, w, stream);
  launch_stored_sm90<kFormat, __nv_bfloat16>(g, w, stream);
}

}  // namespace switchgear::cuda::sm90

namespace switchgear::cuda {

template <Format kFormat>
void stored_sm90_of(const Gemm& g, const StoredOperand& w, void* stream) {
  sm90::launch_stored_sm90<kFormat>(g, w, stream);
}

}  // namespace switchgear::cuda
