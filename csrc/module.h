// SPDX-License-Identifier: BSD-3-Clause
// bindings.cpp is compiled into one Python module per backend: _C (csrc/cpu), _cuda (csrc/cuda) and, for tests, _simt
// (tests/simt). Here is what differs between them: the last argument of every op, and the functions besides the ops.
#pragma once
#include <pybind11/pybind11.h>

#include "arrays.h"
#include "switchgear/ops.h"

#if defined(SWITCHGEAR_DEVICE_MODULE)
#include "execution.h"
#endif

namespace switchgear {

// Defines what only one module has: csrc/cpu/module.cpp, csrc/cuda/module.cpp, tests/simt/module/module.cpp. It calls those of
// the others that the module has, each in a *_binding.cpp.
void define_module(pybind11::module_& m);
void define_reader(pybind11::module_& m);
void define_measurements(pybind11::module_& m);
void define_exchange(pybind11::module_& m);

// For classes: __new__ calls __init__ too, so there is no object without its C++ part. pybind11 ignores the second __init__.
inline pybind11::custom_type_setup initialises_in_new() {
  return pybind11::custom_type_setup([](PyHeapTypeObject* heap_type) {
    heap_type->ht_type.tp_new = [](PyTypeObject* type, PyObject* args, PyObject* kwargs) -> PyObject* {
      PyObject* const self = pybind11::detail::make_new_instance(type);
      if (self == nullptr || type->tp_init(self, args, kwargs) == 0) return self;
      Py_DECREF(self);
      return nullptr;
    };
  });
}

#if defined(SWITCHGEAR_DEVICE_MODULE)

using ExecutionArgument = const DeviceExecution&;
constexpr const char* kExecutionArgument = "execution";

inline Arrays arrays_of(ExecutionArgument execution) { return Arrays(execution.stream()); }

template <typename Args>
void run(void (*op)(const Args&, Execution), const Args& args, ExecutionArgument execution) {
  TemporaryMemory memory(execution);
  const pybind11::gil_scoped_release release;
  op(args, memory.execution());
}

#else

using ExecutionArgument = int;
constexpr const char* kExecutionArgument = "num_threads";

inline Arrays arrays_of(ExecutionArgument) { return Arrays(); }

template <typename Args>
void run(void (*op)(const Args&, Execution), const Args& args, ExecutionArgument num_threads) {
  const pybind11::gil_scoped_release release;
  op(args, {.num_threads = num_threads});
}

#endif

}  // namespace switchgear
