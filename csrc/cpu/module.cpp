// SPDX-License-Identifier: BSD-3-Clause
// What switchgear._C has beside the ops: instruction sets, the machine's ceilings, memory, and how it was built.
#include "module.h"

#include <pybind11/stl.h>

#include <cmath>

#include "names.h"
#include "pages.h"
#include "reader_binding.h"
#include "simulation.h"
#include "switchgear/backend.h"
#include "switchgear/check.h"
#include "switchgear/compact.h"
#include "switchgear/panels.h"
#include "threads.h"
#include "tiles_binding.h"
#include "workspace.h"

namespace py = pybind11;
using py::handle;

namespace switchgear {
namespace {

constexpr Names<DType, 3> kFloats{
    {{"float32", DType::kFloat32}, {"bfloat16", DType::kBFloat16}, {"float16", DType::kFloat16}}};

py::dict build_info() {
  py::dict info;
  info["compiler"] = SWITCHGEAR_COMPILER;
  info["flags"] = SWITCHGEAR_FLAGS;
  info["isas"] = py::str(SWITCHGEAR_ISAS).attr("split")();
  info["openmp"] = py::bool_(SWITCHGEAR_WITH_OPENMP);
  info["cuda"] = py::bool_(SWITCHGEAR_WITH_CUDA);
  return info;
}

// The loops that `call` runs on this thread: (name, in shares, threads, begin, end, tasks), in seconds since its start; a task
// is (seconds, expert, rows, bytes). And the seconds of the call.
py::tuple record_loops(const py::function& call) {
  cpu::Timeline timeline;
  struct Scope {
    explicit Scope(cpu::Timeline* recording) { cpu::record_on(recording); }
    ~Scope() { cpu::record_on(before); }
    cpu::Timeline* before = cpu::timeline();
  };
  {
    const Scope scope(&timeline);
    call();
  }
  const double seconds = timeline.now();
  py::list loops;
  for (const auto& loop : timeline.records()) {
    py::list tasks;
    for (const auto& [spent, work] : loop.tasks)
      tasks.append(py::make_tuple(spent, work.expert, work.rows, work.bytes));
    loops.append(py::make_tuple(loop.name, loop.in_shares, loop.num_threads, loop.begin, loop.end, tasks));
  }
  return py::make_tuple(loops, seconds);
}

constexpr Names<cpu::Placement, 3> kPlacements{{{"first node", cpu::Placement::kFirstNode},
                                                {"interleaved", cpu::Placement::kInterleaved},
                                                {"local", cpu::Placement::kLocal}}};

py::tuple simulate_loop(const std::vector<double>& seconds, const std::vector<int64_t>& bytes, bool in_shares,
                        int num_threads, int num_nodes, int num_sockets, double core_bandwidth, double node_bandwidth,
                        double link_bandwidth, std::string_view placement) {
  SWITCHGEAR_CHECK(ValueError, seconds.size() == bytes.size(), "bytes: expected as many as seconds, ", seconds.size(),
                   ", got ", bytes.size());
  SWITCHGEAR_CHECK(ValueError, num_threads >= 1, "num_threads: expected at least 1, got ", num_threads);
  SWITCHGEAR_CHECK(ValueError, num_nodes >= 1, "num_nodes: expected at least 1, got ", num_nodes);
  SWITCHGEAR_CHECK(ValueError, num_sockets >= 1 && num_nodes % num_sockets == 0,
                   "num_sockets: expected a divisor of the ", num_nodes, " nodes, got ", num_sockets);
  SWITCHGEAR_CHECK(ValueError, core_bandwidth > 0 && std::isfinite(core_bandwidth),
                   "core_bandwidth: expected a finite number above 0, got ", core_bandwidth);
  SWITCHGEAR_CHECK(ValueError, node_bandwidth > 0, "node_bandwidth: expected more than 0, got ", node_bandwidth);
  SWITCHGEAR_CHECK(ValueError, link_bandwidth > 0, "link_bandwidth: expected more than 0, got ", link_bandwidth);
  for (size_t i = 0; i < seconds.size(); ++i) {
    SWITCHGEAR_CHECK(ValueError, seconds[i] >= 0 && std::isfinite(seconds[i]),
                     "seconds: expected finite numbers of at least 0, got ", seconds[i], " at [", i, ']');
    SWITCHGEAR_CHECK(ValueError, bytes[i] >= 0, "bytes: expected at least 0, got ", bytes[i], " at [", i, ']');
  }
  const cpu::Machine machine{num_threads,
                             num_nodes,
                             num_sockets,
                             core_bandwidth,
                             node_bandwidth,
                             link_bandwidth,
                             parse("placement", kPlacements, placement)};
  std::vector<cpu::SimulatedTask> tasks(seconds.size());
  for (size_t i = 0; i < tasks.size(); ++i) tasks[i] = {seconds[i], bytes[i]};
  cpu::SimulatedLoop loop;
  {
    const py::gil_scoped_release release;
    loop = cpu::simulate(tasks, in_shares, machine);
  }
  return py::make_tuple(loop.seconds, loop.busy, loop.bytes, loop.remote_bytes, loop.threads);
}

}  // namespace

void define_module(py::module_& m) {
  using namespace py::literals;
  m.def(
      "fma_rate",
      [](std::string_view dtype, int num_threads) {
        const py::gil_scoped_release release;
        return multiply_rate(parse("dtype", kFloats, dtype), {.num_threads = num_threads});
      },
      "Multiply-adds in registers, in operations/s.", "dtype"_a, "num_threads"_a = 0);
  m.def(
      "dot_rate",
      [](int bits, int num_threads) {
        const py::gil_scoped_release release;
        return integer_multiply_rate(bits, {.num_threads = num_threads});
      },
      "Products of int8 and weights of 8 or 4 bits in registers, and their additions, in operations/s.", "bits"_a,
      "num_threads"_a = 0);
  m.def(
      "read_bandwidth",
      [](int num_threads) {
        const py::gil_scoped_release release;
        return read_bandwidth({.num_threads = num_threads});
      },
      "Reading of memory, in bytes/s.", "num_threads"_a = 0);
  m.def(
      "read",
      [](const std::vector<py::object>& tensors, int num_threads) {
        Arrays arrays;
        std::vector<TensorView> views;
        for (const py::object& tensor : tensors) views.push_back(arrays.in("tensors", tensor));
        const py::gil_scoped_release release;
        read(views, {.num_threads = num_threads});
      },
      "Reads the memory of tensors once, by vector loads: the floor of what must read them.", "tensors"_a,
      "num_threads"_a = 0);
  m.def(
      "advise_huge_pages",
      [](handle tensor) {
        Arrays arrays;
        const TensorView view = arrays.in("tensor", tensor);
        cpu::advise_huge_pages(view.data, view.extent());
      },
      "Requests huge pages for memory that is not in use yet.", "tensor"_a);
  m.def(
      "collapse_into_huge_pages",
      [](handle tensor) {
        Arrays arrays;
        const TensorView view = arrays.in("tensor", tensor);
        const py::gil_scoped_release release;
        return cpu::collapse_into_huge_pages(view.data, view.extent());
      },
      "Moves memory onto huge pages; the bytes that then lie on them.", "tensor"_a);
  m.def(
      "interleave_pages",
      [](handle tensor) {
        Arrays arrays;
        const TensorView view = arrays.in("tensor", tensor);
        const py::gil_scoped_release release;
        return cpu::interleave_pages(view.data, view.extent());
      },
      "Spreads memory over all NUMA nodes, page by page; their number, 0 if the system does not allow it.", "tensor"_a);
  m.def("check_capsule", &check_capsule,
        "Raises unless a capsule of __dlpack__ holds an array; BufferError for negative strides.", "name"_a,
        "capsule"_a);
  m.def(
      "pack_compact",
      [](handle weight, handle compact, int num_threads) {
        Arrays arrays;
        const TensorView from = arrays.in("weight", weight), to = arrays.out("compact", compact);
        const py::gil_scoped_release release;
        return pack_compact(from, to, {.num_threads = num_threads});
      },
      "Writes weights [E,N,C] as compact ones, both contiguous; the largest number of exceptions in a row.", "weight"_a,
      "compact"_a, "num_threads"_a = 0);
  m.def(
      "expand_compact",
      [](handle compact, handle weight, int num_threads) {
        Arrays arrays;
        const TensorView from = arrays.in("compact", compact), to = arrays.out("weight", weight);
        const py::gil_scoped_release release;
        expand_compact(from, to, {.num_threads = num_threads});
      },
      "Writes compact weights, whose experts may be apart, as plain ones.", "compact"_a, "weight"_a,
      "num_threads"_a = 0);
  m.def(
      "panel_layout",
      [](std::string_view dtype) {
        const PanelLayout layout = panel_layout(parse("dtype", kFloats, dtype));
        return std::pair(layout.rows, layout.vector_bytes);
      },
      "Of the ISA in use: rows of a weight in a panel, and bytes of a vector of it, or of a tile.", "dtype"_a);
  m.def("record_loops", &record_loops,
        "Calls a function; (its parallel loops, each on this thread alone, its seconds). A loop is (name, in shares, "
        "threads, begin, end, tasks), a task (seconds, expert, rows, bytes).",
        "call"_a);
  m.def("simulate_loop", &simulate_loop,
        "A recorded loop on other threads and nodes: (seconds, seconds that threads were busy, bytes from each node, "
        "bytes from other nodes, the thread of each task).",
        "seconds"_a, "bytes"_a, "in_shares"_a, "num_threads"_a, "num_nodes"_a, "num_sockets"_a, "core_bandwidth"_a,
        "node_bandwidth"_a, "link_bandwidth"_a, "placement"_a);
  m.def("release_workspaces", &release_workspaces, "Frees the memory that is kept between calls.");
  m.def("kept_bytes", &cpu::kept_bytes, "Bytes that are kept for the next tensors of a Buffer.");
  py::class_<cpu::Buffer>(m, "Buffer", py::buffer_protocol(), "Bytes of a tensor, from memory that is kept and reused.")
      .def(py::init<int64_t>(), "size"_a)
      .def_buffer([](const cpu::Buffer& buffer) {
        return py::buffer_info(static_cast<uint8_t*>(buffer.data()), static_cast<py::ssize_t>(buffer.size()));
      });
  m.def("available_cpu_isas", &available_cpu_isas, "ISAs that were built and that this machine runs, best last.");
  m.def("cpu_isa", &cpu_isa, "The ISA in use.");
  m.def("set_cpu_isa", &set_cpu_isa, "Sets the ISA to use; ValueError for one that is not available.", "isa"_a);
  m.def("build_info", &build_info, "How the module was built: compiler, flags, isas, openmp, cuda.");
  define_reader(m);
  define_tiles(m);
  m.attr("version") = SWITCHGEAR_VERSION;
}

}  // namespace switchgear
