// SPDX-License-Identifier: BSD-3-Clause
// Which kernels products run on: those of the device's generation, or those of sm_80, which every device runs. The switch is
// for comparisons, and for a device on which the newer kernels fail.
#pragma once

namespace switchgear::cuda {

// "auto" or "sm_80": SWITCHGEAR_CUDA_KERNELS, read at first use, until set_cuda_kernels (switchgear/backend.h) changes it.
bool only_sm80();

}  // namespace switchgear::cuda
