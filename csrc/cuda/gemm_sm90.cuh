// SPDX-License-Identifier: BSD-3-Clause
// The two products of gemm.h on Hopper: TMA and cp.async fill a ring in shared memory, wgmma reads it.
//
//   gemm    out[s,n] = Σ_k a[s,k] · b[e(s)][n,k], rows of a gathered or in order;  2·S·N·C flop
//   wgrad   out[e][m,n] = Σ_{s of e} a[s,m] · b[s,n];  2·S·M·N flop
//   traffic 2(S·C + E_hit·N·C + S·N) bytes, wgrad 2(S·M + S·N + E·M·N); memory-bound on an H100 below ~300 rows per expert
//
// Roles. One block per SM, three warpgroups. The first one is the producer: its thread 0 issues TMA; all 128 threads copy
// gathered rows by cp.async. The other two are consumers in ping-pong: each owns every other tile of the block, and while one
// stores its tile the other multiplies. Fine-grained experts need this: with C = 256 a tile is four stages, which take no
// longer than its epilogue. (Both on one tile of 128 x 256 would read less from L2, but the tensor cores would idle meanwhile.)
//
// Tiles. A tile is P·Qᵀ: P has 128 rows (two m64 instructions), Q has Config::kN.
//   kRows     P = 128 slots, Q = 128 or 192 columns of out
//   kFewRows  P = 128 columns of out, Q = 16 or 64 slots: the operands are swapped, because wgmma's m is at least 64
//   wgrad     P = 128 columns of a, Q = 128 or 192 columns of b; the inner dimension is the expert's slots
// If gates and ups are separate halves of b, a tile's weights are two boxes, one of each: a thread then holds both of a pair.
//
// Ring. A stage is 64 depths: rows of 128 bytes with the 128-byte swizzle. Full barrier: one arrival with the bytes of TMA and,
// if cp.async is used, one per producer thread when its copies have landed. Empty barrier: one arrival per consumer warp after
// waiting for its wgmma. cp.async writes through the generic proxy, so a consumer of such a stage first executes
// fence.proxy.async. A parity cannot distinguish a phase from the one two later. So a consumer may look at the ring only after
// the other one has seen the last stage of the previous tile; `turn` ensures this.
//
// Tails. TMA returns zeros outside a tensor, cp.async on request. A gemm does not store rows of the next expert in its tile.
// wgrad would sum them, so cp.async copies an expert's last stage, with zeros after its rows. The unassigned rows, past
// expert_offsets[E], are the tiles of one more expert, without an inner dimension.
//
// Numeric contract: products accumulate in float32, k ascending in steps of 16 through one accumulator per element, the same
// in all configs; k past C adds zeros. Results are rounded once, when stored. No atomics; nothing depends on the grid.
//
// Resources, at most (registers a thread; static shared memory; tests/test_cuda_build.py reads this):
//   gemm_sm90_kernel: 168 registers, 8 of local memory
//   wgrad_sm90_kernel: 168 registers
// setmaxnreg changes them to 40 for producers and 232 for consumers. The local memory is read once per row of a tile of 192
// columns with a gate, never between the products.
#pragma once
#include "gemm_schedule.cuh"
#include "gemm_sm90_epilogue.cuh"
#include "hopper.cuh"

namespace switchgear::cuda::sm90 {

// ---- configs -------------------------------------------------------------------------------------------------------------

enum class Shape : uint8_t { kRows, kFewRows, kWgrad };

// kAlongN: n of the weights has unit stride, not k. wgmma calls such operands "MN-major".
template <Shape kShapeOf, int kRowsOfQ, int kRingStages, bool kWeightsAlongN>
struct Config {
  static constexpr Shape kShape = kShapeOf;
  static constexpr int kN = kRowsOfQ;
  static constexpr int kStages = kRingStages;
  static constexpr bool kAlongN = kWeightsAlongN;
  static constexpr int kSlots = kShape == Shape::kFewRows ? kN : 128;    // per tile of a gemm
  static constexpr int kColumns = kShape == Shape::kFewRows ? 128 : kN;  // of b per tile
  // Registers per thread: 504 for one producer and two consumers.
  static constexpr int kConsumerRegisters = 232;
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
// Memory in which a tile of kFewRows is transposed, per consumer.
constexpr int scratch_bytes(Shape shape, int n) {
  return shape == Shape::kFewRows ? kConsumers * n * kScratchPitch * 4 : 0;
}
// 1024: the stages start at a multiple of the swizzle pattern.
constexpr int shared_bytes(Shape shape, int n, int stages) {
  const int first_tiles = shape == Shape::kWgrad ? 0 : (kMaxExperts + 2) * 4;
  return 1024 + stages * stage_bytes(n) + scratch_bytes(shape, n) + (2 * stages + kConsumers) * 8 + first_tiles;
}

// With the tensor maps of the operands that TMA loads.
struct GemmParams {
  CUtensorMap weights, slots;
  Gemm g;
};
struct WgradParams {
  CUtensorMap a, b;
  Wgrad g;
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
      ptx::mbar_init(empty + s, 4);
    }
    for (int c = 0; c < kConsumers; ++c) ptx::mbar_init(turn + c, 4);
    ptx::fence_barrier_init();
  }
  __device__ float* scratch(int consumer) const {
    return reinterpret_cast<float*>(stages + C::kStages * kStageBytes) + consumer * C::kN * kScratchPitch;
  }
  __device__ int32_t* first_tiles() const { return reinterpret_cast<int32_t*>(turn + kConsumers); }
  __device__ static uint32_t index(uint32_t position) { return position % C::kStages; }
  __device__ static uint32_t parity(uint32_t position) { return position / C::kStages & 1; }
  __device__ unsigned char* p(uint32_t position) const { return stages + index(position) * kStageBytes; }
  __device__ unsigned char* q(uint32_t position) const { return p(position) + kP * kRowBytes; }
};

// ---- tiles of a gemm ----------------------------------------------------------------------------------------------------

// The numbering of TileWalker (gemm_schedule.cuh), by bisection in a table in shared memory instead of a stateful walk: a
// consumer's registers are full of accumulators.
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
  __device__ static int32_t rows(SlotRange slots) { return (slots.end - slots.begin + C::kSlots - 1) / C::kSlots; }

  // Fills the table. Called by one warp, before a barrier of the block.
  __device__ void count() const {
    const auto num_experts = static_cast<int32_t>(g.num_experts);
    const auto lane = static_cast<int32_t>(threadIdx.x % 32);
    int32_t before = 0;
    for (int32_t expert = lane; expert - lane <= num_experts; expert += 32) {
      const int32_t tiles = expert <= num_experts ? rows(slots(expert)) * columns : 0;
      int32_t through = tiles;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int32_t below = __shfl_up_sync(0xffffffffu, through, step);
        if (lane >= step) through += below;
      }
      if (expert <= num_experts) first_tile[expert] = before + through - tiles;
      before += __shfl_sync(0xffffffffu, through, 31);
    }
    if (lane == 0) first_tile[num_experts + 1] = before;
  }

  __device__ int32_t size() const { return first_tile[g.num_experts + 1]; }

  __device__ RowTile operator[](int32_t t) const {
    int32_t expert = 0, last = static_cast<int32_t>(g.num_experts);
    while (expert < last) {  // the last expert with first_tile <= t
      const int32_t middle = (expert + last + 1) / 2;
      const bool behind = first_tile[middle] > t;
      expert = behind ? expert : middle;
      last = behind ? middle - 1 : last;
    }
    const SlotRange range = slots(expert);
    const TilePosition position = banded(t - first_tile[expert], rows(range), columns);
    const int32_t first_row = range.begin + position.row * C::kSlots, rest = range.end - first_row;
    return {expert, first_row, rest < C::kSlots ? rest : C::kSlots, position.column};
  }
};

// ---- producer ------------------------------------------------------------------------------------------------------------

// Row r(s) of an operand, or -1 for a row out of range.
__device__ inline int32_t source_row(const Rows& rows, int32_t slot) {
  const int32_t row = rows.indices != nullptr ? rows.indices[slot] : slot;
  return row >= 0 && row < rows.count ? row : -1;
}

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

// Loads one stage of the weights of a tile.
template <typename C>
__device__ inline void load_weights(unsigned char* to, const GemmParams& params, uint64_t* full, const RowTile& tile,
                                    int k) {
  const bool pairs = gate_halves(params.g);
  const int first = tile.column * (pairs ? C::kColumns / 2 : C::kColumns);
  const int second = static_cast<int>(params.g.n / 2) + first;  // the ups, if `pairs`
  if constexpr (C::kAlongN) {
#pragma unroll
    for (int i = 0; i < C::kColumns / 64; ++i) {  // with `pairs`, C::kColumns is 128
      const int n = pairs && i > 0 ? second : first + 64 * i;
      ptx::tma_load_3d(to + i * kBlockBytes, &params.weights, full, n, k, tile.expert);
    }
  } else {
    ptx::tma_load_3d(to, &params.weights, full, k, first, tile.expert);
    if (pairs) ptx::tma_load_3d(to + C::kColumns / 2 * kRowBytes, &params.weights, full, k, second, tile.expert);
  }
}

template <typename C>
__device__ inline int num_stages_of(const Gemm& g, const RowTile& tile) {
  return tile.expert == g.num_experts ? 0 : static_cast<int>((g.c + kDepth - 1) / kDepth);
}

template <typename T, typename C>
__device__ inline void produce(const GemmParams& params, const Ring<C>& ring, const GemmTiles<C>& tiles) {
  const Gemm& g = params.g;
  const bool gather = g.a.indices != nullptr;
  if (!gather && threadIdx.x != 0) return;
  constexpr int kWeightBytes = C::kColumns * kRowBytes, kSlotBytes = C::kSlots * kRowBytes;
  const int bytes = kWeightBytes + (gather ? 0 : kSlotBytes);
  uint32_t position = 0;
  const int32_t num_tiles = tiles.size();
  for (auto t = static_cast<int32_t>(blockIdx.x); t < num_tiles; t += static_cast<int32_t>(gridDim.x)) {
    const RowTile tile = tiles[t];
    int32_t rows[C::kSlots / 16] = {};
    if (gather) {
#pragma unroll
      for (int i = 0; i < C::kSlots / 16; ++i) {
        const int r = static_cast<int>(threadIdx.x) / 8 + 16 * i;
        rows[i] = r < tile.rows ? source_row(g.a, tile.first_row + r) : -1;
      }
    }
    const int num_stages = num_stages_of<C>(g, tile);
    for (int stage = 0; stage < num_stages; ++stage, ++position) {
      uint64_t* const full = ring.full + ring.index(position);
      unsigned char* const to_weights = C::kShape == Shape::kFewRows ? ring.p(position) : ring.q(position);
      unsigned char* const to_slots = C::kShape == Shape::kFewRows ? ring.q(position) : ring.p(position);
      ptx::mbar_wait(ring.empty + ring.index(position), ring.parity(position) ^ 1);
      if (threadIdx.x == 0) {
        ptx::mbar_expect_tx(full, bytes);
        load_weights<C>(to_weights, params, full, tile, stage * kDepth);
        if (!gather) ptx::tma_load_3d(to_slots, &params.slots, full, stage * kDepth, tile.first_row, 0);
      }
      if (gather) {
        copy_rows<T>(to_slots, g.a, rows, stage * kDepth, static_cast<int>(g.c));
        ptx::cp_async_mbar_arrive(full);
      }
    }
  }
}

// ---- consumers -----------------------------------------------------------------------------------------------------------

__device__ inline int this_consumer() { return this_thread() / 128 - 1; }

// Frees a stage. All lanes have waited for the warp's last reads.
__device__ inline void release(uint64_t* empty) {
  if (threadIdx.x % 32 == 0) ptx::mbar_arrive(empty);
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

// acc = P·Qᵀ over the stages from `position` on; then passes the turn on. `copied(stage)`: whether cp.async wrote the stage.
template <typename T, typename C, typename Copied>
__device__ inline void multiply(Accumulators<C::kN>& acc, const Ring<C>& ring, uint32_t position, int num_stages,
                                const Copied& copied) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int j = 0; j < C::kN / 2; ++j) acc[i][j] = 0.0f;
  }
  // All lanes must see this turn before one of them passes it on; otherwise the phase they wait for could end unseen. Products
  // synchronise the lanes too, but an expert without rows has none.
  if (num_stages == 0) __syncwarp();
  for (int stage = 0; stage < num_stages; ++stage, ++position) {
    ptx::mbar_wait(ring.full + ring.index(position), ring.parity(position));
    if (copied(stage)) ptx::fence_proxy_async();
    const uint32_t p = ptx::smem_u32(ring.p(position)), q = ptx::smem_u32(ring.q(position));
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k) {
      const uint64_t q_tile = operand<C::kQAlongN>(q, k);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        ptx::wgmma<T, C::kN, C::kPAlongM, C::kQAlongN>(acc[i], operand<C::kPAlongM>(p + i * kBlockBytes, k), q_tile, 1);
      }
    }
    ptx::wgmma_commit();
    if (stage > 0) {  // waits for the previous stage's products; this stage's continue
      ptx::wgmma_wait<1>();
      release(ring.empty + ring.index(position - 1));
    }
  }
  if (threadIdx.x % 32 == 0) ptx::mbar_arrive(ring.turn + (1 - this_consumer()));
  ptx::wgmma_wait<0>();
  if (num_stages > 0) release(ring.empty + ring.index(position - 1));
  ptx::wgmma_registers(acc[0]);
  ptx::wgmma_registers(acc[1]);
}

// The accumulators of kFewRows are columns x slots; they are transposed through scratch memory.
template <typename T, Epilogue kEpilogue, typename C>
__device__ inline void finish_few_rows(const Gemm& g, const RowTile& tile, const Accumulators<C::kN>& acc,
                                       float* scratch, int consumer) {
  const int thread = static_cast<int>(threadIdx.x) % 128;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int column = row_of_thread(i);
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
__device__ inline void finish(const Gemm& g, const RowTile& tile, Accumulators<C::kN>& acc, const Ring<C>& ring,
                              int consumer) {
  if constexpr (C::kShape == Shape::kFewRows) {
    finish_few_rows<T, kEpilogue, C>(g, tile, acc, ring.scratch(consumer), consumer);
  } else {
#pragma unroll 1
    for (int i = 0; i < ptx::opaque(4); ++i) {  // opaque: else the loop is unrolled anyway
      const RowTile here{ptx::opaque(tile.expert), tile.first_row, tile.rows, tile.column};  // no pointers kept
      finish_row<kEpilogue, T>(g, here, row_of_thread(i), QuadRuns<C::kN>{acc});
    }
  }
}

// Waits for a consumer's n-th turn, which starts after n arrivals of the other one; consumer 0's first needs none.
template <typename C>
__device__ inline void wait_for_turn(const Ring<C>& ring, int consumer, uint32_t n) {
  ptx::mbar_wait(ring.turn + consumer, consumer == 0 ? (n & 1) ^ 1 : n & 1);
}

template <typename T, Epilogue kEpilogue, typename C>
__device__ inline void consume(const GemmParams& params, const Ring<C>& ring, const GemmTiles<C>& tiles) {
  const Gemm& g = params.g;
  const bool gather = g.a.indices != nullptr;
  const auto stride = static_cast<int32_t>(gridDim.x);
  for (auto t = static_cast<int32_t>(blockIdx.x) + this_consumer() * stride; t < tiles.size();
       t += kConsumers * stride) {
    // Tiles without an inner dimension come last, so every tile before has num_stages stages.
    const auto count = static_cast<uint32_t>(t / stride);
    const int num_stages = num_stages_of<C>(g, tiles[t]);
    Accumulators<C::kN> acc;
    wait_for_turn(ring, this_consumer(), count / kConsumers);
    multiply<T>(acc, ring, count * static_cast<uint32_t>(num_stages), num_stages, [&](int) { return gather; });
    finish<T, kEpilogue>(g, tiles[ptx::opaque(t)], acc, ring, this_consumer());  // found again instead of kept
  }
}

template <typename T, Epilogue kEpilogue, typename C>
__global__ void __launch_bounds__(kThreads, 1) gemm_sm90_kernel(const __grid_constant__ GemmParams params) {
  SHARED_DYN(unsigned char, memory);
  const Ring<C> ring(memory);
  const GemmTiles<C> tiles(params.g, ring.first_tiles());
  if (threadIdx.x == 0) ring.init(params.g.a.indices != nullptr);
  if (threadIdx.x < 32) tiles.count();
  __syncthreads();
  if (threadIdx.x < kProducers) {
    ptx::setmaxnreg_dec<C::kProducerRegisters>();
    produce<T>(params, ring, tiles);
  } else {
    ptx::setmaxnreg_inc<C::kConsumerRegisters>();
    consume<T, kEpilogue>(params, ring, tiles);
  }
}

// ---- weight gradient -----------------------------------------------------------------------------------------------------

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

  // Numbers of tiles; rows and columns per expert.
  __device__ int32_t rows() const { return (static_cast<int32_t>(g.m) + kP - 1) / kP; }
  __device__ int32_t columns() const { return (static_cast<int32_t>(g.n) + C::kN - 1) / C::kN; }
  __device__ int32_t size() const { return static_cast<int32_t>(g.num_matrices) * rows() * columns(); }
  __device__ WgradTile operator[](int32_t t) const {
    const int32_t each = rows() * columns(), matrix = t / each;
    return {matrix, banded(t - matrix * each, rows(), columns()),
            slots_of_matrix(g.expert_offsets, g.experts, matrix, static_cast<int32_t>(g.num_experts),
                            static_cast<int32_t>(g.num_slots))};
  }
};

// Loads 64 slots of kWidth columns of one operand, in blocks of 64 columns.
template <typename T, int kWidth>
__device__ inline void load_slots(unsigned char* to, const CUtensorMap* map, uint64_t* full, const Rows& rows,
                                  int column, int width, int32_t first, int32_t end, bool by_row) {
  if (!by_row) {
    if (threadIdx.x != 0) return;
#pragma unroll
    for (int i = 0; i < kWidth / 64; ++i) {
      ptx::tma_load_3d(to + i * kBlockBytes, map, full, column + 64 * i, first, 0);
    }
    return;
  }
  int32_t source[kDepth / 16];
#pragma unroll
  for (int i = 0; i < kDepth / 16; ++i) {
    const int32_t slot = first + static_cast<int>(threadIdx.x) / 8 + 16 * i;
    source[i] = slot < end ? source_row(rows, slot) : -1;
  }
#pragma unroll
  for (int i = 0; i < kWidth / 64; ++i) copy_rows<T>(to + i * kBlockBytes, rows, source, column + 64 * i, width);
}

template <typename T, typename C>
__device__ inline void produce(const WgradParams& params, const Ring<C>& ring, const WgradTiles<C>& tiles) {
  const Wgrad& g = params.g;
  const bool gather_a = g.a.indices != nullptr, gather_b = g.b.indices != nullptr;
  uint32_t position = 0;
  for (auto t = static_cast<int32_t>(blockIdx.x); t < tiles.size(); t += static_cast<int32_t>(gridDim.x)) {
    const WgradTile tile = tiles[t];
    for (int stage = 0; stage < tile.num_stages(); ++stage, ++position) {
      uint64_t* const full = ring.full + ring.index(position);
      const bool tail = tile.has_tail(stage);
      const bool copy_a = tail || gather_a, copy_b = tail || gather_b;
      const int32_t first = tile.slots.begin + stage * kDepth, end = tile.slots.end;
      ptx::mbar_wait(ring.empty + ring.index(position), ring.parity(position) ^ 1);
      if (threadIdx.x == 0) ptx::mbar_expect_tx(full, ((copy_a ? 0 : kP) + (copy_b ? 0 : C::kN)) * kRowBytes);
      load_slots<T, kP>(ring.p(position), &params.a, full, g.a, tile.position.row * kP, static_cast<int>(g.m), first,
                        end, copy_a);
      load_slots<T, C::kN>(ring.q(position), &params.b, full, g.b, tile.position.column * C::kN, static_cast<int>(g.n),
                           first, end, copy_b);
      ptx::cp_async_mbar_arrive(full);
    }
  }
}

template <typename T, typename C>
__device__ inline void finish(const Wgrad& g, const WgradTile& tile, Accumulators<C::kN>& acc) {
#pragma unroll 1
  for (int i = 0; i < 4; ++i) {
    const int64_t m = static_cast<int64_t>(tile.position.row) * kP + row_of_thread(i);
    T* const out = static_cast<T*>(g.out) + tile.matrix * g.out_expert_stride + m * g.out_stride;
    const QuadRuns<C::kN> runs{acc};
#pragma unroll
    for (int r = 0; r < runs.kRuns; ++r) {
      float values[8];
      runs.get(r, values);
      const int64_t column = static_cast<int64_t>(tile.position.column) * C::kN + 32 * r + lane_column();
      if (m < g.m && column < g.n) store_run(out + column, values);
    }
  }
}

template <typename T, typename C>
__device__ inline void consume(const WgradParams& params, const Ring<C>& ring, const WgradTiles<C>& tiles) {
  const Wgrad& g = params.g;
  const int consumer = static_cast<int>(threadIdx.x) / 128 - 1;
  const bool gather = g.a.indices != nullptr || g.b.indices != nullptr;
  uint32_t position = 0, count = 0;
  for (auto t = static_cast<int32_t>(blockIdx.x); t < tiles.size(); t += static_cast<int32_t>(gridDim.x), ++count) {
    const WgradTile tile = tiles[t];
    if (count % kConsumers == static_cast<uint32_t>(consumer)) {
      Accumulators<C::kN> acc;
      wait_for_turn(ring, consumer, count / kConsumers);
      multiply<T>(acc, ring, position, tile.num_stages(), [&](int stage) { return gather || tile.has_tail(stage); });
      finish<T, C>(g, tiles[ptx::opaque(t)], acc);
    }
    position += static_cast<uint32_t>(tile.num_stages());
  }
}

template <typename T, typename C>
__global__ void __launch_bounds__(kThreads, 1) wgrad_sm90_kernel(const __grid_constant__ WgradParams params) {
  SHARED_DYN(unsigned char, memory);
  const Ring<C> ring(memory);
  if (threadIdx.x == 0) ring.init(true);
  __syncthreads();
  const WgradTiles<C> tiles{params.g};
  if (threadIdx.x < kProducers) {
    ptx::setmaxnreg_dec<C::kProducerRegisters>();
    produce<T>(params, ring, tiles);
  } else {
    ptx::setmaxnreg_inc<C::kConsumerRegisters>();
    consume<T>(params, ring, tiles);
  }
}

}  // namespace switchgear::cuda::sm90
