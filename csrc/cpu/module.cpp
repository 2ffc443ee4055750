// SPDX-License-Identifier: BSD-3-Clause
// What switchgear._C has beside the ops: instruction sets, memory, and how it was built.
#include "module.h"

#include <pybind11/stl.h>

#include <array>

#include "names.h"
#include "pages.h"
#include "switchgear/backend.h"
#include "switchgear/check.h"
#include "switchgear/compact.h"
#include "switchgear/encode.h"
#include "switchgear/panels.h"
#include "workspace.h"

namespace py = pybind11;
using py::handle;

namespace switchgear {
namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = SWITCHGEAR_COMPILER;
  info["flags"] = SWITCHGEAR_FLAGS;
  info["isas"] = py::str(SWITCHGEAR_ISAS).attr("split")();
  info["openmp"] = py::bool_(SWITCHGEAR_WITH_OPENMP);
  info["cuda"] = py::bool_(SWITCHGEAR_WITH_CUDA);
  return info;
}

}  // namespace

void define_module(py::module_& m) {
  using namespace py::literals;
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
      "encode_weight",
      [](handle numbers, handle tensors, handle form, int64_t scale_rows, int num_threads) {
        Arrays arrays;
        const TensorView from = arrays.in("numbers", numbers);
        const Weight weight = arrays.weight("weight", tensors, form);
        const py::gil_scoped_release release;
        const Encoded encoded = encode_weight(from, weight, scale_rows, {.num_threads = num_threads});
        return std::pair(encoded.is_finite, encoded.is_exact);
      },
      "Writes numbers [N,C] to a weight of one expert; whether all are finite, and whether minifloats are exact.",
      "numbers"_a, "tensors"_a, "form"_a, "scale_rows"_a = 1, "num_threads"_a = 0);
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
  m.def("release_workspaces", &release_workspaces, "Frees the memory that is kept between calls.");
  m.def("kept_bytes", &cpu::kept_bytes, "Bytes that are kept for the next tensors of a Buffer.");
  py::class_<cpu::Buffer>(m, "Buffer", py::buffer_protocol(), initialises_in_new(),
                          "Bytes of a tensor, from memory that is kept and reused.")
      .def(py::init<int64_t>(), "size"_a)
      .def_buffer([](const cpu::Buffer& buffer) {
        return py::buffer_info(static_cast<uint8_t*>(buffer.data()), static_cast<py::ssize_t>(buffer.size()));
      });
  m.def("available_cpu_isas", &available_cpu_isas, "ISAs that were built and that this machine runs, best last.");
  m.def("cpu_isa", &cpu_isa, "The ISA in use.");
  m.def("set_cpu_isa", &set_cpu_isa, "Sets the ISA to use; ValueError for one that is not available.", "isa"_a);
  m.def(
      "processor",
      [] {
        const Processor processor = this_processor();
        return py::make_tuple(processor.vendor, processor.family, processor.model);
      },
      "(vendor, family, model) that cpuid gives; ('', 0, 0) on other architectures.");
  m.def(
      "bf16_rate", [](const std::string& vendor, int family, int model) { return bf16_rate({vendor, family, model}); },
      "Multiply-adds of bfloat16 by vdpbf16ps over those of float32, by a table; 2 for a processor that is not listed.",
      "vendor"_a, "family"_a, "model"_a);
  m.def("best_cpu_isa", &best_cpu_isa, "The last of `isas`, without avx512bf16 where bf16_rate is at most 1.", "isas"_a,
        "bf16_rate"_a);
  m.def("build_info", &build_info, "How the module was built: compiler, flags, isas, openmp, cuda.");
  define_reader(m);
  define_measurements(m);
  m.attr("version") = SWITCHGEAR_VERSION;
}

}  // namespace switchgear
