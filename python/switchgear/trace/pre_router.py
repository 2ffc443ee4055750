# SPDX-License-Identifier: BSD-3-Clause
"""Experts that are known before their layer runs, and can be loaded meanwhile.

PreRouter is a small router outside the model, which chooses the experts of all its layers from token embeddings
(Read-ME, arXiv:2410.19123); `decouple` puts its choices in place of those of the model's routers.

Pre-gates are routers that choose by the hidden states of the block before (Pre-gated MoE, arXiv:2308.12066). The first
block keeps a gate of its own. Parameters and their names do not change: the router of block N+1 is what the paper calls
the pre-gate of block N. A trained model needs fine-tuning afterwards; gradients of the choice reach the block before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear.checks import Count, Divides, Size, Sizes, checked, convert, explain_rows
from switchgear.functional import Routing
from switchgear.integrations.moe_blocks import moe_blocks
from switchgear.routing.context import NOTHING_KNOWN, Context, Select
from switchgear.routing.ranking import choose
from switchgear.routing.router import Handover, Router
from switchgear.trace.routed_layers import layers_of


class PreRouter(nn.Module):
    """Logits of all layers' experts from embeddings [B,S,H]: `layers` causal transformer layers and a linear head.

    The authors' router differs: one output of E experts for all layers, rotary positions and an embedding of its own,
    trained on soft labels and the overlap of masks.

        pre = PreRouter(hidden_size, [64] * 16)
        loss = pre.loss(embeddings, [layer.topk_ids() for layer in record.layers.values()])   # distillation

    Args:
        hidden_size: of the embeddings.
        num_experts: of each MoE layer, in their order.
        layers: transformer layers; the paper has one. 0: each token by itself.
        heads: of the attention; a divisor of hidden_size.
        window: tokens that the attention sees, the token itself included. It has no positions, and the choice of a
            token depends on the last `reach` tokens alone, so that decoding keeps few embeddings.
    """

    @checked
    def __init__(
        self,
        hidden_size: Size,
        num_experts: Sizes,
        layers: Count = 1,
        *,
        heads: Annotated[Size, Divides("hidden_size")] = 4,
        window: Size = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.window = tuple(num_experts), window
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layers = nn.ModuleList(_Layer(hidden_size, heads, **kwargs) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden_size, **kwargs)
        self.head = nn.Linear(hidden_size, sum(num_experts), **kwargs)

    @property
    def reach(self) -> int:
        """Tokens, itself included, that a token's choice depends on."""
        return len(self.layers) * (self.window - 1) + 1

    def forward(self, embeddings: Tensor) -> tuple[Tensor, ...]:
        """Logits [T,E] of each MoE layer, for embeddings [B,S,H] or [S,H] of T tokens, in the dtype of the weights, or
        in 16 bits if that is float32."""
        size = self.norm.normalized_shape[0]
        explain_rows("embeddings", embeddings, size, self.head.weight)
        if embeddings.dim() not in (2, 3):
            raise ValueError(f"embeddings: expected [B,S,{size}] or [S,{size}], got {list(embeddings.shape)}")
        x = (embeddings if embeddings.dim() == 3 else embeddings[None]).to(self.head.weight.dtype)
        distance = torch.arange(x.shape[1], device=x.device)
        distance = distance[:, None] - distance
        mask = (distance >= 0) & (distance < self.window)
        for layer in self.layers:
            x = layer(x, mask)
        logits: Tensor = self.head(self.norm(x)).flatten(0, 1)
        return torch.split(logits, list(self.num_experts), dim=1)

    @torch.no_grad()
    def choose(self, embeddings: Tensor, top_k: int) -> list[Tensor]:
        """The best top_k experts [T,K] int32 of each MoE layer, the best first; ties go to the lowest id."""
        check_top_k(top_k, self.num_experts)
        return [choose(logits.float(), top_k) for logits in self(embeddings)]

    @checked
    def loss(self, embeddings: Tensor, topk_ids: Sequence[Tensor]) -> Tensor:
        """The cross-entropy to recorded choices [T,K] of each layer, -1 for none: the mean over layers and choices."""
        logits = self(embeddings)
        if len(topk_ids) != len(logits):
            raise ValueError(f"topk_ids: expected the choices of {len(logits)} layers, got {len(topk_ids)}")
        losses = []
        for layer, (own, ids) in enumerate(zip(logits, topk_ids, strict=True)):
            if len(ids) != len(own):
                raise ValueError(f"topk_ids: expected {len(own)} tokens in layer {layer}, got {len(ids)}")
            real = (ids >= 0).to(own.device)
            chosen = own.float().log_softmax(-1).gather(1, ids.to(own.device).long().clamp(min=0))
            losses.append(-(chosen * real).sum() / real.sum().clamp(min=1))
        return torch.stack(losses).mean()


def check_top_k(top_k: int, num_experts: Sequence[int]) -> None:
    """Raises for a number of choices that a layer does not have."""
    if convert("top_k", top_k, Size) > min(num_experts):
        raise ValueError(f"top_k: expected 1 to {min(num_experts)}, got {top_k}")


class _Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, hidden_size: int, heads: int, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"device": device, "dtype": dtype}
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_size, **kwargs) for _ in range(2))
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False, **kwargs)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False, **kwargs)
        self.up = nn.Linear(hidden_size, 4 * hidden_size, **kwargs)
        self.down = nn.Linear(4 * hidden_size, hidden_size, **kwargs)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, size = x.shape
        qkv = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, size // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, size))
        y: Tensor = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return y


class Listener:
    """The choices of a PreRouter for the running call of a model, from the output of its embedding.

    An output [B,S,H] of one token per sequence continues the sequences before; any other starts new ones. Padding
    counts as tokens.
    """

    @checked
    def __init__(self, pre_router: Any, embedding: nn.Module, top_k: int) -> None:
        _check_pre_router(pre_router)
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
    methods = {name: layer.routing_method(name) for name, layer in found.items()}
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


def pregate(model: nn.Module, enabled: bool = True) -> list[str]:
    """Makes the routers of a model pre-gates, in place, and returns the names of the blocks that have one: all but the
    first. enabled=False undoes it.

        routing.pregate(model)
        loss = ...(model(x))     # fine-tune
        offload.FromPreGate(model)

    Raises:
        ValueError: fewer than two blocks with routers of switchgear, or blocks of different hidden sizes. Nothing is
            changed.
    """
    blocks = {name: block.gate for name, block in moe_blocks(model).items() if isinstance(block.gate, Router)}
    if len(blocks) < 2 or len(set(map(id, blocks.values()))) < len(blocks):
        raise ValueError(f"model: expected at least two MoE layers with routers of switchgear, got {len(blocks)}")
    sizes = {gate.hidden_size for gate in blocks.values()}
    if len(sizes) > 1:
        raise ValueError(f"model: expected blocks of one hidden size, got {sorted(sizes)}")
    names, gates = list(blocks), list(blocks.values())
    for gate in gates:
        gate.reads_from = gate.passes_to = None
    if enabled:
        for name, before, gate in zip(names[1:], gates, gates[1:], strict=False):
            before.passes_to = gate.reads_from = Handover(name)
    return names[1:]
