// SPDX-License-Identifier: BSD-3-Clause
// The shim of the CUDA runtime: it must refuse what a device would, and record the streams it was given.
#include "api.h"

#include <vector>

#include "expect.h"
#include "launch.h"
#include "tensor_maps.h"

using namespace switchgear::cuda;

namespace {

__global__ void empty_kernel() {}
__global__ void fill_kernel(int* out) {
  SHARED_DYN(int, tile);
  tile[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = tile[threadIdx.x];
}

// Of one warp, past launch(), which requests shared memory.
template <typename... Parameters>
cudaError_t launch_plainly(void (*kernel)(Parameters...), size_t shared_bytes, Parameters... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = 1;
  config.blockDim = 32;
  config.dynamicSmemBytes = shared_bytes;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

TEST(launches_that_a_device_refuses) {
  CHECK_FAILS("the grid is empty", launch(empty_kernel, 0, 32, 0, nullptr));
  CHECK_FAILS("the grid is too large", launch(empty_kernel, dim3(1, 65536), 32, 0, nullptr));
  CHECK_FAILS("the block is too large", launch(empty_kernel, 1, 1056, 0, nullptr));
  CHECK_FAILS("the block is too large", launch(empty_kernel, 1, dim3(1, 1, 65), 0, nullptr));
  CHECK_FAILS("empty_kernel with grid (1, 1, 1)", launch(empty_kernel, 1, 1056, 0, nullptr));
}

TEST(shared_memory_above_48_kb_must_be_asked_for) {
  std::vector<int> out(32);
  CHECK(launch_plainly(fill_kernel, 60 << 10, out.data()) == cudaErrorInvalidValue);
  CHECK(cudaGetLastError() == cudaErrorInvalidValue && cudaGetLastError() == cudaSuccess);
  launch(fill_kernel, 1, 32, 60 << 10, nullptr, out.data());  // requests it
  CHECK(out[31] == 31);
  CHECK(launch_plainly(fill_kernel, 60 << 10, out.data()) == cudaSuccess);
}

__global__ void both_kernel(int* out) {
  SHARED_DYN(int, tile);
  SHARED_ARRAY(int, fixed, 64);
  fixed[threadIdx.x] = tile[threadIdx.x] = 1;
  out[threadIdx.x] = fixed[threadIdx.x];
}
TEST(static_and_dynamic_shared_memory_count_together) {
  std::vector<int> out(32);
  constexpr size_t kMost = 47 << 10;
  CHECK(launch_plainly(both_kernel, kMost, out.data()) == cudaSuccess);
  CHECK_FAILS("1024 bytes of static and 48144 of dynamic, expected at most 49152",  // 256, and padding
              launch_plainly(both_kernel, kMost + 16, out.data()));
  launch(both_kernel, 1, 32, kMost + 16, nullptr, out.data());  // requests it
  CHECK(out[31] == 1);
}

__global__ void two_sizes_kernel(int* out) {
  SHARED_DYN(int, tile);
  tile[threadIdx.x] = out[threadIdx.x] = 1;
}
// A graph, or a launch in another thread, may be between the request of a larger size and its use.
TEST(launches_of_less_shared_memory_leave_the_limit) {
  std::vector<int> out(32);
  for (const int size : {50, 64, 50}) launch(two_sizes_kernel, 1, 32, size << 10, nullptr, out.data());
  CHECK(launch_plainly(two_sizes_kernel, 64 << 10, out.data()) == cudaSuccess);
}

__global__ void __launch_bounds__(64) bounded_kernel() {}
template <int kWarps>
__global__ void __launch_bounds__(32 * kWarps, 2) bounded_template() {}
TEST(blocks_stay_within_the_launch_bounds) {
  launch(bounded_kernel, 1, 64, 0, nullptr);
  launch(bounded_template<3>, 1, 96, 0, nullptr);
#if !defined(__clang__)
  CHECK_FAILS("cudaErrorLaunchOutOfResources", launch(bounded_kernel, 1, 65, 0, nullptr));
  CHECK_FAILS("cudaErrorLaunchOutOfResources", launch(bounded_template<3>, 1, 128, 0, nullptr));
#endif
}

TEST(shared_memory_has_the_size_of_the_device) {
  std::vector<int> out(32);
  for (const simt::Device& device : {simt::sm_80(), simt::sm_90()}) {
    simt::device() = device;
    launch(fill_kernel, 1, 32, static_cast<size_t>(device.shared_memory_per_block), nullptr, out.data());
    CHECK_FAILS(
        "cudaErrorInvalidValue",
        launch(fill_kernel, 1, 32, static_cast<size_t>(device.shared_memory_per_block) + 1, nullptr, out.data()));
  }
}

TEST(cooperative_grids_must_fit_the_device) {
  const unsigned resident = 4 * 2;  // multiprocessors, and blocks of 1024 threads on each
  launch_cooperative(empty_kernel, resident, 1024, 0, nullptr);
  CHECK_FAILS("CooperativeLaunchTooLarge", launch_cooperative(empty_kernel, resident + 1, 1024, 0, nullptr));
}

// The error has been reported, and is not one of a later launch.
TEST(refused_launches_leave_no_error) {
  CHECK_FAILS("CooperativeLaunchTooLarge", launch_cooperative(empty_kernel, 1000, 1024, 0, nullptr));
  CHECK(cudaGetLastError() == cudaSuccess);
  std::vector<int> out(32);
  CHECK_FAILS("cudaErrorInvalidValue", launch(fill_kernel, 1, 32, 1 << 20, nullptr, out.data()));
  CHECK(cudaGetLastError() == cudaSuccess);
}

TEST(streams_are_remembered) {
  int a = 0, b = 0;
  simt::forget_streams();
  launch(empty_kernel, 1, 1, 0, &a);
  cudaMemsetAsync(&b, 1, sizeof b, reinterpret_cast<cudaStream_t>(&b));
  const std::vector<void*> used = simt::used_streams();
  CHECK(used.size() == 2 && used[0] == &a && used[1] == &b);
  CHECK(b == 0x01010101);
}

TEST(captures_are_run_later_and_refuse_what_waits) {
  std::vector<int> out(32, -1);
  int stream = 0;
  const auto captured = reinterpret_cast<cudaStream_t>(&stream);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  CHECK(cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal) == cudaErrorStreamCaptureUnsupported);
  CHECK(cudaStreamBeginCapture(captured, cudaStreamCaptureModeGlobal) == cudaSuccess);
  launch(fill_kernel, 1, 32, 128, &stream, out.data());
  CHECK_FAILS("cudaErrorStreamCaptureImplicit", launch(fill_kernel, 1, 32, 128, nullptr, out.data()));
  CHECK(cudaStreamSynchronize(captured) == cudaErrorStreamCaptureUnsupported);
  CHECK(cudaDeviceSynchronize() == cudaErrorStreamCaptureUnsupported);
  CHECK(cudaStreamEndCapture(captured, &graph) == cudaSuccess);
  CHECK(cudaGraphInstantiate(&exec, graph, 0) == cudaSuccess);
  CHECK(out[31] == -1);
  CHECK(cudaGraphLaunch(exec, captured) == cudaSuccess);
  CHECK(out[31] == 31);
  void* memory = nullptr;
  CHECK(cudaMalloc(&memory, 16) == cudaErrorNotSupported);
  cudaGraphDestroy(graph);
  cudaGraphExecDestroy(exec);
  cudaGetLastError();
}

// A launcher must not wait for host memory.
TEST(copies_from_the_host_are_refused) {
  int a = 0, b = 0;
  CHECK(cudaMemcpyAsync(&a, &b, sizeof a, cudaMemcpyHostToDevice, nullptr) == cudaErrorInvalidMemcpyDirection);
  CHECK(cudaMemcpyAsync(&a, &b, sizeof a, cudaMemcpyDeviceToHost, nullptr) == cudaErrorInvalidMemcpyDirection);
  cudaGetLastError();
}

TEST(devices_are_several) {
  int count = 0, current = -1;
  CHECK(cudaGetDeviceCount(&count) == cudaSuccess && count == 2);
  CHECK(cudaSetDevice(1) == cudaSuccess && cudaGetDevice(&current) == cudaSuccess && current == 1);
  simt::forget_streams();
  launch(empty_kernel, 1, 1, 0, nullptr);
  CHECK(simt::used_devices() == std::vector<int>{1});
  CHECK(cudaSetDevice(2) == cudaErrorInvalidDevice && cudaGetLastError() == cudaErrorInvalidDevice);
  CHECK(cudaSetDevice(0) == cudaSuccess);
}

TEST(tensor_maps_are_checked_as_documented) {
  alignas(128) static unsigned char memory[4096];
  CUtensorMap map;
  using Sizes = std::vector<cuuint64_t>;
  const auto encode = [&](const void* start, Sizes size, Sizes stride, std::vector<cuuint32_t> box,
                          CUtensorMapSwizzle swizzle) {
    return simt::encode_map(&map, start, size, stride, box, swizzle);
  };
  const auto k128 = CU_TENSOR_MAP_SWIZZLE_128B, kNone = CU_TENSOR_MAP_SWIZZLE_NONE;
  CHECK(encode(memory, {64, 8}, {128}, {64, 8}, k128) == CUDA_SUCCESS);
  CHECK(encode(memory + 8, {64, 8}, {128}, {64, 8}, k128) == CUDA_ERROR_INVALID_VALUE);  // start
  CHECK(encode(memory, {64, 8}, {120}, {64, 8}, k128) == CUDA_ERROR_INVALID_VALUE);      // stride
  CHECK(encode(memory, {64, 8}, {128}, {72, 8}, k128) == CUDA_ERROR_INVALID_VALUE);      // wider than the swizzle
  CHECK(encode(memory, {64, 8}, {128}, {4, 8}, kNone) == CUDA_ERROR_INVALID_VALUE);      // rows of 8 bytes
  CHECK(encode(memory, {64, 8}, {128}, {64, 257}, kNone) == CUDA_ERROR_INVALID_VALUE);   // box
  CHECK(encode(memory, {0, 8}, {128}, {64, 8}, kNone) == CUDA_ERROR_INVALID_VALUE);      // empty
  CHECK(encode(nullptr, {64, 8}, {128}, {64, 8}, kNone) == CUDA_ERROR_INVALID_VALUE);
}

}  // namespace
