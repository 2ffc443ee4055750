# SPDX-License-Identifier: BSD-3-Clause
"""A PreRouter at work: it reads a model's embeddings, and its choices can replace those of the model's routers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from switchgear.checks import check_module
from switchgear.functional import Routing
from switchgear.routing.context import NOTHING_KNOWN, Context, Select
from switchgear.trace.pre_router import PreRouter, check_top_k
from switchgear.trace.routed_layers import layers_of


class Listener:
    """The choices of a PreRouter for the running call of a model, from the output of its embedding.

    An output [B,S,H] of one token per sequence continues the sequences before; any other starts new ones. Padding
    counts as tokens.
    """

    def __init__(self, pre_router: PreRouter, embedding: nn.Module, top_k: int) -> None:
        _check_pre_router(pre_router)
        check_module("embedding", embedding)
        check_top_k(top_k, pre_router.num_experts)
        self.pre_router, self.top_k = pre_router, top_k
        self.topk_ids: list[Tensor] | None = None  # [T,K] of each layer
        self._before: Tensor | None = None
        self._handle = embedding.register_forward_hook(self._on_embedding)

    def _on_embedding(self, module: nn.Module, args: Any, embeddings: Tensor) -> None:
        x = embeddings.detach()
        x = x[None] if x.dim() == 2 else x
        count = x.shape[1]
        if count == 1 and self._before is not None and len(self._before) == len(x):
            x = torch.cat((self._before, x), 1)
        self._before = x[:, -self.pre_router.reach :].clone()
        chosen = self.pre_router.choose(x, self.top_k)
        self.topk_ids = [ids.view(*x.shape[:2], self.top_k)[:, -count:].flatten(0, 1) for ids in chosen]

    def close(self) -> None:
        self._handle.remove()


@contextmanager
def decouple(model: nn.Module, pre_router: PreRouter, embedding: nn.Module, top_k: int) -> Iterator[None]:
    """Inside the block, the PreRouter chooses the experts of all layers; weights come from the model's own routers.

        with routing.decouple(model, pre_router, model.get_input_embeddings(), top_k=2):
            model.generate(prompt)

    Args:
        embedding: the module whose output [B,S,H] the PreRouter gets.
        top_k: experts per token and layer.

    Raises:
        ValueError: another number of layers or experts than the PreRouter has, or routers whose weights do not follow
            from a choice.
    """
    _check_pre_router(pre_router)
    found = layers_of(model, None)
    if len(found) != len(pre_router.num_experts):
        raise ValueError(
            f"pre_router: expected {len(found)} layers, as in the model, got {len(pre_router.num_experts)}"
        )
    for (name, layer), count in zip(found.items(), pre_router.num_experts, strict=True):
        own = layer.num_classes if layer.num_classes is not None else layer.block.num_experts
        if own != count:
            raise ValueError(f"pre_router: expected {own} experts in {name}, got {count}")
    methods = {name: layer.routing_method() for name, layer in found.items()}
    listener = Listener(pre_router, embedding, top_k)

    def wrapper(layer: int, name: str) -> Callable[[Select], Select]:
        return lambda own: _Decoupled(listener, layer, methods[name])

    with ExitStack() as stack:
        stack.callback(listener.close)
        for i, (name, layer) in enumerate(found.items()):
            stack.enter_context(layer.overridden(wrapper(i, name), methods[name]))
        yield


def _check_pre_router(pre_router: Any) -> None:
    """Raises TypeError for anything but a PreRouter, or what has its methods, as torch.compile of one."""
    if not callable(getattr(pre_router, "choose", None)):
        raise TypeError(f"pre_router: expected PreRouter, got {type(pre_router).__name__}")


@dataclass(frozen=True)
class _Decoupled:
    listener: Listener
    layer: int
    method: Any
    uses_bias: ClassVar[bool] = False

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        chosen = self.listener.topk_ids
        if chosen is None or len(chosen[self.layer]) != len(router_logits):
            got = "none" if chosen is None else len(chosen[self.layer])
            raise ValueError(f"embedding: expected an output for {len(router_logits)} tokens, got {got}")
        ids = chosen[self.layer].to(router_logits.device)
        weights = self.method.weigh(router_logits, ids.long())
        return Routing(ids, weights, router_logits, router_logits.shape[1])
