// SPDX-License-Identifier: BSD-3-Clause
// fit_capacity: topk_ids [T,K] -> kept_ids [T,K]: an expert takes as many choices of a sequence as it has places; the others
// are dropped or rerouted to the token's next best experts.
//
//   traffic about 40·S bytes: ids, groups, their plan, results. A group with too many choices reads those again up to 4 times
//   (8 with priorities). Rerouting reads E scores of each token that lost a choice, once in 32 rounds.
//   bound by the latency of about six launches up to 10^6 slots; rerouting by one block per sequence
//
// A group is an (expert, sequence) pair. Each choice has a unique precedence; the highest is kept first.
//   capacity_groups_kernel   the group of each choice; plan then lists the choices of each group, ascending
//   fit_capacity_kernel      one block per group: finds the cut between kept and dropped in crowded groups (select.cuh)
// Rerouting runs in rounds. Up to 32 rounds share two launches, so the host reads nothing back to know when to stop:
//   capacity_candidates_kernel   one warp per token with lost choices: its next 32 best experts (ranking.cuh)
//   reroute_kernel               one block per sequence, round by round: a token offers its next expert the first of its lost
//                                choices. Experts with too many offers find their cuts, all at once. Tokens without further
//                                offers leave the waiting list. Ends when the list is empty or no expert has places left.
//
// Integers only: the same choices as csrc/cpu/fit_capacity.cpp. Ids and sequences out of range are empty choices.
//
// Resources, at most (registers a thread; static shared memory; tests/test_cuda_build.py reads this):
//   capacity_groups_kernel: 24 registers
//   fit_capacity_kernel: 40 registers, 2048 bytes of shared memory
//   capacity_candidates_kernel: 80 registers
//   reroute_kernel: 64 registers, 1024 bytes of shared memory
#pragma once
#include "platform.cuh"
#include "ranking.cuh"
#include "scan.cuh"
#include "select.cuh"
#include "switchgear/ops.h"

namespace switchgear::cuda {

constexpr int kCapacityThreads = 256;
constexpr int kRerouteThreads = 1024;
constexpr int kCandidates = 32;  // rounds per two launches: one per lane

struct FitCapacityParams {
  const int32_t* topk_ids;
  const float* priorities;  // with Drop::kPriority
  const float* scores;      // [T,E]
  const int32_t* sequence_ids;
  const int32_t* limits;
  int32_t* kept_ids;
  int64_t num_groups;  // B·E
  int num_pairs, num_tokens, top_k, num_experts, num_sequences;
  Drop drop;
  int place_bits;  // pairs are below 2^place_bits
  // temporary memory
  int32_t* groups;         // [S]: group of each choice, -1 for none
  int32_t* group_offsets;  // [B·E + 1]
  int32_t* members;        // [S]: choices by group
  int32_t* room;           // [B·E]: free places
  // for rerouting
  int32_t* sequence_offsets;  // [B + 1], or null for a single sequence
  int32_t* tokens;            // [T] by sequence
  int32_t* candidates;        // [T, kCandidates]: experts, then -1
  int32_t* waiting;           // [T]: tokens of each sequence that have lost choices
  int32_t* offers;            // [T]: the choice that each waiting token offers
  int32_t* offered;           // [T]: the expert it is offered to, or -1
  uint32_t* scratch;          // global memory where shared memory is too small, else null

  __device__ int precedence_bits() const { return drop == Drop::kPriority ? 32 + place_bits : place_bits; }

  // Precedence of choice i = t·K + k; the highest is kept first.
  __device__ uint64_t precedence(int32_t i) const {
    switch (drop) {
      case Drop::kOrder: return key_at(0, i, place_bits);
      case Drop::kReverse: return i;
      case Drop::kChoice: return key_at(0, i % top_k * num_tokens + i / top_k, place_bits);
      case Drop::kPriority: break;
    }
    return key_at(key_of(sanitise(priorities[i])), i, place_bits);
  }
  __device__ bool lost(int32_t i) const { return groups[i] >= 0 && kept_ids[i] < 0; }

  // The first choice that a token has lost, or -1.
  __device__ int32_t first_lost(int32_t token) const {
    for (int32_t i = token * top_k; i < (token + 1) * top_k; ++i) {
      if (lost(i)) return i;
    }
    return -1;
  }
};

// ---- dropping ------------------------------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kCapacityThreads) capacity_groups_kernel(FitCapacityParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kCapacityThreads + threadIdx.x;
  if (i >= p.num_pairs) return;
  const int32_t expert = p.topk_ids[i];
  const int32_t sequence = p.sequence_ids != nullptr ? p.sequence_ids[i / p.top_k] : 0;
  const bool real = expert >= 0 && expert < p.num_experts && sequence >= 0 && sequence < p.num_sequences;
  p.groups[i] = real ? sequence * p.num_experts + expert : -1;
  p.kept_ids[i] = real ? expert : -1;
}

// Blocks loop over the groups.
__global__ void __launch_bounds__(kCapacityThreads) fit_capacity_kernel(FitCapacityParams p) {
  SHARED_VALUE(Selection<1>, selection);
  for (int64_t g = blockIdx.x; g < p.num_groups; g += gridDim.x) {
    const int32_t begin = p.group_offsets[g], size = p.group_offsets[g + 1] - begin;
    const int32_t limit = max(p.limits[g / p.num_experts], 0);
    if (threadIdx.x == 0) p.room[g] = max(limit - size, 0);
    if (size <= limit) continue;
    const int32_t* const members = p.members + begin;  // ascending
    uint64_t cut = ~uint64_t{0};
    if (limit > 0 && p.drop == Drop::kOrder) {
      cut = p.precedence(members[limit - 1]);
    } else if (limit > 0 && p.drop == Drop::kReverse) {
      cut = p.precedence(members[size - limit]);
    } else if (limit > 0) {
      find_cuts(selection, size, limit, p.precedence_bits(), [&](int32_t i, int) { return p.precedence(members[i]); });
      cut = selection.cut[0];
    }
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < size; i += static_cast<int32_t>(blockDim.x)) {
      if (p.precedence(members[i]) < cut) p.kept_ids[members[i]] = -1;
    }
  }
}

// ---- rerouting -----------------------------------------------------------------------------------------------------------

// The next `count` candidates of each token with lost choices: the first ones if `first`, else those after its last ones. A
// block is one warp; blocks loop over the tokens.
__global__ void __launch_bounds__(32) capacity_candidates_kernel(FitCapacityParams p, bool first, int count) {
  SHARED_DYN(uint32_t, shared);
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t* const keys = p.scratch != nullptr ? p.scratch + static_cast<int64_t>(blockIdx.x) * p.num_experts : shared;
  for (int32_t token = static_cast<int32_t>(blockIdx.x); token < p.num_tokens;
       token += static_cast<int32_t>(gridDim.x)) {
    if (p.first_lost(token) < 0) continue;  // the same in all lanes
    const float* const scores = p.scores + static_cast<int64_t>(token) * p.num_experts;
    int32_t* const candidates = p.candidates + static_cast<int64_t>(token) * kCandidates;
    const int32_t last = first ? -1 : candidates[kCandidates - 1];
    const uint32_t last_key = last >= 0 ? key_of(sanitise(scores[last])) : ~0u;
    if (!first && last < 0) continue;  // no more candidates in the previous round
    for (int e = lane; e < p.num_experts; e += 32) {
      const uint32_t key = key_of(sanitise(scores[e]));
      const bool is_next = key < last_key || (key == last_key && e > last);
      keys[e] = is_next && scores[e] > 0 ? key : kTaken;
    }
    for (int32_t i = token * p.top_k; i < (token + 1) * p.top_k; ++i) {
      if (p.groups[i] >= 0 && p.topk_ids[i] % 32 == lane) keys[p.topk_ids[i]] = kTaken;  // the lane that wrote this key
    }
    Ranking ranking(keys, p.num_experts, lane);
    int32_t mine = -1;
    for (int i = 0; i < count; ++i) {
      const Best best = ranking.take();
      if (best.key == kTaken) break;
      if (lane == i) mine = static_cast<int32_t>(best.expert);
    }
    candidates[lane] = mine;
    __syncwarp();  // before the next token's keys
  }
}

// One block per sequence.
__global__ void __launch_bounds__(kRerouteThreads, 1) reroute_kernel(FitCapacityParams p, int rounds) {
  SHARED_DYN(uint32_t, shared);
  SHARED_ARRAY(int32_t, sums, kRerouteThreads / 32);
  const int thread = static_cast<int>(threadIdx.x), num_threads = static_cast<int>(blockDim.x);
  const int sequence = static_cast<int>(blockIdx.x);
  const int64_t words = static_cast<int64_t>(kGroupWords) * p.num_experts;
  const GroupCuts cuts(p.scratch != nullptr ? p.scratch + sequence * words : shared, p.num_experts);
  const int32_t begin = p.sequence_offsets != nullptr ? p.sequence_offsets[sequence] : 0;
  const int32_t end = p.sequence_offsets != nullptr ? p.sequence_offsets[sequence + 1] : p.num_tokens;
  int32_t* const room = p.room + static_cast<int64_t>(sequence) * p.num_experts;
  int32_t* const waiting = p.waiting + begin;
  int32_t* const offers = p.offers + begin;
  int32_t* const offered = p.offered + begin;
  const auto candidate = [&](int32_t token, int round) {
    return p.candidates[static_cast<int64_t>(token) * kCandidates + round];
  };
  // Puts those of token_of(i), i < count, for which goes_on holds into the waiting list; returns their number. Also a barrier.
  const auto keep = [&](int32_t count, const auto& token_of, const auto& goes_on) {
    int32_t kept = 0, total;
    for (int32_t base = 0; base < count; base += num_threads) {
      const int32_t i = base + thread, token = i < count ? token_of(i) : -1;
      const bool stays = token >= 0 && goes_on(token);
      const int32_t place = kept + exclusive_sum(stays, sums, &total);  // has a barrier: all have read their tokens
      if (stays) waiting[place] = token;
      kept += total;
    }
    __syncthreads();
    return kept;
  };

  int32_t count = keep(
      end - begin, [&](int32_t i) { return p.sequence_offsets != nullptr ? p.tokens[begin + i] : i; },
      [&](int32_t token) { return p.first_lost(token) >= 0; });
  for (int round = 0; round < rounds && count > 0; ++round) {
    bool has_room = false;
    for (int e = thread; e < p.num_experts; e += num_threads) has_room |= room[e] > 0;
    int32_t total;
    exclusive_sum(has_room, sums, &total);
    if (total == 0) break;
    for (int32_t i = thread; i < count; i += num_threads) {
      const int32_t expert = candidate(waiting[i], round);
      offered[i] = expert >= 0 && room[expert] > 0 ? expert : -1;
      offers[i] = p.first_lost(waiting[i]);
    }
    find_group_cuts(
        cuts, count, p.precedence_bits(), [&](int32_t i) { return offered[i]; },
        [&](int32_t i) { return p.precedence(offers[i]); }, [&](int expert) { return room[expert]; });
    for (int32_t i = thread; i < count; i += num_threads) {
      if (offered[i] >= 0 && p.precedence(offers[i]) >= cuts.cut[offered[i]]) p.kept_ids[offers[i]] = offered[i];
    }
    for (int e = thread; e < p.num_experts; e += num_threads) room[e] -= min(cuts.size[e], room[e]);
    count = keep(
        count, [&](int32_t i) { return waiting[i]; },
        [&](int32_t token) { return candidate(token, round) >= 0 && p.first_lost(token) >= 0; });
  }
}

}  // namespace switchgear::cuda
