# SPDX-License-Identifier: BSD-3-Clause
"""moe with experts that are loaded while it runs: in one call if all are in memory, else wave by wave. A wave is an
ascending range of experts, and waves add up to the bits of one call. Backward loads the experts once more.

The kernels of the host add a token's experts in ascending order, so a wave adds to float32 sums where the last one
ended. Those of a GPU round the row of each choice and add the rows in the order of choices. So waves keep the rows, and
all are added at the end. Both hold for y and for the gradient of x; other gradients belong to one expert or choice.

On a GPU, kernels take no slots of plain weights. There the rows of memory are the experts: ids become numbers of rows,
and biases and adapters follow them. The order of the sums does not depend on the numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switchgear import ops
from switchgear.functional.gradients import apply, needs_autograd
from switchgear.functional.layer import Biases, build_layer
from switchgear.functional.layer_gradients import Moe, inputs_of
from switchgear.offload.projections import Wave
from switchgear.ops import GRADIENTS, Layer
from switchgear.reference import weight_dtype
from switchgear.reference.formats import format_of
from switchgear.reference.layer import shift_seed
from switchgear.utils.modules import not_compiled
from switchgear.weights.weight import AdaptedWeight, OffloadedWeight, Weight, operand_of

_FEW = 16  # tokens: below, a wave computes with all of them, which is faster than choosing its own


class LoadsExperts:
    """Loads the experts of a layer, and computes `moe` with them."""

    def run(
        self,
        x: Tensor,
        topk_ids: Tensor,
        compute: Callable[[Iterator[Wave] | None], Any],
        *,
        predicts: bool = True,
    ) -> Any:
        """compute(waves), while the experts of topk_ids [T,K] int32 are loaded: None if all are in memory, else
        ascending ranges of experts, each resident until the next one is requested. predicts: what comes next from x,
        which a backward pass does not."""
        raise NotImplementedError

    @not_compiled  # a graph cannot hold what is loaded from call to call
    def moe(
        self,
        x: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        weights: tuple[Any, Any],
        biases: Biases,
        options: tuple[Any, ...],
        autocast: str | None,
    ) -> Tensor:
        """functional.layer.apply_layer, with weights whose experts this loads."""
        bases = _in_memory(weights[0]), _in_memory(weights[1])
        by_row = not adds_in_order_of_experts(x)
        must_cast = [_must_cast(base, x, by_row, autocast) for base in bases]  # checks both
        is_cast = any(must_cast)
        topk_ids = topk_ids.clone()  # read for each wave, and another thread may change the caller's
        if len(topk_ids) != len(x):
            raise ValueError(f"topk_ids: expected {len(x)} rows like x, got shape {list(topk_ids.shape)}")
        first, second = (
            operand_of(weight, x.dtype, autocast)._replace(tensors=base.tensors, form=base.form)
            for weight, base in zip(weights, bases, strict=True)
        )
        layer = Layer(*build_layer(x, first, second, biases, topk_ids, topk_weights, options))
        is_direct = all(base._operand.needs_no_dispatch for base in bases) and ops.needs_no_dispatch(
            x, *layer[4:8], *first.adapter, *second.adapter
        )
        in_waves = LayerInWaves(self, (*bases, x.dtype) if is_cast else None, by_row)
        drops = first.dropout > 0 or second.dropout > 0  # then h is saved in any case: ops.layer_accumulate
        if drops or needs_autograd(x, *layer[4:6], topk_weights, *first.leaves, *second.leaves):
            if by_row and any(base.format == "plain" for base in bases):
                raise ValueError("x: expected no gradients through plain experts that are offloaded to a GPU, got some")
            y: Tensor = apply(Moe, *inputs_of(x, layer, source=in_waves, needs_no_dispatch=is_direct))[0]
            return y
        return in_waves.forward(x, layer, False, is_direct)[0]


def adds_in_order_of_experts(x: Tensor) -> bool:
    """Whether the kernels for x do; else they add in the order of a token's choices."""
    return x.is_cpu


class _Part(NamedTuple):
    """The call of a wave."""

    layer: Layer  # with the wave's experts only
    tokens: Tensor | None  # [T'] that have choices in the wave; on a GPU, one for each choice. None: all
    choices: Tensor  # [T',K'] flat index of each choice in topk_ids
    is_mine: Tensor  # [T',K']: the others are empty
    slots: slice  # of all slots, those of the wave

    def rows_of(self, tensor: Tensor) -> Tensor:
        return tensor if self.tokens is None else tensor[self.tokens]

    def slots_of(self, h: Tensor) -> Tensor:
        """The wave's rows of h [S,N], and as many more as the call has slots, if h has them; else new ones."""
        begin, count = self.slots.start, self.choices.numel()
        if begin + count <= len(h):
            return h[begin : begin + count]
        rows = h.new_zeros(count, h.shape[1])
        rows[: self.slots.stop - begin] = h[self.slots]
        return rows


class LayerInWaves:
    """What ops.layer_forward and ops.layer_backward do, with experts that are loaded meanwhile.

    cast: weights of which each wave makes copies, and their dtype; None: the weights are multiplied as they are.
    by_row: the rows of choices are kept, and added at the end.
    """

    def __init__(self, loads: LoadsExperts, cast: tuple[Weight, Weight, torch.dtype] | None, by_row: bool) -> None:
        self._loads, self._cast, self._by_row = loads, cast, by_row

    def forward(self, x: Tensor, layer: Layer, save_h: bool, is_direct: bool = False) -> tuple[Tensor, Tensor]:
        def compute(waves: Iterator[Wave] | None) -> tuple[Tensor, Tensor]:
            total, end = None, 0
            h = x.new_empty(layer.topk_ids.numel() if save_h else 0, layer.gate_up_form[1])
            for part, _ in self._parts(layer, waves):
                total = self._zeros(x, layer) if total is None else total
                self._add(total, x, part, h if save_h else None)
                end = part.slots.stop
            if total is not None:
                h[end:] = 0
                return self._sum(total, x, layer, layer.topk_weights), h
            own = self._ready(layer)
            if is_direct and not save_h:
                return ops.moe_forward_on_host(x, own), h
            return ops.layer_forward(x, own, save_h, is_direct)

        found: tuple[Tensor, Tensor] = self._loads.run(x, layer.topk_ids, compute)
        return found

    def backward(
        self, grad_y: Tensor, x: Tensor, h: Tensor, layer: Layer, needs: Sequence[bool], _: None, is_direct: bool
    ) -> Sequence[Tensor | None]:
        def compute(waves: Iterator[Wave] | None) -> Sequence[Tensor | None]:
            grads: list[Tensor | None] = []
            total = None
            for part, wave in self._parts(layer, waves):
                if not grads:
                    total = self._zeros(x, layer) if needs[0] else None
                    grads = [_zeros_like(tensor, need) for tensor, need in zip(differentiable, needs, strict=True)]
                found = self._gradients(total, grad_y, x, h, part, needs)
                for name, grad, own in zip(GRADIENTS[3:], grads[3:], found[3:], strict=True):
                    if grad is None or own is None:
                        continue
                    if name == "topk_weights":
                        grad.view(-1)[part.choices[part.is_mine]] = own[part.is_mine]
                    else:
                        grad[wave.low : wave.high + 1] = own
            if not grads:
                return ops.layer_backward(grad_y, x, h, self._ready(layer), needs, None, is_direct)
            return None if total is None else self._sum(total, x, layer, None), *grads[1:]

        differentiable = ops.differentiable(x, layer)
        grads: Sequence[Tensor | None] = self._loads.run(x, layer.topk_ids, compute, predicts=False)
        return grads

    # ---- waves -------------------------------------------------------------------------------------------------------

    def _parts(self, layer: Layer, waves: Iterator[Wave] | None) -> Iterator[tuple[_Part, Wave]]:
        """None if all experts are in memory."""
        begin = 0
        for wave in waves or ():
            if wave.is_whole:
                return
            part = self._part(layer, wave, begin)
            yield part, wave
            begin = part.slots.stop

    def _part(self, layer: Layer, wave: Wave, begin: int) -> _Part:
        ids, num_choices = layer.topk_ids, layer.topk_ids.shape[1]
        is_in_wave = (ids >= wave.low) & (ids <= wave.high)
        tokens: Tensor | None = None
        if self._by_row:
            choices = is_in_wave.flatten().nonzero()
            tokens = choices[:, 0] // num_choices
        elif len(ids) <= _FEW:
            choices = torch.arange(ids.numel()).view(ids.shape)
        else:  # a token's choices in the wave, in their order, before some of its other ones
            tokens = is_in_wave.any(1).nonzero()[:, 0]
            mine = is_in_wave[tokens]
            order = mine.logical_not().byte().argsort(dim=1, stable=True)[:, : int(mine.sum(1).max())]
            choices = tokens[:, None] * num_choices + order
        is_mine = is_in_wave.flatten()[choices]
        seed = layer.dropout_seed
        own = layer._replace(
            topk_ids=torch.where(is_mine, ids.flatten()[choices], -1),
            topk_weights=layer.topk_weights.flatten()[choices],
            dropout_seed=None if seed is None else shift_seed(seed, begin),
        )
        own = _take(self._ready(own), wave)
        return _Part(own, tokens, choices, is_mine, slice(begin, begin + int(is_mine.sum())))

    def _zeros(self, x: Tensor, layer: Layer) -> Tensor:
        """Where waves put their rows or sums."""
        if self._by_row:
            return x.new_zeros(layer.topk_ids.numel(), x.shape[1])
        return torch.zeros(x.shape, dtype=weight_dtype(x.dtype), device=x.device)

    def _add(self, total: Tensor, x: Tensor, part: _Part, h: Tensor | None) -> None:
        """The outputs of a wave, and its slots of h."""
        rows, own = part.rows_of(x), None if h is None else part.slots_of(h)
        if self._by_row:
            layer = part.layer._replace(topk_weights=torch.ones_like(part.layer.topk_weights))
            total[part.choices[:, 0]], own = ops.layer_forward(rows, layer, h is not None)
        else:
            sums = part.rows_of(total)
            ops.layer_accumulate(rows, part.layer, sums, own)
            if part.tokens is not None:
                total[part.tokens] = sums
        if h is not None and own is not None and own.data_ptr() != h[part.slots].data_ptr():
            h[part.slots] = own[: part.slots.stop - part.slots.start]

    def _gradients(
        self, total: Tensor | None, grad_y: Tensor, x: Tensor, h: Tensor, part: _Part, needs: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        """The gradients of a wave; that of x is put into `total`."""
        given = part.rows_of(grad_y), part.rows_of(x), part.slots_of(h), part.layer
        if self._by_row:
            found = ops.layer_backward(*given, needs)
            if total is not None and found[0] is not None:
                total[part.choices[:, 0]] = found[0]
            return found
        sums = None if total is None else part.rows_of(total)
        found = ops.layer_backward_to_sums(sums, *given, needs)
        if total is not None and sums is not None and part.tokens is not None:
            total[part.tokens] = sums
        return found

    def _sum(self, total: Tensor, x: Tensor, layer: Layer, topk_weights: Tensor | None) -> Tensor:
        """Adds the rows as a call does."""
        if not self._by_row:
            return total.to(x.dtype)
        tokens, choices = layer.topk_ids.shape
        slots = torch.arange(tokens * choices, dtype=torch.int32, device=x.device)
        ends = torch.arange(2, dtype=torch.int32, device=x.device) * (tokens * choices)
        mine = torch.where(layer.topk_ids >= 0, slots.view(tokens, choices), -1)
        y: Tensor = ops.combine(total, ends, (slots // max(choices, 1)).int(), mine, topk_weights)
        return y

    def _ready(self, layer: Layer) -> Layer:
        """The layer for the kernels, of which the experts that ids name are in memory."""
        if self._cast is not None:
            *weights, dtype = self._cast
            first, second = (_cast(weight, layer.topk_ids, dtype) for weight in weights)
            layer = layer._replace(
                gate_up_proj=first.tensors, gate_up_form=first.form, down_proj=second.tensors, down_form=second.form
            )
        return renumbered(layer) if self._by_row else layer


def _zeros_like(tensor: Tensor | None, need: bool) -> Tensor | None:
    """A gradient to which waves add theirs; an expert without tokens keeps zeros."""
    return torch.zeros_like(tensor) if need and tensor is not None else None


def _take(layer: Layer, wave: Wave) -> Layer:
    """The layer with the wave's experts only, counted from 0. Where kernels take no slots, all rows stay experts."""
    if not layer.gate_up_form:
        return layer
    own = slice(wave.low, wave.high + 1)
    first, second = ([tensor[own] for tensor in adapter or ()] for adapter in layer[13:15])
    return layer._replace(
        gate_up_proj=(*layer.gate_up_proj[:-1], layer.gate_up_proj[-1][own]),  # the last tensor has the slots
        down_proj=(*layer.down_proj[:-1], layer.down_proj[-1][own]),
        gate_up_bias=None if layer.gate_up_bias is None else layer.gate_up_bias[own],
        down_bias=None if layer.down_bias is None else layer.down_bias[own],
        topk_ids=torch.where(layer.topk_ids < 0, -1, layer.topk_ids - wave.low),
        gate_up_adapter=first,
        down_adapter=second,
    )


def renumbered(layer: Layer) -> Layer:
    """The layer, whose experts are in memory, where plain weights have no slots: with a row's number in place of an
    expert's."""
    are_plain = [format_of(form) == "plain" for form in (layer.gate_up_form, layer.down_form)]
    if not all(are_plain):
        if any(are_plain):
            raise ValueError("weights: expected both projections plain on a GPU, or neither, got one")
        return layer
    (data, slots), (down_data, _) = layer.gate_up_proj, layer.down_proj
    ids, num_rows = layer.topk_ids, len(data)
    rows = torch.where(ids < 0, -1, slots[ids.clamp(min=0).long()])
    experts = torch.zeros(num_rows + 1, dtype=torch.int64, device=slots.device)  # of each row; the last: no expert
    at = torch.where(ids < 0, num_rows, rows).flatten().long()
    experts = experts.scatter(0, at, ids.clamp(min=0).flatten().long())[:num_rows]
    first, second = ([tensor[experts] for tensor in adapter or ()] for adapter in layer[13:15])
    return layer._replace(
        gate_up_proj=(data,), gate_up_form=(), down_proj=(down_data,), down_form=(),
        gate_up_bias=None if layer.gate_up_bias is None else layer.gate_up_bias[experts],
        down_bias=None if layer.down_bias is None else layer.down_bias[experts],
        topk_ids=rows, gate_up_adapter=first, down_adapter=second,
    )  # fmt: skip


def _in_memory(weight: Any) -> Any:
    """The weight whose slots are in memory, without its adapter."""
    if type(weight) is AdaptedWeight:
        weight = weight.weight
    return weight.weight if type(weight) is OffloadedWeight else weight


def _must_cast(weight: Any, x: Tensor, by_row: bool, autocast: str | None) -> bool:
    """Whether a weight is multiplied in the dtype of x, which torch.autocast gave it, instead of its own. Raises
    TypeError or ValueError for an x that it cannot be multiplied by."""
    if weight.device != x.device:
        raise ValueError(
            f"x: expected one on {weight.device}, where the offloaded experts run, got {x.device}; pass device= to "
            "offload"
        )
    if by_row and weight.format == "plain":
        weight = weight.with_slots(None)
    if weight.multiplies(x.dtype):
        return False
    if x.dtype is weight.dtype:  # all experts would be expanded, with those that are not in memory
        raise ValueError(f"x: expected {weight.format} of the instruction set in use, got those of another")
    if autocast is None:
        raise TypeError(f"x: expected {weight.dtype} like the offloaded weights, got {x.dtype}")
    return True


def _cast(weight: Weight, topk_ids: Tensor, dtype: torch.dtype) -> Weight:
    """The weight with copies in `dtype` of the experts that ids name, which are in memory, if its dtype is another."""
    if not weight.is_lossless or weight.dtype is dtype:
        return weight
    chosen: Tensor = torch.unique(topk_ids[topk_ids >= 0]).long()
    experts = chosen if len(chosen) else chosen.new_zeros(1)  # slots need a row
    assert weight.slots is not None
    copies = weight.with_slots(weight.slots[experts]).plain().to(dtype)
    slots = torch.zeros_like(weight.slots)
    slots[experts] = torch.arange(len(experts), dtype=slots.dtype, device=slots.device)
    return Weight("plain", copies, weight.rows, weight.cols, dtype, slots=slots)
