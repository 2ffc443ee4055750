// SPDX-License-Identifier: BSD-3-Clause
// fit_capacity: an expert takes as many choices as it has places; the others are dropped or rerouted to the next expert.
//
//   traffic about 24·S bytes, as plan; a group with too many choices is also partitioned, and a rerouted token builds a heap
//   of its E scores: bound by instructions
//
// A group is an expert of a sequence. A stable counting sort orders choices by group; a group with too many keeps those of
// the highest precedence. Rerouting runs in rounds: a token offers the first of its lost choices to its next best expert, and
// experts accept by precedence. Only tokens with lost choices take part; only offers to experts with places are sorted.
#include <algorithm>
#include <vector>

#include "experts.h"
#include "grouping.h"
#include "ops.h"
#include "ranking.h"
#include "threads.h"

namespace switchgear::cpu {
namespace {

// The precedence of choice i = t·K + k: the lowest value wins, and no two are equal.
struct Precedence {
  Drop drop;
  const float* priorities;
  int64_t num_tokens, top_k;

  int64_t operator()(int64_t i) const {
    switch (drop) {
      case Drop::kOrder: return i;
      case Drop::kReverse: return -i;
      case Drop::kChoice: return i % top_k * num_tokens + i / top_k;
      case Drop::kPriority: break;
    }
    return ~key_of(sanitise(priorities[i]), i);
  }
  auto before() const {
    return [this](int64_t a, int64_t b) { return (*this)(a) < (*this)(b); };
  }
};

// A heap of (score, id) of the experts that a token may be rerouted to: without those it chose, and those without a score above 0.
int64_t make_candidates(const float* scores, int64_t num_experts, const int32_t* chosen, int64_t top_k, int64_t* heap) {
  for (int64_t e = 0; e < num_experts; ++e) heap[e] = scores[e] > 0 ? key_of(sanitise(scores[e]), e) : -1;
  for (int64_t k = 0; k < top_k; ++k) {
    if (chosen[k] >= 0) heap[chosen[k]] = -1;  // no key: it would be that of -0
  }
  int64_t* end = std::remove(heap, heap + num_experts, -1);
  std::make_heap(heap, end);
  return end - heap;
}

struct Waiting {
  int32_t token;
  int64_t candidates;  // left in its heap
  int64_t* heap;
};

}  // namespace

void fit_capacity(const FitCapacityArgs& args, const Context& context) {
  const int64_t num_tokens = args.topk_ids.shape[0], top_k = args.topk_ids.shape[1];
  const int64_t num_experts = args.options.num_experts, num_sequences = args.limits.shape[0];
  const int64_t num_pairs = num_tokens * top_k;
  const auto* topk_ids = args.topk_ids.as<const int32_t>();
  const auto* limits = args.limits.as<const int32_t>();
  const auto* sequence_ids = args.sequence_ids.as<const int32_t>();  // may be null
  auto* kept_ids = args.kept_ids.as<int32_t>();
  const Precedence precedence{args.options.drop, args.priorities.as<const float>(), num_tokens, top_k};
  const int num_threads = context.num_threads;

  const auto group_of = [&](int64_t token, int64_t expert) {
    return (sequence_ids != nullptr ? sequence_ids[token] * num_experts : 0) + expert;
  };
  Grouping groups = group_by(num_pairs, num_sequences * num_experts,
                             [&](int64_t i) { return topk_ids[i] < 0 ? -1 : group_of(i / top_k, topk_ids[i]); });
  std::copy(topk_ids, topk_ids + num_pairs, kept_ids);
  std::vector<int64_t> room(num_sequences * num_experts);
  parallel_for(num_threads, std::ssize(room), [&](int64_t g, int) {
    const int64_t size = groups.size(g), limit = limits[g / num_experts];
    room[g] = std::max<int64_t>(0, limit - size);
    if (size <= limit) return;
    int32_t* pairs = groups.begin(g);
    if (limit > 0 && args.options.drop != Drop::kOrder) {  // they are in that order
      std::nth_element(pairs, pairs + limit, pairs + size, precedence.before());
    }
    for (int64_t i = limit; i < size; ++i) kept_ids[pairs[i]] = -1;
  });
  const int64_t rounds = args.scores.defined() ? args.options.candidates - top_k : 0;
  if (rounds <= 0) return;

  const auto is_lost = [&](int64_t i) { return kept_ids[i] < 0 && topk_ids[i] >= 0; };
  const auto first_lost = [&](int64_t token) -> int64_t {  // -1 if none is
    for (int64_t i = token * top_k; i < (token + 1) * top_k; ++i) {
      if (is_lost(i)) return i;
    }
    return -1;
  };
  std::vector<Waiting> waiting;
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (first_lost(t) >= 0) waiting.push_back({.token = static_cast<int32_t>(t)});
  }
  std::vector<int64_t> heaps(waiting.size() * num_experts);
  parallel_for_ranges(num_threads, std::ssize(waiting), grain_rows(num_experts), [&](int64_t begin, int64_t end, int) {
    for (int64_t i = begin; i < end; ++i) {
      Waiting& w = waiting[i];
      w.heap = heaps.data() + i * num_experts;
      w.candidates = make_candidates(args.scores.as<const float>() + w.token * num_experts, num_experts,
                                     topk_ids + w.token * top_k, top_k, w.heap);
    }
  });

  std::vector<int32_t> offered(num_tokens);  // the expert to which a token offers a choice
  std::vector<int64_t> offers;
  for (int64_t round = 0; round < rounds && !waiting.empty(); ++round) {
    offers.clear();
    for (Waiting& w : waiting) {
      if (w.candidates == 0) continue;
      std::pop_heap(w.heap, w.heap + w.candidates);
      const int32_t expert = index_of(w.heap[--w.candidates]);
      if (room[group_of(w.token, expert)] == 0) continue;
      offered[w.token] = expert;
      offers.push_back(first_lost(w.token));
    }
    std::sort(offers.begin(), offers.end(), precedence.before());
    for (const int64_t i : offers) {
      int64_t& places = room[group_of(i / top_k, offered[i / top_k])];
      if (places == 0) continue;
      --places;
      kept_ids[i] = offered[i / top_k];
    }
    std::erase_if(waiting, [&](const Waiting& w) { return w.candidates == 0 || first_lost(w.token) < 0; });
  }
}

}  // namespace switchgear::cpu
