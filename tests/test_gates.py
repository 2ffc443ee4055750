# SPDX-License-Identifier: BSD-3-Clause
"""Recognition of a model's gate."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import switchgear
from switchgear.integrations.gates import PLAIN_ACTIVATIONS, find_gate, get_own_gate, recognise
from switchgear.ops import GluOptions

FAMILIES = [
    *(GluOptions(activation, gated=False) for activation in PLAIN_ACTIVATIONS),
    *(
        GluOptions(activation, True, interleaved, limit=limit)
        for activation, interleaved, limit in itertools.product(PLAIN_ACTIVATIONS, (False, True), (0.0, 7.0, 100.0))
    ),
    *(GluOptions("swiglu_oai", True, interleaved, 1.5, limit) for interleaved in (False, True) for limit in (0.0, 7.0)),
]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_each_family_is_told_from_all_others(family: GluOptions) -> None:
    """The library's own glu stands in for the model's gate."""
    numbers = (7.0, 100.0, 1.5, 64, 4096)
    assert recognise(lambda h: switchgear.glu(h, **family.keywords()), gated=family.gated, numbers=numbers)._replace(
        alpha=family.alpha
    ) == family  # fmt: skip


def silu_gate(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


@pytest.mark.parametrize(
    "gate",
    [
        lambda h: silu_gate(h) * 1.001,
        lambda h: silu_gate(h.clamp(-5, 5)),  # a clamp at a number that is not an attribute
        lambda h: silu_gate(h.clamp(max=7.0)),  # at a known number, but in another form
        lambda h: torch.tanh(silu_gate(h)),
        lambda h: nn.functional.dropout(silu_gate(h), 0.1),
        lambda h: silu_gate(h)[..., :3],
        lambda h: silu_gate(h.bfloat16()).double(),
    ],
)
def test_other_gates_are_left_alone(gate: object) -> None:
    assert recognise(gate, numbers=(7.0,)) is None  # type: ignore[arg-type]


def test_float32_inside_is_still_recognised() -> None:
    assert recognise(lambda h: silu_gate(h.float()).double()) == GluOptions("silu")


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.act_fn = nn.SiLU()
        self.limit = 7.0

    def _apply_gate(self, h: Tensor) -> Tensor:
        gate, up = h.chunk(2, dim=-1)
        return self.act_fn(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit)


def test_changes_are_noticed() -> None:
    module = Experts()
    assert find_gate(module) == GluOptions("silu", limit=7.0)
    module.limit = 9.0
    assert find_gate(module) == GluOptions("silu", limit=9.0)
    module.act_fn = nn.Tanh()
    assert find_gate(module) is None
    assert get_own_gate(module)(torch.ones(1, 4)).shape == (1, 2)


class Swish(nn.Module):
    """Starts as silu."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.beta * x)


class SiLUWithDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(nn.functional.silu(x), 0.5, self.training)


def replaced_forward(activation: Any) -> None:
    activation.forward = nn.functional.silu


CALLS = {
    "forward hook": lambda a: a.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda a: a.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda a: a.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda a: a.register_full_backward_pre_hook(lambda *_: None),
    "replaced forward": replaced_forward,
}


@pytest.mark.parametrize("change", CALLS.values(), ids=CALLS)
def test_an_activation_that_must_be_called_is_called(change: Callable[[nn.Module], None]) -> None:
    module = Experts()
    assert find_gate(module) == GluOptions("silu", limit=7.0)
    change(module.act_fn)
    assert find_gate(module) is None
    assert find_gate(Experts()) == GluOptions("silu", limit=7.0)


@pytest.mark.parametrize(
    "activation",
    [Swish(), nn.Sequential(Swish())],
    ids=["itself", "a part of it"],
)
def test_learnt_activations_are_in_no_family(activation: nn.Module) -> None:
    module = Experts()
    module.act_fn = activation
    assert find_gate(module) is None


def test_functions_that_hold_something_are_in_no_family() -> None:
    module: Any = Experts()
    beta = torch.ones((), requires_grad=True)
    bound = functools.partial(lambda betas, x: x * torch.sigmoid(betas[0] * x), [beta])
    for function, wanted in ((lambda x: x * torch.sigmoid(beta * x), None), (bound, None), (F.silu, "silu")):
        del module.act_fn
        module.act_fn = function
        family = find_gate(module)
        assert (family and family.activation) == wanted


def test_training_matters_where_the_activation_depends_on_it() -> None:
    module = Experts()
    module.act_fn = SiLUWithDropout().eval()
    assert find_gate(module) == GluOptions("silu", limit=7.0)
    assert find_gate(module.train()) is None
    assert find_gate(module.eval()) == GluOptions("silu", limit=7.0)


def test_a_replaced_gate_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = Experts()
    assert find_gate(module) is not None
    module._apply_gate = torch.tanh
    assert find_gate(module) is None
    del module._apply_gate
    monkeypatch.setattr(Experts, "_apply_gate", lambda self, h: silu_gate(h))
    assert find_gate(module) == GluOptions("silu")
    monkeypatch.undo()
    monkeypatch.setattr(nn.SiLU, "forward", lambda self, x: torch.relu(x))
    assert find_gate(module) == GluOptions("relu", limit=7.0)


def test_modules_that_are_alike_are_recognised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Experts(), Experts()
    first.act_fn, second.act_fn = (transformers.activations.GELUTanh() for _ in range(2))
    assert find_gate(first) == GluOptions("gelu_tanh", limit=7.0)
    monkeypatch.delattr("switchgear.integrations.gates.recognise")
    assert find_gate(second) == find_gate(first)


def test_surroundings_do_not_matter() -> None:
    state = torch.get_rng_state()
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert find_gate(Experts()) == GluOptions("silu", limit=7.0)
    with torch._subclasses.FakeTensorMode():
        assert find_gate(Experts()) == GluOptions("silu", limit=7.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_gate_that_cannot_be_called_is_unknown() -> None:
    module = Experts()
    module.limit = None  # type: ignore[assignment]
    module.act_fn = nn.Bilinear(1, 1, 1)
    assert find_gate(module) is None
