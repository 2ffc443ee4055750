// SPDX-License-Identifier: BSD-3-Clause
// Resources, at most (registers a thread; tests/test_cuda_build.py reads this):
//   probe_kernel: 8 registers
#include "probe.h"

#include <cuda_runtime.h>

namespace switchgear::cuda {

// Not in the unnamed namespace: nvcc would name the kernel by the path of this file, and no two builds would be equal.
__global__ void probe_kernel([[maybe_unused]] int* arch) {
#ifdef __CUDA_ARCH__
  *arch = __CUDA_ARCH__;
#endif
}

namespace {

cudaError_t run(int device, int* arch) {
  if (const cudaError_t error = cudaSetDevice(device)) return error;
  int* memory = nullptr;
  if (const cudaError_t error = cudaMalloc(&memory, sizeof(int))) return error;
  cudaGetLastError();  // of others
  probe_kernel<<<1, 1>>>(memory);
  cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) error = cudaMemcpy(arch, memory, sizeof(int), cudaMemcpyDeviceToHost);
  cudaFree(memory);
  return error;
}

}  // namespace

Probe probe(int device) {
  int current = 0;
  if (const cudaError_t error = cudaGetDevice(&current)) return {0, cudaGetErrorString(error)};
  Probe result;
  const cudaError_t error = run(device, &result.arch);
  cudaSetDevice(current);
  if (error != cudaSuccess) result = {0, cudaGetErrorString(error)};
  return result;
}

}  // namespace switchgear::cuda
