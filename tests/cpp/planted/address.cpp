// SPDX-License-Identifier: BSD-3-Clause
#include <memory>
#include <vector>

#include "planted.h"
#include "switchgear/ops.h"

namespace switchgear::planted {
namespace {

// A plan whose slot_indices are one element short.
void heap_overflow_write() {
  const int T = 3, K = 2;
  std::vector<int32_t> ids(T * K, 0), offsets(2), tokens(T * K);
  const auto slots = std::make_unique<int32_t[]>(T * K - 1);
  plan({.topk_ids = view(ids.data(), DType::kInt32, T, K),
        .plan = {.expert_offsets = view(offsets.data(), DType::kInt32, 2),
                 .token_indices = view(tokens.data(), DType::kInt32, T * K),
                 .slot_indices = view(slots.get(), DType::kInt32, T, K)}});
}

// y = x·Wᵀ for one expert and one row.
void multiply(const float* x, const float* weight, float* y, int H, int N) {
  int32_t offsets[] = {0, 1};
  grouped_gemm({.x = view(const_cast<float*>(x), DType::kFloat32, 1, H),
                .weight = {.data = view(const_cast<float*>(weight), DType::kFloat32, 1, N, H)},
                .expert_offsets = view(offsets, DType::kInt32, 2),
                .out = view(y, DType::kFloat32, 1, N)});
}

// Weights that end one row early; the vector kernels read past their end.
void heap_overflow_read() {
  const std::vector<float> x(64), weight(64 * 31);
  std::vector<float> y(32);
  multiply(x.data(), weight.data(), y.data(), 64, 32);
}

void use_after_free() {
  std::vector<float> weight(8 * 8), y(8);
  const float* x = nullptr;
  {
    const std::vector<float> row(8);
    x = opaque(row.data());
  }
  multiply(x, weight.data(), y.data(), 8, 8);
}

void use_after_scope() {
  std::vector<float> weight(8 * 8), y(8);
  const float* x = nullptr;
  {
    float row[8] = {};
    x = opaque(&row[0]);
  }
  multiply(x, weight.data(), y.data(), 8, 8);
}

// Stores of any length begin in y and end behind it. The sanitizer names the error by the first 16 bytes of an access.
void stack_overflow() {
  float y[2], x[8] = {}, weight[8 * 8] = {};
  multiply(x, weight, y, 8, 8);
}

int32_t global_counts[4];
void global_overflow() { ++opaque(&global_counts[0])[opaque(4)]; }

void double_free() {
  auto* p = new float[16];
  delete[] p;
  delete[] opaque(p);
}

void mismatched_delete() {
  auto* p = new float[16];
  delete opaque(p);
}

void leak() {
  auto* p = static_cast<char*>(::operator new(static_cast<size_t>(opaque(100))));
  std::memset(p, 1, 100);
  p = opaque<char*>(nullptr);
}

constexpr Bug kBugs[] = {
    {"heap_overflow_write", heap_overflow_write},
    {"heap_overflow_read", heap_overflow_read},
    {"use_after_free", use_after_free},
    {"use_after_scope", use_after_scope},
    {"stack_overflow", stack_overflow},
    {"global_overflow", global_overflow},
    {"double_free", double_free},
    {"mismatched_delete", mismatched_delete},
    {"leak", leak},
};

}  // namespace
}  // namespace switchgear::planted

int main(int argc, char** argv) { return switchgear::planted::run_named(switchgear::planted::kBugs, argc, argv); }
