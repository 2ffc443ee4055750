// SPDX-License-Identifier: BSD-3-Clause
// Execution on a device, as passed from Python: Execution(stream, allocate, allow_tf32, reserved_multiprocessors).
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "arrays.h"
#include "switchgear/ops.h"

namespace switchgear {

// `allocate` takes a number of bytes and returns an array of that size on the device. Its memory is reused in the order of
// `stream`, as with torch's allocator.
class DeviceExecution {
 public:
  DeviceExecution(uintptr_t stream, pybind11::function allocate, bool allow_tf32, int reserved_multiprocessors)
      : stream_(stream),
        allocate_(std::move(allocate)),
        allow_tf32_(allow_tf32),
        reserved_multiprocessors_(reserved_multiprocessors) {}

  uintptr_t stream() const { return stream_; }
  bool allow_tf32() const { return allow_tf32_; }
  int reserved_multiprocessors() const { return reserved_multiprocessors_; }
  const pybind11::function& allocate() const { return allocate_; }

 private:
  uintptr_t stream_;
  pybind11::function allocate_;
  bool allow_tf32_;
  int reserved_multiprocessors_;
};

// The temporary memory of one call, kept until the call has queued its kernels. Created and destroyed with the GIL held.
class TemporaryMemory {
 public:
  explicit TemporaryMemory(const DeviceExecution& execution) : execution_(execution) {}
  TemporaryMemory(const TemporaryMemory&) = delete;

  Execution execution();  // its allocator acquires the GIL

 private:
  static void* allocate(void* self, int64_t bytes);

  const DeviceExecution& execution_;
  Arrays arrays_;
  std::vector<pybind11::object> kept_;
};

void define_execution(pybind11::module_& m);

}  // namespace switchgear
