# SPDX-License-Identifier: BSD-3-Clause
"""RoutingTrace: records which experts a model's tokens go to, per layer and per token id, while it runs.

A trace keeps only sums, on the model's device, so it may run over any number of batches. Nothing is read back until it
is inspected.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.checks import Size, checked
from switchgear.files import AnyPath, save_whole
from switchgear.integrations.experts import is_of
from switchgear.integrations.moe_blocks import MoeBlock
from switchgear.trace.layer import DEFAULT, LayerSummary, LayerTrace, kinds_of, summary_of
from switchgear.trace.load import Log, log_to
from switchgear.trace.observe import Observation, watch
from switchgear.trace.routed_layers import pick, traceable
from switchgear.trace.routing_record import load_recording

_ROWS = 8192  # of experts' outputs at a time
# Their experts take other arguments than (x, ids, weights).
_OTHERS = ("JetMoeMoE", "Llama4TextMoe", "NllbMoeSparseMLP", "SwitchTransformersSparseMLP")
_FORMAT = 1  # version of the file format


class RoutingTrace:
    """Records the choices of a model's routers while it runs.

        with RoutingTrace(model) as trace:
            for batch in batches:
                model(batch)
        print(trace)
        trace.layers["layers.0.mlp.gate"].tokens_per_expert

    Works on switchgear's routers, and on the MoE layers of Hugging Face models, whatever runs them. Entering it again
    continues the recording. Calls that gradient checkpointing repeats during backward are not counted again.

    Args:
        model: any module with such layers. None for a loaded trace.
        record: what to keep, some of "counts", "weights", "entropy", "probabilities", "norms", "inputs",
            "coactivation"; see LayerTrace. Counts are always kept. "norms" runs the experts a second time.
        by_token_id: also count which experts serve which token id. The ids are the model's argument input_ids or
            token_ids, or else its first integer tensor; they are ignored for layers with another number of tokens.
        layers: names of the modules to record; all if None.
        tokens: how many inputs a layer keeps with "inputs", as a uniform sample of all.

    Padding does not count: tokens for which the model's argument attention_mask [B,L] or [B,1,1,L] is 0, or, if it is
    a floating-point one [B,1,1,L], which is added to scores, is not 0; of [B,1,S,L], those that neither their own query
    nor a later one sees.

    Raises:
        ValueError: if the model has no such layer, a layer cannot record this, or a trace is entered while it records.
    """

    @checked
    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        record: Collection[str] = DEFAULT,
        by_token_id: bool = False,
        layers: Collection[str] | None = None,
        tokens: Size = 1024,
    ) -> None:
        self.layers: dict[str, LayerTrace] = {}
        self.by_token_id, self.record, self.tokens = by_token_id, kinds_of(record), tokens
        self._model = model
        self._found = {} if model is None else pick(traceable(model), layers)
        self._hooks = ExitStack()
        self.is_recording = False
        if "norms" in self.record:
            for name, layer in self._found.items():
                if layer.block is None:
                    raise ValueError(f"record: expected experts with each router for norms, got none for {name}")
                check_outputs(layer.block)

    # ---- recording ---------------------------------------------------------------------------------------------------

    def __enter__(self) -> RoutingTrace:
        if self._model is None:
            raise ValueError("model: expected one to record, got a trace that was loaded")
        if self.is_recording:
            raise ValueError("trace: expected one that is not recording, got one inside its own block")
        self._hooks.enter_context(watch(self._model, self._found, self._see))
        self.is_recording = True
        return self

    def __exit__(self, *_: object) -> None:
        self.is_recording = False
        self._hooks.close()

    def reset(self) -> None:
        """Clears the recording."""
        self.layers.clear()

    def log_to(self, writer: Any, *, every: int = 1, max_layers: int = 8, prefix: str = "moe") -> Log:
        """Returns a function to call after each step, which writes the load since it last wrote to TensorBoard, wandb
        or a function; see switchgear.monitoring."""
        return log_to(self, writer, every=every, max_layers=max_layers, prefix=prefix)

    def _see(self, name: str, seen: Observation) -> None:
        layer = self.layers.get(name)
        if layer is None:
            layer = LayerTrace(seen.num_experts, seen.topk_ids.device, self.record, self.tokens)
            self.layers[name] = layer
        device = seen.topk_ids.device
        norms = None
        if "norms" in self.record and seen.block is not None:
            norms = chosen_norms(seen.block, seen.x, seen.topk_ids)
        layer.add(
            seen.topk_ids, seen.topk_weights, seen.router_logits, seen.num_dropped,
            seen.token_ids.to(device) if self.by_token_id and seen.token_ids is not None else None,
            None if seen.token_mask is None else seen.token_mask.to(device), seen.x, norms,
        )  # fmt: skip

    # ---- inspection --------------------------------------------------------------------------------------------------

    def summary(self) -> list[LayerSummary]:
        """A summary of each layer, in the order in which they first ran."""
        return [summary_of(name, layer) for name, layer in self.layers.items()]

    def __str__(self) -> str:
        rows = self.summary()
        width = max([5, *(len(row.name) for row in rows)])
        lines = [f"{'layer':<{width}}   tokens  experts  per token  busiest  max violation  unused  entropy  dropped"]
        for row in rows:
            sizes = f"{row.num_tokens:7}  {row.num_experts:7}  {row.experts_per_token:9.2f}  {row.busiest:7}"
            balance = f"{row.max_violation:13.2f}  {row.never_used:6}  {row.router_entropy:7.2f}  {row.dropped:7.1%}"
            lines.append(f"{row.name:<{width}}  {sizes}  {balance}")
        return "\n".join(lines)

    def plot(self, path: AnyPath | None = None) -> Any:
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

    def save(self, path: AnyPath) -> None:
        """Writes the recording with torch.save, moved to the CPU."""
        layers = {name: layer.state() for name, layer in self.layers.items()}
        save_whole(path, {"format": _FORMAT, "by_token_id": self.by_token_id, "layers": layers})

    @classmethod
    def load(cls, path: AnyPath) -> RoutingTrace:
        """Loads a saved trace for inspection. Raises ValueError for any other file."""
        return load_recording(path, "RoutingTrace", _FORMAT, cls._of_data)

    @classmethod
    def _of_data(cls, data: dict[str, Any]) -> RoutingTrace:
        trace = cls(by_token_id=bool(data["by_token_id"]))
        trace.layers = {str(name): LayerTrace.of_state(state) for name, state in data["layers"].items()}
        trace.record = kinds_of({kind for layer in trace.layers.values() for kind in layer.record})
        return trace


# ---- outputs of experts ----------------------------------------------------------------------------------------------


def check_outputs(block: MoeBlock) -> None:
    """Raises ValueError for a block whose experts' outputs cannot be had one by one."""
    if is_of(block.block, *_OTHERS):
        raise ValueError(
            f"{block.name}: expected experts called with ids and weights, got {type(block.block).__name__}"
        )


@torch.no_grad()
def chosen_norms(block: MoeBlock, x: Tensor, topk_ids: Tensor) -> Tensor:
    """[T,K] float32: norms of the outputs of expert topk_ids[t,k] for x[t], with weight 1; 0 for empty choices (-1).

    The experts run a second time for it, as modules (hooks aside), with some thousand rows at a time. x [T,H] as in an
    Observation.
    """
    num_tokens, top_k = topk_ids.shape
    at_once = max(1, _ROWS // max(top_k, 1))
    distributed = any(getattr(module, "parallel", None) is not None for module in block.experts.modules())
    if distributed:  # all ranks call their experts once, with tokens or without
        return _norms(block, x, topk_ids)
    parts = [_norms(block, x[i : i + at_once], topk_ids[i : i + at_once]) for i in range(0, num_tokens, at_once)]
    return torch.cat(parts) if parts else x.new_zeros(0, top_k, dtype=torch.float32)


def _norms(block: MoeBlock, x: Tensor, topk_ids: Tensor) -> Tensor:
    empty = topk_ids < 0
    rows = x.detach().repeat_interleave(topk_ids.shape[1], 0)
    ids = topk_ids.clamp(min=0).reshape(-1, 1)
    ones = torch.ones_like(ids, dtype=torch.float32 if block.is_ours else x.dtype)
    forward: Any = block.experts.forward  # not the module's call: hooks belong to the model's own calls
    y: Tensor = forward(rows, *_one_choice(block.experts, ids if block.is_ours else ids.long(), ones))
    norms: Tensor = torch.linalg.vector_norm(y.float(), dim=-1)
    return norms.reshape(topk_ids.shape).masked_fill(empty, 0)


@torch.no_grad()
def expert_outputs(experts: nn.Module, x: Tensor, num_experts: int | None = None) -> Tensor:
    """The output of every expert for every token of x [T,H], [E,T,H]. For a small batch: it runs all experts.

    experts: called as (x, topk_ids, topk_weights), as switchgear's Experts and Hugging Face's are.
    """
    count: Any = getattr(experts, "num_experts", None) if num_experts is None else num_experts
    if not isinstance(count, int):
        raise ValueError("num_experts: expected a number, as the module has none, got None")
    ids = torch.zeros(x.shape[0], 1, dtype=torch.int64, device=x.device)
    ones = torch.ones(x.shape[0], 1, device=x.device, dtype=x.dtype)
    return torch.stack([experts(x, *_one_choice(experts, ids + expert, ones)) for expert in range(count)])


def _one_choice(experts: nn.Module, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """One choice per token, ids and weights [T,1], as the experts take it: LongCat's own loop takes two or more."""
    if not is_of(experts, "LongcatFlashExperts"):
        return ids, weights
    return ids.expand(-1, 2), torch.cat((weights, torch.zeros_like(weights)), 1)
