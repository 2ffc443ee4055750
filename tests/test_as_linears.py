# SPDX-License-Identifier: BSD-3-Clause
"""as_linears: what tools see inside the block, what lands in the stacks, and that nothing is left of it outside."""

from __future__ import annotations

import copy
import inspect
import types
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import switchgear
from errors import raises
from model_types import sampled
from switchgear import MoE, as_linears
from switchgear.trace import observe

E, H, I, K, T = 4, 16, 12, 2, 10  # noqa: E741
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def build_layer(**options: Any) -> MoE:
    torch.manual_seed(0)
    return MoE(H, I, E, K, **options)


def linears_in(model: nn.Module) -> dict[tuple[str, int, str], nn.Linear]:
    """(experts, expert, projection): the linear layers of routed experts."""
    found = {}
    for name, module in model.named_modules():
        owner, _, projection = name.rpartition(".")
        experts, _, expert = owner.rpartition(".")
        if projection in PROJECTIONS and expert.isdigit() and isinstance(module, nn.Linear):
            found[experts, int(expert), projection] = module
    return found


def describe(model: nn.Module) -> Any:
    """All that must be the same after the block: modules, attributes, and parameters by identity and order."""
    attributes = [(name, sorted(vars(module))) for name, module in model.named_modules()]
    return attributes, [(name, id(p)) for name, p in model.named_parameters()], list(model.state_dict())


def is_close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(got, want, rtol=10 * tolerance, atol=tolerance * float(want.detach().abs().max()))


OPTIONS: dict[str, dict[str, Any]] = {
    "gated": {},
    "plain": {"gated": False, "activation": "relu2"},
    "interleaved": {"interleaved": True, "bias": True, "activation": "swiglu_oai", "limit": 2.0},
    "transposed": {"transposed": True, "bias": True},
    "both": {"transposed": True, "interleaved": True},
    "virtual": {"null_experts": 2, "copy_experts": 1},
    "scaled": {"scale_input": True, "shared_intermediate_size": I},
    "function": {"activation": lambda gate, up: torch.tanh(gate) * up},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_rows_and_gradients(options: dict[str, Any]) -> None:
    moe = build_layer(**options)
    x = torch.randn(2, T, H, requires_grad=True)
    y = moe(x)
    y.square().sum().backward()
    wanted = {name: parameter.grad.clone() for name, parameter in moe.named_parameters() if parameter.grad is not None}
    x_grad, x.grad, before = x.grad, None, describe(moe)
    counts = torch.bincount(moe.gate(x.flatten(0, 1)).topk_ids.flatten(), minlength=E)[:E].tolist()
    rows: dict[tuple[str, int, str], int] = {}
    grads: dict[tuple[str, int, str], Tensor] = {}
    with as_linears(moe):
        layers = linears_in(moe)
        assert [key[1:] for key in layers if key[0] == next(iter(layers))[0]] == [
            (e, name) for e in range(E) for name in PROJECTIONS[not options.get("gated", True) :]
        ]
        for key, layer in layers.items():
            layer.register_forward_hook(lambda _, args, out, key=key: rows.update({key: len(out)}))
            layer.register_full_backward_hook(lambda _, into, out, key=key: grads.update({key: out[0]}))
        inside = moe(x)
        inside.square().sum().backward()
        assert all(len(grads[key]) == count for key, count in rows.items())
    assert {key: rows.get(key, 0) for key in layers} == {key: counts[key[1]] for key in layers}
    assert is_close(inside, y)
    assert is_close(x.grad, x_grad)
    assert describe(moe) == before
    for name, parameter in moe.named_parameters():
        if name in wanted:  # accumulated
            assert is_close(parameter.grad, 2 * wanted[name]), name
    assert torch.equal(moe(x), y)


def test_inputs_of_an_expert() -> None:
    moe, x = build_layer(), torch.randn(T, H)
    ids = moe.gate(x).topk_ids
    seen = {}
    with as_linears(moe):
        for (_, e, name), layer in linears_in(moe).items():
            layer.register_forward_hook(lambda _, args, out, key=(e, name): seen.update({key: (args[0], out)}))
        moe(x)
    for (e, name), (rows, out) in seen.items():
        first, second = moe.experts.gate_up_proj[e].chunk(2)
        weight = {"gate_proj": first, "up_proj": second, "down_proj": moe.experts.down_proj[e]}[name]
        if name != "down_proj":
            assert torch.equal(rows, x[(ids == e).any(1)])
        assert torch.equal(out, F.linear(rows, weight))


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_optimizers(where: str) -> None:
    """Steps inside are those outside, with an optimizer of either side, and set_to_none is respected."""
    moe, x = build_layer(), torch.randn(3, T, H)
    plain = copy.deepcopy(moe)

    def train(layer: MoE, optimizer: torch.optim.Optimizer) -> None:
        for batch in x:
            optimizer.zero_grad()
            layer(batch).square().sum().backward()
            optimizer.step()

    train(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
    stacks = list(moe.parameters())
    with as_linears(moe):
        optimizer = torch.optim.SGD(stacks if where == "outside" else moe.parameters(), lr=0.1)
        train(moe, optimizer)
        optimizer.zero_grad()
    for (name, got), want in zip(moe.named_parameters(), plain.parameters(), strict=True):
        assert is_close(got, want), name
        assert got.grad is None or not got.grad.any(), name


def test_gradients_of_layers_that_did_not_train() -> None:
    moe = build_layer().requires_grad_(False)
    with as_linears(moe):
        layer = moe.get_submodule("experts.1.down_proj")
        layer.weight.requires_grad_().grad = torch.ones(H, I)
    assert moe.experts.down_proj.grad.flatten(1).sum(1).tolist() == [0, H * I, 0, 0]
    assert moe.experts.gate_up_proj.grad is None
    assert not moe.experts.down_proj.requires_grad


# ---- values ----------------------------------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A linear layer with an adapter, whose weight alone is not what it computes."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a, self.b = torch.randn(2, base.in_features), torch.randn(base.out_features, 2)
        self.dropout = nn.Dropout(0.5)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.dropout(x) @ self.a.mT @ self.b.mT


@torch.no_grad()
def change(how: str, experts: nn.Module) -> Tensor:
    """Changes down_proj of expert 2, and returns its matrix."""
    layer = experts.get_submodule("2.down_proj")
    new = torch.randn_like(layer.weight)
    if how == "in place":
        layer.weight.copy_(new)
    elif how == "data":
        layer.weight.data = new
    elif how == "parameter":
        layer.weight = nn.Parameter(new)
    elif how == "double":
        experts.double()
        layer.weight.copy_(new)
    elif how == "module":
        experts.get_submodule("2").down_proj = adapted = LowRank(layer)
        new = layer.weight + adapted.b @ adapted.a
    elif how == "parametrized":
        torch.nn.utils.parametrize.register_parametrization(layer, "weight", nn.Tanh())
        new = layer.weight.clone()
    elif how == "forward":
        layer.forward = lambda x: F.linear(x, new, layer.bias)
    return new


HOW = ["in place", "data", "parameter", "double", "module", "parametrized", "forward", "experts"]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("how", HOW)
def test_what_lands(how: str, transposed: bool) -> None:
    moe = build_layer(bias=True, transposed=transposed, interleaved=True)
    before, old = describe(moe), {name: p.clone() for name, p in moe.named_parameters()}
    with as_linears(moe):
        if how == "experts":  # as tools do that have modules of their own for experts
            moe.experts = nn.ModuleDict(copy.deepcopy(dict(moe.experts.named_children())))
        new = change("in place" if how == "experts" else how, moe.experts)
    assert describe(moe) == before
    for name, parameter in moe.named_parameters():
        same = parameter == old[name]
        if name == "experts.down_proj":
            assert is_close(parameter[2].mT if transposed else parameter[2], new)
            same = same[[0, 1, 3]]
        assert same.all(), name
        assert parameter.dtype is torch.float32


REFUSED: dict[str, Callable[[Any], None]] = {
    "shape": lambda expert: setattr(expert, "up_proj", nn.Linear(H, I + 1)),
    "bias": lambda expert: setattr(expert, "up_proj", nn.Linear(H, I, bias=False)),
    "gone": lambda expert: delattr(expert, "up_proj"),
    "meta": lambda expert: setattr(expert, "up_proj", nn.Linear(H, I, device="meta")),
    "no product": lambda expert: setattr(expert, "up_proj", nn.Sequential(expert.up_proj, nn.ReLU())),
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
def test_what_cannot_land(make: Callable[[Any], None]) -> None:
    moe = nn.Sequential(build_layer(bias=True), build_layer(bias=True))
    before, old = describe(moe), [parameter.clone() for parameter in moe.parameters()]
    with raises(ValueError, "up_proj"), as_linears(moe):
        moe[0].experts.get_submodule("0").down_proj.weight = nn.Parameter(torch.zeros(H, I))
        make(moe[1].experts.get_submodule("3"))
    assert describe(moe) == before
    assert all(torch.equal(*pair) for pair in zip(moe.parameters(), old, strict=True))


def test_a_block_that_is_gone() -> None:
    model = nn.Sequential(build_layer())
    with raises(ValueError, "model"), as_linears(model):
        model[0] = nn.Identity()


def test_what_tools_find() -> None:
    """No stacked parameters, and the names of the arguments, by which tools keep calls and repeat them."""
    moe, x = build_layer(bias=True), torch.randn(T, H)
    choice = moe.gate(x)
    with as_linears(moe):
        assert not any(isinstance(value, nn.Parameter) for value in vars(moe.experts).values())
        bound = inspect.signature(moe.experts.forward).bind(x, choice.topk_ids, choice.topk_weights)
        y = moe.experts(**dict(reversed(bound.arguments.items())))
        assert torch.equal(y, moe.experts(*bound.args))


def test_exceptions() -> None:
    moe = build_layer()
    before, old = describe(moe), moe.experts.down_proj.clone()
    with raises(KeyError), as_linears(moe):
        moe.experts.get_submodule("0").down_proj.weight = nn.Parameter(torch.zeros(H, I))
        raise KeyError
    assert describe(moe) == before
    assert torch.equal(moe.experts.down_proj, old)


def _replace_forward(moe: MoE) -> None:
    moe.experts.forward = lambda *args: args[0]  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "prepare",
    [
        lambda moe: switchgear.store(moe, "int8"),
        lambda moe: switchgear.adapters.add_lora(moe, 2),
        _replace_forward,
        lambda moe: moe.__setattr__("experts", nn.Identity()),
    ],
    ids=["stored", "adapters", "forward", "no experts"],
)
def test_what_is_refused(prepare: Callable[[Any], None]) -> None:
    """Nothing of the layer before it changes."""
    moe = nn.Sequential(build_layer(), build_layer())
    prepare(moe[1])
    before = describe(moe)
    with raises(ValueError), as_linears(moe):
        pass
    assert describe(moe) == before
    with raises(ValueError, "model"), as_linears(nn.Linear(H, H)):
        pass
    with raises(TypeError, "model"), as_linears("model"):  # type: ignore[arg-type]
        pass


def test_copies_and_state_dicts() -> None:
    moe, x = build_layer(), torch.randn(T, H)
    with as_linears(moe):
        state, y = {name: tensor.clone() for name, tensor in moe.state_dict().items()}, moe(x)
        twin = copy.deepcopy(moe)
        twin.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in state.items()})
        assert torch.equal(moe(x), y)
        assert not twin(x).any()
    assert state["experts.3.up_proj.weight"].shape == (I, H)
    other = build_layer()
    with as_linears(other), torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
        other.load_state_dict(state)
    assert torch.equal(other(x), moe(x))


# ---- models of transformers ------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_configs import MODEL_TYPES  # noqa: E402
from tiny_models import build, example_inputs  # noqa: E402

MODULES = ("nllb-moe", "switch_transformers")  # whose experts are modules with nn.Linear
STACKED = [model_type for model_type in MODEL_TYPES if model_type not in ("dbrx", "vitpose_backbone", *MODULES)]


@torch.no_grad()
def run(model: nn.Module) -> Tensor:
    torch.manual_seed(0)
    output = model(**example_inputs(model))
    return output if isinstance(output, Tensor) else output[0]


def name_block(name: str) -> str:
    return name.removesuffix("experts").removesuffix(".")


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("model_type", sampled(STACKED))
def test_model_types(model_type: str, accelerated: bool) -> None:
    model = build(model_type)
    if accelerated:
        switchgear.accelerate(model)
    wanted, before = run(model), describe(model)
    counts: dict[str, Tensor] = {}
    rows: dict[tuple[str, int, str], int] = {}

    def count(name: str, seen: Any) -> None:
        ids = seen.topk_ids.flatten()
        name = name_block(name)
        counts[name] = counts.get(name, 0) + torch.bincount(ids[(ids >= 0) & (ids < 8)].long(), minlength=8)

    with as_linears(model):
        layers = {key: layer for key, layer in linears_in(model).items() if not key[0].endswith("mlps")}
        for key, layer in layers.items():
            layer.register_forward_hook(lambda _, args, out, key=key: rows.update({key: rows.get(key, 0) + len(out)}))
        with observe(model, count):
            assert is_close(run(model), wanted, 3e-4)  # loops of layers amplify the last bits
    assert counts
    for key, one in layers.items():
        chosen = counts.get(name_block(key[0]))
        assert rows.get(key, 0) == (0 if chosen is None else chosen[key[1]]), key
        assert one.weight.untyped_storage().data_ptr() in {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert describe(model) == before
    assert torch.equal(run(model), wanted)


@pytest.mark.parametrize("model_type", MODULES)
def test_experts_that_are_modules_stay(model_type: str) -> None:
    model = build(model_type)
    before = describe(model)
    with as_linears(model):
        assert describe(model) == before


def _bind_forward(module: nn.Module) -> None:
    module.forward = types.MethodType(module.forward.__func__, module)  # type: ignore[method-assign]


def _wrap_forward(module: nn.Module) -> None:
    """As libraries do that move weights, and stay."""
    forward = module.forward.__func__  # type: ignore[attr-defined]
    module.forward = lambda *args, **kwargs: forward(module, *args, **kwargs)  # type: ignore[method-assign]


def _replace_dict(module: nn.Module) -> None:
    module._parameters = UserDict(module._parameters)  # type: ignore[assignment]


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "jetmoe"])  # experts have the forward, and their block
@pytest.mark.parametrize("change", [nn.Module.double, _bind_forward, _wrap_forward, _replace_dict])
def test_what_tools_do_to_modules(change: Callable[[nn.Module], Any], model_type: str, accelerated: bool) -> None:
    """Models go on, inside and afterwards."""
    model = build(model_type)
    if accelerated:
        switchgear.accelerate(model)
    wanted = run(model)
    with as_linears(model):
        for module in model.modules():
            change(module)
        assert is_close(run(model).float(), wanted, 3e-4)
    assert is_close(run(model.float()), wanted)
    assert not linears_in(model)


def test_generation_goes_on() -> None:
    """Layers that decode in one native call call the experts inside the block alone."""
    model = build("qwen3_moe")
    switchgear.accelerate(model, whole_layers=True)
    ids, calls = torch.tensor([[3, 4, 5]]), []

    def generate() -> list[int]:
        return model.generate(ids, max_new_tokens=5, do_sample=False)[0].tolist()  # type: ignore[operator, no-any-return]

    tokens = generate()
    with as_linears(model):
        for layer in linears_in(model).values():
            layer.register_forward_hook(lambda *_: calls.append(1))
        assert generate() == tokens
        assert calls
        calls.clear()
    assert generate() == tokens
    assert not calls
