// SPDX-License-Identifier: BSD-3-Clause
// Whether a device runs the kernels of this build: a minimal kernel reports the architecture it was compiled for.
#pragma once

namespace switchgear::cuda {

struct Probe {
  int arch = 0;                 // __CUDA_ARCH__ of the code that ran, e.g. 900; 0 if none did
  const char* error = nullptr;  // CUDA's error message, or null
};

Probe probe(int device);  // preserves the calling thread's device

}  // namespace switchgear::cuda
