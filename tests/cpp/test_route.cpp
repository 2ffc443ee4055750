// SPDX-License-Identifier: BSD-3-Clause
// Compiled with -ffp-contract=off like route.cpp: the reference repeats its float operations and expects the same bits.
#include <algorithm>
#include <cfloat>
#include <numeric>

#include "bounded.h"
#include "cases.h"
#include "cpu/exp.h"

namespace switchgear::test {
namespace {

using cpu::exp_f32;

// ---- the exponential ---------------------------------------------------------------------------------------------------

TEST(exp_has_its_published_values) {
  CHECK(exp_f32(0.0f) == 1.0f);
  CHECK(exp_f32(1.0f) == 0x1.5bf0a8p+1f);
  CHECK(exp_f32(-1.0f) == 0x1.78b564p-2f);
  CHECK(exp_f32(-20.25f) == 0x1.b93de2p-30f);
  CHECK(exp_f32(-0x1.5d589ep+6f) == 0x1.00004cp-126f);
  CHECK(exp_f32(std::nextafter(-0x1.5d589ep+6f, -100.0f)) == 0.0f);
  CHECK(exp_f32(-INFINITY) == 0.0f);
  CHECK(exp_f32(INFINITY) == INFINITY);
  CHECK(exp_f32(88.8f) == INFINITY);
}

// Every float between 2^-30 and 89 in magnitude, or every 997th: within one unit in the last place, and monotone.
TEST(exp_is_accurate_and_monotone) {
  const uint32_t step = count_from("SWITCHGEAR_SLOW", 0) != 0 ? 1 : 997;
  for (const uint32_t sign : {0u, 0x80000000u}) {
    float previous = 1.0f;
    int64_t wrong = 0, decreasing = 0;
    for (uint32_t bits = std::bit_cast<uint32_t>(0x1p-30f); bits <= std::bit_cast<uint32_t>(89.0f); bits += step) {
      const float x = std::bit_cast<float>(bits | sign);
      const float got = exp_f32(x);
      const double want = std::exp(static_cast<double>(x));
      decreasing += sign != 0 ? got > previous : got < previous;
      previous = got;
      if (want < 0x1p-126) {
        wrong += got != 0.0f;
      } else if (want < FLT_MAX) {
        wrong += std::abs(got - want) > std::ldexp(1.0, std::ilogb(want) - 23);
      } else {
        wrong += !std::isinf(got);
      }
    }
    CHECK(wrong == 0, wrong, " wrong");
    CHECK(decreasing == 0, decreasing, " out of order");
  }
}

// ---- route -------------------------------------------------------------------------------------------------------------

struct Problem {
  Array logits;
  Array bias;
  RouteOptions options;

  int64_t T() const { return logits.size(0); }
  int64_t E() const { return logits.size(1); }
  int64_t K() const { return options.top_k; }
};

float sane(float v) { return std::isnan(v) || v < -FLT_MAX ? -FLT_MAX : std::min(v, FLT_MAX); }

std::vector<int32_t> ranking(const std::vector<float>& values, std::vector<int32_t> candidates) {
  std::stable_sort(candidates.begin(), candidates.end(), [&](int32_t a, int32_t b) { return values[a] > values[b]; });
  return candidates;
}

std::vector<int32_t> first_integers(int64_t n) {
  std::vector<int32_t> list(static_cast<size_t>(n));
  std::iota(list.begin(), list.end(), 0);
  return list;
}

// The definition, by full sorts.
void reference_row(const Problem& p, int64_t t, int32_t* ids, float* weights, float* scores) {
  const RouteOptions& o = p.options;
  const int64_t E = p.E();
  const bool softmax = o.score_function == ScoreFunction::kSoftmax;
  std::vector<float> logits(E), ranked(E);
  for (int64_t e = 0; e < E; ++e) logits[e] = sane(p.logits(t, e));
  const float max = *std::max_element(logits.begin(), logits.end());
  double sum = 0.0;
  for (int64_t e = 0; e < E; ++e) sum += exp_f32(logits[e] - max);
  for (int64_t e = 0; e < E; ++e) {
    scores[e] = softmax ? static_cast<float>(exp_f32(logits[e] - max) / sum) : 1.0f / (1.0f + exp_f32(-logits[e]));
    ranked[e] = p.bias.defined() ? scores[e] + sane(p.bias(e)) : scores[e];
  }
  if (!p.bias.defined() && o.num_groups == 1) ranked = logits;

  const int64_t size = E / o.num_groups;
  std::vector<float> group_scores(o.num_groups);
  for (int64_t g = 0; g < o.num_groups; ++g) {
    std::vector<float> members(ranked.begin() + g * size, ranked.begin() + (g + 1) * size);
    std::sort(members.rbegin(), members.rend());
    group_scores[g] = members[0];
    if (o.group_score == GroupScore::kTop2Sum && size > 1) group_scores[g] += members[1];
  }
  std::vector<int32_t> groups = ranking(group_scores, first_integers(o.num_groups));
  groups.resize(o.topk_groups);
  std::vector<int32_t> candidates;
  for (int32_t e = 0; e < E; ++e) {
    if (std::count(groups.begin(), groups.end(), e / size) > 0) candidates.push_back(e);
  }
  const std::vector<int32_t> best = ranking(ranked, candidates);
  double total = 0.0;
  for (int64_t k = 0; k < p.K(); ++k) {
    ids[k] = best[k];
    weights[k] = scores[best[k]];
    total += weights[k];
  }
  for (int64_t k = 0; k < p.K(); ++k) {
    if (o.normalize) weights[k] = static_cast<float>(weights[k] / (total + 1e-20));
    weights[k] = weights[k] * o.scale;
  }
}

struct Routed {
  Routed(int64_t T, int64_t K) : ids(DType::kInt32, {T, K}), weights(DType::kFloat32, {T, K}) {}
  Array ids, weights;
};

Routed reference(const Problem& p) {
  Routed want(p.T(), p.K());
  std::vector<int32_t> ids(p.K());
  std::vector<float> weights(p.K()), scores(p.E());
  for (int64_t t = 0; t < p.T(); ++t) {
    reference_row(p, t, ids.data(), weights.data(), scores.data());
    for (int64_t k = 0; k < p.K(); ++k) {
      want.ids.set_id(ids[k], t, k);
      want.weights.set(weights[k], t, k);
    }
  }
  return want;
}

void run(const Problem& p, Routed& got, Execution exec) {
  route({.router_logits = p.logits,
         .selection_bias = p.bias,
         .options = p.options,
         .topk_ids = got.ids,
         .topk_weights = got.weights},
        exec);
}

// K distinct ids in range, and finite weights.
bool total(const Routed& got, int64_t E) {
  std::vector<int64_t> seen(static_cast<size_t>(E), -1);
  for (int64_t t = 0; t < got.ids.size(0); ++t) {
    for (int64_t k = 0; k < got.ids.size(1); ++k) {
      const int32_t id = got.ids.id(t, k);
      if (id < 0 || id >= E || seen[static_cast<size_t>(id)] == t || !std::isfinite(got.weights(t, k))) return false;
      seen[static_cast<size_t>(id)] = t;
    }
  }
  return true;
}

void check_problem(const Problem& p) {
  const Routed want = reference(p);
  Routed got(p.T(), p.K());
  for_each_isa(
      {&got.ids, &got.weights}, [&](Execution exec) { run(p, got, exec); },
      [&] {
        CHECK(total(got, p.E()));
        CHECK(same_bits(got.ids, want.ids));
        CHECK(same_bits(got.weights, want.weights));
      });
}

// All combinations of options: softmax or sigmoid, bias, normalisation, groups.
template <typename Body>
void for_each_option(Random& random, int64_t E, int64_t K, Body&& body) {
  for (int mask = 0; mask < 16; ++mask) {
    RouteOptions o{.top_k = K};
    if (mask & 1) o.score_function = ScoreFunction::kSigmoid;
    Array bias;
    if (mask & 2) bias = random_array(random, DType::kFloat32, {E}, 0.2);
    if (mask & 4) o.normalize = true, o.scale = 2.5f;
    if (mask & 8) {
      o.num_groups = E % 4 == 0 ? 4 : E;  // groups of one expert if 4 does not divide E
      const int64_t needed = (K + E / o.num_groups - 1) / (E / o.num_groups);
      o.topk_groups = needed + random.below(o.num_groups - needed + 1);
      o.group_score = random.below(2) == 0 ? GroupScore::kMax : GroupScore::kTop2Sum;
    }
    note = join("E=", E, " K=", K, " options ", mask);
    body(o, bias);
  }
  note.clear();
}

struct Sizes {
  int64_t T, E, K;
};
constexpr Sizes kSizes[] = {{0, 8, 2},  {1, 1, 1},   {7, 2, 2},    {5, 5, 5},    {33, 8, 2},      {19, 60, 6},
                            {9, 64, 8}, {6, 97, 97}, {4, 257, 40}, {3, 1024, 8}, {2, 4096, 4096}, {3, 4100, 64}};

TEST(route_matches_reference) {
  Random random(3);
  for (const auto& [T, E, K] : kSizes) {
    for (const DType dtype : kFloatTypes) {
      if (dtype != DType::kFloat32 && E > 300) continue;  // bfloat16 and float16 only differ in their loads
      const Array logits = random_array(random, dtype, {T, E}, 2.0, 3);
      for_each_option(random, E, K,
                      [&](const RouteOptions& o, const Array& bias) { check_problem({logits, bias, o}); });
    }
  }
}

TEST(route_over_the_lattice_of_sizes) {
  const bool all = count_from("SWITCHGEAR_SLOW", 0) != 0;
  Random random(4);
  int64_t cases = 0;
  for (const int64_t E : {1,   2,   3,   5,   7,   8,   13,  31,  32,   33,   60,   64,   127,  128, 129,
                          160, 255, 256, 257, 384, 511, 512, 513, 1000, 1023, 1024, 1025, 2048, 4096}) {
    for (const int64_t K : {int64_t{1}, int64_t{2}, int64_t{6}, int64_t{8}, int64_t{10}, int64_t{32}, int64_t{33}, E}) {
      for (const int64_t T : {0, 1, 31, 32, 33, 1023, 1025}) {
        if (K > E || (!all && T > 1)) continue;
        note = join("T=", T, " K=", K, " E=", E);
        const Problem p{random_array(random, DType::kFloat32, {T, E}), {}, {.top_k = K, .normalize = true}};
        const Routed want = reference(p);
        Routed got(T, K);
        run(p, got, {static_cast<int>(1 + cases++ % 5)});
        CHECK(same_bits(got.ids, want.ids));
        CHECK(same_bits(got.weights, want.weights));
      }
    }
  }
}

// Rows that break routers: NaN, infinities, any bit pattern, few distinct values, denormals, signed zeros.
void fill_wild(Array& logits, Random& random) {
  const float specials[] = {NAN,    INFINITY, -INFINITY, FLT_MAX, -FLT_MAX, 0.0f,  -0.0f,  FLT_MIN,
                            1e-42f, -1e-42f,  65504.0f,  1.0f,    -1.0f,    88.0f, -104.0f};
  const int64_t E = logits.size(1);
  for (int64_t t = 0; t < logits.size(0); ++t) {
    const int64_t kind = random.below(6);
    const float constant = specials[random.below(std::ssize(specials))];
    for (int64_t e = 0; e < E; ++e) {
      float v = random.normal();
      if (kind == 0) v = constant;                                    // all equal
      if (kind == 1) v = static_cast<float>(random.below(3)) - 1.0f;  // dense in ties
      if (kind == 2) v = specials[random.below(std::ssize(specials))];
      if (kind == 3) v = std::bit_cast<float>(static_cast<uint32_t>(random.bits()));
      if (kind == 4 && random.below(E) == 0) v = NAN;  // one bad expert
      logits.set(v, t, e);
    }
  }
}

TEST(route_is_total) {
  const int64_t rows = count_from("SWITCHGEAR_SLOW", 0) != 0 ? 1'000'000 : 12'000;
  Random random(5);
  for (const DType dtype : kFloatTypes) {
    for (const auto& [E, K] : {std::pair<int64_t, int64_t>{8, 2}, {20, 7}, {64, 8}}) {
      Array logits(dtype, {rows / 16, E});
      for_each_option(random, E, K, [&](const RouteOptions& o, Array bias) {
        fill_wild(logits, random);
        if (bias.defined() && random.below(2) == 0) {
          bias.fill([&](int64_t) { return std::bit_cast<float>(static_cast<uint32_t>(random.bits())); });
        }
        check_problem({logits, bias, o});
      });
    }
  }
}

TEST(route_never_prefers_what_is_not_finite) {
  for (const float bad : {NAN, -NAN, -INFINITY}) {
    Array logits(DType::kFloat32, {1, 5});
    logits.fill([&](int64_t i) { return i % 2 == 0 ? bad : -3.0f - static_cast<float>(i); });
    Routed got(1, 2);
    run({logits, {}, {.top_k = 2}}, got, {});
    CHECK(got.ids.id(0, 0) == 1 && got.ids.id(0, 1) == 3);
    CHECK(std::abs(got.weights(0, 0) - 1.0 / (1.0 + std::exp(-2.0))) < 2 * kUnit);
  }
}

// ---- the gradient ------------------------------------------------------------------------------------------------------

// d(weights)/d(logits) by central differences of the formulas in float64, with the choice held fixed.
double loss(const Problem& p, int64_t t, const std::vector<double>& logits, const Routed& routed, const Array& grad) {
  const RouteOptions& o = p.options;
  double max = *std::max_element(logits.begin(), logits.end()), sum = 0.0, total = 1e-20, result = 0.0;
  for (const double l : logits) sum += std::exp(l - max);
  const auto weight = [&](int64_t k) {
    const double l = logits[static_cast<size_t>(routed.ids.id(t, k))];
    return o.score_function == ScoreFunction::kSoftmax ? std::exp(l - max) / sum : 1.0 / (1.0 + std::exp(-l));
  };
  for (int64_t k = 0; k < p.K(); ++k) total += weight(k);
  for (int64_t k = 0; k < p.K(); ++k) result += grad(t, k) * o.scale * weight(k) / (o.normalize ? total : 1.0);
  return result;
}

TEST(route_backward_matches_differences) {
  Random random(6);
  for (const Sizes& sizes : {Sizes{0, 4, 2}, {1, 1, 1}, {6, 8, 2}, {5, 13, 13}, {3, 33, 6}}) {
    const int64_t T = sizes.T, E = sizes.E, K = sizes.K;
    for (const DType dtype : kFloatTypes) {
      for_each_option(random, E, K, [&](const RouteOptions& o, const Array& bias) {
        Problem p{random_array(random, dtype, {T, E}, 2.0, 2), bias, o};
        if (T > 2) p.logits.set(NAN, 1, 0);
        if (T > 2) p.logits.set(-INFINITY, 2, E - 1);
        if (T > 4) {  // rows whose scores come from sanitised logits: gradients of constants are 0
          p.logits.set(INFINITY, 3, 0);
          p.logits.set(INFINITY, 3, 1);
          for (int64_t e = 0; e < E; ++e) p.logits.set(NAN, 4, e);
        }
        const Array grad = random_array(random, DType::kFloat32, {T, K});
        Routed routed(T, K);
        run(p, routed, {});
        Array got(dtype, {T, E}, 1);
        const auto backward = [&](Execution exec) {
          route_backward({.grad_topk_weights = grad,
                          .router_logits = p.logits,
                          .topk_ids = routed.ids,
                          .options = o,
                          .grad_router_logits = got},
                         exec);
        };
        for_each_isa({&got}, backward, [&] {
          for (int64_t t = 0; t < T; ++t) {
            std::vector<double> logits(static_cast<size_t>(E));
            for (int64_t e = 0; e < E; ++e) logits[static_cast<size_t>(e)] = sane(p.logits(t, e));
            for (int64_t e = 0; e < E; ++e) {
              if (!std::isfinite(p.logits(t, e))) {
                CHECK(got(t, e) == 0.0f);
                continue;
              }
              constexpr double kStep = 0x1p-14;  // the quotient is off by about kStep² and 2^-53 / kStep
              std::vector<double> up = logits, down = logits;
              up[static_cast<size_t>(e)] += kStep;
              down[static_cast<size_t>(e)] -= kStep;
              const double want = (loss(p, t, up, routed, grad) - loss(p, t, down, routed, grad)) / (2 * kStep);
              // scores are within a few kUnit; up to K terms of size |grad| · scale may share a small denominator
              const double size = 16.0 * o.scale * static_cast<double>(K);
              CHECK_CLOSE(got(t, e), rounded({want, size * (8 * kUnit + kStep * kStep)}, dtype), "expert ", e);
            }
          }
        });
      });
    }
  }
}

}  // namespace
}  // namespace switchgear::test
