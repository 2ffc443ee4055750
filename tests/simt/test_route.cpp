// SPDX-License-Identifier: BSD-3-Clause
// Compiled with -ffp-contract=off, like all host code of route, since bits are compared.
#include <cfloat>

#include "cases.h"
#include "launch.h"
#include "run_op.h"
#include "score.cuh"
#include "switchgear/backend.h"

namespace switchgear::test {
namespace {

// ---- numbers -------------------------------------------------------------------------------------------------------------

TEST(keys_are_in_the_order_of_the_values) {
  const float ascending[] = {-INFINITY, -FLT_MAX, -1.0f, -FLT_MIN, -1e-45f, 0.0f,
                             1e-45f,    FLT_MIN,  1.0f,  FLT_MAX,  INFINITY};
  for (size_t i = 0; i + 1 < std::size(ascending); ++i) {
    CHECK(cuda::key_of(ascending[i]) < cuda::key_of(ascending[i + 1]), ascending[i]);
    CHECK(cuda::value_of(cuda::key_of(ascending[i])) == ascending[i]);
  }
  CHECK(cuda::key_of(-0.0f) == cuda::key_of(0.0f));
  CHECK(cuda::key_of(-INFINITY) > cuda::kTaken);
}

TEST(quotients_are_correctly_rounded) {
  const int64_t count = count_from("SWITCHGEAR_SLOW", 0) != 0 ? 1'000'000'000 : 3'000'000;
  Random random(1);
  int64_t wrong = 0, wrong_score = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint64_t bits = random.bits();
    // Numerators of softmax in (0, 1], denominators in [1, 4096), some with all ones in the fraction. Halfway cases arise
    // when the divisor is a power of two.
    const float e = std::bit_cast<float>(static_cast<uint32_t>((1 + bits % 126) << 23 | (random.bits() & 0x7fffff)));
    uint64_t fraction = random.bits() & 0xfffffffffffff;
    if (i % 8 == 0) fraction |= 0xfffffffffff00;
    if (i % 8 == 1) fraction &= ~uint64_t{0xfffffff};
    if (i % 64 == 2) fraction = 0xfffffffffffff;
    const double sum = std::bit_cast<double>((1023 + bits / 126 % 12) << 52 | fraction);
    const double want = e / sum;
    wrong += cuda::quotient(e, sum, 1.0 / sum) != want;
    wrong_score += cuda::softmax_score(e, sum, 1.0 / sum) != static_cast<float>(want);
  }
  CHECK(wrong == 0, wrong, " wrong of ", count);
  CHECK(wrong_score == 0, wrong_score, " wrong of ", count);
}

// Quotients at the midpoint of two float32 numbers, and next to it.
TEST(scores_are_right_at_halfway_points) {
  Random random(2);
  for (int64_t i = 0; i < 200'000; ++i) {
    const double sum = 1.0 + random.unit() * 100.0;
    const float score = static_cast<float>(random.unit());
    const double middle = 0.5 * (static_cast<double>(score) + std::nextafter(score, 2.0f));
    const float e = static_cast<float>(middle * sum);
    for (int64_t step = -3; step <= 3; ++step) {  // sums that put e / sum close to the middle
      double near = e / middle;
      for (int64_t j = 0; j < std::abs(step); ++j) near = std::nextafter(near, step < 0 ? 0.0 : 1e9);
      CHECK(cuda::softmax_score(e, near, 1.0 / near) == static_cast<float>(e / near));
    }
  }
}

// ---- sums of exponentials ------------------------------------------------------------------------------------------------

// One warp; each token's lanes hold its logits, padded with -Inf.
template <int kLanes, int kPerLane>
__global__ void sums_in_registers(const float* rows, int num_experts, double* sums) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes, token = static_cast<int>(threadIdx.x) / kLanes;
  float logits[kPerLane];
  for (int i = 0; i < kPerLane; ++i) {
    const int e = lane * kPerLane + i;
    logits[i] = e < num_experts ? rows[token * num_experts + e] : -INFINITY;
  }
  const double sum = cuda::sum_of_exponentials<kLanes>(logits, 0.0f);
  if (lane == 0) sums[token] = sum;
}

__global__ void sum_by_warp(const float* row, int num_experts, double* sum) {
  const int lane = static_cast<int>(threadIdx.x);
  const cuda::RowScale scale =
      cuda::scale_of_row(ScoreFunction::kSoftmax, num_experts, lane, [&](int e) { return row[e]; });
  if (lane == 0) *sum = scale.sum;
}

// Rows whose largest logit is 0. The wider their range, the more their sums depend on the order.
TEST(sums_are_those_in_the_order_of_experts) {
  Random random(9);
  int64_t order_matters = 0;
  for (int64_t i = 0; i < 60; ++i) {
    const double spread = 4.0 + 0.5 * static_cast<double>(i);
    const int num_experts = static_cast<int>(100 + random.below(29)), num_tokens = 4;
    std::vector<float> rows(static_cast<size_t>(num_tokens * num_experts));
    for (float& v : rows) v = static_cast<float>(-spread * (0.5 + 0.5 * random.unit()));
    std::vector<double> got(num_tokens), by_warp(num_tokens);
    for (int t = 0; t < num_tokens; ++t) rows[static_cast<size_t>(t * num_experts + t)] = 0.0f;
    cuda::launch(sums_in_registers<8, 16>, dim3(1), dim3(32), 0, nullptr, rows.data(), num_experts, got.data());
    for (int t = 0; t < num_tokens; ++t) {
      const float* row = rows.data() + t * num_experts;
      cuda::launch(sum_by_warp, dim3(1), dim3(32), 0, nullptr, row, num_experts, &by_warp[static_cast<size_t>(t)]);
      double want = 0.0, reverse = 0.0;
      for (int e = 0; e < num_experts; ++e) want += cpu::exp_f32(row[e]);
      for (int e = num_experts - 1; e >= 0; --e) reverse += cpu::exp_f32(row[e]);
      order_matters += want != reverse;
      CHECK(got[static_cast<size_t>(t)] == want, "spread ", spread);
      CHECK(by_warp[static_cast<size_t>(t)] == want, "spread ", spread);
    }
  }
  CHECK(order_matters > 30, order_matters, " of 240 sums depend on the order");
}

// ---- route ---------------------------------------------------------------------------------------------------------------

struct Routed {
  Routed(int64_t T, int64_t K) : ids(DType::kInt32, {T, K}), weights(DType::kFloat32, {T, K}) {}
  Array ids, weights;
};

RouteArgs arguments(const Array& logits, const Array& bias, const RouteOptions& options, Routed& out) {
  return {.router_logits = logits,
          .selection_bias = bias,
          .options = options,
          .topk_ids = out.ids,
          .topk_weights = out.weights};
}

void check_route(const Array& logits, const Array& bias, const RouteOptions& options) {
  Routed want(logits.size(0), options.top_k), got = want;
  cpu_backend().route(arguments(logits, bias, options, want), {1});
  run_op({&got.ids, &got.weights}, [&](Execution exec) { cuda::route(arguments(logits, bias, options, got), exec); });
  CHECK(same_bits(got.ids, want.ids));
  CHECK(same_bits(got.weights, want.weights));
}

// Softmax or sigmoid, bias, normalisation, groups; `masks` selects combinations.
template <typename Body>
void for_each_option(Random& random, int64_t E, int64_t K, std::initializer_list<int> masks, Body&& body) {
  const std::string before = note;
  for (const int mask : masks) {
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
    note = join(before, " E=", E, " K=", K, " options ", mask);
    body(o, bias);
  }
  note = before;
}

constexpr auto kAllOptions = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
constexpr auto kSomeOptions = {0, 5, 6, 11, 12};

struct Sizes {
  int64_t T, E, K;
};

// Sizes around those at which the next kernel takes over, and K up to all experts.
constexpr Sizes kSizes[] = {{0, 8, 2},   {1, 1, 1},   {3, 2, 2},    {5, 5, 5},    {33, 8, 2},   {35, 32, 4},
                            {7, 33, 8},  {17, 60, 6}, {18, 64, 8},  {9, 65, 9},   {4, 97, 97},  {17, 128, 8},
                            {5, 129, 3}, {9, 256, 8}, {3, 257, 40}, {5, 512, 10}, {3, 513, 64}, {2, 1024, 8}};

TEST(route_has_the_bits_of_the_cpu) {
  int variant = 0;
  Random random(3);
  for (const auto& [T, E, K] : kSizes) {
    for (const DType dtype : kFloatTypes) {
      for (const Rows rows : {Rows::kAnywhere, Rows::kAligned}) {
        note = join("T=", T, " ", name_of(dtype), rows == Rows::kAligned ? " aligned" : "");
        const Array logits = random_rows(rows, random, dtype, T, E, 2.0);
        const bool all = dtype == DType::kFloat32 && rows == Rows::kAligned && E < 1000;
        for_each_option(random, E, K, all ? kAllOptions : kSomeOptions, [&](const RouteOptions& o, const Array& bias) {
          if (takes_variant(variant++)) check_route(logits, bias, o);
        });
      }
    }
  }
}

TEST(route_of_thousands_of_experts) {
  Random random(4);
  for (const auto& [T, E, K] : {Sizes{1, 2304, 36}, {2, 4096, 64}, {1, 4100, 3}}) {
    const Array logits = random_array(random, DType::kBFloat16, {T, E}, 2.0);
    for_each_option(random, E, K, {0, 15},
                    [&](const RouteOptions& o, const Array& bias) { check_route(logits, bias, o); });
  }
  // Too many experts for shared memory, and more tokens than rows of global memory.
  const Array logits = random_array(random, DType::kFloat32, {4, 25'000}, 2.0);
  for_each_option(random, 25'000, 5, {4, 11},
                  [&](const RouteOptions& o, const Array& bias) { check_route(logits, bias, o); });
}

// The blocks of route_wide loop over the tokens.
TEST(route_of_more_tokens_than_blocks) {
  Random random(10);
  const Array logits = random_array(random, DType::kFloat32, {8, 600}, 2.0);
  for_each_option(random, 600, 40, {0, 15},
                  [&](const RouteOptions& o, const Array& bias) { check_route(logits, bias, o); });
}

// Sums of exponentials that depend on the order of the terms, in both kernels.
TEST(route_adds_in_the_order_of_experts) {
  Random random(5);
  for (const auto& [T, E] : {std::pair<int64_t, int64_t>{40, 8}, {24, 64}, {24, 128}, {12, 256}, {6, 512}, {6, 700}}) {
    for (const double spread : {6.0, 12.0, 40.0}) {
      note = join("spread ", spread);
      const Array logits = random_rows(Rows::kAligned, random, DType::kFloat32, T, E, spread);
      for_each_option(random, E, std::min<int64_t>(E, 20), {0, 2, 4},
                      [&](const RouteOptions& o, const Array& bias) { check_route(logits, bias, o); });
    }
  }
}

// Inputs that break routers: NaN, infinities, any bit pattern, few distinct values, denormals, signed zeros.
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
      if (kind == 1) v = static_cast<float>(random.below(3)) - 1.0f;  // many ties
      if (kind == 2) v = specials[random.below(std::ssize(specials))];
      if (kind == 3) v = std::bit_cast<float>(static_cast<uint32_t>(random.bits()));
      if (kind == 4 && random.below(E) == 0) v = NAN;  // one bad expert
      logits.set(v, t, e);
    }
  }
}

TEST(route_is_total) {
  const int64_t rows = count_from("SWITCHGEAR_SLOW", 0) != 0 ? 4000 : 64;
  Random random(6);
  for (const DType dtype : kFloatTypes) {
    for (const auto& [E, K] : {std::pair<int64_t, int64_t>{8, 2}, {20, 7}, {64, 8}, {128, 6}, {600, 4}}) {
      note = name_of(dtype);
      Array logits = make_rows(Rows::kAligned, dtype, E > 500 ? rows / 16 : rows, E);
      for_each_option(random, E, K, kAllOptions, [&](const RouteOptions& o, Array bias) {
        fill_wild(logits, random);
        if (bias.defined() && random.below(2) == 0) {
          bias.fill([&](int64_t) { return std::bit_cast<float>(static_cast<uint32_t>(random.bits())); });
        }
        check_route(logits, bias, o);
      });
    }
  }
}

// ---- the gradient --------------------------------------------------------------------------------------------------------

void check_backward(const Array& logits, const Array& ids, const Array& grad, const RouteOptions& options) {
  Array want(logits.view().dtype, {logits.size(0), logits.size(1)}, 1), got = want;
  Array valid = ids;  // ids out of range are empty slots
  valid.fill([&](int64_t i) -> int64_t {
    const int32_t id = ids.id(i / ids.size(1), i % ids.size(1));
    return id >= 0 && id < logits.size(1) ? id : -1;
  });
  const auto args = [&](const Array& topk_ids, Array& out) {
    return RouteBackwardArgs{.grad_topk_weights = grad,
                             .router_logits = logits,
                             .topk_ids = topk_ids,
                             .options = options,
                             .grad_router_logits = out};
  };
  cpu_backend().route_backward(args(valid, want), {1});
  run_op({&got}, [&](Execution exec) { cuda::route_backward(args(ids, got), exec); });
  for (int64_t t = 0; t < logits.size(0); ++t) {
    for (int64_t e = 0; e < logits.size(1); ++e) {
      const float a = got(t, e), b = want(t, e);
      CHECK(std::bit_cast<uint32_t>(a) == std::bit_cast<uint32_t>(b) || (std::isnan(a) && std::isnan(b)), "token ", t,
            " expert ", e, " got ", a, " expected ", b);
    }
  }
}

TEST(route_backward_has_the_bits_of_the_cpu) {
  Random random(7);
  for (const auto& [T, E, K] :
       {Sizes{0, 4, 2}, {1, 1, 1}, {6, 8, 2}, {5, 13, 13}, {3, 33, 6}, {9, 128, 8}, {2, 600, 70}}) {
    for (const DType dtype : kFloatTypes) {
      for (const double spread : {2.0, 30.0}) {
        note = join("T=", T, " ", name_of(dtype), " spread ", spread);
        const Array logits = random_array(random, dtype, {T, E}, spread, 2);
        const Array grad = random_array(random, DType::kFloat32, {T, K});
        for_each_option(random, E, K, {0, 1, 4, 5}, [&](const RouteOptions& o, const Array& bias) {
          Routed routed(T, K);
          cpu_backend().route(arguments(logits, bias, o, routed), {1});
          check_backward(logits, routed.ids, grad, o);
        });
      }
    }
  }
}

// Repeated, empty and invalid ids; non-finite logits and gradients.
TEST(route_backward_of_anything) {
  Random random(8);
  for (const auto& [T, E, K] : {Sizes{40, 8, 3}, {24, 37, 40}}) {
    Array logits(DType::kFloat32, {T, E}, 2);
    Array ids(DType::kInt32, {T, K});
    for_each_option(random, E, std::min(E, K), {0, 1, 4, 5}, [&](const RouteOptions& o, const Array&) {
      fill_wild(logits, random);
      ids.fill([&](int64_t) -> int64_t {
        return random.below(6) == 0 ? static_cast<int32_t>(random.bits()) : random.below(E + 1) - 1;
      });
      Array grad = random_array(random, DType::kFloat32, {T, K});
      grad.set(INFINITY, 0, 0);
      grad.set(NAN, 1, 0);
      check_backward(logits, ids, grad, o);
    });
  }
}

}  // namespace
}  // namespace switchgear::test
