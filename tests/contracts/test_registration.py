# SPDX-License-Identifier: BSD-3-Clause
"""Each torch op passes torch's own checker on random sizes, dtypes and layouts: schema, fake implementation (shapes,
dtypes, strides), autograd registration, and ahead-of-time dispatch with dynamic shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from native_calls import OPS, arguments, function_of, inputs_of, is_optional, options_of, sizes_of, spec_of
from problems import DTYPES, counts
from torch import Tensor

from switchgear import ops


def sample(op: str, seed: int) -> tuple[Any, ...]:
    """Arguments of the torch op: the native op's inputs, in random sizes and layouts, some optional ones absent."""
    rng = np.random.default_rng([13, seed])
    torch.manual_seed(seed)
    tokens, top_k, experts, hidden_size, intermediate_size = (
        int(n) for n in rng.integers([0, 1, 1, 1, 1], [7, 4, 6, 20, 20])
    )
    sizes = sizes_of(tokens, min(top_k, experts), experts, hidden_size, intermediate_size)
    args = arguments(op, sizes, DTYPES[seed % 3])
    for name in OPS[op].tensors:
        spec = spec_of(op, name)
        if spec.out:
            continue
        tensor: Tensor = args[name]
        if spec.layout == "matrices" and rng.integers(2):
            tensor = tensor.mT.contiguous().mT
        args[name] = None if is_optional(op, name) and rng.integers(3) == 0 and name != "token_indices" else tensor
    for name in OPS[op].weights:
        if not args[f"{name}_form"]:
            args[name] = [args[name]]
    tensors, options = inputs_of(op, args), options_of(op, args)
    match function_of(op):
        case "route" | "route_dynamic":
            return *tensors, sizes["K"], *options
        case "gate":
            return *tensors, bool(seed % 2)
        case "gate_route":
            return *tensors, bool(seed % 2), sizes["K"], *options
        case "plan":
            return *tensors, sizes["E"]
        case "grouped_gemm":
            x, weight, form, *rest = tensors
            return x, weight if form or seed % 2 else list(weight[0]), form, *rest, *options
        case "grouped_gemm_wgrad":
            *tensors, experts = tensors
            return *tensors, bool(seed % 2), experts
        case "moe_forward":
            return *tensors, *options, bool(seed % 2)
        case "moe_accumulate":
            return *tensors, *options, torch.randn(args["x"].shape)
        case "moe_backward":
            *tensors, experts = tensors
            needs = [bool(need) for need in rng.integers(0, 2, 6)]
            return *tensors, *options, needs, None, None, None, [], experts
        case _:
            return *tensors, *options


@pytest.mark.parametrize("op", OPS)
@counts(ci=2, full=20)
@pytest.mark.some(10)
def test_opcheck(op: str, count: int) -> None:
    for seed in range(count):
        torch.library.opcheck(getattr(ops, function_of(op)), sample(op, seed))
