// SPDX-License-Identifier: BSD-3-Clause
// Shadows the toolkit's header of this name. The toolkit's launch template passes untyped pointers, but a kernel that is an
// ordinary function must be called with its own types. The plain functions are in runtime_api.cpp.
#pragma once
#define cudaLaunchKernelEx cuda_toolkit_launch_kernel_ex
#include_next <cuda_runtime.h>
#undef cudaLaunchKernelEx

#include "runtime.h"

namespace simt {
// The error that CUDA would return, and the complete launch: shape, dynamic shared memory, attributes.
cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel);
Grid grid_of(const cudaLaunchConfig_t& config, std::function<void()> kernel);
}  // namespace simt

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (const cudaError_t error = simt::check_launch(*config, reinterpret_cast<const void*>(kernel))) return error;
  simt::run({simt::grid_of(*config, simt::bind_kernel(kernel, std::forward<Arguments>(arguments)...))});
  return cudaSuccess;
}
