# SPDX-License-Identifier: BSD-3-Clause
"""Upcycling of modules: the MoE layer computes what the dense network computed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import switchgear
from errors import raises
from switchgear import convert
from switchgear.layers.shared import SharedExperts


class Llama(nn.Module):
    def __init__(self, hidden: int = 32, width: int = 48, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, width, bias=bias) for _ in range(2))
        self.down_proj = nn.Linear(width, hidden, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Mixtral(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False), nn.Linear(48, 32)
        self.act_fn = nn.GELU(approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


class Phi3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(32, 96, bias=False), nn.Linear(48, 32, bias=False)
        self.activation_fn = F.silu

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(up * self.activation_fn(gate))


class Gpt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(32, 48), nn.Linear(48, 32), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


MODULES = {
    "llama": Llama,
    "llama with biases": lambda: Llama(bias=True),
    "mixtral": Mixtral,
    "phi3": Phi3,
    "gpt": Gpt,
    "ours": lambda: SharedExperts(32, 48),
    "ours, plain": lambda: SharedExperts(32, 48, activation="relu2", gated=False),
}


def loop(mlp: nn.Module, moe: switchgear.MoE, x: Tensor, top_k: int, after: bool = True) -> Tensor:
    """The paper's layer in float64: TopK of the logits, then softmax (or before), each expert the dense network."""
    logits = x.double() @ moe.gate.weight.detach().double().T
    y = torch.zeros(len(x), x.shape[1], dtype=torch.float64)
    dense = mlp.double()(x.double()).detach()
    for token, row in enumerate(logits):
        best = row.topk(top_k)
        weights = best.values.softmax(0) if after else row.softmax(0)[best.indices]
        for weight in weights:
            y[token] += weight * dense[token]
    mlp.float()
    return y


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("name", MODULES)
def test_row53_upcycled_layer_is_the_dense_network(name: str, top_k: int) -> None:
    mlp = MODULES[name]()
    moe = convert.upcycle(mlp, 5, top_k, router_init=3.0)  # any router
    x = torch.randn(17, 32)
    expected = mlp(x)
    assert moe(x).sub(expected).abs().max() < 1e-5
    assert moe(x).double().sub(loop(mlp, moe, x, top_k)).abs().max() < 1e-5


LAYOUTS = [{"interleaved": True}, {"transposed": True}, {"interleaved": True, "transposed": True}]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "llama with biases"])
def test_upcycled_experts_of_any_layout(name: str, layout: dict[str, bool]) -> None:
    mlp, x = MODULES[name]().double(), torch.randn(17, 32, dtype=torch.float64)
    assert convert.upcycle(mlp, 5, 2, **layout)(x).sub(mlp(x)).abs().max() < 1e-12


def test_row53_softmax_before_topk_is_no_identity() -> None:
    mlp = Llama()
    moe = convert.upcycle(mlp, 8, 2, normalize=False, router_init=1.0)
    x = torch.randn(17, 32)
    assert moe(x).sub(mlp(x)).abs().max() > 1e-3
    assert moe(x).double().sub(loop(mlp, moe, x, 2, after=False)).abs().max() < 1e-5


def test_row53_noise_is_of_the_stated_size_and_seeded() -> None:
    mlp = Llama()
    moe, same = (convert.upcycle(mlp, 4, 2, noise=0.1, seed=3) for _ in range(2))
    other = convert.upcycle(mlp, 4, 2, noise=0.1, seed=4)
    difference = (moe.experts.down_proj - mlp.down_proj.weight).detach()
    # 4 · 48 · 32 samples: the estimate of a standard deviation is within 1 / √(2n) = 0.9 %, six of them here
    assert abs(float(difference.std()) / 0.1 - 1) < 0.054
    assert torch.equal(moe.experts.down_proj, same.experts.down_proj)
    assert not torch.equal(moe.experts.down_proj, other.experts.down_proj)
    assert not torch.equal(moe.experts.down_proj[0], moe.experts.down_proj[1])


def test_noise_and_router_of_the_next_layer_are_independent() -> None:
    mlps = [Llama() for _ in range(2)]
    model = convert.upcycle(nn.Sequential(*copy.deepcopy(mlps)), 4, 2, noise=0.1, router_init=0.1).model
    noise = model[0].experts.gate_up_proj[0, :4] - mlps[0].gate_proj.weight[:4]
    both = torch.stack([noise.flatten(), model[1].gate.weight.flatten()]).detach()
    assert abs(float(both.corrcoef()[0, 1])) < 5 / both.shape[1] ** 0.5


def test_dropout_that_is_lost_is_noted() -> None:
    class Dropping(Llama):
        def __init__(self) -> None:
            super().__init__()
            self.dropout = nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.dropout(super().forward(x))

    done = convert.upcycle(nn.Sequential(Dropping(), Llama()), 4, 2)
    assert done.notes == ("0: its dropout of 0.1 is not kept",)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Llama()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


def test_row53_model_of_ones_own_in_place_chosen_layers() -> None:
    model = nn.Sequential(Block(), Block(), Block()).eval()
    x = torch.randn(2, 5, 32)
    expected = model(x).detach()
    done = convert.upcycle(model, 4, 2, layers=[0, -1])
    assert done.model is model
    assert [layer.name for layer in done.layers] == ["0.mlp", "2.mlp"]
    assert isinstance(model[0].mlp, switchgear.MoE)
    assert isinstance(model[1].mlp, Llama)
    assert model(x).sub(expected).abs().max() < 1e-5
    routers = [model[0].mlp.gate.weight, model[2].mlp.gate.weight]
    assert not torch.equal(*routers)


def test_a_module_in_two_places_is_replaced_in_both() -> None:
    for convert_all in (
        lambda model: convert.upcycle(model, 4, 2),
        lambda model: convert.distill_layers(model, 4, [torch.randn(8, 32)], top_k=2, steps=0),
    ):
        mlp = Llama()
        model = nn.Sequential(mlp, nn.Sequential(nn.Identity(), mlp))
        assert len(convert_all(model).layers) == 1
        assert isinstance(model[0], switchgear.MoE)
        assert model[1][1] is model[0]


def test_bad_input_changes_nothing() -> None:
    model = nn.Sequential(Block(), Block())
    for options in ({"top_k": 5}, {"top_k": 0}, {"num_experts": 0}, {"layers": [2]}, {"layers": []}, {"layers": "last"},
                    {"noise": -1.0}, {"family": "mixtral"}):  # fmt: skip
        with raises(ValueError, next(iter(options))):
            convert.upcycle(model, **{"num_experts": 4, "top_k": 2, **options})  # type: ignore[arg-type]
    assert all(isinstance(block.mlp, Llama) for block in model)
    with raises(ValueError, "model"):
        convert.upcycle(nn.Linear(4, 4), 2, 1)
    with raises(TypeError):
        convert.upcycle("llama", 2, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("option", [
    {"null_experts": 1}, {"copy_experts": 1}, {"constant_experts": 1}, {"widths": [1, 3]}, {"dtype": torch.bfloat16},
    {"device": "cpu"}, {"bias": True}, {"shared_intermediate_size": 8}, {"num_shared_experts": 1},
], ids=lambda option: next(iter(option)))  # fmt: skip
def test_options_that_the_network_decides_are_named(option: dict[str, object]) -> None:
    mlp, name = SharedExperts(16, 24), next(iter(option))
    calls = (
        lambda: convert.upcycle(mlp, 2, 2, **option),
        lambda: convert.split_dense(mlp, 2, **option),  # type: ignore[arg-type]
        lambda: convert.from_dense_experts([mlp, mlp], **option),  # type: ignore[arg-type]
    )
    for call in calls:
        with raises(ValueError, name):
            call()


def test_a_module_of_another_function_is_refused() -> None:
    class Scaled(Llama):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with raises(ValueError):
        convert.upcycle(Scaled(), 4, 2)


def test_noise_of_a_tensor_depends_on_seed_and_name() -> None:
    draws = [convert.plans.draw_noise(seed, key, (4,)) for seed in (0, 1) for key in ("a", "b")]
    assert len({float(draw[0]) for draw in draws}) == 4
    assert torch.equal(draws[0], convert.plans.draw_noise(0, "a", (4,)))
