// SPDX-License-Identifier: BSD-3-Clause
// Launches: launch(kernel, grid, block, shared_bytes, stream, arguments…) checks the limits, requests shared memory above
// 48 KiB, and throws a std::runtime_error that names the kernel. The stream is the void* of Execution.
#pragma once
#include <cxxabi.h>

#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

#include "platform.cuh"

namespace switchgear::cuda {

// The most blocks of a launch whose blocks loop over their work. tests/simt compiles a small number, so that loops turn twice.
#if defined(SWITCHGEAR_CUDA_MAX_BLOCKS)
constexpr int64_t kMaxBlocks = SWITCHGEAR_CUDA_MAX_BLOCKS;
#else
constexpr int64_t kMaxBlocks = 1 << 16;
#endif

inline std::string kernel_name(const void* kernel) {
  const char* symbol = nullptr;
  if (cudaFuncGetName(&symbol, kernel) != cudaSuccess || symbol == nullptr) return "a kernel";
  int status = 0;
  char* readable = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
  std::string name = status == 0 ? readable : symbol;
  std::free(readable);
  const std::string anonymous = "(anonymous namespace)::";
  for (size_t at = 0; (at = name.find(anonymous)) != std::string::npos;) name.erase(at, anonymous.size());
  return name.substr(0, name.find('('));
}

inline std::string launch_text(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  const auto triple = [](dim3 size) {
    return "(" + std::to_string(size.x) + ", " + std::to_string(size.y) + ", " + std::to_string(size.z) + ")";
  };
  return "launch of " + kernel_name(kernel) + " with grid " + triple(grid) + ", block " + triple(block) + ", " +
         std::to_string(shared_bytes) + " bytes of shared memory: ";
}

[[noreturn]] inline void launch_failed(const std::string& what, const void* kernel, dim3 grid, dim3 block,
                                       size_t shared_bytes) {
  throw std::runtime_error(launch_text(kernel, grid, block, shared_bytes) + what);
}

// Limits that all devices of compute capability 8.0 and later share.
inline void check_limits(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  constexpr unsigned kMaxGridX = 0x7fffffff, kMaxGridYZ = 65535, kMaxThreads = 1024, kMaxBlockZ = 64;
  const auto refuse = [&](const char* what) { launch_failed(what, kernel, grid, block, shared_bytes); };
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) refuse("the grid is empty");
  if (grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ) refuse("the grid is too large");
  const auto threads = static_cast<unsigned long long>(block.x) * block.y * block.z;
  if (threads == 0) refuse("the block is empty");
  if (threads > kMaxThreads || block.z > kMaxBlockZ) refuse("the block is too large");
}

// Blocks have 48 KiB of static and dynamic shared memory together, unless their kernel's limit on the dynamic part is set. It
// belongs to the kernel on a device, and other launches rely on it, in other threads or in a graph: it is only ever raised.
inline cudaError_t raise_shared_limit(const void* kernel, size_t shared_bytes) {
  constexpr size_t kNeverTooMuch = 32 << 10;  // kernels with dynamic shared memory have at most 16 KiB of static
  if (shared_bytes <= kNeverTooMuch) return cudaSuccess;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> limits;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::lock_guard lock(mutex);
  size_t& limit = limits[{kernel, device}];
  if (shared_bytes <= limit) return cudaSuccess;
  const cudaError_t error =
      ::cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error == cudaSuccess) limit = shared_bytes;
  return error;
}

// The attributes of a launch, at most two.
struct LaunchAttributes {
  cudaLaunchAttribute values[2];
  unsigned count = 0;

  cudaLaunchAttribute& add(cudaLaunchAttributeID id) {
    values[count] = {};
    values[count].id = id;
    return values[count++];
  }
};

template <typename... Parameters, typename... Arguments>
void launch_with(LaunchAttributes attributes, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                 void* stream, Arguments&&... arguments) {
  const void* const address = reinterpret_cast<const void*>(kernel);
  check_limits(address, grid, block, shared_bytes);
  const auto check = [&](cudaError_t error) {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // else it would be taken for an error of somebody's next launch
    launch_failed(cudaGetErrorString(error), address, grid, block, shared_bytes);
  };
  check(raise_shared_limit(address, shared_bytes));
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes.values;
  config.numAttrs = attributes.count;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
            Arguments&&... arguments) {
  launch_with({}, kernel, grid, block, shared_bytes, stream, std::forward<Arguments>(arguments)...);
}

// Clusters of `cluster` blocks along x. dependent: blocks may start before the kernel before in the stream has ended; the kernel
// waits for it by griddepcontrol.wait (hopper.cuh).
template <typename... Parameters, typename... Arguments>
void launch_dependent(bool dependent, int cluster, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                      size_t shared_bytes, void* stream, Arguments&&... arguments) {
  LaunchAttributes attributes;
  if (cluster > 1) {
    attributes.add(cudaLaunchAttributeClusterDimension).val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  if (dependent) {
    attributes.add(cudaLaunchAttributeProgrammaticStreamSerialization).val.programmaticStreamSerializationAllowed = 1;
  }
  launch_with(attributes, kernel, grid, block, shared_bytes, stream, std::forward<Arguments>(arguments)...);
}

template <typename... Parameters, typename... Arguments>
void launch_clusters(int cluster, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                     void* stream, Arguments&&... arguments) {
  launch_dependent(false, cluster, kernel, grid, block, shared_bytes, stream, std::forward<Arguments>(arguments)...);
}

// All blocks run at the same time, so they may wait for each other. Throws if the device cannot hold them.
template <typename... Parameters, typename... Arguments>
void launch_cooperative(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                        Arguments&&... arguments) {
  LaunchAttributes attributes;
  attributes.add(cudaLaunchAttributeCooperative).val.cooperative = 1;
  launch_with(attributes, kernel, grid, block, shared_bytes, stream, std::forward<Arguments>(arguments)...);
}

}  // namespace switchgear::cuda
