# SPDX-License-Identifier: BSD-3-Clause
"""The dense feed-forward modules of a model: their networks (FeedForward), read from modules of any naming and
combined into one (OneS, arXiv:2201.10890); their replacement, all or none; and what a conversion did."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear.checks import convert
from switchgear.integrations.blocks import FeedForward
from switchgear.integrations.gates import ACTIVATION_NAMES, PLAIN_ACTIVATIONS, name_activation
from switchgear.layers.shared import SharedExperts
from switchgear.reference import wide
from switchgear.routing.router import Router
from switchgear.trace.observe import inputs_of
from switchgear.utils.modules import set_eval
from switchgear.utils.packages import first_line

OURS = "switchgear"  # the family of models with layers of ours
# (gate, up, down) of the modules in use; None: not gated.
NAMES = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    (None, "up_proj", "down_proj"),
    (None, "fc1", "fc2"),
    (None, "c_fc", "c_proj"),
    (None, "fc_in", "fc_out"),
    (None, "dense_h_to_4h", "dense_4h_to_h"),
)
FUSED = ("gate_up_proj", "down_proj")  # gates first, then ups
TANH = functools.partial(F.gelu, approximate="tanh")
STRINGS: dict[str, Any] = {
    "gelu": F.gelu, "relu": F.relu, "silu": F.silu, "swish": F.silu, "gelu_new": TANH, "gelu_pytorch_tanh": TANH,
}  # fmt: skip
Combination = Literal["sum", "mean", "topk", "svd"]


def feed_forward(module: nn.Module | FeedForward, name: str = "mlp") -> FeedForward:
    """The weights of a dense feed-forward module: two or three torch.nn.Linear, or two with gate and up fused.

    Knows LLaMA's, Mixtral's, Phi-3's and GPT's names, and SharedExperts. What was read is compared with the module on
    random rows, so a module that computes something else is refused. The result shares the module's memory.

    Raises:
        TypeError: no module.
        ValueError: no feed-forward module, or one of another function.
    """
    if isinstance(module, FeedForward):
        return module
    convert(name, module, nn.Module)
    found = next(_read_candidates(module), None)
    if found is None:
        raise ValueError(
            f"{name}: expected a dense feed-forward module with Linear layers gate_proj, up_proj, down_proj (or w1, "
            f"w3, w2; gate_up_proj, down_proj; fc1, fc2), got {type(module).__name__}"
        )
    _check_same(module, found, name)
    return found


def is_feed_forward(module: nn.Module) -> bool:
    """Whether a module has the Linear layers of a dense feed-forward network."""
    return next(_read_candidates(module), None) is not None


def _read_candidates(module: nn.Module) -> Iterator[FeedForward]:
    activation = find_activation(module)
    if activation is None:
        return
    for gate, up, down in NAMES:
        if all(name is None or _is_linear(getattr(module, name, None)) for name in (gate, up, down)):
            of_gate = (None, None) if gate is None else _read_linear(getattr(module, gate))
            of_up, of_down = _read_linear(getattr(module, up)), _read_linear(getattr(module, down))
            yield _made(of_gate, of_up, of_down, activation)
    if all(_is_linear(getattr(module, name, None)) for name in FUSED):
        weight, bias = _read_linear(module.gate_up_proj)
        gates, ups = weight.chunk(2)
        biases = (None, None) if bias is None else bias.chunk(2)
        yield _made((gates, biases[0]), (ups, biases[1]), _read_linear(module.down_proj), activation)


def _made(gate: Any, up: Any, down: Any, activation: str) -> FeedForward:
    """Missing biases become zeros if there are others."""
    biases = [gate[1], up[1], down[1]]
    made = FeedForward(gate[0], up[0], down[0], activation, *biases)
    return made if all(bias is None for bias in biases) else made.biased()


def _is_linear(module: Any) -> bool:
    return isinstance(module, nn.Linear)


def _read_linear(linear: Any) -> tuple[Tensor, Tensor | None]:
    return linear.weight.detach(), None if linear.bias is None else linear.bias.detach()


def find_activation(module: Any) -> str | None:
    """The name of the module's activation, found by its values."""
    if isinstance(module, SharedExperts):
        plain = module.activation in PLAIN_ACTIVATIONS and module.limit is None
        return module.activation if plain else None
    for name in (*ACTIVATION_NAMES, "hidden_act"):
        function = getattr(module, name, None)
        if isinstance(function, str):
            function = STRINGS.get(function)
        if callable(function):
            return name_activation(function)
    return None


@torch.no_grad()
def _check_same(module: nn.Module, found: FeedForward, name: str) -> None:
    if found.up.is_meta:
        return
    x = torch.randn(4, found.hidden_size, generator=torch.Generator().manual_seed(0)).to(found.up)
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(x.dtype, 5e-2)
    with set_eval(module):
        compare_outputs(name, module, "down(act(gate(x)) · up(x))", lambda: (module(x), found(x)), tolerance)


def compare_outputs(
    name: str, module: nn.Module, formula: str, call: Callable[[], tuple[Any, Tensor]], tolerance: float
) -> None:
    """Raises ValueError unless call() returns the module's output and an equal one of the formula, up to this share of
    the largest element."""
    try:
        y, expected = call()
    except Exception as error:
        raise ValueError(f"{name}: expected {formula}, got {type(module).__name__} ({first_line(error)})") from error
    scale = float(expected.abs().max()) + 1e-30
    if not isinstance(y, Tensor) or y.shape != expected.shape or float((y - expected).abs().max()) > tolerance * scale:
        raise ValueError(f"{name}: expected {formula}, got a {type(module).__name__} that computes something else")


# ---- networks into one -----------------------------------------------------------------------------------------------


def read_shares(
    method: str, weights: Sequence[float] | Tensor | None, rank: int | None, num_experts: int
) -> list[float] | None:
    """The weights as numbers. Raises ValueError for an option of to_dense that the method does not use."""
    shares = None if weights is None else [float(share) for share in weights]
    if shares is not None:
        if method not in ("sum", "mean"):
            raise ValueError(f"weights: expected None for method={method!r}, got {len(shares)} numbers")
        if len(shares) != num_experts:
            raise ValueError(f"weights: expected {num_experts}, one per expert, got {len(shares)}")
        if method == "mean" and not sum(shares) > 0:
            raise ValueError(f"weights: expected numbers with a positive sum, got {shares}")
    if rank is not None and method != "svd":
        raise ValueError(f"rank: expected None for method={method!r}, got {rank}")
    return shares


def combine_networks(
    networks: Sequence[FeedForward], method: str, weights: Sequence[float] | None = None, rank: int | None = None
) -> FeedForward:
    """Combines networks by a method of to_dense.

    Raises ValueError for networks of different widths unless the method is "topk".
    """
    widths = {network.intermediate_size for network in networks}
    if method != "topk" and len(widths) > 1:
        raise ValueError(f"moe: expected experts of one width for method={method!r}, got {sorted(widths)}")
    if method == "topk":
        return _keep_best_neurons(networks)
    if method == "svd":
        smaller = min(networks[0].hidden_size, networks[0].intermediate_size)
        kept = -(-smaller // len(networks)) if rank is None else rank
        return _weighted_sum([_reduce_rank(network, kept) for network in networks], [1.0] * len(networks))
    each = weights or (1.0,) * len(networks)
    total = sum(each) if method == "mean" else 1.0
    return _weighted_sum(networks, [share / total for share in each])


def join_networks(networks: Sequence[FeedForward]) -> FeedForward:
    """The sum of networks as one: their neurons follow each other. Missing biases are zeros if there are others.

    Raises ValueError for networks with different activations, or of which some are gated.
    """
    for name in ("activation", "gated"):
        if len(kinds := list(dict.fromkeys(getattr(network, name) for network in networks))) > 1:
            raise ValueError(f"moe: expected experts and shared experts with {name}={kinds[0]}, got {kinds[1]}")
    if any(network.has_bias for network in networks):
        networks = [network.biased() for network in networks]

    def join(name: str, _: Tensor) -> Tensor:
        parts = [getattr(network, name) for network in networks]
        return torch.stack(parts).sum(0) if name == "down_bias" else torch.cat(parts, int(name == "down"))

    return networks[0].map_tensors(join)


def _weighted_sum(networks: Sequence[FeedForward], shares: Sequence[float]) -> FeedForward:
    def combine(name: str, like: Tensor) -> Tensor:
        parts = [getattr(network, name) for network in networks]
        total: Any = sum(share * wide(part) for share, part in zip(shares, parts, strict=True))
        made: Tensor = total.to(like.dtype)
        return made

    return networks[0].map_tensors(combine)


def _reduce_rank(network: FeedForward, rank: int) -> FeedForward:
    def approximate(_: str, matrix: Tensor) -> Tensor:
        u, s, v = torch.linalg.svd(wide(matrix), full_matrices=False)
        made: Tensor = ((u[:, :rank] * s[:rank]) @ v[:rank]).to(matrix.dtype)
        return made

    return network.map_tensors(approximate, ("gate", "up", "down"))


def _keep_best_neurons(networks: Sequence[FeedForward]) -> FeedForward:
    """I / E neurons of each expert, one more of the first I mod E."""
    width = max(network.intermediate_size for network in networks)
    parts = []
    for expert, network in enumerate(networks):
        count = width // len(networks) + (expert < width % len(networks))
        norm = network.up.float().norm(dim=1) * network.down.float().norm(dim=0)
        if network.gate is not None:
            norm = norm * network.gate.float().norm(dim=1)
        parts.append(network.neurons(norm.argsort(descending=True, stable=True)[:count].sort().values))
    made = join_networks(parts)
    return made if made.down_bias is None else replace(made, down_bias=made.down_bias / len(networks))


# ---- modules of a model ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Converted:
    """One layer: its name, what it was, and its experts afterwards."""

    name: str
    was: str
    num_experts: int
    how: str


@dataclass(frozen=True)
class Conversion:
    """A converted model, and what was done to each of its layers."""

    model: nn.Module
    layers: tuple[Converted, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        rows = [f"{layer.name}: {layer.was} -> {layer.num_experts} experts ({layer.how})" for layer in self.layers]
        return "\n".join([*rows, *self.notes])

    def summary(self) -> dict[str, Any]:
        """Plain types, for JSON."""
        return {"layers": [vars(layer) for layer in self.layers], "notes": list(self.notes)}


def replace_layers(model: nn.Module, layers: str | Sequence[int], make: Any) -> Conversion:
    """The model with its dense feed-forward modules `layers` replaced by make(weights, index): all or none."""
    found = find_dense_layers(model)
    chosen = choose_layers(layers, len(found))
    done, notes, modules = [], [], {}
    for index in chosen:
        name, module = found[index]
        made = make(feed_forward(module, name), index)
        modules[module] = made.train(module.training)
        done.append(Converted(name, type(module).__name__, made.experts.num_experts, made.gate.extra_repr()))
        dropouts = [part.p for part in module.modules() if isinstance(part, nn.Dropout) and part.p > 0]
        notes += [f"{name}: its dropout of {p} is not kept" for p in dropouts]
    replace_modules(model, modules)  # all are made
    return Conversion(model, tuple(done), tuple(notes))


def replace_modules(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> None:
    """Replaces modules by others, wherever the model uses them."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in made:
            model.set_submodule(name, made[module])


def call_model(module: nn.Module, batch: Any) -> Any:
    """The module's output for a batch; a mapping, such as what a tokenizer returns, is passed as keywords."""
    return module(**batch) if isinstance(batch, Mapping) else module(batch)


@contextmanager
def watch_rows(
    model: nn.Module, modules: Mapping[str, nn.Module], function: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Inside the block, function(name, rows [T,H]) is called with the input of each module that the model calls.
    Padding (attention_mask 0) is left out."""
    with ExitStack() as stack:
        inputs = stack.enter_context(inputs_of(model))
        for name, module in modules.items():

            def see(_: Any, args: tuple[Tensor, ...], name: str = name) -> None:
                rows = args[0].detach().flatten(0, -2)
                mask = inputs.mask(name, len(rows))
                function(name, rows if mask is None else rows[mask.to(rows.device)])

            stack.callback(module.register_forward_pre_hook(see).remove)
        yield


def find_dense_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The dense feed-forward modules inside a model, without the shared experts of its MoE layers."""
    found, inside = [], set()
    for name, module in model.named_modules():
        if isinstance(getattr(module, "experts", None), nn.Module):  # an MoE layer, ours or of transformers
            inside |= set(module.modules())
        if name and module not in inside and is_feed_forward(module):
            found.append((name, module))
    if not found:
        raise ValueError(f"model: expected dense feed-forward modules in {type(model).__name__}, found none")
    return found


def choose_layers(layers: str | Sequence[int], count: int) -> list[int]:
    """Ascending indices below `count`. Raises ValueError for others."""
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f"layers: expected 'all' or indices, got {layers!r}")
        return list(range(count))
    if not isinstance(layers, Iterable):
        raise TypeError(f"layers: expected 'all' or indices, got {type(layers).__name__}")
    wanted = list(layers)
    if not wanted or not all(isinstance(index, int) and -count <= index < count for index in wanted):
        raise ValueError(f"layers: expected indices of {count} feed-forward layers, got {wanted}")
    return sorted({index % count for index in wanted})


def is_transformers(model: object) -> bool:
    """Whether a module is a model of transformers, which is not imported for it."""
    classes = (cls for cls in type(model).__mro__ if cls.__module__.startswith("transformers."))
    return any(cls.__name__ == "PreTrainedModel" for cls in classes)


@torch.no_grad()
def initialize_router(layer: Any, std: float, seed: int) -> None:
    """Normal weights of a layer's router, drawn on the CPU: the same on every device."""
    gate: Router = layer.gate
    if gate.weight is not None:
        gate.weight.copy_(torch.randn(gate.weight.shape, generator=torch.Generator().manual_seed(seed)) * std)
        if gate.bias is not None:
            gate.bias.zero_()
