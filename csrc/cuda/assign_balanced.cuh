// SPDX-License-Identifier: BSD-3-Clause
// assign_balanced: values [T,E] -> expert_ids [T]: one expert for each token and the same number of tokens of a sequence for
// each expert, by an auction.
//
//   work about 12·E/32 instructions of each lane a bid, and 10·T of one thread for the prices, an iteration; traffic 4·E bytes
//   a bid, from L2; bound by the latency of an iteration, about 50 barriers of one block
//
// One block per sequence: an iteration needs the prices of the previous one, and the number of iterations is not known at
// launch. In an iteration a warp computes the bids of the unassigned tokens among its 32: best and second best value - price
// over all experts. Then every expert with more holders and bids than places finds the cut between them, all experts at once
// (select.cuh). A full expert's new price is the lowest price paid for its places. The state of the experts is in shared
// memory up to about 1100 experts, else in global memory.
//
// Numeric contract: the bits of csrc/cpu/assign_balanced.cpp: float32, each operation rounded on its own; prices paid are
// compared as keys. Tokens with a sequence id out of range get -1.
//
// Resources, at most (registers a thread; static shared memory; tests/test_cuda_build.py reads this):
//   assign_balanced_kernel: 88 registers, 1024 bytes of shared memory
#pragma once
#include "platform.cuh"
#include "scan.cuh"
#include "score.cuh"
#include "select.cuh"

namespace switchgear::cuda {

constexpr int kAssignThreads = 512;
constexpr int kAssignWords = kGroupWords + 2;  // per expert of a sequence

struct AssignBalancedParams {
  const float* values;
  const int32_t* sequence_ids;  // or null
  int32_t* expert_ids;
  const int32_t* sequence_offsets;  // [B + 1], or null for a single sequence
  const int32_t* tokens;            // [T] by sequence, or null for a single sequence
  int32_t* places;                  // [T] by sequence: the expert that holds a place for the token, or -1
  uint32_t* paid;                   // [T] by sequence: the key of the price the token paid
  uint32_t* scratch;                // global memory for the experts' state, or null if it fits in shared memory
  int64_t max_iterations;
  float eps;               // negative: derived from the values
  float huge, never_paid;  // values, differences and prices stay finite below these
  int num_tokens, num_experts, num_sequences;
  int place_bits;  // tokens are below 2^place_bits
};

// Maps a value to a finite number: infinities and NaN to numbers outside the range of the sequence's values.
struct AuctionValues {
  float huge, above, below;

  __device__ static float clamp(float v, float huge) { return v < -huge ? -huge : huge < v ? huge : v; }
  __device__ static bool is_finite(float v) { return v >= -FLT_MAX && v <= FLT_MAX; }
  __device__ float operator()(float v) const { return is_finite(v) ? clamp(v, huge) : v > 0.0f ? above : below; }
};

struct AuctionBid {
  int expert;
  uint32_t paid;
};

// One token's bid for the expert of highest value - price. Called by a whole warp.
__device__ inline AuctionBid auction_bid(const float* row, const float* price, int num_experts,
                                         const AuctionValues& values, float most, float step, int lane) {
  uint32_t best = kTaken, second = kTaken, at = ~0u;
  for (int e = lane; e < num_experts; e += 32) {
    const uint32_t key = key_of(add(values(row[e]), -price[e]));
    if (key > best) {
      second = best;
      best = key;
      at = static_cast<uint32_t>(e);
    } else if (key > second) {
      second = key;
    }
  }
  const uint32_t top = max_over<32>(best);
  const uint32_t expert = min_over<32>(best == top ? at : ~0u);
  const uint32_t next = num_experts > 1 ? max_over<32>(at == expert ? second : best) : top;
  const float gap = add(value_of(top), -value_of(next)), lead = most < gap ? most : gap;
  return {static_cast<int>(expert), key_of(add(add(price[expert], lead), step))};
}

// One block per sequence.
__global__ void __launch_bounds__(kAssignThreads, 1) assign_balanced_kernel(AssignBalancedParams p) {
  SHARED_DYN(uint32_t, shared);
  SHARED_ARRAY(int32_t, sums, kAssignThreads / 32);
  SHARED_ARRAY(uint32_t, extremes, 2);  // keys of the lowest and the highest finite value
  SHARED_VALUE(int32_t, num_waiting);
  const int thread = static_cast<int>(threadIdx.x), num_threads = static_cast<int>(blockDim.x);
  const int warp = thread / 32, lane = thread % 32, num_experts = p.num_experts;
  const int sequence = static_cast<int>(blockIdx.x);
  uint32_t* const words =
      p.scratch != nullptr ? p.scratch + sequence * (static_cast<int64_t>(kAssignWords) * num_experts) : shared;
  const GroupCuts cuts(words, num_experts);
  float* const price = reinterpret_cast<float*>(words + kGroupWords * static_cast<int64_t>(num_experts));
  uint32_t* const lowest = reinterpret_cast<uint32_t*>(price + num_experts);  // lowest price that a holder paid

  const int32_t begin = p.tokens != nullptr ? p.sequence_offsets[sequence] : 0;
  const int32_t n = (p.tokens != nullptr ? p.sequence_offsets[sequence + 1] : p.num_tokens) - begin;
  int32_t* const place = p.places + begin;
  uint32_t* const paid = p.paid + begin;
  const auto token_of = [&](int32_t i) { return p.tokens != nullptr ? p.tokens[begin + i] : i; };
  const auto row_of = [&](int32_t i) { return p.values + static_cast<int64_t>(token_of(i)) * num_experts; };
  const auto places_of = [&](int e) { return n / num_experts + (e < n % num_experts ? 1 : 0); };

  if (thread == 0) {
    extremes[0] = key_of(p.huge);
    extremes[1] = key_of(-p.huge);
  }
  __syncthreads();
  uint32_t low = key_of(p.huge), high = key_of(-p.huge);
  for (int32_t i = warp; i < n; i += num_threads / 32) {
    for (int e = lane; e < num_experts; e += 32) {
      const float value = row_of(i)[e];
      if (!AuctionValues::is_finite(value)) continue;
      const uint32_t key = key_of(AuctionValues::clamp(value, p.huge));
      low = min(low, key);
      high = max(high, key);
    }
  }
  atomicMin(&extremes[0], low);
  atomicMax(&extremes[1], high);
  for (int32_t i = thread; i < n; i += num_threads) place[i] = -1;
  for (int e = thread; e < num_experts; e += num_threads) price[e] = places_of(e) > 0 ? 0.0f : p.never_paid;
  __syncthreads();
  const float lowest_value = value_of(extremes[0]), highest_value = value_of(extremes[1]);
  const bool any = highest_value >= lowest_value;
  const float spread = any ? add(highest_value, -lowest_value) : 0.0f;
  const AuctionValues values{p.huge, any ? add(add(highest_value, spread), 1.0f) : 1.0f,
                             any ? add(add(lowest_value, -spread), -1.0f) : 0.0f};
  const float fiftieth = divide(spread, 50.0f);
  const float step = p.eps >= 0.0f ? p.eps : fiftieth < 1e-4f ? 1e-4f : fiftieth;
  const float most =
      add(multiply(4.0f, spread), 1.0f);  // caps a raise: the gap is huge if the second best has no places

  int32_t waiting = n;
  for (int64_t iteration = 0; iteration < p.max_iterations && waiting > 0; ++iteration) {
    for (int32_t base = warp * 32; base < n; base += num_threads) {
      const int32_t i = base + lane;
      uint32_t bidders = __ballot_sync(kAllLanes, i < n && place[i] < 0);
      AuctionBid mine{-1, 0};
      for (; bidders != 0; bidders &= bidders - 1) {
        const int bidder = __ffs(static_cast<int>(bidders)) - 1;
        const AuctionBid bid = auction_bid(row_of(base + bidder), price, num_experts, values, most, step, lane);
        if (lane == bidder) mine = bid;
      }
      if (mine.expert < 0) continue;
      place[i] = mine.expert;
      paid[i] = mine.paid;
    }
    find_group_cuts(
        cuts, n, 32 + p.place_bits, [&](int32_t i) { return place[i]; },
        [&](int32_t i) { return key_at(paid[i], static_cast<uint32_t>(i), p.place_bits); }, places_of);
    for (int e = thread; e < num_experts; e += num_threads) lowest[e] = ~0u;
    if (thread == 0) num_waiting = 0;
    __syncthreads();
    for (int32_t i = thread; i < n; i += num_threads) {
      const int e = place[i];
      if (key_at(paid[i], static_cast<uint32_t>(i), p.place_bits) < cuts.cut[e]) {
        place[i] = -1;
        atomicAdd(&num_waiting, 1);
      } else {
        atomicMin(&lowest[e], paid[i]);
      }
    }
    __syncthreads();
    waiting = num_waiting;
    for (int e = thread; e < num_experts; e += num_threads) {
      if (places_of(e) > 0 && cuts.size[e] >= places_of(e)) price[e] = value_of(lowest[e]);
    }
    __syncthreads();
  }

  // The remaining tokens get the remaining places, both in ascending order.
  int32_t* const taken = cuts.size;
  int32_t* const free_until = cuts.rest;  // free places at this expert and at all lower ones
  for (int e = thread; e < num_experts; e += num_threads) taken[e] = 0;
  __syncthreads();
  for (int32_t i = thread; i < n; i += num_threads) {
    if (place[i] >= 0) atomicAdd(&taken[place[i]], 1);
  }
  __syncthreads();
  int32_t before = 0, total;
  for (int base = 0; base < num_experts; base += num_threads) {
    const int e = base + thread;
    const int32_t own = e < num_experts ? places_of(e) - taken[e] : 0;
    const int32_t lower = exclusive_sum(own, sums, &total);
    if (e < num_experts) free_until[e] = before + lower + own;
    before += total;
  }
  __syncthreads();
  before = 0;
  for (int32_t base = 0; base < n; base += num_threads) {
    const int32_t i = base + thread;
    const bool waits = i < n && place[i] < 0;
    const int32_t rank = before + exclusive_sum(waits, sums, &total);
    before += total;
    if (i >= n) continue;
    int first = 0;
    for (int size = waits ? num_experts : 0; size > 0;) {  // the first expert with free_until above the rank
      const int half = size / 2;
      const bool higher = free_until[first + half] <= rank;
      first = higher ? first + half + 1 : first;
      size = higher ? size - half - 1 : half;
    }
    p.expert_ids[token_of(i)] = waits ? first : place[i];
  }

  if (p.sequence_ids == nullptr) return;
  for (int64_t t = static_cast<int64_t>(blockIdx.x) * num_threads + thread; t < p.num_tokens;
       t += static_cast<int64_t>(gridDim.x) * num_threads) {
    if (p.sequence_ids[t] < 0 || p.sequence_ids[t] >= p.num_sequences) p.expert_ids[t] = -1;
  }
}

}  // namespace switchgear::cuda
