# SPDX-License-Identifier: BSD-3-Clause
"""Valid calls of the public functions and modules, drawn at random, small enough for a fraction of a millisecond."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import switchgear
from switchgear.testing import Case, make_layer

FLOATS = (torch.float32, torch.float32, torch.bfloat16, torch.float16)
GLU = {"activation": "silu", "gated": True, "interleaved": False, "alpha": 1.702, "limit": None}
FORMS = (None, "panels", "int8", "int4", "fp8", "mxfp4", "nf4", "groups")
H = I = 64  # of modules, whose weights can be stored in every form  # noqa: E741
E, K = 4, 2
OTHERS = ("x", "router_logits", "gate_up_proj", "down_proj")


class Call(NamedTuple):
    """name(**args); an error may name any of `args` or `others`."""

    name: str
    function: Callable[..., Any]
    args: dict[str, Any]
    others: tuple[str, ...] = ()


def draw(rng: random.Random) -> Call:
    """A call whose tensors come from torch's generator."""
    return rng.choice(CALLS)(rng)


def _layer(rng: random.Random) -> tuple[dict[str, Any], int]:
    """The tensors of `moe`, and the number of experts."""
    experts = rng.choice((1, 3, 8))
    pattern = rng.choice(("uniform", "holes", "repeated", "nothing"))
    top_k = rng.randint(1, experts)
    case = Case("fuzz", rng.choice((0, 1, 2, 7)), top_k, experts, rng.choice((1, 8, 20)), rng.choice((1, 6)), pattern)
    layer = make_layer(case, rng.choice(FLOATS), bias=rng.random() < 0.3)
    return layer._asdict(), experts


def _plan(rng: random.Random) -> tuple[dict[str, Any], switchgear.Plan, int]:
    layer, experts = _layer(rng)
    return layer, switchgear.plan(layer["topk_ids"], experts), experts


# ---- functions -------------------------------------------------------------------------------------------------------


def _route(rng: random.Random) -> Call:
    logits = torch.randn(rng.choice((0, 1, 5)), 8).to(rng.choice(FLOATS))
    bias = torch.randn(8) if rng.random() < 0.5 else None
    args = {"router_logits": logits, "top_k": 2, "score_function": "softmax", "normalize": False, "scale": 1.0}
    args |= {"selection_bias": bias, "num_groups": 2, "topk_groups": 2, "group_score": "max"}
    return Call("route", switchgear.route, args)


def _plan_call(rng: random.Random) -> Call:
    layer, experts = _layer(rng)
    return Call("plan", switchgear.plan, {"topk_ids": layer["topk_ids"], "num_experts": experts})


def _permute(rng: random.Random) -> Call:
    layer, plan, _ = _plan(rng)

    def permute(x: Any, topk_weights: Any, **parts: Any) -> Any:
        return switchgear.permute(x, switchgear.Plan(**parts), topk_weights)

    return Call("permute", permute, {"x": layer["x"], "topk_weights": layer["topk_weights"], **plan._asdict()})


def _combine(rng: random.Random) -> Call:
    layer, plan, _ = _plan(rng)
    rows = switchgear.permute(layer["x"], plan)

    def combine(permuted_y: Any, topk_weights: Any, **parts: Any) -> Any:
        return switchgear.combine(permuted_y, switchgear.Plan(**parts), topk_weights)

    return Call("combine", combine, {"permuted_y": rows, "topk_weights": layer["topk_weights"], **plan._asdict()})


def _grouped_gemm(rng: random.Random) -> Call:
    layer, plan, _ = _plan(rng)
    weight = layer["gate_up_proj"]
    args = {
        "x": layer["x"], "weight": weight if rng.random() < 0.7 else list(weight.unbind()),
        "expert_offsets": plan.expert_offsets, "bias": layer["gate_up_bias"], "token_indices": plan.token_indices,
    }  # fmt: skip
    return Call("grouped_gemm", switchgear.grouped_gemm, args)


def _glu(rng: random.Random) -> Call:
    return Call("glu", switchgear.glu, {"h": torch.randn(rng.choice((0, 1, 5)), 6).to(rng.choice(FLOATS)), **GLU})


def _moe(rng: random.Random) -> Call:
    layer, _ = _layer(rng)
    return Call("moe", switchgear.moe, layer | GLU)


def _moe_gradients(rng: random.Random) -> Call:
    layer, _ = _layer(rng)

    def moe_gradients(**args: Any) -> Any:
        trained = ("x", "gate_up_proj", "down_proj", "topk_weights")
        for name in trained:
            if isinstance(args[name], Tensor) and args[name].is_floating_point():
                args[name] = args[name].detach().requires_grad_()
        y = switchgear.moe(**args)
        if not (isinstance(y, Tensor) and y.requires_grad):
            return y
        y.backward(torch.ones_like(y))
        return y.detach(), *(getattr(args[name], "grad", None) for name in trained)

    return Call("moe_gradients", moe_gradients, layer)


# ---- modules ---------------------------------------------------------------------------------------------------------


@functools.cache
def _module(form: str | None) -> switchgear.MoE:
    torch.manual_seed(0)
    moe = switchgear.MoE(H, I, E, K).eval()
    if form is not None:
        switchgear.store(moe, form)
    return moe.requires_grad_(False)


def _hidden_states(rng: random.Random) -> Tensor:
    return torch.randn(rng.choice(((0, H), (1, H), (5, H), (2, 3, H))))


def _moe_module(rng: random.Random) -> Call:
    form = rng.choice(FORMS)
    return Call(f"MoE in {form}", _module(form), {"hidden_states": _hidden_states(rng)}, OTHERS)


def _router(rng: random.Random) -> Call:
    return Call("Router", _module(None).gate, {"hidden_states": _hidden_states(rng)}, ("router_logits",))


def _experts(rng: random.Random) -> Call:
    form = rng.choice(FORMS)
    states = _hidden_states(rng)
    shape = (*states.shape[:-1], K)
    ids, weights = torch.randint(-1, E, shape, dtype=torch.int32), torch.rand(shape)
    args = {"hidden_states": states, "topk_ids": ids, "topk_weights": weights}
    return Call(f"Experts in {form}", _module(form).experts, args, OTHERS)


def _constructor(rng: random.Random) -> Call:
    args = {"hidden_size": 4, "intermediate_size": 4, "num_experts": 4, "top_k": 2, "scale": 1.0, "alpha": 1.702}
    args |= {"limit": None, "shared_intermediate_size": 0, "num_shared_experts": 0, "null_experts": 0, "jitter": 0.0}
    args |= {"num_groups": 1, "topk_groups": 1, "activation": "silu", "score_function": "softmax"}

    def construct(**options: Any) -> Any:
        torch.manual_seed(0)
        y = switchgear.MoE(**options)(torch.ones(1, options["hidden_size"]))
        assert isinstance(y, Tensor)
        return y.detach()

    return Call("MoE()", construct, args, ("router_logits",))


CALLS: tuple[Callable[[random.Random], Call], ...] = (
    _route, _plan_call, _permute, _combine, _grouped_gemm, _glu, _moe, _moe_gradients, _moe_module, _router, _experts,
    _constructor,
)  # fmt: skip
