// SPDX-License-Identifier: BSD-3-Clause
// What all subjects of conformance share on the host: cases, the memory they run in, and how they are launched.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "conformance_data.cuh"
#include "launch.h"

namespace switchgear::cuda::conformance {

constexpr int kIn = 1 << 14, kOut = 1 << 14;  // words
constexpr uint32_t kPoison = 0xdeadbeef;      // of output that nothing wrote

// Memory for kernels and host, used by one at a time.
class Words {
 public:
  explicit Words(int count) : host_(static_cast<size_t>(count)) {
#if defined(ON_DEVICE)
    check(cudaMalloc(&device_, bytes()));
#endif
  }
  Words(const Words&) = delete;
  ~Words() {
#if defined(ON_DEVICE)
    cudaFree(device_);
#endif
  }
  template <typename Fill>
  void fill(const Fill& fill) {
    for (size_t i = 0; i < host_.size(); ++i) host_[i] = fill(static_cast<uint32_t>(i));
#if defined(ON_DEVICE)
    check(cudaMemcpy(device_, host_.data(), bytes(), cudaMemcpyHostToDevice));
#endif
  }
  const std::vector<uint32_t>& read() {
#if defined(ON_DEVICE)
    check(cudaDeviceSynchronize());
    check(cudaMemcpy(host_.data(), device_, bytes(), cudaMemcpyDeviceToHost));
#endif
    return host_;
  }
#if defined(ON_DEVICE)
  uint32_t* data() const { return device_; }
#else
  uint32_t* data() { return host_.data(); }
#endif

 private:
  size_t bytes() const { return host_.size() * sizeof(uint32_t); }
  static void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
    std::exit(1);
  }
  std::vector<uint32_t> host_;
  uint32_t* device_ = nullptr;
};

using Numbers = std::vector<uint32_t>;

struct Case {
  std::string name;
  std::function<void(uint32_t* in, uint32_t* out)> run;
  std::function<std::string(const Numbers& words)> check =
      nullptr;           // instead of a comparison: what is wrong, or nothing
  bool finding = false;  // what it complains about is no failure
  std::string group = "";
};

constexpr size_t kShared = 47 << 10;

// A kernel of one block that reads `in` and writes `out`, and its case.
#define KERNEL(name) __global__ void name##_kernel([[maybe_unused]] const uint32_t* in, uint32_t* out)
#define SIMPLE(name, threads) simple(#name, name##_kernel, threads)

inline Case simple(const char* name, void (*kernel)(const uint32_t*, uint32_t*), int threads) {
  return {name, [=](uint32_t* in, uint32_t* out) {
            launch(kernel, dim3(1), dim3(static_cast<unsigned>(threads)), kShared, nullptr, in, out);
          }};
}

inline std::string all_equal(const Numbers& words, size_t count, uint32_t want, const char* what) {
  if (words.size() != count) return std::to_string(words.size()) + " words, expected " + std::to_string(count);
  size_t wrong = 0;
  for (const uint32_t word : words) wrong += word != want ? 1 : 0;
  return wrong == 0 ? "" : std::to_string(wrong) + " of " + std::to_string(count) + " " + what;
}

}  // namespace switchgear::cuda::conformance
