# SPDX-License-Identifier: BSD-3-Clause
"""ProgressivePruner: experts are dropped while a model is fine-tuned, until one is left (arXiv:2206.00277)."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from switchgear.checks import Range, Size, checked
from switchgear.compress.surgery import compute_choice
from switchgear.experts import Experts
from switchgear.functional import Routing
from switchgear.integrations.blocks import read_network, write_shared
from switchgear.integrations.moe_blocks import MoeBlock, moe_blocks
from switchgear.layers.shared import SharedExperts
from switchgear.modules import MoE
from switchgear.routing.change import Change, overridden_router
from switchgear.routing.context import NOTHING_KNOWN, Context, Select, is_recomputing
from switchgear.routing.counting import unseen
from switchgear.routing.router import Router
from switchgear.weights.module import check_plain


@dataclass
class _Layer:
    """What is known about a layer: the experts left, and their proficiency in this window."""

    router: Router
    alive: Tensor  # [E] bool
    scores: Tensor  # [E] float64


class _Surviving:
    """A selection among the experts left: the others' logits are -inf, so the weights of the rest are normalised as if
    they did not exist, and no token gets them."""

    def __init__(self, select: Select, layer: _Layer, criterion: str) -> None:
        self.select, self.layer, self.criterion = select, layer, criterion

    def __call__(self, router_logits: Tensor, context: Context = NOTHING_KNOWN, bias: Tensor | None = None) -> Routing:
        dropped = ~self.layer.alive.to(router_logits.device)
        never = torch.zeros(len(dropped), device=router_logits.device, dtype=torch.float32)
        never = never.masked_fill(dropped, -math.inf)
        masked = router_logits.masked_fill(dropped, -math.inf)
        routing = self.select(masked, context, never if bias is None else bias + never)
        gone = [expert for expert, alive in enumerate(self.layer.alive.tolist()) if not alive]
        ids, weights = Change(disable=gone).edit(routing.topk_ids, routing.topk_weights, len(dropped))
        routing = routing._replace(topk_ids=ids, topk_weights=weights)
        if context.training and not is_recomputing():
            with unseen(routing.topk_ids):
                self._count(routing)
        return routing

    def _count(self, routing: Routing) -> None:
        ids, weights = routing.topk_ids.detach(), routing.topk_weights.detach().double()
        total = weights.sum(-1, keepdim=True)
        share = weights / torch.where(total == 0, 1, total) if self.criterion == "alpha" else torch.ones_like(weights)
        scores = share.new_zeros(len(self.layer.alive) + 1)
        index = torch.where(ids < 0, len(self.layer.alive), ids.long())
        scores = scores.scatter_add(0, index.flatten(), share.masked_fill(ids < 0, 0).flatten())
        self.layer.scores += scores[:-1].cpu()


class ProgressivePruner:
    """Drops experts of switchgear's MoE layers during fine-tuning, layer by layer, until each has one.

        with ProgressivePruner(model, total_steps=1000) as pruner:
            for batch in batches:
                loss(model, batch).backward()
                optimizer.step()
                pruner.step()
        dense = pruner.export()          # a dense FFN per layer: {"layers.0": SharedExperts(…), …}

    Steps up to force_at · total_steps are split into windows. In each, the proficiency of an expert is its share of
    the normalised weights of all choices (criterion="alpha") or of the choices (criterion="hit_rate"), the same with
    top_k = 1. At the end of window w of n, experts with less than beta · w/n of the mean share of those left are
    dropped; the best one stays. After the last window only the best is left, and the rest of the training tunes one
    expert. `windows=1` is the eager variant: all at once.

    Dropped experts get no tokens, and no gradients but zeros. Evaluation is pruned as well. Leaving the `with` block
    undoes the pruning, so call `export` inside.

    Args:
        model: has MoE layers of switchgear whose weights are normalised over the experts left: a softmax, or normalize.
        total_steps: optimizer steps of the training.
        beta: of the last window. The paper does not give its schedule; 1 drops what is below the mean.
        group: a torch.distributed process group over which proficiency is summed.

    Raises ValueError for a model without such layers, or an option out of range.
    """

    @checked
    def __init__(
        self,
        model: nn.Module,
        total_steps: Size,
        *,
        criterion: Literal["alpha", "hit_rate"] = "alpha",
        windows: Size = 10,
        beta: Annotated[float, Range(0, math.inf)] = 1.0,
        force_at: Annotated[float, Range(0, 1, "low")] = 0.5,
        group: Any = None,
    ) -> None:
        self._forced = max(round(force_at * total_steps), 1)
        if windows > self._forced:
            raise ValueError(f"windows: expected at most {self._forced} steps of pruning, got {windows}")
        self.criterion, self.windows, self.beta, self.group = criterion, windows, beta, group
        self._model = model
        self._blocks = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
        if not self._blocks:
            raise ValueError("model: expected switchgear's MoE layers, got none")
        self._layers = {name: _make_layer(name, block) for name, block in self._blocks.items()}
        self._ends = {round(self._forced * (w + 1) / windows): w + 1 for w in range(windows)}
        self._step = 0
        self._stack = ExitStack()

    @property
    def survivors(self) -> dict[str, list[int]]:
        """The experts left, by layer."""
        return {name: layer.alive.nonzero().flatten().tolist() for name, layer in self._layers.items()}

    def __enter__(self) -> ProgressivePruner:
        for layer in self._layers.values():
            wrapper = partial(_Surviving, layer=layer, criterion=self.criterion)
            self._stack.enter_context(overridden_router(layer.router, wrapper))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def step(self) -> dict[str, list[int]]:
        """Call once per optimizer step. Returns the experts that it dropped, by layer."""
        self._step += 1
        window = self._ends.get(self._step)
        if window is None:
            return {}
        before = self.survivors
        for layer in self._layers.values():
            self._prune(layer, window)
        after = self.survivors
        gone = {name: [e for e in experts if e not in after[name]] for name, experts in before.items()}
        return {name: experts for name, experts in gone.items() if experts}

    def _prune(self, layer: _Layer, window: int) -> None:
        scores = layer.scores.clone()
        if self.group is not None:
            scores = scores.to(find_wire_device(layer.router, self.group))
            torch.distributed.all_reduce(scores, group=self.group)
            scores = scores.cpu()
        scores = scores.masked_fill(~layer.alive, -1)
        best = int(scores.argmax())
        if window == self.windows:
            layer.alive.fill_(False)
        else:
            mean = scores[layer.alive].mean()
            layer.alive &= scores >= self.beta * window / self.windows * mean
        layer.alive[best] = True
        layer.scores.zero_()

    def export(self) -> dict[str, nn.Module]:
        """A dense FFN per layer, SharedExperts with the expert left: what the routed part of the layer computes now.
        Raises ValueError while a layer has more than one, and for a layer that weights the one left by another number
        than 1, or not for all tokens."""
        found: dict[str, nn.Module] = {}
        blocks = {block.block: block for block in moe_blocks(self._model).values()}
        for name, experts in self.survivors.items():
            if len(experts) > 1:
                raise ValueError(f"{name}: expected one expert left, got {experts}; it is after step {self._forced}")
            found[name] = copy_expert(name, self._blocks[name].experts, experts[0])
            _check_weight(name, blocks[self._blocks[name]], experts[0])
        return found


def find_wire_device(router: Router, group: Any) -> torch.device:
    """Where a group's backend takes tensors: NCCL on the router's device alone, gloo anywhere."""
    if torch.distributed.get_backend(group) != "nccl":
        return torch.device("cpu")
    return next((parameter.device for parameter in router.parameters()), torch.device("cuda"))


def _check_weight(name: str, block: MoeBlock, expert: int) -> None:
    """Raises ValueError unless the layer gives the expert left the weight 1, and no other any, for random tokens."""
    weight: Tensor = block.block.gate.weight  # type: ignore[union-attr, assignment]
    x = torch.randn(64, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    ids, weights = compute_choice(block, x)
    shares = torch.stack([weights.masked_fill(ids != expert, 0).sum(-1), weights.masked_fill(ids < 0, 0).sum(-1)])
    if not torch.allclose(shares, torch.ones_like(shares), rtol=0, atol=8 * torch.finfo(weight.dtype).eps):
        low, high = shares[0].min(), shares[0].max()
        raise ValueError(
            f"{name}: expected the weight 1 of expert {expert}, the one left, got {low:.4g} to {high:.4g}; no network "
            "without a router computes that (a scale, a score that is not normalised, a capacity?), and outside of the "
            "`with` block all experts are back"
        )


def _make_layer(name: str, block: MoE) -> _Layer:
    router = block.gate
    if type(block.experts) is not Experts:
        raise ValueError(f"{name}: expected switchgear.Experts, got {type(block.experts).__name__}")
    if block.scale_input:
        raise ValueError(f"{name}: expected scale_input=False, got True")
    if router.select is None and router.score_function != "softmax" and not router.normalize:
        raise ValueError(f"{name}: expected a softmax or normalize=True, so that one expert left has the weight 1")
    if router.select is None and router.scale != 1:
        raise ValueError(f"{name}: expected scale=1, so that one expert left has the weight 1, got {router.scale}")
    count = router.num_experts
    return _Layer(router, torch.ones(count, dtype=torch.bool), torch.zeros(count, dtype=torch.float64))


def copy_expert(name: str, experts: nn.Module, expert: int) -> SharedExperts:
    """SharedExperts with a copy of the weights of `expert`. Raises ValueError, which names the layer, unless the
    experts are switchgear's, plain, and in this process."""
    if type(experts) is not Experts:
        raise ValueError(f"{name}: expected switchgear.Experts with plain weights, got {type(experts).__name__}")
    check_plain(name, experts)
    network = read_network(experts, expert)
    dense = SharedExperts(
        network.hidden_size, network.intermediate_size, alpha=experts.alpha, limit=experts.limit, **network.options()
    )
    write_shared(dense, network)
    return dense.train(experts.training)
