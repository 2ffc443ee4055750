// SPDX-License-Identifier: BSD-3-Clause
#include <numeric>

#include "bench.h"

namespace switchgear::bench {
namespace {

// Top-p: the fewest experts with 0.4 of the mass.
struct RouteDynamic {
  static constexpr const char* kName = "route_dynamic";
  static constexpr double kTopP = 0.4;

  explicit RouteDynamic(const Case& c)
      : c(c),
        router_logits(Tensor(c.dtype, c.T, c.E).random(2.0, 2)),
        topk_ids(DType::kInt32, c.T, c.E),
        topk_weights(DType::kFloat32, c.T, c.E) {}

  void run() {
    route_dynamic({.router_logits = router_logits,
                   .options = {.top_p = kTopP},
                   .topk_ids = topk_ids,
                   .topk_weights = topk_weights},
                  c.exec);
  }
  // The choices are the best experts, the last of which crosses p; nothing follows them.
  bool verify() const {
    return sample(c.T, 64, [&](int64_t t) {
      std::vector<double> p(static_cast<size_t>(c.E));
      for (int64_t e = 0; e < c.E; ++e) p[e] = std::exp(static_cast<double>(router_logits[t * c.E + e]));
      const double total = std::accumulate(p.begin(), p.end(), 0.0);
      const int32_t* ids = topk_ids.as<int32_t>() + t * c.E;
      const int64_t count = std::find(ids, ids + c.E, -1) - ids;
      double mass = 0.0;
      for (int64_t k = 0; k < count; ++k) {
        if (k > 0 && (p[ids[k]] > p[ids[k - 1]] || mass > kTopP + 1e-6)) return false;
        mass += p[ids[k]] / total;
        if (std::abs(topk_weights[t * c.E + k] - p[ids[k]] / total) > 1e-6) return false;
      }
      const double last = p[ids[count - 1]];
      const auto larger = std::count_if(p.begin(), p.end(), [&](double other) { return other > last; });
      return mass > kTopP - 1e-6 && larger < count && std::count(ids, ids + c.E, -1) == c.E - count;
    });
  }
  Work work() const {
    return {0, static_cast<double>(router_logits.bytes() + topk_ids.bytes() + topk_weights.bytes())};
  }

  Case c;
  Tensor router_logits, topk_ids, topk_weights;
};

}  // namespace
}  // namespace switchgear::bench

int main(int argc, char** argv) { return switchgear::bench::bench_main<switchgear::bench::RouteDynamic>(argc, argv); }
