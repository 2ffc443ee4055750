# SPDX-License-Identifier: BSD-3-Clause
"""The layers whose choices can be seen and changed: routers of ours, or blocks of Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.adapters.wrappers import is_wrapper
from switchgear.checks import convert, list_of_names
from switchgear.functional import Routing
from switchgear.integrations.choices import override_selection, watch_choices
from switchgear.integrations.hook_points import Choice
from switchgear.integrations.moe_blocks import moe_blocks
from switchgear.integrations.routers import find_routing_method
from switchgear.routing.change import overridden_router
from switchgear.routing.context import Context, Select, is_recomputing, modules_in, scored, wrapped
from switchgear.routing.counting import unseen
from switchgear.routing.ranking import scores_of, weighed
from switchgear.routing.router import Router
from switchgear.trace.batches import Batch, batch_of
from switchgear.utils.modules import get_inner_model, strip_wrapper_names


@dataclass(frozen=True)
class RoutedLayer:
    """A layer whose choices can be seen and changed: a router of ours, or a block of Hugging Face."""

    block: Any  # a MoeBlock, or None for a router of ours without experts
    router: Router | None

    @property
    def num_classes(self) -> int | None:
        """None if only the logits tell."""
        return None if self.router is None else self.router.num_experts

    def routing_method(self, name: str) -> Any:
        """What weighs any choice as the router does. Raises ValueError, which says `name`, if there is none."""
        if self.router is not None:
            return _RouterMethod.of(name, self.router)
        return find_routing_method(self.block)

    def overridden(self, wrapper: Callable[[Select], Select], method: Any) -> AbstractContextManager[None]:
        """Inside the block, `wrapper` of the router's selection selects. method: of a block of Hugging Face."""
        if self.router is not None:
            return overridden_router(self.router, wrapper)
        return override_selection(self.block, method, wrapper)

    @contextmanager
    def watched(self, see: Callable[[Choice, int, Tensor | None], None]) -> Iterator[None]:
        """Inside the block, see(choice, num_experts, num_dropped) is called at each choice that is not repeated."""

        def on_choice(choice: Choice, num_experts: int, num_dropped: Tensor | None = None) -> None:
            if not is_recomputing():
                with unseen(choice.topk_ids):
                    see(choice, num_experts, num_dropped)

        def hook(router: nn.Module, args: Any, kwargs: dict[str, Any], routing: Routing) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            choice = Choice(x, routing.topk_ids, routing.topk_weights, routing.router_logits)
            on_choice(choice, routing.num_experts, routing.num_dropped)

        with ExitStack() as stack:
            if self.router is not None:
                stack.callback(self.router.register_forward_hook(hook, with_kwargs=True).remove)
            else:
                num_experts = self.block.num_experts
                stack.enter_context(watch_choices(self.block, lambda choice: on_choice(choice, num_experts)))
            yield


@contextmanager
def _on_copies(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside the block, the modules and those in them have copies of their buffers."""
    with ExitStack() as stack:
        for inside in {inside for module in modules for inside in module.modules()}:
            own = dict(inside._buffers)
            stack.callback(inside._buffers.update, own)
            inside._buffers.update({name: None if b is None else b.clone() for name, b in own.items()})
        yield


def traceable(model: nn.Module) -> dict[str, RoutedLayer]:
    """The layers of a RoutingTrace by name: all our routers, or else the blocks of Hugging Face."""
    convert("model", model, nn.Module)
    blocks = moe_blocks(model)
    by_gate = {id(block.gate): block for block in blocks.values()}
    routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
    if routers:
        return {name: RoutedLayer(by_gate.get(id(router)), router) for name, router in routers.items()}
    return {block.layer: RoutedLayer(block, None) for block in blocks.values()}


def pick(found: Mapping[str, RoutedLayer], layers: Collection[str] | None) -> dict[str, RoutedLayer]:
    """The layers of these names: those of blocks, or of layers in a RoutingTrace. Raises ValueError for an unknown
    name."""
    if not found:
        raise ValueError("model: expected one with routers, or Hugging Face's MoE layers, got none")
    if layers is None:
        return dict(found)
    wanted = set(list_of_names("layers", layers))
    names = {
        name: {name} | ({layer.block.name, layer.block.layer} if layer.block is not None else set())
        for name, layer in found.items()
    }
    missing = sorted(wanted - set().union(*names.values()))
    if missing:
        raise ValueError(f"layers: expected some of {', '.join(found)}; got {missing[0]}")
    return {name: layer for name, layer in found.items() if names[name] & wanted}


@dataclass(frozen=True)
class _RouterMethod:
    """The weights of our selections that follow from scores: score_function, normalize, scale."""

    score_function: str
    normalize: bool
    scale: float

    def weigh(self, router_logits: Tensor, ids: Tensor) -> Tensor:
        scores = scores_of(router_logits, self.score_function).gather(1, ids.clamp(min=0)).masked_fill(ids < 0, 0)
        return weighed(scores, self.normalize, self.scale)

    @classmethod
    def of(cls, name: str, router: Router) -> _RouterMethod:
        """Verified on random logits, with the router's own selection."""
        select = router.selection()
        source: Any = scored(select)
        method = cls(
            str(getattr(source, "score_function", "softmax")), bool(getattr(source, "normalize", False)),
            float(getattr(source, "scale", 1.0)),
        )  # fmt: skip
        if not method._is_that_of(select, router):
            wrong = next((s for s in reversed(list(wrapped(select))) if not method._is_that_of(s, router)), select)
            raise ValueError(
                f"{name}: expected a selection whose weights are scores of the choice, got {type(wrong).__name__}"
            )
        return method

    @torch.no_grad()
    def _is_that_of(self, select: Select, router: Router) -> bool:
        device = next((p.device for p in router.parameters()), torch.device("cpu"))
        logits = torch.randn(64, router.num_experts, generator=torch.Generator().manual_seed(0)).to(device)
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []), _on_copies(modules_in(select)):
                routing = select(logits, Context(training=router.training), router.e_score_correction_bias)
            weights = self.weigh(routing.router_logits, routing.topk_ids.long())
        except (ValueError, RuntimeError):  # it needs a context
            return False
        # Both are sums and quotients of a few float32 numbers.
        right = torch.allclose(weights, routing.topk_weights.float(), rtol=1e-5, atol=1e-7)
        return right and torch.equal(routing.router_logits, logits)


def layers_of(model: nn.Module, layers: Collection[str] | None) -> dict[str, RoutedLayer]:
    """The layers by the names that they have in the model without wrappers. Raises ValueError for a model or a layer
    that cannot be replayed.

    layers: names of layers, as in a RoutingTrace of the model; all if None.
    """
    picked = pick(traceable(model), layers)
    inner = get_inner_model(model)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"model: expected a decoder alone, got {type(inner).__name__}")
    modules = dict(model.named_modules())
    prefix = next(name for name, module in modules.items() if module is inner)
    found = {_plain_name(name, prefix, modules): layer for name, layer in picked.items()}
    for name, layer in found.items():
        if layer.router is not None and layer.router.capacity is not None:
            raise ValueError(f"{name}: expected a router without a capacity limit, got {layer.router.capacity}")
    return found


def _plain_name(name: str, prefix: str, modules: Mapping[str, nn.Module]) -> str:
    """The name of a layer without wrappers of the model, and of PEFT around its experts."""
    while name and is_wrapper(modules[parent := name.rpartition(".")[0]]):
        name = parent
    return strip_wrapper_names(name.removeprefix(f"{prefix}.") if prefix else name)


@contextmanager
def calls_followed(
    model: nn.Module,
    begin: Callable[[Batch], None],
    end: Callable[[], None],
    hooks: Iterable[AbstractContextManager[None]],
) -> Iterator[None]:
    """Inside the block, begin(batch) is called before each call of the model that is not repeated, and end() after it
    if it did not raise: behind `hooks`, those of the layers, as a layer may be the model."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not is_recomputing():
            with unseen(*args, *kwargs.values()):
                begin(batch_of(module, args, kwargs))

    def after(module: nn.Module, args: Any, output: Any) -> None:
        if not is_recomputing():
            end()

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        for hook in hooks:
            stack.enter_context(hook)
        stack.callback(model.register_forward_hook(after).remove)
        yield


def key_of(name: str, repeat: int) -> str:
    """The name in a record of a layer's call number `repeat` in a forward."""
    return name if not repeat else f"{name}#{repeat}"
