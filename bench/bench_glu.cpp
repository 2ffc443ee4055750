// SPDX-License-Identifier: BSD-3-Clause
#include "activation.h"
#include "bench.h"

namespace switchgear::bench {
namespace {

struct Gated {
  explicit Gated(const Case& c)
      : c(c),
        h(Tensor(c.dtype, c.S(), c.N()).random(2.0, 9)),
        a(Tensor(c.dtype, c.S(), c.I).random(1.0, 10)),
        grad_h(c.dtype, c.S(), c.N()) {}

  test::Gate gate_of(int64_t i) const {
    const int64_t row = i / c.I * c.N(), column = i % c.I;
    return test::apply_gate({h[row + column]}, {h[row + c.I + column]}, {});
  }

  Case c;
  Tensor h, a, grad_h;
};

struct Glu : Gated {
  static constexpr const char* kName = "glu";
  using Gated::Gated;

  void run() { glu({.h = h, .a = a}, c.exec); }
  bool verify() const {
    return sample(a.numel(), 4096, [&](int64_t i) { return test::close(a[i], test::rounded(gate_of(i).a, c.dtype)); });
  }
  Work work() const { return {0, static_cast<double>(h.bytes() + a.bytes())}; }
};

struct GluBackward : Gated {
  static constexpr const char* kName = "glu_backward";
  using Gated::Gated;

  void run() { glu_backward({.grad_a = a, .h = h, .grad_h = grad_h}, c.exec); }
  bool verify() const {
    return sample(a.numel(), 4096, [&](int64_t i) {
      const int64_t row = i / c.I * c.N(), column = i % c.I;
      const test::Gate gate = gate_of(i);
      const auto correct = [&](float got, test::Bounded slope) {
        test::Sum product;
        product.add({a[i]}, slope);
        return test::close(got, test::rounded(product.result(), c.dtype));
      };
      return correct(grad_h[row + column], gate.per_gate) && correct(grad_h[row + c.I + column], gate.per_up);
    });
  }
  Work work() const { return {0, static_cast<double>(h.bytes() + a.bytes() + grad_h.bytes())}; }
};

}  // namespace
}  // namespace switchgear::bench

int main(int argc, char** argv) {
  using namespace switchgear::bench;
  return bench_main<Glu, GluBackward>(argc, argv);
}
