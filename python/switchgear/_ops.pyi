# SPDX-License-Identifier: BSD-3-Clause
"""The ops that `_C` and `_cuda` have in common; not a module itself.

Each takes (inputs, options, outputs, execution): tuples whose items csrc/bindings.cpp names, and a number of threads
for `_C` (0: the OpenMP default) or an Execution for `_cuda`. Arrays are passed through DLPack; an op writes its results
to the outputs. A weight is two inputs, its tensors and its form (reference/formats.py). The ops of a whole layer take a
Layer (reference/layer.py) in place of options. Shapes and formats are those of include/switchgear/ops.h. Every op
raises ValueError or TypeError, naming the argument, before it writes anything.
"""

from typing import Any, Protocol

class _Array(Protocol):
    def __dlpack__(self) -> Any: ...

class _Op(Protocol):
    def __call__(
        self, inputs: tuple[Any, ...], options: tuple[Any, ...], outputs: tuple[Any, ...], execution: Any, /
    ) -> None: ...

route: _Op
route_backward: _Op
gate: _Op
gate_route: _Op
route_dynamic: _Op
column_topk: _Op
fit_capacity: _Op
assign_balanced: _Op
assign_capped: _Op
plan: _Op
permute: _Op
combine: _Op
combine_weight_backward: _Op
grouped_gemm: _Op
grouped_gemm_wgrad: _Op
glu: _Op
glu_backward: _Op
moe_forward: _Op
moe_accumulate: _Op
moe_backward: _Op
