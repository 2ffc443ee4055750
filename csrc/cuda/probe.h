// SPDX-License-Identifier: BSD-3-Clause
// Whether a device runs the kernels of this build: the smallest possible one says for which architecture it was compiled.
#pragma once

namespace switchgear::cuda {

struct Probe {
  int arch = 0;                 // __CUDA_ARCH__ of the code that ran, e.g. 900; 0 where none did
  const char* error = nullptr;  // CUDA's word for what went wrong, null where nothing did
};

Probe probe(int device);  // leaves the calling thread's device as it was

}  // namespace switchgear::cuda
