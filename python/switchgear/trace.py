# SPDX-License-Identifier: BSD-3-Clause
"""RoutingTrace: records which experts a model's tokens go to, per layer and per token id, while it runs.

A trace keeps only sums, on the model's device, so it may run over any number of batches. Nothing is read back until it
is inspected.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.functional import Routing
from switchgear.routing.router import Router

_FORMAT = 1  # version of the file format


class LayerTrace:
    """Sums over the tokens of a layer with E experts.

    Attributes:
        tokens_per_expert: [E] int64, choices that each expert served.
        weight_per_expert: [E] float64, the sum of their weights.
        entropy: float64 scalar, the sum over tokens of the entropy in nats of the router's softmax; NaN if its logits
            are not available (Hugging Face models).
        max_violation: float64 scalar, the sum over calls of max load / mean load - 1 (arXiv:2408.15664).
        num_dropped: int64 scalar, choices dropped by a capacity limit.
        num_tokens, num_calls: counts of tokens and calls.
    """

    def __init__(self, num_experts: int, device: torch.device | str = "cpu") -> None:
        self.num_experts = num_experts
        self.num_tokens = self.num_calls = 0
        self.tokens_per_expert = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.weight_per_expert = torch.zeros(num_experts, dtype=torch.float64, device=device)
        self.entropy = torch.zeros((), dtype=torch.float64, device=device)
        self.max_violation = torch.zeros((), dtype=torch.float64, device=device)
        self.num_dropped = torch.zeros((), dtype=torch.int64, device=device)
        self.pairs = _Counts()

    def add(
        self,
        topk_ids: Tensor,
        topk_weights: Tensor,
        router_logits: Tensor | None = None,
        num_dropped: Tensor | None = None,
        token_ids: Tensor | None = None,
    ) -> None:
        """Adds one call: topk_ids and topk_weights [T,K], -1 for none; router_logits [T,E]; token_ids [T]."""
        experts = torch.where(topk_ids < 0, self.num_experts, topk_ids).long().flatten()
        counts = torch.zeros(self.num_experts + 1, dtype=torch.int64, device=topk_ids.device)
        counts = counts.scatter_add(0, experts, torch.ones_like(experts))[:-1]
        weights = torch.zeros(self.num_experts + 1, dtype=torch.float64, device=topk_ids.device)
        weights = weights.scatter_add(0, experts, topk_weights.detach().double().flatten())[:-1]
        self.tokens_per_expert = self.tokens_per_expert + counts
        self.weight_per_expert = self.weight_per_expert + weights
        mean = counts.double().mean()
        self.max_violation = self.max_violation + torch.where(mean > 0, counts.max() / mean - 1, 0)
        if router_logits is None:
            self.entropy = self.entropy + torch.nan
        else:
            self.entropy = self.entropy + _entropy(router_logits.detach())
        if num_dropped is not None:
            self.num_dropped = self.num_dropped + num_dropped
        self.num_tokens += topk_ids.shape[0]
        self.num_calls += 1
        if token_ids is not None:
            keys = token_ids[:, None].long() * self.num_experts + topk_ids
            self.pairs.add(keys[topk_ids >= 0])

    def tokens_by_id(self) -> dict[int, Tensor]:
        """For each token id, how often each expert served it, [E] int64. Empty without recorded token ids."""
        keys, counts = self.pairs.total()
        result: dict[int, Tensor] = {}
        for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
            row = result.setdefault(key // self.num_experts, torch.zeros(self.num_experts, dtype=torch.int64))
            row[key % self.num_experts] = count
        return result

    def state(self) -> dict[str, Any]:
        keys, counts = self.pairs.total()
        tensors = {name: getattr(self, name).cpu() for name in _SUMS}
        return {**tensors, "pairs": keys.cpu(), "counts": counts.cpu(), "sizes": [self.num_tokens, self.num_calls]}

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> LayerTrace:
        """Raises KeyError, TypeError or ValueError for anything but a `state`."""
        layer = cls(len(state["tokens_per_expert"]))
        for name in _SUMS:
            _check_like(name, state[name], getattr(layer, name))
            setattr(layer, name, state[name])
        keys, counts = state["pairs"], state["counts"]
        for name, tensor in (("pairs", keys), ("counts", counts)):
            _check_like(name, tensor, torch.empty(len(counts), dtype=torch.int64))
        layer.num_tokens, layer.num_calls = (int(size) for size in state["sizes"])
        layer.pairs.parts = [(keys, counts)]
        return layer


_SUMS = ("tokens_per_expert", "weight_per_expert", "entropy", "max_violation", "num_dropped")


def _check_like(name: str, tensor: Any, like: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.shape != like.shape or tensor.dtype is not like.dtype:
        got = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name}: expected {like.dtype} {list(like.shape)}, got {got}")


class _Counts:
    """How often each key occurred. Parts are merged as they grow, so memory grows with the distinct keys only."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor]] = []

    def add(self, keys: Tensor) -> None:
        self.parts.append(torch.unique(keys, return_counts=True))
        if len(self.parts) > 16:
            self.total()

    def total(self) -> tuple[Tensor, Tensor]:
        if not self.parts:
            return torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        keys, index = torch.unique(torch.cat([keys for keys, _ in self.parts]), return_inverse=True)
        counts = torch.zeros_like(keys).scatter_add(0, index, torch.cat([counts for _, counts in self.parts]))
        self.parts = [(keys, counts)]
        return keys, counts


def _is_recomputing() -> bool:
    """Whether this call runs inside backward, where checkpointing repeats a forward that was recorded already."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _entropy(router_logits: Tensor) -> Tensor:
    """The sum over tokens; rows without finite logits count as 0."""
    log_p = router_logits.float().log_softmax(-1)
    entropy: Tensor = torch.special.entr(log_p.exp())
    return entropy.nan_to_num().sum(dtype=torch.float64)


@dataclass(frozen=True)
class LayerSummary:
    """Summary statistics of a layer."""

    name: str
    num_experts: int
    num_tokens: int
    experts_per_token: float  # counts served choices
    mean_weight: float  # per choice
    busiest: int  # the expert with the largest load
    max_violation: float  # over all calls: max load / mean load - 1
    mean_max_violation: float  # the mean over calls
    never_used: int  # experts without a token
    load_entropy: float  # of the load shares, divided by log E: 1 is balanced
    router_entropy: float  # mean over tokens, divided by log E; NaN without logits
    dropped: float  # fraction of the choices


class RoutingTrace:
    """Records the choices of a model's routers while it runs.

        with RoutingTrace(model) as trace:
            for batch in batches:
                model(batch)
        print(trace)
        trace.layers["layers.0.mlp.gate"].tokens_per_expert

    Works on switchgear's routers, and on Hugging Face models whose experts run on switchgear
    (experts_implementation="switchgear", or accelerate). Entering it again continues the recording. Calls that gradient
    checkpointing repeats during backward are not counted again.

    Args:
        model: any module with such layers. None for a loaded trace.
        by_token_id: also count which experts serve which token id. The ids are the model's argument input_ids or
            token_ids, or else its first integer tensor; they are ignored for layers with another number of tokens.
        layers: names of the modules to record; all if None.

    Raises:
        ValueError: if the model has no such layer.
    """

    def __init__(
        self, model: nn.Module | None = None, *, by_token_id: bool = False, layers: Collection[str] | None = None
    ) -> None:
        self.layers: dict[str, LayerTrace] = {}
        self.by_token_id = by_token_id
        self._model = model
        self._routers: dict[str, Router] = {}
        self._foreign: dict[str, nn.Module] = {}
        self._token_ids: Tensor | None = None
        self._hooks = ExitStack()
        if model is None:
            return
        self._routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
        if not self._routers:
            self._foreign = _hugging_face_experts(model)
        found = {**self._routers, **self._foreign}
        if not found:
            raise ValueError("model: expected one with routers, or with experts that run on switchgear, got none")
        if layers is not None:
            missing = sorted(set(layers) - set(found))
            if missing:
                raise ValueError(f"layers: expected some of {', '.join(found)}; got {missing[0]}")
            self._routers = {name: module for name, module in self._routers.items() if name in set(layers)}
            self._foreign = {name: module for name, module in self._foreign.items() if name in set(layers)}

    # ---- recording ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> RoutingTrace:
        if self._model is None:
            raise ValueError("model: expected one to record, got a trace that was loaded")
        if self.by_token_id:
            self._hooks.callback(self._model.register_forward_pre_hook(self._remember, with_kwargs=True).remove)
        for name, router in self._routers.items():
            self._hooks.callback(router.register_forward_hook(self._hook(name)).remove)
        if self._foreign:
            from switchgear.integrations.choices import on_choice

            self._hooks.enter_context(on_choice(self._foreign, self._see))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._token_ids = None
        self._hooks.close()

    def reset(self) -> None:
        """Clears the recording."""
        self.layers.clear()

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = [kwargs.get("input_ids"), kwargs.get("token_ids")]
        for value in (*named, *args):
            if isinstance(value, Tensor) and not value.is_floating_point():
                self._token_ids = value.reshape(-1)
                return
        self._token_ids = None

    def _hook(self, name: str) -> Any:
        def record(router: nn.Module, inputs: Any, routing: Routing) -> None:
            if _is_recomputing():
                return
            self._layer(name, routing.num_experts, routing.topk_ids).add(
                routing.topk_ids, routing.topk_weights, routing.router_logits, routing.num_dropped,
                self._ids_for(routing.topk_ids),
            )  # fmt: skip

        return record

    def _see(self, name: str, topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
        if _is_recomputing():
            return topk_ids, topk_weights
        rows = topk_ids.reshape(-1, topk_ids.shape[-1])
        rows = rows.masked_fill((rows < 0) | (rows >= num_experts), -1)
        layer = self._layer(name, num_experts, rows)
        layer.add(rows, topk_weights.reshape(rows.shape), token_ids=self._ids_for(rows))
        return topk_ids, topk_weights

    def _layer(self, name: str, num_experts: int, like: Tensor) -> LayerTrace:
        if name not in self.layers:
            self.layers[name] = LayerTrace(num_experts, like.device)
        return self.layers[name]

    def _ids_for(self, rows: Tensor) -> Tensor | None:
        ids = self._token_ids
        return None if ids is None or ids.shape[0] != rows.shape[0] else ids.to(rows.device)

    # ---- inspection --------------------------------------------------------------------------------------------------

    def summary(self) -> list[LayerSummary]:
        """A summary of each layer, in the order in which they first ran."""
        return [_summary(name, layer) for name, layer in self.layers.items()]

    def __str__(self) -> str:
        rows = self.summary()
        width = max([5, *(len(row.name) for row in rows)])
        lines = [f"{'layer':<{width}}   tokens  experts  per token  busiest  max violation  unused  entropy  dropped"]
        for row in rows:
            sizes = f"{row.num_tokens:7}  {row.num_experts:7}  {row.experts_per_token:9.2f}  {row.busiest:7}"
            balance = f"{row.max_violation:13.2f}  {row.never_used:6}  {row.router_entropy:7.2f}  {row.dropped:7.1%}"
            lines.append(f"{row.name:<{width}}  {sizes}  {balance}")
        return "\n".join(lines)

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """Plots the load with a row per layer: each expert's load divided by the mean load. Returns matplotlib's
        figure, and writes it to `path` if given. Needs matplotlib."""
        if not self.layers:
            raise ValueError("trace: expected one that has recorded something, got an empty one")
        from matplotlib.figure import Figure

        width = max(layer.num_experts for layer in self.layers.values())
        image = torch.full((len(self.layers), width), torch.nan, dtype=torch.float64)
        for row, layer in enumerate(self.layers.values()):
            counts = layer.tokens_per_expert.cpu().double()
            image[row, : layer.num_experts] = counts / counts.mean().clamp(min=1e-12)
        figure = Figure(figsize=(min(4 + width / 8, 16), 1.5 + 0.3 * len(self.layers)), layout="constrained")
        axes = figure.subplots()
        shown = axes.imshow(image.numpy(), aspect="auto", interpolation="nearest", vmin=0, cmap="viridis")
        axes.set_yticks(range(len(self.layers)), list(self.layers))
        axes.set_xlabel("expert")
        figure.colorbar(shown, ax=axes, label="load by mean load")
        if path is not None:
            figure.savefig(path)
        return figure

    # ---- files -------------------------------------------------------------------------------------------------------

    def save(self, path: str | PathLike[str]) -> None:
        """Writes the recording with torch.save, moved to the CPU."""
        layers = {name: layer.state() for name, layer in self.layers.items()}
        torch.save({"format": _FORMAT, "by_token_id": self.by_token_id, "layers": layers}, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> RoutingTrace:
        """Loads a saved trace for inspection. Raises ValueError for any other file."""
        with open(path, "rb") as file:
            try:
                return cls._of_data(torch.load(file, weights_only=True))
            except Exception as error:  # torch.load raises many kinds for files of others
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                raise ValueError(f"path: expected a file of RoutingTrace.save, got {path} ({reason})") from error

    @classmethod
    def _of_data(cls, data: Any) -> RoutingTrace:
        if not isinstance(data, dict) or data["format"] != _FORMAT:
            raise ValueError("another format")
        trace = cls(by_token_id=bool(data["by_token_id"]))
        trace.layers = {str(name): LayerTrace.of_state(state) for name, state in data["layers"].items()}
        return trace


def _hugging_face_experts(model: nn.Module) -> dict[str, nn.Module]:
    try:
        from switchgear.integrations.choices import experts_of
    except ImportError:  # transformers is not installed
        return {}
    return experts_of(model)


def _summary(name: str, layer: LayerTrace) -> LayerSummary:
    counts = layer.tokens_per_expert.cpu().double()
    total, tokens = float(counts.sum()), max(layer.num_tokens, 1)
    log_experts = float(torch.tensor(float(max(layer.num_experts, 2))).log())
    dropped = int(layer.num_dropped)
    return LayerSummary(
        name=name,
        num_experts=layer.num_experts,
        num_tokens=layer.num_tokens,
        experts_per_token=total / tokens,
        mean_weight=float(layer.weight_per_expert.sum()) / max(total, 1.0),
        busiest=int(counts.argmax()),
        max_violation=float(counts.max() / counts.mean() - 1) if total else 0.0,
        mean_max_violation=float(layer.max_violation) / max(layer.num_calls, 1),
        never_used=int((counts == 0).sum()),
        load_entropy=float(torch.special.entr(counts / max(total, 1.0)).sum()) / log_experts,
        router_entropy=float(layer.entropy) / tokens / log_experts,
        dropped=dropped / max(total + dropped, 1.0),
    )
