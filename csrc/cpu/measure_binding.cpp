// SPDX-License-Identifier: BSD-3-Clause
// What only benchmarks, `doctor` and models of costs use: rates of the machine, recorded and simulated loops, and the tiles that
// CUDA kernels pick. They are in _C since rates are those of its ISA in use, and loops record into a pointer that its threads
// test: another module would have copies of both.
#include <pybind11/stl.h>

#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "cuda/tiles_sm80.h"
#include "cuda/tiles_sm90.h"
#include "fields.h"
#include "module.h"
#include "names.h"
#include "simulation.h"
#include "switchgear/backend.h"
#include "switchgear/check.h"
#include "threads.h"

namespace py = pybind11;

namespace switchgear {
namespace {

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

// Tasks are (seconds, bytes), the machine is the fields of cpu::Machine.
py::tuple py_simulate_loop(const std::vector<std::pair<double, int64_t>>& tasks, bool in_shares, py::handle machine) {
  Arrays none;
  Fields fields(none, "machine", machine, 7);
  const cpu::Machine on{.num_threads = fields.value<int>("num_threads"),
                        .num_nodes = fields.value<int>("num_nodes"),
                        .num_sockets = fields.value<int>("num_sockets"),
                        .core_bandwidth = fields.value<double>("core_bandwidth"),
                        .node_bandwidth = fields.value<double>("node_bandwidth"),
                        .link_bandwidth = fields.value<double>("link_bandwidth"),
                        .placement = parse("placement", kPlacements, fields.value<std::string_view>("placement"))};
  constexpr int kMostThreads = 1 << 16, kMostNodes = 1 << 10;
  SWITCHGEAR_CHECK(ValueError, on.num_threads >= 1 && on.num_threads <= kMostThreads, "num_threads: expected 1 to ",
                   kMostThreads, ", got ", on.num_threads);
  SWITCHGEAR_CHECK(ValueError, on.num_nodes >= 1 && on.num_nodes <= kMostNodes, "num_nodes: expected 1 to ", kMostNodes,
                   ", got ", on.num_nodes);
  SWITCHGEAR_CHECK(ValueError, on.num_sockets >= 1 && on.num_nodes % on.num_sockets == 0,
                   "num_sockets: expected a divisor of the ", on.num_nodes, " nodes, got ", on.num_sockets);
  SWITCHGEAR_CHECK(ValueError, on.core_bandwidth > 0 && std::isfinite(on.core_bandwidth),
                   "core_bandwidth: expected a finite number above 0, got ", on.core_bandwidth);
  SWITCHGEAR_CHECK(ValueError, on.node_bandwidth > 0, "node_bandwidth: expected more than 0, got ", on.node_bandwidth);
  SWITCHGEAR_CHECK(ValueError, on.link_bandwidth > 0, "link_bandwidth: expected more than 0, got ", on.link_bandwidth);
  std::vector<cpu::SimulatedTask> simulated;
  for (const auto& [seconds, bytes] : tasks) simulated.push_back({seconds, bytes});
  cpu::SimulatedLoop loop;
  {
    const py::gil_scoped_release release;
    loop = cpu::simulate(simulated, in_shares, on);
  }
  return py::make_tuple(loop.seconds, loop.busy, loop.bytes, loop.remote_bytes, loop.threads);
}

namespace sm90 = cuda::sm90;

constexpr Names<unsigned, 3> kEpilogues{
    {{"store", sm90::kStore}, {"glu", sm90::kGlu}, {"glu_backward", sm90::kGluBackward}}};

// (rows, columns, resident blocks)
py::tuple gemm_tile_sm80(int64_t rows_per_expert) {
  const cuda::TileConfig& tile = cuda::kTiles[static_cast<int>(cuda::pick_tile(rows_per_expert))];
  return py::make_tuple(tile.rows, tile.columns, tile.blocks);
}

// (rows, columns, blocks of a cluster, cooperative)
py::tuple describe(const sm90::TileRow& tile) {
  return py::make_tuple(tile.few_rows() ? tile.n : 128, tile.few_rows() ? 128 : tile.n, tile.cluster, tile.cooperative);
}

py::tuple gemm_tile_sm90(int64_t rows_per_expert, int64_t columns, int64_t depth, const std::string& epilogue) {
  const unsigned use = parse("epilogue", kEpilogues, epilogue);
  return describe(sm90::kTiles[sm90::pick_tile(sm90::GemmSize{rows_per_expert, columns, depth, use})]);
}

py::tuple wgrad_tile_sm90(int64_t m, int64_t n, int64_t depth, bool shares_b) {
  return describe(sm90::kTiles[sm90::pick_tile(sm90::WgradSize{m, n, depth, true, shares_b})]);
}

}  // namespace

void define_measurements(py::module_& m) {
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
  m.def("record_loops", &record_loops,
        "Calls a function; (its parallel loops, each on this thread alone, its seconds). A loop is (name, in shares, "
        "threads, begin, end, tasks), a task (seconds, expert, rows, bytes).",
        "call"_a);
  m.def("simulate_loop", &py_simulate_loop,
        "A recorded loop on other threads and nodes: (seconds, seconds that threads were busy, bytes from each node, "
        "bytes from other nodes, the thread of each task).",
        "tasks"_a, "in_shares"_a, "machine"_a);
  m.def("gemm_tile_sm80", &gemm_tile_sm80, "rows_per_expert"_a);
  m.def("gemm_tile_sm90", &gemm_tile_sm90, "rows_per_expert"_a, "columns"_a, "depth"_a, "epilogue"_a);
  m.def("wgrad_tile_sm90", &wgrad_tile_sm90, "m"_a, "n"_a, "depth"_a, "shares_b"_a);
}

}  // namespace switchgear
