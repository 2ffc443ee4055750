// SPDX-License-Identifier: BSD-3-Clause
// Measures the ceilings of this machine, which benchmarks divide by.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <new>

#include "checks.h"
#include "integers/kernels.h"
#include "kernels.h"
#include "pages.h"
#include "switchgear/backend.h"
#include "switchgear/check.h"
#include "threads.h"
#include "workspace.h"

namespace switchgear {
namespace {

constexpr int kRepeats = 5;
constexpr std::align_val_t kAlignment{64};

struct Free {
  void operator()(char* data) const { ::operator delete(data, kAlignment); }
};

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
  check_threads(exec);
  SWITCHGEAR_CHECK(TypeError, dtype == DType::kFloat32 || dtype == DType::kBFloat16 || dtype == DType::kFloat16,
                   "dtype: expected float32, bfloat16 or float16, got ", name_of(dtype));
  constexpr int64_t kIterations = 400'000;  // about 10 ms
  const cpu::Kernels& k = cpu::kernels();
  return best_rate(cpu::resolve_threads(exec.num_threads),
                   [&](int64_t) { return k.multiply_rate(dtype, kIterations); });
}

double integer_multiply_rate(int bits, Execution exec) {
  check_threads(exec);
  SWITCHGEAR_CHECK(ValueError, bits == 4 || bits == 8, "bits: expected 8 or 4, got ", bits);
  constexpr int64_t kIterations = 400'000;
  const cpu::IntegerKernels& k = cpu::integer_kernels();
  return best_rate(cpu::resolve_threads(exec.num_threads), [&](int64_t) { return k.multiply_rate(bits, kIterations); });
}

double read_bandwidth(Execution exec) {
  check_threads(exec);
  constexpr int64_t kBytes = int64_t{512} << 20;  // far beyond the caches
  const int num_threads = cpu::resolve_threads(exec.num_threads);
  const cpu::Kernels& k = cpu::kernels();
  const int64_t part = kBytes / num_threads / 512 * 512;
  const std::unique_ptr<char, Free> block(static_cast<char*>(::operator new(kBytes, kAlignment)));
  char* const data = block.get();
  cpu::advise_huge_pages(data, kBytes);
  std::memset(data, 1, kBytes);
  std::atomic<uint64_t> sink{0};
  return best_rate(num_threads, [&](int64_t thread) {
    sink += k.read(data + thread * part, part);
    return static_cast<double>(part);
  });
}

void read(const std::vector<TensorView>& tensors, Execution exec) {
  check_threads(exec);
  for (const TensorView& tensor : tensors) check_host("tensors", tensor);
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
