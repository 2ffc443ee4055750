# SPDX-License-Identifier: BSD-3-Clause
"""How far a model on switchgear is from the same model in transformers: outputs and gradients.

Two levels: each experts module by itself, on its inputs from a forward of the model; and the whole model. There,
later layers amplify the rounding of earlier ones, and routers' choices may flip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from switchgear.integrations.transformers import Replacement, accelerate, is_decorated, undo_accelerate


class Difference(NamedTuple):
    """max |got - want| / max |want| of the output, and the worst of all gradients."""

    forward: float
    gradient: float


class Comparison(NamedTuple):
    """One model: what was replaced, and by how much its results change."""

    replacements: list[Replacement]
    modules: Difference  # worst over the experts modules that received tokens
    model: Difference  # gradients of the experts' parameters


def compare(model: nn.Module, inputs: Mapping[str, Any]) -> Comparison:
    """Runs the model and its experts modules both ways, in the model's current mode and dtype."""
    module: Any
    for module in model.modules():
        if is_decorated(module):
            module.config._experts_implementation_internal = "eager"
    replacements = accelerate(model)
    undo_accelerate(replacements)
    modules = {replacement.name: model.get_submodule(replacement.name) for replacement in replacements}
    parameters = [parameter for module in modules.values() for parameter in _trained(module)]
    calls = _record(model, inputs, modules)

    def evaluate() -> list[list[Tensor | None]]:
        whole = _evaluate(lambda: model(**inputs), parameters)
        return [whole, *(_evaluate_module(modules[name], *call) for name, call in calls.items())]

    want = evaluate()
    replacements = accelerate(model)
    got = evaluate()
    undo_accelerate(replacements)
    whole, *parts = (_difference(*pair) for pair in zip(got, want, strict=True))
    worst = Difference(max(part.forward for part in parts), max(part.gradient for part in parts))
    return Comparison(replacements, worst, whole)


def _record(
    model: nn.Module, inputs: Mapping[str, Any], modules: Mapping[str, nn.Module]
) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments of each module's last call in one forward of the model."""
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] = tree_map(_copied, (args, kwargs))

        return hook

    handles = [module.register_forward_pre_hook(keep(name), with_kwargs=True) for name, module in modules.items()]
    _run(lambda: model(**inputs))
    for handle in handles:
        handle.remove()
    return calls


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _difference(got: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> Difference:
    output, *gradients = (_relative(*pair) for pair in zip(got, want, strict=True))
    return Difference(output, max(gradients))


def _relative(got: Tensor | None, want: Tensor | None) -> float:
    if want is None or got is None:  # an expert without tokens: no gradient there, zeros here
        rest = got if want is None else want
        return 0.0 if rest is None else float(rest.abs().max() > 0)
    scale = want.abs().max()
    difference = (got.double() - want.double()).abs().max()
    return float(difference / scale) if scale > 0 else float(difference > 0)


def _evaluate_module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor | None]:
    floating = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    for leaf in floating:
        leaf.requires_grad_()
    return _evaluate(lambda: module(*args, **kwargs), [*_trained(module), *floating])


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _evaluate(run: Callable[[], Any], wanted: Iterable[Tensor]) -> list[Tensor | None]:
    """The output of `run`, and the gradients of a fixed random functional of it."""
    output = _run(run)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    return [output.detach(), *torch.autograd.grad(output, list(wanted), weight, allow_unused=True)]


def _run(run: Callable[[], Any]) -> Tensor:
    """The first tensor that `run` returns (logits or hidden states); seeded, since some models draw random numbers."""
    torch.manual_seed(0)
    output = run()
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    return next(leaf for leaf in tree_leaves(list(values)) if isinstance(leaf, Tensor))
