// SPDX-License-Identifier: BSD-3-Clause
#include "exchange_binding.h"

#include <pybind11/stl.h>

#include "arrays.h"
#include "exchange.h"
#include "execution.h"

namespace py = pybind11;

namespace switchgear {
namespace {

int64_t sum(const std::vector<int64_t>& values) {
  int64_t total = 0;
  for (const int64_t value : values) total += value;
  return total;
}

void py_exchange(py::handle rows, py::handle received, std::vector<int64_t> send_bytes,
                 std::vector<int64_t> receive_bytes, std::vector<uint32_t> first_sent,
                 std::vector<uint32_t> first_received, std::vector<uintptr_t> segments, int rank, int64_t slot_bytes,
                 uintptr_t stop, const DeviceExecution& execution) {
  Arrays arrays(execution.stream());
  const cuda::ExchangeArgs args{.rank = rank,
                                .rows = arrays.memory("rows", rows, sum(send_bytes)),
                                .received = arrays.memory("received", received, sum(receive_bytes)),
                                .send_bytes = std::move(send_bytes),
                                .receive_bytes = std::move(receive_bytes),
                                .first_sent = std::move(first_sent),
                                .first_received = std::move(first_received),
                                .segments = std::move(segments),
                                .slot_bytes = slot_bytes,
                                .stop = reinterpret_cast<const uint32_t*>(stop)};
  TemporaryMemory memory(execution);
  const py::gil_scoped_release release;
  cuda::exchange(args, memory.execution());
}

}  // namespace

void define_exchange(py::module_& m) {
  using namespace py::literals;
  m.def("exchange_segment_bytes", &cuda::exchange_segment_bytes, "num_ranks"_a, "slot_bytes"_a);
  m.def("exchange_multiprocessors", &cuda::exchange_multiprocessors, "num_ranks"_a);
  m.def("exchange", &py_exchange, "rows"_a, "received"_a, "send_bytes"_a, "receive_bytes"_a, "first_sent"_a,
        "first_received"_a, "segments"_a, "rank"_a, "slot_bytes"_a, "stop"_a, "execution"_a);
}

}  // namespace switchgear
