// SPDX-License-Identifier: BSD-3-Clause
// glu and its partial derivatives in float64, with bounds for a float32 evaluation.
#pragma once
#include <algorithm>

#include "bounded.h"

namespace switchgear::test {

struct Curve {
  double value, slope;
  double terms;     // Σ|terms| of the slope; 1 - s counts as 1, since it cancels
  double argument;  // of the exponential, as a relative error per kUnit: rounding x by d changes e^x by |x|·d
};

inline Curve activate(Activation activation, double x, double alpha) {
  const auto sigmoid = [](double v) { return 1.0 / (1.0 + std::exp(-v)); };
  switch (activation) {
    case Activation::kGelu: {
      const double cdf = 0.5 * std::erfc(-x / std::sqrt(2.0)), density = std::exp(-x * x / 2) / std::sqrt(2 * M_PI);
      return {x * cdf, cdf + x * density, cdf + std::abs(x) * density, x * x};
    }
    case Activation::kGeluTanh: {
      const double u = 2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x), s = sigmoid(u);
      const double du = 2 * std::sqrt(2 / M_PI) * (1 + 3 * 0.044715 * x * x);
      return {x * s, s + x * s * (1 - s) * du, s + std::abs(x) * s * du, 5 * std::abs(u)};
    }
    case Activation::kRelu: return {std::max(x, 0.0), x > 0 ? 1.0 : 0.0, 1.0, 0.0};
    case Activation::kRelu2: return {std::max(x, 0.0) * std::max(x, 0.0), 2 * std::max(x, 0.0), 2 * std::abs(x), 0.0};
    case Activation::kSilu: alpha = 1.0; [[fallthrough]];
    case Activation::kSwigluOai: {
      const double s = sigmoid(alpha * x);
      return {x * s, s + alpha * x * s * (1 - s), s + alpha * std::abs(x) * s, 2 * alpha * std::abs(x)};
    }
  }
  return {};
}

struct Gate {
  Bounded a;
  Bounded per_gate, per_up;  // valid for exact arguments
};

inline Gate apply_gate(Bounded gate, Bounded up, const GluOptions& o) {
  double gate_in_range = 1.0, up_in_range = 1.0;
  if (o.limit > 0) {
    const double limit = o.limit;
    gate_in_range = gate.value > limit ? 0.0 : 1.0;
    up_in_range = std::abs(up.value) > limit ? 0.0 : 1.0;
    gate.value = std::min(gate.value, limit);
    up.value = std::clamp(up.value, -limit, limit);
  }
  if (o.activation == Activation::kSwigluOai) up = {up.value + 1, up.error + kUnit * (std::abs(up.value) + 1)};
  if (!o.gated) up = {1.0, 0.0};

  const Curve c = activate(o.activation, gate.value, o.alpha);
  // A dozen roundings and the error of the exponential: 4 units and that of its argument, or 2^-126 if it is clamped.
  const double evaluation = (16 + c.argument) * kUnit;
  const double tiny = (1 + std::abs(gate.value)) * (1 + c.argument) * 0x1p-126;
  // No slope changes by more than 2 per unit; that of relu jumps.
  const double slope = o.activation == Activation::kRelu ? 1.0 : std::abs(c.slope) + 2 * gate.error;
  const Bounded curve{c.value, evaluation * std::abs(c.value) + tiny + gate.error * slope};

  const double size = std::abs(up.value) + up.error;
  Gate result;
  result.a = {curve.value * up.value, curve.error * size + std::abs(curve.value) * (up.error + kUnit * size)};
  result.per_gate = {c.slope * up.value * gate_in_range, (evaluation * c.terms + tiny) * size * gate_in_range};
  result.per_up = {curve.value * up_in_range, curve.error * up_in_range};
  return result;
}

// Columns of gate and up of element i in a row of h.
inline int64_t gate_column(const GluOptions& o, int64_t i) { return o.gated && o.interleaved ? 2 * i : i; }
inline int64_t up_column(const GluOptions& o, int64_t I, int64_t i) { return o.interleaved ? 2 * i + 1 : I + i; }

inline std::vector<GluOptions> all_glu_options() {
  std::vector<GluOptions> all;
  for (const auto activation : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh, Activation::kRelu,
                                Activation::kRelu2, Activation::kSwigluOai}) {
    for (const bool gated : {true, false}) {
      for (const bool interleaved : {false, true}) {
        for (const float limit : {0.0f, 1.5f}) {
          if (!gated && (interleaved || activation == Activation::kSwigluOai)) continue;
          all.push_back({activation, gated, interleaved, 1.702f, limit});
        }
      }
    }
  }
  return all;
}

inline std::string describe(const GluOptions& o) {
  constexpr const char* kNames[] = {"silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_oai"};
  return join(" ", kNames[static_cast<int>(o.activation)], o.gated ? " gated" : "", o.interleaved ? " interleaved" : "",
              " limit ", o.limit);
}

}  // namespace switchgear::test
