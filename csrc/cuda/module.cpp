// SPDX-License-Identifier: BSD-3-Clause
// What switchgear._cuda has besides the ops: the CUDA devices, and whether this build has code for them. Can be imported
// without a driver.
#include "module.h"

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "probe.h"
#include "registry.h"

namespace py = pybind11;

namespace switchgear {
namespace {

// Without a driver there are no devices; this is not an error.
int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // resets the error
  return 0;
}

void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

int driver_version() {
  int version = 0;  // stays 0 without a driver
  check(cudaDriverGetVersion(&version), "cudaDriverGetVersion");
  return version;
}

int runtime_version() {
  int version = 0;
  check(cudaRuntimeGetVersion(&version), "cudaRuntimeGetVersion");
  return version;
}

py::dict device_info(int index) {
  const int count = device_count();
  if (index < 0 || index >= count) {
    throw py::value_error("index: expected a device of " + std::to_string(count) + ", got " + std::to_string(index));
  }
  cudaDeviceProp properties;
  cuda::Probe probe;
  {
    const py::gil_scoped_release release;
    check(cudaGetDeviceProperties(&properties, index), "cudaGetDeviceProperties");
    probe = cuda::probe(index);
  }
  py::dict info;
  info["name"] = properties.name;
  info["compute_capability"] = py::make_tuple(properties.major, properties.minor);
  info["multiprocessors"] = properties.multiProcessorCount;
  info["total_memory"] = properties.totalGlobalMem;
  info["l2_cache"] = properties.l2CacheSize;
  info["shared_memory_per_block"] = properties.sharedMemPerBlockOptin;
  info["kernel_ok"] = probe.error == nullptr;
  info["kernel_arch"] = probe.arch;
  info["kernel_error"] = probe.error == nullptr ? py::object(py::none()) : py::str(probe.error);
  return info;
}

py::list built_archs() { return py::str(SWITCHGEAR_CUDA_ARCHS).attr("split")(); }

}  // namespace

const Backend& default_backend() { return cuda_backend(); }

void define_module(py::module_& m) {
  using namespace py::literals;
  define_execution(m);
  define_exchange(m);
  m.def("device_count", &device_count, "Number of CUDA devices; 0 without a driver.");
  m.def("device_info", &device_info, "A device's properties, and whether a kernel of this build ran on it.", "index"_a);
  m.def("driver_version", &driver_version, "CUDA version of the driver, e.g. 13000; 0 without a driver.");
  m.def("runtime_version", &runtime_version, "CUDA version of the runtime inside this module.");
  m.def("cuda_kernels", &cuda_kernels, "auto: the kernels of the device's generation; sm_80: those of sm_80.");
  m.def("set_cuda_kernels", &set_cuda_kernels, "auto or sm_80; ValueError for another name.", "kernels"_a);
  m.def("built_archs", &built_archs, "Architectures with machine code (sm_80) or PTX (compute_80) in this build.");
}

}  // namespace switchgear
