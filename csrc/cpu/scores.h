// SPDX-License-Identifier: BSD-3-Clause
// What the routing ops share beside rows.h. Float operations run in the written order: files that include this are
// compiled with -ffp-contract=off.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "ranking.h"
#include "switchgear/tensor.h"

namespace switchgear::cpu {

inline float max_of(const float* values, int64_t n) {
  constexpr int kLanes = 8;  // breaks the chain of dependent comparisons
  float lanes[kLanes];
  std::fill_n(lanes, kLanes, -kFloatMax);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) lanes[j] = values[i + j] > lanes[j] ? values[i + j] : lanes[j];
  }
  for (; i < n; ++i) lanes[0] = std::max(lanes[0], values[i]);
  return *std::max_element(lanes, lanes + kLanes);
}

// The selection bias of the experts, empty if there is none. -Inf, which closes an expert, and NaN become the lowest number.
inline std::vector<float> sanitised_bias(const TensorView& selection_bias) {
  std::vector<float> bias;
  if (selection_bias.defined()) {
    const float* values = selection_bias.as<const float>();
    bias.assign(values, values + selection_bias.numel());
    std::transform(bias.begin(), bias.end(), bias.begin(), sanitise);
  }
  return bias;
}

// Divides the weights of the chosen experts by their sum if `normalize`, then multiplies them by `scale`.
inline void finish_weights(float* weights, int64_t count, bool normalize, float scale) {
  double total = 0.0;
  for (int64_t k = 0; k < count; ++k) total += weights[k];
  total += 1e-20;
  for (int64_t k = 0; k < count; ++k) {
    if (normalize) weights[k] = static_cast<float>(weights[k] / total);
    weights[k] *= scale;
  }
}

}  // namespace switchgear::cpu
