# SPDX-License-Identifier: BSD-3-Clause
"""LoRA on experts by kt-kernel's fine-tuning kernels (AMX, or AVX-512 with bfloat16), from the folder of competitors.

Its package needs another torch, but its extension takes plain pointers, so the extension is loaded alone. It adapts
gates and ups separately: both get A of gate_up_proj, and their gradients of A are added.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from switchgear.cli.machine import cpu

from .adapted_layers import SCALE, Adapted, AdaptedCase
from .case import Inputs
from .competitors import Skip, look_in_folder

ROWS = 32  # its buffers have a multiple of them


def kt_kernel(case: AdaptedCase) -> Adapted:
    """kt-kernel's bfloat16 kernels for fine-tuning."""
    if case.case.dtype != torch.bfloat16 or case.is_stored:
        raise Skip("measured on a bfloat16 base")
    extension = _extension()
    shape, adapters = case.case.shape, case.adapters
    gate_up, down = case.case.weights
    inner = shape.intermediate_size
    halves = gate_up[:, :inner].contiguous(), gate_up[:, inner:].contiguous()
    (a1, b1), (a2, b2) = adapters.gate_up, adapters.down
    tensors = {
        "gate_lora_a": a1, "gate_lora_b": b1[:, :inner].contiguous(), "up_lora_a": a1,
        "up_lora_b": b1[:, inner:].contiguous(), "down_lora_a": a2, "down_lora_b": b2,
    }  # fmt: skip
    order = torch.arange(shape.num_experts)
    infer = extension.CPUInfer(torch.get_num_threads())
    config = extension.moe.MOESFTConfig()
    config.expert_num, config.num_experts_per_tok = shape.num_experts, shape.top_k
    config.hidden_size, config.intermediate_size = shape.hidden_size, inner
    config.lora_rank, config.lora_alpha = a1.shape[1], SCALE * a1.shape[1]
    config.max_cache_depth, config.max_len = 1, -(-case.case.tokens // ROWS) * ROWS
    config.physical_to_logical_map, config.pool = order.data_ptr(), infer.backend_
    for name, tensor in (("gate_proj", halves[0]), ("up_proj", halves[1]), ("down_proj", down), *tensors.items()):
        setattr(config, name, tensor.data_ptr())
    layer = extension.moe.AMXBF16_SFT_MOE(config)
    infer.submit(layer.load_weights_task())
    infer.sync()

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, ids: Tensor, topk_weights: Tensor, *parameters: Tensor) -> Tensor:
            y = torch.empty_like(x)
            count = torch.tensor([len(x)], dtype=torch.int32)
            arrays: tuple[Any, ...] = (count, shape.top_k, ids, topk_weights, x, y)
            saves = any(ctx.needs_input_grad)
            infer.submit(layer.forward_sft_task(*(_pointer(array) for array in arrays), saves))
            infer.sync()
            return y

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
            grad_y = grad_outputs[0].contiguous()
            grad_x = torch.empty_like(grad_y)
            grad_weights = torch.empty(len(grad_y), shape.top_k)
            grads = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
            arrays: tuple[Any, ...] = (grad_y, grad_x, *grads.values(), grad_weights, 0, 0, 0)
            infer.submit(layer.backward_task(*(_pointer(array) for array in arrays)))
            infer.sync()
            grad_a = grads["gate_lora_a"] + grads["up_lora_a"]
            grad_b = torch.cat((grads["gate_lora_b"], grads["up_lora_b"]), 1)
            return grad_x, None, grad_weights, grad_a, grad_b, grads["down_lora_a"], grads["down_lora_b"]

    def run(inputs: Inputs) -> Tensor:
        y: Tensor = Layer.apply(inputs.x, inputs.topk_ids_int64, inputs.topk_weights, *adapters.parameters)  # type: ignore[no-untyped-call]
        return y

    keep = (halves, tensors, order)  # the extension has only their addresses
    return Adapted(
        run, adapters.parameters, lambda: [p.grad for p in adapters.parameters if keep and p.grad is not None]
    )


def _pointer(array: Tensor | int) -> int:
    return array if isinstance(array, int) else array.data_ptr()


def _extension() -> Any:
    look_in_folder()
    found = importlib.util.find_spec("kt_kernel")
    if found is None or found.origin is None:
        raise Skip("kt_kernel is not in the folder of competitors")
    features = cpu()["features"]
    variant = "amx" if "amx_bf16" in features else "avx512_bf16" if "avx512_bf16" in features else None
    files = sorted(Path(found.origin).parent.glob(f"_kt_kernel_ext_{variant}.*.so"))
    if not files:
        raise Skip("needs AMX, or AVX-512 with bfloat16")
    spec = importlib.util.spec_from_file_location("kt_kernel_ext", files[0])
    if spec is None or spec.loader is None:
        raise Skip(f"cannot load {files[0].name}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
