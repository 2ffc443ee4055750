# SPDX-License-Identifier: BSD-3-Clause
"""ParallelExperts: the experts of a layer, distributed over ranks, with the interface of Experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from switchgear.backends import in_autocast
from switchgear.experts import Experts
from switchgear.functional import as_ids, as_limit, as_weights, in_autocast_dtype
from switchgear.functional.gradients import apply, needs_autograd
from switchgear.ops import GluOptions
from switchgear.parallel import exchange, static
from switchgear.parallel.group import ExpertParallel
from switchgear.parallel.local import Weights
from switchgear.parallel.placement import Placement
from switchgear.parallel.rows import Transfers
from switchgear.parallel.transport import on_cpu
from switchgear.utils.modules import not_compiled
from switchgear.weights import stored_of, weights_of
from switchgear.weights.adapted import has_adapters, read_by

# ---- Values of all experts -------------------------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, layer: exchange.Layer) -> Tensor:
        ctx.layer = layer
        parallel, placement = layer.parallel, layer.placement
        held = [len(experts) for experts in placement.experts_of_rank]
        with parallel.peers.exchange():
            copies, counts = values.repeat(parallel.size, 1), [len(values)] * parallel.size
            gathered = _agreed(layer, values, False).exchange("gather", copies, held, counts)
        starts = [sum(held[:rank]) for rank in range(parallel.size)]
        first = [starts[ranks[0]] + placement.experts_of_rank[ranks[0]].index(e)
                 for e, ranks in enumerate(placement.owners)]  # fmt: skip
        return gathered[torch.tensor(first, dtype=torch.int64, device=values.device)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        layer = ctx.layer
        parallel, placement = layer.parallel, layer.placement
        held = [len(experts) for experts in placement.experts_of_rank]
        mine = held[parallel.rank]
        order = torch.tensor([e for experts in placement.experts_of_rank for e in experts], dtype=torch.int64)
        with parallel.peers.exchange():
            rows, counts = grad[order.to(grad.device)], [mine] * parallel.size
            parts = _agreed(layer, grad, True).exchange("gather", rows, counts, held)
        each = parts.view(parallel.size, mine, grad.shape[1])
        total = torch.zeros_like(each[0])
        for ranks in sorted(parallel.twins):  # ranks with the same tokens have the same gradients
            total += each[ranks[0]]
        if parallel.average_gradients:
            total /= len(parallel.twins)
        return total, None


def _agreed(layer: exchange.Layer, values: Tensor, backward: bool) -> Transfers:
    terms = exchange.terms_of(layer, values.dtype, values.shape[1], 0, -4, backward)
    phase = "backward agree" if backward else "agree"
    transfers = Transfers(layer.parallel, values.device)
    exchange.exchange_headers(transfers, terms, 0, phase)
    layer.parallel.peers.enter("backward dispatch" if backward else "dispatch")
    return transfers


# ---- The module ------------------------------------------------------------------------------------------------------


class _Exchange(torch.autograd.Function):
    """exchange.forward and exchange.backward; inputs: x, topk_weights, topk_ids, the layer, and the four Weights; or a
    module that runs the experts, and the parameters that it reads."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer: exchange.Layer, module: Any, *read: Any
    ) -> Tensor:
        ctx.layer, ctx.is_module, ctx.count = layer, module is not None, len(read)
        need_x, need_weights, _, _, _, *needs = ctx.needs_input_grad
        compared = (need_x, need_weights, *(() if ctx.is_module else needs))
        ctx.gradients = sum(int(need) << i for i, need in enumerate(compared)) + 64 * ctx.is_module
        weights = None if ctx.is_module else Weights(*read)
        with layer.parallel.peers.exchange():
            y, saved = exchange.forward(layer, x, topk_ids, topk_weights, ctx.gradients, weights, module)
        assert saved is not None
        # Autograd saves the rows, so that checkpointing and hooks see them; the plan is small.
        ctx.save_for_backward(*read, *saved.tensors)
        ctx.saved = saved._replace(tensors=())
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        need_x, need_weights, _, _, _, *needs = ctx.needs_input_grad
        tensors = ctx.saved_tensors  # once: checkpointing computes them
        read, saved = tensors[: ctx.count], ctx.saved._replace(tensors=tensors[ctx.count :])
        weights = read if ctx.is_module else Weights(*read)
        with ctx.layer.parallel.peers.exchange():
            grad_x, grad_weights, *grads = exchange.backward(
                ctx.layer, grad_y.contiguous(), saved, weights, ctx.gradients, (need_x, need_weights, *needs)
            )
        return grad_x, grad_weights, None, None, None, *grads


@not_compiled
def exchange_moe(
    layer: exchange.Layer, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, weights: Weights | None, module: Any,
    parameters: Sequence[Tensor] = (),
) -> Tensor:  # fmt: skip
    """Like switchgear.moe, with global topk_ids and the weights of the local experts. Without gradients,
    `module`(x, local ids, weights) -> y runs the experts, in one op, unless it is None or a relay must look between
    their products. If weights is None, it always runs them; `parameters` are those that it reads and that may need
    gradients.

    Inside torch.autocast all tensors are cast to its dtype.
    """
    if layer.parallel.capacity is not None:
        raise ValueError(
            f"capacity: expected None for modules other than ParallelExperts, got {layer.parallel.capacity}"
        )
    shape = x.shape
    x = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    if in_autocast(x.device.type):
        (x,) = in_autocast_dtype(x.device.type, x)
        if weights is not None:
            weights = Weights(*in_autocast_dtype(x.device.type, *weights))
    topk_ids, topk_weights = _choices_like(x, topk_ids, topk_weights)
    read = [parameter for parameter in parameters if parameter.requires_grad] if weights is None else weights
    if needs_autograd(x, topk_weights, *read):
        y: Tensor = apply(_Exchange, x, topk_weights, topk_ids, layer, module if weights is None else None, *read)
    else:
        with torch.no_grad(), layer.parallel.peers.exchange():
            looks = layer.parallel.levels == 2 and on_cpu(x)
            given = weights if module is None or looks else None
            y, _ = exchange.forward(layer, x, topk_ids, topk_weights, -1, given, module)
    return y if len(shape) == 2 else y.reshape(shape)


def _choices_like(x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> tuple[Tensor, Tensor]:
    """[T,K] ids and weights, for x [T,H]."""
    topk_ids = as_ids("topk_ids", topk_ids.reshape(-1, topk_ids.shape[-1]))
    topk_weights = as_weights("topk_weights", topk_weights.reshape(topk_ids.shape), x.dtype)
    if len(topk_ids) != len(x):
        raise ValueError(f"topk_ids: expected {len(x)} rows as x has, got {len(topk_ids)}")
    return topk_ids, topk_weights


class ParallelExperts(Experts):
    """The experts of this rank, like Experts; forward takes this rank's tokens and global expert ids.

    MoE(..., parallel=…) creates it. The parameters are those of the local experts; `placement` lists them. With equal
    seeds, an expert has the same initial weights for any number of ranks. Every parameter gets a gradient at every
    step, on every rank. Stored experts (switchgear.store) and those with adapters run as one module per chunk.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_experts: int, *, parallel: ExpertParallel,
        placement: Placement | None = None, **options: Any,
    ) -> None:  # fmt: skip
        if callable(options.get("activation")):
            raise ValueError("activation: expected a name with parallel=, got a function")
        self.placement = placement or parallel.placement(num_experts)
        self._mine = self.placement.experts_of_rank[parallel.rank]
        super().__init__(hidden_size, intermediate_size, len(self._mine), **options)
        self.num_experts = num_experts  # over all ranks: what routers and wrapping modules need
        self.parallel = parallel
        self.lost: tuple[int, ...] = ()  # experts whose weights are gone; their choices count as empty
        extra = (hidden_size, intermediate_size, self.down_proj_bias is not None)
        self._layer = exchange.Layer(parallel, self.placement, self._options(), extra=extra)
        if parallel.capacity is not None and self.placement.replicated:
            raise ValueError("placement: expected one rank per expert with a capacity, got replicated experts")
        self._number = static.register(self._layer)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._number = static.register(self._layer)  # a copy has a layer of its own

    def _options(self) -> GluOptions:
        return GluOptions(self.activation, self.gated, self.interleaved, float(self.alpha), as_limit(self.limit))

    def reset_parameters(self) -> None:
        """Like Experts, expert by expert: all ranks draw the numbers of all experts and keep their own."""
        number_of = {expert: number for number, expert in enumerate(self._mine)}
        for name, fan_in in ((self._first, self.hidden_size), ("down_proj", self.intermediate_size)):
            for parameter in (getattr(self, name), getattr(self, f"{name}_bias")):
                if parameter is None:
                    continue
                other = torch.empty(parameter.shape[1:], device=parameter.device, dtype=parameter.dtype)
                for expert in range(self.placement.num_experts):
                    target = parameter[number_of[expert]] if expert in number_of else other
                    nn.init.uniform_(target, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
        self._shrink_slices()

    def place(self, placement: Placement, weights: Mapping[str, Tensor], lost: Sequence[int] = ()) -> None:
        """Becomes the experts that `parallel` has in another placement. Parameters stay the same objects, with the
        tensors of their names. lost: experts without weights, whose choices are empty from now on."""
        for name, tensor in weights.items():
            parameter = self.get_parameter(name)
            parameter.data, parameter.grad = tensor, None
        self.placement, self.lost = placement, tuple(lost)
        self._mine = placement.experts_of_rank[self.parallel.rank]
        old = self._layer
        self._layer = exchange.Layer(self.parallel, placement, self._options(), old.number, old.extra)
        self._number = static.register(self._layer)

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """hidden_states [..., H], topk_ids [..., K] (global ids, -1 for none), topk_weights [..., K] -> [..., H]."""
        if self.lost:
            is_lost = torch.isin(topk_ids, torch.tensor(self.lost, dtype=topk_ids.dtype, device=topk_ids.device))
            topk_ids = topk_ids.masked_fill(is_lost, -1)
        if self.parallel.capacity is not None:
            return self._static(hidden_states, topk_ids, topk_weights)
        weights: Weights | None = None
        parameters: list[Tensor] = []
        if stored_of(self) is not None or has_adapters(self):
            parameters = read_by(self)
        else:
            first, second = weights_of(self, self._layout)
            weights = Weights(first, second, getattr(self, f"{self._first}_bias"), self.down_proj_bias)
        y: Tensor = exchange_moe(
            self._layer, hidden_states, topk_ids, topk_weights, weights, super().forward, parameters
        )
        return y

    @not_compiled
    def gathered(self, values: Tensor) -> Tensor:
        """[E, …] of all experts from values [E', …] of this rank's; all ranks must call it. The gradient of a value is
        the sum over the ranks with different tokens, in order, or their mean if `average_gradients` is set."""
        flat = values.flatten(1)  # not reshape: there may be none
        whole: Tensor = apply(_Gather, flat, self._layer)
        return whole.view(self.placement.num_experts, *values.shape[1:])

    def _static(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        shape = hidden_states.shape
        x = hidden_states.reshape(-1, shape[-1])
        if in_autocast(x.device.type):
            (x,) = in_autocast_dtype(x.device.type, x)
        topk_ids, topk_weights = _choices_like(x, topk_ids, topk_weights)
        run = super().forward if self._mine else self._no_experts
        return static.exchange_with_capacity(self._layer, self._number, x, topk_ids, topk_weights, run).reshape(shape)

    def _no_experts(self, rows: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Zeros, with gradients for everything, since backward is collective too. All rows are zeros."""
        nothing = topk_weights.sum() + sum(parameter.sum() for parameter in self.parameters())
        return rows * nothing.to(rows.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {len(self._mine)} of them here, {self.parallel}"


ExpertParallel.experts_class = ParallelExperts  # layers make their experts by it


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The distributed parameters, by name as in model.named_parameters().

    Their gradients are complete, so wrappers that reduce gradients must ignore them:

        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, expert_parameters(model))
        fully_shard(model, ignored_params=set(expert_parameters(model).values()))
    """
    found = {}
    for prefix, module in model.named_modules():
        if isinstance(module, ParallelExperts):
            for name, parameter in module.named_parameters(prefix):
                found[name] = parameter
    return found
