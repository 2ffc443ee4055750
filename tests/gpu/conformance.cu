// SPDX-License-Identifier: BSD-3-Clause
// Every wrapper of ptx.cuh, and with -DHOPPER of hopper.cuh, on the same pseudo-random data. Compiled by nvcc it runs on the
// device; compiled in tests/simt it runs the C++ models. Both print their results word by word, and conformance.py compares.
//
// Factors are small integers, whose products and sums are exact in all types, so the order of sums does not matter.
// Layouts need no second description here: shared memory is filled word by word, and wgmma, ldmatrix, … read it.
#include "ptx.cuh"
#if defined(HOPPER)
#include "hopper.cuh"
#include "tensor_maps.h"
#endif

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "launch.h"

using namespace switchgear::cuda;

namespace {

constexpr int kIn = 1 << 14, kOut = 1 << 14;  // words
constexpr uint32_t kPoison = 0xdeadbeef;      // of output that nothing wrote

// ---- data ----------------------------------------------------------------------------------------------------------------

__host__ __device__ constexpr uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// -3 … 3 as the bits of a float.
__host__ __device__ constexpr uint32_t small_float(uint32_t seed) {
  constexpr uint32_t kBits[7] = {0xc0400000, 0xc0000000, 0xbf800000, 0, 0x3f800000, 0x40000000, 0x40400000};
  return kBits[mix(seed) % 7];
}
// The same in 16 bits: bfloat16 is the upper half of a float.
__host__ __device__ constexpr uint32_t small_half(uint32_t seed, bool bf16) {
  constexpr uint32_t kBits[7] = {0xc200, 0xc000, 0xbc00, 0, 0x3c00, 0x4000, 0x4200};
  return bf16 ? small_float(seed) >> 16 : kBits[mix(seed) % 7];
}
__host__ __device__ constexpr uint32_t small_pair(uint32_t seed, bool bf16) {
  return small_half(2 * seed, bf16) | small_half(2 * seed + 1, bf16) << 16;
}

__device__ inline int thread() { return static_cast<int>(threadIdx.x); }
__device__ inline float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline uint32_t as_bits(float value) { return __float_as_uint(value); }

template <typename Fill>
__device__ inline void fill_shared(uint32_t* shared, int words, const Fill& fill) {
  for (int i = thread(); i < words; i += static_cast<int>(blockDim.x)) shared[i] = fill(static_cast<uint32_t>(i));
  __syncthreads();
}

__device__ inline void put(uint32_t* out, const uint32_t* values, int count) {
  for (int i = 0; i < count; ++i) out[thread() * count + i] = values[i];
}

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
#if defined(__CUDACC__)
    check(cudaMalloc(&device_, bytes()));
#endif
  }
  Words(const Words&) = delete;
  ~Words() {
#if defined(__CUDACC__)
    cudaFree(device_);
#endif
  }
  template <typename Fill>
  void fill(const Fill& fill) {
    for (size_t i = 0; i < host_.size(); ++i) host_[i] = fill(static_cast<uint32_t>(i));
#if defined(__CUDACC__)
    check(cudaMemcpy(device_, host_.data(), bytes(), cudaMemcpyHostToDevice));
#endif
  }
  const std::vector<uint32_t>& read() {
#if defined(__CUDACC__)
    check(cudaDeviceSynchronize());
    check(cudaMemcpy(host_.data(), device_, bytes(), cudaMemcpyDeviceToHost));
#endif
    return host_;
  }
#if defined(__CUDACC__)
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

struct Case {
  std::string name;
  std::function<void(uint32_t* in, uint32_t* out)> run;
};

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
#if defined(HOPPER)
  for (Case& one : std::vector<Case>{SIMPLE(mbarrier, 32), SIMPLE(cp_async_mbar_arrive, 32), SIMPLE(bulk_load, 32),
                                     SIMPLE(stmatrix_x4, 32), SIMPLE(stmatrix_x4_trans, 32), SIMPLE(elect_one, 32)}) {
    cases.push_back(one);
  }
  add_tensor_copies(cases);
  add_all_widths<__nv_bfloat16, 8, 16, 24, 64, 96, 128, 192, 256>(cases);
  add_all_widths<__half, 16, 128, 192>(cases);
#endif
  return cases;
}

}  // namespace

// Prints a line per case: its name, a tab, and the words up to the last one written.
int main() {
  Words in(kIn), out(kOut);
  for (const Case& one : all_cases()) {
    in.fill([](uint32_t i) { return mix(i + 1000003); });
    out.fill([](uint32_t) { return kPoison; });
    one.run(in.data(), out.data());
    const std::vector<uint32_t>& words = out.read();
    size_t count = words.size();
    while (count > 0 && words[count - 1] == kPoison) --count;
    std::printf("%s\t", one.name.c_str());
    for (size_t i = 0; i < count; ++i) std::printf("%s%x", i == 0 ? "" : " ", words[i]);
    std::printf("\n");
  }
  return 0;
}
