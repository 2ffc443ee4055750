// SPDX-License-Identifier: BSD-3-Clause
// The gate of an expert, element by element: a = act(gate) · up for gated experts, act(gate) for plain ones, and its
// partial derivatives. glu.cuh and the epilogues of the grouped GEMMs share it. ops.h defines the options.
//
//   gate_value(options, gate, up)      a
//   gate_gradient(options, gate, up)   a, ∂a/∂gate, ∂a/∂up; 0 where a limit clamps
//   gate_value<activation>(…), gate_gradient<activation>(…), with_activation(activation, body)
//                                      the same with the switch hoisted out of a loop
//
// About 20 instructions, two of them on the special function unit. Numeric contract: float32, NaN stays NaN. The relative
// error is a dozen roundings plus the error of the exponential's argument. No value is a difference of larger ones, so the
// tails keep their precision. Exponentials past the range of float32 are 0 or infinity, and sigmoids exactly 0 or 1.
#pragma once
#include "platform.cuh"
#include "switchgear/ops.h"

namespace switchgear::cuda {

struct GateGradient {
  float a, per_gate, per_up;
};

struct CurvePoint {
  float value, slope;
};

// __fdividef is within 2 units in the last place, and 0 for denominators past 2^126.
__device__ inline float sigmoid(float x) { return __fdividef(1.0f, 1.0f + expf(-x)); }

// Φ(x) from erfc(z)·e^{z²} ≈ t·P(t), t = 1/(1 + 0.4 z), z = |x|/√2: the fit of csrc/cpu/kernels.inl, relative error 9e-9 on
// z in [0, 10]. Multiplied by the density it keeps its relative precision for negative x.
__device__ inline float normal_cdf(float x, float* density) {
  constexpr float kCoefficients[] = {0.202371179f, -0.508615623f, 0.559893062f, -0.29419631f, 0.277049659f,
                                     0.128059535f, 0.215244239f,  0.224915503f, 0.225708658f};
  const float scaled = fabsf(x) * 0.70710678f;
  const float z = scaled > 10.0f ? 10.0f : scaled;
  const float t = 1.0f / (1.0f + 0.4f * z);
  float p = -0.030429895f;
#pragma unroll
  for (const float c : kCoefficients) p = fmaf(p, t, c);
  const float gauss = expf(-0.5f * x * x);
  *density = 0.39894228f * gauss;
  const float tail = 0.5f * gauss * t * p;
  return x < 0.0f ? tail : 1.0f - tail;
}

// The activation of one argument. For kSwigluOai, its gate's curve x·sigmoid(alpha·x).
template <Activation kActivation>
__device__ inline CurvePoint activate(float x, float alpha) {
  if constexpr (kActivation == Activation::kRelu) {
    return {x < 0.0f ? 0.0f : x, x > 0.0f ? 1.0f : 0.0f};
  } else if constexpr (kActivation == Activation::kRelu2) {
    const float r = x < 0.0f ? 0.0f : x;
    return {r * r, r + r};
  } else if constexpr (kActivation == Activation::kGelu) {
    float density;
    const float cdf = normal_cdf(x, &density);
    return {x * cdf, cdf + x * density};
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // x·sigmoid(2u) with u = √(2/π)·(x + 0.044715 x³), which is x·(1 + tanh u)/2
    const float square = fminf(x * x, 400.0f);  // s is 0 or 1 beyond; the square of a huge x would overflow
    const float s = sigmoid(1.5957691f * x * (1.0f + 0.044715f * square));
    const float slope_2u = 1.5957691f * (1.0f + 0.134145f * square);
    return {x * s, s + x * s * (1.0f - s) * slope_2u};
  } else {
    const float beta = kActivation == Activation::kSwigluOai ? alpha : 1.0f;
    const float s = sigmoid(beta * x);
    return {x * s, s + beta * (x * s) * (1.0f - s)};
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
  const CurvePoint curve = activate<kActivation>(gate, options.alpha);
  const float per_gate = gate_clamped ? 0.0f : curve.slope;
  if (!options.gated) return {curve.value, per_gate, 0.0f};
  const float factor = kActivation == Activation::kSwigluOai ? up + 1.0f : up;
  return {curve.value * factor, per_gate * factor, up_clamped ? 0.0f : curve.value};
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
