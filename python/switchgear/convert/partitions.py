# SPDX-License-Identifier: BSD-3-Clause
"""Partitions of the neurons of a dense feed-forward network into experts, and how much each neuron matters. Neuron n is
row n of gate and up and column n of down; the network is the sum of its neurons, so any partition is exact."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from switchgear import ops
from switchgear.checks import Finite, FiniteTensor, Seed, Shape, Size, checked
from switchgear.convert.modules import NAMES, call_model, choose_layers, find_dense_layers, is_feed_forward, watch_rows
from switchgear.integrations.blocks import FeedForward
from switchgear.trace.observe import inputs_of
from switchgear.utils.modules import set_eval

Method = Literal["random", "contiguous", "interleave", "cluster", "gradient", "domain_masks"]
LLOYD_STEPS = 20
DOWN = tuple(dict.fromkeys(down for _, _, down in NAMES))


@dataclass(frozen=True)
class Partition:
    """The neurons of each expert and of the shared expert, as ascending int64 indices.

    is_split: each neuron is in exactly one of them, so that all of them together are the dense network. Otherwise
    neurons are in several experts, or in none (interleave with shared ones, domain masks).
    """

    experts: tuple[Tensor, ...]
    shared: Tensor
    is_split: bool = True

    @property
    def widths(self) -> tuple[int, ...]:
        """Neurons of each expert."""
        return tuple(len(index) for index in self.experts)

    @property
    def num_experts(self) -> int:
        """E, without the shared expert."""
        return len(self.experts)


@checked
def partition(
    weights: FeedForward,
    num_experts: Size,
    method: Method = "random",
    *,
    shared: int | float = 0,
    importance: FiniteTensor | None = None,
    keep: Finite = 0.5,
    seed: Seed = 0,
) -> Partition:
    """Divides the neurons of a network; see split_dense for the methods.

    Raises:
        ValueError: an unknown method, a width that does not divide, or importance missing or of another shape.
    """
    width = weights.intermediate_size
    if method == "domain_masks":
        return _split_by_masks(_read_importance(importance, width, method), num_experts, keep, shared)
    in_each = method == "interleave" and isinstance(shared, float)  # a fraction of each expert, not of the network
    num_shared = 0 if in_each else _count_shared(shared, num_experts, width)
    rest = width - num_shared
    if rest % num_experts or rest < num_experts:
        raise ValueError(
            f"num_experts: expected a divisor of the {rest} neurons that are not shared ({width} in all), "
            f"got {num_experts}"
        )
    if method == "gradient":
        return _split_by_gradient(_read_importance(importance, width, method), num_experts, num_shared)
    ranked = torch.arange(width)
    if importance is not None:  # the most important neurons are shared
        ranked = _read_importance(importance, width, method).mean(0).argsort(descending=True, stable=True)
    if method == "interleave":
        size = rest // num_experts
        if in_each:
            return _interleave(ranked, num_experts, _count_shared(shared, 1, size), size)
        return _interleave(ranked, num_experts, num_shared, num_shared + size)
    first, order = ranked[:num_shared].sort().values, ranked[num_shared:].sort().values
    if method == "random":
        generator = torch.Generator().manual_seed(seed)
        order = order[torch.randperm(rest, generator=generator)]
    elif method == "cluster":
        rows = weights.up if weights.gate is None else weights.gate
        directions = F.normalize(rows[order.to(rows.device)].detach().float().cpu(), dim=1)
        ids = balanced_kmeans(directions, num_experts, seed)
        order = order[ids.argsort(stable=True)]
    return Partition(tuple(part.sort().values for part in order.chunk(num_experts)), first)


@checked
def balanced_kmeans(rows: Annotated[Tensor, Shape("N", "D")], num_clusters: Size, seed: Seed = 0) -> Tensor:
    """[N] int64: a cluster for each of rows [N,D] float32, all of N / C rows, by Lloyd's steps with the balanced
    assignment of the native op. The result with the least squared distance is returned."""
    if rows.dtype is not torch.float32:
        raise TypeError(f"rows: expected torch.float32, got {rows.dtype}")
    if num_clusters > len(rows):
        raise ValueError(f"num_clusters: expected 1 to {len(rows)}, got {num_clusters}")
    generator = torch.Generator().manual_seed(seed)
    centers = rows[torch.randperm(len(rows), generator=generator)[:num_clusters]]
    best, best_ids = math.inf, torch.zeros(len(rows), dtype=torch.int64)
    ids: Tensor | None = None
    for _ in range(LLOYD_STEPS):
        distances = torch.cdist(rows, centers).square()
        new = ops.assign_balanced(-distances, None, 1, -1.0, 200).long()
        total = float(distances.gather(1, new[:, None]).sum())
        if total < best:
            best, best_ids = total, new
        if ids is not None and torch.equal(new, ids):
            break
        ids = new
        sums = torch.zeros_like(centers).index_add_(0, ids, rows)
        centers = sums / torch.bincount(ids, minlength=num_clusters)[:, None]
    return best_ids


def _count_shared(shared: int | float, num_experts: int, width: int) -> int:
    """A whole number counts shared experts as wide as the others; a fraction is one of the neurons."""
    if not shared:
        return 0
    if isinstance(shared, int):
        if shared < 0 or width % (num_experts + shared):
            raise ValueError(
                f"shared: expected a number such that {num_experts} + shared divides {width}, got {shared}"
            )
        return width // (num_experts + shared) * shared
    if not 0 <= shared < 1:
        raise ValueError(f"shared: expected a fraction in [0, 1) or a whole number, got {shared}")
    return width - (width - round(shared * width)) // num_experts * num_experts  # the rest divides


def _interleave(ranked: Tensor, num_experts: int, num_shared: int, size: int) -> Partition:
    """Each expert has the first neurons and every E-th of the others, cut to its size: the last ones may be in none."""
    shared, others = ranked[:num_shared], ranked[num_shared:]
    experts = tuple(torch.cat((shared, others[e::num_experts]))[:size].sort().values for e in range(num_experts))
    return Partition(experts, ranked[:0], not num_shared or num_experts == 1)


def _read_importance(importance: Tensor | None, width: int, method: str) -> Tensor:
    """[G,I] float32 on the CPU."""
    if importance is None:
        raise ValueError(f"importance: expected a tensor [I] or [G,I] for method={method!r}, got None")
    rows = importance.detach().float().cpu()
    rows = rows[None] if rows.dim() == 1 else rows
    if rows.dim() != 2 or rows.shape[1] != width:
        raise ValueError(f"importance: expected shape [{width}] or [G, {width}], got {list(importance.shape)}")
    return rows


def _split_by_gradient(importance: Tensor, num_experts: int, num_shared: int) -> Partition:
    """The most important neurons are shared. The others: with a row of importance per expert, such that the sum of the
    importance of each expert's neurons to it is near its maximum; with one row, dealt out in order of importance."""
    groups = len(importance)
    if groups not in (1, num_experts):
        raise ValueError(f"importance: expected 1 or {num_experts} rows, one per expert, got {groups}")
    if groups == 1:
        ranked = importance[0].argsort(descending=True, stable=True)
        turns = ranked[num_shared:].view(-1, num_experts)
        turns = torch.where((torch.arange(len(turns)) % 2 == 1)[:, None], turns.flip(1), turns)  # boustrophedon
        return Partition(
            tuple(turns[:, e].sort().values for e in range(num_experts)), ranked[:num_shared].sort().values
        )
    is_shared = _vote(importance, num_shared)
    rest = (~is_shared).nonzero().flatten()
    values = importance[:, rest].T.contiguous()
    ids = ops.assign_balanced(values / values.abs().max().clamp(min=1e-30), None, 1, -1.0, 1000).long()
    return Partition(tuple(rest[ids == e] for e in range(num_experts)), is_shared.nonzero().flatten())


def _vote(importance: Tensor, count: int) -> Tensor:
    """[I] bool: the `count` neurons that most experts have among the best of their row, as many as they get; after each
    round of votes the best are chosen among the others (LLaMA-MoE v2)."""
    num_experts, width = importance.shape
    size = (width - count) // num_experts
    ranked = importance.argsort(dim=1, descending=True, stable=True)
    taken = torch.zeros(width, dtype=torch.bool)
    while missing := count - int(taken.sum()):
        votes = torch.bincount(ranked[:, :size].flatten(), minlength=width)
        taken[(votes == votes.max()).nonzero().flatten()[:missing]] = True
        ranked = ranked[~taken[ranked]].view(num_experts, -1)
    return taken


def _split_by_masks(importance: Tensor, num_experts: int, keep: float, shared: int | float) -> Partition:
    """Read-ME: each domain keeps its top share of neurons; the intersection of all is shared, the rest of a mask is
    the domain's expert."""
    if importance.shape[0] != num_experts:
        raise ValueError(f"importance: expected {num_experts} rows, one per domain, got {importance.shape[0]}")
    if shared:
        raise ValueError(f"shared: expected 0 for domain masks, whose intersection is shared; got {shared}")
    width = importance.shape[1]
    count = round(keep * width)
    if not 0 < keep <= 1 or not count:
        raise ValueError(f"keep: expected a fraction in (0, 1] that keeps a neuron, got {keep}")
    best = importance.argsort(dim=1, descending=True, stable=True)[:, :count]
    masks = torch.zeros(importance.shape, dtype=torch.bool).scatter_(1, best, True)
    residual = masks.all(0)
    if torch.equal(masks.any(0), residual):
        raise ValueError(f"importance: expected domains that keep different neurons, got the same {count} for all")
    experts = tuple((mask & ~residual).nonzero().flatten() for mask in masks)
    return Partition(experts, residual.nonzero().flatten(), False)


# ---- importance -----------------------------------------------------------------------------------------------------


@checked
def neuron_importance(
    module: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor], *, mlp: nn.Module | None = None
) -> Tensor:
    """[I] float32: the first-order change of the loss if a neuron is removed for a token, |h · ∂loss/∂h| of its
    activation h, the mean over the tokens of all batches, in eval() and without padding (LLaMA-MoE v2,
    arXiv:2411.15708). A loss that sums over tokens gives the same for any division into batches.

    Args:
        module: computes the loss: loss(module(batch)); a mapping is passed as keywords.
        mlp: the feed-forward module inside it; by default `module` itself.

    Gradients of parameters are left as they are.
    """
    down = _find_down(module if mlp is None else mlp)
    name = next((name for name, part in module.named_modules() if part is down), None)
    if name is None:
        raise ValueError(f"mlp: expected a part of module, got another {type(mlp).__name__}")
    with set_eval(module):
        (total,) = _sum_gradients(module, batches, loss, {name: down})
    return total


@checked
def layer_importance(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor] | None = None,
    *,
    by: Literal["gradient", "activation"] = "gradient",
    layers: str | Sequence[int] = "all",
) -> dict[int, Tensor]:
    """The importance [I] float32 of the neurons of each dense feed-forward layer of a model, in one pass over batches
    in eval(): split_dense(model, 8, 2, method="gradient", importance=…). For a row per expert, and for domain masks,
    stack the results for each domain's texts; each row is a mean over tokens, so long domains count no more.

        scores = [layer_importance(llama, texts, by="activation") for texts in domains]
        masks = {layer: torch.stack([score[layer] for score in scores]) for layer in scores[0]}

    Args:
        batches: passed to the model; a mapping as keywords.
        loss: of the model's output; by default its attribute `loss`. Not used for activations.
        by: "gradient", see neuron_importance; "activation": the mean |activation| of the neuron. Both without padding
            (attention_mask 0).
        layers: indices of feed-forward layers; the keys of the result.

    Raises:
        ValueError: the model has no dense feed-forward layers, or no batch has tokens for one of them.
    """
    found = find_dense_layers(model)
    chosen = choose_layers(layers, len(found))
    downs = {name: _find_down(mlp) for name, mlp in (found[layer] for layer in chosen)}
    with set_eval(model):
        if by == "activation":
            totals = _sum_activations(model, batches, downs)
        else:
            totals = _sum_gradients(model, batches, _read_loss if loss is None else loss, downs)
    return dict(zip(chosen, totals, strict=True))


def _sum_gradients(
    module: nn.Module, batches: Iterable[Any], loss: Callable[[Any], Tensor], downs: Mapping[str, nn.Linear]
) -> list[Tensor]:
    totals: dict[str, Tensor] = {}
    counts = dict.fromkeys(downs, 0)
    seen: list[tuple[str, Tensor, Tensor | None]] = []  # layer, activations, mask of this forward
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        inputs = stack.enter_context(inputs_of(module))
        for name, down in downs.items():

            def see(_: Any, args: tuple[Tensor, ...], name: str = name) -> Tensor:
                h = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()  # all before may be frozen
                seen.append((name, h, inputs.mask(name, h.shape[:-1].numel())))
                return h

            stack.callback(down.register_forward_pre_hook(see).remove)
        for batch in _require_batches(batches):
            for name, change, tokens in _sum_changes(loss(call_model(module, batch)), seen):
                totals[name] = totals.get(name, 0) + change
                counts[name] += tokens
    return _divide(totals, counts)


def _sum_changes(loss: Tensor, seen: list[tuple[str, Tensor, Tensor | None]]) -> list[tuple[str, Tensor, int]]:
    """|h · ∂loss/∂h| summed over the tokens of what `seen` has of a forward, and how many they are; empties it, so that
    nothing is kept."""
    found = list(seen)  # checkpointing adds more in the backward pass
    grads = torch.autograd.grad(loss, [h for _, h, _ in found]) if found else ()
    seen.clear()
    changes = []
    for (name, h, mask), grad in zip(found, grads, strict=True):
        rows = (h.detach().float() * grad.float()).abs().reshape(-1, h.shape[-1])
        rows = rows if mask is None else rows[mask.to(rows.device)]
        changes.append((name, rows.sum(0), len(rows)))
    return changes


@torch.no_grad()
def _sum_activations(model: nn.Module, batches: Iterable[Any], downs: Mapping[str, nn.Linear]) -> list[Tensor]:
    sums = {name: torch.zeros(down.in_features, device=down.weight.device) for name, down in downs.items()}
    counts = dict.fromkeys(downs, 0)

    def add(name: str, rows: Tensor) -> None:
        sums[name] += rows.float().abs().sum(0)
        counts[name] += len(rows)

    with watch_rows(model, downs, add):
        for batch in _require_batches(batches):
            call_model(model, batch)
    return _divide(sums, counts)


def _require_batches(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches. Raises ValueError if there are none."""
    is_empty = True
    for batch in batches:
        is_empty = False
        yield batch
    if is_empty:
        raise ValueError("batches: expected at least one, got none")


def _divide(sums: Mapping[str, Tensor], counts: Mapping[str, int]) -> list[Tensor]:
    """The means over the tokens of each layer."""
    if idle := [name for name, count in counts.items() if not count]:
        raise ValueError(f"batches: expected tokens for {idle[0] or 'mlp'}, got none")
    return [sums[name] / count for name, count in counts.items()]


def _read_loss(output: Any) -> Tensor:
    found = getattr(output, "loss", None)
    if not isinstance(found, Tensor):
        raise ValueError(
            "loss: expected a function, or batches with labels, for which the model returns a loss; got none"
        )
    return found


def _find_down(mlp: nn.Module) -> nn.Linear:
    linear = next((part for name in DOWN if isinstance(part := getattr(mlp, name, None), nn.Linear)), None)
    if linear is None or not is_feed_forward(mlp):
        raise ValueError(f"mlp: expected a dense feed-forward module, got {type(mlp).__name__}")
    return linear
