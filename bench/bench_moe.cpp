// SPDX-License-Identifier: BSD-3-Clause
#include "activation.h"
#include "bench.h"
#include "switchgear/compact.h"

namespace switchgear::bench {
namespace {

struct Layer {
  explicit Layer(const Case& c)
      : c(c),
        routed(c),
        x(Tensor(c.dtype, c.T, c.H).random(1.0, 11)),
        gate_up_proj(Tensor(c.dtype, c.E, c.N(), c.H).random(1.0 / std::sqrt(c.H), 12)),
        down_proj(Tensor(c.dtype, c.E, c.H, c.I).random(1.0 / std::sqrt(c.I), 13)),
        y(c.dtype, c.T, c.H) {}

  ExpertWeights weights() const { return {.gate_up_proj = {.data = gate_up_proj}, .down_proj = {.data = down_proj}}; }
  double forward_flop() const { return 6.0 * static_cast<double>(c.S()) * static_cast<double>(c.H * c.I); }
  double weight_bytes() const { return static_cast<double>(gate_up_proj.bytes() + down_proj.bytes()); }
  double touched() const { return static_cast<double>(routed.experts_hit()) / static_cast<double>(c.E); }

  void forward(const TensorView& h) {
    moe_forward({.x = x,
                 .weights = weights(),
                 .topk_ids = routed.topk_ids,
                 .topk_weights = routed.topk_weights,
                 .y = y,
                 .h = h},
                c.exec);
  }

  // Some elements of the last token's result, by definition.
  bool verify_forward() const {
    const int64_t t = c.T - 1;
    std::vector<std::vector<test::Bounded>> a(static_cast<size_t>(c.K));
    const auto expert = [&](int64_t k) { return static_cast<int64_t>(routed.topk_ids.as<int32_t>()[t * c.K + k]); };
    for (int64_t k = 0; k < c.K; ++k) {
      const auto h = [&](int64_t n) {
        test::Sum sum;
        const int64_t row = (expert(k) * c.N() + n) * c.H;
        for (int64_t j = 0; j < c.H; ++j) sum.add({x[t * c.H + j]}, {gate_up_proj[row + j]});
        return sum.result();
      };
      for (int64_t i = 0; i < c.I; ++i) {
        a[static_cast<size_t>(k)].push_back(test::rounded(test::apply_gate(h(i), h(c.I + i), {}).a, c.dtype));
      }
    }
    return sample(c.H, 64, [&](int64_t column) {
      test::Sum sum;
      for (int64_t k = 0; k < c.K; ++k) {
        test::Sum out;
        const int64_t row = (expert(k) * c.H + column) * c.I;
        for (int64_t i = 0; i < c.I; ++i)
          out.add(a[static_cast<size_t>(k)][static_cast<size_t>(i)], {down_proj[row + i]});
        sum.add(out.result(), {routed.topk_weights[t * c.K + k]});
      }
      return test::close(y[t * c.H + column], test::rounded(sum.result(), c.dtype));
    });
  }

  Case c;
  Routed routed;
  Tensor x, gate_up_proj, down_proj, y;
};

struct MoeForward : Layer {
  static constexpr const char* kName = "moe_forward";
  using Layer::Layer;

  void run() { forward({}); }
  bool verify() const { return verify_forward(); }
  Work work() const {
    return {forward_flop(), weight_bytes() * touched() + static_cast<double>(x.bytes() + y.bytes())};
  }
};

// Bytes of compact weights: see switchgear/compact.h.
class Compact {
 public:
  explicit Compact(const TensorView& weight) : weight_(weight) {
    for (int64_t room = 0, needed; row_bytes() != compact_row_bytes(weight.shape[2], room, weight.dtype);
         room = needed) {
      bytes_.resize(static_cast<size_t>(weight.shape[0] * weight.shape[1] *
                                        compact_row_bytes(weight.shape[2], room, weight.dtype)));
      needed = pack_compact(weight, rows());
    }
  }
  TensorView rows() const {
    return view(const_cast<uint8_t*>(bytes_.data()), DType::kUInt8, weight_.shape[0], weight_.shape[1], row_bytes());
  }
  Weight weight() const {
    return {.format = Format::kCompact,
            .data = rows(),
            .rows = weight_.shape[1],
            .cols = weight_.shape[2],
            .element_bytes = size_of(weight_.dtype)};
  }
  int64_t row_bytes() const { return static_cast<int64_t>(bytes_.size()) / (weight_.shape[0] * weight_.shape[1]); }
  double size() const { return static_cast<double>(bytes_.size()); }

 private:
  TensorView weight_;
  std::vector<uint8_t> bytes_;
};

struct CompactMoeForward : Layer {
  static constexpr const char* kName = "moe_forward/compact";
  static constexpr DType kNot = DType::kFloat16;
  explicit CompactMoeForward(const Case& c)
      : Layer(c), compact_gate_up_proj(gate_up_proj), compact_down_proj(down_proj) {}

  void run() {
    moe_forward({.x = x,
                 .weights = {.gate_up_proj = compact_gate_up_proj.weight(), .down_proj = compact_down_proj.weight()},
                 .topk_ids = routed.topk_ids,
                 .topk_weights = routed.topk_weights,
                 .y = y},
                c.exec);
  }
  bool verify() const { return verify_forward(); }
  Work work() const {
    return {forward_flop(), (compact_gate_up_proj.size() + compact_down_proj.size()) * touched() +
                                static_cast<double>(x.bytes() + y.bytes())};
  }

  Compact compact_gate_up_proj, compact_down_proj;
};

// One step of training: forward and backward, all gradients.
struct MoeTrain : Layer {
  static constexpr const char* kName = "moe_train";
  explicit MoeTrain(const Case& c)
      : Layer(c),
        h(c.dtype, c.S(), c.N()),
        grad_y(Tensor(c.dtype, c.T, c.H).random(1.0, 14)),
        grad_x(c.dtype, c.T, c.H),
        grad_gate_up_proj(c.dtype, c.E, c.N(), c.H),
        grad_down_proj(c.dtype, c.E, c.H, c.I),
        grad_topk_weights(DType::kFloat32, c.T, c.K) {}

  void run() {
    forward(h);
    moe_backward({.grad_y = grad_y,
                  .x = x,
                  .h = h,
                  .weights = weights(),
                  .topk_ids = routed.topk_ids,
                  .topk_weights = routed.topk_weights,
                  .grad_x = grad_x,
                  .grad_gate_up_proj = grad_gate_up_proj,
                  .grad_down_proj = grad_down_proj,
                  .grad_topk_weights = grad_topk_weights},
                 c.exec);
  }
  bool verify() const {
    return verify_forward() && verify_grad_topk_weights() && verify_weight_gradients() && verify_grad_x();
  }

  // y is linear in topk_weights: Σ_k w · grad_w = <grad_y, y> for each token.
  bool verify_grad_topk_weights() const {
    return sample(c.T, 64, [&](int64_t t) {
      double from_weights = 0.0, from_y = 0.0, magnitude = 0.0;
      for (int64_t k = 0; k < c.K; ++k) {
        from_weights += static_cast<double>(routed.topk_weights[t * c.K + k]) * grad_topk_weights[t * c.K + k];
      }
      for (int64_t n = 0; n < c.H; ++n) {
        const double product = static_cast<double>(grad_y[t * c.H + n]) * y[t * c.H + n];
        from_y += product;
        magnitude += std::abs(product);
      }
      // y, a and h are rounded once each, so both sides are within a few units of the dtype
      return std::abs(from_weights - from_y) <= 8 * std::ldexp(magnitude, -std::min(test::mantissa_bits(c.dtype), 20));
    });
  }

  // What the backward pass computes of unit i of a slot's expert, from the h that the forward kept.
  struct Unit {
    test::Bounded grad_gate, grad_up, weighted_a;
  };
  Unit unit(int64_t s, int64_t e, int64_t i) const {
    const auto product = [](test::Bounded a, test::Bounded b) {
      test::Sum one;
      one.add(a, b);
      return one.result();
    };
    const int64_t t = routed.token_indices.as<int32_t>()[s];
    test::Sum grad_a;
    for (int64_t n = 0; n < c.H; ++n) grad_a.add({grad_y[t * c.H + n]}, {down_proj[(e * c.H + n) * c.I + i]});
    const test::Bounded weight{routed.weight_of(s)}, grad = product(grad_a.result(), weight);
    const test::Gate gate = test::apply_gate({h[s * c.N() + i]}, {h[s * c.N() + c.I + i]}, {});
    return {test::rounded(product(grad, gate.per_gate), c.dtype), test::rounded(product(grad, gate.per_up), c.dtype),
            test::rounded(product(weight, gate.a), c.dtype)};
  }

  // Some elements of the gradients of some experts' weights, by definition.
  bool verify_weight_gradients() const {
    return sample(c.E, 4, [&](int64_t e) {
      return sample(c.I, 8, [&](int64_t i) {
        const auto* offsets = routed.expert_offsets.as<int32_t>();
        std::vector<Unit> units;
        for (int64_t s = offsets[e]; s < offsets[e + 1]; ++s) units.push_back(unit(s, e, i));
        const auto sum = [&](test::Bounded Unit::* factor, const Tensor& rows, int64_t column) {
          test::Sum sum;
          for (size_t k = 0; k < units.size(); ++k) {
            const int64_t t = routed.token_indices.as<int32_t>()[offsets[e] + static_cast<int64_t>(k)];
            sum.add(units[k].*factor, {rows[t * c.H + column]});
          }
          return test::rounded(sum.result(), c.dtype);
        };
        const int64_t gate_row = e * c.N() + i, up_row = gate_row + c.I;
        return sample(c.H, 4, [&](int64_t j) {
          return test::close(grad_gate_up_proj[gate_row * c.H + j], sum(&Unit::grad_gate, x, j)) &&
                 test::close(grad_gate_up_proj[up_row * c.H + j], sum(&Unit::grad_up, x, j)) &&
                 test::close(grad_down_proj[(e * c.H + j) * c.I + i], sum(&Unit::weighted_a, grad_y, j));
        });
      });
    });
  }

  // Some elements of the last token's gradient, by definition.
  bool verify_grad_x() const {
    const int64_t t = c.T - 1;
    std::vector<std::vector<Unit>> units(static_cast<size_t>(c.K));
    const auto expert = [&](int64_t k) { return static_cast<int64_t>(routed.topk_ids.as<int32_t>()[t * c.K + k]); };
    for (int64_t k = 0; k < c.K; ++k) {
      const int64_t s = routed.slot_indices.as<int32_t>()[t * c.K + k];
      for (int64_t i = 0; i < c.I; ++i) units[static_cast<size_t>(k)].push_back(unit(s, expert(k), i));
    }
    return sample(c.H, 64, [&](int64_t j) {
      test::Sum sum;
      for (int64_t k = 0; k < c.K; ++k) {
        test::Sum share;  // a slot's, which may be rounded
        for (int64_t i = 0; i < c.I; ++i) {
          const Unit& at = units[static_cast<size_t>(k)][static_cast<size_t>(i)];
          const int64_t gate_row = expert(k) * c.N() + i;
          share.add(at.grad_gate, {gate_up_proj[gate_row * c.H + j]});
          share.add(at.grad_up, {gate_up_proj[(gate_row + c.I) * c.H + j]});
        }
        sum.add(test::rounded(share.result(), c.dtype));
      }
      return test::close(grad_x[t * c.H + j], test::rounded(sum.result(), c.dtype));
    });
  }

  // The forward, and two more products for each of its own; gradients of the weights are written once.
  Work work() const {
    return {3 * forward_flop(),
            weight_bytes() * (2 * touched() + 1) + 3.0 * static_cast<double>(x.bytes() + h.bytes())};
  }

  Tensor h, grad_y, grad_x, grad_gate_up_proj, grad_down_proj, grad_topk_weights;
};

}  // namespace
}  // namespace switchgear::bench

int main(int argc, char** argv) {
  using namespace switchgear::bench;
  return bench_main<MoeForward, CompactMoeForward, MoeTrain>(argc, argv);
}
