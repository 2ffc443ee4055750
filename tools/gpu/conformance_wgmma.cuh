// SPDX-License-Identifier: BSD-3-Clause
// Conformance of wgmma: every layout and width; what a GEMM relies on beyond single instructions, all K-steps of a stage, the second
// m64 block and shared memory past 48 KB; and the order of sums inside an instruction.
#pragma once
#include "conformance_case.cuh"
#include "hopper.cuh"

namespace switchgear::cuda::conformance {

constexpr int kBlockBytes = 8192;  // 64 rows of 128 bytes: what the 128B swizzle repeats in

// Two steps of 16 depths: the first overwrites, the second adds.
template <typename T, int N, bool kTransposeA, bool kTransposeB, bool kRegisters>
__global__ void wgmma_kernel(uint32_t* out) {
  SHARED_DYN(uint32_t, tiles);
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  constexpr int kABytes = kBlockBytes, kBBytes = (N + 63) / 64 * kBlockBytes;  // 64 rows of 128 bytes
  fill_shared(tiles, (kABytes + kBBytes) / 4, [](uint32_t i) { return small_pair(i, kBf16); });
  ptx::fence_proxy_async();
  __syncthreads();
  const uint32_t start = ptx::smem_u32(tiles);
  const auto operand = [](uint32_t at, bool along, int step) {
    return along ? ptx::descriptor(at + 16 * 128 * step, kBlockBytes, 1024, ptx::Swizzle::k128B)
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

template <typename T, int N, bool kTransposeA, bool kTransposeB, bool kRegisters>
void add_product(std::vector<Case>& cases) {
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
  add_product<T, N, false, false, false>(cases);
  add_product<T, N, false, false, true>(cases);
  if constexpr (N % 64 == 0) {
    add_product<T, N, true, false, false>(cases);
    add_product<T, N, false, true, false>(cases);
    add_product<T, N, true, true, false>(cases);
    add_product<T, N, false, true, true>(cases);
  }
}

// tests/simt/test_ptx.py checks the text of every width.
template <typename T, int... kWidths>
void add_all_widths(std::vector<Case>& cases) {
  (add_widths<T, kWidths>(cases), ...);
}

inline void add_wgmma(std::vector<Case>& cases) {
  add_all_widths<__nv_bfloat16, 16, 64, 128, 192, 256>(cases);
  add_all_widths<__half, 16, 128, 192>(cases);
}

// ---- far from the start --------------------------------------------------------------------------------------------------

// The second m64 block of A [128 rows, 64 depths] times B [N,64], all four K-steps, from byte `at` of shared memory on.
template <typename T, int N, bool kTransposeA, bool kTransposeB>
__global__ void far_kernel(uint32_t* out, int at) {
  SHARED_DYN(unsigned char, shared);
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  constexpr int kABytes = 2 * kBlockBytes, kBBytes = (N + 63) / 64 * kBlockBytes;
  fill_shared(reinterpret_cast<uint32_t*>(shared + at), (kABytes + kBBytes) / 4,
              [](uint32_t i) { return small_pair(i, kBf16); });
  ptx::fence_proxy_async();
  __syncthreads();
  const uint32_t start = ptx::smem_u32(shared + at);
  const auto operand = [](uint32_t from, bool along, int step) {
    return along ? ptx::descriptor(from + 16 * 128 * step, kBlockBytes, 1024, ptx::Swizzle::k128B)
                 : ptx::desc_k128(from + 32 * step);
  };
  float d[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[i] = as_float(small_float(thread() * 256 + i));
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    ptx::wgmma<T, N, kTransposeA, kTransposeB>(d, operand(start + kBlockBytes, kTransposeA, step),
                                               operand(start + kABytes, kTransposeB, step), 1);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_registers(d);
#pragma unroll
  for (int i = 0; i < N / 2; ++i) out[thread() * (N / 2) + i] = as_bits(d[i]);
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

inline void add_far(std::vector<Case>& cases) {
  add_far_product<__nv_bfloat16, 16, false, false>(cases);
  add_far_product<__nv_bfloat16, 64, false, true>(cases);
  add_far_product<__nv_bfloat16, 128, true, true>(cases);
  add_far_product<__nv_bfloat16, 192, false, false>(cases);
  add_far_product<__nv_bfloat16, 192, true, true>(cases);
  add_far_product<__half, 128, false, false>(cases);
}

// ---- the order of sums ----------------------------------------------------------------------------------------------------

// bfloat16 of any sign and mantissa, with exponents of 2^-6 to 2^6, so that sums are rounded.
__host__ __device__ constexpr uint32_t any_half(uint32_t seed) {
  const uint32_t bits = mix(seed);
  return (bits & 0x8000u) | ((121 + (bits >> 16) % 13) << 7) | (bits & 0x7fu);
}

constexpr int kOrderWords = 16 * 16;

// The product of the first 16 of 64 rows with the first 16 of N columns, in instructions of N columns; kSwapped: of the columns
// as rows and the rows as columns. All of them give the same sums, so the same bits if an instruction adds in one order.
template <int N, bool kSwapped>
__global__ void order_kernel(uint32_t* out) {
  SHARED_DYN(uint32_t, tiles);
  constexpr int kTiles = 4;  // of 64 rows: rows, then up to 192 columns
  fill_shared(tiles, kTiles * kBlockBytes / 4, [](uint32_t i) { return any_half(2 * i) | any_half(2 * i + 1) << 16; });
  ptx::fence_proxy_async();
  __syncthreads();
  const uint32_t rows = ptx::smem_u32(tiles), columns = rows + kBlockBytes;
  float d[N / 2];
#pragma unroll
  for (int i = 0; i < N / 2; ++i) d[i] = 0.0f;
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    ptx::wgmma<__nv_bfloat16, N>(d, ptx::desc_k128((kSwapped ? columns : rows) + 32 * step),
                                 ptx::desc_k128((kSwapped ? rows : columns) + 32 * step), 1);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_registers(d);
  if (thread() >= 32) return;  // rows 0 to 15 are in the first warp
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = thread() / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + thread() % 4 * 2 + i % 2;
    out[kSwapped ? column * 16 + row : row * 16 + column] = as_bits(d[i]);
  }
}

template <int N, bool kSwapped>
void run_order(uint32_t* out) {
  launch(order_kernel<N, kSwapped>, dim3(1), dim3(128), size_t{4} * kBlockBytes, nullptr, out);
}

// The guarantee that a row's bits do not depend on the tile rests on it.
inline void add_order(std::vector<Case>& cases) {
  cases.push_back({"order of sums",
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
                       for (size_t i = 0; i < kOrderWords; ++i)
                         wrong += words[which * kOrderWords + i] != words[i] ? 1 : 0;
                       if (wrong > 0)
                         text += std::string(text.empty() ? "" : ", ") + kNames[which] + ": " + std::to_string(wrong);
                     }
                     return text.empty() ? "" : "of 256 sums other bits than n16: " + text;
                   },
                   true});
}

}  // namespace switchgear::cuda::conformance
