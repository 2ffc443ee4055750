// SPDX-License-Identifier: BSD-3-Clause
// glu: a = act(gate) ⊙ up for gated experts, act(h) for plain ones, elementwise over h [S,N]; glu_backward: grad_h from
// grad_a. ops.h has the formulas, activation.cuh the arithmetic.
//
//   h, grad_h [S,N]   a, grad_a [S,I]   N = 2I (gated) or I
//   about 20·S·I flop; traffic S·(N + I)·size bytes, backward S·(2N + I)·size; memory-bound
//
// A thread owns one vector of a. It reads the matching vectors of h: one of gates and one of ups; two adjacent ones if
// interleaved; one for plain experts. The activation is switched once per thread.
//
// Numeric contract: float32 inside, each element rounded once.
//
// Resources, at most (registers a thread; static shared memory; tests/test_cuda_build.py reads this):
//   glu_kernel: 48 registers
//   glu_backward_kernel: 48 registers
#pragma once
#include "activation.cuh"
#include "vector.cuh"

namespace switchgear::cuda {

template <typename T>
struct GluParams {
  const T* h;
  int64_t h_stride;
  const T* grad_a;        // backward
  T* out;                 // a, or grad_h
  int64_t a_stride;       // of a or grad_a
  int64_t grad_h_stride;  // backward
  int64_t num_rows, intermediate_size;
  GluOptions options;
  bool aligned;  // all vectors of h, a and their gradients
};

// Columns [column, column + count) of a in one row.
template <typename T>
struct GluVector {
  int64_t row, column;
  int count;
  bool whole;
};

// Loads the gates and ups of a vector. Plain experts leave `up` unchanged.
template <typename T>
__device__ inline void load_gates(float (&gate)[kVectorSize<T>], float (&up)[kVectorSize<T>], const GluParams<T>& p,
                                  const GluVector<T>& v) {
  constexpr int kVector = kVectorSize<T>;
  const T* const row = p.h + v.row * p.h_stride;
  if (p.options.gated && p.options.interleaved) {
    const T* const first = row + 2 * v.column;
    float low[kVector], high[kVector];
    unpack<T>(low, load_vector(first, 2 * v.count, v.whole));
    unpack<T>(high, load_vector(first + kVector, 2 * v.count - kVector, v.whole));
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      gate[i] = 2 * i < kVector ? low[2 * i % kVector] : high[2 * i % kVector];
      up[i] = 2 * i < kVector ? low[2 * i % kVector + 1] : high[2 * i % kVector + 1];
    }
    return;
  }
  unpack<T>(gate, load_vector(row + v.column, v.count, v.whole));
  if (p.options.gated) unpack<T>(up, load_vector(row + p.intermediate_size + v.column, v.count, v.whole));
}

// The inverse, for grad_h.
template <typename T>
__device__ inline void store_gates(const float (&gate)[kVectorSize<T>], const float (&up)[kVectorSize<T>],
                                   const GluParams<T>& p, const GluVector<T>& v) {
  constexpr int kVector = kVectorSize<T>;
  T* const row = p.out + v.row * p.grad_h_stride;
  if (p.options.gated && p.options.interleaved) {
    T* const first = row + 2 * v.column;
    float low[kVector], high[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      low[i] = i % 2 == 0 ? gate[i / 2] : up[i / 2];
      high[i] = i % 2 == 0 ? gate[(kVector + i) / 2] : up[(kVector + i) / 2];
    }
    store_vector(first, pack<T>(low), 2 * v.count, v.whole);
    store_vector(first + kVector, pack<T>(high), 2 * v.count - kVector, v.whole);
    return;
  }
  store_vector(row + v.column, pack<T>(gate), v.count, v.whole);
  if (p.options.gated) store_vector(row + p.intermediate_size + v.column, pack<T>(up), v.count, v.whole);
}

// Calls body(vector) for each vector of the thread.
template <typename T, typename Body>
__device__ inline void for_glu_vectors(const GluParams<T>& p, const Body& body) {
  constexpr int kVector = kVectorSize<T>;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= p.num_rows) return;
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.x * kVector;
  for (int64_t column = (static_cast<int64_t>(blockIdx.y) * blockDim.x + threadIdx.x) * kVector;
       column < p.intermediate_size; column += step) {
    const int count = static_cast<int>(p.intermediate_size - column < kVector ? p.intermediate_size - column : kVector);
    body(GluVector<T>{row, column, count, p.aligned && count == kVector});
  }
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads) glu_kernel(GluParams<T> p) {
  for_glu_vectors(p, [&](const GluVector<T>& v) {
    float gate[kVectorSize<T>], up[kVectorSize<T>] = {};
    load_gates(gate, up, p, v);
    with_activation(p.options.activation, [&]<Activation kActivation>() {
#pragma unroll
      for (int i = 0; i < kVectorSize<T>; ++i) gate[i] = gate_value<kActivation>(p.options, gate[i], up[i]);
    });
    store_vector(p.out + v.row * p.a_stride + v.column, pack<T>(gate), v.count, v.whole);
  });
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads) glu_backward_kernel(GluParams<T> p) {
  for_glu_vectors(p, [&](const GluVector<T>& v) {
    float gate[kVectorSize<T>], up[kVectorSize<T>] = {}, grad_a[kVectorSize<T>];
    load_gates(gate, up, p, v);
    unpack<T>(grad_a, load_vector(p.grad_a + v.row * p.a_stride + v.column, v.count, v.whole));
    with_activation(p.options.activation, [&]<Activation kActivation>() {
#pragma unroll
      for (int i = 0; i < kVectorSize<T>; ++i) {
        const GateGradient gradient = gate_gradient<kActivation>(p.options, gate[i], up[i]);
        gate[i] = grad_a[i] * gradient.per_gate;
        up[i] = grad_a[i] * gradient.per_up;
      }
    });
    store_gates(gate, up, p, v);
  });
}

}  // namespace switchgear::cuda
