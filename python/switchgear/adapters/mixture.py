# SPDX-License-Identifier: BSD-3-Clause
"""Mixtures of adapters in a whole model: LoRAExperts in place of its Linear layers, all or none, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.adapters.lora_experts import LoRAExperts, build_router, find_device_and_dtype, find_features
from switchgear.adapters.peft_format import Adapter, Source, list_common_layers, read_lora
from switchgear.checks import Count, Size, checked, list_of_names
from switchgear.functional import Routing
from switchgear.routing.context import NOTHING_KNOWN, Context, context_of
from switchgear.routing.router import Router, RouterOptions

_OF_ROUTERS = {"top_k", *RouterOptions.__annotations__}


class SharedRouter(nn.Module):
    """One router for all layers of a mixture (Self-MoE, arXiv:2406.12034). Each layer applies it to its own input.

    widths: the layers' in_features. The parameters are shared by all layers of a width, because a router of one width
    can't read another (a choice of ours). It is a submodule, gate, of the first layer; the others refer to it. The
    other arguments are those of Router; without top_k and select all experts are used.

    Submodules: routers.<width>.
    """

    is_shared = True

    @checked
    def __init__(self, widths: Iterable[int], num_experts: int, top_k: int | None = None, **options: Any) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.routers = nn.ModuleDict(
            {str(width): build_router(width, num_experts, top_k, **options) for width in sorted(set(widths))}
        )

    def forward(self, hidden_states: Tensor, context: Context = NOTHING_KNOWN) -> Routing:
        """The Routing of hidden_states [..., in]."""
        routing: Routing = self.routers[str(hidden_states.shape[-1])](hidden_states, context)
        return routing


@dataclass(frozen=True)
class Mixture:
    """The LoRAExperts of a model, as `mixture` and `add_lora_experts` return them. Mixture(model) finds them again, for
    example in a deep copy."""

    model: nn.Module

    @property
    def layers(self) -> dict[str, LoRAExperts]:
        """By name in the model."""
        return {name: module for name, module in self.model.named_modules() if isinstance(module, LoRAExperts)}

    def expert_parameters(self) -> list[nn.Parameter]:
        """The parameters of all adapters, without those of routers."""
        return [p for layer in self.layers.values() for p in layer.low_rank.parameters()]

    def router_parameters(self) -> list[nn.Parameter]:
        """Those of routers, shared or not, and of SoftMoE."""
        parts = [part for layer in self.layers.values() for part in (layer.router, layer.experts) if part is not None]
        found = dict.fromkeys(p for part in parts for p in part.parameters())  # a shared router counts once
        low_rank = {id(p) for p in self.expert_parameters()}
        return [p for p in found if id(p) not in low_rank]

    def parameters(self) -> list[nn.Parameter]:
        """All that the mixture adds to the model, for an optimizer."""
        return [*self.expert_parameters(), *self.router_parameters()]

    @contextmanager
    def context(self, **known: Any) -> Iterator[None]:
        """Inside the block, routers know these attributes of Context, as the model calls its layers without them. With
        activation checkpointing, backward belongs into the block too.

            with mix.context(embedding=task):
                loss = model(input_ids, labels=labels).loss
        """
        if "mask" not in known:
            context_of(**known)
        layers = list(self.layers.values())
        before = [layer.known for layer in layers]
        try:
            for layer in layers:
                layer.known = {**layer.known, **known}
            yield
        finally:
            for layer, value in zip(layers, before, strict=True):
                layer.known = value

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors of adapters and routers, without those of the model."""
        tensors: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            tensors |= {
                f"{name}.{key}": value for key, value in layer.state_dict().items() if not key.startswith("base.")
            }
        return tensors

    @checked
    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Copies the tensors of another mixture with the same layers, sizes and kind of router; ValueError, and nothing
        is changed, if a key or shape differs."""
        own = self.state_dict()
        if different := sorted(set(own) ^ set(state_dict)):
            kind = "a missing" if different[0] in own else "an unknown"
            raise ValueError(f"state_dict: expected the {len(own)} keys of this mixture, got {kind} key {different[0]}")
        for key, tensor in own.items():
            if tensor.shape != state_dict[key].shape:
                got = list(state_dict[key].shape)
                raise ValueError(f"state_dict: expected {key} of shape {list(tensor.shape)}, got {got}")
        for key, tensor in own.items():
            tensor.copy_(state_dict[key])

    def undo(self) -> None:
        """Puts the model's own layers back. Parameters that were trained before are again."""
        _exchange(self.model, {layer: layer.release() for layer in self.layers.values()})


@checked
def mixture(model: nn.Module, adapters: Sequence[Source], *, shared_router: bool = False, **options: Any) -> Mixture:
    """Replaces every Linear of the model that the adapters adapt by a LoRAExperts of them.

        mix = mixture(model, ["adapters/code", "adapters/law"], top_k=1)
        optimizer = torch.optim.AdamW(mix.router_parameters())

    Args:
        adapters: one or more that adapt the same layers; see read_lora. If they have gates (train_gate), the router is
            by default PosthocGate with the two best adapters, and there is nothing to train.
        shared_router: one router for all layers; see SharedRouter.
        options: those of LoRAExperts, for example of a preset: **presets.phatgoose().

    Only the replaced layers are frozen; pass the Mixture's parameters to the optimizer.

    Raises:
        ValueError: no adapters, different layers, wrong shapes, numbers that are not finite, layers that the model does
            not have, or that have LoRAExperts already. The model is then as before.
    """
    read = [read_lora(source, f"adapters[{number}]") for number, source in enumerate(adapters)]
    if not read:
        raise ValueError("adapters: expected at least one, got none")
    names = list_common_layers(read)
    gates = _collect_gates(read, names)
    _check_tied(model, read, names)
    if "layer" in options:  # a preset, whose rank and alpha are for new experts
        options = {name: value for name, value in options.items() if name not in ("layer", "rank", "alpha")}

    def make(name: str, base: nn.Module, options: dict[str, Any]) -> LoRAExperts:
        pairs = [adapter.layers[name] for adapter in read]
        try:
            return LoRAExperts.from_adapters(base, pairs, gates=gates[name] if gates else None, **options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    return _replace(model, names, make, len(read), options, shared_router)


@checked
def add_lora_experts(
    model: nn.Module,
    num_experts: Size,
    rank: Size | Sequence[Size],
    *,
    targets: str | Iterable[str],
    shared_router: bool = False,
    **options: Any,
) -> Mixture:
    """Replaces every targeted Linear of the model by a LoRAExperts of new experts. The outputs do not change yet.

        mix = add_lora_experts(model, 8, 4, alpha=32, targets=["gate_proj", "up_proj", "down_proj"])

    Args:
        targets: names of layers, or ends of names after a dot.
        num_experts, rank, options: those of LoRAExperts, for example of a preset:
            add_lora_experts(model, 8, targets=[…], **presets.loramoe()).
        shared_router: one router for all layers; see SharedRouter.

    Only the replaced layers are frozen; pass the Mixture's parameters to the optimizer.

    Raises:
        ValueError: a target that no Linear of the model matches, or a wrong option. The model is then as before.
    """
    options.pop("layer", None)
    names = _find_targets(model, list_of_names("targets", targets))

    def make(name: str, base: nn.Module, options: dict[str, Any]) -> LoRAExperts:
        return LoRAExperts(base, num_experts, rank, **options)

    return _replace(model, names, make, num_experts, options, shared_router)


def _replace(
    model: nn.Module,
    names: Sequence[str],
    make: Callable[[str, nn.Module, dict[str, Any]], LoRAExperts],
    num_experts: int,
    options: dict[str, Any],
    shared_router: bool,
) -> Mixture:
    bases = {name: _get_linear(model, name) for name in names}
    made: dict[nn.Module, LoRAExperts] = {}
    if shared_router:
        place = find_device_and_dtype(bases[names[0]], options.get("device"), options.get("dtype"))
        given = {name: value for name, value in options.items() if name in _OF_ROUTERS}
        router = SharedRouter((find_features(base)[0] for base in bases.values()), num_experts, **given, **place)
        options = {name: value for name, value in options.items() if name not in given} | {"router": router}
    try:
        for name, base in bases.items():
            if base not in made:  # layers may be tied
                made[base] = make(name, base, options)
    except BaseException:
        for layer in made.values():
            layer.release()
        raise
    if shared_router:
        next(iter(made.values())).own_router()
    _exchange(model, made)
    return Mixture(model)


def _exchange(model: nn.Module, new: Mapping[Any, nn.Module]) -> None:
    """Replaces modules wherever they are registered."""
    places = [(parent, name, child) for parent in model.modules() for name, child in parent._modules.items()]
    for parent, name, child in places:
        if child is not None and child in new:
            parent._modules[name] = new[child]


def _get_linear(model: nn.Module, name: str) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"model: expected a layer {name}, which the adapters adapt, got none") from None
    outer = [".".join(name.split(".")[:end]) for end in range(1, name.count(".") + 1)]
    if isinstance(module, LoRAExperts) or any(isinstance(model.get_submodule(part), LoRAExperts) for part in outer):
        raise ValueError(f"{name}: expected a layer without LoRAExperts, got one with them; undo its mixture first")
    if name == "":
        raise ValueError("model: expected a module with the layers inside, got the layer itself; use LoRAExperts")
    try:
        find_features(module)
    except ValueError:
        raise ValueError(f"{name}: expected a Linear layer, got {type(module).__name__}") from None
    return module


def _find_targets(model: nn.Module, targets: Sequence[str]) -> list[str]:
    if not targets:
        raise ValueError("targets: expected at least one name, got none")
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    found: dict[str, None] = {}
    for target in targets:
        matches = [name for name in names if name == target or name.endswith(f".{target}")]
        if not matches:
            raise ValueError(f"targets: expected names of layers of {type(model).__name__}, got {target!r}")
        found |= dict.fromkeys(matches)
    return list(found)


def _check_tied(model: nn.Module, adapters: Sequence[Adapter], names: Sequence[str]) -> None:
    """Raises ValueError if an adapter differs between two names of one layer."""
    first: dict[nn.Module, str] = {}
    for name in names:
        other = first.setdefault(_get_linear(model, name), name)
        if other == name:
            continue
        for number, adapter in enumerate(adapters):
            if not all(map(torch.equal, *(_collect_layer(adapter, each) for each in (name, other)))):
                raise ValueError(f"adapters[{number}]: expected equal ones of {other} and {name}, which are one layer")


def _collect_layer(adapter: Adapter, name: str) -> list[Tensor]:
    a, b, alpha = adapter.layers[name]
    return [a, b, torch.tensor(alpha, dtype=torch.float64), *([adapter.gates[name]] if adapter.gates else [])]


def _collect_gates(adapters: Sequence[Adapter], names: Sequence[str]) -> dict[str, list[Tensor]] | None:
    """The gates of each layer; None if no adapter has any."""
    if all(adapter.gates is None for adapter in adapters):
        return None
    for number, adapter in enumerate(adapters):
        if lacking := sorted(set(names) - set(adapter.gates or {})):
            raise ValueError(f"adapters[{number}]: expected a gate for {lacking[0]}, as others have; see train_gate")
    return {name: [adapter.gates[name] for adapter in adapters if adapter.gates] for name in names}


# ---- gates of trained adapters ---------------------------------------------------------------------------------------


@checked
def train_gate(
    model: nn.Module,
    adapter: Source,
    loss: Callable[[nn.Module], Tensor],
    *,
    steps: Count = 100,
    lr: float = 5e-3,
) -> Adapter:
    """Trains a vector v for each layer of an adapter, y = base(x) + sigmoid(v · x) · adapter(x), everything else frozen
    (PHATGOOSE, arXiv:2402.05859). Returns the adapter with these gates; the model is as before.

        adapters = [train_gate(model, folder, loss_on_its_task) for folder, loss_on_its_task in …]
        mix = mixture(model, adapters)                            # no joint training

    Args:
        adapter: see read_lora.
        loss: a function of the model that returns a scalar. It is called once per step, for the next batch of the
            adapter's task.
        steps, lr: of Adam from v = 0. The authors' code has the same, after a warm-up of 6 % of the steps.

    Raises:
        TypeError: a loss that is no function, or does not return a tensor.
        ValueError: an adapter that does not fit the model, or a loss that is no scalar or makes the gates NaN or
            infinite.
    """
    adapter = read_lora(adapter)
    trained = [p for p in model.parameters() if p.requires_grad]
    mix = mixture(model, [replace(adapter, gates=None)], top_k=1, score_function="sigmoid")
    try:
        model.requires_grad_(False)
        vectors: dict[str, Tensor] = {}
        for name, layer in mix.layers.items():
            assert isinstance(layer.gate, Router)
            assert layer.gate.weight is not None
            wide = torch.promote_types(layer.gate.weight.dtype, torch.float32)  # bfloat16 would lose Adam's steps
            layer.gate.to(wide)
            vectors[name] = layer.gate.weight.requires_grad_(True)
            nn.init.zeros_(vectors[name])
        optimizer = torch.optim.Adam(vectors.values(), lr)
        with torch.enable_grad():
            for _ in range(steps):
                optimizer.zero_grad()
                value = loss(model)
                if not isinstance(value, Tensor):
                    raise TypeError(f"loss: expected it to return a tensor, got {value!r}")
                if value.numel() != 1:
                    raise ValueError(f"loss: expected it to return a scalar, got shape {list(value.shape)}")
                value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        gates = {name: vector.detach()[0].clone() for name, vector in vectors.items()}
    finally:
        mix.undo()
        for parameter in trained:
            parameter.requires_grad_(True)
    if wrong := [name for name, gate in gates.items() if not bool(gate.isfinite().all())]:
        raise ValueError(f"loss: expected finite gradients, got a gate of {wrong[0]} with NaN or infinity")
    return replace(adapter, gates=gates)
