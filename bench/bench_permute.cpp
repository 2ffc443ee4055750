// SPDX-License-Identifier: BSD-3-Clause
#include "bench.h"

namespace switchgear::bench {
namespace {

struct Rows {
  explicit Rows(const Case& c)
      : c(c),
        routed(c),
        tokens(Tensor(c.dtype, c.T, c.H).random(1.0, 4)),
        slots(Tensor(c.dtype, c.S(), c.H).random(1.0, 5)) {}

  int32_t slot_of(int64_t i) const { return routed.slot_indices.as<int32_t>()[i]; }

  Case c;
  Routed routed;
  Tensor tokens, slots;  // [T,H], [S,H]
};

struct Permute : Rows {
  static constexpr const char* kName = "permute";
  using Rows::Rows;

  void run() { permute({.x = tokens, .plan = routed.plan(), .permuted_x = slots}, c.exec); }
  bool verify() const {
    const auto row = static_cast<size_t>(c.H * size_of(c.dtype));
    return sample(c.S(), c.S(), [&](int64_t i) {
      return std::memcmp(slots.as<char>() + slot_of(i) * row, tokens.as<char>() + i / c.K * row, row) == 0;
    });
  }
  Work work() const { return {0, 2.0 * static_cast<double>(slots.bytes())}; }
};

struct Combine : Rows {
  static constexpr const char* kName = "combine";
  using Rows::Rows;

  void run() {
    combine({.permuted_y = slots, .plan = routed.plan(), .topk_weights = routed.topk_weights, .y = tokens}, c.exec);
  }
  bool verify() const {
    return sample(c.T * c.H, 256, [&](int64_t i) {
      test::Sum sum;
      for (int64_t k = 0; k < c.K; ++k) {
        const int64_t pair = i / c.H * c.K + k;
        sum.add({slots[slot_of(pair) * c.H + i % c.H]}, {routed.topk_weights[pair]});
      }
      return test::close(tokens[i], test::rounded(sum.result(), c.dtype));
    });
  }
  Work work() const {
    return {2.0 * static_cast<double>(slots.numel()), static_cast<double>(slots.bytes() + tokens.bytes())};
  }
};

struct CombineWeightBackward : Rows {
  static constexpr const char* kName = "combine_weight_backward";
  explicit CombineWeightBackward(const Case& c) : Rows(c), grad_topk_weights(DType::kFloat32, c.T, c.K) {}

  void run() {
    combine_weight_backward(
        {.grad_y = tokens, .permuted_y = slots, .plan = routed.plan(), .grad_topk_weights = grad_topk_weights}, c.exec);
  }
  bool verify() const {
    return sample(c.S(), 256, [&](int64_t i) {
      test::Sum sum;
      for (int64_t h = 0; h < c.H; ++h) sum.add({tokens[i / c.K * c.H + h]}, {slots[slot_of(i) * c.H + h]});
      return test::close(grad_topk_weights[i], sum.result());
    });
  }
  Work work() const {
    return {2.0 * static_cast<double>(slots.numel()), static_cast<double>(slots.bytes() + tokens.bytes())};
  }

  Tensor grad_topk_weights;
};

}  // namespace
}  // namespace switchgear::bench

int main(int argc, char** argv) {
  using namespace switchgear::bench;
  return bench_main<Permute, Combine, CombineWeightBackward>(argc, argv);
}
