# SPDX-License-Identifier: BSD-3-Clause
"""Measures, by hooks around the experts modules, the time inside them and the load of each expert."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch


class ExpertsClock:
    """Wall-clock seconds that a model spends in its experts modules.

    forward   from the call of the module to its return.
    backward  from when the gradient of the module's output is complete to when those of its inputs (hidden states and
              router weights) are complete. Autograd runs later nodes first and accumulates parameter gradients as soon
              as they exist, so the weight gradients are included.

    Excluded: the router, shared experts, and the optimizer. On the CPU nothing runs asynchronously; on a GPU these
    would be the times of the launches.
    """

    def __init__(self, modules: list[torch.nn.Module]) -> None:
        self.topk_ids: list[torch.Tensor | None] = [None] * len(modules)  # of the latest forward, per layer
        self.num_experts = [int(module.num_experts) for module in modules]  # type: ignore[arg-type]
        self.reset()
        for layer, module in enumerate(modules):
            module.register_forward_pre_hook(self._enter(layer))
            module.register_forward_hook(self._leave)
            module.register_full_backward_pre_hook(self._enter_backward)
            module.register_full_backward_hook(self._leave_backward)

    def reset(self) -> None:
        self.forward = self.backward = 0.0
        self._start = 0.0

    def _enter(self, layer: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            self.topk_ids[layer] = args[1]
            self._start = perf_counter()

        return hook

    def _leave(self, *_: Any) -> None:
        self.forward += perf_counter() - self._start

    def _enter_backward(self, *_: Any) -> None:
        self._start = perf_counter()

    def _leave_backward(self, *_: Any) -> None:
        self.backward += perf_counter() - self._start

    def load(self) -> list[list[float]]:
        """The share of choices of each expert in the latest forward, [layers][experts]; 1/E is balanced."""
        shares = []
        for topk_ids, num_experts in zip(self.topk_ids, self.num_experts, strict=True):
            if topk_ids is None:
                raise RuntimeError("no forward yet")
            counts = torch.bincount(topk_ids.flatten(), minlength=num_experts)[:num_experts]
            shares.append((counts / topk_ids.numel()).tolist())
        return shares
