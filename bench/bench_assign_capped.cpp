// SPDX-License-Identifier: BSD-3-Clause
#include "bench.h"

namespace switchgear::bench {
namespace {

// Expert choice over the batch: K·T/E tokens for each expert, at most K experts for each token, with values as far apart as
// scores are.
struct AssignCapped {
  static constexpr const char* kName = "assign_capped";
  static constexpr double kScale = 0.3;

  explicit AssignCapped(const Case& c)
      : c(c),
        values(Tensor(c.dtype, c.T, c.E).random(kScale, 2)),
        limits(DType::kInt32, 1),
        assignment(DType::kFloat32, c.T, c.E) {
    limits.as<int32_t>()[0] = static_cast<int32_t>(std::max<int64_t>(c.S() / c.E, 1));
  }

  AssignCappedArgs args() const { return {.values = values, .limits = limits, .cap = c.K, .assignment = assignment}; }
  void run() { assign_capped(args(), c.exec); }
  // Every expert has its tokens. A charge exceeds the largest value and the charge before it by at most a logarithm. Rounding
  // errors of an element and of its expert's last charge are at most 8 · 2^-24 of the largest charge.
  bool verify() const {
    const auto charges = static_cast<double>(2 * args().iterations + 1);
    const double value = kScale * std::sqrt(3.0) / args().entropy, logarithm = std::log(c.T + c.E);
    const double tolerance = std::expm1(8 * 0x1p-24 * charges * (value + logarithm));
    const double limit = limits.as<int32_t>()[0];
    return sample(c.E, 32, [&](int64_t e) {
      double sum = 0.0;
      for (int64_t t = 0; t < c.T; ++t) sum += std::min(1.0, std::exp(static_cast<double>(assignment[t * c.E + e])));
      return std::abs(sum - limit) <= tolerance * limit;
    });
  }
  // Only the bytes that must be read and written; charges are many more instructions.
  Work work() const { return {0, static_cast<double>(values.bytes() + assignment.bytes())}; }

  Case c;
  Tensor values, limits, assignment;
};

}  // namespace
}  // namespace switchgear::bench

int main(int argc, char** argv) { return switchgear::bench::bench_main<switchgear::bench::AssignCapped>(argc, argv); }
