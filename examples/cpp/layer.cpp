// SPDX-License-Identifier: BSD-3-Clause
// A layer of experts in C++: router logits, the choice of experts, and the experts, beside a loop in double precision.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "switchgear/ops.h"

using switchgear::DType, switchgear::view;

namespace {

constexpr int T = 64, E = 8, K = 2, H = 128, I = 96;  // tokens, experts, choices, hidden and intermediate size

std::vector<float> normal(size_t size, double deviation) {
  static std::mt19937 generator(0);
  std::normal_distribution<float> values(0.0f, static_cast<float>(deviation));
  std::vector<float> result(size);
  for (float& value : result) value = values(generator);
  return result;
}

double dot(const float* a, const float* b, int size) {
  double sum = 0.0;
  for (int i = 0; i < size; ++i) sum += double{a[i]} * b[i];
  return sum;
}

// The gated expert of a token: down · (silu(gate · x) ⊙ (up · x)); gate_up has all gates before all ups.
std::vector<double> expert_of(const float* x, const float* gate_up, const float* down) {
  std::vector<double> y(H, 0.0);
  for (int i = 0; i < I; ++i) {
    const double gate = dot(gate_up + i * H, x, H), up = dot(gate_up + (I + i) * H, x, H);
    const double a = gate / (1.0 + std::exp(-gate)) * up;
    for (int h = 0; h < H; ++h) y[static_cast<size_t>(h)] += a * down[h * I + i];
  }
  return y;
}

}  // namespace

int main() {
  std::vector<float> x = normal(T * H, 1), router = normal(E * H, 1 / std::sqrt(H));
  std::vector<float> gate_up = normal(E * 2 * I * H, 1 / std::sqrt(H)), down = normal(E * H * I, 1 / std::sqrt(I));
  std::vector<float> logits(T * E), topk_weights(T * K), y(T * H);
  std::vector<int> topk_ids(T * K);

  switchgear::GateRouteArgs routing;  // ValueError and TypeError name an argument that does not fit
  routing.gate.x = view(x.data(), DType::kFloat32, T, H);
  routing.gate.weight = view(router.data(), DType::kFloat32, E, H);
  routing.gate.router_logits = view(logits.data(), DType::kFloat32, T, E);
  routing.options.top_k = K;
  routing.options.normalize = true;
  routing.topk_ids = view(topk_ids.data(), DType::kInt32, T, K);
  routing.topk_weights = view(topk_weights.data(), DType::kFloat32, T, K);
  switchgear::gate_route(routing);

  switchgear::MoeForwardArgs layer;
  layer.x = routing.gate.x;
  layer.weights.gate_up_proj.data = view(gate_up.data(), DType::kFloat32, E, 2 * I, H);
  layer.weights.gate_up_proj.parts = 2;
  layer.weights.down_proj.data = view(down.data(), DType::kFloat32, E, H, I);
  layer.topk_ids = routing.topk_ids;
  layer.topk_weights = routing.topk_weights;
  layer.y = view(y.data(), DType::kFloat32, T, H);
  switchgear::moe_forward(layer, {.num_threads = 2});

  double largest = 0.0;
  for (int t = 0; t < T; ++t) {
    std::vector<double> want(H, 0.0);
    for (int k = 0; k < K; ++k) {
      const int expert = topk_ids[static_cast<size_t>(t * K + k)];
      const auto part = expert_of(&x[static_cast<size_t>(t * H)], &gate_up[static_cast<size_t>(expert * 2 * I * H)],
                                  &down[static_cast<size_t>(expert * H * I)]);
      for (size_t h = 0; h < H; ++h) want[h] += topk_weights[static_cast<size_t>(t * K + k)] * part[h];
    }
    for (size_t h = 0; h < H; ++h) largest = std::max(largest, std::abs(want[h] - y[static_cast<size_t>(t * H) + h]));
  }
  std::printf("largest difference from a loop in double precision: %.1e\n", largest);
  return largest < 1e-4 ? 0 : 1;
}
