// SPDX-License-Identifier: BSD-3-Clause
// assign_balanced: one expert for each token and equally many tokens for each expert, by an auction.
//
//   work about 3·E flop per bid, T·(1 to max_iterations) bids; bound by instructions
//
// In each iteration every unassigned token bids for the expert with the highest value - price. It offers the price, plus its
// lead over the second best, plus eps. Each expert that got bids keeps the best ones; once it is full, its price is its
// lowest bid. Bids are computed in parallel and resolved in order, so the result does not depend on threads. A shop is an
// expert of one sequence. Float operations run in the written order: compiled with -ffp-contract=off.
#include <algorithm>
#include <cmath>
#include <vector>

#include "grouping.h"
#include "ops.h"
#include "ranking.h"
#include "scores.h"
#include "threads.h"

namespace switchgear::cpu {
namespace {

// Values, differences and prices stay finite below these.
const float kHuge = static_cast<float>(std::sqrt(static_cast<double>(kFloatMax)));
const float kNeverPaid = static_cast<float>(1e4 * std::sqrt(static_cast<double>(kFloatMax)));

// The range of the finite values of a sequence. +Inf is replaced by above(), -Inf and NaN by below().
struct Bounds {
  float low = kHuge, high = -kHuge;

  float spread() const { return std::max(high - low, 0.0f); }
  float above() const { return high >= low ? (high + spread()) + 1.0f : 1.0f; }
  float below() const { return high >= low ? (low - spread()) - 1.0f : 0.0f; }
};

float clamp(float v) { return std::min(std::max(v, -kHuge), kHuge); }

struct Bid {
  int64_t shop;
  float paid;
};

struct Auction {
  Auction(const AssignBalancedArgs& args, int num_threads)
      : num_threads(num_threads),
        num_tokens(args.values.shape[0]),
        num_experts(args.values.shape[1]),
        num_sequences(args.num_sequences),
        sequence_ids(args.sequence_ids.as<const int32_t>()),
        values(num_tokens * num_experts),
        step(num_sequences),
        most(num_sequences),
        places(num_sequences * num_experts),
        price(num_sequences * num_experts),
        holders(num_sequences * num_experts) {}

  int64_t sequence(int64_t token) const { return sequence_ids != nullptr ? sequence_ids[token] : 0; }
  int64_t grain() const { return grain_rows(num_experts); }

  void read(const float* given, double eps) {
    std::vector<Bounds> bounds(num_sequences);
    std::vector<int64_t> sizes(num_sequences);
    for (int64_t t = 0; t < num_tokens; ++t) {
      Bounds& b = bounds[sequence(t)];
      ++sizes[sequence(t)];
      for (int64_t e = 0; e < num_experts; ++e) {
        const float v = given[t * num_experts + e];
        if (!std::isfinite(v)) continue;
        b.low = std::min(b.low, clamp(v));
        b.high = std::max(b.high, clamp(v));
      }
    }
    for (int64_t t = 0; t < num_tokens; ++t) {
      const Bounds& b = bounds[sequence(t)];
      for (int64_t i = t * num_experts; i < (t + 1) * num_experts; ++i) {
        values[i] = std::isfinite(given[i]) ? clamp(given[i]) : given[i] > 0 ? b.above() : b.below();
      }
    }
    for (int64_t b = 0; b < num_sequences; ++b) {
      step[b] = eps < 0 ? std::max(bounds[b].spread() / 50.0f, 1e-4f) : static_cast<float>(eps);
      most[b] = 4.0f * bounds[b].spread() + 1.0f;
      for (int64_t e = 0; e < num_experts; ++e) {
        const int64_t shop = b * num_experts + e;
        places[shop] = sizes[b] / num_experts + (e < sizes[b] % num_experts);
        price[shop] = places[shop] > 0 ? 0.0f : kNeverPaid;
      }
    }
  }

  Bid bid_of(int64_t token, std::vector<float>& worth) const {
    const int64_t first = sequence(token) * num_experts;
    const float* value = values.data() + token * num_experts;
    for (int64_t e = 0; e < num_experts; ++e) worth[e] = value[e] - price[first + e];
    const float best = max_of(worth.data(), num_experts);
    const auto at = std::find(worth.begin(), worth.end(), best) - worth.begin();
    worth[at] = -kFloatMax;
    const float second = num_experts > 1 ? max_of(worth.data(), num_experts) : best;
    const float lead = std::min(best - second, most[sequence(token)]);  // the second may have no places
    return {.shop = first + at, .paid = (price[first + at] + lead) + step[sequence(token)]};
  }

  // The tokens of `waiting` bid; those still unassigned stay in it.
  void iterate(std::vector<int32_t>& waiting) {
    std::vector<Bid> bids(waiting.size());
    parallel_for_ranges(num_threads, std::ssize(waiting), grain(), [&](int64_t begin, int64_t end, int) {
      std::vector<float> worth(num_experts);
      for (int64_t i = begin; i < end; ++i) bids[i] = bid_of(waiting[i], worth);
    });
    std::vector<int64_t> busy;
    for (size_t i = 0; i < bids.size(); ++i) {
      std::vector<int64_t>& held = holders[bids[i].shop];
      held.push_back(key_of(bids[i].paid, waiting[i]));
      busy.push_back(bids[i].shop);
    }
    std::sort(busy.begin(), busy.end());
    busy.erase(std::unique(busy.begin(), busy.end()), busy.end());
    waiting.clear();
    for (const int64_t shop : busy) {
      std::vector<int64_t>& held = holders[shop];
      const int64_t full = places[shop];
      if (std::ssize(held) > full) {
        std::nth_element(held.begin(), held.begin() + full, held.end(), std::greater<>());
        for (size_t i = full; i < held.size(); ++i) waiting.push_back(index_of(held[i]));
        held.resize(full);
      }
      if (full > 0 && std::ssize(held) == full) price[shop] = value_of(*std::min_element(held.begin(), held.end()));
    }
  }

  // Gives the remaining tokens the remaining places, both in ascending order.
  void finish(std::vector<int32_t>& waiting, int32_t* expert_ids) {
    for (int64_t shop = 0; shop < std::ssize(holders); ++shop) {
      const int64_t expert = shop % num_experts;
      for (const int64_t key : holders[shop]) expert_ids[index_of(key)] = static_cast<int32_t>(expert);
    }
    std::sort(waiting.begin(), waiting.end());
    std::vector<int64_t> next(num_sequences);  // the first expert that may have a free place
    for (const int32_t t : waiting) {
      const int64_t first = sequence(t) * num_experts;
      int64_t& e = next[sequence(t)];
      while (std::ssize(holders[first + e]) == places[first + e]) ++e;
      holders[first + e].push_back(t);
      expert_ids[t] = static_cast<int32_t>(e);
    }
  }

  int num_threads;
  int64_t num_tokens, num_experts, num_sequences;
  const int32_t* sequence_ids;                // null: all tokens are one sequence
  std::vector<float> values;                  // [T,E]
  std::vector<float> step, most;              // [B]: eps, and the upper bound of a lead
  std::vector<int64_t> places;                // [B·E]
  std::vector<float> price;                   // [B·E]
  std::vector<std::vector<int64_t>> holders;  // [B·E]: keys of (bid, token)
};

}  // namespace

void assign_balanced(const AssignBalancedArgs& args, const Context& context) {
  Auction auction(args, context.num_threads);
  auction.read(args.values.as<const float>(), args.eps);
  std::vector<int32_t> waiting(auction.num_tokens);
  for (int64_t t = 0; t < auction.num_tokens; ++t) waiting[t] = static_cast<int32_t>(t);
  for (int64_t i = 0; i < args.max_iterations && !waiting.empty(); ++i) auction.iterate(waiting);
  auction.finish(waiting, args.expert_ids.as<int32_t>());
}

}  // namespace switchgear::cpu
