// SPDX-License-Identifier: BSD-3-Clause
// Shadows the toolkit's header of this name. The toolkit's launch template passes untyped pointers, but a kernel that is an
// ordinary function must be called with its own types. The plain functions are in runtime_api.cpp.
#pragma once
#define cudaLaunchKernelEx cuda_toolkit_launch_kernel_ex
#include_next <cuda_runtime.h>
#undef cudaLaunchKernelEx

#include "runtime.h"

namespace simt {
// The error that CUDA would return; otherwise the launch is run, or recorded if the stream captures.
cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel);
void queue_launch(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> body);
}  // namespace simt

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const void* const address = reinterpret_cast<const void*>(kernel);
  if (const cudaError_t error = simt::check_launch(*config, address)) return error;
  simt::queue_launch(*config, address, simt::bind_kernel(kernel, std::forward<Arguments>(arguments)...));
  return cudaSuccess;
}
