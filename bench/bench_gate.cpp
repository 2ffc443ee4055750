// SPDX-License-Identifier: BSD-3-Clause
#include "bench.h"

namespace switchgear::bench {
namespace {

struct GateData {
  GateData(const Case& c, DType weight_dtype)
      : c(c),
        x(Tensor(c.dtype, c.T, c.H).random(1.0, 2)),
        weight(Tensor(weight_dtype, c.E, c.H).random(1.0 / std::sqrt(static_cast<double>(c.H)), 3)),
        bias(Tensor(weight_dtype, c.E).random(1.0, 4)),
        router_logits(weight_dtype, c.T, c.E) {}

  void run() { gate({.x = x, .weight = weight, .bias = bias, .router_logits = router_logits}, c.exec); }
  bool verify() const {
    return sample(c.T * c.E, 256, [&](int64_t i) {
      const int64_t t = i / c.E, e = i % c.E;
      test::Sum sum;
      for (int64_t k = 0; k < c.H; ++k) sum.add({x[t * c.H + k]}, {weight[e * c.H + k]});
      sum.add({bias[e]});
      return test::close(router_logits[i], test::rounded(sum.result(), static_cast<const TensorView&>(weight).dtype));
    });
  }
  Work work() const {
    return {2.0 * static_cast<double>(c.T * c.H * c.E),
            static_cast<double>(x.bytes() + weight.bytes() + bias.bytes() + router_logits.bytes())};
  }

  Case c;
  Tensor x, weight, bias, router_logits;
};

struct Gate : GateData {
  static constexpr const char* kName = "gate";
  explicit Gate(const Case& c) : GateData(c, c.dtype) {}
};

// A router in float32 beside experts in 16 bits: rows of x are widened.
struct WideGate : GateData {
  static constexpr const char* kName = "gate_float32";
  static constexpr DType kNot = DType::kFloat32;
  explicit WideGate(const Case& c) : GateData(c, DType::kFloat32) {}
};

}  // namespace
}  // namespace switchgear::bench

int main(int argc, char** argv) {
  using namespace switchgear::bench;
  return bench_main<Gate, WideGate>(argc, argv);
}
