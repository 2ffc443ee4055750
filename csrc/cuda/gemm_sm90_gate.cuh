// SPDX-License-Identifier: BSD-3-Clause
// The gate in the epilogues of gemm_sm90.cuh: that of activation.cuh in half of its instructions, for results that are rounded
// to 16 bits. All tiles use it, so a row's bits do not depend on the tile.
//
//   x·sigmoid(t) = x·f²/(1 + r²) with r = e^{-|t|/2}, f = r for t < 0, else 1
//
// 13 instructions for a pair, two of them on the special function unit. Numeric contract: float32, NaN stays NaN. Relative error
// at most |t|·2^-23 + 2^-19, where the rounding to 16 bits adds 2^-9 or 2^-12: the exponent of e^{-|t|/2} is rounded twice, and
// the special function unit's exponential (squared) and reciprocal are within 2^-22 each. A tiny e^t is two factors until it is
// multiplied by up.
#pragma once
#include "activation.cuh"
#include "hopper.cuh"

namespace switchgear::cuda::sm90 {

// For limits above 0; comparisons that keep NaN.
__device__ inline float limited_gate(float gate, float limit) { return gate > limit ? limit : gate; }
__device__ inline float limited_up(float up, float limit) { return fabsf(up) > limit ? copysignf(limit, up) : up; }

// Of arguments within their limits.
template <Activation kActivation>
__device__ inline float rounded_gate_value(bool gated, float alpha, float gate, float up) {
  const float factor = kActivation == Activation::kSwigluOai ? up + 1.0f : up;
  constexpr bool kIsSigmoid =
      kActivation == Activation::kSilu || kActivation == Activation::kGeluTanh || kActivation == Activation::kSwigluOai;
  if constexpr (!kIsSigmoid) {
    const Curve c = activate<kActivation>(gate, alpha);
    return (gated ? c.value * factor : c.value) * c.value_scale;
  } else {
    float t = kActivation == Activation::kSwigluOai ? alpha * gate : gate;
    if constexpr (kActivation == Activation::kGeluTanh) {
      t = 1.5957691f * gate * (1.0f + 0.044715f * fminf(gate * gate, 400.0f));  // as in activate
    }
    const float root = exp2f(-0.72134752f * fabsf(t));
    const float tail = t < 0.0f ? root : 1.0f;
    const float value = gate * (tail * ptx::reciprocal(fmaf(root, root, 1.0f)));
    return (gated ? value * factor : value) * tail;
  }
}

}  // namespace switchgear::cuda::sm90
