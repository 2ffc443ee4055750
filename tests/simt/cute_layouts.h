// SPDX-License-Identifier: BSD-3-Clause
// Layouts of fragments and swizzled tiles from CuTe, CUTLASS's layout algebra, evaluated on the host: an independent reference
// for the models. Only cute_layouts.cpp includes its headers.
#pragma once
#include <cuda.h>

#include <cstdint>

namespace cute_layouts {

struct Place {
  int row, column;
};

// mma.m16n8k16 with 16-bit factors (or m16n8k8 with tf32): element i of a lane's fragment. b is [n, k].
Place mma_a(int lane, int i, bool tf32);
Place mma_b(int lane, int i, bool tf32);
Place mma_d(int lane, int i, bool tf32);

// ldmatrix.x4 (.trans): element `half` of register `i` of a lane is in a row; returns the lane that gives the row's address,
// and the element's position in the row.
Place ldmatrix(int lane, int i, int half, bool transposed);

// wgmma m64nNk16 for N in 8, 64, 128, 192, 256: accumulator i of a thread.
Place wgmma_d(int n, int thread, int i);

// Byte offset of element (i, k) of a tile [rows, 64] whose rows run along K, and of a tile [128, 64] whose rows run along M or
// N, both with the 128B swizzle.
int k_major(int i, int k);
int mn_major(int i, int k);

// ---- encoders (cute_encoders.cpp) -----------------------------------------------------------------------------------------

// `count` matrices of 16-bit elements; strides in elements.
struct Matrices {
  const void* data;
  int rows, columns, count;
  int64_t stride, matrix_stride;
};
// The tensor map of boxes of 64 columns by box_rows rows, whose tile in shared memory is K-major if rows run along K.
CUtensorMap map_of(const Matrices& matrices, int box_rows, bool along_rows);

// Descriptors of the k-th 16 depths of a tile at address 0: a K-major tile of 64 rows by 64 depths, and an MN-major one of
// 128 by 64.
uint64_t k_major_descriptor(int k);
uint64_t mn_major_descriptor(int k);

}  // namespace cute_layouts
