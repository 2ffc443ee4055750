// SPDX-License-Identifier: BSD-3-Clause
// plan: a stable counting sort of the (token, choice) pairs by expert: topk_ids [T,K] -> expert_offsets [E+1],
// token_indices [S], slot_indices [T,K].
//
//   traffic about 16·S bytes (ids are read twice, both index arrays written once) + 8·E·⌈S/2048⌉ of counters; bound by the
//   latency of three launches up to about 10^6 slots, by memory beyond
//
// Pairs are split into chunks, one per block, and chunks into segments, one per warp. Experts are split into windows whose
// counters fit in shared memory, one per row of blocks.
//   plan_count_kernel   counts each chunk's ids                                   -> counts [E, chunks]
//   plan_scan_kernel    a warp per expert: exclusive sums over its chunks, in place -> totals [E]
//   plan_place_kernel   counts again, by segment; the first slot of (expert, chunk, segment) is a sum over smaller experts +
//                       earlier chunks + earlier segments. A warp then reads its segment 32 pairs at a time: match groups
//                       the lanes with the same expert, and a pair's slot is the expert's next slot + the number of lower
//                       lanes with that expert.
// Few pairs (decoding): plan_small_kernel, only the last step, in a single block with a single chunk.
//
// The sort is stable, so slots are in the order (expert, token, choice) for any split: bit-exact, deterministic. Ids outside
// [0,E) are empty slots. No host synchronisation, and no memory that must be zeroed first.
//
// Resources, at most (registers a thread; static shared memory; tests/test_cuda_build.py reads this):
//   plan_count_kernel: 40 registers, 4096 bytes of shared memory
//   plan_scan_kernel: 32 registers
//   plan_place_kernel: 64 registers, 33792 bytes of shared memory
//   plan_small_kernel: 56 registers, 1024 bytes of shared memory
#pragma once
#include "gemm.h"
#include "plan.h"
#include "platform.cuh"
#include "scan.cuh"

namespace switchgear::cuda {

constexpr int kPlanThreads = 256;
constexpr int kPlanWarps = kPlanThreads / 32;
constexpr int kPlanWindow = 1024;  // experts per window: 8 warps · 1024 counters are 32 KB
constexpr int kExpertsPerThread = kPlanWindow / kPlanThreads;

constexpr int kSmallThreads = 1024;
constexpr int kSmallCounters = 11264;  // 44 KB: with the warps' sums below 48 KB, the default limit of any block

struct PlanParams {
  const int32_t* topk_ids;
  int32_t* expert_offsets;
  int32_t* token_indices;
  int32_t* slot_indices;
  int32_t* counts;  // [E, num_chunks]
  int32_t* totals;  // [E]
  PlanExtras extras;
  int64_t num_pairs;
  int64_t chunk_pairs;  // a multiple of 32 · kPlanWarps
  int num_chunks;
  int num_experts;
  int top_k;
};

// Pairs [begin, end).
struct PlanRange {
  int64_t begin, end;
};

__device__ inline PlanRange segment_of(PlanRange chunk, int segment, int num_segments) {
  const int64_t pairs = (chunk.end - chunk.begin + 32 * num_segments - 1) / (32 * num_segments) * 32;
  const int64_t begin = chunk.begin + segment * pairs;
  return {begin < chunk.end ? begin : chunk.end, begin + pairs < chunk.end ? begin + pairs : chunk.end};
}

// Whether an id is in the window of `size` experts from `first` on; sets its index there.
__device__ inline bool in_window(int32_t id, int first, int size, int* index) {
  *index = static_cast<int>(static_cast<uint32_t>(id) - static_cast<uint32_t>(first));
  return id >= 0 && static_cast<uint32_t>(*index) < static_cast<uint32_t>(size);
}

// Called by one thread of a launch that no other thread of it depends on.
__device__ inline void reset_counter(const PlanParams& p) {
  if (p.extras.counter != nullptr) *p.extras.counter = {};
}

__device__ inline void count_pairs(const PlanParams& p, PlanRange range, int first_thread, int step, int first,
                                   int size, int32_t* counters) {
  for (int64_t i = range.begin + first_thread; i < range.end; i += step) {
    int index;
    if (in_window(p.topk_ids[i], first, size, &index)) atomicAdd(&counters[index], 1);
  }
}

// A warp assigns slots to the pairs of its segment; next[index] is the next slot of an expert.
__device__ inline void place_pairs(const PlanParams& p, PlanRange segment, int first, int size, int32_t* next) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int64_t base = segment.begin; base < segment.end; base += 32) {
    const int64_t i = base + lane;
    const int32_t id = i < segment.end ? p.topk_ids[i] : -1;
    int index;
    const bool mine = in_window(id, first, size, &index);
    const uint32_t peers = __match_any_sync(0xffffffffu, mine ? index : -1);
    const int rank = __popc(peers & ((1u << lane) - 1));
    int32_t slot = -1;
    if (mine) slot = next[index] + rank;
    __syncwarp();
    if (mine && rank == 0) next[index] += __popc(peers);
    __syncwarp();
    if (mine) p.token_indices[slot] = static_cast<int32_t>(static_cast<uint32_t>(i) / static_cast<uint32_t>(p.top_k));
    if (mine && p.extras.slot_weights != nullptr) p.extras.slot_weights[slot] = p.extras.topk_weights[i];
    const bool empty = id < 0 || id >= p.num_experts;
    if (i < segment.end && (mine || (empty && first == 0))) p.slot_indices[i] = slot;
  }
}

// Sets token_indices past the last used slot to -1.
__device__ inline void fill_tail(const PlanParams& p, PlanRange range, int64_t num_used) {
  for (int64_t i = range.begin + threadIdx.x; i < range.end; i += blockDim.x) {
    if (i >= num_used) p.token_indices[i] = -1;
  }
}

// ---- many pairs ----------------------------------------------------------------------------------------------------------

__device__ inline PlanRange chunk_of(const PlanParams& p, int chunk) {
  const int64_t begin = chunk * p.chunk_pairs;
  return {begin, begin + p.chunk_pairs < p.num_pairs ? begin + p.chunk_pairs : p.num_pairs};
}

// blockIdx.x: chunk, blockIdx.y: window
__global__ void __launch_bounds__(kPlanThreads) plan_count_kernel(PlanParams p) {
  SHARED_ARRAY(int32_t, counters, kPlanWindow);
  const int first = static_cast<int>(blockIdx.y) * kPlanWindow;
  const int size = p.num_experts - first < kPlanWindow ? p.num_experts - first : kPlanWindow;
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) reset_counter(p);
  for (int e = static_cast<int>(threadIdx.x); e < size; e += kPlanThreads) counters[e] = 0;
  __syncthreads();
  count_pairs(p, chunk_of(p, static_cast<int>(blockIdx.x)), static_cast<int>(threadIdx.x), kPlanThreads, first, size,
              counters);
  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < size; e += kPlanThreads) {
    p.counts[static_cast<int64_t>(first + e) * p.num_chunks + blockIdx.x] = counters[e];
  }
}

// One warp per expert; each lane handles kScanned chunks at a time.
__global__ void __launch_bounds__(kPlanThreads) plan_scan_kernel(PlanParams p) {
  constexpr int kScanned = 4;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int expert = static_cast<int>(blockIdx.x) * kPlanWarps + static_cast<int>(threadIdx.x / 32);
  if (expert >= p.num_experts) return;  // whole warps leave
  int32_t* const counts = p.counts + static_cast<int64_t>(expert) * p.num_chunks;
  int32_t before = 0;
  for (int first = 0; first < p.num_chunks; first += 32 * kScanned) {
    int32_t values[kScanned];
    int32_t own = 0;
#pragma unroll
    for (int j = 0; j < kScanned; ++j) {
      const int chunk = first + lane * kScanned + j;
      values[j] = chunk < p.num_chunks ? counts[chunk] : 0;
      own += values[j];
    }
    const int32_t inclusive = inclusive_sum(own);
    int32_t sum = before + inclusive - own;
#pragma unroll
    for (int j = 0; j < kScanned; ++j) {
      const int chunk = first + lane * kScanned + j;
      if (chunk < p.num_chunks) counts[chunk] = sum;
      sum += values[j];
    }
    before += __shfl_sync(0xffffffffu, inclusive, 31);
  }
  if (lane == 0) p.totals[expert] = before;
}

// blockIdx.x: chunk, blockIdx.y: window
__global__ void __launch_bounds__(kPlanThreads) plan_place_kernel(PlanParams p) {
  SHARED_ARRAY(int32_t, next, kPlanWarps* kPlanWindow);  // [segment, expert]
  SHARED_ARRAY(int32_t, sums, kPlanWarps);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int first = static_cast<int>(blockIdx.y) * kPlanWindow;
  const int size = p.num_experts - first < kPlanWindow ? p.num_experts - first : kPlanWindow;
  const PlanRange chunk = chunk_of(p, static_cast<int>(blockIdx.x));
  const PlanRange segment = segment_of(chunk, warp, kPlanWarps);

  for (int i = thread; i < kPlanWarps * size; i += kPlanThreads) next[i] = 0;
  __syncthreads();
  count_pairs(p, segment, thread % 32, 32, first, size, next + warp * size);

  // Slots before the window and in total, then before each of this thread's experts.
  int32_t before = 0, elsewhere = 0, inside = 0;
  for (int e = thread; e < p.num_experts; e += kPlanThreads) {
    if (e < first) before += p.totals[e];
    if (e < first || e >= first + size) elsewhere += p.totals[e];
  }
  int32_t totals[kExpertsPerThread];
#pragma unroll
  for (int j = 0; j < kExpertsPerThread; ++j) {
    const int e = thread * kExpertsPerThread + j;
    totals[j] = e < size ? p.totals[first + e] : 0;
    inside += totals[j];
  }
  int32_t total_before = 0, total_elsewhere = 0, total_inside;
  if (gridDim.y > 1) {
    exclusive_sum(before, sums, &total_before);
    exclusive_sum(elsewhere, sums, &total_elsewhere);
  }
  int32_t offset =
      total_before + exclusive_sum(inside, sums, &total_inside);  // its barriers also wait for the counters
  const int32_t num_used = total_elsewhere + total_inside;
  __syncthreads();  // counters of all segments

#pragma unroll
  for (int j = 0; j < kExpertsPerThread; ++j) {
    const int e = thread * kExpertsPerThread + j;
    if (e >= size) break;
    if (blockIdx.x == 0) p.expert_offsets[first + e] = offset;
    int32_t slot = offset + p.counts[static_cast<int64_t>(first + e) * p.num_chunks + blockIdx.x];
    for (int w = 0; w < kPlanWarps; ++w) {
      const int32_t count = next[w * size + e];
      next[w * size + e] = slot;
      slot += count;
    }
    offset += totals[j];
  }
  if (blockIdx.x == 0 && blockIdx.y == 0 && thread == 0) p.expert_offsets[p.num_experts] = num_used;
  if (blockIdx.y == 0) fill_tail(p, chunk, num_used);
  __syncthreads();
  place_pairs(p, segment, first, size, next + warp * size);
}

// ---- few pairs -----------------------------------------------------------------------------------------------------------

// One block, with as many segments as fit: dynamic shared memory of num_segments · E counters.
__global__ void __launch_bounds__(kSmallThreads) plan_small_kernel(PlanParams p, int num_segments) {
  SHARED_DYN(int32_t, next);  // [segment, expert]
  SHARED_ARRAY(int32_t, sums, kSmallThreads / 32);
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const PlanRange all{0, p.num_pairs};
  if (thread == 0) reset_counter(p);
  const PlanRange segment = segment_of(all, warp < num_segments ? warp : num_segments, num_segments);

  for (int i = thread; i < num_segments * p.num_experts; i += static_cast<int>(blockDim.x)) next[i] = 0;
  __syncthreads();
  if (warp < num_segments) {
    count_pairs(p, segment, thread % 32, 32, 0, p.num_experts, next + warp * p.num_experts);
  }
  __syncthreads();

  const int experts = (p.num_experts + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x);
  const int first = thread * experts;
  const int last = first + experts < p.num_experts ? first + experts : p.num_experts;
  int32_t inside = 0, num_used;
  for (int e = first; e < last; ++e) {
    for (int w = 0; w < num_segments; ++w) inside += next[w * p.num_experts + e];
  }
  int32_t slot = exclusive_sum(inside, sums, &num_used);
  for (int e = first; e < last; ++e) {
    p.expert_offsets[e] = slot;
    for (int w = 0; w < num_segments; ++w) {
      const int32_t count = next[w * p.num_experts + e];
      next[w * p.num_experts + e] = slot;
      slot += count;
    }
  }
  if (thread == 0) p.expert_offsets[p.num_experts] = num_used;
  fill_tail(p, all, num_used);
  __syncthreads();
  if (warp < num_segments) place_pairs(p, segment, 0, p.num_experts, next + warp * p.num_experts);
}

}  // namespace switchgear::cuda
