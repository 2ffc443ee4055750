// SPDX-License-Identifier: BSD-3-Clause
#include "execution.h"

#include "module.h"
#include "switchgear/check.h"

namespace py = pybind11;

namespace switchgear {
namespace {

constexpr uintptr_t kAlignment = 256;  // promised by ops.h; torch aligns to it on CUDA devices but not on the CPU

}  // namespace

Execution TemporaryMemory::execution() {
  return {.stream = reinterpret_cast<void*>(execution_.stream()),
          .allocator = {&TemporaryMemory::allocate, this},
          .allow_tf32 = execution_.allow_tf32(),
          .reserved_multiprocessors = execution_.reserved_multiprocessors()};
}

void* TemporaryMemory::allocate(void* self, int64_t bytes) {
  const py::gil_scoped_acquire acquire;
  auto& memory = *static_cast<TemporaryMemory*>(self);
  const auto padded = bytes + static_cast<int64_t>(kAlignment) - 1;
  const py::object& array = memory.kept_.emplace_back(memory.execution_.allocate()(padded));
  const auto begin = reinterpret_cast<uintptr_t>(memory.arrays_.memory("allocate", array, padded));
  return reinterpret_cast<void*>((begin + kAlignment - 1) / kAlignment * kAlignment);
}

void define_execution(py::module_& m) {
  using namespace py::literals;
  py::class_<DeviceExecution>(m, "Execution", initialises_in_new(), "How an op runs on a device.")
      .def(py::init<uintptr_t, py::function, bool, int>(), "stream"_a, "allocate"_a, "allow_tf32"_a = false,
           "reserved_multiprocessors"_a = 0);
}

}  // namespace switchgear
