// SPDX-License-Identifier: BSD-3-Clause
// Instructions by themselves: results that the kernels' tests would not tell apart, and what must be an error.
#include <bit>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "execute.h"
#include "expect.h"

namespace {

using namespace simt;

// A kernel that reads three 64-bit words to %rd1 to %rd3, their low halves to %r1 to %r3 and %f1 to %f3, and stores %rd10.
std::string kernel_text(const std::string& body) {
  return R"(.version 9.0
.target sm_90a
.address_size 64
.file 1 "/somewhere/kernel.cuh"
.extern .shared .align 16 .b8 dynamic[];
.visible .entry test_kernel(.param .u64 test_kernel_param_0)
.maxntid 32, 1, 1
.minnctapersm 1
{
  .reg .pred %p<20>;
  .reg .b16 %rs<20>;
  .reg .b32 %r<20>;
  .reg .b32 %f<20>;
  .reg .b64 %rd<20>;
  .shared .align 8 .b8 fixed[16];
  ld.param.u64 %rd0, [test_kernel_param_0];
  ld.global.u64 %rd1, [%rd0];
  ld.global.u64 %rd2, [%rd0+8];
  ld.global.u64 %rd3, [%rd0+16];
  cvt.u32.u64 %r1, %rd1;
  cvt.u32.u64 %r2, %rd2;
  cvt.u32.u64 %r3, %rd3;
  mov.b32 %f1, %r1;
  mov.b32 %f2, %r2;
  mov.b32 %f3, %r3;
  .loc 1 77 5
)" + body +
         R"(
  st.global.u64 [%rd0+24], %rd10;
  ret;
}
)";
}

uint64_t result_of(const std::string& body, uint64_t a = 0, uint64_t b = 0, uint64_t c = 0, unsigned threads = 1) {
  ptx::Module module(kernel_text(body));
  const auto code = ptx::decode(module.kernel("test_kernel"));
  alignas(16) uint64_t memory[4] = {a, b, c, 0};
  void* start = memory;
  void* const arguments[] = {&start};
  run({{1, threads, 64, ptx::bind(*code, arguments)}});
  return memory[3];
}

std::string words(const std::string& instruction) { return instruction + "\ncvt.u64.u32 %rd10, %r10;"; }
std::string floats(const std::string& instruction) {
  return instruction + "\nmov.b32 %r10, %f10;\ncvt.u64.u32 %rd10, %r10;";
}
std::string predicate(const std::string& instruction) { return instruction + "\nselp.b64 %rd10, 1, 0, %p10;"; }
uint64_t bits(float value) { return std::bit_cast<uint32_t>(value); }

struct Case {
  std::string body;
  uint64_t a, b, c, expected;
};

TEST(integer_instructions) {
  const uint64_t minus = ~uint64_t{0};
  const std::vector<Case> cases = {
      {words("bfe.u32 %r10, %r1, %r2, %r3;"), 0xabcd1234, 8, 12, 0xd12},
      {words("bfe.s32 %r10, %r1, %r2, %r3;"), 0xabcd1234, 8, 12, 0xfffffd12},
      {words("bfe.u32 %r10, %r1, 28, 8;"), 0xabcd1234, 0, 0, 0xa},
      {words("bfe.s32 %r10, %r1, 28, 8;"), 0xabcd1234, 0, 0, 0xfffffffa},
      {words("bfi.b32 %r10, %r1, %r2, 4, 8;"), 0xfff, 0x12345678, 0, 0x12345ff8},
      {words("prmt.b32 %r10, %r1, %r2, 0x7531;"), 0x33221100, 0x77665544, 0, 0x77553311},
      {words("prmt.b32 %r10, %r1, %r2, 0xb8;"), 0x80ff, 0, 0, 0xffff00ff},
      {words("shf.l.wrap.b32 %r10, %r1, %r2, %r3;"), 0x80000000, 0x1, 4, 0x18},
      {words("shf.r.wrap.b32 %r10, %r1, %r2, %r3;"), 0x80000000, 0x1, 4, 0x18000000},
      {words("lop3.b32 %r10, %r1, %r2, %r3, 0xca;"), 0xf0f0f0f0, 0x12345678, 0xabcdef01, 0x1b3d5f71},
      {words("mul.hi.s32 %r10, %r1, %r2;"), minus, 3, 0, 0xffffffff},
      {words("mul.hi.u32 %r10, %r1, %r2;"), minus, 3, 0, 2},
      {"mul.wide.s32 %rd10, %r1, %r2;", minus, 3, 0, static_cast<uint64_t>(-3)},
      {"mul.wide.u32 %rd10, %r1, %r2;", minus, 3, 0, 0x2fffffffd},
      {"mad.wide.s32 %rd10, %r1, %r2, %rd3;", minus, 3, 5, 2},
      {"mul.hi.u64 %rd10, %rd1, %rd2;", minus, minus, 0, minus - 1},
      {words("div.s32 %r10, %r1, %r2;"), 0x80000000, minus, 0, 0x80000000},
      {"div.s64 %rd10, %rd1, %rd2;", minus - 6, 2, 0, minus - 2},
      {"div.u64 %rd10, %rd1, %rd2;", minus - 6, 2, 0, (minus - 6) / 2},
      {"rem.s64 %rd10, %rd1, %rd2;", minus - 6, 2, 0, minus},
      {"rem.u64 %rd10, %rd1, %rd2;", minus - 6, 10, 0, (minus - 6) % 10},
      {words("rem.u32 %r10, %r1, %r2;"), 0xfffffff9, 10, 0, 0xfffffff9 % 10},
      {words("div.u32 %r10, %r1, %r2;"), 0xfffffff9, 10, 0, 0xfffffff9 / 10},
      {words("ld.v4.u32 {%r4, %r5, %r6, %r7}, [%rd0];\nsub.s32 %r8, %r7, %r5;\nadd.s32 %r10, %r8, %r6;"), 0x2'00000001,
       0x7'00000003, 0, 8},
      {words("rem.s32 %r10, %r1, %r2;"), static_cast<uint32_t>(-7), 3, 0, static_cast<uint32_t>(-1)},
      {words("shr.s32 %r10, %r1, %r2;"), 0x80000000, 40, 0, 0xffffffff},
      {words("shr.u32 %r10, %r1, %r2;"), 0x80000000, 32, 0, 0},
      {words("shl.b32 %r10, %r1, %r2;"), 3, 32, 0, 0},
      {words("clz.b32 %r10, %r1;"), 0x00ffffff, 0, 0, 8},
      {words("bfind.u32 %r10, %r1;"), 0x00ffffff, 0, 0, 23},
      {words("bfind.shiftamt.u32 %r10, %r1;"), 0x00ffffff, 0, 0, 8},
      {words("brev.b32 %r10, %r1;"), 0x00000003, 0, 0, 0xc0000000},
      {words("min.s32 %r10, %r1, %r2;"), minus, 3, 0, 0xffffffff},
      {words("min.u32 %r10, %r1, %r2;"), minus, 3, 0, 3},
      {words("abs.s32 %r10, %r1;"), minus - 4, 0, 0, 5},
      {words("cvt.s32.s8 %r10, %r1;"), 0x80, 0, 0, 0xffffff80},
      {words("cvt.u32.u16 %r10, %r1;"), 0xffff8000, 0, 0, 0x8000},
      {words("cvt.sat.u8.s32 %r10, %r1;"), 300, 0, 0, 255},
      {"cvt.s64.s32 %rd10, %r1;", 0xfffffffe, 0, 0, minus - 1},
      {"mov.b64 {%r4, %r5}, %rd1;\nmov.b64 %rd10, {%r5, %r4};", 0x1122334455667788, 0, 0, 0x5566778811223344},
      {words("mov.b32 {%rs1, %rs2}, %r1;\nmov.b32 %r10, {%rs2, %rs1};"), 0x11223344, 0, 0, 0x33441122},
  };
  for (const Case& c : cases) CHECK(result_of(c.body, c.a, c.b, c.c) == c.expected, c.body);
}

TEST(float_instructions) {
  const float nan = std::bit_cast<float>(0x7fc00000u);
  const std::vector<Case> cases = {
      {floats("fma.rn.f32 %f10, %f1, %f2, %f3;"), bits(1.0f + 0x1p-12f), bits(1.0f - 0x1p-12f), bits(-1.0f),
       bits(-0x1p-24f)},
      {floats("fma.rm.f32 %f10, %f1, %f2, %f3;"), bits(1.0f), bits(-0x1p-40f), bits(1.0f), bits(1.0f - 0x1p-24f)},
      {floats("add.f32 %f10, %f1, %f2;"), bits(1.0f), bits(0x1p-25f), 0, bits(1.0f)},
      {floats("max.f32 %f10, %f1, %f2;"), bits(nan), bits(-3.0f), 0, bits(-3.0f)},
      {floats("min.f32 %f10, %f1, %f2;"), bits(0.0f), bits(-0.0f), 0, bits(-0.0f)},
      {floats("copysign.f32 %f10, %f1, %f2;"), bits(-0.0f), bits(2.0f), 0, bits(-2.0f)},
      {floats("ex2.approx.ftz.f32 %f10, %f1;"), bits(-130.0f), 0, 0, bits(0.0f)},
      {floats("rcp.approx.ftz.f32 %f10, %f1;"), bits(1e-40f), 0, 0, bits(HUGE_VALF)},
      {floats("cvt.sat.f32.f32 %f10, %f1;"), bits(nan), 0, 0, bits(0.0f)},
      {words("cvt.rzi.s32.f32 %r10, %f1;"), bits(-2.75f), 0, 0, static_cast<uint32_t>(-2)},
      {words("cvt.rzi.s32.f32 %r10, %f1;"), bits(1e20f), 0, 0, 0x7fffffff},
      {words("cvt.rna.tf32.f32 %r10, %f1;"), bits(1.0f + 0x1p-11f), 0, 0, bits(1.0f + 0x1p-10f)},
      {words("cvt.rn.bf16x2.f32 %r10, %f1, %f2;"), bits(1.0f), bits(-2.0f), 0, 0x3f80c000},
      {words("cvt.rn.f16x2.f32 %r10, %f1, %f2;"), bits(1.0f), bits(-2.0f), 0, 0x3c00c000},
      {predicate("setp.lt.f32 %p10, %f1, %f2;"), bits(nan), bits(1.0f), 0, 0},
      {predicate("setp.ltu.f32 %p10, %f1, %f2;"), bits(nan), bits(1.0f), 0, 1},
      {predicate("setp.ne.f32 %p10, %f1, %f2;"), bits(nan), bits(1.0f), 0, 0},
      {predicate("setp.neu.f32 %p10, %f1, %f2;"), bits(nan), bits(1.0f), 0, 1},
      {predicate("setp.lt.s32 %p10, %r1, %r2;"), 0xffffffff, 1, 0, 1},
      {predicate("setp.lt.u32 %p10, %r1, %r2;"), 0xffffffff, 1, 0, 0},
  };
  for (const Case& c : cases) CHECK(result_of(c.body, c.a, c.b, c.c) == c.expected, c.body);
}

// Two 16-bit floats in a register, rounded once.
TEST(half_instructions) {
  const std::vector<Case> cases = {
      {words("fma.rn.f16x2 %r10, %r1, %r2, %r3;"), 0x3c01'c000, 0x3bff'4200, 0xbc00'3c00, 0x0ffe'c500},
      {words("fma.rn.bf16x2 %r10, %r1, %r2, %r3;"), 0x3f81'4000, 0x3f80'4040, 0x3380'bf80, 0x3f81'40a0},
      {words("add.f16x2 %r10, %r1, %r2;"), 0x7bff'3c00, 0x7bff'3c00, 0, 0x7c00'4000},
      {words("mov.b32 {%rs1, %rs2}, %r1;\nsub.bf16 %rs3, %rs1, %rs2;\nmov.b32 %r10, {%rs3, %rs3};"), 0x3f80'4000, 0, 0,
       0x3f80'3f80},
      {words("neg.bf16x2 %r10, %r1;"), 0x3f80'8000, 0, 0, 0xbf80'0000},
  };
  for (const Case& c : cases) CHECK(result_of(c.body, c.a, c.b, c.c) == c.expected, c.body);
}

TEST(branches_and_guards) {
  const std::string loop = R"(
  mov.b64 %rd10, 0;
  mov.b32 %r4, 0;
  again:
  add.s64 %rd10, %rd10, 3;
  add.s32 %r4, %r4, 1;
  setp.lt.u32 %p1, %r4, %r1;
  @%p1 bra again;
  @!%p1 add.s64 %rd10, %rd10, 100;
  @%p1 add.s64 %rd10, %rd10, 1000;
)";
  CHECK(result_of(loop, 7) == 121);
  // Labels and registers of a pair of braces hide those outside.
  const std::string nested =
      "mov.b32 %r4, 1;\n{ .reg .b32 x; mov.b32 x, 5; { .reg .b32 x; mov.b32 x, 9; } add.s32 %r10, x, %r4; }";
  CHECK(result_of(words(nested)) == 6);
}

TEST(shared_and_generic_addresses) {
  const std::string text = R"(
  mov.u32 %r4, dynamic;
  st.shared.u32 [%r4+8], %r1;
  st.shared.u32 [fixed+4], %r2;
  mov.u32 %r5, fixed;
  cvt.u64.u32 %rd4, %r5;
  cvta.shared.u64 %rd5, %rd4;
  ld.u32 %r6, [%rd5+4];
  cvta.to.shared.u64 %rd6, %rd5;
  cvt.u32.u64 %r7, %rd6;
  ld.shared.u32 %r8, [%r7+4];
  ld.shared.u32 %r9, [%r4+8];
  add.s32 %r10, %r6, %r8;
  add.s32 %r10, %r10, %r9;)";
  CHECK(result_of(words(text), 1000, 20) == 1040);
}

TEST(undefined_registers_may_be_moved_but_not_used) {
  CHECK(result_of(words("mov.b32 %r4, %r19;\nmov.b32 %r10, 5;")) == 5);
  CHECK_FAILS("register %r19 is read before it is written", result_of(words("add.s32 %r10, %r19, 1;")));
  CHECK_FAILS("register %r4 is read before it is written",
              result_of(words("mov.b32 %r4, %r19;\nadd.s32 %r10, %r4, 1;")));
  const std::string select = "setp.eq.s32 %p1, %r1, 0;\nselp.b32 %r4, %r1, %r19, %p1;\nadd.s32 %r10, %r4, 1;";
  CHECK(result_of(words(select), 0) == 1);
  CHECK_FAILS("register %r4 is read before it is written", result_of(words(select), 1));
  const std::string on_one_path = "setp.eq.s32 %p1, %r1, 0;\n@%p1 mov.b32 %r4, 7;\nadd.s32 %r10, %r4, 1;";
  CHECK(result_of(words(on_one_path), 0) == 8);
  CHECK_FAILS("register %r4 is read before it is written", result_of(words(on_one_path), 1));
  CHECK_FAILS("the guard is read before it is written",
              result_of(words("mov.b32 %r10, 1;\n@%p9 add.s32 %r10, %r10, 1;")));
}

TEST(sums_of_wgmma_are_read_if_it_adds_to_them) {
  const auto product = [](const std::string& adds) {
    return words(
        "mov.b64 %rd4, 0;\nsetp." + adds + ".u32 %p1, %r1, %r1;\n" +
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f5, %f6, %f7, %f8}, %rd4, %rd4, %p1, 1, 1, 0, 0;");
  };
  CHECK_FAILS("register %f5 is read before it is written", result_of(product("eq")));
  CHECK_FAILS("warpgroup", result_of(product("ne")));  // the next check
}

TEST(errors_name_the_place) {
  const auto contains = [](const std::string& body, const std::vector<std::string>& texts, unsigned threads = 1) {
    for (const std::string& text : texts) CHECK_FAILS(text, result_of(body, 0, 0, 0, threads));
  };
  contains(words("ld.shared.u32 %r10, [dynamic+64];"),
           {"block (0,0,0) thread (0,0,0)", "kernel.cuh:77", "test_kernel", "PTX line",
            "ld.shared.u32 %r10, [dynamic+64];", "not inside one array of the block"});
  contains(words("ld.shared.u32 %r10, [dynamic+2];"), {"misaligned address"});
  contains(words("ld.shared.u32 %r10, [fixed+16];"), {"not inside one array of the block"});
  contains(words("add.s32 %r4, %r1, 1;\ntrap;\nmov.b32 %r10, 0;"), {"trap"});
  contains("mov.u32 %r4, %tid.x;\nsetp.eq.s32 %p1, %r4, 0;\n@%p1 bra skip;\nbar.sync 0;\nskip:\nmov.b64 %rd10, 0;",
           {"__syncthreads"}, 32);
  contains(words("shfl.sync.idx.b32 %r10|%p1, %r1, 0, 31, 2;"), {"the calling lane is not in the mask"});
  CHECK_FAILS("an instruction that is not known: frobnicate.b32", result_of("frobnicate.b32 %r1, %r2;"));
}

}  // namespace
