// SPDX-License-Identifier: BSD-3-Clause
// What the test module _simt has besides the ops: the device that launchers see, and the order of threads. Its tensors are in
// host memory, so the shared Python tests run on it unchanged, including checks of values.
#include "module.h"

#include <string>

#include "names.h"
#include "registry.h"
#include "runtime.h"

namespace py = pybind11;

namespace switchgear {

const Backend& default_backend() {
  static const Backend backend = [] {
    Backend table = cuda_backend();
    table.name = "simt";
    table.device = DeviceType::kCPU;
    return table;
  }();
  return backend;
}

void define_module(py::module_& m) {
  using namespace py::literals;
  constexpr Names<simt::Order, 3> kOrders{
      {{"forward", simt::Order::kForward}, {"reverse", simt::Order::kReverse}, {"random", simt::Order::kRandom}}};

  simt::options().any_shared_base = true;
  define_execution(m);
  define_exchange(m);
  m.def(
      "set_device",
      [](std::string_view name) {
        constexpr Names<simt::Device (*)(), 2> kDevices{{{"sm_80", &simt::sm_80}, {"sm_90", &simt::sm_90}}};
        simt::device() = parse("name", kDevices, name)();
      },
      "The device that launchers see.", "name"_a);
  m.def("cuda_kernels", &cuda_kernels);
  m.def("set_cuda_kernels", &set_cuda_kernels, "kernels"_a);
  m.def(
      "set_order",
      [kOrders](std::string_view order, uint64_t seed) {
        simt::options().order = parse("order", kOrders, order);
        simt::options().seed = seed;
      },
      "Which of the threads that can run goes on.", "order"_a, "seed"_a = 1);
  m.def(
      "set_other_processes", [](bool there) { simt::options().other_processes = there; },
      "Whether other processes write to what kernels poll.", "there"_a);
}

}  // namespace switchgear
