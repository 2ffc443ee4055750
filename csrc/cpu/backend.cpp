// SPDX-License-Identifier: BSD-3-Clause
#include "switchgear/backend.h"

#include <array>
#include <atomic>
#include <cstdlib>
#include <string_view>
#include <utility>

#include "context.h"
#include "encoders.h"
#include "ops.h"
#include "registry.h"
#include "switchgear/check.h"
#include "threads.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(SWITCHGEAR_HAVE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(SWITCHGEAR_HAVE_NEONDOT)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace switchgear {
namespace cpu {
namespace {

// These two by their bits: only recent compilers' __builtin_cpu_supports knows them.
#if defined(SWITCHGEAR_HAVE_AVX2)
bool supports_f16c() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx >> 29 & 1) != 0;
}
#endif
#if defined(SWITCHGEAR_HAVE_AVXVNNI)
bool supports_avxvnni() {  // leaf 7.1
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1) != 0;
}
#endif

#if defined(SWITCHGEAR_HAVE_AMX)
// AMX-INT8, AMX-TILE and AMX-BF16 of leaf 7; and permission from Linux, which saves the 8 KB of tiles only on request.
bool grants_tiles() {
#if defined(SWITCHGEAR_AMX_EMULATED)
  return true;
#else
  constexpr unsigned kTiles = 1u << 25 | 1u << 24 | 1u << 22;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & kTiles) == kTiles &&
         syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#endif
}
#endif

// Whether the processor has what the compiler flags of an ISA allow and the operating system saves its registers.
#if defined(SWITCHGEAR_HAVE_AVX2)
bool runs_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && supports_f16c(); }
#endif
#if defined(SWITCHGEAR_HAVE_AVXVNNI)
bool runs_avxvnni() { return runs_avx2() && supports_avxvnni(); }
#endif
#if defined(SWITCHGEAR_HAVE_AVX512)
bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif
#if defined(SWITCHGEAR_HAVE_AVX512VNNI)
bool runs_avx512vnni() { return runs_avx512() && __builtin_cpu_supports("avx512vnni"); }
#endif
#if defined(SWITCHGEAR_HAVE_AVX512BF16)
bool runs_avx512bf16() {  // with VBMI, which only Cooper Lake lacks among processors with AVX512-BF16
  return runs_avx512vnni() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
}
#endif
#if defined(SWITCHGEAR_HAVE_AMX)
bool runs_amx() {
  static const bool granted = runs_avx512bf16() && grants_tiles();
  return granted;
}
#endif
#if defined(SWITCHGEAR_HAVE_NEONDOT)
bool runs_neondot() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
#endif

// Multiply-adds of bfloat16 by vdpbf16ps over those of float32 by FMA, in registers. The instruction does two per lane, but
// some processors start it a quarter as often as FMA: there products widen bfloat16 to float32. On Emerald Rapids without AMX a
// layer of OLMoE with 512 tokens then takes 301 ms instead of 352.
struct Bf16Rate {
  std::string_view vendor;
  int family, model;
  double rate;
};
constexpr int kAnyModel = -1;
constexpr std::array kBf16Rates{
    Bf16Rate{"AuthenticAMD", 25, kAnyModel, 2.0},  // Zen 4: 472 and 236 GFLOP/s on 2 cores
    Bf16Rate{"AuthenticAMD", 26, kAnyModel, 2.0},  // Zen 5: 1,098 and 547
    Bf16Rate{"GenuineIntel", 6, 143, 0.5},         // Sapphire Rapids, not measured: the vector units of Emerald Rapids
    Bf16Rate{"GenuineIntel", 6, 207, 0.5},         // Emerald Rapids: 168 and 339
};
constexpr double kUnlistedRate = 2.0;

struct Isa {
  const char* name;
  bool (*runs)();
  const Kernels& (*kernels)();
  const IntegerKernels& (*integers)();
  const RowKernels& (*rows)();
  const GgufKernels& (*gguf)();
  const EncodeKernels& (*encoders)();
};

constexpr std::array kIsas{
    Isa{"generic", [] { return true; }, kernels_generic, integers_generic, rows_generic, gguf_generic,
        encoders_generic},
#if defined(SWITCHGEAR_HAVE_AVX2)
    Isa{"avx2", runs_avx2, kernels_avx2, integers_avx2, rows_avx2, gguf_avx2, encoders_avx2},
#endif
#if defined(SWITCHGEAR_HAVE_AVXVNNI)
    Isa{"avxvnni", runs_avxvnni, kernels_avx2, integers_avxvnni, rows_avx2, gguf_avx2, encoders_avx2},
#endif
#if defined(SWITCHGEAR_HAVE_AVX512)
    Isa{"avx512", runs_avx512, kernels_avx512, integers_avx512, rows_avx512, gguf_avx512, encoders_avx512},
#endif
#if defined(SWITCHGEAR_HAVE_AVX512VNNI)
    Isa{"avx512vnni", runs_avx512vnni, kernels_avx512, integers_avx512vnni, rows_avx512, gguf_avx512vnni,
        encoders_avx512},
#endif
#if defined(SWITCHGEAR_HAVE_AVX512BF16)
    Isa{"avx512bf16", runs_avx512bf16, kernels_avx512bf16, integers_avx512vnni, rows_avx512, gguf_avx512vnni,
        encoders_avx512},
#endif
#if defined(SWITCHGEAR_HAVE_AMX)
    Isa{"amx", runs_amx, kernels_amx, integers_amx, rows_avx512, gguf_avx512vnni, encoders_avx512},
#endif
#if defined(SWITCHGEAR_HAVE_NEON)
    Isa{"neon", [] { return true; }, kernels_neon, integers_neon, rows_generic, gguf_neon, encoders_generic},
#endif
#if defined(SWITCHGEAR_HAVE_NEONDOT)
    Isa{"neondot", runs_neondot, kernels_neon, integers_neondot, rows_generic, gguf_neon, encoders_generic},
#endif
};

// The op with the kernels of one ISA.
template <size_t kIsa, auto kOp, typename Args>
void run(const Args& args, Execution exec) {
  constexpr const Isa& isa = kIsas[kIsa];
  kOp(args, Context{isa.kernels(), isa.integers(), isa.rows(), isa.gguf(), resolve_threads(exec.num_threads)});
}

PanelLayout panel_layout(const Kernels& kernels, DType dtype) {
  return {kernels.panel, kernels.panel_vector_bytes(dtype)};
}

// A backend for each ISA: a call finds its backend once, so its checks and its kernels belong to the same one.
template <size_t i>
constexpr Backend make_backend() {
  Backend backend{.name = "cpu",
                  .device = DeviceType::kCPU,
                  .formats = ~0u,
                  .panel_layout = [](DType dtype) { return panel_layout(kIsas[i].kernels(), dtype); },
                  .takes_adapters = true,
                  .adds_gradients = true};
#define SWITCHGEAR_ENTRY(op, Args, tensor) backend.op = run<i, op>;
  SWITCHGEAR_OPS(SWITCHGEAR_ENTRY)
  SWITCHGEAR_CPU_OPS(SWITCHGEAR_ENTRY)
#undef SWITCHGEAR_ENTRY
  return backend;
}

constexpr std::array kBackends = []<size_t... i>(std::index_sequence<i...>) {
  return std::array{make_backend<i>()...};
}(std::make_index_sequence<kIsas.size()>());

std::atomic<const Isa*> active{nullptr};

const Isa& find_isa(const std::string& name, const char* source) {
  std::string available;
  for (const Isa& isa : kIsas) {
    if (!isa.runs()) continue;
    if (name == isa.name) return isa;
    available += available.empty() ? isa.name : join(", ", isa.name);
  }
  throw ValueError(join(source, ": expected one of ", available, ", got ", name));
}

const Isa& first_use() {
  const char* forced = std::getenv("SWITCHGEAR_CPU_ISA");
  const bool is_forced = forced != nullptr && *forced != '\0';
  const std::string name = is_forced ? forced : best_cpu_isa(available_cpu_isas(), bf16_rate(this_processor()));
  const Isa* chosen = &find_isa(name, "SWITCHGEAR_CPU_ISA");
  const Isa* expected = nullptr;  // another thread may have called set_cpu_isa
  return active.compare_exchange_strong(expected, chosen) ? *chosen : *expected;
}

const Isa& isa_in_use() {
  const Isa* isa = active.load(std::memory_order_acquire);
  return isa != nullptr ? *isa : first_use();
}

}  // namespace

const Kernels& kernels() { return isa_in_use().kernels(); }
const IntegerKernels& integer_kernels() { return isa_in_use().integers(); }
const EncodeKernels& encode_kernels() { return isa_in_use().encoders(); }

bool follows_streams() {
#if defined(__x86_64__)
  return !__builtin_cpu_is("intel");
#else
  return true;
#endif
}

namespace {

Reads reads_of_this_processor() {
#if defined(__x86_64__)
  const Processor processor = this_processor();
  if (processor.vendor != "AuthenticAMD" || processor.family >= 26) return Reads::kEveryLine;
  return __builtin_cpu_supports("avx512f") ? Reads::kSomeLines : Reads::kStreams;
#else
  return Reads::kSomeLines;
#endif
}

std::atomic<Reads>& reads_in_use() {
  static std::atomic<Reads> reads{reads_of_this_processor()};
  return reads;
}

}  // namespace

Reads fastest_reads() { return reads_in_use().load(std::memory_order_relaxed); }
void set_fastest_reads(Reads reads) { reads_in_use().store(reads, std::memory_order_relaxed); }

}  // namespace cpu

std::vector<std::string> available_cpu_isas() {
  std::vector<std::string> names;
  for (const auto& isa : cpu::kIsas) {
    if (isa.runs()) names.emplace_back(isa.name);
  }
  return names;
}

Processor this_processor() {
  Processor processor;
#if defined(__x86_64__)
  unsigned most = 0, a = 0, c = 0, d = 0;
  std::array<unsigned, 3> vendor{};
  __cpuid(0, most, vendor[0], vendor[2], vendor[1]);
  __cpuid(1, a, most, c, d);
  processor.vendor.assign(reinterpret_cast<const char*>(vendor.data()), sizeof(vendor));
  const int family = a >> 8 & 15, model = a >> 4 & 15;
  processor.family = family == 15 ? family + static_cast<int>(a >> 20 & 255) : family;
  processor.model = family == 15 || family == 6 ? model + static_cast<int>(a >> 12 & 240) : model;
#endif
  return processor;
}

double bf16_rate(const Processor& processor) {
  for (const auto& [vendor, family, model, rate] : cpu::kBf16Rates) {
    const bool has_model = model == processor.model || model == cpu::kAnyModel;
    if (vendor == processor.vendor && family == processor.family && has_model) return rate;
  }
  return cpu::kUnlistedRate;
}

std::string best_cpu_isa(const std::vector<std::string>& isas, double rate) {
  std::string best;
  for (const std::string& isa : isas) {
    if (isa != "avx512bf16" || rate > 1.0) best = isa;
  }
  return best;
}

std::string cpu_isa() { return cpu::isa_in_use().name; }

void set_cpu_isa(const std::string& isa) { cpu::active.store(&cpu::find_isa(isa, "isa"), std::memory_order_release); }

PanelLayout panel_layout(DType dtype) { return cpu_backend().panel_layout(dtype); }

const Backend& cpu_backend() { return cpu::kBackends[static_cast<size_t>(&cpu::isa_in_use() - cpu::kIsas.data())]; }

const Backend& default_backend() { return cpu_backend(); }

}  // namespace switchgear
