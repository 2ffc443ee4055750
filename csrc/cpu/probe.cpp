// SPDX-License-Identifier: BSD-3-Clause
// Measures the ceilings of this machine, which benchmarks divide by.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "integers/kernels.h"
#include "kernels.h"
#include "switchgear/backend.h"
#include "threads.h"
#include "workspace.h"

namespace switchgear {
namespace {

constexpr int kRepeats = 5;

// The best rate of a few runs of `work` on all threads; work(thread) returns the amount done.
template <typename Work>
double best_rate(int num_threads, Work&& work) {
  double best = 0.0;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    std::atomic<double> done{0.0};
    const auto start = std::chrono::steady_clock::now();
    cpu::parallel_for(num_threads, num_threads, [&](int64_t part, int) { done += work(part); });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    best = std::max(best, done.load() / elapsed.count());
  }
  return best;
}

}  // namespace

double multiply_rate(DType dtype, Execution exec) {
  constexpr int64_t kIterations = 400'000;  // about 10 ms
  const cpu::Kernels& k = cpu::kernels();
  return best_rate(cpu::resolve_threads(exec.num_threads),
                   [&](int64_t) { return k.multiply_rate(dtype, kIterations); });
}

double integer_multiply_rate(int bits, Execution exec) {
  constexpr int64_t kIterations = 400'000;
  const cpu::IntegerKernels& k = cpu::integer_kernels();
  return best_rate(cpu::resolve_threads(exec.num_threads), [&](int64_t) { return k.multiply_rate(bits, kIterations); });
}

double read_bandwidth(Execution exec) {
  constexpr int64_t kBytes = int64_t{512} << 20;  // far beyond the caches
  const int num_threads = cpu::resolve_threads(exec.num_threads);
  const cpu::Kernels& k = cpu::kernels();
  const int64_t part = kBytes / num_threads / 512 * 512;
  cpu::Workspace workspace(kBytes);
  char* const data = static_cast<char*>(workspace.take_bytes(kBytes));
  std::memset(data, 1, kBytes);
  std::atomic<uint64_t> sink{0};
  return best_rate(num_threads, [&](int64_t thread) {
    sink += k.read(data + thread * part, part);
    return static_cast<double>(part);
  });
}

void read(const std::vector<TensorView>& tensors, Execution exec) {
  const int num_threads = cpu::resolve_threads(exec.num_threads);
  const cpu::Kernels& k = cpu::kernels();
  std::atomic<uint64_t> sink{0};  // keeps the loads alive
  const int64_t parts = static_cast<int64_t>(tensors.size()) * num_threads;
  cpu::parallel_for(num_threads, parts, [&](int64_t i, int) {
    const TensorView& tensor = tensors[static_cast<size_t>(i / num_threads)];
    const int64_t part = tensor.extent() / num_threads;
    sink += k.read(static_cast<const char*>(tensor.data) + i % num_threads * part, part);
  });
}

void release_workspaces() { cpu::release_workspaces(); }

}  // namespace switchgear
