// SPDX-License-Identifier: BSD-3-Clause
// plan: a stable counting sort of the (token, choice) pairs by expert.
//
//   traffic about 16·S bytes (ids are read twice, both index arrays written once) + the counters; memory-bound
//
// Tokens are cut into as many chunks as there are threads. Each chunk counts its ids; an exclusive scan over (expert, chunk)
// turns the counts into the first slot of each; each chunk then places its pairs in order. The sort is stable, so slots are
// ordered by (expert, token, choice) for any number of chunks.
#include <algorithm>
#include <vector>

#include "ops.h"
#include "threads.h"

namespace switchgear::cpu {
namespace {

// Fewer pairs than this, about 10 µs of work, are not worth a thread. A chunk also has at least one pair per counter, so
// clearing and scanning the counters never costs more than the pairs.
constexpr int64_t kMinChunkPairs = 4096;

}  // namespace

void plan(const PlanArgs& args, const Context& context) {
  const int64_t num_tokens = args.topk_ids.shape[0];
  const int64_t top_k = args.topk_ids.shape[1];
  const int64_t num_experts = args.plan.expert_offsets.shape[0] - 1;
  const int64_t num_pairs = num_tokens * top_k;
  const int32_t* topk_ids = args.topk_ids.as<const int32_t>();
  int32_t* expert_offsets = args.plan.expert_offsets.as<int32_t>();
  int32_t* token_indices = args.plan.token_indices.as<int32_t>();
  int32_t* slot_indices = args.plan.slot_indices.as<int32_t>();

  const int num_threads = context.num_threads;
  const int64_t num_chunks = std::clamp<int64_t>(num_pairs / std::max(kMinChunkPairs, num_experts), 1, num_threads);
  std::vector<int32_t> counters(num_chunks * num_experts);
  const auto first_token = [&](int64_t chunk) { return num_tokens * chunk / num_chunks; };

  parallel_for(num_threads, num_chunks, [&](int64_t chunk, int) {
    int32_t* counts = counters.data() + chunk * num_experts;
    for (int64_t i = first_token(chunk) * top_k; i < first_token(chunk + 1) * top_k; ++i) {
      if (topk_ids[i] >= 0) ++counts[topk_ids[i]];
    }
  });

  int32_t num_slots = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    expert_offsets[e] = num_slots;
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
      int32_t& counter = counters[chunk * num_experts + e];
      const int32_t count = counter;
      counter = num_slots;
      num_slots += count;
    }
  }
  expert_offsets[num_experts] = num_slots;

  parallel_for(num_threads, num_chunks, [&](int64_t chunk, int) {
    int32_t* next_slot = counters.data() + chunk * num_experts;
    for (int64_t token = first_token(chunk); token < first_token(chunk + 1); ++token) {
      for (int64_t i = token * top_k; i < (token + 1) * top_k; ++i) {
        const int32_t slot = topk_ids[i] >= 0 ? next_slot[topk_ids[i]]++ : -1;
        slot_indices[i] = slot;
        if (slot >= 0) token_indices[slot] = static_cast<int32_t>(token);
      }
    }
  });
  std::fill(token_indices + num_slots, token_indices + num_pairs, -1);
}

}  // namespace switchgear::cpu
