# SPDX-License-Identifier: BSD-3-Clause
"""The dense feed-forward modules of a model, their replacement, all or none, and what a conversion did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from switchgear.convert.ffn import feed_forward, is_feed_forward
from switchgear.trace.observe import inputs_of

OURS = "switchgear"  # the family of models with layers of ours


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
        notes += [f"{name}: its dropout of {p} is not kept" for p in _dropouts(module)]
    replace_modules(model, modules)  # all are made
    return Conversion(model, tuple(done), tuple(notes))


def _dropouts(module: nn.Module) -> list[float]:
    return [part.p for part in module.modules() if isinstance(part, nn.Dropout) and part.p > 0]


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
