# SPDX-License-Identifier: BSD-3-Clause
"""Experts whose weights take fewer bits each, without loss: see reference_compact for the format."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switchgear import ops, reference_compact
from switchgear.backends import in_autocast
from switchgear.compress.formats import QuantizedExperts, quantized_of
from switchgear.functional import _limit, _needs_autograd, _number, _rows_of, moe
from switchgear.packing import Layout, layout_of
from switchgear.pages import advise_huge_pages

WORTH = 0.95  # of the plain bytes: above that compact weights are not worth their name


class CompactMatrix(NamedTuple):
    """A weight [E,N,C] and what its bytes do not show."""

    rows: Tensor  # [E,N,B] uint8
    columns: int  # C
    dtype: torch.dtype  # of the weight
    stored: torch.dtype  # of the elements in the rows: bfloat16, too, for float32 whose lower halves are zero

    def weight(self) -> Tensor:
        """The weight itself."""
        if not self.rows.is_cpu or torch.compiler.is_compiling():
            return reference_compact.expand(self.rows, self.columns, self.stored).to(self.dtype)
        weight = torch.empty(*self.rows.shape[:-1], self.columns, dtype=self.stored)
        advise_huge_pages(weight)
        ops.host.module.expand_compact(self.rows.contiguous(), weight, torch.get_num_threads())
        return weight.to(self.dtype)


@dataclass(frozen=True)
class CompactExperts:
    """What became of a module's projections: parameters `names` went, buffers `<name>_compact` came."""

    names: tuple[str, str]
    transposed: bool  # the parameters were [E,in,out]
    columns: tuple[int, int]  # H and I
    dtype: torch.dtype  # of the parameters
    stored: tuple[torch.dtype, torch.dtype]  # of the elements
    trained: tuple[bool, bool]  # whether they asked for gradients

    def matrices(self, module: nn.Module) -> tuple[CompactMatrix, CompactMatrix]:
        """The two projections of `module`, [E,out,in]."""
        return self._matrix(module, 0), self._matrix(module, 1)

    def weights(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """Both projections as they were, [E,out,in]."""
        first, second = self.matrices(module)
        return first.weight(), second.weight()

    def moe(self, module: nn.Module, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, **options: Any) -> Tensor:
        """switchgear.moe with the projections of `module`."""
        return compact_moe(x, *self.matrices(module), topk_ids, topk_weights, **options)

    def _matrix(self, module: nn.Module, index: int) -> CompactMatrix:
        rows: Tensor = getattr(module, f"{self.names[index]}_compact")
        return CompactMatrix(rows, self.columns[index], self.dtype, self.stored[index])


def compact_of(module: nn.Module) -> CompactExperts | None:
    """What `compact` made of a module's projections, None where it made nothing."""
    return vars(module).get("_switchgear_compact")


def compact(model: nn.Module) -> int:
    """Stores the experts' projections in fewer bits a weight, without loss, for decoding on a CPU.

    bfloat16 takes 12 bits instead of 16; float32 28 instead of 32, or 12 where all of a projection are bfloat16
    numbers, as in a bfloat16 checkpoint that was loaded as float32. Generating text waits for weights from memory: with
    few tokens per expert a layer takes up to that much less time, with many it takes longer, mostly by 0 to 17 %.
    Results have the same bits.

    The parameters of the projections go; in their place are buffers `<name>_compact`. State dicts hold, and take, the
    plain weights under their own names, so checkpoints know nothing of it. Where gradients are asked for, or on another
    device, a call expands the weights for its duration.

    Args:
        model: has `Experts`, or experts of transformers that run on the fused kernel (`accelerate`).

    Returns the number of experts modules whose weights are compact now.

    Raises:
        ValueError: the model has no such experts with bfloat16 or float32 parameters of which this saves a twentieth;
            the message says why those there are stay as they are.
    """
    reason = f"{type(model).__name__} has no experts that run on the fused kernel"
    found = 0
    for module in model.modules():
        if compact_of(module) is not None:
            found += 1
        elif (layout := layout_of(module)) is not None:
            obstacle = _compact_module(module, layout)
            found += obstacle is None
            reason = obstacle or reason
    if not found:
        raise ValueError(f"model: expected experts that can be compact; {reason}")
    return found


def expand(model: nn.Module) -> int:
    """Takes `compact` back: the parameters are there again, bit for bit. Returns the number of modules it changed."""
    changed = 0
    for module in model.modules():
        if (state := compact_of(module)) is not None:
            for name, weight, trained in zip(state.names, state.weights(module), state.trained, strict=True):
                del module._buffers[f"{name}_compact"]
                module._non_persistent_buffers_set.discard(f"{name}_compact")
                weight = weight.mT.contiguous() if state.transposed else weight
                module.register_parameter(name, nn.Parameter(weight, requires_grad=trained))
            module._switchgear_compact = None  # type: ignore[assignment]
            changed += 1
    return changed


def compacted(weight: Tensor) -> CompactMatrix:
    """A weight [E,N,C], bfloat16 or float32, on the CPU, with rows as reference_compact.compact makes them."""
    weight = weight.detach().contiguous()
    elements = reference_compact.elements_of(weight)
    num_experts, rows, columns = weight.shape
    records = reference_compact.records_bytes(columns, elements.dtype)
    header = reference_compact.header_bytes(0)
    while True:  # twice where the first headers have no room for the exceptions of some row
        out = torch.empty(num_experts, rows, header + records, dtype=torch.uint8, device="cpu")
        advise_huge_pages(out)
        needed = reference_compact.header_bytes(ops.host.module.pack_compact(elements, out, torch.get_num_threads()))
        if needed <= header:
            return CompactMatrix(out, columns, weight.dtype, elements.dtype)
        header = needed


def compact_moe(
    x: Tensor,
    gate_up_proj: CompactMatrix,
    down_proj: CompactMatrix,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    alpha: float = 1.702,
    limit: float | None = None,
) -> Tensor:
    """switchgear.moe with compact weights of x's dtype.

    Inside torch.autocast x is cast to its dtype, as in moe. ValueError for an x of another H, which rows of bytes do
    not show.
    """
    if x.shape[-1] != gate_up_proj.columns:
        raise ValueError(f"x: expected shape [..., {gate_up_proj.columns}], got {list(x.shape)}")
    device_type = x.device.type
    dtype = x.dtype
    reads_compact = x.is_cpu and dtype is gate_up_proj.dtype
    if in_autocast(device_type) and dtype is not torch.float64:  # where rows may hold what weights would be cast to
        dtype = torch.get_autocast_dtype(device_type)
        reads_compact = x.is_cpu and (dtype is gate_up_proj.dtype or dtype is gate_up_proj.stored is down_proj.stored)
    if not reads_compact or _needs_autograd(x, gate_up_bias, down_bias, topk_weights):
        return moe(
            x, gate_up_proj.weight(), down_proj.weight(), topk_ids, topk_weights, activation=activation, gated=gated,
            interleaved=interleaved, gate_up_bias=gate_up_bias, down_bias=down_bias, alpha=alpha, limit=limit,
        )  # fmt: skip
    shape = x.shape
    x, topk_ids, topk_weights = _rows_of(x.to(dtype), topk_ids, topk_weights)
    biases = [None if bias is None else bias.to(dtype) for bias in (gate_up_bias, down_bias)]
    others = (gate_up_proj.rows, down_proj.rows, *biases, topk_ids, topk_weights)
    options = (activation, gated, interleaved, _number("alpha", alpha), _limit(limit))
    if ops.needs_no_dispatch(x, *others):
        y = ops.moe_forward_on_host(x, *others, *options)  # type: ignore[arg-type]
    else:
        y = ops.moe_forward(x, *others, *options, False)[0]
    return y if len(shape) == 2 else y.reshape(shape)


def _compact_module(module: nn.Module, layout: Layout) -> str | None:
    """Makes a module's projections compact, or says why not."""
    matrices, trained = [], []
    for name in layout.names:
        weight = module._parameters.get(name)  # under a parametrization the attribute is none, but is made of one
        if type(weight) is not nn.Parameter:
            return f"{name} is {'computed' if weight is None else f'a {type(weight).__name__}'}, no plain parameter"
        if weight.dtype not in reference_compact.RECORD_BYTES:
            return f"{name} is {weight.dtype}, not torch.bfloat16 or torch.float32"
        if not weight.is_cpu:
            return f"{name} is on {weight.device}, and compact weights are for the CPU"
        view = weight.mT if layout.transposed else weight
        if view.shape[-1] > reference_compact.MAX_COLUMNS:
            return f"{name} has {view.shape[-1]} columns, more than {reference_compact.MAX_COLUMNS}"
        matrices.append(compacted(view))
        trained.append(weight.requires_grad)
        if (part := matrices[-1].rows.nbytes / weight.nbytes) > WORTH:
            return f"{name} would still take {part:.0%} of its bytes"
    first, second = matrices
    if first.dtype is not second.dtype:
        return f"{layout.names[0]} is {first.dtype}, and {layout.names[1]} {second.dtype}"
    for name, matrix in zip(layout.names, matrices, strict=True):
        module.register_parameter(name, None)
        module.register_buffer(f"{name}_compact", matrix.rows, persistent=False)
    if "_switchgear_compact" not in vars(module):  # the hooks do nothing while a module is plain
        hooked: Any = module
        hooked.register_state_dict_post_hook(_save_plain)
        hooked.register_load_state_dict_pre_hook(_load_plain)
    module._switchgear_compact = CompactExperts(  # type: ignore[assignment]
        names=layout.names,
        transposed=layout.transposed,
        columns=(first.columns, second.columns),
        dtype=first.dtype,
        stored=(first.stored, second.stored),
        trained=(trained[0], trained[1]),
    )
    return None


def _save_plain(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    if (state := compact_of(module)) is not None:
        for name, weight in zip(state.names, state.weights(module), strict=True):
            state_dict[prefix + name] = weight.mT.contiguous() if state.transposed else weight


def _load_plain(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any, strict: bool, missing: list[str], *__: Any
) -> None:
    if (state := compact_of(module)) is None:
        return
    stored = list(state.stored)
    for i, (name, now) in enumerate(zip(state.names, state.matrices(module), strict=True)):
        weight = state_dict.pop(prefix + name, None)
        if weight is None:
            if strict:
                missing.append(prefix + name)
            continue
        view = weight.mT if state.transposed else weight
        expected = (*now.rows.shape[:2], now.columns)
        if tuple(view.shape) != expected:
            shape = (expected[0], *reversed(expected[1:])) if state.transposed else expected
            raise ValueError(f"{prefix}{name}: expected shape {list(shape)}, got {list(weight.shape)}")
        loaded = compacted(view.to(state.dtype))
        setattr(module, f"{name}_compact", loaded.rows)
        stored[i] = loaded.stored
    module._switchgear_compact = dataclasses.replace(state, stored=(stored[0], stored[1]))  # type: ignore[assignment]


def compressed_of(module: nn.Module) -> QuantizedExperts | CompactExperts | None:
    """What holds a module's projections in place of its parameters: QuantizedExperts, CompactExperts, or None."""
    return quantized_of(module) or compact_of(module)
