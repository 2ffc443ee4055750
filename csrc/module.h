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
