// SPDX-License-Identifier: BSD-3-Clause
// What nvcc's host code calls at the start of the program and for a launch, in place of libcudart. The PTX is in the object
// (-gencode arch=compute_XX,code=compute_XX --no-compress). The rest of the runtime is in ../runtime_api.cpp.
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "coverage.h"
#include "execute.h"
#include "runtime.h"

namespace simt {
cudaError_t check_launch(const cudaLaunchConfig_t& config, const void* kernel);
void queue_launch(const cudaLaunchConfig_t& config, const void* kernel, std::function<void()> body);
}  // namespace simt

namespace simt::ptx {
namespace {

// A registered object, and the code of its kernels that have run.
struct Object {
  std::string_view text;
  std::unique_ptr<Module> module;
  std::map<std::string, std::unique_ptr<Code>> codes;
};

struct Function {
  Object* object;
  std::string symbol;
};

std::map<const void*, Function>& functions() {
  static std::map<const void*, Function> all;
  return all;
}

// A fat binary: a header (magic, version, header size, size), then entries (kind, version, header size, size).
std::string_view find_ptx(const char* binary) {
  const auto read = [](const char* at, auto value) {
    std::memcpy(&value, at, sizeof value);
    return value;
  };
  constexpr uint16_t kPtx = 1;
  const char* at = binary + read(binary + 6, uint16_t{});
  const char* const end = at + read(binary + 8, uint64_t{});
  while (at < end) {
    const uint32_t header = read(at + 4, uint32_t{});
    const uint64_t size = read(at + 8, uint64_t{});
    const std::string_view text(at + header, size);
    const size_t length = text.find('\0');
    if (read(at, uint16_t{}) == kPtx && text.substr(0, length).find(".version") != std::string_view::npos) {
      return text.substr(0, length);
    }
    at += header + size;
  }
  return {};
}

const Code& code_of(const void* kernel) {
  const auto found = functions().find(kernel);
  if (found == functions().end()) throw Error("a launch of a kernel that nvcc has not compiled");
  auto& [object, symbol] = found->second;
  std::unique_ptr<Code>& code = object->codes[symbol];
  if (code) return *code;
  if (!object->module) {
    if (object->text.empty()) throw Error("an object without PTX, or with compressed PTX (nvcc --no-compress)");
    object->module = std::make_unique<Module>(object->text);
    watch_coverage(*object->module);
  }
  code = decode(object->module->kernel(symbol));
  return *code;
}

// The PTX of a kernel that the C++ compiler has compiled too: the one with the same name.
std::function<void()> body_by_name(const void* kernel, void* const* arguments) {
  static std::map<const void*, const void*> known;  // the registered function, or null
  const auto [found, is_new] = known.try_emplace(kernel, nullptr);
  if (is_new) {
    const std::string name = function_name(kernel);
    for (const auto& [function, registered] : functions()) {
      if (!name.empty() && readable(registered.symbol) == name) found->second = function;
    }
  }
  return found->second == nullptr ? nullptr : bind(code_of(found->second), arguments);
}
unsigned launch_bound(const void* kernel) {
  return functions().count(kernel) == 0 ? 0 : code_of(kernel).kernel->max_threads;
}

[[maybe_unused]] const bool is_set = (other_kernels = {body_by_name, launch_bound}).body != nullptr;

struct Report {
  ~Report() {
    if (std::getenv("SWITCHGEAR_PTX_STATISTICS") == nullptr) return;
    std::fprintf(stderr, "ptx: %.1f million thread instructions\n", static_cast<double>(executed_instructions()) / 1e6);
  }
} report;

}  // namespace
}  // namespace simt::ptx

using namespace simt;

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  struct Wrapper {
    int magic, version;
    const char* data;
  };
  auto* const object = new ptx::Object;  // as long as the program
  object->text = ptx::find_ptx(static_cast<const Wrapper*>(wrapper)->data);
  return reinterpret_cast<void**>(object);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void** object, const char* kernel, char*, const char* symbol, int, uint3*, uint3*, dim3*,
                            dim3*, int*) {
  ptx::functions()[kernel] = {reinterpret_cast<ptx::Object*>(object), symbol};
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** arguments) {
  if (const cudaError_t error = check_launch(*config, kernel)) return error;
  queue_launch(*config, kernel, ptx::bind(ptx::code_of(kernel), arguments));
  return cudaSuccess;
}

// The body of a kernel's host function, which nothing calls: launchers use cudaLaunchKernelEx.
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  return cudaLaunchKernelExC(&config, kernel, arguments);
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, CUstream_st*) { return 1; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }

}  // extern "C"
