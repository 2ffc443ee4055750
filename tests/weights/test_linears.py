# SPDX-License-Identifier: BSD-3-Clause
"""Stored linear layers: results, gradients, state dicts, copies, which layers stay plain, and all or nothing."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from form_cases import FormCase, distance, forms
from torch import Tensor, nn

import switchgear
from errors import raises
from switchgear.layers import StoredLinear
from switchgear.weights import Int4, Int8, encode, stored_of


class Block(nn.Module):
    """Dense layers around experts, with a gate and tied embeddings."""

    def __init__(self, size: int = 128, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, size, dtype=dtype)
        self.q_proj = nn.Linear(size, 2 * size, dtype=dtype)
        self.o_proj = nn.Linear(2 * size, size, bias=False, dtype=dtype)
        self.gate = nn.Linear(size, 3, dtype=dtype)
        self.head = nn.Linear(size, 16, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.o_proj(self.q_proj(x)) * self.gate(x).mean(-1, keepdim=True))
        return y


def stored_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if stored_of(module) is not None]


@forms
def test_results_and_gradients(backend: str, case: FormCase) -> None:
    if backend.startswith(("simt", "cuda")) and case.is_exact:
        pytest.skip(f"{case} is for the CPU")
    plain = nn.Linear(case.hidden_size, 2 * case.intermediate_size, dtype=torch.bfloat16)
    stored = copy.deepcopy(plain)
    done = switchgear.store(stored, None, linears=case.form)
    assert (done.form, done.modules, done.lossless) == (case.form, 1, case.is_exact)
    assert type(stored) is StoredLinear
    assert isinstance(stored, nn.Linear)
    assert [name for name, _ in stored.named_parameters()] == ["bias"]
    assert str(case.form) in repr(stored)
    decoded = encode(plain.weight[None].detach(), case.form).plain()[0]
    x = torch.randn(2, 3, case.hidden_size).bfloat16().requires_grad_()
    y = stored(x)
    assert distance(y, plain(x)) <= case.error + 0.01
    y.backward(grad := torch.randn_like(y))
    assert distance(x.grad, grad @ decoded) < 0.01
    assert distance(stored.bias.grad, grad.flatten(0, 1).sum(0)) < 0.01
    for twin in (copy.deepcopy(stored), pickle.loads(pickle.dumps(stored))):
        assert torch.equal(twin(x), y)


@forms
def test_state_dicts_and_restore(case: FormCase) -> None:
    plain, other = (nn.Linear(case.hidden_size, 2 * case.intermediate_size, dtype=torch.bfloat16) for _ in range(2))
    stored, twin = copy.deepcopy(plain), copy.deepcopy(other)
    for linear in (stored, twin):
        switchgear.store(linear, None, linears=case.form)
    x = torch.randn(2, case.hidden_size).bfloat16()
    state = stored.state_dict()
    assert set(state) == {"bias", *(f"weight{suffix}" for suffix in case.form.suffixes or [""])}
    twin.load_state_dict(state)
    assert torch.equal(twin(x), stored(x))
    twin.load_state_dict(other.state_dict())  # plain weights are encoded
    assert not torch.equal(twin(x), stored(x))
    twin.load_state_dict(plain.state_dict())
    assert torch.equal(twin(x), stored(x))
    y = stored(x)
    if case.is_exact:
        switchgear.restore(stored)
        assert torch.equal(stored.weight, plain.weight)
    else:
        with pytest.warns(RuntimeWarning):
            switchgear.restore(stored)
    assert type(stored) is nn.Linear
    assert stored.weight.shape == plain.weight.shape
    assert distance(stored(x), y) < 0.02


def test_experts_and_linears_have_forms_of_their_own() -> None:
    model = nn.ModuleList([switchgear.MoE(64, 32, num_experts=4, top_k=2), Block(64, torch.float32)])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    done = switchgear.store(model, "int4", linears=Int8(group_size=32), keep_plain=True)
    assert stored_names(model) == ["0.experts", "1.q_proj", "1.o_proj"]
    assert done.linears is not None
    assert (done.modules, done.form, done.linears.modules, done.linears.form) == (1, Int4(), 2, Int8(32))
    assert switchgear.store(model, None, linears=Int8(group_size=32)).modules == 2  # nothing to do
    assert switchgear.restore(model) == 3
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_which_layers_stay_plain() -> None:
    """By default gates; always those that share their weight with other modules, and other classes."""

    class Special(nn.Linear):
        pass

    def names(skip: Any = None) -> list[str]:
        model = nn.ModuleDict({"a": Block(), "b": Special(32, 32), "router": nn.ModuleList([nn.Linear(32, 32)])})
        switchgear.store(model, None, linears="int8", **({} if skip is None else {"skip": skip}))
        return stored_names(model)

    assert names() == ["a.q_proj", "a.o_proj"]
    assert names(["router"]) == ["a.q_proj", "a.o_proj", "a.gate"]
    assert names(["a.*", "x"]) == ["router.0"]
    assert names([]) == ["a.q_proj", "a.o_proj", "a.gate", "router.0"]


def test_shared_weights_stay_shared() -> None:
    model = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])
    model[1].weight = model[0].weight
    switchgear.store(model, None, linears="int8", keep_plain=True)
    first, second = (stored_of(layer).weights(layer)[0] for layer in model)
    assert first.data.data_ptr() == second.data.data_ptr()
    switchgear.restore(model)
    assert model[1].weight is model[0].weight


@pytest.mark.parametrize("low_memory", [False, True])
def test_all_or_nothing(low_memory: bool) -> None:
    """A failure in the second kind undoes the first."""
    model = nn.ModuleList([switchgear.MoE(64, 32, num_experts=4, top_k=2, dtype=torch.bfloat16), Block(64)])
    model[1].o_proj.weight.data[0, 0] = torch.inf
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with raises(ValueError, "model.1.o_proj.weight"):
        switchgear.store(model, "plain", linears="int8", low_memory=False)
    assert not stored_names(model)
    assert type(model[1].q_proj) is nn.Linear
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_compiles_in_one_graph() -> None:
    linear = nn.Linear(64, 32)
    switchgear.store(linear, None, linears="int8")
    x = torch.randn(2, 64)
    torch.compiler.reset()
    assert torch.equal(torch.compile(linear, backend="eager", fullgraph=True)(x), linear(x))


def test_auto() -> None:
    done = switchgear.store(Block(), None, linears="auto", lossless=False)
    assert done.is_of_linears
    assert done.reason
    assert done.form.name in ("int4", "plain")


def test_the_weight_of_a_stored_layer_tells_its_shape_and_refuses_use() -> None:
    linear: Any = nn.Linear(32, 64, dtype=torch.bfloat16)
    switchgear.store(linear, None, linears="int8")
    for weight in (linear.weight, copy.deepcopy(linear).weight):
        assert (weight.shape, weight.dtype, weight.device) == ((64, 32), torch.bfloat16, torch.device("cpu"))
    for use in (lambda: linear.weight.data, lambda: linear.weight + 1, lambda: torch.sum(linear.weight)):
        with pytest.raises(AttributeError, match="restore"):
            use()


def test_errors() -> None:
    model = Block()
    with raises(ValueError, "form"):
        switchgear.store(model, None)
    with raises(TypeError, "skip"):
        switchgear.store(model, None, linears="int8", skip="head")
    with raises(ValueError, "model"):
        switchgear.store(model, None, linears="int8", skip=["*"])
    with raises(ValueError, "model"):
        switchgear.store(model, "int8", linears="int8")  # no experts
    model.q_proj.forward = lambda x: x
    with raises(ValueError, "model.q_proj"):
        switchgear.store(model, None, linears="int8")
    assert not stored_names(model)
