# SPDX-License-Identifier: BSD-3-Clause
"""The torch ops of switchgear: schema, fake implementation, and the call of the native module or of the reference.

Only this package calls the ops of `_C` and `_cuda`. It is private: ops have no autograd formula, so use the public
functions of functional/. Shapes and formats are those of include/switchgear/ops.h.

An op is a schema, a function that allocates its outputs, and one that says what the native module gets. It runs on `_C`
for tensors on the CPU, on `_cuda` for those on a CUDA device.

native.py        the native modules
registration.py  how an op is defined
routing.py       the choice of experts: gate, route and the ops of routing policies
stages.py        the stages of a layer: plan, permute, grouped_gemm, glu, combine
attention.py     attention over a cache, which only the CPU has kernels for
layer.py         the whole layer in one op: moe_forward, moe_accumulate, moe_backward
"""

from switchgear.ops.attention import *  # noqa: F403
from switchgear.ops.layer import *  # noqa: F403
from switchgear.ops.native import *  # noqa: F403
from switchgear.ops.routing import *  # noqa: F403
from switchgear.ops.stages import *  # noqa: F403
