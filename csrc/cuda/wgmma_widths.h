// SPDX-License-Identifier: BSD-3-Clause
// The accumulators of wgmma by its width n: n / 2 registers, as the text of the instruction and as asm operands. Used only by
// hopper.cuh.
#pragma once

// WGMMA_WIDTHS(X): X(n, number of the first operand after the accumulators, and of the seven after it)
#define WGMMA_WIDTHS(X)                                                  \
  X(8, "%4", "%5", "%6", "%7", "%8", "%9", "%10", "%11")                 \
  X(16, "%8", "%9", "%10", "%11", "%12", "%13", "%14", "%15")            \
  X(24, "%12", "%13", "%14", "%15", "%16", "%17", "%18", "%19")          \
  X(32, "%16", "%17", "%18", "%19", "%20", "%21", "%22", "%23")          \
  X(40, "%20", "%21", "%22", "%23", "%24", "%25", "%26", "%27")          \
  X(48, "%24", "%25", "%26", "%27", "%28", "%29", "%30", "%31")          \
  X(56, "%28", "%29", "%30", "%31", "%32", "%33", "%34", "%35")          \
  X(64, "%32", "%33", "%34", "%35", "%36", "%37", "%38", "%39")          \
  X(72, "%36", "%37", "%38", "%39", "%40", "%41", "%42", "%43")          \
  X(80, "%40", "%41", "%42", "%43", "%44", "%45", "%46", "%47")          \
  X(88, "%44", "%45", "%46", "%47", "%48", "%49", "%50", "%51")          \
  X(96, "%48", "%49", "%50", "%51", "%52", "%53", "%54", "%55")          \
  X(104, "%52", "%53", "%54", "%55", "%56", "%57", "%58", "%59")         \
  X(112, "%56", "%57", "%58", "%59", "%60", "%61", "%62", "%63")         \
  X(120, "%60", "%61", "%62", "%63", "%64", "%65", "%66", "%67")         \
  X(128, "%64", "%65", "%66", "%67", "%68", "%69", "%70", "%71")         \
  X(136, "%68", "%69", "%70", "%71", "%72", "%73", "%74", "%75")         \
  X(144, "%72", "%73", "%74", "%75", "%76", "%77", "%78", "%79")         \
  X(152, "%76", "%77", "%78", "%79", "%80", "%81", "%82", "%83")         \
  X(160, "%80", "%81", "%82", "%83", "%84", "%85", "%86", "%87")         \
  X(168, "%84", "%85", "%86", "%87", "%88", "%89", "%90", "%91")         \
  X(176, "%88", "%89", "%90", "%91", "%92", "%93", "%94", "%95")         \
  X(184, "%92", "%93", "%94", "%95", "%96", "%97", "%98", "%99")         \
  X(192, "%96", "%97", "%98", "%99", "%100", "%101", "%102", "%103")     \
  X(200, "%100", "%101", "%102", "%103", "%104", "%105", "%106", "%107") \
  X(208, "%104", "%105", "%106", "%107", "%108", "%109", "%110", "%111") \
  X(216, "%108", "%109", "%110", "%111", "%112", "%113", "%114", "%115") \
  X(224, "%112", "%113", "%114", "%115", "%116", "%117", "%118", "%119") \
  X(232, "%116", "%117", "%118", "%119", "%120", "%121", "%122", "%123") \
  X(240, "%120", "%121", "%122", "%123", "%124", "%125", "%126", "%127") \
  X(248, "%124", "%125", "%126", "%127", "%128", "%129", "%130", "%131") \
  X(256, "%128", "%129", "%130", "%131", "%132", "%133", "%134", "%135")

#define WGMMA_TEXT_8 "%0, %1, %2, %3"
#define WGMMA_TEXT_16 WGMMA_TEXT_8 ", %4, %5, %6, %7"
#define WGMMA_TEXT_24 WGMMA_TEXT_16 ", %8, %9, %10, %11"
#define WGMMA_TEXT_32 WGMMA_TEXT_24 ", %12, %13, %14, %15"
#define WGMMA_TEXT_40 WGMMA_TEXT_32 ", %16, %17, %18, %19"
#define WGMMA_TEXT_48 WGMMA_TEXT_40 ", %20, %21, %22, %23"
#define WGMMA_TEXT_56 WGMMA_TEXT_48 ", %24, %25, %26, %27"
#define WGMMA_TEXT_64 WGMMA_TEXT_56 ", %28, %29, %30, %31"
#define WGMMA_TEXT_72 WGMMA_TEXT_64 ", %32, %33, %34, %35"
#define WGMMA_TEXT_80 WGMMA_TEXT_72 ", %36, %37, %38, %39"
#define WGMMA_TEXT_88 WGMMA_TEXT_80 ", %40, %41, %42, %43"
#define WGMMA_TEXT_96 WGMMA_TEXT_88 ", %44, %45, %46, %47"
#define WGMMA_TEXT_104 WGMMA_TEXT_96 ", %48, %49, %50, %51"
#define WGMMA_TEXT_112 WGMMA_TEXT_104 ", %52, %53, %54, %55"
#define WGMMA_TEXT_120 WGMMA_TEXT_112 ", %56, %57, %58, %59"
#define WGMMA_TEXT_128 WGMMA_TEXT_120 ", %60, %61, %62, %63"
#define WGMMA_TEXT_136 WGMMA_TEXT_128 ", %64, %65, %66, %67"
#define WGMMA_TEXT_144 WGMMA_TEXT_136 ", %68, %69, %70, %71"
#define WGMMA_TEXT_152 WGMMA_TEXT_144 ", %72, %73, %74, %75"
#define WGMMA_TEXT_160 WGMMA_TEXT_152 ", %76, %77, %78, %79"
#define WGMMA_TEXT_168 WGMMA_TEXT_160 ", %80, %81, %82, %83"
#define WGMMA_TEXT_176 WGMMA_TEXT_168 ", %84, %85, %86, %87"
#define WGMMA_TEXT_184 WGMMA_TEXT_176 ", %88, %89, %90, %91"
#define WGMMA_TEXT_192 WGMMA_TEXT_184 ", %92, %93, %94, %95"
#define WGMMA_TEXT_200 WGMMA_TEXT_192 ", %96, %97, %98, %99"
#define WGMMA_TEXT_208 WGMMA_TEXT_200 ", %100, %101, %102, %103"
#define WGMMA_TEXT_216 WGMMA_TEXT_208 ", %104, %105, %106, %107"
#define WGMMA_TEXT_224 WGMMA_TEXT_216 ", %108, %109, %110, %111"
#define WGMMA_TEXT_232 WGMMA_TEXT_224 ", %112, %113, %114, %115"
#define WGMMA_TEXT_240 WGMMA_TEXT_232 ", %116, %117, %118, %119"
#define WGMMA_TEXT_248 WGMMA_TEXT_240 ", %120, %121, %122, %123"
#define WGMMA_TEXT_256 WGMMA_TEXT_248 ", %124, %125, %126, %127"

#define WGMMA_REGISTERS_8 WGMMA_FOUR(0)
#define WGMMA_REGISTERS_16 WGMMA_REGISTERS_8, WGMMA_FOUR(4)
#define WGMMA_REGISTERS_24 WGMMA_REGISTERS_16, WGMMA_FOUR(8)
#define WGMMA_REGISTERS_32 WGMMA_REGISTERS_24, WGMMA_FOUR(12)
#define WGMMA_REGISTERS_40 WGMMA_REGISTERS_32, WGMMA_FOUR(16)
#define WGMMA_REGISTERS_48 WGMMA_REGISTERS_40, WGMMA_FOUR(20)
#define WGMMA_REGISTERS_56 WGMMA_REGISTERS_48, WGMMA_FOUR(24)
#define WGMMA_REGISTERS_64 WGMMA_REGISTERS_56, WGMMA_FOUR(28)
#define WGMMA_REGISTERS_72 WGMMA_REGISTERS_64, WGMMA_FOUR(32)
#define WGMMA_REGISTERS_80 WGMMA_REGISTERS_72, WGMMA_FOUR(36)
#define WGMMA_REGISTERS_88 WGMMA_REGISTERS_80, WGMMA_FOUR(40)
#define WGMMA_REGISTERS_96 WGMMA_REGISTERS_88, WGMMA_FOUR(44)
#define WGMMA_REGISTERS_104 WGMMA_REGISTERS_96, WGMMA_FOUR(48)
#define WGMMA_REGISTERS_112 WGMMA_REGISTERS_104, WGMMA_FOUR(52)
#define WGMMA_REGISTERS_120 WGMMA_REGISTERS_112, WGMMA_FOUR(56)
#define WGMMA_REGISTERS_128 WGMMA_REGISTERS_120, WGMMA_FOUR(60)
#define WGMMA_REGISTERS_136 WGMMA_REGISTERS_128, WGMMA_FOUR(64)
#define WGMMA_REGISTERS_144 WGMMA_REGISTERS_136, WGMMA_FOUR(68)
#define WGMMA_REGISTERS_152 WGMMA_REGISTERS_144, WGMMA_FOUR(72)
#define WGMMA_REGISTERS_160 WGMMA_REGISTERS_152, WGMMA_FOUR(76)
#define WGMMA_REGISTERS_168 WGMMA_REGISTERS_160, WGMMA_FOUR(80)
#define WGMMA_REGISTERS_176 WGMMA_REGISTERS_168, WGMMA_FOUR(84)
#define WGMMA_REGISTERS_184 WGMMA_REGISTERS_176, WGMMA_FOUR(88)
#define WGMMA_REGISTERS_192 WGMMA_REGISTERS_184, WGMMA_FOUR(92)
#define WGMMA_REGISTERS_200 WGMMA_REGISTERS_192, WGMMA_FOUR(96)
#define WGMMA_REGISTERS_208 WGMMA_REGISTERS_200, WGMMA_FOUR(100)
#define WGMMA_REGISTERS_216 WGMMA_REGISTERS_208, WGMMA_FOUR(104)
#define WGMMA_REGISTERS_224 WGMMA_REGISTERS_216, WGMMA_FOUR(108)
#define WGMMA_REGISTERS_232 WGMMA_REGISTERS_224, WGMMA_FOUR(112)
#define WGMMA_REGISTERS_240 WGMMA_REGISTERS_232, WGMMA_FOUR(116)
#define WGMMA_REGISTERS_248 WGMMA_REGISTERS_240, WGMMA_FOUR(120)
#define WGMMA_REGISTERS_256 WGMMA_REGISTERS_248, WGMMA_FOUR(124)

#define WGMMA_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
