// SPDX-License-Identifier: BSD-3-Clause
#include "bench.h"

namespace switchgear::bench {
namespace {

struct PlanOp {
  static constexpr const char* kName = "plan";
  explicit PlanOp(const Case& c) : c(c), routed(c) {}

  void run() { plan({.topk_ids = routed.topk_ids, .plan = routed.plan()}, c.exec); }
  // Each pair's slot is in its expert's range and maps back to its token.
  bool verify() const {
    const auto* ids = routed.topk_ids.as<int32_t>();
    return sample(c.S(), c.S(), [&](int64_t i) {
      const int32_t slot = routed.slot_indices.as<int32_t>()[i];
      return routed.expert_of(slot) == ids[i] && routed.token_indices.as<int32_t>()[slot] == i / c.K;
    });
  }
  Work work() const { return {0, 16.0 * static_cast<double>(c.S())}; }

  Case c;
  Routed routed;
};

}  // namespace
}  // namespace switchgear::bench

int main(int argc, char** argv) { return switchgear::bench::bench_main<switchgear::bench::PlanOp>(argc, argv); }
