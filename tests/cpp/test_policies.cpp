// SPDX-License-Identifier: BSD-3-Clause
// The ops of routing policies against their definitions, by full sorts and one offer at a time. Compiled with
// -ffp-contract=off, since bids must have the same bits.
#include <array>
#include <cfloat>
#include <numeric>

#include "bounded.h"
#include "cases.h"
#include "cpu/log.h"
#include "cpu/ranking.h"

namespace switchgear::test {
namespace {

struct Sizes {
  int64_t T, E, K, B;
};
constexpr Sizes kSizes[] = {{0, 4, 2, 1},   {1, 1, 1, 1},    {5, 3, 2, 2},   {64, 8, 2, 1},
                            {37, 33, 5, 4}, {300, 60, 6, 3}, {900, 17, 3, 1}};

float sane(float v) { return std::isnan(v) || v < -FLT_MAX ? -FLT_MAX : std::min(v, FLT_MAX); }

// Kinds 1 to 3: few distinct values, among them zeros of both signs; values that are not finite; any bits.
Array wild_array(Random& random, std::vector<int64_t> shape, int64_t kind) {
  Array array(DType::kFloat32, std::move(shape));
  const float specials[] = {NAN, INFINITY, -INFINITY, FLT_MAX, -FLT_MAX, 0.0f, -0.0f, 1e-42f};
  array.fill([&](int64_t) {
    switch (kind) {
      case 1: return std::array{-1.0f, -0.0f, 0.0f, 1.0f}[static_cast<size_t>(random.below(4))];
      case 2: return random.below(3) == 0 ? specials[random.below(std::ssize(specials))] : random.normal();
      case 3: return std::bit_cast<float>(static_cast<uint32_t>(random.bits()));
      default: return random.normal();
    }
  });
  return array;
}

Array random_ids(Random& random, std::vector<int64_t> shape, int64_t low, int64_t high) {
  Array array(DType::kInt32, std::move(shape));
  array.fill([&](int64_t) { return low + random.below(high - low); });
  return array;
}

// Calls body(sizes, kind, random) for every combination, named in `note`.
template <typename Body>
void for_each_size(Body&& body) {
  for (const Sizes& s : kSizes) {
    for (int64_t kind = 0; kind < 4; ++kind) {
      note = join("T=", s.T, " E=", s.E, " kind ", kind);
      Random random(static_cast<uint64_t>(s.T * 7 + kind));
      body(s, kind, random);
    }
  }
  note.clear();
}

// One sequence needs no ids.
TensorView optional(const Array& sequence_ids, int64_t num_sequences) {
  return num_sequences == 1 ? TensorView{} : sequence_ids.view();
}

std::vector<int64_t> tokens_of(const Array& sequence_ids, int64_t b) {
  std::vector<int64_t> tokens;
  for (int64_t t = 0; t < sequence_ids.size(0); ++t) {
    if (sequence_ids.id(t) == b) tokens.push_back(t);
  }
  return tokens;
}

// ---- column_topk -------------------------------------------------------------------------------------------------------

TEST(column_topk_matches_full_sorts) {
  for_each_size([](const Sizes& s, int64_t kind, Random& random) {
    const Array values = wild_array(random, {s.T, s.E}, kind), sequence_ids = random_ids(random, {s.T}, 0, s.B);
    const Array limits = random_ids(random, {s.B}, 0, s.T / s.B + 2);
    std::vector<std::vector<int32_t>> taken(static_cast<size_t>(s.T));
    for (int32_t e = 0; e < s.E; ++e) {
      for (int64_t b = 0; b < s.B; ++b) {
        std::vector<int64_t> tokens = tokens_of(sequence_ids, b);
        std::stable_sort(tokens.begin(), tokens.end(),
                         [&](int64_t i, int64_t j) { return sane(values(i, e)) > sane(values(j, e)); });
        for (int64_t i = 0; i < std::min<int64_t>(std::ssize(tokens), limits.id(b)); ++i) {
          taken[static_cast<size_t>(tokens[static_cast<size_t>(i)])].push_back(e);
        }
      }
    }
    Array got(DType::kInt32, {s.T, s.E});
    const auto call = [&](Execution exec) {
      column_topk({.values = values, .sequence_ids = optional(sequence_ids, s.B), .limits = limits, .topk_ids = got},
                  exec);
    };
    for_each_isa({&got}, call, [&] {
      for (int64_t t = 0; t < s.T; ++t) {
        for (int64_t i = 0; i < s.E; ++i) {
          const std::vector<int32_t>& row = taken[static_cast<size_t>(t)];
          CHECK(got.id(t, i) == (i < std::ssize(row) ? row[static_cast<size_t>(i)] : -1), "token ", t);
        }
      }
    });
  });
}

// ---- route_dynamic -----------------------------------------------------------------------------------------------------

// The prefix of route's choice that reaches the mass, or the scores. With a bias scores do not descend, so experts below the
// threshold are left out instead.
TEST(route_dynamic_is_a_prefix_of_route) {
  for_each_size([](const Sizes& s, int64_t kind, Random& random) {
    const Array logits = wild_array(random, {s.T, s.E}, kind), bias = wild_array(random, {s.E}, 0);
    for (int variant = 0; variant < 8; ++variant) {
      const bool biased = variant % 2 == 1;
      const auto function = variant / 2 % 2 == 0 ? ScoreFunction::kSoftmax : ScoreFunction::kSigmoid;
      const TensorView selection_bias = biased ? bias.view() : TensorView{};
      const RouteDynamicOptions o{.score_function = function,
                                  .min_experts = random.below(s.E),
                                  .top_p = random.unit(),
                                  .threshold = static_cast<float>(random.unit() / 4),
                                  .normalize = variant >= 4,
                                  .scale = variant >= 4 ? 1.5f : 1.0f};
      Array ids(DType::kInt32, {s.T, s.E}), weights(DType::kFloat32, {s.T, s.E});
      Array all_ids = ids, all_weights = weights;
      route({.router_logits = logits,
             .selection_bias = selection_bias,
             .options = {.top_k = s.E, .score_function = function},
             .topk_ids = all_ids,
             .topk_weights = all_weights});
      const auto call = [&](Execution exec) {
        route_dynamic({.router_logits = logits,
                       .selection_bias = selection_bias,
                       .options = o,
                       .topk_ids = ids,
                       .topk_weights = weights},
                      exec);
      };
      for_each_isa({&ids, &weights}, call, [&] {
        for (int64_t t = 0; t < s.T; ++t) {
          std::vector<int64_t> chosen;
          double mass = 0.0, sum = 0.0;
          for (int64_t k = 0; k < s.E && (k < o.min_experts || mass < o.top_p); ++k) {
            mass += all_weights(t, k);
            if (k >= o.min_experts && !(all_weights(t, k) >= o.threshold)) continue;
            chosen.push_back(k);
            sum += all_weights(t, k);
          }
          for (int64_t i = 0; i < s.E; ++i) {
            const bool is_chosen = i < std::ssize(chosen);
            const int64_t k = is_chosen ? chosen[static_cast<size_t>(i)] : 0;
            CHECK(ids.id(t, i) == (is_chosen ? all_ids.id(t, k) : -1), "variant ", variant, " choice ", i);
            double want = is_chosen ? static_cast<double>(all_weights(t, k)) : 0.0;
            if (o.normalize) want = want / (sum + 1e-20) * 1.5;
            const double roundings = o.normalize ? static_cast<double>(std::ssize(chosen) + 3) : 0.0;
            CHECK_CLOSE(weights(t, i), (Bounded{want, roundings * (kUnit * want + 0x1p-126)}), "variant ", variant);
          }
        }
      });
    }
  });
}

// ---- fit_capacity ------------------------------------------------------------------------------------------------------

struct Capacity {
  const Array& ids;
  const Array& priorities;
  const Array& scores;
  const Array& sequence_ids;
  const Array& limits;
  FitCapacityOptions options;

  bool before(int64_t i, int64_t j) const {
    const int64_t K = ids.size(1);
    switch (options.drop) {
      case Drop::kOrder: return i < j;
      case Drop::kReverse: return i > j;
      case Drop::kChoice: return std::pair(i % K, i / K) < std::pair(j % K, j / K);
      case Drop::kPriority: break;
    }
    const float a = sane(priorities(i / K, i % K)), b = sane(priorities(j / K, j % K));
    return a != b ? a > b : i < j;
  }

  // Accepts one offer (choice, expert) at a time.
  void accept(std::vector<std::pair<int64_t, int32_t>> offers, std::vector<int64_t>& taken, Array& kept) const {
    const int64_t K = ids.size(1);
    std::sort(offers.begin(), offers.end(), [&](const auto& a, const auto& b) { return before(a.first, b.first); });
    for (const auto& [choice, expert] : offers) {
      const int64_t b = sequence_ids.id(choice / K);
      int64_t& count = taken[static_cast<size_t>(b * options.num_experts + expert)];
      if (count >= limits.id(b)) continue;
      ++count;
      kept.set_id(expert, choice / K, choice % K);
    }
  }

  Array run(bool reroute) const {
    const int64_t T = ids.size(0), K = ids.size(1), E = options.num_experts;
    std::vector<int64_t> taken(static_cast<size_t>(limits.size(0) * E));
    Array kept(DType::kInt32, {T, K});
    std::vector<std::pair<int64_t, int32_t>> offers;
    for (int64_t i = 0; i < T * K; ++i) {
      if (ids.id(i / K, i % K) >= 0) offers.emplace_back(i, ids.id(i / K, i % K));
    }
    accept(offers, taken, kept);
    for (int64_t round = 0; reroute && round < options.candidates - K; ++round) {
      offers.clear();
      for (int64_t t = 0; t < T; ++t) {
        std::vector<int32_t> others;
        for (int32_t e = 0; e < E; ++e) {
          bool had = !(scores(t, e) > 0);
          for (int64_t k = 0; k < K; ++k) had |= ids.id(t, k) == e;
          if (!had) others.push_back(e);
        }
        std::stable_sort(others.begin(), others.end(),
                         [&](int32_t a, int32_t b) { return sane(scores(t, a)) > sane(scores(t, b)); });
        for (int64_t k = 0; k < K && round < std::ssize(others); ++k) {
          if (ids.id(t, k) < 0 || kept.id(t, k) >= 0) continue;
          offers.emplace_back(t * K + k, others[static_cast<size_t>(round)]);
          break;
        }
      }
      accept(offers, taken, kept);
    }
    return kept;
  }
};

TEST(fit_capacity_matches_one_offer_after_the_other) {
  for_each_size([](const Sizes& s, int64_t kind, Random& random) {
    if (s.T > 100) return;
    Array ids = make_ids(random, {"", s.T, 1, 1, s.E, s.K});
    for (int64_t i = 0; i < s.T * s.K; ++i) {
      if (random.below(5) == 0) ids.set_id(-1, i / s.K, i % s.K);
    }
    const Array priorities = wild_array(random, {s.T, s.K}, kind), scores = wild_array(random, {s.T, s.E}, kind);
    const Array sequence_ids = random_ids(random, {s.T}, 0, s.B);
    const Array limits = random_ids(random, {s.B}, 0, 2 * s.T * s.K / (s.E * s.B) + 2);
    for (const Drop drop : {Drop::kOrder, Drop::kReverse, Drop::kChoice, Drop::kPriority}) {
      for (const bool reroute : {false, true}) {
        const FitCapacityOptions options{.num_experts = s.E, .drop = drop, .candidates = s.E - random.below(2)};
        const Array want = Capacity{ids, priorities, scores, sequence_ids, limits, options}.run(reroute);
        Array got(DType::kInt32, {s.T, s.K});
        const auto call = [&](Execution exec) {
          fit_capacity({.topk_ids = ids,
                        .priorities = priorities,
                        .scores = reroute ? scores.view() : TensorView{},
                        .sequence_ids = optional(sequence_ids, s.B),
                        .limits = limits,
                        .options = options,
                        .kept_ids = got},
                       exec);
        };
        for_each_isa({&got}, call, [&] { CHECK(same_bits(got, want), static_cast<int>(drop), reroute); });
      }
    }
  });
}

// ---- assign_balanced ---------------------------------------------------------------------------------------------------

TEST(assign_balanced_fills_every_place) {
  for_each_size([](const Sizes& s, int64_t kind, Random& random) {
    const Array values = wild_array(random, {s.T, s.E}, kind), sequence_ids = random_ids(random, {s.T}, 0, s.B);
    for (const int64_t iterations : {0, 3, 100}) {
      Array got(DType::kInt32, {s.T});
      const auto call = [&](Execution exec) {
        assign_balanced({.values = values,
                         .sequence_ids = optional(sequence_ids, s.B),
                         .num_sequences = s.B,
                         .max_iterations = iterations,
                         .expert_ids = got},
                        exec);
      };
      for_each_isa({&got}, call, [&] {
        for (int64_t b = 0; b < s.B; ++b) {
          const std::vector<int64_t> tokens = tokens_of(sequence_ids, b);
          std::vector<int64_t> loads(static_cast<size_t>(s.E));
          for (const int64_t t : tokens) ++loads[static_cast<size_t>(got.id(t))];
          for (int64_t e = 0; e < s.E; ++e) {
            CHECK(loads[static_cast<size_t>(e)] == std::ssize(tokens) / s.E + (e < std::ssize(tokens) % s.E));
          }
        }
      });
    }
  });
}

// Once the auction has ended, no exchange of two tokens gains more than 2·eps: eps-complementary slackness implies it.
TEST(assign_balanced_is_stable) {
  Random random(3);
  const int64_t T = 60, E = 6;
  const double eps = 0.01;
  const Array values = random_array(random, DType::kFloat32, {T, E});
  Array got(DType::kInt32, {T});
  assign_balanced({.values = values, .eps = eps, .max_iterations = 100'000, .expert_ids = got});
  for (int64_t i = 0; i < T; ++i) {
    for (int64_t j = 0; j < T; ++j) {
      const int32_t a = got.id(i), b = got.id(j);
      CHECK(values(i, b) + values(j, a) <= values(i, a) + values(j, b) + 2 * eps + 1e-5);
    }
  }
}

// Two tokens and two experts. +Inf counts as more than all finite values of the sequence, NaN and -Inf as less, also where no
// value is finite.
TEST(assign_balanced_ranks_what_is_not_finite) {
  const auto experts = [](std::array<float, 4> values) {
    Array tokens(DType::kFloat32, {2, 2}), got(DType::kInt32, {2});
    tokens.fill([&](int64_t i) { return values[static_cast<size_t>(i)]; });
    assign_balanced({.values = tokens, .expert_ids = got}, {1});
    return std::pair(got.id(0), got.id(1));
  };
  CHECK(experts({5, 0, INFINITY, 100}) == std::pair(1, 0));
  CHECK(experts({0, 5, 100, INFINITY}) == std::pair(0, 1));
  CHECK(experts({-5, 0, -INFINITY, -100}) == std::pair(0, 1));
  CHECK(experts({0, -5, -100, NAN}) == std::pair(1, 0));
  CHECK(experts({INFINITY, NAN, -INFINITY, INFINITY}) == std::pair(0, 1));
  CHECK(experts({NAN, INFINITY, INFINITY, -INFINITY}) == std::pair(1, 0));
}

// ---- assign_capped -----------------------------------------------------------------------------------------------------

// Three units of the last place, relative 2^-52 each. Random bits have all exponents; others are near 1 and near √½.
TEST(log_is_accurate) {
  Random random(3);
  for (int i = 0; i < 200000; ++i) {
    const uint64_t bits = static_cast<uint64_t>(random.bits()) << 32 | static_cast<uint32_t>(random.bits());
    const double unit = std::ldexp(static_cast<double>(bits >> 11), -53), small = std::ldexp(unit, -(i / 3 % 50));
    const double any = std::bit_cast<double>(bits % 0x7fe0000000000000 + 0x0010000000000000);
    const double x = i % 3 == 0 ? any : i % 3 == 1 ? 1.0 + small : std::sqrt(0.5) * (1.0 - small / 2);
    const double want = std::log(x), got = cpu::log_f64(x);
    CHECK(std::abs(got - want) <= std::abs(want) * 0x3p-52, "log ", x, ": ", want, ", got ", got);
  }
  CHECK(cpu::log_f64(1.0) == 0.0);
}

// The c with Σ min(1, exp(v - c)) = total <= v.size(): the j largest are at 1, for the first j for which no other exceeds 1.
double charge_by_sorting(std::vector<double> v, double total) {
  std::sort(v.begin(), v.end());
  std::vector<double> rest;  // log Σ exp(v) of the smallest i + 1
  for (const double value : v) {
    const double before = rest.empty() ? -INFINITY : rest.back(), most = std::max(before, value);
    rest.push_back(most + std::log(std::exp(before - most) + std::exp(value - most)));
  }
  for (double j = 0.0;; ++j) {
    const double charge = rest.back() - std::log(total - j);
    if (v.back() <= charge || v.size() == 1 || j + 1 >= total) return charge;
    v.pop_back();
    rest.pop_back();
  }
}

// log A of one sequence in float64 if cap < E, and the possible error of float32.
struct Capped {
  static constexpr int kRounds = 3;
  std::vector<std::vector<double>> log_a;  // of each token
  double largest = 0.0;                    // magnitude of a value or a charge

  Capped(const Array& values, const std::vector<int64_t>& tokens, double total, int64_t cap, double entropy) {
    const auto num_experts = static_cast<size_t>(values.size(1));
    std::vector<std::vector<double>> worth;
    for (const int64_t t : tokens) {
      worth.emplace_back();
      for (int64_t e = 0; e < values.size(1); ++e) worth.back().push_back(noted(values(t, e) / entropy));
    }
    std::vector<double> of_expert(num_experts), of_token(tokens.size());
    for (int round = 0; !tokens.empty() && round <= kRounds; ++round) {
      for (size_t e = 0; e < num_experts; ++e) {
        std::vector<double> charged;
        for (size_t i = 0; i < tokens.size(); ++i) charged.push_back(worth[i][e] - of_token[i]);
        of_expert[e] = noted(charge_by_sorting(charged, total));
      }
      for (size_t i = 0; i < tokens.size() && round < kRounds; ++i) {
        std::vector<double> charged;
        for (size_t e = 0; e < num_experts; ++e) charged.push_back(worth[i][e] - of_expert[e]);
        of_token[i] = noted(std::max(0.0, charge_by_sorting(charged, static_cast<double>(cap))));
      }
    }
    log_a = worth;
    for (size_t i = 0; i < tokens.size(); ++i) {
      for (size_t e = 0; e < num_experts; ++e) log_a[i][e] -= of_expert[e] + of_token[i];
    }
  }

  double noted(double v) {
    largest = std::max(largest, std::abs(v));
    return v;
  }

  // A charge is made of differences, which are rounded, and is rounded itself; neither moves it by more than the numbers
  // move. Its sum of powers has 32 + 4 additions in sequence, an ulp of exp, and rounded exponents, whose mean is at most log
  // n: in all fewer than 48 roundings.
  double error_of_charge() const { return kUnit * ((2 + 1) * largest + 48); }
  double error_of_differences() const { return kUnit * (2 + 3) * largest; }
  // An element has the charges of a token, after 2·kRounds that each add their error, and of an expert, after one more.
  double error() const { return (4 * kRounds + 1) * error_of_charge() + error_of_differences(); }
  // Relative error of a sum over an expert's tokens: the last charge made it exact.
  double error_of_sum() const { return std::expm1(error_of_charge() + error_of_differences()); }
};

TEST(assign_capped_matches_full_sorts) {
  for_each_size([](const Sizes& s, int64_t kind, Random& random) {
    if (kind > 1) return;
    const Array values = wild_array(random, {s.T, s.E}, kind), sequence_ids = random_ids(random, {s.T}, 0, s.B);
    const Array limits = random_ids(random, {s.B}, 0, s.T / s.B + 2);
    for (const int64_t cap : {2, 3}) {
      const double entropy = cap == 2 ? 0x1p-10 : 1.0;
      if (cap >= s.E) continue;
      Array got(DType::kFloat32, {s.T, s.E}), first;
      const auto call = [&](Execution exec) {
        assign_capped({.values = values,
                       .sequence_ids = optional(sequence_ids, s.B),
                       .limits = limits,
                       .cap = cap,
                       .entropy = entropy,
                       .iterations = Capped::kRounds,
                       .assignment = got},
                      exec);
      };
      for_each_isa({&got}, call, [&] {
        if (!first.defined()) first = got;
        CHECK(same_bits(got, first));
      });
      for (int64_t b = 0; b < s.B; ++b) {
        const std::vector<int64_t> tokens = tokens_of(sequence_ids, b);
        const auto limit = static_cast<double>(std::min<int64_t>(limits.id(b), std::ssize(tokens)));
        const double total = std::max<double>(limit, FLT_MIN);  // 0 has no logarithm
        const Capped want(values, tokens, total, cap, entropy);
        for (int64_t e = 0; e < s.E; ++e) {
          double sum = 0.0;
          for (size_t i = 0; i < tokens.size(); ++i) {
            sum += std::min(1.0, std::exp(static_cast<double>(got(tokens[i], e))));
            CHECK_CLOSE(got(tokens[i], e), (Bounded{want.log_a[i][static_cast<size_t>(e)], want.error()}), "token ",
                        tokens[i], " λ ", entropy, " cap ", cap);
          }
          CHECK(tokens.empty() || std::abs(sum - total) <= want.error_of_sum() * total, "expert ", e, ": ", sum, " of ",
                total);
        }
      }
    }
  });
}

TEST(assign_capped_of_any_values_is_finite) {
  for_each_size([](const Sizes& s, int64_t kind, Random& random) {
    const Array values = wild_array(random, {s.T, s.E}, kind), sequence_ids = random_ids(random, {s.T}, 0, s.B);
    const Array limits = random_ids(random, {s.B}, 0, s.T / s.B + 2);
    Array got(DType::kFloat32, {s.T, s.E});
    const auto call = [&](Execution exec) {
      assign_capped({.values = values,
                     .sequence_ids = optional(sequence_ids, s.B),
                     .limits = limits,
                     .iterations = Capped::kRounds,
                     .assignment = got},
                    exec);
    };
    for_each_isa({&got}, call, [&] {
      for (int64_t i = 0; i < s.T * s.E; ++i) CHECK(std::isfinite(got(i / s.E, i % s.E)), "element ", i);
    });
  });
}

TEST(assign_capped_without_a_cap_divides) {
  Random random(4);
  for (const DType dtype : kFloatTypes) {
    const Array values = random_array(random, dtype, {33, 17}, 1.0, 3), limits = random_ids(random, {1}, 4, 5);
    Array got(DType::kFloat32, {33, 17});
    const auto call = [&](Execution exec) {
      assign_capped({.values = values, .limits = limits, .cap = 17, .entropy = 0.25, .assignment = got}, exec);
    };
    for_each_isa({&got}, call, [&] {
      for (int64_t i = 0; i < got.numel(); ++i) CHECK(got(i / 17, i % 17) == 4 * values(i / 17, i % 17), "element ", i);
    });
  }
}

}  // namespace
}  // namespace switchgear::test
