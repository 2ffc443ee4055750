// SPDX-License-Identifier: BSD-3-Clause
// Runs CUDA kernels on the CPU: every GPU thread is a fiber with its own stack, scheduled in a chosen order on the calling
// thread. This header is for tests and launchers; simt.h adds CUDA's names, models.h the instructions.
#pragma once
#include <vector_functions.h>
#include <vector_types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "location.h"

namespace simt {

// A kernel's error, with its thread, file and line.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// threadIdx, blockIdx, blockDim and gridDim of the running thread.
struct Indices {
  uint3 thread{}, block{};
  dim3 block_size, grid_size;
};
extern Indices indices;

// ---- settings -----------------------------------------------------------------------------------------------------------

// Which runnable thread runs next, and when asynchronous copies and products are carried out. Forward: lowest thread first, as
// late as possible. Reverse: highest thread first, as early as possible. Random: either, and threads are also interrupted at
// atomics.
enum class Order { kForward, kReverse, kRandom };

// Set from SWITCHGEAR_SIMT_ORDER=forward|reverse|random:SEED.
struct Options {
  Order order = Order::kForward;
  uint64_t seed = 1;
  int resident_blocks = 4;       // limit per grid; cooperative grids and ranks are fully resident
  bool other_processes = false;  // may write what grids poll, so no change here is no livelock
  double patience = 40.0;        // seconds without any change that count as a hang then
  bool any_shared_base = false;  // dynamic shared memory is aligned to 16 bytes; otherwise to 1024
};
Options& options();

// The device that launchers see. SWITCHGEAR_SIMT_DEVICE=sm_80|sm_86|sm_90 sets the first one.
struct Device {
  int major = 9, minor = 0;
  int multiprocessors = 4;
  int shared_memory_per_block = 232448;  // with the opt-in; a multiprocessor has 1 KB more
};
Device& device();
Device sm_80();
Device sm_86();  // the least shared memory; also that of sm_89 and sm_120
Device sm_90();

struct Statistics {
  uint64_t launches = 0, blocks = 0, threads = 0, switches = 0;
  uint64_t wgmma = 0;                         // issued, by warps
  uint64_t ldmatrix = 0, bank_conflicts = 0;  // matrices read by ldmatrix, and extra cycles for conflicts
};
Statistics& statistics();

// ---- launches -----------------------------------------------------------------------------------------------------------

struct Grid {
  dim3 grid, block;
  size_t dynamic_shared = 0;
  std::function<void()> kernel;    // called once by every thread
  bool cooperative = false;        // all blocks are resident, or the launch fails
  unsigned cluster = 1;            // blocks along x that form a cluster: they are resident together
  size_t shared_limit = 48 << 10;  // of static and dynamic shared memory together
  unsigned registers = 0;          // of a thread at the start; 0: not known
};

// Runs the grids to their end. Several grids are one kernel on as many devices: all blocks are resident, and only system scope
// reaches across devices. Throws the kernels' errors.
void run(const std::vector<Grid>& grids);

// Kernels that are not run by their own code. ptx/cudart.cpp sets the functions, which are null otherwise.
struct OtherKernels {
  std::function<void()> (*body)(const void* kernel, void* const* arguments);  // null if it is none of them
  unsigned (*launch_bound)(const void* kernel);  // the most threads of a block; 0: none of them
};
extern OtherKernels other_kernels;

// Binds the arguments, converted to the kernel's parameters as in a launch.
template <typename... Parameters, typename... Arguments>
std::function<void()> bind_kernel(void (*kernel)(Parameters...), Arguments&&... arguments) {
  std::tuple<std::remove_cvref_t<Parameters>...> values(std::forward<Arguments>(arguments)...);
  if (other_kernels.body != nullptr) {
    const auto other = std::apply(
        [&](auto&... each) {
          void* const pointers[] = {static_cast<void*>(&each)..., nullptr};
          return other_kernels.body(reinterpret_cast<const void*>(kernel), pointers);
        },
        values);
    if (other) return other;
  }
  return [kernel, values = std::move(values)] { std::apply(kernel, values); };
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_shared, Arguments&&... arguments) {
  run({{grid, block, dynamic_shared, bind_kernel(kernel, std::forward<Arguments>(arguments)...)}});
}

// The function and line of an instruction, from addr2line.
std::string describe_code(const void* address);
std::string function_name(const void* address);  // without its parameters

[[noreturn]] void fail(const std::string& message, Location at);

}  // namespace simt
