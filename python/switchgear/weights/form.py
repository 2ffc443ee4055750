# SPDX-License-Identifier: BSD-3-Clause
"""Form: a way to store a weight, with its options; the base class of the forms in this folder. Layout: how a module of
experts, or a linear layer, holds its projections; integrations register a finder for modules of other libraries."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from switchgear import ops
from switchgear.reference import formats
from switchgear.reference.minifloat import finite_experts
from switchgear.weights.state import find
from switchgear.weights.weight import PANEL_DTYPES, Weight, advise_huge_pages

FORMS: dict[str, type[Form]] = {}
"""The class of each format's form, by name."""


@dataclass(frozen=True)
class Form(ABC):
    """How a weight is stored. Frozen and comparable, so that the forms of two modules can be compared."""

    name: ClassVar[str]  # of the format; also its name in `store`
    devices: ClassVar[tuple[str, ...] | None] = None  # device types that can hold it; None: any
    one_dtype: ClassVar[bool] = False  # all projections of a module need the same dtype
    undo: ClassVar[str] = "switchgear.restore(model)"  # gives plain weights

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls) and vars(cls)["name"] in formats.FORMATS:
            FORMS.setdefault(cls.name, cls)

    @property
    def remedy(self) -> str:
        """What an error says where plain weights are needed."""
        return f"call {self.undo} first"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Suffixes of the state dict's keys <name><suffix>. If empty, the state dict has a plain weight, <name>."""
        return ()

    @abstractmethod
    def encode(self, name: str, weight: Tensor, parts: int) -> Weight | str:
        """Encodes a weight [E,N,C], or returns why that is impossible. Raises ValueError for non-finite numbers.

        parts: 2 if the rows are all gates, then all ups, which are stored separately; else 1.
        """

    def check_values(self, name: str, weight: Tensor, parts: int) -> None:  # noqa: B027  (many forms take any)
        """Raises ValueError if `encode` would refuse the numbers of a weight, without encoding it where possible."""

    def options(self) -> list[str]:
        """The options that are not the default, as a call has them."""
        return [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]

    def __str__(self) -> str:
        options = self.options()
        return f"{self.name}({', '.join(options)})" if options else self.name


class KeyedForm(Form):
    """A form with suffixes: its state dict does not have the plain weight. keys: the suffixes of the weight's fields,
    if it has them as they are."""

    keys: ClassVar[Mapping[str, str]]

    def check_values(self, name: str, weight: Tensor, parts: int) -> None:
        for _ in finite_experts(weight, name):
            pass

    def save(self, weight: Weight) -> dict[str, Tensor]:
        """The state dict's tensors of a weight, by suffix."""
        return {key: tensor for field, key in self.keys.items() if (tensor := getattr(weight, field)) is not None}

    def read(self, tensors: dict[str, Tensor], now: Weight) -> Weight:
        """The weight made of a state dict's `tensors`, by suffix, to replace `now`. Raises ValueError for a tensor of
        another shape or dtype, or unusable numbers; the message starts with the suffix."""
        fields = ("data", *formats.FIELDS)
        without_numbers = {field: t.to("meta") for field in fields if (t := getattr(now, field)) is not None}
        for suffix, like in self.save(now.with_tensors(without_numbers)).items():
            got = tensors[suffix]
            if got.shape != like.shape or got.dtype is not like.dtype:
                raise ValueError(
                    f"{suffix}: expected {like.dtype} {list(like.shape)}, got {got.dtype} {list(got.shape)}"
                )
        return self.load(tensors, now)

    def load(self, tensors: dict[str, Tensor], now: Weight) -> Weight:
        """`read`, for tensors of these shapes and dtypes."""
        present = {field: tensors[key] for field, key in self.keys.items() if key in tensors}
        return now.with_tensors({field: on_huge_pages(tensor.to(now.device)) for field, tensor in present.items()})


def on_huge_pages(tensor: Tensor) -> Tensor:
    """A contiguous copy in memory advised to use huge pages."""
    copy = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    advise_huge_pages(copy)
    return copy.copy_(tensor)


# ---- kernels ---------------------------------------------------------------------------------------------------------


def has_encoder(weight: Tensor) -> bool:
    """Whether kernels encode a weight; they give the bits of the definitions in reference/."""
    return weight.is_cpu and weight.dtype in PANEL_DTYPES and weight.numel() > 0


def empty_tensor(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Memory for an encoded weight, advised to use huge pages."""
    tensor = torch.empty(*shape, dtype=dtype, device="cpu")
    advise_huge_pages(tensor)
    return tensor


def encode_matrix(matrix: Tensor, weight: Weight, label: str, scale_rows: int = 1) -> bool:
    """Writes a matrix [N,C] to a weight of one expert, by a kernel; whether a minifloat is exact. ValueError, which
    starts with `label`, unless the numbers are finite. scale_rows: of fp8, the rows that share a scale."""
    rows = matrix.detach()
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    is_finite, is_exact = ops.encode_weight(rows, weight.tensors, weight.form, scale_rows, torch.get_num_threads())
    if not is_finite:
        raise ValueError(f"{label} has NaN or infinities")
    return is_exact


def encode_experts(name: str, plain: Tensor, weight: Weight, scale_rows: int = 1) -> Weight:
    """Writes a weight [E,N,C] to `weight` by a kernel, and returns it with its `is_exact`. ValueError unless all
    numbers are finite."""
    is_exact = weight.format in formats.MINIFLOATS
    for expert, matrix in enumerate(plain):
        own = {f: t[expert : expert + 1] for f in ("data", *formats.FIELDS) if (t := getattr(weight, f)) is not None}
        if weight.records is not None:
            first, bits = weight.records[expert].tolist()
            own |= {"data": weight.data[first : first + bits], "records": torch.tensor([[0, bits]], dtype=torch.int32)}
        label = f"{name}: expected finite numbers, expert {expert}"
        is_exact = encode_matrix(matrix, weight.with_tensors(own), label, scale_rows) and is_exact
    return dataclasses.replace(weight, is_exact=is_exact)


# ---- modules ---------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """How a module holds its projections: two of experts, or one matrix of a linear layer."""

    names: tuple[str, ...]  # of the parameters: first and second projection
    transposed: bool  # parameters are [E,in,out] instead of [E,out,in]
    split_gates: bool  # the first projection holds all gates, then all ups
    stored_class: type[nn.Module] | None = None  # of a linear layer: its class while stored; the parameter is [out,in]

    def parts(self, index: int) -> int:
        """Parts of a projection's rows that are stored separately: 2 for gates and ups, else 1."""
        return 2 if index == 0 and self.split_gates else 1

    def view(self, parameter: Tensor) -> Tensor:
        """The projection [E,out,in] in a parameter; E is 1 in a linear layer."""
        if self.stored_class is not None:
            return parameter[None]
        return parameter.mT if self.transposed else parameter

    def view_back(self, weight: Tensor) -> Tensor:
        """A projection [E,out,in] with the shape of the parameter."""
        if self.stored_class is not None:
            return weight[0]
        return weight.mT if self.transposed else weight


def layout_of(module: nn.Module) -> Layout | None:
    """The layout of experts' projections; None if the module has none that the fused kernel supports."""
    layout: Layout | None = find("layout", module)
    return layout


def linear_layout_of(module: nn.Module) -> Layout | None:
    """The layout of a linear layer's weight; None for other modules."""
    layout: Layout | None = find("linear", module)
    return layout


def embedding_layout_of(module: nn.Module) -> Layout | None:
    """The layout of an embedding's table; None for other modules."""
    layout: Layout | None = find("embedding", module)
    return layout


def hint_for(model: nn.Module) -> str:
    """Why a model has no module with a layout, from the first module that an integration knows, or what to do."""
    hints = (f"{name}: {hint}" for name, m in model.named_modules() if (hint := find("hint", m)) is not None)
    return next(hints, "for a Hugging Face model, call switchgear.accelerate(model) first")
