// SPDX-License-Identifier: BSD-3-Clause
// glu and its partial derivatives in float64, with bounds for a float32 evaluation.
#pragma once
#include <algorithm>

#include "bounded.h"

namespace switchgear::test {

// An activation, and how far a float32 evaluation may be from it in units of kUnit, besides a dozen roundings of the value and
// of the terms of the slope: what the rounded argument of the exponential changes. An argument of size t, rounded n times,
// changes e^t by n·t units.
struct Curve {
  double value, slope;
  double value_units, slope_units;
  double terms;  // Σ|terms| of the slope
};

// x·sigmoid(t); `rate` is the derivative of t, which is rounded `roundings` times.
inline Curve sigmoid_curve(double x, double t, double rate, double roundings) {
  const auto sigmoid = [](double v) { return 1.0 / (1.0 + std::exp(-v)); };
  const double s = sigmoid(t), rest = sigmoid(-t), m = x * rate;
  const double units = s * rest * roundings * std::abs(t);  // by which s changes
  // The computed 1 - s has an error of a unit, until s rounds to 1 and it is 0 instead of e^-t.
  const double computed_rest = t > 18 ? std::exp(-t) / kUnit : 1.0;
  return {x * s, s + m * s * rest, std::abs(x) * units, (1 + std::abs(m)) * units, s + std::abs(m) * s * computed_rest};
}

inline Curve activate(Activation activation, double x, double alpha) {
  switch (activation) {
    case Activation::kGelu: {
      const double cdf = 0.5 * std::erfc(-x / std::sqrt(2.0)), tail = 0.5 * std::erfc(std::abs(x) / std::sqrt(2.0));
      const double density = std::exp(-x * x / 2) / std::sqrt(2 * M_PI), moment = std::abs(x) * density;
      const double value_units = std::abs(x) * tail * x * x, slope_units = (tail + moment) * x * x;
      return {x * cdf, cdf + x * density, value_units, slope_units, cdf + moment};
    }
    case Activation::kGeluTanh: {
      const double c = 2 * std::sqrt(2 / M_PI);
      return sigmoid_curve(x, c * (x + 0.044715 * x * x * x), c * (1 + 3 * 0.044715 * x * x), 5);
    }
    case Activation::kRelu: return {std::max(x, 0.0), x > 0 ? 1.0 : 0.0, 0.0, 0.0, 1.0};
    case Activation::kRelu2: {
      const double r = std::max(x, 0.0);
      return {r * r, 2 * r, 0.0, 0.0, 2 * r};
    }
    case Activation::kSilu: return sigmoid_curve(x, x, 1.0, 2);
    case Activation::kSwigluOai: return sigmoid_curve(x, alpha * x, alpha, 2);
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
  constexpr double kRoundings = 16;
  // Values below the smallest normal number lose bits, before and after the multiplication by up; relu2 multiplies by
  // another gate.
  const double size = std::abs(up.value) + up.error;
  const double tiny = 0x1p-148 * (1 + size + (o.activation == Activation::kRelu2 ? std::abs(gate.value) : 0.0));
  // No slope changes by more than 2 per unit; that of relu jumps.
  const double slope = o.activation == Activation::kRelu ? 1.0 : std::abs(c.slope) + 2 * gate.error;
  const Bounded curve{
      c.value, kUnit * (kRoundings * std::abs(c.value) + c.value_units) + (gate.error > 0 ? gate.error * slope : 0)};

  Gate result;
  result.a = {curve.value * up.value, curve.error * size + std::abs(curve.value) * (up.error + kUnit * size) + tiny};
  result.per_gate = {c.slope * up.value * gate_in_range,
                     (kUnit * (kRoundings * c.terms + c.slope_units) * size + tiny) * gate_in_range};
  result.per_up = {curve.value * up_in_range, (curve.error + 0x1p-148) * up_in_range};
  return result;
}

// Columns of gate and up of element i in a row of h.
inline int64_t gate_column(const GluOptions& o, int64_t i) { return o.gated && o.interleaved ? 2 * i : i; }
inline int64_t up_column(const GluOptions& o, int64_t I, int64_t i) { return o.interleaved ? 2 * i + 1 : I + i; }

inline std::vector<GluOptions> all_glu_options() {
  std::vector<GluOptions> all;
  for (size_t number = 0; number < kActivationNames.size(); ++number) {
    const auto activation = static_cast<Activation>(number);
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
  return join(" ", kActivationNames[static_cast<size_t>(o.activation)], o.gated ? " gated" : "",
              o.interleaved ? " interleaved" : "", " limit ", o.limit);
}

}  // namespace switchgear::test
