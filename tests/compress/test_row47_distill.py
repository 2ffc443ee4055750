# SPDX-License-Identifier: BSD-3-Clause
"""Distillation expert by expert after pruning weights: MoE-Pruner's loss against loops in float64, its gradients, and
what a few steps of it repair."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import clone, expert, hugging_face, our_model, random_gates, row_batches, token_batches
from torch import Tensor, nn

import switchgear
from errors import raises
from switchgear import distill
from switchgear.compress import calibrate, prune_experts, prune_weights
from switchgear.integrations.moe_blocks import moe_blocks
from switchgear.trace import Observation, observe


def loss_by_the_paper(teacher: Any, student: Any, batch: dict[str, Any]) -> Tensor:
    """Σ_layers Σ_e MSE(FFN_e^teacher(x), FFN_e^student(x)) (arXiv:2410.12013), over the tokens of the expert."""
    seen: dict[str, Observation] = {}
    with torch.no_grad(), observe(teacher, seen.__setitem__):
        teacher(**batch)
    total = torch.zeros((), dtype=torch.float64)
    for name, block in moe_blocks(teacher).items():
        one = seen[name]
        for e in range(block.num_experts):
            chosen = (one.topk_ids == e).any(-1)
            if one.token_mask is not None:
                chosen &= one.token_mask
            if chosen.any():
                of_teacher, of_student = (expert(moe_blocks(m)[name], e, one.x[chosen])[1] for m in (teacher, student))
                total += (of_teacher - of_student).square().mean()
    return total


def pruned(teacher: Any, batches: list[Any]) -> Any:
    student = clone(teacher)
    prune_weights(student, 0.5, calibration=calibrate(teacher, batches))
    return student


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "gpt_oss", "ours"])
def test_row47_loss_is_that_of_the_paper(model_type: str) -> None:
    teacher = our_model() if model_type == "ours" else hugging_face(model_type)
    batches = row_batches() if model_type == "ours" else token_batches()
    student = pruned(teacher, batches)
    batch = {key: value for key, value in batches[0].items() if key != "domain"}
    wanted = loss_by_the_paper(teacher, student, batch)
    got = distill.expert_kd(teacher, student, **batch)
    assert got.requires_grad
    assert got.dtype is torch.float32
    torch.testing.assert_close(got.detach().double(), wanted, rtol=1e-4, atol=0)
    assert float(distill.expert_kd(teacher, clone(teacher), **batch).detach()) == 0


def test_row47_gradients_reach_the_students_experts_alone() -> None:
    teacher, batch = our_model(bias=True), {"x": torch.randn(30, 16)}
    with torch.no_grad():
        for layer in teacher.layers:
            layer.experts.down_proj_bias.normal_()
    student = clone(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    distill.expert_kd(teacher, student, **batch).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert {name.split(".")[2] for name, p in student.named_parameters() if p.grad is not None} == {"experts"}
    seen: dict[str, Observation] = {}
    with torch.no_grad(), observe(teacher, seen.__setitem__):
        teacher(**batch)
    for name in seen:
        one, layer = seen[name], student.get_submodule(name).experts
        of_teacher = clone(teacher.get_submodule(name).experts).double()
        exact = clone(layer).double()
        for e in range(8):
            x = one.x[(one.topk_ids == e).any(-1)].double()
            if len(x):
                ids, ones = torch.full((len(x), 1), e), torch.ones(len(x), 1)
                wanted = of_teacher(x, ids, ones).detach()
                with switchgear.use_backend("reference"):
                    (exact(x, ids, ones) - wanted).square().mean().backward()
        for key in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"):
            got, want = layer.get_parameter(key).grad.double(), exact.get_parameter(key).grad
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 * float(want.abs().max()))


def test_row47_a_few_steps_repair_a_pruned_model() -> None:
    """The paper's recipe: half of the weights zero, then L_CE + λ · expert loss. The zeros stay."""
    teacher = random_gates(hugging_face("mixtral"))
    batches = [{**batch, "labels": batch["input_ids"]} for batch in token_batches(40, length=64)]
    for batch in batches:
        del batch["domain"]
    student = pruned(teacher, batches[:4])
    zeros = {name: parameter == 0 for name, parameter in student.named_parameters() if parameter.dim() == 3}
    held_out = token_batches(1, seed=9, length=64)[0]
    del held_out["domain"]
    before = float(distill.expert_kd(teacher, student, **held_out).detach())
    optimizer = torch.optim.AdamW(student.parameters(), 5e-3)
    losses = distill.distill_experts(teacher, student, batches, optimizer)
    assert len(losses) == 40
    assert losses[-1].experts < 0.9 * losses[0].experts
    assert float(distill.expert_kd(teacher, student, **held_out).detach()) < 0.9 * before
    for name, zero in zeros.items():
        now = student.get_parameter(name)
        assert torch.equal(now == 0, zero), name
        assert now.grad is not None
    assert all(not parameter._backward_hooks for parameter in student.parameters())


@pytest.mark.parametrize(
    ("weight", "sign", "first"), [(None, 1, 0), (None, -1, 0), (None, 1, 1), (0.0, 1, 0), (3.0, 1, 0)]
)
def test_row47_the_weight_of_the_loss(weight: float | None, sign: int, first: int) -> None:
    """Steps of SGD are those of loss + λ · expert_kd; without λ both start equal in size, at the `first` step at which
    the student differs."""
    teacher, batches = our_model(), [{"x": torch.randn(20, 16)} for _ in range(3)]
    student = clone(teacher) if first else pruned(teacher, batches)
    stepped, by_hand = clone(student), clone(student)

    def own(model: nn.Module, batch: Any) -> Tensor:
        return sign * model(batch["x"]).square().mean()

    losses = distill.distill_experts(
        teacher, stepped, batches, torch.optim.SGD(stepped.parameters(), 0.1), weight=weight, loss=own
    )
    factor = abs(losses[first].own) / losses[first].experts if weight is None else weight
    optimizer = torch.optim.SGD(by_hand.parameters(), 0.1)
    with distill.keep_zeros(by_hand):
        for batch in batches:
            optimizer.zero_grad()
            (own(by_hand, batch) + factor * distill.expert_kd(teacher, by_hand, **batch)).backward()
            optimizer.step()
    assert losses[0].own == pytest.approx(float(own(student, batches[0]).detach()))
    assert all(torch.equal(a, b) for a, b in zip(stepped.parameters(), by_hand.parameters(), strict=True))


def test_wrong_arguments() -> None:
    teacher, x = our_model(), torch.randn(4, 16)
    fewer = clone(teacher)
    prune_experts(fewer, 4, "random")
    with raises(ValueError, "student"):
        distill.expert_kd(teacher, fewer, x)
    with raises(ValueError, "student"):
        distill.expert_kd(teacher, nn.ModuleDict({"layers": nn.ModuleList([teacher.layers[0]])}), x)
    with raises(ValueError, "model"):
        distill.expert_kd(nn.Linear(2, 2), teacher, x)
    optimizer = torch.optim.SGD(teacher.parameters(), 0.1)
    for weight in (-1.0, float("nan"), float("inf")):
        with raises(ValueError, "weight"):
            distill.distill_experts(teacher, clone(teacher), [{"x": x}], optimizer, weight=weight)
    student = clone(teacher)
    with raises(ValueError, "batches"):
        distill.distill_experts(teacher, student, [{"x": x}], optimizer, loss=lambda m, b: m(**b).sum() * float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))
