# SPDX-License-Identifier: BSD-3-Clause
"""Weight: the matrices of all experts of a projection in a named format; AdaptedWeight adds an adapter, SelectedWeight
says which experts train. Operand: what a weight of any kind is for the ops.

Every product accepts a Weight in place of a tensor [E,N,C]. It is immutable, has no gradient, and does not depend on
modules; the forms do (exact.py, integers.py, …).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from switchgear import backends, ops
from switchgear.backends import cast_in_autocast
from switchgear.checks import Shape, convert
from switchgear.reference import formats, panels, weight_dtype
from switchgear.reference.checks import check_range

PANEL_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
_FIELDS = ("data", *formats.FIELDS)
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack


class TrainedExperts(NamedTuple):
    """Experts that are trained alone: copies of some rows of a frozen weight and of its bias."""

    weight: Tensor  # [n,N,C]
    bias: Tensor | None  # [n,N]
    experts: Tensor  # [n] int32, ascending


class Operand(NamedTuple):
    """A projection [E,N,C] as the ops take it."""

    tensors: Sequence[Tensor]  # of a stored weight, or one plain tensor, or matrices [N_e,C]
    form: tuple[int, ...] = ()  # empty: plain
    leaves: Sequence[Tensor | None] = ()  # those that may need a gradient
    adapter: tuple[Tensor, ...] = ()  # a, b, scales and possibly ranks; empty: none
    dropout: float = 0.0  # of the adapter
    trained: TrainedExperts | None = None
    source: Any = None  # a LoadsExperts of offload.waves: the experts are not in memory, and there are no tensors
    needs_no_dispatch: bool = False  # the tensors are known to be plain ones in CPU memory


def operand_of(weight: Any, dtype: torch.dtype, autocast: str | None = None) -> Operand:
    """The operand for an x of `dtype` of a tensor, or of a weight that answers for itself. autocast: the device type
    whose torch.autocast is on and gave x its dtype."""
    if isinstance(weight, Tensor):
        tensors = (weight,) if autocast is None else cast_in_autocast(autocast, weight)
        return Operand(tensors, (), tensors)
    operand: Operand = weight.operand(dtype, autocast)
    return operand


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight [E,N,C] as the kernels read it, made by `weights.encode`. `plain()` decodes it, `permuted` reorders its
    experts. All tensors of an expert can be views of one record. The formats, with the shapes, dtypes and strides of
    their tensors, are those of include/switchgear/weight.h and reference/formats.py.

    Attributes:
        format: one of reference/formats.py's FORMATS, such as "plain" or "int8".
        data: the values, or their codes.
        rows, cols: N and C.
        dtype: of the plain weight.
        scales, row_scales, zeros: as the format needs them.
        slots: [E] int32, each expert's index in the first dimension of the other tensors; None if they are in order.
        records: of "groups", [S,2] int32: where each stored expert is in `data`.
        parts: equal parts of the rows that are stored separately.
        group_size: columns that share a scale; 0: all.
        elements: of "compact": bfloat16 for float32 whose lower halves are zero.
        is_exact: plain() equals the original weight, bit for bit.
    """

    format: str
    data: Tensor
    rows: int
    cols: int
    dtype: torch.dtype
    scales: Tensor | None = None
    row_scales: Tensor | None = None
    zeros: Tensor | None = None
    slots: Tensor | None = None
    records: Tensor | None = None
    parts: int = 1
    group_size: int = 0
    elements: torch.dtype | None = None
    is_exact: bool = False
    tensors: tuple[Tensor, ...] = field(init=False, repr=False)  # arguments of the ops
    form: tuple[int, ...] = field(init=False, repr=False)
    _operand: Operand = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.format not in formats.FORMATS:
            raise ValueError(f"format: expected one of {', '.join(formats.FORMATS)}, got {self.format!r}")
        present = [getattr(self, name) for name in formats.FIELDS]
        fields = sum(1 << bit for bit, tensor in enumerate(present) if tensor is not None)
        form: tuple[int, ...] = ()
        if fields or self.format != "plain":
            number = formats.FORMATS.index(self.format)
            element_bytes = 0 if self.elements is None else self.elements.itemsize
            form = (number, self.rows, self.cols, self.parts, self.group_size, fields, element_bytes)
        tensors = (self.data, *(tensor for tensor in present if tensor is not None))
        is_plain = all(type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu for tensor in tensors)
        if not torch.compiler.is_compiling():  # which does not trace is_neg
            is_plain = is_plain and not any(tensor.is_neg() for tensor in tensors)
        object.__setattr__(self, "tensors", tensors)
        object.__setattr__(self, "form", form)
        leaves = () if form else tensors
        object.__setattr__(self, "_operand", Operand(tensors, form, leaves, needs_no_dispatch=is_plain))

    @property
    def shape(self) -> tuple[int, int, int]:
        """[E,N,C]."""
        stored = self.data if self.records is None else self.records
        return len(stored if self.slots is None else self.slots), self.rows, self.cols

    @property
    def device(self) -> torch.device:
        """The device of the data."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, those of experts without a slot included."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def is_lossless(self) -> bool:
        """Whether this format stores every weight of its dtype bit for bit."""
        return self.format in formats.LOSSLESS

    def plain(self) -> Tensor:
        """Decodes the weight to [E,N,C] in its dtype: the original bits if is_exact, else rounded values."""
        if self.data.is_cpu and self.slots is None and not torch.compiler.is_compiling():
            if self.format == "compact":
                return self._expanded()
            if self.format == "panels":
                weight = torch.empty(self.shape, dtype=self.dtype, device="cpu")
                advise_huge_pages(weight)
                return panels.expand(self.data, weight)
        return formats.decode(self.tensors, self.form, self.dtype)

    def _expanded(self) -> Tensor:
        weight = torch.empty(self.shape, dtype=self.elements, device="cpu")
        advise_huge_pages(weight)
        ops.expand_compact(self.data, weight, torch.get_num_threads())
        return weight.to(self.dtype)

    def multiplies(self, dtype: torch.dtype) -> bool:
        """Whether moe can multiply an x of `dtype` by this weight without expanding it: some formats support only one
        dtype or one device."""
        if self.format not in formats.LOSSLESS:
            return _is_on_cpu(self) or self.format in formats.ON_CUDA
        if not _is_on_cpu(self):
            return self.format == "plain" and self.slots is None and dtype is self.dtype
        if self.format == "plain":
            return dtype is self.dtype
        if self.format == "compact":
            return dtype is self.dtype or dtype is self.elements
        return dtype is self.dtype and self._is_of_this_isa()

    def operand(self, dtype: torch.dtype, autocast: str | None = None) -> Operand:
        """What the ops of a layer multiply an x of `dtype` by: the weight itself if `multiplies(dtype)`, else a plain
        tensor, expanded for one call."""
        if self.multiplies(dtype):
            return self._operand
        return self.expanded(dtype, autocast, f"{self.format} weights")

    def direct_operand(self, dtype: torch.dtype) -> Operand | None:
        """The operand for an x of `dtype` without a gradient, if it is stored in plain tensors of the CPU."""
        is_direct = self.form and self._operand.needs_no_dispatch and self.multiplies(dtype)
        return self._operand if is_direct else None

    def expanded(self, dtype: torch.dtype, autocast: str | None, subject: str) -> Operand:
        """The plain weight as an operand. Announces that kernels for `subject` are missing."""
        has_a_kernel_missing = dtype is self.dtype or not _is_on_cpu(self)  # otherwise only the dtypes differ
        if has_a_kernel_missing and not torch.compiler.is_compiling():
            backends.announce_format(self.device, subject, "each call expands them")
        plain = self.plain()
        tensors = (plain if autocast is None else plain.to(dtype),)
        return Operand(tensors, (), tensors)

    def _is_of_this_isa(self) -> bool:
        """Whether panels have the order of the ISA in use. A graph cannot query the ISA; its op checks their shape."""
        if torch.compiler.is_compiling():
            return True
        rows, vector_bytes = ops.panel_layout(PANEL_DTYPES[self.dtype])
        return self.data.shape[1:4:2] == (self.rows // rows, vector_bytes)

    def permuted(self, order: Tensor) -> Weight:
        """The experts in `order` [E'], integers, which may repeat experts. Copies no weights."""
        convert("order", order, Annotated[Tensor, Shape(None)])
        if order.dtype not in _INTEGERS:
            raise TypeError(f"order: expected an integer dtype, got {order.dtype}")
        if not (order.is_meta or torch.compiler.is_compiling()):  # then the ops check it, as slots
            check_range("order", order, 0, self.shape[0])
        order = order.to(device=self.device, dtype=torch.int32)
        return self.with_slots(order if self.slots is None else self.slots[order.long()])

    def with_slots(self, slots: Tensor | None) -> Weight:
        """The same data with other `slots` [E] int32; None: expert e is at index e."""
        return self.with_tensors({"slots": slots})

    def with_tensors(self, tensors: Mapping[str, Tensor | None]) -> Weight:
        """A copy with other tensors, by field name."""
        if unknown := sorted(set(tensors) - set(_FIELDS)):
            raise ValueError(f"tensors: expected names among {', '.join(_FIELDS)}, got {', '.join(unknown)}")
        changes: dict[str, Any] = dict(tensors)
        return replace(self, **changes)


def _is_on_cpu(weight: Weight) -> bool:
    return weight.data.is_cpu


class AdaptedWeight(NamedTuple):
    """A weight plus a low-rank one (LoRA, arXiv:2106.09685): W + scale_e · B_e[:, :r_e] · A_e[:r_e] for expert e.

    The weight may be frozen or trained. scale and ranks have no gradient; elements past an expert's rank get zeros.
    """

    weight: Tensor | Weight
    a: Tensor  # [E,r,C], in the dtype of activations, or float32 for those of 16 bits
    b: Tensor  # [E,N,r]
    scale: float | Tensor  # of all experts, or [E] float32 (float64 for float64)
    ranks: Tensor | None = None  # [E] int32: r_e in [0, r]; None: r
    dropout: float = 0.0  # for training: probability of each column of each slot's row to be zero as input of A

    @property
    def shape(self) -> tuple[int, ...]:
        """[E,N,C], of the weight below the adapter."""
        return tuple(self.weight.shape)

    @property
    def dtype(self) -> torch.dtype:
        """That of the activations, as for the weight below the adapter."""
        return self.weight.dtype

    def operand(self, dtype: torch.dtype, autocast: str | None = None) -> Operand:
        """The weight below with this adapter."""
        base = operand_of(self.weight, dtype, autocast)
        adapter = self.adapter(dtype)
        if autocast is not None:
            adapter = (*cast_in_autocast(autocast, *adapter[:2]), *adapter[2:])
        leaves, known = (*base.leaves, *adapter[:2]), base.needs_no_dispatch
        return Operand(base.tensors, base.form, leaves, adapter, self.dropout, base.trained, base.source, known)

    def adapter(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """The adapter as an argument of the ops (reference/layer.py). dtype: of x; float32 factors are rounded to
        it if it has 16 bits."""
        a, b, scales = self.a, self.b, self.scale
        if dtype is not None and dtype.itemsize == 2:
            a, b = (factor.to(dtype) if factor.dtype is torch.float32 else factor for factor in (a, b))
        if not isinstance(scales, Tensor):
            scales = _scales(a.shape[0], scales, a)
        return (a, b, scales) if self.ranks is None else (a, b, scales, self.ranks)


def _scales(num_experts: int, scale: float, a: Tensor) -> Tensor:
    dtype = weight_dtype(a.dtype)
    # Making a tensor takes 3 µs, which a forward of one token notices.
    if a.is_cpu and type(a) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling() and not _dispatch_modes():
        return _kept_scales(num_experts, scale, dtype)
    return torch.full((num_experts,), scale, dtype=dtype, device=a.device)


@functools.lru_cache(maxsize=64)
def _kept_scales(num_experts: int, scale: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # autograd saves it
        return torch.full((num_experts,), scale, dtype=dtype, device="cpu")


class SelectedWeight(NamedTuple):
    """A frozen weight of which some experts are trained alone. `weight` has their values too, so products read it as it
    is; their gradient reaches `trained`, and none is computed for the others (moe_backward's list of experts)."""

    weight: Tensor  # [E,N,C]
    trained: Tensor  # [n,N,C], equal to weight[experts]
    experts: Tensor  # [n] int32, ascending
    trained_bias: Tensor | None = None  # [n,N], equal to bias[experts] of the product's bias

    @property
    def shape(self) -> tuple[int, ...]:
        """[E,N,C], of all experts."""
        return tuple(self.weight.shape)

    @property
    def dtype(self) -> torch.dtype:
        """That of the weight."""
        return self.weight.dtype

    def operand(self, dtype: torch.dtype, autocast: str | None = None) -> Operand:
        """The frozen weight, with the experts that train beside it."""
        weight, trained, bias = self.weight, self.trained, self.trained_bias
        if autocast is not None:
            weight, trained, bias = cast_in_autocast(autocast, weight, trained, bias)
        return Operand((weight,), leaves=(weight, trained, bias), trained=TrainedExperts(trained, bias, self.experts))


@dataclass(frozen=True, eq=False)
class OffloadedWeight:
    """A projection [E,N,C] whose experts are in a store on disk. Some are in memory, where `weight` has slots."""

    weight: Weight
    source: Any  # a LoadsExperts of offload.waves

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def operand(self, dtype: torch.dtype, autocast: str | None = None) -> Operand:
        return Operand((), source=self.source)

    def plain(self) -> NoReturn:
        raise ValueError(
            "model: its experts are offloaded, so their plain weights and state dict are not in memory; the store has "
            "them, or call close() of what offload returned, which restores the parameters"
        )


HUGE_PAGE = 2 << 20  # bytes


def _in_memory(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return plain and tensor.device.type == "cpu" and tensor.nbytes >= HUGE_PAGE


def _words(tensor: Tensor) -> Tensor:
    """The whole storage of a tensor as int32 words, for any shape and dtype."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.int32, device="cpu").set_(storage, 0, (storage.nbytes() // 4,), (1,))


def use_huge_pages(weights: nn.Module | Iterable[Tensor]) -> int:
    """Moves weights onto huge pages in place: addresses and contents stay the same.

    Decoding reads each weight once per token; huge pages make it up to 1.5× faster on machines with fast memory.
    The move takes about a second per GB, once, so call it after loading a model. It needs Linux 6.1 or newer.

    Args:
        weights: a module, for its parameters and buffers, or tensors. Tensors smaller than 2 MB, or not in CPU memory,
            are skipped.

    Returns:
        The number of bytes on huge pages afterwards: 0 if the system has none.
    """
    return sum(ops.collapse_into_huge_pages(_words(tensor)) for tensor in _large(weights))


def interleave_nodes(weights: nn.Module | Iterable[Tensor]) -> int:
    """Spreads the pages of weights over all NUMA nodes in place: addresses and contents stay the same.

    Memory belongs to the node of the thread that first writes it. Weights that one thread loaded are all on one node,
    and threads of all nodes then share its bandwidth. Interleaved pages use that of all nodes. Call it once, after
    `use_huge_pages`; it takes about a second per GB. It needs Linux.

    Args:
        weights: a module, for its parameters and buffers, or tensors. Tensors smaller than 2 MB, or not in CPU memory,
            are skipped.

    Returns:
        The number of nodes; 0 if the system does not allow it, or no tensor is large enough.
    """
    return min((ops.interleave_pages(_words(tensor)) for tensor in _large(weights)), default=0)


def _large(weights: nn.Module | Iterable[Tensor]) -> list[Tensor]:
    if not isinstance(weights, (nn.Module, Iterable)):
        raise TypeError(f"weights: expected a module or tensors, got {type(weights).__name__}")
    tensors = [*weights.parameters(), *weights.buffers()] if isinstance(weights, nn.Module) else list(weights)
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"weights: expected a module or tensors, got {type(tensor).__name__} at {index}")
    return [tensor for tensor in tensors if _in_memory(tensor)]


def advise_huge_pages(tensor: Tensor) -> None:
    """Requests huge pages for a tensor that was not written to yet, which is free."""
    if _in_memory(tensor):
        ops.advise_huge_pages(_words(tensor))
