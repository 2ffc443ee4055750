// SPDX-License-Identifier: BSD-3-Clause
// Compact weights: bfloat16 in 12 bits and float32 in 28, lossless, for grouped_gemm and whole layers on the CPU.
//
// Trained weights use few of the 256 exponents: the 16 most frequent of an expert get codes of 4 bits. A tensor [E,rows,cols]
// becomes a contiguous [E,rows,bytes] of uint8. A row is a header of 64 bytes or a multiple, then ⌈cols/128⌉ records of 192
// bytes for bfloat16, of 448 for float32:
//   header  byte i < 16: the exponent of code i, ascending, the same in all rows of an expert
//           bytes 16, 17: n, the number of elements with another exponent; byte 18: bytes of an element, 2 or 4; from byte 20
//           on n pairs of column and upper half of the element's bits (uint16 each), columns ascending
//   record  of 128 bfloat16, or of the upper halves of 128 float32, that of element i at position f(i):
//           byte 64·h + p(i): sign and fraction of element 64·h + i, with p(i) = i % 32 / 8 · 16 + i / 32 · 8 + i % 8
//           byte 128 + p(i): the codes of elements i (low bits) and 64 + i
//           float32: bytes 192 + 2·f(i), f(i) = i / 32 · 32 + i % 16 / 4 · 8 + i % 32 / 16 · 4 + i % 4: the lower half of element i
// If x is float32, rows of bfloat16 serve as well: those of float32 weights whose lower halves are all zero.
#pragma once
#include "switchgear/ops.h"

namespace switchgear {

inline constexpr int64_t kCompactRecord = 128, kCompactHeader = 64;  // elements, bytes
inline constexpr int64_t kCompactElementBytes = 18;                  // its offset in a header
inline constexpr int64_t kMaxCompactColumns = 32768;

// Bytes of a record of bfloat16 or float32.
constexpr int64_t compact_record_bytes(DType dtype) { return dtype == DType::kFloat32 ? 448 : 192; }

// Bytes of the records of a row.
constexpr int64_t compact_records_bytes(int64_t cols, DType dtype) {
  return (cols + kCompactRecord - 1) / kCompactRecord * compact_record_bytes(dtype);
}

// Bytes of a row whose header has space for `exceptions` elements with other exponents.
int64_t compact_row_bytes(int64_t cols, int64_t exceptions, DType dtype);

// Writes `weight` [E,rows,cols] bfloat16 or float32 as `compact` [E,rows,bytes] uint8, both contiguous. Returns the most
// exceptions in a row: `compact` is complete only if its headers have space for that many.
int64_t pack_compact(const TensorView& weight, const TensorView& compact, Execution exec = {});

// The inverse. Experts of `compact` may be any multiple of 64 bytes apart.
void expand_compact(const TensorView& compact, const TensorView& weight, Execution exec = {});

}  // namespace switchgear
