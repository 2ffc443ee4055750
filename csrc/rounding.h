// SPDX-License-Identifier: BSD-3-Clause
// Single operations, each rounded to nearest even, which no compiler fuses. route uses them, so its results have the same bits
// on every backend. Host files that use this are compiled with -ffp-contract=off. The functions are `static`, since some files
// are compiled for a single ISA.
#pragma once

#if defined(__CUDACC__)
#define SWITCHGEAR_HOST_DEVICE __host__ __device__
#else
#define SWITCHGEAR_HOST_DEVICE
#endif
#if defined(__CUDA_ARCH__)
#define SWITCHGEAR_ROUNDED(device_operation, operation) device_operation
#else
#define SWITCHGEAR_ROUNDED(device_operation, operation) operation
#endif

namespace switchgear {

SWITCHGEAR_HOST_DEVICE static inline float multiply(float a, float b) {
  return SWITCHGEAR_ROUNDED(__fmul_rn(a, b), a * b);
}
SWITCHGEAR_HOST_DEVICE static inline double multiply(double a, double b) {
  return SWITCHGEAR_ROUNDED(__dmul_rn(a, b), a * b);
}
SWITCHGEAR_HOST_DEVICE static inline float add(float a, float b) { return SWITCHGEAR_ROUNDED(__fadd_rn(a, b), a + b); }
SWITCHGEAR_HOST_DEVICE static inline double add(double a, double b) {
  return SWITCHGEAR_ROUNDED(__dadd_rn(a, b), a + b);
}
SWITCHGEAR_HOST_DEVICE static inline float divide(float a, float b) {
  return SWITCHGEAR_ROUNDED(__fdiv_rn(a, b), a / b);
}
SWITCHGEAR_HOST_DEVICE static inline double divide(double a, double b) {
  return SWITCHGEAR_ROUNDED(__ddiv_rn(a, b), a / b);
}

}  // namespace switchgear
