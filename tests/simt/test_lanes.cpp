// SPDX-License-Identifier: BSD-3-Clause
// Compares shuffles, votes, matches and reductions with what CUDA's manual defines for each lane; atomics.
#include <vector>

#include "expect.h"
#include "launch.h"
#include "ptx.cuh"

using namespace switchgear::cuda;

namespace {

template <typename T>
__global__ void shuffles_kernel(T* out, int width, int parameter) {
  const int lane = static_cast<int>(threadIdx.x);
  const T value = static_cast<T>(lane + 100);
  out[lane] = __shfl_sync(0xffffffffu, value, parameter, width);
  out[32 + lane] = __shfl_xor_sync(0xffffffffu, value, parameter, width);
  out[64 + lane] = __shfl_up_sync(0xffffffffu, value, static_cast<unsigned>(parameter), width);
  out[96 + lane] = __shfl_down_sync(0xffffffffu, value, static_cast<unsigned>(parameter), width);
}
template <typename T>
void check_shuffles() {
  for (const int width : {4, 8, 32}) {
    for (const int parameter : {0, 1, 3, 5, 16}) {
      std::vector<T> out(128);
      launch(shuffles_kernel<T>, 1, 32, 0, nullptr, out.data(), width, parameter);
      for (int lane = 0; lane < 32; ++lane) {
        const int first = lane / width * width;
        const auto pick = [&](int source, bool inside) { return static_cast<T>((inside ? source : lane) + 100); };
        CHECK(out[lane] == pick(first + parameter % width, true), "lane ", lane, ", width ", width);
        CHECK(out[32 + lane] == pick(lane ^ parameter, (lane ^ parameter) < first + width), "lane ", lane);
        CHECK(out[64 + lane] == pick(lane - parameter, lane - parameter >= first), "lane ", lane);
        CHECK(out[96 + lane] == pick(lane + parameter, lane + parameter < first + width), "lane ", lane);
      }
    }
  }
}
TEST(shuffles) {
  check_shuffles<int>();
  check_shuffles<float>();
  check_shuffles<double>();
  check_shuffles<unsigned long long>();
}

// Two halves of a warp at different places at the same time.
__global__ void halves_kernel(unsigned* out) {
  const unsigned lane = threadIdx.x;
  if (lane < 16) {
    out[lane] = __ballot_sync(0x0000ffffu, lane % 2);
  } else {
    out[lane] = __reduce_add_sync(0xffff0000u, lane);
  }
}
TEST(parts_of_a_warp_work_apart) {
  std::vector<unsigned> out(32);
  launch(halves_kernel, 1, 32, 0, nullptr, out.data());
  for (int lane = 0; lane < 32; ++lane) CHECK(out[lane] == (lane < 16 ? 0xaaaau : 376u), "lane ", lane);
}

__global__ void votes_kernel(unsigned* out) {
  const int lane = static_cast<int>(threadIdx.x);
  int all_match = 2;
  const unsigned results[] = {
      __ballot_sync(0xffffffffu, lane > 20),
      static_cast<unsigned>(__any_sync(0xffffffffu, lane == 7)),
      static_cast<unsigned>(__all_sync(0xffffffffu, lane < 31)),
      __match_any_sync(0xffffffffu, lane % 5),
      __match_all_sync(0xffffffffu, lane / 32, &all_match),
      static_cast<unsigned>(__reduce_min_sync(0xffffffffu, lane - 5)),
      static_cast<unsigned>(__reduce_max_sync(0xffffffffu, lane - 40)),
      __reduce_xor_sync(0xffffffffu, 1u << lane),
      __reduce_or_sync(0xffffffffu, 2u << lane % 4),
      __reduce_and_sync(0xffffffffu, ~(1u << lane % 4)),
      static_cast<unsigned>(all_match),
  };
  for (int i = 0; i < 11; ++i) out[11 * lane + i] = results[i];
}
TEST(votes) {
  std::vector<unsigned> out(11 * 32);
  launch(votes_kernel, 1, 32, 0, nullptr, out.data());
  for (int lane = 0; lane < 32; ++lane) {
    unsigned same = 0;
    for (int i = lane % 5; i < 32; i += 5) same |= 1u << i;
    const unsigned expected[] = {
        0xffe00000u, 1,     0,     same, 0xffffffffu, static_cast<unsigned>(-5), static_cast<unsigned>(-9),
        0xffffffffu, 0x1eu, ~0xfu, 1};
    for (int i = 0; i < 11; ++i) CHECK(out[11 * lane + i] == expected[i], "lane ", lane, ", result ", i);
  }
}

__global__ void differing_kernel(int* out) {
  const int lane = static_cast<int>(threadIdx.x);
  if (lane < 16) {
    out[lane] = __shfl_sync(0xffffffffu, lane, 0);
  } else {
    out[lane] = __shfl_sync(0xffffffffu, lane, 1);
  }
}
TEST(lanes_must_meet_at_one_place) {
  std::vector<int> out(32);
  CHECK_FAILS("but lanes of it wait in", launch(differing_kernel, 1, 32, 0, nullptr, out.data()));
}

__global__ void not_in_mask_kernel() { __syncwarp(0xfffffffeu); }
TEST(a_lane_must_be_in_its_mask) { CHECK_FAILS("is not in the mask", launch(not_in_mask_kernel, 1, 32, 0, nullptr)); }

__global__ void atomics_kernel(int* i, unsigned* u, float* f, unsigned long long* l) {
  const int t = static_cast<int>(threadIdx.x);
  atomicAdd(i, t);
  atomicMax(i + 1, t);
  atomicMin(i + 2, -t);
  atomicExch(i + 3, 7);
  atomicCAS(i + 4, 0, t + 1);
  atomicSub(i + 5, t);
  atomicOr(u, 1u << t % 8);
  atomicAnd(u + 1, ~(1u << t % 8));
  atomicXor(u + 2, 1u << t % 8);
  atomicInc(u + 3, 9u);
  atomicAdd(f, 0.5f);
  atomicAdd_block(l, 1ull << 40);
}
TEST(atomics) {
  int i[6] = {};
  unsigned u[4] = {0, 0xffffu, 0, 0};
  float f = 0.0f;
  unsigned long long l = 0;
  launch(atomics_kernel, 1, 64, 0, nullptr, i, u, &f, &l);
  CHECK(i[0] == 2016 && i[1] == 63 && i[2] == -63 && i[3] == 7 && i[4] >= 1 && i[4] <= 64 && i[5] == -2016);
  CHECK(u[0] == 0xffu && u[1] == 0xff00u && u[2] == 0 && u[3] == 64 % 10);
  CHECK(f == 32.0f && l == 64ull << 40);
}

TEST(single_values) {
  CHECK(__brev(1u) == 0x80000000u && __popc(0xf0u) == 4 && __clz(1) == 31 && __clz(0) == 32 && __ffs(8) == 4);
  CHECK(__byte_perm(0x33221100u, 0x77665544u, 0x7450) == 0x77445500u);
  CHECK(__umulhi(0x80000000u, 6u) == 3);
  CHECK(max(1.0f, __uint_as_float(0x7fc00000u)) == 1.0f);
  CHECK(ptx::cvt_tf32(1.0f) == 0x3f800000u && ptx::cvt_tf32(__uint_as_float(0x3f801000u)) == 0x3f802000u);
  CHECK(ptx::cvt_tf32(__uint_as_float(0xbf801000u)) == 0xbf802000u &&
        ptx::cvt_tf32(__uint_as_float(0x3f800fffu)) == 0x3f800000u);
  CHECK(ptx::cvt_tf32(__uint_as_float(0x7f800000u)) == 0x7f800000u);
}

}  // namespace
