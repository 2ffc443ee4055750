# SPDX-License-Identifier: BSD-3-Clause
"""Gradients are torch's own by default. Inside accumulate_into_grad, those of weights that the kernel adds to .grad
have the bits of those that autograd adds, and behave like them."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import switchgear
from backends_in_use import ISAS, kernels_of
from errors import raises
from switchgear import Experts, accumulate_into_grad, ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(dtype: torch.dtype = torch.float32, sizes: tuple[int, int, int] = (72, 40, 5), **options: Any) -> Experts:
    torch.manual_seed(0)
    experts = Experts(sizes[0], sizes[1], num_experts=sizes[2], **options).to(dtype)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 4)
    return experts


def loss_of(experts: Experts, seed: int, tokens: int = 50) -> Tensor:
    """Expert 4 has no tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, experts.hidden_size, generator=generator).to(experts.down_proj.dtype)
    ids = torch.randint(0, 4, (tokens, 2), generator=generator, dtype=torch.int32)
    y = experts(x, ids, torch.rand(tokens, 2, generator=generator))
    return (y * torch.randn(y.shape, generator=generator)).sum()


def step(experts: Experts, seed: int, tokens: int = 50) -> None:
    loss = loss_of(experts, seed, tokens)
    with accumulate_into_grad():
        loss.backward()


def torch_step(experts: Experts, seed: int) -> None:
    loss_of(experts, seed).backward()


def grads(experts: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in experts.parameters() if parameter.grad is not None]


class Spy:
    """Counts the calls of the kernel that adds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        real = ops.moe_backward_on_host

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(ops, "moe_backward_on_host", counted)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    return Spy(monkeypatch)


# ---- by default ------------------------------------------------------------------------------------------------------


def test_by_default_a_hook_of_the_accumulation_sees_the_whole_gradient(spy: Spy) -> None:
    experts = make()
    torch_step(experts, 0)
    kept = experts.gate_up_proj.grad.clone()
    seen: list[Tensor] = []
    node = torch.autograd.graph.get_gradient_edge(experts.gate_up_proj).node
    node.register_prehook(lambda grads: seen.append(grads[0].clone()))
    torch_step(experts, 0)
    assert spy.calls == 0
    assert torch.equal(seen[0], kept)
    assert torch.equal(experts.gate_up_proj.grad, 2 * kept)


def test_by_default_threads_lose_no_gradient() -> None:
    experts = make()
    torch_step(experts, 0)
    once = [grad.clone() for grad in grads(experts)]
    workers = [threading.Thread(target=torch_step, args=(experts, 0)) for _ in range(7)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for grad, one in zip(grads(experts), once, strict=True):
        torch.testing.assert_close(grad, 8 * one)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_gradient_that_is_its_own_weight(in_place: bool, spy: Spy) -> None:
    """As in torch, which adds the whole gradient after it is computed."""
    experts, other = make(), make()
    torch_step(other, 0)
    wanted = [parameter.detach() + parameter.grad for parameter in other.parameters()]
    for parameter in experts.parameters():
        parameter.grad = parameter.detach()
    (step if in_place else torch_step)(experts, 0)
    assert spy.calls == 0
    assert all(torch.equal(grad, want) for grad, want in zip(grads(experts), wanted, strict=True))


def test_the_switch_is_of_one_thread_and_ends(spy: Spy) -> None:
    experts = make()
    torch_step(experts, 0)
    with accumulate_into_grad():
        worker = threading.Thread(target=torch_step, args=(experts, 0))
        worker.start()
        worker.join()
        assert spy.calls == 0
        with accumulate_into_grad():
            torch_step(experts, 0)
        torch_step(experts, 0)
        assert spy.calls == 2
    with pytest.raises(ZeroDivisionError), accumulate_into_grad():
        raise ZeroDivisionError
    torch_step(experts, 0)
    assert spy.calls == 2


# ---- by the kernel ---------------------------------------------------------------------------------------------------


def test_x_may_be_a_part_of_a_gradient(spy: Spy) -> None:
    experts = make()
    step(experts, 0)
    x = experts.gate_up_proj.grad[0, :5]
    ids, weights = torch.zeros(5, 1, dtype=torch.int32), torch.ones(5, 1)
    other = make()
    other(x.clone(), ids, weights).sum().backward()
    wanted = [mine.grad + its.grad for mine, its in zip(experts.parameters(), other.parameters(), strict=True)]
    y = experts(x, ids, weights).sum()
    with accumulate_into_grad():
        y.backward()
    assert spy.calls == 0
    assert all(torch.equal(p.grad, w) for p, w in zip(experts.parameters(), wanted, strict=True))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_sums_have_the_bits_of_autograd(isa: str, dtype: torch.dtype, bias: bool, spy: Spy) -> None:
    experts = make(dtype, bias=bias)
    with kernels_of(isa):
        for seed in range(3):
            step(experts, seed)
        assert spy.calls == 2
        got = [grad.clone() for grad in grads(experts)]
        experts.zero_grad()
        for seed in range(3):
            torch_step(experts, seed)
    assert spy.calls == 2
    assert len(got) == 2 + 2 * bias
    assert all(torch.equal(one, other) for one, other in zip(got, grads(experts), strict=True))


@pytest.mark.parametrize("sizes", [(512, 256, 80), (2048, 96, 40)])  # past the caches, and lines of other rows
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_large_gradients(dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    experts = make(dtype, sizes)
    step(experts, 1, 20)
    want = [grad.clone() for grad in grads(experts)]
    step(experts, 1, 20)
    assert all(torch.equal(grad, one + one) for grad, one in zip(grads(experts), want, strict=True))


@pytest.mark.parametrize("isa", ISAS)
def test_subnormal_sums_are_kept(isa: str) -> None:
    """1e-39 is subnormal in bfloat16. Some instructions that round would make it zero."""
    experts = make(torch.bfloat16, (64, 64, 5))
    step(experts, 0)
    for parameter in experts.parameters():
        parameter.grad = torch.full_like(parameter, 1e-39)
    before = [grad.clone() for grad in grads(experts)]
    x = torch.zeros(2, 64, dtype=torch.bfloat16)
    with kernels_of(isa), accumulate_into_grad():
        experts(x, torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)).sum().backward()
    assert all(
        torch.equal(one, other) and bool((one != 0).all()) for one, other in zip(grads(experts), before, strict=True)
    )


def test_memory_of_a_step_has_no_temporary(spy: Spy) -> None:
    experts = make(sizes=(512, 256, 8))
    switchgear._C.release_workspaces()
    step(experts, 0)
    places = [grad.data_ptr() for grad in grads(experts)]
    before = switchgear._C.kept_bytes()
    step(experts, 1)
    assert spy.calls == 1
    assert switchgear._C.kept_bytes() == before  # no gradient was allocated and freed
    assert [grad.data_ptr() for grad in grads(experts)] == places


# ---- where autograd has to add ---------------------------------------------------------------------------------------


def test_gradients_that_are_asked_for_are_returned(spy: Spy) -> None:
    experts = make()
    step(experts, 0)
    kept = [grad.clone() for grad in grads(experts)]
    with accumulate_into_grad():
        found = torch.autograd.grad(loss_of(experts, 0), list(experts.parameters()))
    assert spy.calls == 0
    assert all(torch.equal(one, other) for one, other in zip(found, kept, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(grads(experts), kept, strict=True))


def test_only_inputs_of_backward_change(spy: Spy) -> None:
    experts = make()
    step(experts, 0)
    kept = [grad.clone() for grad in grads(experts)]
    first, second = experts.parameters()
    with accumulate_into_grad():
        loss_of(experts, 0).backward(inputs=[first])
    assert torch.equal(first.grad, 2 * kept[0])
    assert torch.equal(second.grad, kept[1])


def test_hooks_of_a_parameter_see_its_gradient(spy: Spy) -> None:
    experts = make()
    step(experts, 0)
    kept = experts.gate_up_proj.grad.clone()
    seen: list[Tensor] = []
    experts.gate_up_proj.register_hook(lambda grad: seen.append(grad.clone()))
    step(experts, 0)
    assert spy.calls == 0
    assert torch.equal(seen[0], kept)


def test_hooks_after_accumulation_run_and_see_the_sum(spy: Spy) -> None:
    experts = make()
    step(experts, 0)
    kept = experts.gate_up_proj.grad.clone()
    seen: list[Tensor] = []
    experts.gate_up_proj.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.clone()))
    step(experts, 0)
    assert spy.calls == 1
    assert torch.equal(seen[0], 2 * kept)


def test_anomalies_are_looked_for_in_real_gradients(spy: Spy) -> None:
    experts = make()
    step(experts, 0)
    kept = experts.gate_up_proj.grad.clone()
    with torch.autograd.detect_anomaly(check_nan=True):
        step(experts, 0)
    assert spy.calls == 0
    assert torch.equal(experts.gate_up_proj.grad, 2 * kept)


def test_second_derivatives_still_raise() -> None:
    experts = make()
    step(experts, 0)
    with accumulate_into_grad():
        loss_of(experts, 0).backward(create_graph=True)
    with raises(RuntimeError):
        grads(experts)[0].sum().backward()


@pytest.mark.parametrize("change", ["dtype", "strides", "requires_grad", "shape of one"])
def test_other_gradients_are_left_to_autograd(change: str, spy: Spy) -> None:
    experts = make()
    step(experts, 0)
    kept = [grad.clone() for grad in grads(experts)]
    parameter = experts.gate_up_proj
    if change == "strides":
        parameter.grad = parameter.grad.mT.contiguous().mT
    elif change == "requires_grad":
        parameter.grad.requires_grad_()
    elif change == "dtype":
        experts.down_proj.grad = None
    else:
        experts.down_proj.grad = None
    step(experts, 0)
    assert spy.calls == 0
    assert torch.allclose(parameter.grad.detach(), 2 * kept[0])


def test_frozen_projections(spy: Spy) -> None:
    experts = make()
    experts.gate_up_proj.requires_grad_(False)
    step(experts, 0)
    kept = experts.down_proj.grad.clone()
    step(experts, 0)
    assert spy.calls == 1
    assert experts.gate_up_proj.grad is None
    assert torch.equal(experts.down_proj.grad, 2 * kept)


def test_a_weight_that_is_used_twice(spy: Spy) -> None:
    experts = make()
    step(experts, 0)
    once = [grad.clone() for grad in grads(experts)]
    experts.zero_grad()
    step(experts, 1)
    with accumulate_into_grad():
        (loss_of(experts, 0) + loss_of(experts, 0) + (experts.down_proj * 3).sum()).backward()
    assert spy.calls == 2
    got = [grad.clone() for grad in grads(experts)]
    experts.zero_grad()
    step(experts, 1)
    other = [grad.clone() for grad in grads(experts)]
    for grad, one, two, more in zip(got, once, other, (0, 3), strict=True):
        torch.testing.assert_close(grad, two + 2 * one + more)


def test_an_error_changes_nothing(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    experts = make()
    step(experts, 0)
    kept = [grad.clone() for grad in grads(experts)]
    loss = loss_of(experts, 0)
    with monkeypatch.context() as patch:
        patch.setattr(ops.native.host, "execution", lambda: "no number")
        with pytest.raises(TypeError), accumulate_into_grad():
            loss.backward()
    assert all(torch.equal(one, other) for one, other in zip(grads(experts), kept, strict=True))


def test_a_projection_that_was_frozen_after_forward(spy: Spy) -> None:
    experts = make()
    step(experts, 0)
    kept = [grad.clone() for grad in grads(experts)]
    loss = loss_of(experts, 0)
    experts.gate_up_proj.requires_grad_(False)
    with accumulate_into_grad():
        loss.backward()
    assert spy.calls == 0
    assert torch.equal(experts.gate_up_proj.grad, kept[0])
    assert torch.equal(experts.down_proj.grad, 2 * kept[1])


@pytest.mark.parametrize("tied", ["parameter", "gradient"])
def test_one_parameter_for_both_projections(tied: str, spy: Spy) -> None:
    torch.manual_seed(0)
    first = nn.Parameter(torch.randn(4, 16, 16))
    second = first if tied == "parameter" else nn.Parameter(first.detach().clone())
    ids, weights, x = torch.randint(4, (7, 2), dtype=torch.int32), torch.rand(7, 2), torch.randn(7, 16)

    def backward() -> None:
        with accumulate_into_grad():
            switchgear.moe(x, first, second, ids, weights, gated=False).sum().backward()

    backward()
    if tied == "gradient":
        first.grad = second.grad = first.grad + second.grad
    kept = first.grad.clone()
    backward()
    assert spy.calls == 0
    torch.testing.assert_close(first.grad, 2 * kept)


def test_checks_of_the_kernel() -> None:
    experts = make()
    x, ids, weights = torch.randn(3, 72), torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)
    h = torch.randn(3, 80)
    weights_in = [experts.gate_up_proj.detach()], (), [experts.down_proj.detach()], ()
    layer = ops.Layer(*weights_in, None, None, ids, weights, *ops.GluOptions())
    needs = (False, True, True, False, False, False)
    there = torch.zeros_like(experts.gate_up_proj), torch.zeros(5, 72, 41)
    with raises(ValueError, "grad_down_proj"):
        ops.moe_backward_on_host(there, torch.randn(3, 72), x, h, layer, needs)
    assert not there[0].any()
