// SPDX-License-Identifier: BSD-3-Clause
// Binds the launcher of exchange.cuh to Python: in the module _cuda, and in _simt for tests.
#include "exchange.h"

#include <pybind11/stl.h>

#include <numeric>

#include "fields.h"
#include "module.h"

namespace py = pybind11;

namespace switchgear {
namespace {

// Inputs (rows, send_bytes, receive_bytes, first_sent, first_received), options (segments, rank, slot_bytes, stop), outputs
// (received,).
void py_exchange(py::handle inputs, py::handle options, py::handle outputs, const DeviceExecution& execution) {
  using Sizes = std::vector<int64_t>;
  using Pieces = std::vector<uint32_t>;
  Arrays arrays(execution.stream());
  Fields in(arrays, "inputs", inputs, 5), given(arrays, "options", options, 4), out(arrays, "outputs", outputs, 1);
  const py::handle rows = in.next();
  cuda::ExchangeArgs args{.send_bytes = in.value<Sizes>("send_bytes"),
                          .receive_bytes = in.value<Sizes>("receive_bytes"),
                          .first_sent = in.value<Pieces>("first_sent"),
                          .first_received = in.value<Pieces>("first_received"),
                          .segments = given.value<std::vector<uintptr_t>>("segments")};
  args.rank = given.value<int>("rank");
  args.slot_bytes = given.value<int64_t>("slot_bytes");
  args.stop = reinterpret_cast<const uint32_t*>(given.value<uintptr_t>("stop"));
  const auto sum = [](const Sizes& sizes) { return std::accumulate(sizes.begin(), sizes.end(), int64_t{0}); };
  args.rows = arrays.memory("rows", rows, sum(args.send_bytes));
  args.received = arrays.memory("received", out.next(), sum(args.receive_bytes));
  TemporaryMemory memory(execution);
  const py::gil_scoped_release release;
  cuda::exchange(args, memory.execution());
}

}  // namespace

void define_exchange(py::module_& m) {
  using namespace py::literals;
  m.def("exchange_segment_bytes", &cuda::exchange_segment_bytes, "num_ranks"_a, "slot_bytes"_a);
  m.def("exchange_multiprocessors", &cuda::exchange_multiprocessors, "num_ranks"_a);
  m.def("exchange", &py_exchange, "inputs"_a, "options"_a, "outputs"_a, py::arg(kExecutionArgument));
}

}  // namespace switchgear
