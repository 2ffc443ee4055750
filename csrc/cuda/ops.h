// SPDX-License-Identifier: BSD-3-Clause
// The ops of the CUDA backend: the functions of its table. csrc/ops.cpp has checked the arguments, but not the values in
// device memory: kernels treat an id outside [0,E) as an empty slot and skip a slot whose indices are out of range. The
// tensors' device is current. An op allocates all of its temporary memory in one call, queues its kernels on exec.stream
// and returns.
#pragma once
#include "switchgear/ops.h"

namespace switchgear::cuda {

#define SWITCHGEAR_DECLARATION(op, Args, tensor) void op(const Args& args, Execution exec);
SWITCHGEAR_OPS(SWITCHGEAR_DECLARATION)
#undef SWITCHGEAR_DECLARATION

}  // namespace switchgear::cuda
