# SPDX-License-Identifier: BSD-3-Clause
"""Distillation from all experts of a teacher (row 51)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import switchgear
from errors import raises
from switchgear import distill
from switchgear.routing import LossFreeBias, SkipBelow, TopK

pytestmark = pytest.mark.filterwarnings("error")


def make_teacher() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (switchgear.MoE(8, 6, 4, 2, normalize=True), switchgear.MoE(8, 6, 3, 1, score_function="sigmoid"))
    return nn.Sequential(*layers, nn.Linear(8, 5))


def test_row51_without_sampling_all_but_the_worst_expert() -> None:
    teacher, x = make_teacher(), torch.randn(20, 8)
    first, second = distill.knowledge_augment(teacher, x, p_sample=0.0)
    assert torch.equal(first, second)
    assert not first.requires_grad
    best = copy.deepcopy(teacher)
    best[0].gate.top_k, best[1].gate.top_k = 3, 2
    torch.testing.assert_close(first, best(x).detach())
    assert len(distill.knowledge_augment(teacher, x, samples=3)) == 3


def test_row51_samples_follow_the_gate_probabilities() -> None:
    """Chi-square of the first draw of 20000 tokens with the same logits; 16.3 is the 0.1 % quantile for 3 degrees."""
    teacher = make_teacher()
    drawn: list[Tensor] = []
    teacher[0].gate.register_forward_hook(lambda _, __, routing: drawn.append(routing.topk_ids))
    x = torch.randn(1, 8).expand(20000, 8)
    torch.manual_seed(1)
    distill.knowledge_augment(teacher, x, samples=1, p_sample=1.0)
    (ids,) = drawn
    assert ids.shape == (20000, 3)
    assert all(len(set(row)) == 3 for row in ids[:50].tolist())
    expected = 20000 * teacher[0].gate(x[:1]).router_logits[0].detach().softmax(-1)
    counts = torch.bincount(ids[:, 0].long(), minlength=4)
    assert float(((counts - expected).square() / expected).sum()) < 16.3


def test_row51_all_experts_are_the_dense_mixture() -> None:
    teacher, x = make_teacher(), torch.randn(7, 8)
    moe = teacher[0]
    with distill.all_experts(teacher):
        y = moe(x)
    weights = moe.gate(x).router_logits.softmax(-1)
    ids = torch.arange(4).expand(7, 4)
    torch.testing.assert_close(y, moe.experts(x, ids, weights))
    assert torch.equal(moe(x), make_teacher()[0](x))


@pytest.mark.parametrize("select", [TopK(2, "sigmoid"), SkipBelow(TopK(2, "sigmoid"), 0.1)])
def test_row51_scores_are_those_of_the_selection_inside(select: Any) -> None:
    teacher, x = make_teacher(), torch.randn(7, 8)
    teacher[0].gate.top_k, teacher[0].gate.select = None, select
    with distill.all_experts(teacher):
        routing = teacher[0].gate(x)
    torch.testing.assert_close(routing.topk_weights, routing.router_logits.sigmoid())


@pytest.mark.parametrize("select", [TopK(2), SkipBelow(TopK(2), 0.1)])
def test_row51_balance_is_of_as_many_experts_as_the_selection_takes(select: Any) -> None:
    """The step is that of a router with top_k."""
    x, student, weights = torch.randn(64, 8) + 1, torch.randn(64, 5), []
    for own in (None, select):
        teacher = make_teacher()
        if own is not None:
            teacher[0].gate.top_k, teacher[0].gate.select = None, own
        optimizer = torch.optim.SGD(distill.router_parameters(teacher), 0.5)
        distill.student_aware_router(teacher, student, optimizer, x, beta=10.0)
        weights.append(teacher[0].gate.weight)
    torch.testing.assert_close(*weights)


def test_row51_a_step_changes_the_router_only() -> None:
    teacher, x = make_teacher(), torch.randn(64, 8)
    teacher[2].requires_grad_(False)
    before = copy.deepcopy(teacher.state_dict())
    flags = [parameter.requires_grad for parameter in teacher.parameters()]
    student = torch.randn(64, 5)
    optimizer = torch.optim.SGD(distill.router_parameters(teacher), 0.5)
    divergences = []
    for _ in range(20):
        logits = distill.student_aware_router(teacher, student, optimizer, x, beta=0.0)
        divergences.append(float(distill.reverse_kl(student, logits)))
    with distill.all_experts(teacher), torch.no_grad():
        assert torch.equal(logits, teacher(x))
    assert divergences[-1] < divergences[0]
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(tensor, before[name]) == (".gate." not in name), name
    assert [parameter.requires_grad for parameter in teacher.parameters()] == flags
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_row51_gradients_and_counts_of_the_teacher_stay() -> None:
    teacher = nn.Sequential(switchgear.MoE(8, 6, 4, 2, balance=[LossFreeBias()]), nn.Linear(8, 5))
    x, optimizer = torch.randn(64, 8), torch.optim.SGD(distill.router_parameters(teacher), 0.5)
    teacher(x).sum().backward()
    grads = [parameter.grad.clone() for parameter in teacher.parameters()]
    counts = teacher[0].gate.tokens_per_expert.tolist()
    distill.student_aware_router(teacher, torch.randn(64, 5), optimizer, x)
    distill.knowledge_augment(teacher, x)
    for parameter, grad in zip(teacher.parameters(), grads, strict=True):
        assert torch.equal(parameter.grad, grad)
    assert teacher[0].gate.tokens_per_expert.tolist() == counts


def test_row51_balance_of_the_routers() -> None:
    """With a large beta alone, the load of the router becomes more even."""
    teacher = make_teacher()
    x = torch.randn(256, 8) + 1
    with torch.no_grad():
        teacher[0].gate.weight[0] += 1
    optimizer = torch.optim.Adam(distill.router_parameters(teacher), 0.02)
    loads = []
    for _ in range(30):
        with distill.all_experts(teacher), torch.no_grad():
            student = teacher(x)
        distill.student_aware_router(teacher, student, optimizer, x, beta=1.0)
        loads.append(torch.bincount(teacher[0].gate(x).topk_ids.flatten().long(), minlength=4))
    assert loads[-1].max() < loads[0].max()


def test_reverse_kl() -> None:
    student, teacher = torch.randn(3, 4, 6, requires_grad=True), torch.randn(3, 4, 6)
    q, p = student.softmax(-1), teacher.softmax(-1)
    wanted = (q * (q / p).log()).sum(-1)
    torch.testing.assert_close(distill.reverse_kl(student, teacher), wanted.mean())
    mask = torch.arange(4).expand(3, 4) < 2
    torch.testing.assert_close(distill.reverse_kl(student, teacher, mask), wanted[:, :2].mean())
    (wanted_grad,) = torch.autograd.grad(wanted[:, :2].mean(), student)
    padded = student.detach().masked_fill(~mask[..., None], torch.nan).requires_grad_()
    loss = distill.reverse_kl(padded, teacher.masked_fill(~mask[..., None], torch.nan), mask)
    torch.testing.assert_close(loss, wanted[:, :2].mean())
    torch.testing.assert_close(torch.autograd.grad(loss, padded)[0], wanted_grad)
    assert abs(float(distill.reverse_kl(teacher, teacher))) < 1e-6


def test_reverse_kl_of_impossible_tokens() -> None:
    """0 · log 0 is 0, also where the teacher has it; gradients are finite."""
    student = torch.tensor([[1.0, 2.0, -torch.inf, -torch.inf]], requires_grad=True)
    teacher = torch.tensor([[0.5, 1.0, 1.5, -torch.inf]], requires_grad=True)
    q, p = student.detach().double()[:, :2].softmax(-1), teacher.detach().double().softmax(-1)[:, :2]
    loss = distill.reverse_kl(student, teacher)
    torch.testing.assert_close(loss.double(), (q * (q / p).log()).sum())
    for grad in torch.autograd.grad(loss, (student, teacher)):
        assert grad.isfinite().all()


def test_errors() -> None:
    x = torch.randn(2, 8)
    with raises(ValueError):
        distill.knowledge_augment(nn.Linear(8, 8), x)
    with raises(ValueError):
        distill.knowledge_augment(make_teacher(), x, samples=0)
    with raises(ValueError, "p_sample"):
        distill.knowledge_augment(make_teacher(), x, p_sample=2.0)
