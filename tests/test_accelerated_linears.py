# SPDX-License-Identifier: BSD-3-Clause
"""accelerate(linears=True): the calls, gradients and results of torch's linears, and their own forward elsewhere."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.utils import parametrize

pytest.importorskip("transformers", reason="transformers is not installed")

from switchgear import functional, testing
from switchgear.integrations import linears
from switchgear.integrations.moe_blocks import moe_blocks
from switchgear.integrations.transformers import accelerate, undo_accelerate
from switchgear.testing import assert_close, exact
from tiny_models import build, example_inputs


def make(columns: int = 96, width: int = 144, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    linear = nn.Linear(columns, width, bias=bias, dtype=dtype)
    accelerate(linear, linears=True)
    return linear


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The results of linears that ran here."""
    seen: list[Tensor] = []
    real = linears.multiply

    def spied(*args: Any) -> Tensor | None:
        if (out := real(*args)) is not None:
            seen.append(out)
        return out

    monkeypatch.setattr(linears, "multiply", spied)
    return seen


@pytest.mark.in_turns
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [8, 144, 600])  # a router, matrices that some instruction sets pack
def test_a_row_has_the_same_bits_in_any_batch(backend: str, dtype: torch.dtype, width: int) -> None:
    linear = make(160, width, dtype=dtype)
    x = torch.randn(300, 160).to(dtype)
    with torch.no_grad():
        out = linear(x)
        offsets = torch.tensor([0, len(x)], dtype=torch.int32)
        want = testing.gemm(exact(x), linear.weight[None], linear.bias[None], offsets)
        assert_close(out, want.rounded(dtype))
        if backend == "reference":  # which is torch
            return
        for first, last in ((0, 1), (7, 8), (0, 4), (5, 12), (3, 35), (100, 300)):
            assert torch.equal(linear(x[first:last]), out[first:last])
        assert torch.equal(functional.gate(x, linear.weight, linear.bias), out)
    assert torch.equal(linear(x).detach(), out)  # with a graph


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_a_model(name: str, calls: list[Tensor]) -> None:
    model: Any = build(name).eval()
    inputs = example_inputs(model)
    with torch.no_grad():
        want = model(**inputs).logits
        replaced = accelerate(model, linears=True)
        got = model(**inputs).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    names = [r.name for r in replaced if r.path == "linear"]
    routers = {module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")}
    assert routers
    expected = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or m in routers]
    assert names == expected
    assert len(calls) == len(expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(**inputs).logits, got, rtol=1e-4, atol=1e-5)
    undo_accelerate(replaced)
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "granitemoe"])
def test_a_token_of_a_block_does_not_depend_on_its_batch(name: str, isa: str) -> None:
    """Its router's product is ours, too. torch's fails this."""
    model: Any = build(name).eval()
    accelerate(model, linears=True)
    block: Any = next(iter(moe_blocks(model).values())).block
    x = torch.randn(1, 50, model.config.hidden_size)

    def rows(x: Tensor) -> Tensor:
        out = block(x)
        return (out if isinstance(out, Tensor) else out[0]).flatten(0, -2)

    assert torch.equal(rows(x), torch.cat([rows(x[:, token : token + 1]) for token in range(50)]))


def test_gradients_are_those_of_torch(calls: list[Tensor]) -> None:
    linear, x = make(), torch.randn(9, 96, requires_grad=True)
    plain, y = copy.deepcopy(linear), x.detach().clone().requires_grad_()
    undo = vars(plain).pop("forward")
    assert undo is not None
    for module, inputs in ((linear, x), (plain, y)):
        loss = module(inputs).square().mean()
        (grad,) = torch.autograd.grad(loss, inputs, create_graph=True)
        (loss + grad.square().sum()).backward()  # a second derivative
    assert len(calls) == 1
    for ours, theirs in ((x, y), (linear.weight, plain.weight), (linear.bias, plain.bias)):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_hooks_see_the_call(calls: list[Tensor]) -> None:
    linear, seen = make(), list[Any]()
    x = torch.randn(2, 3, 96)
    linear.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    linear.register_forward_hook(lambda _, args, out: seen.append(out))
    out = linear(x)
    assert seen[0] is x
    assert seen[1] is out
    assert out.shape == (2, 3, 144)
    assert len(calls) == 1


def test_tied_weights(calls: list[Tensor]) -> None:
    model: Any = nn.ModuleDict({"embed": nn.Embedding(144, 96), "head": nn.Linear(96, 144, bias=False)})
    model["head"].weight = model["embed"].weight
    accelerate(model, linears=True)
    ids = torch.arange(5)
    loss = model["head"](model["embed"](ids)).logsumexp(-1).sum()
    loss.backward()
    weight = model["embed"].weight.detach().clone().requires_grad_()
    (weight[ids] @ weight.mT).logsumexp(-1).sum().backward()
    torch.testing.assert_close(model["embed"].weight.grad, weight.grad)
    assert len(calls) == 1


class Own(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def test_a_subclass_with_its_own_forward_is_left_alone() -> None:
    model = nn.Sequential(Own(16, 16), nn.Linear(16, 16))
    assert [replacement.name for replacement in accelerate(model, linears=True)] == ["1"]


def in_autocast(linear: nn.Linear, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return linear(x)


def traced(linear: nn.Linear, x: Tensor) -> Tensor:
    out: Tensor = torch.jit.trace(linear, x, check_trace=False)(x)
    return out


def tangent(linear: nn.Linear, x: Tensor) -> Tensor:
    return torch.func.jvp(linear, (x,), (x,))[1]


ELSEWHERE: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "autocast": in_autocast,
    "compile": lambda linear, x: torch.compile(linear, backend="eager", fullgraph=True)(x),
    "double": lambda linear, x: linear.double()(x.double()),
    "forward mode": tangent,
    "trace": traced,
    "vmap": lambda linear, x: vmap(linear)(x),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("case", ELSEWHERE)
def test_torch_runs_all_else(case: str, calls: list[Tensor]) -> None:
    linear, x = make(), torch.randn(4, 96)
    plain = copy.deepcopy(linear)
    del plain.forward
    assert torch.equal(ELSEWHERE[case](linear, x), ELSEWHERE[case](plain, x))
    assert not calls


def test_weights_that_are_computed_or_given(calls: list[Tensor]) -> None:
    linear, x = make(bias=False), torch.randn(4, 96)
    other = torch.randn(144, 96)
    with torch.no_grad():
        torch.testing.assert_close(functional_call(linear, {"weight": other}, (x,)), x @ other.mT)
        parametrize.register_parametrization(linear, "weight", nn.Tanh())
        torch.testing.assert_close(linear(x), x @ linear.weight.mT)
    assert len(calls) == 2


@pytest.mark.parametrize("x", [torch.ones(2, 95), torch.ones(2, 96, dtype=torch.int64)], ids=("shape", "dtype"))
def test_torch_explains_what_is_wrong(x: Tensor) -> None:
    for linear in (make(), make().requires_grad_(False)):
        with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|same dtype"):
            linear(x)


def test_adapters_of_peft(calls: list[Tensor]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    grads, outputs = [], []
    for is_ours in (False, True):
        torch.manual_seed(0)
        model = build("olmoe").eval()
        inputs = example_inputs(model)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(model, config)
        accelerate(adapted, linears=is_ours)
        out = adapted(**inputs).logits
        out.square().mean().backward()
        outputs.append(out.detach())
        grads.append([p.grad for n, p in adapted.named_parameters() if "lora_" in n])
    assert calls
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    assert grads[0]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-6)
