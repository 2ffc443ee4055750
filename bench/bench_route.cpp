// SPDX-License-Identifier: BSD-3-Clause
#include <algorithm>

#include "bench.h"

namespace switchgear::bench {
namespace {

struct RouteData {
  explicit RouteData(const Case& c)
      : c(c),
        router_logits(Tensor(c.dtype, c.T, c.E).random(2.0, 2)),
        topk_ids(DType::kInt32, c.T, c.K),
        topk_weights(DType::kFloat32, c.T, c.K) {}

  void route() {
    switchgear::route({.router_logits = router_logits,
                       .options = {.top_k = c.K, .normalize = true},
                       .topk_ids = topk_ids,
                       .topk_weights = topk_weights},
                      c.exec);
  }

  Case c;
  Tensor router_logits, topk_ids, topk_weights;
};

struct Route : RouteData {
  static constexpr const char* kName = "route";
  using RouteData::RouteData;

  void run() { route(); }
  // Choices are different and descend, no other expert is larger than the last, and their weights sum to one.
  bool verify() const {
    return sample(c.T, 64, [&](int64_t t) {
      const auto logit = [&](int64_t id) { return router_logits[t * c.E + id]; };
      const int32_t* ids = topk_ids.as<int32_t>() + t * c.K;
      for (int64_t k = 1; k < c.K; ++k) {
        if (logit(ids[k]) > logit(ids[k - 1]) || std::find(ids, ids + k, ids[k]) != ids + k) return false;
      }
      int64_t larger = 0;
      for (int64_t e = 0; e < c.E; ++e) larger += logit(e) > logit(ids[c.K - 1]);
      test::Sum sum;
      for (int64_t k = 0; k < c.K; ++k) sum.add(test::rounded({topk_weights[t * c.K + k]}, DType::kFloat32));
      return larger < c.K && test::close(1.0f, sum.result());
    });
  }
  Work work() const {
    return {0, static_cast<double>(router_logits.bytes() + topk_ids.bytes() + topk_weights.bytes())};
  }
};

struct RouteBackward : RouteData {
  static constexpr const char* kName = "route_backward";
  explicit RouteBackward(const Case& c)
      : RouteData(c),
        grad_topk_weights(Tensor(DType::kFloat32, c.T, c.K).random(1.0, 3)),
        grad_router_logits(c.dtype, c.T, c.E) {
    route();
  }

  void run() {
    route_backward({.grad_topk_weights = grad_topk_weights,
                    .router_logits = router_logits,
                    .topk_ids = topk_ids,
                    .options = {.top_k = c.K, .normalize = true},
                    .grad_router_logits = grad_router_logits},
                   c.exec);
  }
  // Adding a constant to all logits changes nothing, so a row of the gradient sums to zero. Only chosen logits have one:
  // what others get is the rounding of a few float64 terms of about 1, 2^-50.
  bool verify() const {
    return sample(c.T, 64, [&](int64_t t) {
      const int32_t* ids = topk_ids.as<int32_t>() + t * c.K;
      bool any = c.K == 1;  // a single weight is always one
      test::Sum sum;
      for (int64_t e = 0; e < c.E; ++e) {
        const float grad = grad_router_logits[t * c.E + e];
        const bool none = std::abs(grad) < 1e-12f;
        if (!none && std::find(ids, ids + c.K, e) == ids + c.K) return false;
        any = any || !none;
        sum.add(test::rounded({grad}, c.dtype));
      }
      return any && test::close(0.0f, sum.result());
    });
  }
  Work work() const { return {0, static_cast<double>(2 * router_logits.bytes() + 2 * topk_ids.bytes())}; }

  Tensor grad_topk_weights, grad_router_logits;
};

}  // namespace
}  // namespace switchgear::bench

int main(int argc, char** argv) {
  using namespace switchgear::bench;
  return bench_main<Route, RouteBackward>(argc, argv);
}
