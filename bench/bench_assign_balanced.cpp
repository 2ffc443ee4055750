// SPDX-License-Identifier: BSD-3-Clause
#include "bench.h"

namespace switchgear::bench {
namespace {

// An auction of all tokens, of at most 100 iterations as in BASE layers.
struct AssignBalanced {
  static constexpr const char* kName = "assign_balanced";

  explicit AssignBalanced(const Case& c)
      : c(c), values(Tensor(DType::kFloat32, c.T, c.E).random(1.0, 2)), expert_ids(DType::kInt32, c.T) {}

  void run() { assign_balanced({.values = values, .expert_ids = expert_ids}, c.exec); }
  // Every expert has equally many tokens, and the total exceeds that of round-robin assignment.
  bool verify() const {
    const int32_t* ids = expert_ids.as<int32_t>();
    double total = 0.0, in_turn = 0.0;
    for (int64_t t = 0; t < c.T; ++t) {
      total += values[t * c.E + ids[t]];
      in_turn += values[t * c.E + t % c.E];
    }
    return (c.T < c.E || total > in_turn) && sample(c.E, c.E, [&](int64_t e) {
             return std::count(ids, ids + c.T, static_cast<int32_t>(e)) == c.T / c.E + (e < c.T % c.E);
           });
  }
  // Only the bytes that must be read and written; bids are many more instructions.
  Work work() const { return {0, static_cast<double>(values.bytes() + expert_ids.bytes())}; }

  Case c;
  Tensor values, expert_ids;
};

}  // namespace
}  // namespace switchgear::bench

int main(int argc, char** argv) { return switchgear::bench::bench_main<switchgear::bench::AssignBalanced>(argc, argv); }
