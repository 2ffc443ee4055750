// SPDX-License-Identifier: BSD-3-Clause
#include "bench.h"

namespace switchgear::bench {
namespace {

// Random choices; an expert takes ⌈K·T/E⌉ of them. About a tenth exceed the capacity.
struct FitCapacity {
  explicit FitCapacity(const Case& c) : c(c), routed(c), limits(DType::kInt32, 1), kept_ids(DType::kInt32, c.T, c.K) {
    limits.as<int32_t>()[0] = static_cast<int32_t>((c.S() + c.E - 1) / c.E);
  }

  void fit(const TensorView& scores) {
    fit_capacity({.topk_ids = routed.topk_ids,
                  .priorities = routed.topk_weights,
                  .scores = scores,
                  .limits = limits,
                  .options = {.num_experts = c.E, .drop = Drop::kPriority, .candidates = c.E},
                  .kept_ids = kept_ids},
                 c.exec);
  }
  int32_t wanted(int64_t i) const { return routed.topk_ids.as<int32_t>()[i]; }
  int32_t kept(int64_t i) const { return kept_ids.as<int32_t>()[i]; }
  int64_t load(int64_t e) const {
    const int32_t* ids = kept_ids.as<int32_t>();
    return std::count(ids, ids + c.S(), static_cast<int32_t>(e));
  }

  Case c;
  Routed routed;
  Tensor limits, kept_ids;
};

struct Dropping : FitCapacity {
  static constexpr const char* kName = "fit_capacity";
  using FitCapacity::FitCapacity;

  void run() { fit({}); }
  // An expert below capacity keeps all; a full one keeps as many as it may, of no lower weight than those that it drops.
  bool verify() const {
    const int64_t limit = limits.as<int32_t>()[0];
    return sample(c.E, c.E, [&](int64_t e) {
      int64_t offered = 0;
      float lowest = INFINITY, dropped = -INFINITY;
      for (int64_t i = 0; i < c.S(); ++i) {
        if (wanted(i) != e) continue;
        ++offered;
        if (kept(i) == e) lowest = std::min(lowest, routed.topk_weights[i]);
        if (kept(i) != e) dropped = std::max(dropped, routed.topk_weights[i]);
      }
      return load(e) == std::min(offered, limit) && dropped <= lowest;
    });
  }
  Work work() const { return {0, 24.0 * static_cast<double>(c.S())}; }
};

struct Rerouting : FitCapacity {
  static constexpr const char* kName = "fit_capacity_reroute";
  explicit Rerouting(const Case& c) : FitCapacity(c), scores(Tensor(DType::kFloat32, c.T, c.E).random(1.0, 1)) {
    float* values = scores.as<float>();  // above 0: others take nothing over
    std::transform(values, values + scores.numel(), values, [](float value) { return std::abs(value) + 0.125f; });
  }

  void run() { fit(scores); }
  // No expert has too many choices or a token twice, and a choice is lost only if all of the token's other experts are full.
  bool verify() const {
    const int64_t limit = limits.as<int32_t>()[0];
    std::vector<int64_t> loads(static_cast<size_t>(c.E));
    for (int64_t e = 0; e < c.E; ++e) loads[e] = load(e);
    if (*std::max_element(loads.begin(), loads.end()) > limit) return false;
    return sample(c.T, 256, [&](int64_t t) {
      const int32_t* row = kept_ids.as<int32_t>() + t * c.K;
      const bool lost = std::find(row, row + c.K, -1) != row + c.K;
      for (int64_t e = 0; e < c.E; ++e) {
        const auto times = std::count(row, row + c.K, static_cast<int32_t>(e));
        if (times > 1 || (lost && times == 0 && loads[e] < limit)) return false;
      }
      return true;
    });
  }
  Work work() const { return {0, 24.0 * static_cast<double>(c.S()) + static_cast<double>(scores.bytes())}; }

  Tensor scores;
};

}  // namespace
}  // namespace switchgear::bench

int main(int argc, char** argv) {
  using namespace switchgear::bench;
  return bench_main<Dropping, Rerouting>(argc, argv);
}
