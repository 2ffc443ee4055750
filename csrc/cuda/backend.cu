// SPDX-License-Identifier: BSD-3-Clause
// The table of the CUDA backend. Each op runs with its tensors' device current and restores the thread's device afterwards.
#include "switchgear/backend.h"

#include <cuda_runtime.h>

#include <initializer_list>
#include <stdexcept>

#include "ops.h"
#include "switchgear/check.h"

namespace switchgear {
namespace cuda {
namespace {

constexpr uint32_t formats_with_kernels() {
  uint32_t bits = 1u << static_cast<int>(Format::kPlain);
  for (size_t i = 0; i < std::size(kFormats); ++i) bits |= uint32_t{has_cuda_kernels(static_cast<Format>(i))} << i;
  return bits;
}

void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw std::runtime_error(join(call, ": ", cudaGetErrorString(error)));
}

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ == device) return;
    check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <typename Args, TensorView Args::* tensor, void (*op)(const Args&, Execution)>
void on_its_device(const Args& args, Execution exec) {
  const DeviceGuard guard((args.*tensor).device.index);  // ops.cpp has checked that the others are on the same device
  op(args, exec);
}

}  // namespace
}  // namespace cuda

const Backend& cuda_backend() {
  using namespace cuda;
  static constexpr Backend kBackend = [] {
    Backend backend{
        .name = "cuda", .device = DeviceType::kCUDA, .formats = formats_with_kernels(), .takes_adapters = true};
#define SWITCHGEAR_ENTRY(op, Args, tensor) backend.op = on_its_device<Args, &Args::tensor, cuda::op>;
    SWITCHGEAR_OPS(SWITCHGEAR_ENTRY)
#undef SWITCHGEAR_ENTRY
    return backend;
  }();
  return kBackend;
}

}  // namespace switchgear
