// SPDX-License-Identifier: BSD-3-Clause
// assign_capped: the scores by which experts choose tokens if a token may have at most `cap` experts.
//
//   work 2·rounds + 1 charges over T·E values, 3 to 6 passes each, one exponential per element and pass; the values of a
//   sequence are stored twice, mostly in L2; bound by instructions
//
//   log A = S/λ - charge_e - charge_t. Expert charges make Σ_t min(1, A) = limits[b]; token charges, which are not negative,
//   make Σ_e min(1, A) <= cap. They alternate until a sequence settles, at most `iterations` times, and expert charges are
//   computed once more at the end. Sequences settle apart, so none depends on another.
//
// The charge c of a row v solves Σ min(1, exp(v - c)) = total. In exp(-c) this sum is concave and piecewise linear, so
// Newton's method approaches the solution from one side. It ends there exactly once no more values reach 1: with j values at
// 1, c = log Σ_others exp(v) - log(total - j). It starts at the charge of the round before. Exponentials are relative to the
// largest of the others, so values may be any distance apart.
//
// Values are stored by token and by expert of a sequence, so both kinds of rows are contiguous. Every row has a fixed order
// of sums (rows.inl): float32 for up to 512 values, float64 for the rest. So threads and ISAs change nothing. Values that are
// not finite, or too large for a difference, count as ±1.8e19.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "experts.h"
#include "grouping.h"
#include "kernels.h"
#include "log.h"
#include "ops.h"
#include "ranking.h"
#include "rows.h"
#include "scores.h"
#include "threads.h"

namespace switchgear::cpu {
namespace {

const float kHuge = static_cast<float>(std::sqrt(static_cast<double>(kFloatMax)));
constexpr double kTiny = std::numeric_limits<float>::min();  // replaces a total of 0, which has no logarithm
constexpr float kUnknown = std::numeric_limits<float>::infinity();
constexpr int64_t kTransposed = 16;  // tokens and experts of a square

// The lowest charge found in (low, high] that leaves fewer than `total` values at 1. It is at most 1 above a charge that does
// not, unless the range exceeds the precision of float32. `low` leaves too many, or is below all values.
float first_charge(const RowKernels& k, const float* values, int64_t n, double total, float low, float high) {
  while (high - low > 1.0f) {
    const float middle = low + (high - low) / 2;
    if (middle <= low || middle >= high) break;
    (k.reaching(values, n, middle).count < total ? high : low) = middle;
  }
  return high;
}

// The charge c >= lowest of a row of n values, 0 < total <= n. `start` is an estimate, or kUnknown.
float charge_of(const RowKernels& k, const float* values, int64_t n, double total, float lowest, float start) {
  float charge = start;
  Reaching at{};
  if (start == kUnknown) {
    const auto [low, high] = std::minmax_element(values, values + n);
    charge = first_charge(k, values, n, total, *low, std::nextafter(*high, kUnknown));
  } else if (at = k.reaching(values, n, start); at.count >= total) {
    float low = start, step = 1.0f;
    for (; k.reaching(values, n, charge).count >= total; step *= 2) {
      low = charge;
      charge += step;
    }
    charge = first_charge(k, values, n, total, low, charge);
  }
  at = k.reaching(values, n, charge);
  for (float last = kUnknown;; last = charge) {
    charge = static_cast<float>(at.next + log_f64(k.sum_of_powers(values, n, at.next)) - log_f64(total - at.count));
    // The first step may go up, all others go down. Another step up means that rounding made `last` one of m equal values;
    // then `charge` has m times the error.
    if (charge > last) return last;
    if (charge <= lowest) return lowest;
    const Reaching next = k.reaching(values, n, charge);
    if (next.count == at.count || next.count >= total) return charge;
    at = next;
  }
}

struct Assignment {
  Assignment(const AssignCappedArgs& args, const Context& context)
      : args(args),
        kernels(context.kernels),
        rows(context.rows),
        num_threads(context.num_threads),
        num_tokens(args.values.shape[0]),
        num_experts(args.values.shape[1]),
        num_sequences(args.limits.shape[0]),
        sequences(by_sequence(args.sequence_ids.as<const int32_t>(), num_tokens, num_sequences)),
        sequence(num_tokens),
        settled(num_sequences),
        by_token(num_tokens * num_experts) {
    for (int64_t b = 0; b < num_sequences; ++b) {
      std::fill(sequence.begin() + sequences.offsets[b], sequence.begin() + sequences.offsets[b + 1], b);
    }
  }

  int64_t grain() const { return grain_rows(num_experts); }

  // Reads S/λ, tokens in the order of their sequences.
  void read() {
    parallel_for_ranges(num_threads, num_tokens, grain(), [&](int64_t begin, int64_t end, int) {
      for (int64_t i = begin; i < end; ++i) {
        float* row = by_token.data() + i * num_experts;
        kernels.load_row(row, row_of(args.values, sequences.members[i]), args.values.dtype, num_experts);
        for (int64_t e = 0; e < num_experts; ++e) {
          row[e] = std::clamp(sanitise(row[e]) / static_cast<float>(args.entropy), -kHuge, kHuge);
        }
      }
    });
  }

  // The same by expert: sequence b has E rows of its length from offsets[b]·E on.
  void transpose() {
    by_expert.resize(num_tokens * num_experts);
    of_expert.assign(num_sequences * num_experts, kUnknown);
    of_token.assign(num_tokens, 0.0f);
    moved.assign(num_tokens, 0.0f);
    const int64_t blocks = ceil_div(num_experts, kTransposed);
    parallel_for(num_threads, num_sequences * blocks, [&](int64_t task, int) {
      const int64_t b = task / blocks, first = task % blocks * kTransposed, n = sequences.size(b);
      const int64_t last = std::min(first + kTransposed, num_experts), begin = sequences.offsets[b];
      const float* from = by_token.data() + begin * num_experts;
      float* to = by_expert.data() + begin * num_experts;
      for (int64_t i = 0; i < n; i += kTransposed) {
        for (int64_t e = first; e < last; ++e) {
          for (int64_t t = i; t < std::min(i + kTransposed, n); ++t) to[e * n + t] = from[t * num_experts + e];
        }
      }
    });
  }

  void charge_experts() {
    const int32_t* limits = args.limits.as<const int32_t>();
    parallel_for_ranges(num_threads, num_sequences * num_experts, 1, [&](int64_t row, int64_t, int) {
      const int64_t b = row / num_experts, e = row % num_experts, n = sequences.size(b);
      if (n == 0 || settled[b]) return;
      const int64_t begin = sequences.offsets[b];
      const float* values = by_expert.data() + begin * num_experts + e * n;
      std::vector<float> charged(n);
      for (int64_t i = 0; i < n; ++i) charged[i] = values[i] - of_token[begin + i];
      const double total = std::max(static_cast<double>(std::min<int64_t>(limits[b], n)), kTiny);
      of_expert[row] = charge_of(rows, charged.data(), n, total, -kUnknown, of_expert[row]);
    });
  }

  // Calls body(token, its row minus the expert charges) for the tokens of sequences that have not settled.
  template <typename Body>
  void for_each_token(Body&& body) {
    parallel_for_ranges(num_threads, num_tokens, grain(), [&](int64_t begin, int64_t end, int) {
      std::vector<float> charged(num_experts);
      for (int64_t i = begin; i < end; ++i) {
        if (settled[sequence[i]]) continue;
        const float *values = by_token.data() + i * num_experts, *charges = &of_expert[sequence[i] * num_experts];
        for (int64_t e = 0; e < num_experts; ++e) charged[e] = values[e] - charges[e];
        body(i, charged);
      }
    });
  }

  void charge_tokens() {
    const auto cap = static_cast<double>(args.cap);
    for_each_token([&](int64_t i, const std::vector<float>& charged) {
      const float charge = charge_of(rows, charged.data(), num_experts, cap, 0.0f, of_token[i]);
      moved[i] = std::abs(charge - of_token[i]);
      of_token[i] = charge;
    });
  }

  // A sequence settles after a round that moved none of its token charges by more than `tolerance`. Whether all have.
  bool settle() {
    const auto stays = [&](float distance) { return distance <= args.tolerance; };
    for (int64_t b = 0; b < num_sequences; ++b) {
      const auto begin = moved.begin() + sequences.offsets[b], end = moved.begin() + sequences.offsets[b + 1];
      settled[b] = std::all_of(begin, end, stays);
    }
    return std::all_of(settled.begin(), settled.end(), [](bool is) { return is; });
  }

  void write() {
    for_each_token([&](int64_t i, const std::vector<float>& charged) {
      float* out = args.assignment.as<float>() + sequences.members[i] * num_experts;
      for (int64_t e = 0; e < num_experts; ++e) out[e] = charged[e] - of_token[i];
    });
  }

  const AssignCappedArgs& args;
  const Kernels& kernels;
  const RowKernels& rows;
  int num_threads;
  int64_t num_tokens, num_experts, num_sequences;
  Grouping sequences;
  std::vector<int64_t> sequence;  // of token members[i]
  std::vector<char> settled;      // of each sequence
  std::vector<float> by_token, by_expert;
  std::vector<float> of_expert, of_token;  // charges
  std::vector<float> moved;                // the last change of a token's charge
};

}  // namespace

void assign_capped(const AssignCappedArgs& args, const Context& context) {
  Assignment a(args, context);
  a.read();
  a.transpose();
  if (args.cap >= a.num_experts) {  // a token may have all experts
    std::fill(a.of_expert.begin(), a.of_expert.end(), 0.0f);
  } else {
    for (int64_t i = 0; i < args.iterations; ++i) {
      a.charge_experts();
      a.charge_tokens();
      if (a.settle()) break;
    }
    std::fill(a.settled.begin(), a.settled.end(), false);
    a.charge_experts();
  }
  a.write();
}

}  // namespace switchgear::cpu
