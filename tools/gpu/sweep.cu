// SPDX-License-Identifier: BSD-3-Clause
// Times layers without Python, for one variant of the tunables (sweep.py). Prints lines.py's lines: the median of a few calls in
// milliseconds, each after a read of more than L2, TFLOP/s, and a sum of the output's words, which no tunable may change.
//
//   sweep [--from N]
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/ops.h"

namespace {

using namespace switchgear;

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

struct Shape {
  const char* name;
  int64_t T, H, I, E, K;
};
constexpr Shape kShapes[] = {{"7b-n256", 24576, 1536, 256, 128, 8},    {"120b-n1024", 32768, 4096, 1024, 128, 8},
                             {"120b-n2048", 32768, 4096, 2048, 64, 4}, {"qwen3-30b", 32768, 2048, 768, 128, 8},
                             {"512 rows", 8192, 2048, 768, 128, 8},    {"16 rows", 256, 2048, 768, 128, 8}};
constexpr int kCalls = 9;
constexpr int64_t kFlushed = int64_t{256} << 20;  // bytes, more than L2

__global__ void random_kernel(__nv_bfloat16* out, int64_t count, float scale) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    uint32_t x = static_cast<uint32_t>(i) * 0x9e3779b9u + static_cast<uint32_t>(i >> 32);
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    out[i] = __float2bfloat16((static_cast<float>(x >> 8) / 8388608.0f - 1.0f) * scale);
  }
}

// The K experts of a token are distinct, and all experts have about the same number of rows.
__global__ void choices_kernel(int32_t* ids, float* weights, int64_t count, int num_choices, int num_experts) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const uint32_t first = static_cast<uint32_t>(i / num_choices) * 0x9e3779b9u >> 8;
    ids[i] = static_cast<int32_t>((first + i % num_choices * (num_experts / num_choices)) % num_experts);
    weights[i] = 1.0f / static_cast<float>(num_choices);
  }
}

__global__ void read_kernel(const uint32_t* words, int64_t count, unsigned long long* sum) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  unsigned long long own = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) own += words[i];
  atomicAdd(sum, own);
}

// Device memory of one case.
class Memory {
 public:
  Memory() = default;
  Memory(const Memory&) = delete;
  ~Memory() {
    for (void* block : blocks_) cudaFree(block);
  }
  void* take(int64_t bytes) {
    void* block = nullptr;
    check(cudaMalloc(&block, static_cast<size_t>(bytes)));
    blocks_.push_back(block);
    return block;
  }
  void* random(int64_t elements, float scale) {
    void* const block = take(2 * elements);
    random_kernel<<<1024, 256>>>(static_cast<__nv_bfloat16*>(block), elements, scale);
    return block;
  }

 private:
  std::vector<void*> blocks_;
};

// The temporary memory of an op: allocated by the first call, used by all.
struct Temporary {
  Memory& memory;
  void* block = nullptr;
  int64_t bytes = 0;

  static void* allocate(void* context, int64_t bytes) {
    auto& own = *static_cast<Temporary*>(context);
    if (bytes > own.bytes) own.block = own.memory.take(bytes), own.bytes = bytes;
    return own.block;
  }
};

TensorView bf16(void* data, auto... sizes) { return view(data, DType::kBFloat16, static_cast<int64_t>(sizes)...); }

struct Result {
  double ms, tflops;
  unsigned long long sum;
};

Result measure(const Shape& s, bool backward) {
  Memory memory;
  Temporary temporary{memory};
  const Execution exec{.allocator = {&Temporary::allocate, &temporary}};
  const int64_t S = s.T * s.K, N = 2 * s.I;
  const ExpertWeights weights{
      .gate_up_proj = {.data = bf16(memory.random(s.E * N * s.H, 0.02f), s.E, N, s.H), .parts = 2},
      .down_proj = {.data = bf16(memory.random(s.E * s.H * s.I, 0.02f), s.E, s.H, s.I)}};
  const TensorView x = bf16(memory.random(s.T * s.H, 1.0f), s.T, s.H), y = bf16(memory.take(2 * s.T * s.H), s.T, s.H);
  const TensorView h = bf16(memory.take(2 * S * N), S, N);
  const TensorView ids = view(memory.take(4 * S), DType::kInt32, s.T, s.K);
  const TensorView topk = view(memory.take(4 * S), DType::kFloat32, s.T, s.K);
  choices_kernel<<<256, 256>>>(ids.as<int32_t>(), topk.as<float>(), S, static_cast<int>(s.K), static_cast<int>(s.E));
  const auto forward = [&] {
    cuda::moe_forward({.x = x, .weights = weights, .topk_ids = ids, .topk_weights = topk, .y = y, .h = h}, exec);
  };
  forward();
  MoeBackwardArgs gradients{.grad_y = y, .x = x, .h = h, .weights = weights, .topk_ids = ids, .topk_weights = topk};
  TensorView checked = y;
  if (backward) {
    gradients.grad_x = checked = bf16(memory.take(2 * s.T * s.H), s.T, s.H);
    gradients.grad_gate_up_proj = bf16(memory.take(2 * s.E * N * s.H), s.E, N, s.H);
    gradients.grad_down_proj = bf16(memory.take(2 * s.E * s.H * s.I), s.E, s.H, s.I);
    gradients.grad_topk_weights = view(memory.take(4 * S), DType::kFloat32, s.T, s.K);
  }
  auto* const flushed = static_cast<uint32_t*>(memory.take(kFlushed));
  auto* const sum = static_cast<unsigned long long*>(memory.take(8));
  check(cudaMemset(flushed, 0, kFlushed));
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin));
  check(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i <= kCalls; ++i) {
    read_kernel<<<1024, 256>>>(flushed, kFlushed / 4, sum);
    check(cudaEventRecord(begin));
    if (backward) {
      cuda::moe_backward(gradients, exec);
    } else {
      forward();
    }
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end));
    if (i > 0) times.push_back(ms);  // the first one warms up
  }
  check(cudaMemset(sum, 0, 8));
  read_kernel<<<1024, 256>>>(checked.as<uint32_t>(), s.T * s.H / 2, sum);
  Result result{};
  check(cudaMemcpy(&result.sum, sum, 8, cudaMemcpyDeviceToHost));
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  std::nth_element(times.begin(), times.begin() + kCalls / 2, times.end());
  result.ms = times[kCalls / 2];
  result.tflops = (backward ? 12.0 : 6.0) * static_cast<double>(S * s.H * s.I) / result.ms / 1e9;
  return result;
}

void say(const std::string& line) {
  std::printf("@gpu {%s}\n", line.c_str());
  std::fflush(stdout);
}

}  // namespace

int main(int count, char** arguments) {
  int first = 0;
  for (int i = 1; i + 1 < count; ++i) {
    if (std::strcmp(arguments[i], "--from") == 0) first = std::atoi(arguments[i + 1]);
  }
  const int num_cases = 2 * static_cast<int>(std::size(kShapes));
  std::string names;
  for (int i = 0; i < num_cases; ++i) {
    names += std::string(i == 0 ? "\"" : ", \"") + kShapes[i / 2].name + (i % 2 == 0 ? " forward\"" : " backward\"");
  }
  say("\"cases\": [" + names + "]");
  bool failed = false;
  for (int i = first; i < num_cases; ++i) {
    say("\"starts\": " + std::to_string(i));
    try {
      const Result r = measure(kShapes[i / 2], i % 2 != 0);
      char text[200];
      std::snprintf(text, sizeof text, R"("ends": %d, "verdict": "passed", "ms": %.4f, "tflops": %.1f, "sum": "%llx")",
                    i, r.ms, r.tflops, r.sum);
      say(text);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
      say("\"ends\": " + std::to_string(i) + R"(, "verdict": "failed", "detail": "it throws; see the log")");
      failed = true;
    }
  }
  return failed ? 1 : 0;
}
