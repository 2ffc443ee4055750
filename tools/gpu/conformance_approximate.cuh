// SPDX-License-Identifier: BSD-3-Clause
// Conformance of expf, __fdividef and reciprocal. No model has their bits: they are at most some units in the last place from
// float64.
#pragma once
#include <algorithm>
#include <cmath>

#include "conformance_case.cuh"
#if defined(HOPPER)
#include "hopper.cuh"
#endif

namespace switchgear::cuda::conformance {

#if defined(ON_DEVICE)
__global__ void approximate_kernel(const uint32_t* in, uint32_t* out) {
  for (int i = thread(); i < 1024; i += 32) {
    const float x = static_cast<float>(in[i] % 160001) / 1000.0f - 80.0f;
    const float y = 3.0f + static_cast<float>(i);
#if defined(HOPPER)
    const float reciprocal = ptx::reciprocal(y);
#else
    const float reciprocal = __frcp_rn(y);
#endif
    out[i] = as_bits(expf(x)), out[1024 + i] = as_bits(__fdividef(x, y)), out[2048 + i] = as_bits(reciprocal);
  }
}

inline std::string far_from_exact(const Numbers& words) {
  const auto ulps = [](float got, double want) { return std::abs(got - want) / std::ldexp(std::abs(want), -23); };
  double worst = 0.0;
  for (uint32_t i = 0; i < 1024; ++i) {
    const float x = static_cast<float>(mix(i + 1000003) % 160001) / 1000.0f - 80.0f;
    float e, quotient, reciprocal;
    std::memcpy(&e, &words[i], 4), std::memcpy(&quotient, &words[1024 + i], 4);
    std::memcpy(&reciprocal, &words[2048 + i], 4);
    worst = std::max({worst, ulps(e, std::exp(static_cast<double>(x))), ulps(reciprocal, 1.0 / (3.0 + i)),
                      x == 0.0f ? 0.0 : ulps(quotient, static_cast<double>(x) / (3.0 + i))});
  }
  return worst <= 3.0 ? ""
                      : std::to_string(worst) + " units in the last place, expected at most 3";  // the manual says 2
}

inline void add_approximate(std::vector<Case>& cases) {
  cases.push_back(
      {"expf and fdividef",
       [](uint32_t* in, uint32_t* out) { launch(approximate_kernel, dim3(1), dim3(32), 0, nullptr, in, out); },
       far_from_exact, true});
}
#else
inline void add_approximate(std::vector<Case>&) {}
#endif

}  // namespace switchgear::cuda::conformance
