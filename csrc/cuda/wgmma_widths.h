// SPDX-License-Identifier: BSD-3-Clause
// The accumulators of wgmma by its width n: n / 2 registers, as the text of the instruction and as asm operands. Used only by
// hopper.cuh. These are the widths of tiles_sm90.h; for a tile of another, multiple of 8, up to 256, add it to the three lists.
#pragma once

// WGMMA_WIDTHS(X): X(n, number of the first operand after the accumulators, and of the seven after it)
#define WGMMA_WIDTHS(X)                                              \
  X(16, "%8", "%9", "%10", "%11", "%12", "%13", "%14", "%15")        \
  X(64, "%32", "%33", "%34", "%35", "%36", "%37", "%38", "%39")      \
  X(128, "%64", "%65", "%66", "%67", "%68", "%69", "%70", "%71")     \
  X(192, "%96", "%97", "%98", "%99", "%100", "%101", "%102", "%103") \
  X(256, "%128", "%129", "%130", "%131", "%132", "%133", "%134", "%135")

#define WGMMA_TEXT_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_TEXT_64                                                              \
  WGMMA_TEXT_16                                                                    \
  ", %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23" \
  ", %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_TEXT_128                                                               \
  WGMMA_TEXT_64                                                                      \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_TEXT_192                                                               \
  WGMMA_TEXT_128                                                                     \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_TEXT_256                                                                           \
  WGMMA_TEXT_192                                                                                 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define WGMMA_REGISTERS_16 WGMMA_EIGHT(0)
#define WGMMA_REGISTERS_64 WGMMA_REGISTERS_16, WGMMA_EIGHT(8), WGMMA_EIGHT(16), WGMMA_EIGHT(24)
#define WGMMA_REGISTERS_128 WGMMA_REGISTERS_64, WGMMA_EIGHT(32), WGMMA_EIGHT(40), WGMMA_EIGHT(48), WGMMA_EIGHT(56)
#define WGMMA_REGISTERS_192 WGMMA_REGISTERS_128, WGMMA_EIGHT(64), WGMMA_EIGHT(72), WGMMA_EIGHT(80), WGMMA_EIGHT(88)
#define WGMMA_REGISTERS_256 WGMMA_REGISTERS_192, WGMMA_EIGHT(96), WGMMA_EIGHT(104), WGMMA_EIGHT(112), WGMMA_EIGHT(120)

#define WGMMA_EIGHT(i) WGMMA_FOUR(i), WGMMA_FOUR(i + 4)
#define WGMMA_FOUR(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
