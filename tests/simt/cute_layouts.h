// SPDX-License-Identifier: BSD-3-Clause
// Layouts of fragments and swizzled tiles from CuTe, CUTLASS's layout algebra, evaluated on the host: an independent reference
// for the models. Only cute_layouts.cpp includes its headers.
#pragma once

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

}  // namespace cute_layouts
