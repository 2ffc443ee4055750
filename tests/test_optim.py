# SPDX-License-Identifier: BSD-3-Clause
"""Muon on stacked experts against torch.optim.Muon on separate matrices."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import switchgear
from errors import raises
from switchgear import finetune, optim
from switchgear.integrations.moe_blocks import moe_blocks
from switchgear.layers import MergedExperts, MonetRouter, SoftMoE, StratifiedMoE

SHAPES = ((5, 24, 40), (3, 40, 24), (4, 16, 16))
BF16 = torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    "options", [{}, {"nesterov": False, "momentum": 0.8}, {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0}]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_update_of_torch(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """The same steps as torch.optim.Muon on each expert's matrix. Both iterate in bfloat16, in batches or one by one,
    so an orthogonalised element, of size 1, differs by a few of its roundings: 5 steps of 3 products."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(shape))
    separate = [nn.Parameter(matrix.detach().clone()) for matrix in stack]
    lr, steps = 0.02, 4
    ours, theirs = optim.Muon([stack], lr, **options), torch.optim.Muon(separate, lr, **options)
    for _ in range(steps):
        grad = torch.randn(shape)
        stack.grad = grad
        for matrix, part in zip(separate, grad, strict=True):
            matrix.grad = part.clone()
        ours.step()
        theirs.step()
    for matrix, part, mine in zip(separate, stack, ours.state[stack]["momentum_buffer"], strict=True):
        assert torch.equal(theirs.state[matrix]["momentum_buffer"], mine)
        ratio = 0.2 * max(shape[1:]) ** 0.5 if "adjust_lr_fn" in options else max(1, shape[1] / shape[2]) ** 0.5
        assert (matrix - part).abs().max() <= steps * lr * ratio * 15 * BF16
        assert (matrix - part).norm() <= 0.05 * steps * lr * ratio * matrix.numel() ** 0.5


def test_a_matrix_does_not_depend_on_the_others() -> None:
    """Experts without gradients are zero, others have about orthogonal rows."""
    torch.manual_seed(0)
    stack = torch.randn(4, 12, 30)
    stack[1] = 0
    result = optim.orthogonalized(stack)
    assert not result[1].any()
    values = torch.linalg.svdvals(result[[0, 2, 3]].float())
    assert 0.6 < values.min() <= values.max() < 1.3
    alone = optim.orthogonalized(stack[2:3])
    assert (alone[0] - result[2]).abs().max() <= 15 * BF16
    assert optim.orthogonalized(stack.mT).shape == (4, 30, 12)
    assert (optim.orthogonalized(stack.mT).mT - result).abs().max() <= 15 * BF16


def test_state_and_missing_gradients() -> None:
    torch.manual_seed(0)
    first, second = nn.Parameter(torch.randn(2, 4, 6)), nn.Parameter(torch.randn(4, 6))
    optimizer = optim.Muon([{"params": [first], "lr": 0.1}, {"params": [second]}])
    before = second.detach().clone()
    first.grad = torch.randn(2, 4, 6)
    assert optimizer.step(lambda: 3) == 3
    assert torch.equal(second, before)
    other = optim.Muon([{"params": [copy.deepcopy(first)], "lr": 0.1}, {"params": [copy.deepcopy(second)]}])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin = other.param_groups[0]["params"][0]
    twin.grad = first.grad.clone()
    optimizer.step()
    other.step()
    assert torch.equal(first, twin)


def test_groups_of_a_model() -> None:
    model = nn.Sequential()
    model.add_module("embedding", nn.Embedding(10, 8))
    model.add_module("moe", switchgear.MoE(8, 6, 4, 2, bias=True, num_shared_experts=1))
    model.add_module("norm", nn.LayerNorm(8))
    model.add_module("head", nn.Linear(8, 10))
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def named(parameters: list[nn.Parameter]) -> set[str]:
        return {names[id(parameter)] for parameter in parameters}

    matrices, rest = optim.muon_groups(model, others=["head"])
    assert len(matrices) + len(rest) == len(list(model.parameters()))
    shared = {name for name in names.values() if name.startswith("moe.shared") and name.endswith("weight")}
    assert named(matrices) == {"moe.experts.gate_up_proj", "moe.experts.down_proj"} | shared
    assert named(optim.muon_groups(model, others="head")[0]) == named(matrices)
    with raises(ValueError):
        optim.muon_groups(model, others=["lm_head"])
    with raises(TypeError, "model"):
        optim.muon_groups([])
    finetune.freeze_except(model, {"moe": [1, 2]})
    matrices, rest = optim.muon_groups(model)
    assert [list(parameter.shape) for parameter in matrices] == [[2, 12, 8], [2, 8, 6]]
    assert [list(parameter.shape) for parameter in rest] == [[2, 12], [2, 8]]


def test_vectors_routers_and_convolutions_are_no_matrices() -> None:
    model = nn.Module()
    model.stratified = StratifiedMoE(8, 6, [2, 2])
    model.soft = SoftMoE(switchgear.Experts(8, 6, 4))
    model.virtual = switchgear.MoE(8, 6, 4, 2, constant_experts=2, mix_constants=True, shared_intermediate_size=6,
                                   shared_gate=True)  # fmt: skip
    model.merged = MergedExperts(switchgear.Router(8, 4, 2), switchgear.Experts(8, 6, 4), pooling="attention")
    model.monet = MonetRouter(8, 4, 2, top_k=2)
    model.conv1d = nn.Conv1d(8, 8, 4, groups=8)
    model.A_log = nn.Parameter(torch.zeros(8, 4))
    matrices, rest = optim.muon_groups(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert len(matrices) + len(rest) == len(names)
    for parameter in matrices:
        assert names[id(parameter)].endswith(("gate_up_proj", "down_proj", "_proj.weight"))
    assert len(matrices) == 4 * 2 + 3  # stacks of experts, and a shared one


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "llama4_text", "jetmoe"])
def test_routers_of_hugging_face_are_no_matrices(model_type: str) -> None:
    tiny = pytest.importorskip("tiny_models", reason="transformers is not installed")
    model = tiny.build(model_type)
    routers = {id(p) for block in moe_blocks(model).values() for p in block.gate.parameters()}
    matrices, rest = optim.muon_groups(model, others=["lm_head"])
    assert routers
    assert routers <= {id(parameter) for parameter in rest}
    assert {p.dim() for p in matrices} == {2, 3}


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_a_transposed_layer_takes_the_same_steps(adjust: str) -> None:
    """[E,in,out] are the same matrices as [E,out,in], with the same rate."""
    usual = switchgear.Experts(16, 48, 3)
    other = switchgear.Experts(16, 48, 3, transposed=True)
    before = [parameter.detach().clone() for parameter in usual.parameters()]
    for mine, parameter in zip(other.parameters(), usual.parameters(), strict=True):
        mine.data.copy_(parameter.mT)
        parameter.grad = torch.randn_like(parameter)
        mine.grad = parameter.grad.mT.contiguous()
    for layer in (usual, other):
        matrices, _ = optim.muon_groups(layer)
        assert len(matrices) == 2
        optim.Muon(matrices, 0.1, adjust_lr_fn=adjust).step()
    for mine, parameter, old in zip(other.parameters(), usual.parameters(), before, strict=True):
        moved = (parameter - old).norm()
        assert (mine.mT - parameter).norm() <= 0.05 * moved  # both iterate in bfloat16


@pytest.mark.parametrize("transposed", [False, True])
def test_factors_of_adapters_are_never_transposed(transposed: bool) -> None:
    """They have [E,r,in] and [E,out,r] in both layouts, so each matrix takes the step of a matrix on its own."""
    layer = switchgear.Experts(16, 48, 3, transposed=transposed)
    switchgear.adapters.add_lora(layer, rank=2)
    factors = {name: p for name, p in layer.named_parameters() if "_lora_" in name}
    for parameter in factors.values():
        parameter.grad = torch.randn_like(parameter)
    before = {name: parameter.detach().clone() for name, parameter in factors.items()}
    alone = [[nn.Parameter(matrix.clone()) for matrix in parameter] for parameter in before.values()]
    for matrices, parameter in zip(alone, factors.values(), strict=True):
        for matrix, grad in zip(matrices, parameter.grad, strict=True):
            matrix.grad = grad.clone()
    matrices, _ = optim.muon_groups(layer)
    assert {id(p) for p in matrices} == {id(p) for p in factors.values()}
    optim.Muon(matrices, 0.1).step()
    optim.Muon([matrix for matrices in alone for matrix in matrices], 0.1).step()
    for own, (name, parameter) in zip(alone, factors.items(), strict=True):
        moved = (parameter - before[name]).norm()
        assert (torch.stack(own) - parameter).norm() <= 0.05 * moved  # both iterate in bfloat16


def test_rows_trained_alone_are_transposed_as_their_projection() -> None:
    layer = switchgear.Experts(16, 48, 3, transposed=True)
    finetune.freeze_except(layer, {"": [1]})
    matrices, _ = optim.muon_groups(layer)
    assert [p.is_transposed for p in matrices] == [True, True]


def test_a_rate_in_a_tensor() -> None:
    grad = torch.randn(3, 4)
    steps = []
    for lr in (0.02, torch.tensor(0.02, dtype=torch.float64), torch.tensor([0.02], dtype=torch.float64)):
        parameter = nn.Parameter(torch.ones(3, 4))
        parameter.grad = grad.clone()
        optim.Muon([parameter], lr=lr).step()
        steps.append(parameter.detach())
    assert torch.equal(steps[0], steps[1])
    assert torch.equal(steps[0], steps[2])


def test_it_trains() -> None:
    torch.manual_seed(0)
    moe = switchgear.MoE(16, 16, 4, 2)
    matrices, rest = optim.muon_groups(moe)
    optimizers = optim.Muon(matrices, 0.02), torch.optim.AdamW(rest, 1e-2)
    losses = []
    for step in range(40):
        x = torch.randn(128, 16, generator=torch.Generator().manual_seed(step))
        loss = (moe(x) - x.roll(1, -1)).square().mean()
        moe.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_errors() -> None:
    with raises(ValueError):
        optim.Muon([nn.Parameter(torch.zeros(3))])
    matrix = nn.Parameter(torch.zeros(3, 3))
    muon = optim.Muon([matrix])
    with raises(ValueError, "params"):
        muon.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(muon.param_groups) == 1
    wrong = {"lr": -1.0, "momentum": -0.1, "eps": -1.0, "ns_steps": 100, "ns_coefficients": (1.0, 2.0)}
    for name, value in {**wrong, "adjust_lr_fn": "none"}.items():
        with raises(ValueError, name):
            optim.Muon([matrix], **{name: value})
        with raises(ValueError, name):
            optim.Muon([{"params": [matrix], name: value}])
    for name, value in {"lr": "x", "eps": None, "ns_steps": 1.5, "ns_coefficients": (1.0, 2.0, "x")}.items():
        with raises(TypeError, name):
            optim.Muon([matrix], **{name: value})


def test_parameters_without_elements_stay() -> None:
    empty = nn.Parameter(torch.zeros(3, 0, 4))
    empty.grad = torch.zeros(3, 0, 4)
    optim.Muon([empty]).step()
    assert empty.shape == (3, 0, 4)
