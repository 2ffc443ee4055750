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
#define SWITCHGEAR_ENTRY(op, Args, tensor) void (*op)(const Args&, Execution) = nullptr;
  SWITCHGEAR_OPS(SWITCHGEAR_ENTRY)
  SWITCHGEAR_CPU_OPS(SWITCHGEAR_ENTRY)
#undef SWITCHGEAR_ENTRY
  // Weight formats of grouped_gemm and moe_forward, one bit each.
  uint32_t formats = 1u << static_cast<int>(Format::kPlain);
  PanelLayout (*panel_layout)(DType) = nullptr;  // for Format::kPanels
  bool takes_adapters = false;                   // in moe_forward and moe_backward
  bool adds_gradients = false;                   // MoeBackwardArgs::adds

  bool takes(Format format) const { return (formats >> static_cast<int>(format) & 1) != 0; }
};

const Backend& cpu_backend();   // of the ISA in use; the default in programs that link switchgear_core
const Backend& cuda_backend();  // in libraries with CUDA kernels

// Makes later ops on tensors of backend.device use this table.
void register_backend(const Backend& backend);

// ISAs of the CPU backend, best last: "generic", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "amx" on x86-64, and
// "generic", "neon", "neondot" on Arm. Those with VNNI or dots differ from their predecessor only for quantised weights.
// `available` ISAs are built and supported by this machine. best_cpu_isa is the default; SWITCHGEAR_CPU_ISA, read at first
// use, selects another, and set_cpu_isa changes it later.
std::vector<std::string> available_cpu_isas();
std::string cpu_isa();
void set_cpu_isa(const std::string& isa);  // ValueError if not available

// What cpuid says, e.g. {"GenuineIntel", 6, 143}; empty on other architectures.
struct Processor {
  std::string vendor;
  int family = 0, model = 0;
};
Processor this_processor();
// Multiply-adds of bfloat16 by vdpbf16ps over those of float32, by a table of processors: nothing is timed, so the default ISA
// and the bits of results depend on the processor alone. 2 for one that is not listed.
double bf16_rate(const Processor& processor);
// The last of `isas`, without avx512bf16 where bf16_rate is at most 1.
std::string best_cpu_isa(const std::vector<std::string>& isas, double rate);

// In libraries with CUDA kernels. "auto": the kernels of the device's generation; "sm_80": those of sm_80 on every device.
// SWITCHGEAR_CUDA_KERNELS, read at first use, selects one. Not to be changed while an op is being queued.
std::string cuda_kernels();
void set_cuda_kernels(const std::string& kernels);  // ValueError for another name

// The CPU's measured limits: register-only multiply-adds in flop/s (with the instruction that a dtype's products use), about
// 50 ms each, and reads of 512 MiB of memory in bytes/s.
double multiply_rate(DType dtype, Execution exec = {});
double integer_multiply_rate(int bits, Execution exec = {});  // for weights of 8 or 4 bits, in operations/s
double read_bandwidth(Execution exec = {});

// Reads the memory of tensors once, with vector loads on all threads: a lower bound for a layer with these weights.
void read(const std::vector<TensorView>& tensors, Execution exec = {});

// Returns memory that the CPU backend keeps between calls (temporary memory and freed gradients) to the system.
void release_workspaces();

}  // namespace switchgear
