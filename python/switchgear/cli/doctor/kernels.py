# SPDX-License-Identifier: BSD-3-Clause
"""Runs a small layer on each backend, forward and backward, and compares it with float64 within derived bounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from switchgear import _C, cuda, functional, ops, testing
from switchgear.modules import MoE
from switchgear.ops import GluOptions
from switchgear.weights import store

from .settings import Finding

CASE = testing.Case("doctor", num_tokens=37, top_k=2, num_experts=8, hidden_size=72, intermediate_size=40)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEAST_SHARE = 0.7  # 0.85 to 1 on the processors measured (docs/performance.md)
OPTIONS = GluOptions()


def _check_layer(dtype: torch.dtype, device: str) -> None:
    """Raises AssertionError where a result is out of bounds."""
    layer = testing.make_layer(CASE, dtype)
    wanted, _ = testing.moe_forward(layer, OPTIONS)
    here = layer._replace(**{name: t.to(device) for name, t in layer._asdict().items() if t is not None})
    y, h = ops.moe_forward(*here.arguments(), *OPTIONS, True)
    testing.assert_close(y.cpu(), wanted, "y")
    grad_y = torch.randn_like(layer.x)
    gradients = testing.moe_backward(grad_y, h.cpu(), layer, OPTIONS)
    tensors = [t.detach().requires_grad_() for t in (here.x, here.gate_up_proj, here.down_proj, here.topk_weights)]
    x, gate_up_proj, down_proj, topk_weights = tensors
    y = functional.moe(x, gate_up_proj, down_proj, here.topk_ids, topk_weights)
    torch.autograd.backward(y, grad_y.to(device))
    wanted_of = (gradients[0], gradients[1], gradients[2], gradients[5])
    for name, tensor, bound in zip(("x", "gate_up_proj", "down_proj", "topk_weights"), tensors, wanted_of, strict=True):
        assert tensor.grad is not None
        testing.assert_close(tensor.grad.cpu(), bound, f"gradient of {name}")


def _describe_failure(check: Callable[..., None], *arguments: Any) -> str:
    """What went wrong, or nothing."""
    try:
        check(*arguments)
    except Exception as error:  # whatever a broken installation raises is the finding
        return f"{type(error).__name__}: {error}"
    return ""


def _compare(subject: str, device: str, text: str) -> Finding:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        failures = {
            str(dtype).removeprefix("torch."): _describe_failure(_check_layer, dtype, device) for dtype in DTYPES
        }
    wrong = [f"{name}: {failure}" for name, failure in failures.items() if failure]
    if wrong:
        return Finding(subject, "broken", "; ".join(wrong), "report it with the output of switchgear info --json")
    return Finding(subject, "ok", f"{text}: forward and backward agree with float64 in {', '.join(failures)}")


def check_cpu() -> Iterator[Finding]:
    """One finding per instruction set that runs here."""
    chosen, available = _C.cpu_isa(), _C.available_cpu_isas()
    try:
        for isa in available:
            ops.set_cpu_isa(isa)
            yield _compare(f"CPU, {isa}", "cpu", "in use" if isa == chosen else "available")
    finally:
        ops.set_cpu_isa(chosen)
    if chosen != available[-1]:
        remedy = "unset SWITCHGEAR_CPU_ISA, or call switchgear.set_cpu_isa"
        yield Finding("instruction set", "slow", f"{chosen} is in use, {available[-1]} runs here", remedy)
    missing = [isa for isa in ("avx2", "avx512", "avx512bf16", "amx") if isa not in _C.build_info()["isas"]]
    if missing and "avx2" in available:
        yield Finding("instruction set", "slow", f"built without {', '.join(missing)}", "build with a newer compiler")


def check_cuda() -> Iterator[Finding]:
    """One finding per device, or why there is none."""
    try:
        cuda.require()
    except RuntimeError as error:
        yield Finding("CUDA", "absent", str(error).removeprefix("switchgear: "))
        return
    for index in range(torch.cuda.device_count()):
        reason = cuda.reason_against(index)
        name = torch.cuda.get_device_name(index)
        if reason is None:
            yield _compare(f"CUDA, {index}", f"cuda:{index}", name)
        else:
            yield Finding(f"CUDA, {index}", "slow", f"ops run on the reference: {reason}")


def check_speed() -> Finding:
    """Times decoding of a token with weights from memory, in turns with a plain read of as many bytes."""
    num_experts, top_k, width = 64, 8, 1024
    moe = MoE(width, width, num_experts, top_k, dtype=torch.bfloat16).eval().requires_grad_(False)
    store(moe, "plain")
    weights = [parameter.detach() for parameter in moe.experts.parameters()]
    groups = torch.arange(num_experts, dtype=torch.int32).view(-1, 1, top_k)  # a round uses each expert once
    topk_weights = torch.full((1, top_k), 1 / top_k)
    x = torch.randn(1, width, dtype=torch.bfloat16)
    reads, layers, nbytes = [], [], 0
    for turn in range(0, 80, 2):
        to_read, to_run = groups[turn % len(groups)], groups[(turn + 1) % len(groups)]
        parts = [weight[expert] for expert in to_read[0].tolist() for weight in weights]
        nbytes = sum(part.nbytes for part in parts)
        begin = time.perf_counter()
        _C.read(parts, torch.get_num_threads())
        middle = time.perf_counter()
        functional.moe(x, weights[0], weights[1], to_run, topk_weights)
        reads.append(middle - begin)
        layers.append(time.perf_counter() - middle)
    read, layer = statistics.median(reads), statistics.median(layers)
    text = (
        f"decoding a token takes {layer * 1e3:.2f} ms for {nbytes / 1e6:.0f} MB of weights, at {read / layer:.0%} of "
        f"the rate of a plain read ({nbytes / read / 1e9:.0f} GB/s)"
    )
    if read / layer < LEAST_SHARE:
        return Finding("speed", "slow", text, "follow the remedies above, and stop other programs")
    return Finding("speed", "ok", text)
