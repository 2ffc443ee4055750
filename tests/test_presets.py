# SPDX-License-Identifier: BSD-3-Clause
"""Every preset: its example runs and trains, its layers share nothing, and the page of presets is up to date."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import switchgear
from errors import raises
from pages.presets import page, written
from switchgear import presets
from switchgear.presets.entry import GROUPS, PRESETS, Preset
from switchgear.routing import Router

ENTRIES = [PRESETS[name] for name in sorted(PRESETS)]
each = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)

# Options of MoE only; presets without them also work for a Router.
OF_EXPERTS = {"layer", "num_shared_experts", "widths", "null_experts", "activation", "gated", "return_routing",
              "float32_router", "router_bias", "limit", "bias", "interleaved", "transposed", "scale_input",
              "initialize"}  # fmt: skip


def make_inputs(rows: int = 2, length: int = 12, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors that the page names."""
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(rows, length, 64, generator=generator).to(dtype),
        "token_ids": torch.randint(100, (rows, length), generator=generator),
        "task": torch.randn(rows, 24, generator=generator).to(dtype), "kinds": torch.arange(rows),
    }  # fmt: skip


def call(entry: Preset, layer: nn.Module, tensors: dict[str, Tensor]) -> Tensor:
    """The output of the entry's example."""
    y = layer(tensors["x"], **{name: tensors[tensor] for name, tensor in entry.example.inputs.items()})
    output: Tensor = y[0] if isinstance(y, tuple) else y
    return output


def make_layer(entry: Preset, arguments: dict[str, Any] | None = None, **common: Any) -> nn.Module:
    """The layer of the entry's example."""
    options = {**entry.options(**(arguments or {})), **entry.example.options, **common}
    return presets.build(*entry.example.sizes, **options)


def run(entry: Preset, layer: nn.Module | None = None, **common: Any) -> Any:
    """Output and layer of the entry's example; builds the layer unless it is given."""
    x, dtype = common.pop("x", None), common.get("dtype", torch.float32)
    tensors = make_inputs(dtype=dtype) if x is None else {**make_inputs(*x.shape[:2], dtype), "x": x}
    layer = make_layer(entry, **common) if layer is None else layer
    return call(entry, layer, tensors), layer


def tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


@each
def test_fsdp2_can_shard_all_parameters(entry: Preset) -> None:
    """It refuses scalars."""
    assert all(parameter.dim() > 0 for parameter in run(entry)[1].parameters())


def test_page_is_current() -> None:
    """python tools/pages/presets.py > docs/presets.md"""
    assert (Path(__file__).parents[1] / "docs/presets.md").read_text() == page()


def test_names_are_sorted_and_complete() -> None:
    assert presets.__all__ == sorted(presets.__all__)
    assert len(ENTRIES) == len(presets.__all__) - 1
    assert len({entry.source for entry in ENTRIES}) == len(ENTRIES)


def test_each_preset_says_how_close_it_is_to_its_paper() -> None:
    """Unverified constants are arguments of the preset, as far as they are names."""
    numbers = [entry.number for entry in ENTRIES if entry.number]
    assert len(set(numbers)) == len(numbers)
    texts = [path.read_text() for path in Path(__file__).parent.rglob("test_*.py")]
    named = {int(row) for text in texts for row in re.findall(r"^def test_row(\d+)_", text, re.M)}
    assert set(numbers) <= named
    for entry in ENTRIES:
        assert entry.group in GROUPS
        arguments = inspect.signature(entry.function).parameters
        for constant in entry.unverified.replace(";", ",").split(", "):
            assert " " in constant or not constant or constant in arguments, (entry.name, constant)


# Papers whose router, balance, capacity or layer is a preset.
PAPERS = """
    2101.03961 2202.09368 2401.06066 2408.15664 2501.11873 2103.16716 2403.07652 2406.13233 2408.10681 2204.09179
    2310.10837 2409.12136 2406.06563 2401.13920 2110.07431 2407.09816 2311.10768 2110.04260 2406.12375 2207.09094
    2406.19905 2503.07639 2501.13074 2310.14188 2502.03608 1312.4314 2410.16077 2411.16205 2305.02176 2412.04139
    2412.14711 2404.02258 2410.07348
    2312.09979 2311.02684 2404.08985 2312.00968 2402.05859 2406.12034
    2410.01930 2208.02813 2306.04073 2205.12701 2402.01739 2503.05066 2310.09832 2402.05526 2410.22884
"""


def test_each_paper_has_a_preset() -> None:
    assert {f"arXiv:{number}" for number in PAPERS.split()} <= {entry.source for entry in ENTRIES}


@each
def test_example_runs_and_trains(entry: Preset) -> None:
    y, layer = run(entry)
    assert y.shape == (2, 12, 64)
    assert y.isfinite().all()
    loss = y.square().mean() + switchgear.balance_loss(layer)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    experts = [p for name, p in layer.named_parameters() if "gate" not in name.split(".")[0]]
    assert any(p.grad is not None and p.grad.any() for p in experts)
    switchgear.after_step(layer)
    layer.eval()
    before = getattr(layer, "losses", {})
    assert run(entry, layer)[0].isfinite().all()
    assert before is not None


@each
def test_no_tokens(entry: Preset) -> None:
    """No sequences, and sequences without tokens: results without elements, and gradients of zeros if there are any."""
    _, layer = run(entry)
    for shape, training in itertools.product(((0, 5, 64), (2, 0, 64), (0, 0, 64)), (True, False)):
        layer.train(training).zero_grad()
        x = torch.zeros(shape, requires_grad=True)
        y, _ = run(entry, layer, x=x)
        assert y.shape == shape
        (y.sum() + switchgear.balance_loss(layer)).backward()
        assert x.grad is not None
        for parameter in layer.parameters():
            assert parameter.grad is None or parameter.grad.isfinite().all()
        switchgear.after_step(layer)
        assert all(tensor.isfinite().all() for tensor in tensors(layer) if tensor.is_floating_point())


def test_no_tokens_of_layers_that_are_no_preset() -> None:
    router, experts = Router(64, 8, 2), switchgear.Experts(64, 32, 8, bias=True)
    layers = [
        (switchgear.MoE(64, 32, 8, 2, scale_input=True), (0, 64)),
        (switchgear.MoE(64, 32, 8, **presets.gw_moe(), isolation="sequence"), (0, 5, 64)),
        (switchgear.layers.MergedExperts(router, experts, down_router=Router(32, 8, 2)), (0, 5, 64)),
    ]
    for layer, shape in layers:
        layer(torch.zeros(shape)).sum().backward()
        for parameter in layer.parameters():
            assert parameter.grad is not None
            assert not parameter.grad.any()


@each
def test_layers_of_one_dict_share_nothing(entry: Preset) -> None:
    options = entry.options()
    sizes = {"hmoe": (64, 32, 8), "moec": (64, 32, 64), "monet": (64, 8, 64**2)}.get(entry.name, (64, 32, 32))
    one, other = presets.build(*sizes, **options), presets.build(*sizes, **options)
    assert not {id(module) for module in one.modules()} & {id(module) for module in other.modules()}
    assert not {t.data_ptr() for t in tensors(one) if t.numel()} & {t.data_ptr() for t in tensors(other) if t.numel()}


@each
def test_presets_of_routing_are_those_of_a_router(entry: Preset) -> None:
    options = entry.options()
    if OF_EXPERTS & set(options):
        return
    router = Router(64, 64, **options)
    assert router.num_experts == 64


@each
def test_round_trip_copy_and_evaluation(entry: Preset) -> None:
    """State dicts and deep copies give the same outputs; evaluation is deterministic, except for draws."""
    _, layer = run(entry)
    _, other = run(entry)
    layer.eval()
    other.eval()
    other.load_state_dict(layer.state_dict())
    torch.manual_seed(3)
    y = run(entry, layer)[0]
    for twin in (other, copy.deepcopy(layer)):
        torch.manual_seed(3)
        assert torch.equal(run(entry, twin)[0], y)
    if entry.name not in ("thor", "gumbel_gate"):
        torch.manual_seed(4)
        assert torch.equal(run(entry, layer)[0], y)


@each
def test_bfloat16_and_autocast(entry: Preset) -> None:
    y, layer = run(entry, dtype=torch.bfloat16)
    assert y.dtype is torch.bfloat16
    assert y.isfinite().all()
    _, layer = run(entry)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = run(entry, layer)
        loss = y.float().square().mean() + switchgear.balance_loss(layer)
    assert y.dtype is (torch.float32 if entry.name == "stratified" else torch.bfloat16)  # that one adds the residual
    assert y.isfinite().all()
    loss.backward()
    assert all(p.grad is None or p.grad.dtype is torch.float32 for p in layer.parameters())


@each
def test_meta_device(entry: Preset) -> None:
    """Layers are created without memory; reset_parameters and a state dict fill them."""
    options = entry.options()
    sizes = {"hmoe": (64, 32, 8), "moec": (64, 32, 64), "monet": (64, 8, 64**2)}.get(entry.name, (64, 32, 32))
    layer, real = presets.build(*sizes, **options, device="meta"), presets.build(*sizes, **options)
    assert all(t.is_meta for t in tensors(layer))
    layer.to_empty(device="cpu")
    for t in tensors(layer):
        t.data.fill_(7)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    layer.load_state_dict(real.state_dict())
    for t, wanted in zip(tensors(layer), tensors(real), strict=True):
        assert torch.equal(t, wanted)


def test_what_is_written() -> None:
    part = functools.partial(switchgear.routing.Linear, jitter=0.5, bias=None)
    assert written({"score": part, "capacity": None, "top_k": 2}) == "score=Linear(jitter=0.5), top_k=2"
    assert written(switchgear.routing.TopK(2, scale=2.5)) == "TopK(2, scale=2.5)"
    assert written([switchgear.routing.TopP(), Router]) == "[TopP(0.4), Router]"


def test_bad_arguments_are_named() -> None:
    for match, wrong in [
        ("widths", lambda: presets.hmoe(widths="odd")),
        ("intermediate_size", lambda: switchgear.MoE(64, 40, 8, **presets.hmoe())),
        ("intermediate_size", lambda: switchgear.MoE(64, 6, 3, 2, widths=[4, 4, 8])),
        ("heads", lambda: presets.build(64, 32, 8, **presets.multi_head(heads=5))),
        ("strata", lambda: presets.build(64, 32, 8, **presets.stratified(strata=[1, 2]))),
        ("num_experts", lambda: presets.build(64, 32, 8, **presets.monet())),
        ("intermediate_size", lambda: presets.build(64, 31, 8, **presets.cartesian())),
        ("depth", lambda: presets.build(64, 32, 8, **presets.deep_mixture(depth=0))),
        ("num_shared_experts", lambda: switchgear.MoE(64, 32, 8, 2, num_shared_experts=1, shared_intermediate_size=2)),
        ("shared_gate", lambda: switchgear.MoE(64, 32, 8, 2, shared_gate=True)),
        ("bias", lambda: switchgear.MoE(64, 32, 2, 2, widths=[1, 3], bias=True)),
    ]:
        with raises(ValueError, match):
            wrong()


def make_short(entry: Preset, **common: Any) -> nn.Module:
    """The example's layer with a limit of the auction's iterations, since a graph contains each of them."""
    return make_layer(entry, {"max_iterations": 3} if entry.name == "base_layer" else None, **common)


@each
@pytest.mark.some(10)
def test_compiles_without_a_break(entry: Preset) -> None:
    """One graph, also for policies that draw, with the results of eager mode."""
    torch.compiler.reset()
    layer = make_short(entry)
    torch.manual_seed(5)
    wanted, _ = run(entry, layer)
    torch.manual_seed(5)
    y, _ = run(entry, torch.compile(layer, fullgraph=True, backend="aot_eager"))
    assert torch.equal(y, wanted)
    y.square().sum().backward()


@each
def test_nothing_waits_for_the_device(entry: Preset) -> None:
    """Meta tensors pass through: no decision on the host depends on a value. (With values, expert choice without a cap
    reads back the largest number of experts of a token.)"""
    layer = make_short(entry, device="meta")
    y = call(entry, layer, {name: tensor.to("meta") for name, tensor in make_inputs().items()})
    (y.square().sum() + switchgear.balance_loss(layer)).backward()
    switchgear.after_step(layer)
    assert y.is_meta
    assert y.shape == (2, 12, 64)


class Counting(TorchDispatchMode):
    """Counts ops."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


@each
def test_no_loop_over_experts(entry: Preset) -> None:
    """The number of ops in forward, backward and losses does not depend on the number of experts."""
    sizes = {"monet": ((64, 8, 64**2), (64, 8, 128**2)), "hmoe": ((64, 32, 8), (64, 32, 8)),
             "branch_train_stitch": ((64, 32, 8), (64, 32, 8)),  # experts are networks
             "moec": ((64, 32, 64), (64, 32, 128)), "loramoe": ((64, 32, 8), (64, 32, 8)),
             "mor1e": ((64, 32, 8), (64, 32, 8)), "self_moe": ((64, 32, 64), (64, 32, 128)),
             }.get(entry.name, ((64, 32, 32), (64, 32, 64)))  # fmt: skip
    numbers = []
    for size in sizes:
        layer = presets.build(*size, **entry.options())
        tensors = make_inputs()
        tensors["x"].requires_grad_()
        with Counting() as counting:
            y = call(entry, layer, tensors)
            (y.square().sum() + switchgear.balance_loss(layer)).backward()
        numbers.append(counting.number)
    assert numbers[0] == numbers[1]


@each
@pytest.mark.some(15)
def test_training_reduces_the_loss(entry: Preset) -> None:
    """The loss of a small regression, with the preset's own losses and controllers."""
    torch.manual_seed(0)
    _, layer = run(entry)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 12, 64, generator=generator)
    target = torch.tanh(x @ torch.randn(64, 64, generator=generator) / 8)
    optimizer = torch.optim.Adam(layer.parameters(), 5e-3)
    losses = []
    for _ in range(40):
        y = run(entry, layer, x=x)[0]
        loss = (y - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss + switchgear.balance_loss(layer)).backward()
        optimizer.step()
        switchgear.after_step(layer)
    assert sum(losses[-5:]) / 5 < 0.9 * losses[0]


@pytest.mark.parametrize(
    "name", ["switch", "skywork", "loss_free", "expert_choice", "grin", "hmoe", "adamoe", "openmoe"]
)
def test_activation_checkpointing_gives_the_same_gradients(name: str) -> None:
    """Also for the balance losses, which leave the checkpoint as attributes of the layer."""
    (entry,) = (entry for entry in ENTRIES if entry.name == name)
    _, layer = run(entry)
    x = torch.randn(2, 12, 64)

    def grads(forward: Any) -> list[Tensor]:
        twin = copy.deepcopy(layer)
        torch.manual_seed(7)
        y = forward(twin)
        loss = y.square().mean() + switchgear.balance_loss(twin)
        return list(torch.autograd.grad(loss, list(twin.parameters())))

    plain = grads(lambda twin: twin(x))
    again = grads(lambda twin: checkpoint(twin, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
