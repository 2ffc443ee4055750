// SPDX-License-Identifier: BSD-3-Clause
#include "bench.h"

namespace switchgear::bench {
namespace {

// Expert choice over the batch: each expert takes its ⌈K·T/E⌉ best tokens.
struct ColumnTopk {
  static constexpr const char* kName = "column_topk";

  explicit ColumnTopk(const Case& c)
      : c(c),
        values(Tensor(c.dtype, c.T, c.E).random(2.0, 2)),
        limits(DType::kInt32, 1),
        topk_ids(DType::kInt32, c.T, c.E) {
    limits.as<int32_t>()[0] = static_cast<int32_t>((c.S() + c.E - 1) / c.E);
  }

  void run() { column_topk({.values = values, .limits = limits, .topk_ids = topk_ids}, c.exec); }
  // Every column has `limit` tokens, and no token it left has a larger value than one it took.
  bool verify() const {
    const int64_t limit = std::min<int64_t>(limits.as<int32_t>()[0], c.T);
    return sample(c.E, c.E, [&](int64_t e) {
      int64_t taken = 0;
      float lowest = INFINITY, left = -INFINITY;
      for (int64_t t = 0; t < c.T; ++t) {
        const int32_t* ids = topk_ids.as<int32_t>() + t * c.E;
        const bool is_taken = std::find(ids, ids + c.E, e) != ids + c.E;
        const float value = values[t * c.E + e];
        taken += is_taken;
        if (is_taken) lowest = std::min(lowest, value);
        if (!is_taken) left = std::max(left, value);
      }
      return taken == limit && left <= lowest;
    });
  }
  Work work() const { return {0, static_cast<double>(values.bytes() + topk_ids.bytes())}; }

  Case c;
  Tensor values, limits, topk_ids;
};

}  // namespace
}  // namespace switchgear::bench

int main(int argc, char** argv) { return switchgear::bench::bench_main<switchgear::bench::ColumnTopk>(argc, argv); }
