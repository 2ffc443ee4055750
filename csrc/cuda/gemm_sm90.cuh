// SPDX-License-Identifier: BSD-3-Clause
// The two products of gemm.h on Hopper: TMA and cp.async fill a ring in shared memory, wgmma reads it.
//
//   gemm    out[s,n] = Σ_k a[s,k] · b[e(s)][n,k], rows of a gathered or in order;  2·S·N·C flop
//   wgrad   out[e][m,n] = Σ_{s of e} a[s,m] · b[s,n];  2·S·M·N flop
//   traffic 2(S·C + E_hit·N·C + S·N) bytes, wgrad 2(S·M + S·N + E·M·N); memory-bound on an H100 below ~300 rows per expert
//
// Roles. One block per SM, three warpgroups. The first one is the producer: its thread 0 issues TMA; all 128 threads copy
// gathered rows by cp.async. The other two are consumers, in one of two ways (gemm_sm90.h picks one):
//   ping-pong    each owns every other tile of the block, and while one stores its tile the other multiplies. Short inner
//                dimensions need this: with C = 256 a tile is four stages, which take no longer than its epilogue.
//   cooperative  each has 64 rows of a tile of 128 x 256, which reads less from L2. The tensor cores idle during the epilogue.
//
// Clusters. Blocks compute tiles of one expert and the same columns in pairs, since L2 binds before the tensor cores do: each
// loads half of the weights, and TMA writes it to the shared memory of both. So a stage is free when the consumers of both
// blocks have released it. An expert with an odd number of row tiles has its last one in another kind of pair: the blocks
// compute adjacent columns of the same rows, and each loads all of its weights. So no tile is empty, but for the last of an odd
// number of columns. In wgrad a pair shares the operand that is not gathered.
//
// Tiles. A tile is P·Qᵀ: P has 128 rows (two m64 instructions), Q has Config::kN.
//   kRows     P = 128 slots, Q = 128, 192 or 256 columns of out
//   kFewRows  P = 128 columns of out, Q = 16 or 64 slots: the operands are swapped, because wgmma's m is at least 64
//   wgrad     P = 128 columns of a, Q = 128 or 256 columns of b; the inner dimension is the expert's slots
// If gates and ups are separate halves of b, a tile's weights are two boxes, one of each: a thread then holds both of a pair.
//
// Ring. A stage is 64 depths: rows of 128 bytes with the 128-byte swizzle. Full barrier: one arrival with the bytes of TMA and,
// if cp.async is used, one per producer thread when its copies have landed. Empty barrier: one arrival per consumer warp of the
// cluster after waiting for its wgmma; a warp arrives at its own block's first, so that no block can be two phases ahead.
// cp.async writes through the generic proxy, so a consumer of such a stage first executes fence.proxy.async. A parity cannot
// distinguish a phase from the one two later. So a consumer may look at the ring only after the other one has seen the last
// stage of the previous tile; `turn` ensures this in ping-pong.
//
// Tails. TMA returns zeros outside a tensor, cp.async on request. A gemm does not store rows of the next expert in its tile.
// wgrad would sum them, so cp.async copies an expert's last stage, with zeros after its rows. The unassigned rows, past
// expert_offsets[E], are the tiles of one more expert, without an inner dimension.
//
// Launches. With Schedule::follows_kernel a kernel's blocks start, and initialise their barriers, while the last blocks of the
// kernel before still multiply; then they wait for its end. A block lets the next kernel start once it takes no more tiles: earlier,
// that kernel's blocks would occupy reserved multiprocessors.
//
// Which tiles a block computes is decided while it runs: tile_queue.cuh.
//
// An adapter (g.low) is the first stages of a tile, from maps of its own, in slot order: TMA loads them whole even if the rows
// of a are gathered. Its rank is zero-filled to a multiple of 64. A mask of dropout is applied to the accumulators after these
// stages, when their products are done: a wait of one stage per tile.
//
// Numeric contract: products accumulate in float32, those of g.low first, k ascending in steps of 16 through one accumulator
// per element, the same in all configs; k past C adds zeros. Results are rounded once, when stored. No atomics; nothing depends
// on the grid.
//
// Resources, at most (registers a thread; static shared memory; tests/test_cuda_build.py reads this):
//   gemm_sm90_kernel: 168 registers, 56 of local memory
// setmaxnreg changes them to 40 for producers and 232 for consumers with 192 accumulators, 72 and 216 with 128, 88 and 208 with
// fewer. Local memory is used by producers with 40, and by consumers once per tile, never between the products.
#pragma once
#include "dropout.cuh"
#include "gemm_schedule.cuh"
#include "gemm_sm90_epilogue.cuh"
#include "gemm_sm90_glu.cuh"
#include "gemm_sm90_separate.cuh"
#include "gemm_sm90_store.cuh"
#include "hopper.cuh"
#include "scan.cuh"
#include "tile_queue.cuh"

namespace switchgear::cuda::sm90 {

// ---- configs -------------------------------------------------------------------------------------------------------------

enum class Shape : uint8_t { kRows, kFewRows, kWgrad };

// kAlongN: n of the weights has unit stride, not k. wgmma calls such operands "MN-major".
template <Shape kShapeOf, int kRowsOfQ, int kRingStages, bool kWeightsAlongN, int kBlocksOfCluster = 1,
          bool kConsumersShare = false, int kRowTilesOfBand = kBand>
struct Config {
  static constexpr Shape kShape = kShapeOf;
  static constexpr int kN = kRowsOfQ;
  static constexpr int kStages = kRingStages;
  static constexpr bool kAlongN = kWeightsAlongN;
  static constexpr int kCluster = kBlocksOfCluster;
  static constexpr bool kCooperative = kConsumersShare;
  static constexpr int kBand = kRowTilesOfBand;
  static constexpr int kBlocks = kCooperative ? 1 : 2;                     // of 64 rows per consumer
  static constexpr int kReleases = 4 * (kCooperative ? 2 : 1) * kCluster;  // of a stage
  static_assert(kCluster <= 2 && (kShape != Shape::kFewRows || (kCluster == 1 && !kCooperative)));
  static constexpr int kSlots = kShape == Shape::kFewRows ? kN : 128;    // per tile of a gemm
  static constexpr int kColumns = kShape == Shape::kFewRows ? 128 : kN;  // of b per tile
  static constexpr int kConsumerRegisters = consumer_registers(kN, kCooperative);
  static constexpr int kProducerRegisters = 504 - 2 * kConsumerRegisters;
  static constexpr bool kPAlongM = kShape == Shape::kWgrad || (kShape == Shape::kFewRows && kAlongN);
  static constexpr bool kQAlongN = kShape == Shape::kWgrad || (kShape == Shape::kRows && kAlongN);
};

constexpr int kProducers = 128, kConsumers = 2;
constexpr int kThreads = kProducers + kConsumers * 128;
constexpr int kP = 128;
constexpr int kDepth = 64;                       // inner dimension per stage
constexpr int kRowBytes = 128;                   // per operand row in a stage
constexpr int kBlockBytes = kDepth * kRowBytes;  // 64 rows
constexpr int kScratchPitch = kP + 4;            // floats; the lanes that write a column use different banks

constexpr int stage_bytes(int n) { return (kP + n) * kRowBytes; }
// Memory of the epilogues: a tile of kFewRows is transposed there, one per consumer; else rows are put together, by each warp.
constexpr int scratch_bytes(Shape shape, int n) {
  return kConsumers * (shape == Shape::kFewRows ? n * kScratchPitch * 4 : 4 * kStagedBytes);
}
// 1024: the stages start at a multiple of the swizzle pattern.
constexpr int shared_bytes(Shape shape, int n, int stages) {
  const int first_tiles = shape == Shape::kWgrad ? 0 : (kMaxExperts + 2) * 4;
  const int barriers = (2 * stages + kConsumers) * 8;
  return 1024 + stages * stage_bytes(n) + scratch_bytes(shape, n) + barriers + kQueueBytes + first_tiles;
}
constexpr Shape shape_of(const TileRow& row) { return row.few_rows() ? Shape::kFewRows : Shape::kRows; }
constexpr bool rings_fit() {
  constexpr int kMostBytes = 227 << 10;  // of a block
  for (const TileRow& row : kTiles) {
    if (shared_bytes(shape_of(row), row.n, row.stages) > kMostBytes) return false;
  }
  return true;
}
static_assert(rings_fit());

// With the tensor maps of the operands that TMA loads. `low`: those of g.low.
struct GemmParams {
  struct Maps {
    CUtensorMap weights, slots;
  };
  Maps maps, low;
  OutMaps out;  // for cooperative tiles
  Gemm g;
};

// ---- the ring ------------------------------------------------------------------------------------------------------------

// `position` counts the stages of all tiles of a block.
template <typename C>
struct Ring {
  static constexpr int kStageBytes = stage_bytes(C::kN), kScratchBytes = scratch_bytes(C::kShape, C::kN);

  unsigned char* stages;
  uint64_t* full;
  uint64_t* empty;
  uint64_t* turn;  // [consumer]: the other one has seen the last stage of its tile

  __device__ explicit Ring(unsigned char* memory) {
    const uint32_t address = ptx::smem_u32(memory);
    stages = memory + ((address + 1023u) / 1024u * 1024u - address);
    full = reinterpret_cast<uint64_t*>(stages + C::kStages * kStageBytes + kScratchBytes);
    empty = full + C::kStages;
    turn = empty + C::kStages;
  }

  __device__ void init(bool copies) const {
    for (int s = 0; s < C::kStages; ++s) {
      ptx::mbar_init(full + s, copies ? 1 + kProducers : 1);
      ptx::mbar_init(empty + s, C::kReleases);
    }
    for (int c = 0; c < kConsumers; ++c) ptx::mbar_init(turn + c, 4);
    // An entry is read by its consumers, and by all producers or thread 0 alone.
    queue().init(C::kReleases / C::kCluster + (copies ? kProducers / 32 : 1));
    ptx::fence_barrier_init();
  }
  __device__ float* scratch(int consumer) const {
    return reinterpret_cast<float*>(stages + C::kStages * kStageBytes) + consumer * C::kN * kScratchPitch;
  }
  // What a consumer thread keeps of its tile while it multiplies, in the memory that its warp stages rows in later: finding a
  // tile again takes two trips to L2, and registers are full of accumulators.
  __device__ int4* kept() const {
    unsigned char* const staged = stages + C::kStages * kStageBytes;
    return reinterpret_cast<int4*>(staged + (this_thread() - kProducers) / 32 * kStagedBytes) + this_thread() % 32;
  }
  // Of this consumer warp. A cooperative tile lends its last stage, if it has one: the one before `end`.
  __device__ Staging staging(int num_stages, uint32_t end) const {
    const int warp = (this_thread() - kProducers) / 32;
    unsigned char* const own = stages + C::kStages * kStageBytes + warp * kStagedBytes;
    if (!C::kCooperative || num_stages == 0) return {own, nullptr};
    constexpr int kLent = (C::kN / kStagedColumns - 1) * kStagedBytes;
    static_assert(!C::kCooperative || 4 * kConsumers * kLent <= kStageBytes);
    return {own, p(end - 1) + warp * kLent};
  }
  __device__ TileQueue<C::kCluster> queue() const { return TileQueue<C::kCluster>(turn + kConsumers); }
  __device__ int32_t* first_tiles() const {
    return reinterpret_cast<int32_t*>(reinterpret_cast<unsigned char*>(turn + kConsumers) + kQueueBytes);
  }
  __device__ static uint32_t index(uint32_t position) { return position % C::kStages; }
  __device__ static uint32_t parity(uint32_t position) { return position / C::kStages & 1; }
  __device__ unsigned char* p(uint32_t position) const { return stages + index(position) * kStageBytes; }
  __device__ unsigned char* q(uint32_t position) const { return p(position) + kP * kRowBytes; }
};

// ---- tiles of a gemm ----------------------------------------------------------------------------------------------------

// What a block of a cluster computes. alone: the other block has the same rows and other columns, so their weights differ too.
struct BlockTile : RowTile {
  bool alone;
};

// The numbering of TileWalker (gemm_schedule.cuh), by bisection in a table in shared memory instead of a stateful walk: a
// consumer's registers are full of accumulators. A cluster counts its blocks' tiles as one: first the pairs of an expert's row
// tiles, then, if one is left, the pairs of its columns.
template <typename C>
struct GemmTiles {
  const Gemm& g;
  int32_t* first_tile;  // [E+2]: first tile of each expert; [E]: of the unassigned rows; [E+1]: number of tiles
  int32_t columns;

  __device__ GemmTiles(const Gemm& gemm, int32_t* shared)
      : g(gemm), first_tile(shared), columns(static_cast<int32_t>((gemm.n + C::kColumns - 1) / C::kColumns)) {}

  __device__ SlotRange slots(int32_t expert) const {
    return slots_of(g.expert_offsets, expert, static_cast<int32_t>(g.num_experts), static_cast<int32_t>(g.num_slots));
  }
  __device__ static int32_t row_tiles(SlotRange slots) { return (slots.end - slots.begin + C::kSlots - 1) / C::kSlots; }
  __device__ int32_t paired(int32_t row_tiles) const { return row_tiles / C::kCluster * columns; }
  __device__ int32_t tiles(SlotRange slots) const {
    const int32_t rows = row_tiles(slots);
    return paired(rows) + rows % C::kCluster * ((columns + 1) / 2);
  }

  // Fills the table. Called by the block: all offsets are loaded at once, in one round trip to L2 or memory. A warp then
  // adds up the tiles, each lane those of adjacent experts.
  __device__ void count() const {
    const auto thread = static_cast<int32_t>(threadIdx.x), num_experts = static_cast<int32_t>(g.num_experts);
#pragma unroll
    for (int32_t i = 0; i < (kMaxExperts + kThreads) / kThreads; ++i) {
      const int32_t expert = thread + i * kThreads;
      if (expert <= num_experts) first_tile[expert] = tiles(slots(expert));
    }
    __syncthreads();
    if (thread >= 32) return;
    const int32_t each = (num_experts + 32) / 32, begin = thread * each;
    const int32_t end = begin + each < num_experts + 1 ? begin + each : num_experts + 1;
    int32_t own = 0;
    for (int32_t expert = begin; expert < end; ++expert) own += first_tile[expert];
    const int32_t through = inclusive_sum(own);
    int32_t before = through - own;
    for (int32_t expert = begin; expert < end; ++expert) {
      const int32_t tiles = first_tile[expert];
      first_tile[expert] = before;
      before += tiles;
    }
    if (thread == 31) first_tile[num_experts + 1] = through;
  }

  __device__ int32_t size() const { return first_tile[g.num_experts + 1]; }

  __device__ BlockTile operator[](int32_t t) const {
    int32_t expert = 0, last = static_cast<int32_t>(g.num_experts);
    while (expert < last) {  // the last expert with first_tile <= t
      const int32_t middle = (expert + last + 1) / 2;
      const bool behind = first_tile[middle] > t;
      expert = behind ? expert : middle;
      last = behind ? middle - 1 : last;
    }
    const SlotRange range = slots(expert);
    const int32_t index = t - first_tile[expert], rows = row_tiles(range), before = paired(rows);
    const auto rank = static_cast<int32_t>(rank_in_cluster<C::kCluster>());
    const bool alone = C::kCluster > 1 && index >= before;
    TilePosition position{rows - 1, 2 * (index - before) + rank};
    if (!alone) {
      position = banded<C::kBand>(index, rows / C::kCluster, columns);
      position.row = position.row * C::kCluster + rank;
    }
    const int32_t first_row = range.begin + position.row * C::kSlots, rest = range.end - first_row;
    return {{expert, first_row, rest < C::kSlots ? rest : C::kSlots, position.column}, alone};
  }
};

// ---- producer ------------------------------------------------------------------------------------------------------------

// Copies rows thread/8, thread/8 + 16, … of 64 columns from `column` on, swizzled; a thread copies 16 bytes of each. Zeros for
// rows of -1 and for columns from `width` on.
template <typename T, int kCount>
__device__ inline void copy_rows(unsigned char* to, const Rows& from, const int32_t (&rows)[kCount], int column,
                                 int width) {
  const int chunk = static_cast<int>(threadIdx.x) % 8, first = static_cast<int>(threadIdx.x) / 8;
  column += chunk * 8;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int r = first + 16 * i;
    const int row = ptx::opaque(rows[i]);  // else the compiler keeps all offsets, in twice the registers
    const bool inside = row >= 0 && column < width;
    const int64_t offset = static_cast<int64_t>(row) * static_cast<int32_t>(from.stride) + column;
    const T* const source = static_cast<const T*>(from.data) + (inside ? offset : 0);
    ptx::cp_async16(to + r * kRowBytes + (chunk ^ r % 8) * 16, source, inside);
  }
}

constexpr uint16_t kBothBlocks = 3;  // a mask

// Loads one stage of the weights of a tile. Each block of a pair loads half for both: depths if n is contiguous, else columns.
template <typename C>
__device__ inline void load_weights(unsigned char* to, WeightMap from, const Gemm& g, uint64_t* full,
                                    const BlockTile& tile, int k) {
  const CUtensorMap* const map = from.map;
  const int expert = from.place;
  const bool halves = gate_halves(g);
  const int first = tile.column * (halves ? C::kColumns / 2 : C::kColumns);
  const int second = static_cast<int>(g.n / 2) + first;  // the ups, if `halves`
  const int rank = static_cast<int>(rank_in_cluster<C::kCluster>());
  if constexpr (C::kAlongN) {
    constexpr int kHalf = C::kColumns / 128;  // blocks of the first half
    constexpr int kDepths = kDepth / C::kCluster;
#pragma unroll
    for (int i = 0; i < C::kColumns / 64; ++i) {  // with `halves`, C::kColumns is a multiple of 128
      const int n = halves && i >= kHalf ? second + 64 * (i - kHalf) : first + 64 * i;
      unsigned char* const block = to + i * kBlockBytes;
      if (C::kCluster > 1 && !tile.alone) {
        const int skipped = rank * kDepths;
        ptx::tma_load_3d_multicast(block + skipped * kRowBytes, map, full, n, k + skipped, expert, kBothBlocks);
        continue;
      }
#pragma unroll
      for (int skipped = 0; skipped < kDepth; skipped += kDepths) {
        ptx::tma_load_3d(block + skipped * kRowBytes, map, full, n, k + skipped, expert);
      }
    }
  } else if constexpr (C::kCluster > 1) {
    constexpr int kHalf = C::kColumns / 2;
    const int middle = halves ? second : first + kHalf;
    if (tile.alone) {
      ptx::tma_load_3d(to, map, full, k, first, expert);
      ptx::tma_load_3d(to + kHalf * kRowBytes, map, full, k, middle, expert);
    } else {
      const int n = rank == 0 ? first : middle;
      ptx::tma_load_3d_multicast(to + rank * kHalf * kRowBytes, map, full, k, n, expert, kBothBlocks);
    }
  } else {
    ptx::tma_load_3d(to, map, full, k, first, expert);
    if (halves) ptx::tma_load_3d(to + C::kColumns / 2 * kRowBytes, map, full, k, second, expert);
  }
}

// A tile's stages are first those of g.low, then those of g.
__device__ inline int num_low_stages(const Gemm& g) { return static_cast<int>((g.low.rank + kDepth - 1) / kDepth); }

template <typename C>
__device__ inline int num_stages_of(const Gemm& g, const RowTile& tile) {
  return tile.expert == g.num_experts ? 0 : num_low_stages(g) + static_cast<int>((g.c + kDepth - 1) / kDepth);
}

template <typename T, typename C>
__device__ inline void produce(const GemmParams& params, const Ring<C>& ring, const GemmTiles<C>& tiles) {
  const Gemm& g = params.g;
  const bool gather = g.a.indices != nullptr;
  if (!gather && threadIdx.x != 0) return;
  constexpr int kWeightBytes = C::kColumns * kRowBytes, kSlotBytes = C::kSlots * kRowBytes;
  const int low_stages = num_low_stages(g);
  const TileSource<C::kCluster> source{g.schedule.counter};
  const auto stages_of = [&](int32_t t) { return num_stages_of<C>(g, tiles[t]); };
  produce_tiles(source, ring.queue(), tiles.size(), gather, stages_of, [&](int32_t t, uint32_t position) {
    BlockTile tile = tiles[t];
    int32_t rows[C::kSlots / 16] = {};
    if (gather) {
#pragma unroll
      for (int i = 0; i < C::kSlots / 16; ++i) {
        const int r = static_cast<int>(threadIdx.x) / 8 + 16 * i;
        rows[i] = r < tile.rows ? source_row(g.a, tile.first_row + r) : -1;
      }
    }
    const int num_stages = num_stages_of<C>(g, tile);
    if (num_stages == 0) return;
    if (threadIdx.x == 0) tile.expert = acquire_map(g.b, tile.expert);
    for (int stage = 0; stage < num_stages; ++stage, ++position) {
      uint64_t* const full = ring.full + ring.index(position);
      unsigned char* const to_weights = C::kShape == Shape::kFewRows ? ring.p(position) : ring.q(position);
      unsigned char* const to_slots = C::kShape == Shape::kFewRows ? ring.q(position) : ring.p(position);
      const bool low = stage < low_stages, copies = gather && !low;
      const int k = (low ? stage : stage - low_stages) * kDepth, bytes = kWeightBytes + (copies ? 0 : kSlotBytes);
      ptx::mbar_wait(ring.empty + ring.index(position), ring.parity(position) ^ 1);
      if (threadIdx.x == 0) {
        const GemmParams::Maps& maps = low ? params.low : params.maps;
        ptx::mbar_expect_tx(full, bytes);
        load_weights<C>(to_weights, WeightMap(low ? nullptr : g.b.separate, maps.weights, tile.expert), g, full, tile,
                        k);
        if (!copies) ptx::tma_load_3d(to_slots, &maps.slots, full, k, tile.first_row, 0);
      }
      if (copies) copy_rows<T>(to_slots, g.a, rows, k, static_cast<int>(g.c));
      if (gather) ptx::cp_async_mbar_arrive(full);
    }
  });
}

// ---- consumers -----------------------------------------------------------------------------------------------------------

__device__ inline int this_consumer() { return this_thread() / 128 - 1; }

// Frees a stage, for the producers of all blocks. All lanes have waited for the warp's last reads.
template <int kCluster>
__device__ inline void release(uint64_t* empty) {
  if (threadIdx.x % 32 != 0) return;
  ptx::mbar_arrive(empty);
  if constexpr (kCluster > 1) ptx::mbar_arrive_remote(empty, ptx::cluster_rank() ^ 1);
}

// Sixteen depths of an operand: 32 bytes of each row, or 16 rows if m or n is contiguous. Blocks of 64 rows are adjacent in
// both cases.
template <bool kAlong>
__device__ inline uint64_t operand(uint32_t start, int sixteen) {
  if constexpr (kAlong) {
    return ptx::descriptor(start + 16 * sixteen * kRowBytes, kBlockBytes, 8 * kRowBytes, ptx::Swizzle::k128B);
  } else {
    return ptx::desc_k128(start + 32 * sixteen);
  }
}

// kFewRows has registers left, and its warps use each other's memory.
template <typename C>
__device__ inline void keep_tile(const Ring<C>& ring, const RowTile& tile) {
  if constexpr (C::kShape != Shape::kFewRows)
    *ring.kept() = make_int4(tile.expert, tile.first_row, tile.rows, tile.column);
}
template <typename C>
__device__ inline RowTile kept_tile(const Ring<C>& ring, const RowTile& tile) {
  if constexpr (C::kShape == Shape::kFewRows) return tile;
  const int4 kept = *ring.kept();
  return {kept.x, kept.y, kept.z, kept.w};
}

// The mask of dropout in a gemm: applied to the sums of the stages below `stage`.
template <typename C>
struct LowMask {
  static constexpr bool kMasks = true;
  const Gemm& g;
  const Ring<C>& ring;
  const RowTile& tile;
  int stage;  // -1: no mask

  __device__ void apply(Accumulators<C::kN, C::kBlocks>& acc) const {
    const RowTile at = kept_tile(ring, tile);
    const int lane = this_thread() % 32, column = at.column * C::kColumns;
#pragma unroll
    for (int i = 0; i < 2 * C::kBlocks; ++i) {
      const int p = row_of_thread<C::kBlocks>(i);
      DropoutRow row(g.low.mask, at.first_row + p);
#pragma unroll
      for (int j = 0; j < C::kN / 4; ++j) {
        const int q = j / 2 * 8 + lane % 4 * 2 + j % 2;
        float& sum = acc[i / 2][j / 2 * 4 + i % 2 * 2 + j % 2];
        if constexpr (C::kShape == Shape::kFewRows) row = DropoutRow(g.low.mask, at.first_row + q);
        sum = row.keeps(column + (C::kShape == Shape::kFewRows ? p : q)) ? sum : 0.0f;
      }
    }
  }
};
struct NoMask {
  static constexpr bool kMasks = false;
};

template <int kBlocks, int kPerBlock>
__device__ inline void wait_for_registers(float (&acc)[kBlocks][kPerBlock]) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) ptx::wgmma_registers(acc[i]);
}

// acc = P·Qᵀ over the stages from `position` on; then passes the turn on, in ping-pong. `copied(stage)`: whether cp.async
// wrote the stage. A cooperative tile keeps its last stage for the epilogue.
template <typename T, typename C, typename Copied, typename Mask>
__device__ inline void multiply(Accumulators<C::kN, C::kBlocks>& acc, const Ring<C>& ring, uint32_t position,
                                int num_stages, const Copied& copied, const Mask& mask) {
#pragma unroll
  for (int i = 0; i < C::kBlocks; ++i) {
#pragma unroll
    for (int j = 0; j < C::kN / 2; ++j) acc[i][j] = 0.0f;
  }
  const int first_block = C::kCooperative ? this_consumer() : 0;
  // All lanes must see this turn before one of them passes it on; otherwise the phase they wait for could end unseen. Products
  // synchronise the lanes too, but an expert without rows has none.
  if (num_stages == 0) __syncwarp();
#pragma unroll 1
  for (int stage = 0; stage < num_stages; ++stage, ++position) {
    ptx::mbar_wait(ring.full + ring.index(position), ring.parity(position));
    if (copied(stage)) ptx::fence_proxy_async();
    if constexpr (Mask::kMasks) {
      if (stage == mask.stage) {
        ptx::wgmma_wait<0>();  // the products before are done
        wait_for_registers(acc);
        mask.apply(acc);
      }
    }
    const uint32_t p = ptx::smem_u32(ring.p(position)), q = ptx::smem_u32(ring.q(position));
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      const uint64_t q_tile = operand<C::kQAlongN>(q, k);
#pragma unroll
      for (int i = 0; i < C::kBlocks; ++i) {
        ptx::wgmma<T, C::kN, C::kPAlongM, C::kQAlongN>(
            acc[i], operand<C::kPAlongM>(p + (first_block + i) * kBlockBytes, k), q_tile, 1);
      }
    }
    ptx::wgmma_commit();
    if (stage > 0) {  // waits for the previous stage's products; this stage's continue
      ptx::wgmma_wait<1>();
      release<C::kCluster>(ring.empty + ring.index(position - 1));
    }
  }
  if (!C::kCooperative && threadIdx.x % 32 == 0) ptx::mbar_arrive(ring.turn + (1 - this_consumer()));
  ptx::wgmma_wait<0>();
  if (num_stages > 0 && !C::kCooperative) release<C::kCluster>(ring.empty + ring.index(position - 1));
  wait_for_registers(acc);
  if (num_stages > 0 && C::kCooperative) ptx::bar_sync(1, kConsumers * 128);  // both have multiplied the last stage
}

// The accumulators of kFewRows are columns x slots; they are transposed through scratch memory.
template <typename T, Epilogue kEpilogue, typename C>
__device__ inline void finish_few_rows(const Gemm& g, const RowTile& tile, const Accumulators<C::kN, 2>& acc,
                                       float* scratch, int consumer) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = row_of_thread<2>(i);
#pragma unroll
    for (int j = 0; j < C::kN / 4; ++j) {
      const int slot = j / 2 * 8 + thread % 4 * 2 + j % 2;
      scratch[slot * kScratchPitch + column] = acc[i / 2][j / 2 * 4 + i % 2 * 2 + j % 2];
    }
  }
  ptx::bar_sync(1 + consumer, 128);
#pragma unroll 1
  for (int first = 0; first < C::kN; first += 32) {  // one quad per slot
    const int r = first + thread / 4;
    finish_row<kEpilogue, T>(g, tile, r, SharedRuns{scratch + (r < C::kN ? r : 0) * kScratchPitch});
  }
  ptx::bar_sync(1 + consumer, 128);  // before the next tile is written there
}

template <typename T, Epilogue kEpilogue, typename C>
__device__ inline void finish(const GemmParams& params, const RowTile& tile, Accumulators<C::kN, C::kBlocks>& acc,
                              const Ring<C>& ring, const Staging& staging, int consumer) {
  const Gemm& g = params.g;
  if constexpr (C::kShape == Shape::kFewRows) {
    finish_few_rows<T, kEpilogue, C>(g, tile, acc, ring.scratch(consumer), consumer);
  } else if constexpr (kEpilogue == Epilogue::kStore) {
    const int column = tile.column * C::kColumns;
    const Affine<T> adjust(g, tile.expert);
    if constexpr (C::kCooperative) {
      const int row = first_row_of_warp<1>(0);
      if (staging.lent != nullptr && row + 16 <= tile.rows) {
        const auto store = [&](const auto& adjusted) {
          store_boxes<T, C::kN>(acc, staging, &params.out.out, column, tile.first_row + row, 0, adjusted);
        };
        // Most layers have neither, and then a value takes 2 instructions instead of 5.
        return g.bias == nullptr && g.scales == nullptr ? store(AsIs{}) : store(adjust);
      }
    }
    store_lines<T, C::kN, C::kBlocks>(acc, staging.own, column, static_cast<int>(g.n), adjust, [&](int r) -> T* {
      if (r >= tile.rows) return nullptr;
      return static_cast<T*>(g.out) + int64_t{tile.first_row + r} * g.out_stride;
    });
  } else if constexpr (kEpilogue == Epilogue::kGlu && C::kCooperative) {
    glu_tile<T, C::kN>(g, params.out, tile, acc, staging);
  } else {
#pragma unroll 1
    for (int i = 0; i < ptx::opaque(2 * C::kBlocks); ++i) {  // opaque: else the loop is unrolled anyway
      const RowTile here{ptx::opaque(tile.expert), tile.first_row, tile.rows, tile.column};  // no pointers kept
      finish_row<kEpilogue, T>(g, here, row_of_thread<C::kBlocks>(i), QuadRuns<C::kN, C::kBlocks>{acc});
    }
  }
}

// The epilogue of a cooperative tile is done with the memory that it staged rows in.
template <typename C>
__device__ inline void release_last(const Ring<C>& ring, int num_stages, uint32_t end) {
  if constexpr (!C::kCooperative) return;
  if (num_stages == 0) return;
  wait_for_boxes();
  release<C::kCluster>(ring.empty + ring.index(end - 1));
}

// Waits for a consumer's n-th turn, which starts after n arrivals of the other one; consumer 0's first needs none.
// Cooperative consumers take no turns.
template <typename C>
__device__ inline void wait_for_turn(const Ring<C>& ring, int consumer, uint32_t n) {
  if constexpr (C::kCooperative) return;
  ptx::mbar_wait(ring.turn + consumer, consumer == 0 ? (n & 1) ^ 1 : n & 1);
}

template <typename T, Epilogue kEpilogue, typename C>
__device__ inline void consume(const GemmParams& params, const Ring<C>& ring, const GemmTiles<C>& tiles) {
  const Gemm& g = params.g;
  const bool gather = g.a.indices != nullptr;
  constexpr uint32_t kStep = C::kCooperative ? 1 : kConsumers;
  for (auto n = C::kCooperative ? 0 : static_cast<uint32_t>(this_consumer());; n += kStep) {
    const QueuedTile queued = ring.queue().wait(n);
    if (queued.tile >= tiles.size()) break;
    RowTile tile = tiles[queued.tile];
    const int num_stages = num_stages_of<C>(g, tile);
    const uint32_t end = queued.position + static_cast<uint32_t>(num_stages);
    keep_tile(ring, tile);
    ring.queue().release(n, true);
    Accumulators<C::kN, C::kBlocks> acc;
    wait_for_turn(ring, this_consumer(), n / kConsumers);
    const auto copied = [&](int) { return gather; };
    if constexpr (kEpilogue == Epilogue::kGlu) {
      multiply<T>(acc, ring, queued.position, num_stages, copied, NoMask{});
    } else {
      const LowMask<C> mask{g, ring, tile, g.low.mask.drops() ? num_low_stages(g) : -1};
      multiply<T>(acc, ring, queued.position, num_stages, copied, mask);
    }
    tile = kept_tile(ring, tile);
    __syncwarp();  // before other lanes stage rows there
    finish<T, kEpilogue>(params, tile, acc, ring, ring.staging(num_stages, end), this_consumer());
    release_last(ring, num_stages, end);
  }
}

template <typename T, Epilogue kEpilogue, typename C>
__global__ void __launch_bounds__(kThreads, 1) gemm_sm90_kernel(const __grid_constant__ GemmParams params) {
  SHARED_DYN(unsigned char, memory);
  const Ring<C> ring(memory);
  const GemmTiles<C> tiles(params.g, ring.first_tiles());
  if (threadIdx.x == 0) ring.init(params.g.a.indices != nullptr);
  ptx::wait_for_kernel_before();
  tiles.count();
  __syncthreads();
  sync_cluster<C::kCluster>();  // the barriers are initialised in both blocks
  if (threadIdx.x < kProducers) {
    ptx::setmaxnreg_dec<C::kProducerRegisters>();
    produce<T>(params, ring, tiles);
    __syncwarp();  // one lane produced alone, and the barrier below is for whole warps
  } else {
    ptx::setmaxnreg_inc<C::kConsumerRegisters>();
    consume<T, kEpilogue>(params, ring, tiles);
  }
  sync_cluster<C::kCluster>();  // no block still uses the other's memory
}

}  // namespace switchgear::cuda::sm90
