// SPDX-License-Identifier: BSD-3-Clause
// The gate of an expert, element by element: a = act(gate) · up for gated experts, act(gate) for plain ones, and its
// partial derivatives. glu.cuh and the epilogues of the grouped GEMMs share it. ops.h defines the options.
//
//   gate_value(options, gate, up)      a
//   gate_gradient(options, gate, up)   a, ∂a/∂gate, ∂a/∂up; 0 where a limit clamps
//   gate_value<activation>(…), gate_gradient<activation>(…), with_activation(activation, body)
//                                      the same with the switch hoisted out of a loop
//
// About 24 instructions, two of them on the special function unit. Numeric contract: float32, NaN stays NaN. The relative
// error is a dozen roundings plus the error of the exponential's argument. No value is a difference of larger ones, so the
// tails keep their precision. That holds for all finite gates and ups: a tiny e^x is two factors until it is multiplied by
// up. Sigmoids past the range of float32 are exactly 0 or 1.
#pragma once
#include "platform.cuh"
#include "switchgear/ops.h"

namespace switchgear::cuda {

struct GateGradient {
  float a, per_gate, per_up;
};

// An activation. Each result is the product of two factors, which the caller multiplies last: value · value_scale and
// slope · slope_scale.
struct Curve {
  float value, value_scale;
  float slope, slope_scale;
};

// x·sigmoid(t) for t whose derivative is `rate`. For t < 0, sigmoid(t) = e^t / (1 + e^t), and e^t is the square of e^{t/2}.
// __fdividef is within 2 units in the last place for denominators up to 2^126.
__device__ inline Curve sigmoid_curve(float x, float t, float rate) {
  const float root = expf(0.5f * fminf(t, 80.0f));  // a NaN is still in x
  const float power = root * root;
  const float s = __fdividef(t < 0.0f ? root : power, 1.0f + power), scale = t < 0.0f ? root : 1.0f;
  const float value = x * s;
  return {value, scale, s + value * (1.0f - s * scale) * rate, scale};
}

// x·Φ(x), from erfc(z)·e^{z²} ≈ t·P(t), t = 1/(1 + 0.4 z), z = |x|/√2: the fit of csrc/cpu/kernels.inl, relative error 4e-8
// on z in [0, 13.25]. Multiplied by the density it keeps its relative precision for negative x.
__device__ inline Curve gelu_curve(float x) {
  constexpr float kCoefficients[] = {0.16879836f, -0.43132731f, 0.45925173f, -0.21270886f, 0.23461176f,
                                     0.14224035f, 0.2123189f,   0.22525296f, 0.22569209f};
  const float scaled = fabsf(x) * 0.70710678f;
  const float z = scaled > 13.25f ? 13.25f : scaled;
  const float t = 1.0f / (1.0f + 0.4f * z);
  float p = -0.024129979f;
#pragma unroll
  for (const float c : kCoefficients) p = fmaf(p, t, c);
  const float root = expf(-0.25f * x * x);
  const float gauss = x < 0.0f ? root : root * root, scale = x < 0.0f ? root : 1.0f;
  const float tail = 0.5f * gauss * t * p;
  const float cdf = x < 0.0f ? tail : 1.0f - tail;
  return {x * cdf, scale, cdf + x * (0.39894228f * gauss), scale};
}

// The activation of one argument. For kSwigluOai, its gate's curve x·sigmoid(alpha·x).
template <Activation kActivation>
__device__ inline Curve activate(float x, float alpha) {
  if constexpr (kActivation == Activation::kRelu) {
    return {x < 0.0f ? 0.0f : x, 1.0f, x > 0.0f ? 1.0f : 0.0f, 1.0f};
  } else if constexpr (kActivation == Activation::kRelu2) {
    const float r = x < 0.0f ? 0.0f : x;
    return {r, r, r, 2.0f};
  } else if constexpr (kActivation == Activation::kGelu) {
    return gelu_curve(x);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // x·sigmoid(2u) with u = √(2/π)·(x + 0.044715 x³), which is x·(1 + tanh u)/2
    const float square = fminf(x * x, 400.0f);  // s is 0 or 1 beyond; the square of a huge x would overflow
    return sigmoid_curve(x, 1.5957691f * x * (1.0f + 0.044715f * square), 1.5957691f * (1.0f + 0.134145f * square));
  } else if constexpr (kActivation == Activation::kSwigluOai) {
    return sigmoid_curve(x, alpha * x, alpha);
  } else {
    static_assert(kActivation == Activation::kSilu);
    return sigmoid_curve(x, x, 1.0f);
  }
}

// Unused fields cost nothing: all of this is inlined.
template <Activation kActivation>
__device__ inline GateGradient gate_gradient(const GluOptions& options, float gate, float up) {
  bool gate_clamped = false, up_clamped = false;
  if (options.limit > 0.0f) {  // comparisons that keep NaN
    gate_clamped = gate > options.limit;
    up_clamped = fabsf(up) > options.limit;
    gate = gate_clamped ? options.limit : gate;
    up = up_clamped ? copysignf(options.limit, up) : up;
  }
  const Curve c = activate<kActivation>(gate, options.alpha);
  const float slope = gate_clamped ? 0.0f : c.slope;
  if (!options.gated) return {c.value * c.value_scale, slope * c.slope_scale, 0.0f};
  const float factor = kActivation == Activation::kSwigluOai ? up + 1.0f : up;
  return {c.value * factor * c.value_scale, slope * factor * c.slope_scale,
          up_clamped ? 0.0f : c.value * c.value_scale};
}

template <Activation kActivation>
__device__ inline float gate_value(const GluOptions& options, float gate, float up) {
  return gate_gradient<kActivation>(options, gate, up).a;
}

// body.template operator()<activation>(); the branch is the same for all threads.
template <typename Body>
__device__ inline void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::kSilu: return body.template operator()<Activation::kSilu>();
    case Activation::kGelu: return body.template operator()<Activation::kGelu>();
    case Activation::kGeluTanh: return body.template operator()<Activation::kGeluTanh>();
    case Activation::kRelu: return body.template operator()<Activation::kRelu>();
    case Activation::kRelu2: return body.template operator()<Activation::kRelu2>();
    case Activation::kSwigluOai: return body.template operator()<Activation::kSwigluOai>();
  }
}

__device__ inline GateGradient gate_gradient(const GluOptions& options, float gate, float up) {
  GateGradient result{};
  with_activation(options.activation,
                  [&]<Activation kActivation>() { result = gate_gradient<kActivation>(options, gate, up); });
  return result;
}

__device__ inline float gate_value(const GluOptions& options, float gate, float up) {
  return gate_gradient(options, gate, up).a;
}

}  // namespace switchgear::cuda
