// SPDX-License-Identifier: BSD-3-Clause
// The part of the CUDA runtime that launchers use, on CPU memory. All work is done when a call returns, except on a stream that
// captures: there it is kept for the graph (capture.cpp). Streams are recorded, so that a test can check whether all work went
// to the right one.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <map>
#include <string>

#include "api.h"
#include "attributes.h"
#include "capture.h"
#include "tma.h"

namespace simt {
namespace {

std::map<const void*, int> dynamic_shared_limits;  // by kernel, if raised
std::vector<cudaStream_t> streams;
std::vector<int> devices;  // the current device at each of them
cudaError_t last_error = cudaSuccess;
int current_device = 0;
int waits = 0;

constexpr int kSharedWithoutOptIn = 48 << 10;
constexpr int kNumDevices = 2;  // identical

void write_down(cudaStream_t stream) {
  streams.push_back(stream);
  devices.push_back(current_device);
}

// Runs the work now, or keeps it for the graph that the stream captures.
cudaError_t queue(cudaStream_t stream, std::function<void()> work) {
  write_down(stream);
  if (const cudaError_t error = capture(stream, work); error != cudaSuccess) return error;
  if (work) work();
  return cudaSuccess;
}

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

bool wants_cooperative(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeCooperative) return config.attrs[i].val.cooperative != 0;
  }
  return false;
}

bool is_dependent(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeProgrammaticStreamSerialization) continue;
    return config.attrs[i].val.programmaticStreamSerializationAllowed != 0;
  }
  return false;
}

unsigned cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) return config.attrs[i].val.clusterDim.x;
  }
  return 1;
}

// Clusters along x alone, and no larger than every device of sm_90 allows.
bool is_cluster_possible(const cudaLaunchConfig_t& config) {
  constexpr unsigned kMaxCluster = 8;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeClusterDimension) continue;
    const auto& size = config.attrs[i].val.clusterDim;
    if (device().major < 9 || size.x == 0 || size.x > kMaxCluster || size.y != 1 || size.z != 1) return false;
    if (config.gridDim.x % size.x != 0) return false;
  }
  return true;
}

// How many blocks of this size fit on a multiprocessor, by threads and by shared memory.
int blocks_per_multiprocessor(uint64_t threads, size_t dynamic_shared) {
  constexpr uint64_t kMaxThreads = 2048;
  const size_t shared = dynamic_shared + 1024;  // reserved by the system
  const uint64_t by_shared = static_cast<size_t>(device().shared_memory_per_block + 1024) / shared;
  return static_cast<int>(std::min<uint64_t>({32, kMaxThreads / threads, by_shared}));
}

}  // namespace

std::vector<void*> used_streams() { return {streams.begin(), streams.end()}; }
std::vector<int> used_devices() { return devices; }
int host_waits() { return waits; }
void forget_streams() {
  waits = 0;
  streams.clear();
  devices.clear();
}

cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || threads == 0) return remember(cudaErrorInvalidConfiguration);
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) return remember(cudaErrorInvalidConfiguration);
  if (threads > 1024 || block.z > 64) return remember(cudaErrorInvalidConfiguration);
  if (threads > launch_bound(kernel)) return remember(cudaErrorLaunchOutOfResources);
  const auto raised = dynamic_shared_limits.find(kernel);
  const int limit = raised == dynamic_shared_limits.end() ? kSharedWithoutOptIn
                                                          : std::min(raised->second, device().shared_memory_per_block);
  if (config.dynamicSmemBytes > static_cast<size_t>(limit)) return remember(cudaErrorInvalidValue);
  if (is_dependent(config) && device().major < 9) return remember(cudaErrorNotSupported);
  if (!is_cluster_possible(config)) return remember(cudaErrorInvalidClusterSize);
  if (wants_cooperative(config)) {
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    const int resident = device().multiprocessors * blocks_per_multiprocessor(threads, config.dynamicSmemBytes);
    if (blocks > static_cast<uint64_t>(resident)) return remember(cudaErrorCooperativeLaunchTooLarge);
  }
  return remember(refuse_capture(config.stream));
}

void queue_launch(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> body) {
  const bool raised = dynamic_shared_limits.contains(kernel);
  const Grid grid{.grid = config.gridDim,
                  .block = config.blockDim,
                  .dynamic_shared = config.dynamicSmemBytes,
                  .kernel = std::move(body),
                  .dependent = is_dependent(config),
                  .cooperative = wants_cooperative(config),
                  .cluster = cluster_of(config),
                  .shared_limit = static_cast<size_t>(raised ? device().shared_memory_per_block : kSharedWithoutOptIn),
                  .registers = registers_per_thread(launch_bound(kernel))};
  queue(config.stream, [grid] { run({grid}); });
}

namespace {

// cuTensorMapEncodeTiled, with checks of its documented requirements.
CUresult encode_tiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* start, const cuuint64_t* size,
                      const cuuint64_t* stride, const cuuint32_t* box, const cuuint32_t* element_stride,
                      CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill fill) {
  const auto element_size = [&]() -> unsigned {
    switch (type) {
      case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
      case CU_TENSOR_MAP_DATA_TYPE_UINT16:
      case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
      case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
      case CU_TENSOR_MAP_DATA_TYPE_UINT32:
      case CU_TENSOR_MAP_DATA_TYPE_INT32:
      case CU_TENSOR_MAP_DATA_TYPE_FLOAT32: return 4;
      case CU_TENSOR_MAP_DATA_TYPE_UINT64:
      case CU_TENSOR_MAP_DATA_TYPE_INT64:
      case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
      default: return 0;
    }
  }();
  constexpr uint64_t kMaxSize = uint64_t{1} << 32, kMaxStride = uint64_t{1} << 40;
  if (out == nullptr || reinterpret_cast<uintptr_t>(out) % 64 != 0 || element_size == 0)
    return CUDA_ERROR_INVALID_VALUE;
  if (rank == 0 || rank > static_cast<unsigned>(kMaxTensorRank)) return CUDA_ERROR_INVALID_VALUE;
  if (start == nullptr || reinterpret_cast<uintptr_t>(start) % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) {
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  TensorMap map{};
  map.mark = kTensorMapMark;
  map.start = static_cast<char*>(start);
  map.rank = static_cast<uint8_t>(rank);
  map.element_size = static_cast<uint8_t>(element_size);
  for (cuuint32_t i = 0; i < rank; ++i) {
    if (size[i] == 0 || size[i] > kMaxSize || box[i] == 0 || box[i] > 256 || element_stride[i] != 1) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    map.size[i] = size[i];
    map.box[i] = static_cast<uint16_t>(box[i]);
    if (i + 1 == rank) continue;
    if (stride[i] % 16 != 0 || stride[i] >= kMaxStride) return CUDA_ERROR_INVALID_VALUE;
    map.stride[i] = stride[i];
  }
  const unsigned row = box[0] * element_size;
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE: map.swizzle_bits = 0; break;
    case CU_TENSOR_MAP_SWIZZLE_32B: map.swizzle_bits = 1; break;
    case CU_TENSOR_MAP_SWIZZLE_64B: map.swizzle_bits = 2; break;
    case CU_TENSOR_MAP_SWIZZLE_128B: map.swizzle_bits = 3; break;
    default: return CUDA_ERROR_NOT_SUPPORTED;
  }
  if (row % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  if (map.swizzle_bits > 0 && row > 16u << map.swizzle_bits) return CUDA_ERROR_INVALID_VALUE;
  std::memset(out, 0, sizeof *out);
  std::memcpy(out, &map, sizeof map);
  return CUDA_SUCCESS;
}

cudaError_t entry_point(const char* symbol, void** function, cudaDriverEntryPointQueryResult* status) {
  *function = nullptr;
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  if (known) *function = reinterpret_cast<void*>(&encode_tiled);
  if (status != nullptr) *status = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return known || status != nullptr ? cudaSuccess : remember(cudaErrorSymbolNotFound);
}

}  // namespace
}  // namespace simt

using namespace simt;

extern "C" {

cudaError_t cudaGetDevice(int* device) {
  *device = current_device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kNumDevices) return remember(cudaErrorInvalidDevice);
  current_device = device;
  return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = kNumDevices;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const Device& device = simt::device();
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = device.major; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = device.minor; return cudaSuccess;
    case cudaDevAttrMultiProcessorCount: *value = device.multiprocessors; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = kSharedWithoutOptIn; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = device.shared_memory_per_block; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device.shared_memory_per_block + 1024;
      return cudaSuccess;
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; return cudaSuccess;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; return cudaSuccess;
    case cudaDevAttrWarpSize: *value = 32; return cudaSuccess;
    case cudaDevAttrCooperativeLaunch: *value = 1; return cudaSuccess;
    default: return remember(cudaErrorNotSupported);
  }
}

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  const Device& device = simt::device();
  *properties = {};
  std::snprintf(properties->name, sizeof properties->name, "simt sm_%d%d", device.major, device.minor);
  properties->major = device.major;
  properties->minor = device.minor;
  properties->multiProcessorCount = device.multiprocessors;
  properties->sharedMemPerBlock = kSharedWithoutOptIn;
  properties->sharedMemPerBlockOptin = static_cast<size_t>(device.shared_memory_per_block);
  properties->sharedMemPerMultiprocessor = static_cast<size_t>(device.shared_memory_per_block) + 1024;
  properties->maxThreadsPerBlock = 1024;
  properties->maxThreadsPerMultiProcessor = 2048;
  properties->warpSize = 32;
  properties->cooperativeLaunch = 1;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > device().shared_memory_per_block) return remember(cudaErrorInvalidValue);
  dynamic_shared_limits[kernel] = value;
  return cudaSuccess;
}

cudaError_t cudaFuncGetName(const char** name, const void* kernel) {
  static std::map<const void*, std::string> names;
  std::string& text = names[kernel];
  if (text.empty()) text = function_name(kernel);
  *name = text.c_str();
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads,
                                                          size_t dynamic_shared) {
  if (threads <= 0) return remember(cudaErrorInvalidValue);
  *blocks = blocks_per_multiprocessor(static_cast<uint64_t>(threads), dynamic_shared);
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* start, int value, size_t size, cudaStream_t stream) {
  return remember(queue(stream, [=] { std::memset(start, value, size); }));
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind, cudaStream_t stream) {
  if (kind != cudaMemcpyDeviceToDevice) return remember(cudaErrorInvalidMemcpyDirection);
  return remember(queue(stream, [=] { std::memcpy(to, from, size); }));
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  ++waits;
  return remember(refuse_while_capturing());
}
cudaError_t cudaDeviceSynchronize() {
  ++waits;
  return remember(refuse_while_capturing());
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorInvalidMemcpyDirection: return "cudaErrorInvalidMemcpyDirection";
    case cudaErrorLaunchOutOfResources: return "cudaErrorLaunchOutOfResources";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureImplicit: return "cudaErrorStreamCaptureImplicit";
    case cudaErrorCooperativeLaunchTooLarge: return "cudaErrorCooperativeLaunchTooLarge";
    case cudaErrorInvalidClusterSize: return "cudaErrorInvalidClusterSize";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    case cudaErrorSymbolNotFound: return "cudaErrorSymbolNotFound";
    default: return "a CUDA error";
  }
}
const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned int, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  return entry_point(symbol, function, status);
}
cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** function, unsigned long long,
                                    cudaDriverEntryPointQueryResult* status) {
  return entry_point(symbol, function, status);
}

}  // extern "C"
