# SPDX-License-Identifier: BSD-3-Clause
"""Distillation expert by expert, from the model that a student was pruned from (MoE-Pruner, arXiv:2410.12013):

L = L_CE + λ · Σ_layers Σ_e MSE(FFN_e^teacher(x), FFN_e^student(x))
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switchgear.checks import NotNegative, Optimizer, checked
from switchgear.integrations.blocks import ExpertLayer, expert_layers
from switchgear.trace import Observation, observe


class Losses(NamedTuple):
    """Of one step, before it."""

    own: float  # the student's loss
    experts: float  # expert_kd


@checked
def expert_kd(
    teacher: nn.Module, student: nn.Module, *inputs: Any, layers: Collection[str] | None = None, **keywords: Any
) -> Tensor:
    """The sum over layers and experts of the mean squared difference between both models' outputs of that expert: a
    float32 scalar, 0 for equal models. Differentiable in the student's experts.

    An expert is compared on the tokens that the teacher sends to it, with the teacher's x. So each layer is corrected
    by itself, whatever the layers before it do. Experts without tokens add nothing. Padding (attention_mask 0) is left
    out.

    Args:
        teacher: called as teacher(*inputs, **keywords), without gradients.
        student: has the same layers and numbers of experts; the experts may have other intermediate sizes.
        layers: names of blocks (moe_blocks); all if None.

    Raises ValueError for models without MoE layers, or of different ones, and for experts that are not plain.
    """
    pairs = _pair_experts(teacher, student, layers)
    found: list[Tensor] = []

    def see(name: str, seen: Observation) -> None:
        found.append(_compute_layer_loss(*pairs[name], seen))

    with torch.no_grad(), observe(teacher, see, layers=list(pairs)):
        teacher(*inputs, **keywords)
    if not found:
        raise ValueError("teacher: expected MoE layers that the call runs, got none that ran")
    return torch.stack(found).sum()


def _pair_experts(
    teacher: nn.Module, student: nn.Module, layers: Collection[str] | None
) -> dict[str, tuple[ExpertLayer, ExpertLayer]]:
    of_teacher, of_student = expert_layers(teacher, layers), expert_layers(student, layers)
    if list(of_teacher) != list(of_student):
        missing = sorted(set(of_teacher) ^ set(of_student))[0]
        raise ValueError(f"student: expected the teacher's layers, got a difference in {missing}")
    for name, layer in of_teacher.items():
        for what in ("num_experts", "hidden_size"):
            wanted, got = getattr(layer, what), getattr(of_student[name], what)
            if wanted != got:
                raise ValueError(f"student: expected the teacher's {what} in {name}, {wanted}, got {got}")
    return {name: (layer, of_student[name]) for name, layer in of_teacher.items()}


def _compute_layer_loss(teacher: ExpertLayer, student: ExpertLayer, seen: Observation) -> Tensor:
    x, ids, weights = seen.x, seen.topk_ids, seen.topk_weights
    if seen.token_mask is not None:
        kept = seen.token_mask.to(x.device)
        x, ids, weights = x[kept], ids[kept], weights[kept]
    ids = torch.where((ids < 0) | (ids >= teacher.num_experts), -1, ids)
    rows = teacher.rows(x, ids, weights)
    with torch.enable_grad():
        _, outputs = student.apply(rows.inputs.to(student.projection(0).dtype), rows.offsets)
        errors = (outputs.float() - rows.outputs.float()).square().mean(-1)
        tokens = rows.offsets.diff().clamp(min=1).to(errors.dtype)
        loss: Tensor = (errors / tokens[rows.experts]).sum()
        return loss


@checked
@contextmanager
def keep_zeros(model: nn.Module, layers: Collection[str] | None = None) -> Iterator[None]:
    """Inside the block, weights of the experts that are zero get no gradient, so optimizers without memory of earlier
    gradients leave them zero: the pattern of `compress.prune_weights` survives training. It takes a byte per weight."""
    parameter: Any
    with ExitStack() as stack:
        for layer in expert_layers(model, layers).values():
            for parameter in (each.value for each in layer.parameters):
                if parameter.requires_grad:
                    zeros = parameter.detach() == 0
                    hook = parameter.register_hook(lambda grad, zeros=zeros: grad.masked_fill(zeros, 0))
                    stack.callback(hook.remove)
        yield


@checked
def distill_experts(
    teacher: nn.Module,
    student: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    optimizer: Optimizer,
    *,
    weight: NotNegative | None = None,
    loss: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None,
) -> list[Losses]:
    """One step on loss + weight · expert_kd per batch. The student's weights that are zero stay zero.

        student = copy.deepcopy(teacher)
        compress.prune_weights(student, 0.5, calibration=compress.calibrate(teacher, batches))
        optimizer = torch.optim.AdamW(student.parameters(), 1e-5)
        distill.distill_experts(teacher, student, batches, optimizer)

    Args:
        teacher: its parameters get no gradients.
        student: trained in the mode, train or eval, that it is in.
        batches: dicts of the forward's arguments, of both models; with labels for the default loss.
        optimizer: a new one, over parameters of the student.
        weight: λ. None: |own loss| / expert_kd at the first step at which the student differs, so that both start
            equal in size.
        loss: of the student for a batch, by default student(**batch).loss.

    Raises ValueError as expert_kd does, and for a loss that is not finite; steps before that remain.
    """
    _pair_experts(teacher, student, None)  # before a step
    done: list[Losses] = []
    with keep_zeros(student):
        for batch in batches:
            own = getattr(student(**batch), "loss", None) if loss is None else loss(student, batch)
            if not isinstance(own, Tensor):
                raise ValueError("batches: expected labels, so that the student returns a loss, got none")
            experts = expert_kd(teacher, student, **{key: value for key, value in batch.items() if key != "labels"})
            losses = Losses(float(own.detach()), float(experts.detach()))
            if weight is None and losses.experts:
                weight = abs(losses.own) / losses.experts
            total = own if weight is None else own + weight * experts
            if not bool(total.isfinite()):
                raise ValueError(f"batches: expected finite losses, got {losses}")
            optimizer.zero_grad()
            torch.autograd.backward(total)
            optimizer.step()
            done.append(losses)
    return done
