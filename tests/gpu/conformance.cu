// SPDX-License-Identifier: BSD-3-Clause
// Every wrapper of ptx.cuh, and with -DHOPPER of hopper.cuh, on the same pseudo-random data. Compiled by nvcc it runs on the
// device; compiled in tests/simt it runs the C++ models.
//
//   conformance                                         prints a line per case: its name, a tab, its words
//   conformance --expected FILE [--group G] [--from N]  compares with such a file, and prints lines.py's lines
//
// Factors are small integers, whose products and sums are exact in all types, so the order of sums does not matter.
// Layouts need no second description here: shared memory is filled word by word, and wgmma, ldmatrix, … read it. Cases with a
// check of their own are not in the file: a memory model has no words to compare, nor has the order of sums in an instruction.
#include "conformance_data.cuh"
#include "conformance_memory.cuh"
#include "ptx.cuh"
#if defined(HOPPER)
#include "conformance_cluster.cuh"
#include "conformance_hopper.cuh"
#include "hopper.cuh"
#include "tensor_maps.h"
#endif

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "launch.h"
#if defined(HOPPER)
#include "tensor_map.h"
#endif

using namespace switchgear::cuda;
using namespace switchgear::cuda::conformance;

namespace {

constexpr int kIn = 1 << 14, kOut = 1 << 14;  // words
constexpr uint32_t kPoison = 0xdeadbeef;      // of output that nothing wrote

// ---- sm_80 ---------------------------------------------------------------------------------------------------------------

#define KERNEL(name) __global__ void name##_kernel([[maybe_unused]] const uint32_t* in, uint32_t* out)

// Each thread copies words to a place in shared memory that is shuffled among the threads.
#define COPY(name, words, valid)                                           \
  KERNEL(name) {                                                           \
    SHARED_DYN(uint32_t, shared);                                          \
    fill_shared(shared, 32 * (words), [](uint32_t i) { return ~mix(i); }); \
    const int place = thread() * 7 % 32 * (words);                         \
    ptx::name(shared + place, in + 4 * thread(), valid);                   \
    ptx::cp_async_commit();                                                \
    ptx::cp_async_wait<0>();                                               \
    __syncthreads();                                                       \
    put(out, shared + thread() * (words), words);                          \
  }
COPY(cp_async16, 4, thread() % 3 != 0)
COPY(cp_async8, 2, thread() % 3 != 0)
COPY(cp_async4, 1, thread() % 3 != 0)
COPY(cp_async16_zeros, 4, thread() % 17)

KERNEL(cp_async_wait) {
  SHARED_DYN(uint32_t, shared);
  fill_shared(shared, 64, [](uint32_t i) { return ~mix(i); });
  for (int group = 0; group < 2; ++group) {
    ptx::cp_async4(shared + 32 * group + thread(), in + 32 * group + thread(), true);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<1>();
  out[thread()] = shared[thread()];
  ptx::cp_async_wait<0>();
  out[32 + thread()] = shared[32 + thread()];
}

#define LOAD_MATRIX(name, count)                                 \
  KERNEL(name) {                                                 \
    SHARED_DYN(uint32_t, shared);                                \
    fill_shared(shared, 128, [](uint32_t i) { return mix(i); }); \
    uint32_t r[count];                                           \
    ptx::name(r, shared + thread() * 5 % 32 * 4);                \
    put(out, r, count);                                          \
  }
LOAD_MATRIX(ldmatrix_x4, 4)
LOAD_MATRIX(ldmatrix_x4_trans, 4)
LOAD_MATRIX(ldmatrix_x2, 2)
LOAD_MATRIX(ldmatrix_x2_trans, 2)

#define MULTIPLY(name, factor)                                                                            \
  KERNEL(name) {                                                                                          \
    const uint32_t seed = static_cast<uint32_t>(thread()) * 16;                                           \
    float d[4];                                                                                           \
    uint32_t a[4], b[2], bits[4];                                                                         \
    for (uint32_t i = 0; i < 4; ++i) d[i] = as_float(small_float(seed + i)), a[i] = factor(seed + 4 + i); \
    for (uint32_t i = 0; i < 2; ++i) b[i] = factor(seed + 8 + i);                                         \
    ptx::name(d, a, b);                                                                                   \
    for (int i = 0; i < 4; ++i) bits[i] = as_bits(d[i]);                                                  \
    put(out, bits, 4);                                                                                    \
  }
__device__ inline uint32_t bf16_pair(uint32_t seed) { return small_pair(seed, true); }
__device__ inline uint32_t f16_pair(uint32_t seed) { return small_pair(seed, false); }
MULTIPLY(mma_bf16, bf16_pair)
MULTIPLY(mma_f16, f16_pair)
MULTIPLY(mma_tf32, small_float)

KERNEL(cvt_tf32) {
  for (int i = thread(); i < 4096; i += 32) {
    const uint32_t bits = in[i] & ~(i % 8 == 0 ? 0x7f800000u : 0x40000000u);  // includes subnormals; no infinities
    out[i] = ptx::cvt_tf32(as_float(bits));
  }
}

// Two codes of few bits times a power of two: subnormal factors, exact results, as the decoders of stored weights have them.
KERNEL(fma_halves) {
  for (int i = thread(); i < 1024; i += 32) {
    const uint32_t few = in[i] & 0x87f087f0u, fraction = in[i + 1024] & 0x000f000fu;
    out[4 * i] = ptx::fma_bf16x2(few, 0x7b807b80u, 0x80008000u);
    out[4 * i + 1] = ptx::fma_bf16x2(fraction | 0x43004300u, 0x3f803f80u, 0xc308c308u);
    out[4 * i + 2] = ptx::fma_f16x2(in[i] & 0xbf80bf80u, 0x5c005c00u, 0x80008000u);
    out[4 * i + 3] = ptx::fma_f16x2(fraction | 0x64006400u, 0x3c003c00u, 0xe408e408u);
  }
}

KERNEL(flags) {
  if (thread() != 0) return;
  uint32_t* p = out;
  const auto step = [&](uint32_t value) { *++p = value; };
  ptx::st_release_cta(out, in[0]), step(ptx::ld_acquire_cta(out));
  ptx::st_release_gpu(out, in[1]), step(ptx::ld_acquire_gpu(out));
  ptx::st_release_sys(out, in[2]), step(ptx::ld_acquire_sys(out));
  ptx::st_relaxed_gpu(out, in[3]), step(ptx::ld_relaxed_gpu(out));
  ptx::st_relaxed_sys(out, in[4]), step(ptx::ld_relaxed_sys(out));
  step(ptx::atom_add_relaxed_gpu(out, in[5]));
  step(ptx::atom_add_release_gpu(out, in[6]));
  step(ptx::atom_add_acq_rel_gpu(out, in[7]));
  step(ptx::atom_add_acq_rel_sys(out, in[8]));
}

KERNEL(atom_add) {  // by all threads: the sum is the same in any order
  if (thread() == 0) out[0] = 0;
  __syncthreads();
  ptx::atom_add_relaxed_gpu(out, in[thread()]);
}

KERNEL(bar) {  // the second warp waits for the first, which only arrives
  SHARED_DYN(uint32_t, shared);
  if (thread() < 32) {
    shared[thread()] = in[thread()];
    ptx::bar_arrive(1, 64);
  } else {
    ptx::bar_sync(1, 64);
    out[thread() - 32] = shared[63 - thread()];
  }
}

// Groups of lanes, and atomics on shared memory.
KERNEL(lanes) {
  SHARED_DYN(uint32_t, shared);
  fill_shared(shared, 8, [](uint32_t i) { return i == 1 ? 0xffffffffu : 0u; });
  const uint32_t value = in[thread()], few = value % 5;
  const unsigned all = 0xffffffffu;
  uint32_t r[13] = {__match_any_sync(all, few),
                    __reduce_max_sync(all, value),
                    __ballot_sync(all, few == 0),
                    static_cast<uint32_t>(__all_sync(all, few < 5)),
                    __shfl_sync(all, value, static_cast<int>(few)),
                    __shfl_sync(all, value, static_cast<int>(few), 8),
                    __shfl_xor_sync(all, value, 3),
                    __shfl_up_sync(all, value, 5),
                    static_cast<uint32_t>(__popc(value)),
                    static_cast<uint32_t>(__ffs(static_cast<int>(value))),
                    as_bits(__shfl_xor_sync(all, as_float(small_float(value)), 16)),
                    __match_any_sync(all, 7u),
                    __reduce_max_sync(all, few)};
  put(out, r, 13);
  atomicAdd(shared, value);
  atomicMin(shared + 1, value);
  atomicMax(shared + 2, value);
  atomicSub(shared + 3, few);
  __syncthreads();
  if (thread() < 4) out[64 * 13 + thread()] = shared[thread()];
}

// ---- sm_90a --------------------------------------------------------------------------------------------------------------

#if defined(HOPPER)

KERNEL(mbarrier) {
  SHARED_DYN(uint64_t, bar);
  if (thread() == 0) {
    ptx::mbar_init(bar, 32);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  for (uint32_t phase = 0; phase < 3; ++phase) {
    const uint32_t parity = phase & 1;
    const bool before = ptx::mbar_test_wait(bar, parity), last = ptx::mbar_test_wait(bar, parity ^ 1);
    __syncthreads();
    ptx::mbar_arrive(bar);
    ptx::mbar_wait(bar, parity);
    const bool after = ptx::mbar_test_wait(bar, parity);
    out[phase * 32 + static_cast<uint32_t>(thread())] = (before ? 1 : 0) + (last ? 2 : 0) + (after ? 4 : 0);
    __syncthreads();
  }
  if (thread() == 0) ptx::mbar_inval(bar);
}

KERNEL(cp_async_mbar_arrive) {
  SHARED_DYN(uint64_t, memory);
  uint32_t* const data = reinterpret_cast<uint32_t*>(memory + 1);
  if (thread() == 0) {
    ptx::mbar_init(memory, 32);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  ptx::cp_async4(data + thread(), in + thread(), true);
  ptx::cp_async_mbar_arrive(memory);
  ptx::mbar_wait(memory, 0);
  out[thread()] = data[31 - thread()];
}

// Starts a copy that counts bytes, waits for it, and writes what it loaded to out.
template <typename Copy>
__device__ inline void copied(uint32_t* out, uint32_t* tile, uint64_t* bar, int bytes, const Copy& copy) {
  fill_shared(tile, bytes / 4, [](uint32_t i) { return ~mix(i); });
  if (thread() == 0) {
    ptx::mbar_init(bar, 1);
    ptx::fence_barrier_init();
    ptx::fence_proxy_async();
  }
  __syncthreads();
  if (thread() == 0) {
    ptx::mbar_expect_tx(bar, static_cast<uint32_t>(bytes));
    copy();
  }
  ptx::mbar_wait(bar, 0);
  for (int i = thread(); i < bytes / 4; i += static_cast<int>(blockDim.x)) out[i] = tile[i];
}

KERNEL(bulk_load) {
  SHARED_DYN(uint32_t, tile);
  copied(out, tile, reinterpret_cast<uint64_t*>(tile + 1024), 4096,
         [&] { ptx::bulk_load(tile, in, 4096, reinterpret_cast<uint64_t*>(tile + 1024)); });
}

// Boxes of 64 x 32 elements that extend past the edges of a matrix of 100 x 72.
__global__ void tma_load_2d_kernel(const __grid_constant__ CUtensorMap map, uint32_t* out, int x, int y) {
  SHARED_DYN(uint32_t, tile);
  if (thread() == 0) ptx::prefetch_tensor_map(&map);
  copied(out, tile, reinterpret_cast<uint64_t*>(tile + 1024), 4096,
         [&] { ptx::tma_load_2d(tile, &map, reinterpret_cast<uint64_t*>(tile + 1024), x, y); });
}

__global__ void tma_load_3d_kernel(const __grid_constant__ CUtensorMap map, uint32_t* out, int x, int y, int z) {
  SHARED_DYN(uint32_t, tile);
  copied(out, tile, reinterpret_cast<uint64_t*>(tile + 1024), 4096,
         [&] { ptx::tma_load_3d(tile, &map, reinterpret_cast<uint64_t*>(tile + 1024), x, y, z); });
}

// A copy of `like` in device memory, with another address and fewer rows. Its bytes are nobody's business: poisoned again.
__global__ void tensor_map_replaced_kernel(const __grid_constant__ CUtensorMap like, const uint32_t* data,
                                           uint32_t* out) {
  SHARED_DYN(uint32_t, tile);
  auto* const map = reinterpret_cast<CUtensorMap*>((reinterpret_cast<uintptr_t>(out + 4096) + 63) / 64 * 64);
  if (thread() == 0) {
    *map = like;
    ptx::tensor_map_replace_address(map, data);
    ptx::tensor_map_replace_size<1>(map, 20);
    ptx::fence_tensor_map_release();
    ptx::fence_tensor_map_acquire(map);
  }
  copied(out, tile, reinterpret_cast<uint64_t*>(tile + 1024), 4096,
         [&] { ptx::tma_load_2d(tile, map, reinterpret_cast<uint64_t*>(tile + 1024), 0, 0); });
  __syncthreads();
  for (int i = thread(); i < 48; i += 32) out[4096 + i] = kPoison;
}

template <int kDimensions>
__global__ void tma_store_kernel(const __grid_constant__ CUtensorMap map, int x, int y) {
  SHARED_DYN(uint32_t, tile);
  fill_shared(tile, 1024, [](uint32_t i) { return mix(i); });
  ptx::fence_proxy_async();
  __syncthreads();
  if (thread() != 0) return;
  if constexpr (kDimensions == 2) {
    ptx::tma_store_2d(&map, tile, x, y);
  } else {
    ptx::tma_store_3d(&map, tile, x, y, 1);
  }
  ptx::tma_store_commit();
  ptx::tma_store_wait_read<0>();
  ptx::tma_store_wait<0>();
}

#define STORE_MATRIX(name)                                                                                      \
  KERNEL(name) {                                                                                                \
    SHARED_DYN(uint32_t, shared);                                                                               \
    fill_shared(shared, 128, [](uint32_t i) { return ~mix(i); });                                               \
    const uint32_t r[4] = {in[4 * thread()], in[4 * thread() + 1], in[4 * thread() + 2], in[4 * thread() + 3]}; \
    ptx::name(shared + thread() * 5 % 32 * 4, r);                                                               \
    __syncthreads();                                                                                            \
    put(out, shared + 4 * thread(), 4);                                                                         \
  }
STORE_MATRIX(stmatrix_x4)
STORE_MATRIX(stmatrix_x4_trans)

KERNEL(elect_one) {
  const unsigned elected = __ballot_sync(0xffffffffu, ptx::elect_one());
  out[thread()] = static_cast<uint32_t>(__popc(elected));
}

// Two steps of 16 depths: the first overwrites, the second adds.
template <typename T, int N, bool kTransposeA, bool kTransposeB, bool kRegisters>
__global__ void wgmma_kernel(uint32_t* out) {
  SHARED_DYN(uint32_t, tiles);
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  constexpr int kBlock = 8192, kABytes = kBlock, kBBytes = (N + 63) / 64 * kBlock;  // 64 rows of 128 bytes
  fill_shared(tiles, (kABytes + kBBytes) / 4, [](uint32_t i) { return small_pair(i, kBf16); });
  ptx::fence_proxy_async();
  __syncthreads();
  const uint32_t start = ptx::smem_u32(tiles);
  const auto operand = [](uint32_t at, bool along, int step) {
    return along ? ptx::descriptor(at + 16 * 128 * step, kBlock, 1024, ptx::Swizzle::k128B)
                 : ptx::desc_k128(at + 32 * step);
  };
  float d[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[i] = as_float(small_float(thread() * 256 + i));
  uint32_t a[4];
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) a[i] = small_pair(static_cast<uint32_t>(thread()) * 4 + i, kBf16);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    const uint64_t b = operand(start + kABytes, kTransposeB, step);
    if constexpr (kRegisters) {
      ptx::wgmma<T, N, kTransposeB>(d, a, b, step);
    } else {
      ptx::wgmma<T, N, kTransposeA, kTransposeB>(d, operand(start, kTransposeA, step), b, step);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_registers(d);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) out[thread() * (N / 2) + i] = as_bits(d[i]);
}

#endif

// ---- host ----------------------------------------------------------------------------------------------------------------

// Memory for kernels and host, used by one at a time.
class Words {
 public:
  explicit Words(int count) : host_(static_cast<size_t>(count)) {
#if defined(ON_DEVICE)
    check(cudaMalloc(&device_, bytes()));
#endif
  }
  Words(const Words&) = delete;
  ~Words() {
#if defined(ON_DEVICE)
    cudaFree(device_);
#endif
  }
  template <typename Fill>
  void fill(const Fill& fill) {
    for (size_t i = 0; i < host_.size(); ++i) host_[i] = fill(static_cast<uint32_t>(i));
#if defined(ON_DEVICE)
    check(cudaMemcpy(device_, host_.data(), bytes(), cudaMemcpyHostToDevice));
#endif
  }
  const std::vector<uint32_t>& read() {
#if defined(ON_DEVICE)
    check(cudaDeviceSynchronize());
    check(cudaMemcpy(host_.data(), device_, bytes(), cudaMemcpyDeviceToHost));
#endif
    return host_;
  }
#if defined(ON_DEVICE)
  uint32_t* data() const { return device_; }
#else
  uint32_t* data() { return host_.data(); }
#endif

 private:
  size_t bytes() const { return host_.size() * sizeof(uint32_t); }
  static void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    std::fprintf(stderr, "CUDA: %s\n", cudaGetErrorString(error));
    std::exit(1);
  }
  std::vector<uint32_t> host_;
  uint32_t* device_ = nullptr;
};

using Numbers = std::vector<uint32_t>;

struct Case {
  std::string name;
  std::function<void(uint32_t* in, uint32_t* out)> run;
  std::function<std::string(const Numbers& words)> check =
      nullptr;           // instead of a comparison: what is wrong, or nothing
  bool finding = false;  // what it complains about is no failure
  std::string group = "";
};

// Names the group of the cases that were added since the last call.
void end_group(std::vector<Case>& cases, const char* group) {
  for (Case& one : cases) {
    if (one.group.empty()) one.group = group;
  }
}

constexpr size_t kShared = 47 << 10;

Case simple(const char* name, void (*kernel)(const uint32_t*, uint32_t*), int threads) {
  return {name, [=](uint32_t* in, uint32_t* out) {
            launch(kernel, dim3(1), dim3(static_cast<unsigned>(threads)), kShared, nullptr, in, out);
          }};
}

#if defined(HOPPER)
constexpr cuuint64_t kColumns = 72, kRows = 50, kDepths = 2;

CUtensorMap map_of(void* data, int dimensions, CUtensorMapSwizzle swizzle) {
  CUtensorMap map;
  std::vector<cuuint64_t> size = {kColumns, dimensions == 2 ? kRows * kDepths : kRows}, stride = {2 * kColumns};
  std::vector<cuuint32_t> box = {64, 32};
  if (dimensions == 3) size.push_back(kDepths), stride.push_back(2 * kColumns * kRows), box.push_back(1);
  if (simt::encode_map(&map, data, size, stride, box, swizzle) != CUDA_SUCCESS)
    throw std::runtime_error("no tensor map");
  return map;
}

void add_tensor_copies(std::vector<Case>& cases) {
  struct Kind {
    const char* name;
    CUtensorMapSwizzle swizzle;
  };
  // A box of 64 elements is 128 bytes wide, too wide for the narrower swizzles.
  for (const Kind kind : {Kind{"128B", CU_TENSOR_MAP_SWIZZLE_128B}, Kind{"plain", CU_TENSOR_MAP_SWIZZLE_NONE}}) {
    for (const int x : {0, 24, -8}) {
      const std::string end = std::string(" ") + kind.name + " x=" + std::to_string(x);
      cases.push_back({"tma_load_2d" + end, [=](uint32_t* in, uint32_t* out) {
                         launch(tma_load_2d_kernel, dim3(1), dim3(32), kShared, nullptr, map_of(in, 2, kind.swizzle),
                                out, x, 80);
                       }});
      cases.push_back({"tma_load_3d" + end, [=](uint32_t* in, uint32_t* out) {
                         launch(tma_load_3d_kernel, dim3(1), dim3(32), kShared, nullptr, map_of(in, 3, kind.swizzle),
                                out, x, 30, 1);
                       }});
      cases.push_back({"tma_store_2d" + end, [=](uint32_t*, uint32_t* out) {
                         launch(tma_store_kernel<2>, dim3(1), dim3(32), kShared, nullptr, map_of(out, 2, kind.swizzle),
                                x, 80);
                       }});
      cases.push_back({"tma_store_3d" + end, [=](uint32_t*, uint32_t* out) {
                         launch(tma_store_kernel<3>, dim3(1), dim3(32), kShared, nullptr, map_of(out, 3, kind.swizzle),
                                x, 30);
                       }});
    }
  }
}

void add_replaced_map(std::vector<Case>& cases) {
  cases.push_back({"tensor_map_replaced", [](uint32_t* in, uint32_t* out) {
                     launch(tensor_map_replaced_kernel, dim3(1), dim3(32), kShared, nullptr,
                            map_of(in, 2, CU_TENSOR_MAP_SWIZZLE_128B), in + 64, out);
                   }});
}

template <typename T, int N, bool kTransposeA, bool kTransposeB, bool kRegisters>
void add_wgmma(std::vector<Case>& cases) {
  const std::string type = std::is_same_v<T, __half> ? "f16" : "bf16";
  const std::string layout = std::string(kRegisters    ? " registers"
                                         : kTransposeA ? " A^T"
                                                       : " A") +
                             (kTransposeB ? " B^T" : " B");
  cases.push_back({"wgmma " + type + " n" + std::to_string(N) + layout, [](uint32_t*, uint32_t* out) {
                     launch(wgmma_kernel<T, N, kTransposeA, kTransposeB, kRegisters>, dim3(1), dim3(128), kShared,
                            nullptr, out);
                   }});
}

template <typename T, int N>
void add_widths(std::vector<Case>& cases) {
  add_wgmma<T, N, false, false, false>(cases);
  add_wgmma<T, N, false, false, true>(cases);
  if constexpr (N % 64 == 0) {
    add_wgmma<T, N, true, false, false>(cases);
    add_wgmma<T, N, false, true, false>(cases);
    add_wgmma<T, N, true, true, false>(cases);
    add_wgmma<T, N, false, true, true>(cases);
  }
}

// tests/simt/test_ptx.py checks the text of every width. Here are the smallest, the largest, those of the kernels, and others.
template <typename T, int... kWidths>
void add_all_widths(std::vector<Case>& cases) {
  (add_widths<T, kWidths>(cases), ...);
}
#endif

// ---- cases with checks of their own ---------------------------------------------------------------------------------------

std::string all_equal(const Numbers& words, size_t count, uint32_t want, const char* what) {
  if (words.size() != count) return std::to_string(words.size()) + " words, expected " + std::to_string(count);
  size_t wrong = 0;
  for (const uint32_t word : words) wrong += word != want ? 1 : 0;
  return wrong == 0 ? "" : std::to_string(wrong) + " of " + std::to_string(count) + " " + what;
}

// A block with all the shared memory it may have is alone on its multiprocessor.
size_t most_shared() {
  int bytes = 0;
  if (cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0) != cudaSuccess) bytes = 99 << 10;
  return static_cast<size_t>(bytes);
}

void zero(uint32_t* words, int count) {
#if defined(ON_DEVICE)
  cudaMemset(words, 0, static_cast<size_t>(count) * sizeof(uint32_t));
#else
  std::memset(words, 0, static_cast<size_t>(count) * sizeof(uint32_t));
#endif
}

#if defined(ON_DEVICE)
// A process of its own maps the memory of a handle, in hexadecimal, and writes it.
int write_shared_memory(const char* text) {
  cudaIpcMemHandle_t handle;
  for (size_t i = 0; i < sizeof handle; ++i) {
    unsigned byte = 0;
    std::sscanf(text + 2 * i, "%2x", &byte);
    reinterpret_cast<unsigned char*>(&handle)[i] = static_cast<unsigned char>(byte);
  }
  void* memory = nullptr;
  if (cudaIpcOpenMemHandle(&memory, handle, cudaIpcMemLazyEnablePeerAccess) != cudaSuccess) return 3;
  write_kernel<<<1, 256>>>(static_cast<uint32_t*>(memory), 4096);
  return cudaDeviceSynchronize() == cudaSuccess && cudaIpcCloseMemHandle(memory) == cudaSuccess ? 0 : 4;
}

void share_memory(uint32_t* out) {
  // Smaller allocations share a block of 2 MB, which a handle describes as a whole.
  void* shared = nullptr;
  cudaIpcMemHandle_t handle;
  if (cudaMalloc(&shared, 2 << 20) != cudaSuccess || cudaIpcGetMemHandle(&handle, shared) != cudaSuccess) {
    throw std::runtime_error("cudaIpcGetMemHandle");
  }
  std::string text;
  for (size_t i = 0; i < sizeof handle; ++i) {
    char digits[3];
    std::snprintf(digits, sizeof digits, "%02x", reinterpret_cast<const unsigned char*>(&handle)[i]);
    text += digits;
  }
  char self[4096] = {};
  if (readlink("/proc/self/exe", self, sizeof self - 1) < 0) throw std::runtime_error("readlink");
  const int status = std::system(("'" + std::string(self) + "' --ipc " + text).c_str());
  if (status != 0) throw std::runtime_error("the other process ended with status " + std::to_string(status));
  cudaMemcpy(out, shared, 4096 * sizeof(uint32_t), cudaMemcpyDeviceToDevice);
  cudaFree(shared);
}

// expf, __fdividef and reciprocal have no model with the same bits: at most some units in the last place from float64.
__global__ void approximate_kernel(const uint32_t* in, uint32_t* out) {
  for (int i = thread(); i < 1024; i += 32) {
    const float x = static_cast<float>(in[i] % 160001) / 1000.0f - 80.0f;
    const float y = 3.0f + static_cast<float>(i);
#if defined(HOPPER)
    const float reciprocal = ptx::reciprocal(y);
#else
    const float reciprocal = __frcp_rn(y);
#endif
    out[i] = as_bits(expf(x)), out[1024 + i] = as_bits(__fdividef(x, y)), out[2048 + i] = as_bits(reciprocal);
  }
}

std::string far_from_exact(const Numbers& words) {
  const auto ulps = [](float got, double want) { return std::abs(got - want) / std::ldexp(std::abs(want), -23); };
  double worst = 0.0;
  for (uint32_t i = 0; i < 1024; ++i) {
    const float x = static_cast<float>(mix(i + 1000003) % 160001) / 1000.0f - 80.0f;
    float e, quotient, reciprocal;
    std::memcpy(&e, &words[i], 4), std::memcpy(&quotient, &words[1024 + i], 4);
    std::memcpy(&reciprocal, &words[2048 + i], 4);
    worst = std::max({worst, ulps(e, std::exp(static_cast<double>(x))), ulps(reciprocal, 1.0 / (3.0 + i)),
                      x == 0.0f ? 0.0 : ulps(quotient, static_cast<double>(x) / (3.0 + i))});
  }
  return worst <= 3.0 ? ""
                      : std::to_string(worst) + " units in the last place, expected at most 3";  // the manual says 2
}
#else
int write_shared_memory(const char*) { return 2; }
#endif

void add_memory_cases(std::vector<Case>& cases) {
  cases.push_back({"messages between multiprocessors",
                   [](uint32_t* in, uint32_t* out) {
                     zero(in, kPairs * kWordsOfPair);
                     launch_cooperative(messages_kernel, dim3(2 * kPairs), dim3(32), most_shared(), nullptr, in, out);
                   },
                   [](const Numbers& words) { return all_equal(words, 32 * kPairs, 0, "lanes saw wrong words"); }});
  cases.push_back({"all blocks at once",
                   [](uint32_t* in, uint32_t* out) {
                     zero(in, 1);
                     launch_cooperative(together_kernel, dim3(kTogether), dim3(1), 0, nullptr, in, out);
                   },
                   [](const Numbers& words) { return all_equal(words, kTogether, 1, "blocks did not run"); }});
#if defined(ON_DEVICE)
  cases.push_back({"memory of another process", [](uint32_t*, uint32_t* out) { share_memory(out); },
                   [](const Numbers& words) {
                     size_t right = 0;
                     while (right < words.size() && words[right] == mix(static_cast<uint32_t>(right) + 77)) ++right;
                     return right == 4096 ? "" : std::to_string(right) + " of 4096 words arrived";
                   }});
  cases.push_back(
      {"expf and fdividef",
       [](uint32_t* in, uint32_t* out) { launch(approximate_kernel, dim3(1), dim3(32), 0, nullptr, in, out); },
       far_from_exact, true});
#endif
}

#if defined(HOPPER)
// The boxes of the GEMM's tensor maps, at the edges of a matrix of 72 columns and 220 rows of 2 experts.
void add_production_maps(std::vector<Case>& cases) {
  for (const int rows : {16, 64, 96, 128, 192}) {
    for (const int x : {0, 24}) {
      cases.push_back(
          {"tensor map of " + std::to_string(rows) + " rows x=" + std::to_string(x), [=](uint32_t* in, uint32_t* out) {
             const CUtensorMap map =
                 make_tensor_map({in, switchgear::DType::kBFloat16, {72, 220, 2}, {72, 72 * 220}, rows});
             launch(box_kernel, dim3(1), dim3(32), size_t{26} << 10, nullptr, map, out, rows * 128, x, 100, 1);
           }});
    }
  }
}

void add_clusters(std::vector<Case>& cases) {
  for (const int size : {2, 4}) {
    cases.push_back({"a ring of " + std::to_string(size) + " blocks", [=](uint32_t*, uint32_t* out) {
                       launch_clusters(size, cluster_ring_kernel, dim3(8), dim3(32), 0, nullptr, out,
                                       static_cast<unsigned>(size));
                     }});
  }
  for (const unsigned blocks : {0b11u, 0b10u, 0b01u}) {
    cases.push_back(
        {"a box for the blocks " + std::to_string(blocks), [=](uint32_t* in, uint32_t* out) {
           const CUtensorMap map = make_tensor_map({in, switchgear::DType::kBFloat16, {72, 220, 2}, {72, 72 * 220}, 8});
           launch_clusters(2, multicast_kernel, dim3(4), dim3(32), size_t{4} << 10, nullptr, map, out, blocks);
         }});
  }
}

template <typename T, int N, bool kTransposeA, bool kTransposeB>
void add_far_product(std::vector<Case>& cases) {
  for (const int at : {0, 180 << 10}) {
    const std::string name = std::string("second block, four steps ") + (std::is_same_v<T, __half> ? "f16" : "bf16") +
                             " n" + std::to_string(N) + (kTransposeA ? " A^T" : " A") + (kTransposeB ? " B^T" : " B") +
                             " at " + std::to_string(at >> 10) + " KB";
    cases.push_back({name, [=](uint32_t*, uint32_t* out) {
                       launch(far_kernel<T, N, kTransposeA, kTransposeB>, dim3(1), dim3(128), size_t{222} << 10,
                              nullptr, out, at);
                     }});
  }
}

void add_far_products(std::vector<Case>& cases) {
  add_far_product<__nv_bfloat16, 16, false, false>(cases);
  add_far_product<__nv_bfloat16, 64, false, true>(cases);
  add_far_product<__nv_bfloat16, 128, true, true>(cases);
  add_far_product<__nv_bfloat16, 192, false, false>(cases);
  add_far_product<__nv_bfloat16, 192, true, true>(cases);
  add_far_product<__half, 128, false, false>(cases);
}

void add_rings(std::vector<Case>& cases) {
  for (const auto& [name, rows] :
       {std::pair{"TMA", RowsBy::kTma}, {"cp.async", RowsBy::kCopies}, {"turns", RowsBy::kTurns}}) {
    for (const int stages : {1, 3, 37}) {
      cases.push_back(
          {std::string("ring by ") + name + ", " + std::to_string(stages) + " stages",
           [=, by = rows](uint32_t* in, uint32_t* out) {
             launch(small_factors_kernel, dim3(1), dim3(256), 0, nullptr, in, kIn);
             const RingParams params{
                 make_tensor_map(
                     {in, switchgear::DType::kBFloat16, {kRingColumns, 455, 1}, {kRingColumns, kRingColumns}, 128}),
                 make_tensor_map(
                     {in, switchgear::DType::kBFloat16, {kRingColumns, 455, 1}, {kRingColumns, kRingColumns}, 64}),
                 in,
                 out,
                 stages,
                 by};
             launch(ring_kernel, dim3(1), dim3(kRingThreads), kRingBytes, nullptr, params);
           }});
    }
  }
}

template <int N, bool kSwapped>
void run_order(uint32_t* out) {
  launch(order_kernel<N, kSwapped>, dim3(1), dim3(128), size_t{4} * kBlockBytes, nullptr, out);
}

// The guarantee that a row's bits do not depend on the tile rests on it.
Case order_case() {
  return {"order of sums",
          [](uint32_t*, uint32_t* out) {
            run_order<16, false>(out), run_order<64, false>(out + kOrderWords);
            run_order<128, false>(out + 2 * kOrderWords), run_order<192, false>(out + 3 * kOrderWords);
            run_order<16, true>(out + 4 * kOrderWords), run_order<64, true>(out + 5 * kOrderWords);
          },
          [](const Numbers& words) -> std::string {
            constexpr const char* kNames[] = {"n16", "n64", "n128", "n192", "swapped n16", "swapped n64"};
            if (words.size() != 6 * kOrderWords) return std::to_string(words.size()) + " words";
            std::string text;
            for (size_t which = 1; which < 6; ++which) {
              int wrong = 0;
              for (size_t i = 0; i < kOrderWords; ++i) wrong += words[which * kOrderWords + i] != words[i] ? 1 : 0;
              if (wrong > 0)
                text += std::string(text.empty() ? "" : ", ") + kNames[which] + ": " + std::to_string(wrong);
            }
            return text.empty() ? "" : "of 256 sums other bits than n16: " + text;
          },
          true};
}
#endif

std::vector<Case> all_cases() {
#define SIMPLE(name, threads) simple(#name, name##_kernel, threads)
  std::vector<Case> cases = {SIMPLE(cp_async16, 32),
                             SIMPLE(cp_async8, 32),
                             SIMPLE(cp_async4, 32),
                             SIMPLE(cp_async16_zeros, 32),
                             SIMPLE(cp_async_wait, 32),
                             SIMPLE(ldmatrix_x4, 32),
                             SIMPLE(ldmatrix_x4_trans, 32),
                             SIMPLE(ldmatrix_x2, 32),
                             SIMPLE(ldmatrix_x2_trans, 32),
                             SIMPLE(mma_bf16, 32),
                             SIMPLE(mma_f16, 32),
                             SIMPLE(mma_tf32, 32),
                             SIMPLE(cvt_tf32, 32),
                             SIMPLE(fma_halves, 32),
                             SIMPLE(flags, 32),
                             SIMPLE(atom_add, 32),
                             SIMPLE(bar, 64)};
  end_group(cases, "basic");
  cases.push_back(SIMPLE(lanes, 64));
  end_group(cases, "lanes");
  add_memory_cases(cases);
  end_group(cases, "memory");
#if defined(HOPPER)
  for (Case& one : std::vector<Case>{SIMPLE(mbarrier, 32), SIMPLE(cp_async_mbar_arrive, 32), SIMPLE(bulk_load, 32),
                                     SIMPLE(stmatrix_x4, 32), SIMPLE(stmatrix_x4_trans, 32), SIMPLE(elect_one, 32)}) {
    cases.push_back(one);
  }
  end_group(cases, "hopper");
  add_tensor_copies(cases);
  add_production_maps(cases);
  add_replaced_map(cases);
  end_group(cases, "tma");
  add_clusters(cases);
  end_group(cases, "clusters");
  add_all_widths<__nv_bfloat16, 8, 16, 24, 64, 96, 128, 192, 256>(cases);
  add_all_widths<__half, 16, 128, 192>(cases);
  end_group(cases, "wgmma");
  add_far_products(cases);
  end_group(cases, "far");
  add_rings(cases);
  end_group(cases, "ring");
  cases.push_back(order_case());
  end_group(cases, "order");
#endif
  return cases;
}

// The words of a case, up to the last one written.
Numbers words_of(const Case& one, Words& in, Words& out) {
  in.fill([](uint32_t i) { return mix(i + 1000003); });
  out.fill([](uint32_t) { return kPoison; });
  one.run(in.data(), out.data());
  Numbers words = out.read();
  while (!words.empty() && words.back() == kPoison) words.pop_back();
  return words;
}

void print_words(const Numbers& words) {
  for (size_t i = 0; i < words.size(); ++i) std::printf("%s%x", i == 0 ? "" : " ", words[i]);
  std::printf("\n");
}

// The cases of a file that this program printed.
std::map<std::string, Numbers> read_words(const char* path) {
  std::map<std::string, Numbers> cases;
  std::ifstream file(path);
  if (!file) {
    std::fprintf(stderr, "%s: cannot be read\n", path);
    std::exit(2);
  }
  for (std::string line; std::getline(file, line);) {
    const size_t tab = line.find('\t');
    std::istringstream numbers(line.substr(tab + 1));
    Numbers& words = cases[line.substr(0, tab)];
    for (uint32_t word = 0; numbers >> std::hex >> word;) words.push_back(word);
  }
  return cases;
}

// What is wrong with the words of a case, or nothing.
std::string complaint(const Case& one, const Numbers& got, const std::map<std::string, Numbers>& expected) {
  if (one.check) return one.check(got);
  const auto found = expected.find(one.name);
  if (found == expected.end()) return "the model has no such case";
  const Numbers& want = found->second;
  if (got.size() != want.size()) {
    return std::to_string(got.size()) + " words, the model writes " + std::to_string(want.size());
  }
  size_t wrong = 0, first = 0;
  for (size_t i = got.size(); i-- > 0;) {
    if (got[i] != want[i]) first = i, ++wrong;
  }
  if (wrong == 0) return "";
  char text[160];
  std::snprintf(text, sizeof text, "%zu of %zu words differ, first word %zu: 0x%x, the model has 0x%x", wrong,
                got.size(), first, got[first], want[first]);
  return text;
}

// A line of lines.py. Names and texts have no characters that JSON escapes.
void say(const std::string& line) {
  std::printf("@gpu {%s}\n", line.c_str());
  std::fflush(stdout);
}

int compare(const std::vector<Case>& cases, const char* path, size_t first) {
  const std::map<std::string, Numbers> expected = read_words(path);
  std::string names;
  for (const Case& one : cases) names += (names.empty() ? "\"" : ", \"") + one.name + "\"";
  say("\"cases\": [" + names + "]");
  Words in(kIn), out(kOut);
  bool failed = false;
  for (size_t number = first; number < cases.size(); ++number) {
    say("\"starts\": " + std::to_string(number));
    std::string wrong;
    try {
      wrong = complaint(cases[number], words_of(cases[number], in, out), expected);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "%s\n", error.what());
      wrong = "it throws";
    }
    failed = failed || (!wrong.empty() && !cases[number].finding);
    const char* const verdict = wrong.empty() ? "passed" : cases[number].finding ? "finding" : "failed";
    say("\"ends\": " + std::to_string(number) + ", \"verdict\": \"" + verdict + "\", \"detail\": \"" + wrong + "\"");
  }
  return failed ? 1 : 0;
}

}  // namespace

int main(int count, char** arguments) {
  const auto option = [&](const char* name) -> const char* {
    for (int i = 1; i + 1 < count; ++i) {
      if (std::strcmp(arguments[i], name) == 0) return arguments[i + 1];
    }
    return nullptr;
  };
  if (const char* const handle = option("--ipc")) return write_shared_memory(handle);
  std::vector<Case> cases = all_cases();
  if (const char* const group = option("--group")) {
    std::erase_if(cases, [&](const Case& one) { return one.group != group; });
  }
  if (const char* const expected = option("--expected")) {
    const char* const first = option("--from");
    return compare(cases, expected, first == nullptr ? 0 : std::strtoul(first, nullptr, 10));
  }
  Words in(kIn), out(kOut);
  for (const Case& one : cases) {
    const Numbers words = words_of(one, in, out);
    if (one.check) {
      const std::string wrong = one.check(words);
      if (wrong.empty()) continue;
      std::fprintf(stderr, "%s: %s\n", one.name.c_str(), wrong.c_str());
      return 1;
    }
    std::printf("%s\t", one.name.c_str());
    print_words(words);
  }
  return 0;
}
