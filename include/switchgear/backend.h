// SPDX-License-Identifier: BSD-3-Clause
// A backend is a table of functions, one per op. ops.cpp checks the arguments once and calls the table of the device.
#pragma once
#include <string>
#include <vector>

#include "switchgear/ops.h"
#include "switchgear/panels.h"

namespace switchgear {

struct Backend {
  const char* name;
  DeviceType device;
  void (*route)(const RouteArgs&, Execution);
  void (*route_backward)(const RouteBackwardArgs&, Execution);
  void (*plan)(const PlanArgs&, Execution);
  void (*permute)(const PermuteArgs&, Execution);
  void (*combine)(const CombineArgs&, Execution);
  void (*combine_weight_backward)(const CombineBackwardArgs&, Execution);
  void (*grouped_gemm)(const GroupedGemmArgs&, Execution);
  void (*grouped_gemm_wgrad)(const GroupedGemmWgradArgs&, Execution);
  void (*glu)(const GluArgs&, Execution);
  void (*glu_backward)(const GluBackwardArgs&, Execution);
  void (*moe_forward)(const MoeForwardArgs&, Execution);
  void (*moe_backward)(const MoeBackwardArgs&, Execution);
  // Null where a backend has no kernels for them: then they are composed of other ops.
  void (*route_dynamic)(const RouteDynamicArgs&, Execution) = nullptr;
  void (*column_topk)(const ColumnTopkArgs&, Execution) = nullptr;
  void (*fit_capacity)(const FitCapacityArgs&, Execution) = nullptr;
  void (*assign_balanced)(const AssignBalancedArgs&, Execution) = nullptr;
  void (*assign_capped)(const AssignCappedArgs&, Execution) = nullptr;
  uint32_t formats =
      1u << static_cast<int>(Format::kPlain);    // of weights that grouped_gemm and moe_forward take, a bit each
  PanelLayout (*panel_layout)(DType) = nullptr;  // with Format::kPanels

  bool takes(Format format) const { return (formats >> static_cast<int>(format) & 1) != 0; }
};

const Backend& cpu_backend();   // in use without a call, in programs that link switchgear_core
const Backend& cuda_backend();  // in libraries with CUDA kernels

// From now on the ops on tensors of backend.device call this table.
void register_backend(const Backend& backend);

// ISAs of the CPU backend, best last: "generic", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "amx" (the two with
// VNNI differ from the one before in quantised weights alone). `available` are those that were built and that this machine can
// run. The best is in use; SWITCHGEAR_CPU_ISA, read at first use, forces another, and set_cpu_isa does so afterwards.
std::vector<std::string> available_cpu_isas();
std::string cpu_isa();
void set_cpu_isa(const std::string& isa);  // ValueError for one that is not available

// The CPU's ceilings, measured in about 50 ms each: multiply-adds in registers in flop/s (of the instruction that a dtype's
// products use), and reading of memory in bytes/s.
double multiply_rate(DType dtype, Execution exec = {});
double integer_multiply_rate(Execution exec = {});  // of int8, in operations/s
double read_bandwidth(Execution exec = {});

// Reads the memory of tensors once, by vector loads on all threads: the least that a layer does that uses them as weights.
void read(const std::vector<TensorView>& tensors, Execution exec = {});

// Gives the memory that the CPU backend keeps between calls (temporary, and of freed gradients) back to the system.
void release_workspaces();

}  // namespace switchgear
