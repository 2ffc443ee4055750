# SPDX-License-Identifier: BSD-3-Clause
"""Layers with LoRA adapters on every expert, W_e + scale · B_e A_e: ours, and the ways in which others compute them.

Layers are differentiable in x, topk_weights and the adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from switchgear import moe
from switchgear.weights import AdaptedWeight, Weight
from switchgear.weights.form import on_huge_pages

from .case import Case, Inputs, Layer
from .competitors import Skip
from .competitors.plain_torch import check_grouped_mm
from .minifloats import decoded

SCALE = 2.0  # alpha = 2·rank, as is usual


@dataclass(frozen=True)
class Adapters:
    """A [E,r,in] and B [E,out,r] of both projections, in the dtype of activations."""

    gate_up: tuple[nn.Parameter, nn.Parameter]
    down: tuple[nn.Parameter, nn.Parameter]

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        return (*self.gate_up, *self.down)


@dataclass(frozen=True)
class AdaptedCase:
    """A case of the benchmark whose weights are frozen, with adapters."""

    case: Case
    bases: tuple[Tensor | Weight, Tensor | Weight]  # as our kernels read them
    adapters: Adapters

    @property
    def is_stored(self) -> bool:
        return isinstance(self.bases[0], Weight)

    @property
    def is_integer(self) -> bool:
        return isinstance(self.bases[0], Weight) and self.bases[0].format == "int4"

    def matrices(self, expert: int) -> tuple[Tensor, Tensor]:
        """Both adapted matrices of an expert in float64, differentiable in the adapters."""
        adapted = []
        for base, (a, b) in zip(self.bases, (self.adapters.gate_up, self.adapters.down), strict=True):
            matrix = decoded(base, expert) if isinstance(base, Weight) else base[expert]
            adapted.append(matrix.detach().double() + SCALE * b[expert].double() @ a[expert].double())
        return adapted[0], adapted[1]


@dataclass(frozen=True)
class Adapted:
    """A layer, what an optimizer would train, and the gradients of A, B, A, B in our layout."""

    layer: Layer
    parameters: tuple[nn.Parameter, ...]
    gradients: Callable[[], list[Tensor]]


def make_adapters(case: Case, rank: int) -> Adapters:
    """Random A and B: B is not zero, so that all gradients count. Their product is about a fifth of the base."""
    generator = torch.Generator().manual_seed(rank)
    hidden, inner, experts = case.shape.hidden_size, case.shape.intermediate_size, case.shape.num_experts

    def pair(rows: int, cols: int) -> tuple[nn.Parameter, nn.Parameter]:
        a = torch.randn(experts, rank, cols, generator=generator) * cols**-0.5
        b = torch.randn(experts, rows, rank, generator=generator) * (0.1 * (cols / rank) ** 0.5 * 0.02)
        # On huge pages, as add_lora makes them.
        return nn.Parameter(on_huge_pages(a.to(case.dtype))), nn.Parameter(on_huge_pages(b.to(case.dtype)))

    return Adapters(pair(2 * inner, hidden), pair(hidden, inner))


def frozen(case: AdaptedCase) -> Adapted:
    """The base alone: what adapters are measured against."""
    gate_up, down = case.bases
    return Adapted(lambda inputs: moe(inputs.x, gate_up, down, inputs.topk_ids, inputs.topk_weights), (), list)


def switchgear(case: AdaptedCase) -> Adapted:
    """switchgear.moe with an AdaptedWeight for each projection."""
    pairs = zip(case.bases, (case.adapters.gate_up, case.adapters.down), strict=True)
    gate_up, down = (AdaptedWeight(base, a, b, SCALE) for base, (a, b) in pairs)
    return _with_our_parameters(case, lambda inputs: moe(inputs.x, gate_up, down, inputs.topk_ids, inputs.topk_weights))


def materialised(case: AdaptedCase) -> Adapted:
    """switchgear.moe on W + scale · B·A, built at each step, as parametrised weights are."""
    gate_up, down = case.case.weights

    def layer(inputs: Inputs) -> Tensor:
        first, second = (
            torch.baddbmm(base, b, a, alpha=SCALE)
            for base, (a, b) in ((gate_up, case.adapters.gate_up), (down, case.adapters.down))
        )
        return moe(inputs.x, first, second, inputs.topk_ids, inputs.topk_weights)

    return _with_our_parameters(case, layer)


def peft_grouped_mm(case: AdaptedCase) -> Adapted:
    """PEFT's LoRA on transformers' experts (target_parameters), which run on torch's grouped_mm."""
    try:
        from peft import LoraConfig, get_peft_model
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    except ImportError as error:
        raise Skip(f"needs peft and transformers: {error}") from None
    shape, (gate_up, down) = case.case.shape, case.case.weights
    config = MixtralConfig(
        hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_local_experts=shape.num_experts, num_experts_per_tok=shape.top_k,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    model = nn.Module()
    with torch.device("meta"):
        model.experts = MixtralExperts(config)
    model.experts.gate_up_proj, model.experts.down_proj = _parameter(gate_up), _parameter(down)
    rank = case.adapters.down[0].shape[1]
    get_peft_model(
        model,
        LoraConfig(
            r=rank, lora_alpha=int(SCALE * rank), target_modules=[],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        ),
        autocast_adapter_dtype=False,
    )  # fmt: skip
    experts: Any = model.experts
    theirs: list[nn.Parameter] = []
    for name, (a, b) in (("gate_up_proj", case.adapters.gate_up), ("down_proj", case.adapters.down)):
        wrapper = next(m for m in experts.modules() if getattr(m, "parameter_name", None) == name)
        theirs += [wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight]
        # PEFT has A [E·r,in], and B [out,r·E] with the expert fastest.
        theirs[-2].data.copy_(a.data.flatten(0, 1))
        theirs[-1].data.copy_(b.data.permute(1, 2, 0).flatten(1))

    def gradients() -> list[Tensor]:
        grads = [_gradient(parameter) for parameter in theirs]
        for index in (0, 2):
            a, b = grads[index : index + 2]
            grads[index] = a.view(shape.num_experts, rank, -1)
            grads[index + 1] = b.view(-1, rank, shape.num_experts).permute(2, 0, 1)
        return grads

    def layer(inputs: Inputs) -> Tensor:
        y: Tensor = experts(inputs.x, inputs.topk_ids_int64, inputs.topk_weights_low)
        return y

    return Adapted(layer, tuple(theirs), gradients)


def split_torch(case: AdaptedCase) -> Adapted:
    """Split LoRA as formulas of torch: grouped_mm of the base, plus two of the adapters (Unsloth's formula)."""
    check_grouped_mm()
    gate_up, down = case.case.weights
    experts, top_k = case.case.shape.num_experts, case.case.shape.top_k

    def layer(inputs: Inputs) -> Tensor:
        ids = inputs.topk_ids_int64.flatten()
        order = ids.argsort()
        offsets = torch.bincount(ids, minlength=experts).cumsum(0).int()
        tokens = order // top_k

        def project(rows: Tensor, base: Tensor, adapter: tuple[Tensor, Tensor]) -> Tensor:
            low = F.grouped_mm(rows, adapter[0].mT, offs=offsets)
            return F.grouped_mm(rows, base.mT, offs=offsets) + SCALE * F.grouped_mm(low, adapter[1].mT, offs=offsets)

        gate, up = project(inputs.x[tokens], gate_up, case.adapters.gate_up).chunk(2, -1)
        y = project(F.silu(gate) * up, down, case.adapters.down)
        y = y * inputs.topk_weights_low.flatten()[order, None]
        return torch.zeros_like(inputs.x).index_add(0, tokens, y)

    return _with_our_parameters(case, layer)


def _gradient(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise RuntimeError("the gradient of an adapter is missing")
    return parameter.grad


def _with_our_parameters(case: AdaptedCase, layer: Layer) -> Adapted:
    parameters = case.adapters.parameters
    return Adapted(layer, parameters, lambda: [_gradient(parameter) for parameter in parameters])


def _parameter(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)


BASE, OURS = "frozen base", "switchgear"
LAYERS: dict[str, Callable[[AdaptedCase], Adapted]] = {
    BASE: frozen,
    OURS: switchgear,
    "switchgear on W + B·A": materialised,
    "PEFT on grouped_mm": peft_grouped_mm,
    "split, torch": split_torch,
}
