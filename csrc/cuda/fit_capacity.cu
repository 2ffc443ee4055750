// SPDX-License-Identifier: BSD-3-Clause
#include "fit_capacity.cuh"

#include <algorithm>
#include <bit>
#include <limits>

#include "launch.h"
#include "members.h"
#include "ops.h"
#include "warp_rows.h"

namespace switchgear::cuda {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One thread per item, in whole warps.
unsigned threads_for(int64_t items, int64_t most) {
  return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(items, 32) * 32, 32, most));
}

struct Memory {
  Members choices, tokens;
  int32_t *groups, *room, *candidates, *waiting, *offers, *offered;
  uint32_t* scratch;

  Memory(Workspace& memory, int64_t num_pairs, int64_t num_groups, int64_t num_tokens, int64_t num_sequences,
         bool sorts_tokens, bool reroutes, int64_t scratch_words)
      : choices(memory, num_pairs, num_groups),
        tokens(memory, sorts_tokens ? num_tokens : 0, sorts_tokens ? num_sequences : 0),
        groups(memory.take<int32_t>(num_pairs)),
        room(memory.take<int32_t>(num_groups)) {
    const int64_t rerouted = reroutes ? num_tokens : 0;
    candidates = memory.take<int32_t>(rerouted * kCandidates);
    waiting = memory.take<int32_t>(rerouted);
    offers = memory.take<int32_t>(rerouted);
    offered = memory.take<int32_t>(rerouted);
    scratch = memory.take<uint32_t>(scratch_words);
  }
};

}  // namespace

void fit_capacity(const FitCapacityArgs& args, Execution exec) {
  const int64_t num_tokens = args.topk_ids.shape[0], top_k = args.topk_ids.shape[1], num_pairs = num_tokens * top_k;
  const int64_t num_experts = args.options.num_experts, num_sequences = args.limits.shape[0];
  const int64_t num_groups = num_sequences * num_experts;
  SWITCHGEAR_CHECK(ValueError, num_groups < std::numeric_limits<int32_t>::max(),
                   "limits: expected B·E below 2^31, got ", num_sequences, " · ", num_experts);
  if (num_pairs == 0) return;
  const int64_t rounds =
      args.scores.defined() ? std::clamp<int64_t>(args.options.candidates - top_k, 0, num_experts) : 0;
  const bool reroutes = rounds > 0, sorts_tokens = reroutes && args.sequence_ids.defined();
  const WarpRows rows(num_tokens, num_experts);
  const int64_t cut_words = kGroupWords * num_experts;
  const bool cuts_in_shared = 4 * cut_words <= kSharedBytes;
  const int64_t scratch_words =
      reroutes ? std::max(rows.scratch_words(), cuts_in_shared ? 0 : cut_words * num_sequences) : 0;

  const auto layout = [&](Workspace& memory) {
    return Memory(memory, num_pairs, num_groups, num_tokens, num_sequences, sorts_tokens, reroutes, scratch_words);
  };
  Workspace sizes;
  layout(sizes);
  Workspace workspace(allocate(exec, sizes.size()));
  const Memory m = layout(workspace);
  FitCapacityParams params{
      .topk_ids = args.topk_ids.as<const int32_t>(),
      .priorities = args.priorities.as<const float>(),
      .scores = args.scores.as<const float>(),
      .sequence_ids = args.sequence_ids.as<const int32_t>(),
      .limits = args.limits.as<const int32_t>(),
      .kept_ids = args.kept_ids.as<int32_t>(),
      .num_groups = num_groups,
      .num_pairs = static_cast<int>(num_pairs),
      .num_tokens = static_cast<int>(num_tokens),
      .top_k = static_cast<int>(top_k),
      .num_experts = static_cast<int>(num_experts),
      .num_sequences = static_cast<int>(num_sequences),
      .drop = args.options.drop,
      .place_bits = static_cast<int>(std::bit_width(static_cast<uint64_t>(num_pairs - 1))),
      .groups = m.groups,
      .group_offsets = m.choices.offsets(),
      .members = m.choices.items(),
      .room = m.room,
      .sequence_offsets = sorts_tokens ? m.tokens.offsets() : nullptr,
      .tokens = m.tokens.items(),
      .candidates = m.candidates,
      .waiting = m.waiting,
      .offers = m.offers,
      .offered = m.offered,
  };
  const auto blocks = [](int64_t count) { return dim3(static_cast<unsigned>(std::min(count, kMaxBlocks))); };
  launch(capacity_groups_kernel, dim3(static_cast<unsigned>(ceil_div(num_pairs, kCapacityThreads))),
         dim3(kCapacityThreads), 0, exec.stream, params);
  m.choices.list(m.groups, exec.stream);
  launch(fit_capacity_kernel, blocks(num_groups), dim3(threads_for(num_pairs / num_groups, kCapacityThreads)), 0,
         exec.stream, params);

  if (sorts_tokens) m.tokens.list(params.sequence_ids, exec.stream);
  for (int64_t round = 0; round < rounds; round += kCandidates) {
    const int count = static_cast<int>(std::min<int64_t>(rounds - round, kCandidates));
    params.scratch = rows.in_shared() ? nullptr : m.scratch;
    launch(capacity_candidates_kernel, blocks(rows.blocks), dim3(32), rows.shared_bytes(), exec.stream, params,
           round == 0, count);
    params.scratch = cuts_in_shared ? nullptr : m.scratch;
    launch(reroute_kernel, dim3(static_cast<unsigned>(sorts_tokens ? num_sequences : 1)),
           dim3(threads_for(num_tokens / num_sequences, kRerouteThreads)),
           cuts_in_shared ? static_cast<size_t>(4 * cut_words) : 0, exec.stream, params, count);
  }
}

}  // namespace switchgear::cuda
