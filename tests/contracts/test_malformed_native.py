# SPDX-License-Identifier: BSD-3-Clause
"""Malformed arguments of the native ops: a ValueError or TypeError names the argument, what was expected and what was
given; outputs keep every byte; and the next valid call works.

The defects are generated from the table in native_calls.py: every applicable one for each argument of each op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from native_calls import OPS, Spec, arguments, call, is_optional, memory, outputs_of, poison, sizes_of, spec_of
from torch import Tensor

from errors import raises
from switchgear import _C

SIZES = sizes_of()
WRONG_DTYPES = {
    "float": (torch.float64, torch.int32, torch.int64, torch.bool, torch.complex64),
    "float32": (torch.bfloat16, torch.float64, torch.int32),
    "int32": (torch.int64, torch.int16, torch.float32),
    "int8": (torch.uint8, torch.int32, torch.float32),
    "uint8": (torch.int8, torch.int32, torch.float32),
}
Defect = tuple[str, Callable[[Tensor], Any]]


# ---- defects of one tensor -------------------------------------------------------------------------------------------


def misaligned(tensor: Tensor) -> Tensor:
    """The same values, shifted by one byte."""
    buffer = bytearray(1 + tensor.numel() * tensor.element_size())
    flat = torch.frombuffer(buffer, dtype=tensor.dtype, offset=1, count=tensor.numel())
    return flat.view(tensor.shape).copy_(tensor)


def as_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.float().numpy().astype(np.float32) if tensor.is_floating_point() else tensor.numpy().copy()


def read_only(tensor: Tensor) -> np.ndarray:
    array = as_numpy(tensor)
    array.setflags(write=False)
    return array


def every_second(tensor: Tensor, dim: int) -> Tensor:
    """The same values with twice the stride along `dim`."""
    return torch.stack((tensor, tensor), dim + 1).flatten(dim, dim + 1).unfold(dim, 1, 2).squeeze(-1)


def without(dim: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.narrow(dim, 0, 0)


def longer(dim: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: torch.cat((tensor, tensor.narrow(dim, 0, 1)), dim).contiguous()


def apart(tensor: Tensor, num_bytes: int) -> Tensor:
    """A copy whose parts are so far apart that 64 bytes do not divide it."""
    stride = (tensor[0].nbytes // 64 * 64 + 64 + num_bytes) // tensor.element_size()
    out = tensor.new_zeros(stride * len(tensor)).as_strided(tensor.shape, (stride, *tensor.stride()[1:]))
    return out.copy_(tensor)


def retyped(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(dtype)


BESIDE_FLOAT32 = {("gate", "x"), ("gate_route", "x")}  # routers may keep their weights in float32


def defects(op: str, name: str) -> Iterator[Defect]:
    spec = spec_of(op, name)
    last = len(spec.sizes) - 1
    for dtype in WRONG_DTYPES[spec.dtype]:
        yield str(dtype).removeprefix("torch."), retyped(dtype)
    others = sum(spec_of(op, other).dtype == "float" for other in OPS[op].tensors) - 1
    if spec.dtype == "float" and others and (op, name) not in BESIDE_FLOAT32:
        yield "bfloat16 beside float32", retyped(torch.bfloat16)
    yield "one dimension more", lambda t: t.unsqueeze(0)
    yield "one dimension less", lambda t: t.select(0, 0)
    yield "five dimensions", lambda t: t.view(*[1] * (5 - t.dim()), *t.shape)
    yield "no dimension", lambda t: t.flatten()[0]
    yield "on meta", lambda t: t.to("meta")
    if "int8" not in spec.dtype:
        yield "misaligned", misaligned
    yield "a string", lambda t: "x"
    yield "a number", lambda t: 3
    yield "a list", lambda t: t.tolist()
    if not is_optional(op, name):
        yield "none", lambda t: None
    yield "upside down", lambda t: as_numpy(t)[::-1]
    yield "reversed", lambda t: as_numpy(t)[..., ::-1]
    if spec.layout != "matrices":
        yield "columns apart", lambda t: every_second(t, last)
    if spec.layout == "matrices":
        yield "no contiguous dimension", lambda t: every_second(every_second(t, 1), 2)
    if spec.layout == "contiguous" and last:
        yield "rows apart", lambda t: every_second(t, 0)
    if spec.layout == "experts":
        yield (
            "blocks apart",
            lambda t: every_second(t, next(dim for dim, size in enumerate(t.shape) if dim and size > 1)),
        )
        yield "experts apart", lambda t: apart(t, 4)
    if spec.out:
        yield "read only", read_only
        yield "expanded", lambda t: t[:1].expand(t.shape)
    if spec.out and last:
        yield "overlapping", lambda t: t.as_strided(t.shape, (1,) * t.dim())
    for dim, letter in enumerate(spec.sizes):
        if is_shared(op, letter):
            yield f"{letter} + 1", longer(dim)
        if letter not in "TSF":
            yield f"{letter} = 0", without(dim)


def linked(letter: str) -> str:
    """Sizes that depend on each other: S = T·K, F = E + 1, N = 2I."""
    return next(group for group in ("TKS", "EF", "IN", "H", *"ABDWVGJQR", *"LPOXYZ") if letter in group)


def is_shared(op: str, letter: str) -> bool:
    """Whether another tensor has this size, so that it cannot change in one tensor only. Gathered rows are free."""
    if "grouped_gemm" in op and letter == "T":
        return False
    letters = "".join(spec_of(op, name).sizes for name in OPS[op].tensors)
    return sum(letters.count(other) for other in linked(letter)) > 1


def names_to_blame(op: str, name: str) -> set[str]:
    """The argument, or one that shares a size or dtype with it: the first one checked is the reference."""
    spec = spec_of(op, name)

    def related(other: Spec) -> bool:
        links = set(map(linked, spec.sizes)) & set(map(linked, other.sizes))
        return bool(links) or spec.dtype == other.dtype == "float"

    # A stored weight has its sizes in its form.
    links = set(map(linked, spec.sizes))
    stored = {weight for weight, letters in OPS[op].weights.items() if links & set(map(linked, letters))}
    return {other for other in OPS[op].tensors if other == name or related(spec_of(op, other))} | stored


def check_refused(op: str, args: dict[str, Any], spoiled: dict[str, Any], blamed: set[str]) -> None:
    """The call with some arguments replaced raises, writes nothing, and does not break later valid calls."""
    outputs = outputs_of(op)
    for output in outputs:  # some ops add to one
        poison(args[output])
    call(op, args)
    wanted = {output: memory(args[output]).clone() for output in outputs}
    for output in outputs:
        poison(args[output])
    exchanged = args | spoiled
    before = {output: bytes_of(exchanged[output]) for output in outputs}

    with pytest.raises((ValueError, TypeError)) as info:
        call(op, exchanged)
    assert info.type in (ValueError, TypeError)
    message = str(info.value)
    argument, _, rest = message.partition(": ")
    assert argument.partition("[")[0] in blamed, message
    assert rest.startswith("expected "), message
    assert ", got" in rest, message
    for output in outputs:
        assert bytes_of(exchanged[output]) == before[output], f"{output} was written"

    call(op, args)
    for output in outputs:
        assert torch.equal(memory(args[output]), wanted[output]), f"{output} differs after a refused call"


def bytes_of(array: Any) -> bytes | None:
    if isinstance(array, np.ndarray):
        return array.tobytes()
    if isinstance(array, Tensor) and array.device.type == "cpu":
        return memory(array).numpy().tobytes()
    return None


TENSORS = [(op, name, defect) for op, parts in OPS.items() for name in parts.tensors for defect in defects(op, name)]


@pytest.mark.parametrize(("op", "name", "defect"), TENSORS, ids=lambda v: v if isinstance(v, str) else v[0])
@pytest.mark.some(600)
def test_spoiled_tensor(op: str, name: str, defect: Defect) -> None:
    args = arguments(op, SIZES)
    check_refused(op, args, {name: defect[1](args[name])}, names_to_blame(op, name))


# ---- two tensors, one memory -----------------------------------------------------------------------------------------

PAIRS = [
    (op, output, other)
    for op, parts in OPS.items()
    for output in outputs_of(op)
    for other in parts.tensors
    if other != output and "float" in spec_of(op, other).dtype and "float" in spec_of(op, output).dtype
]


@pytest.mark.parametrize(("op", "output", "other"), PAIRS)
def test_shared_memory(op: str, output: str, other: str) -> None:
    """An output that overlaps all of another argument, and one that overlaps its last element."""
    args = arguments(op, SIZES)
    a, b = args[output], args[other]
    for first in (0, b.numel() - 1):
        buffer = torch.empty(first + max(a.numel(), b.numel()))
        shared = {
            output: buffer[first : first + a.numel()].view(a.shape),
            other: buffer[: b.numel()].view(b.shape).copy_(b),
        }
        check_refused(op, args, shared, {output, other})


# ---- contents --------------------------------------------------------------------------------------------------------

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
OUT_OF_RANGE = {
    "topk_ids": (-2, SIZES["E"], INT_MIN, INT_MAX),
    "token_indices": (-1, SIZES["T"], INT_MIN, INT_MAX),
    "slot_indices": (-2, SIZES["S"], INT_MIN, INT_MAX),
    "sequence_ids": (-1, SIZES["B"], INT_MIN, INT_MAX),
    "limits": (-1, INT_MIN),
}
INDICES = [
    (op, name, value)
    for op, parts in OPS.items()
    for name, values in OUT_OF_RANGE.items()
    if name in parts.tensors and not spec_of(op, name).out
    for value in values
]


@pytest.mark.parametrize(("op", "name", "value"), INDICES)
@pytest.mark.parametrize("position", ["first", "last"])
def test_index_out_of_range(op: str, name: str, value: int, position: str) -> None:
    args = arguments(op, SIZES)
    indices = args[name].clone()
    used = int(args["expert_offsets"][-1]) if name == "token_indices" else indices.numel()
    indices.view(-1)[0 if position == "first" else used - 1] = value
    check_refused(op, args, {name: indices}, {name})


OFFSETS = (
    [1, 2, 4, 5],
    [0, 4, 2, 5],
    [0, 2, 4, 9],
    [0, -1, 4, 5],
    [-1, 0, 2, 3],
    [0, 2, INT_MAX, 5],
    [0, 2, 4, INT_MAX],
)


@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
@pytest.mark.parametrize("op", [op for op, parts in OPS.items() if "expert_offsets" in parts.tensors and op != "plan"])
def test_offsets(op: str, offsets: list[int]) -> None:
    """Offsets that start after 0, decrease, exceed the slots, or are not slot counts at all."""
    args = arguments(op, SIZES)
    check_refused(op, args, {"expert_offsets": torch.tensor(offsets, dtype=torch.int32)}, {"expert_offsets"})


# ---- options ---------------------------------------------------------------------------------------------------------

WRONG_OPTIONS: dict[str, tuple[Any, ...]] = {
    "score_function": ("relu", "", "Softmax"),
    "group_score": ("mean", ""),
    "activation": ("swish", "", "SiLU"),
    "scale": (float("nan"), float("inf"), 1e39),
    "num_groups": (0, 2, 4, -1),
    "topk_groups": (0, 2, -1),
    "alpha": (float("nan"), float("inf")),
    "limit": (-1.0, float("nan"), float("inf")),
    "min_experts": (-1, 3),
    "top_p": (-0.5, float("nan")),
    "threshold": (float("nan"),),
    "drop": ("score", ""),
    "num_experts": (0, -1, 2**31),
    "entropy": (0.0, -1.0, float("nan"), float("inf"), 1e-46, 2**-127),
    "num_sequences": (0, -1, 2**31),
    "eps": (float("nan"), float("inf")),
    "max_iterations": (-1,),
    "tolerance": (-1.0, float("nan")),
    "parts": (0, -1, 4),
    "group_size": (-16, 8, 24),
    "num_threads": (-1, 100_000),
}
OPTION_CASES = [
    (op, name, value)
    for op, parts in OPS.items()
    for name in (*parts.options, "num_threads")
    for value in WRONG_OPTIONS.get(name, ())
]


@pytest.mark.parametrize(("op", "name", "value"), OPTION_CASES)
def test_wrong_option(op: str, name: str, value: Any) -> None:
    is_of_a_form = name in ("parts", "group_size")
    check_refused(op, arguments(op, SIZES), {name: value}, set(OPS[op].weights) if is_of_a_form else {name})


@pytest.mark.parametrize("op", [op for op, parts in OPS.items() if "activation" in parts.options])
def test_gated_activation_of_plain_experts(op: str) -> None:
    check_refused(op, arguments(op, SIZES), {"activation": "swiglu_oai", "gated": False}, {"activation"})


# ---- lists of matrices -----------------------------------------------------------------------------------------------

LISTS: dict[str, Callable[[list[Tensor]], Any]] = {
    "empty": lambda m: [],
    "one too few": lambda m: m[:-1],
    "one too many": lambda m: [*m, m[0]],
    "another depth": lambda m: [*m[:-1], m[-1][:, :-1].contiguous()],
    "another dtype": lambda m: [*m[:-1], m[-1].half()],
    "another stride": lambda m: [*m[:-1], m[-1].T.contiguous().T],
    "a vector": lambda m: [*m[:-1], m[-1][0]],
    "none": lambda m: [*m[:-1], None],
    "too tall": lambda m: [*m[:-1], torch.cat((m[-1], m[-1]))],
    "misaligned": lambda m: [*m[:-1], misaligned(m[-1])],
    "a dict": lambda m: dict(enumerate(m)),
}


@pytest.mark.parametrize("defect", LISTS)
def test_list_of_matrices(defect: str) -> None:
    args = arguments("grouped_gemm", SIZES)
    args["weight"] = list(args["weight"])
    blamed = {"weight", "bias", "out", "expert_offsets"} if "too" in defect else {"weight", "x"}
    check_refused("grouped_gemm", args, {"weight": LISTS[defect](args["weight"])}, blamed)


PROJECTIONS = [
    (op, name)
    for op, parts in OPS.items()
    for name in parts.weights
    if name != "weight" and "group_size" not in parts.options
]


@pytest.mark.parametrize(("op", "name"), PROJECTIONS)
def test_list_of_different_heights(op: str, name: str) -> None:
    """Only grouped_gemm multiplies them: the kernels of layers read as many rows of each."""
    args = arguments(op, SIZES)
    args[name] = list(args[name])
    check_refused(op, args, {name: [*args[name][:-1], args[name][-1][:-1]]}, {name})


def test_form_of_floats() -> None:
    x, offsets = torch.zeros(2, 8), torch.tensor([0, 2], dtype=torch.int32)
    weight = (torch.zeros(1, 8, 8),), (1.5, 8, 8, 1, 0, 0, 4)
    with raises(TypeError, "weight"):
        _C.grouped_gemm((x, *weight, None, offsets, None), (False, False), (torch.zeros(2, 8),), 1)


@pytest.mark.parametrize("name", ["Reader", "Buffer"])
def test_no_object_without_its_constructor(name: str) -> None:
    cls: Any = getattr(_C, name)

    class Silent(cls):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

    for make in (lambda: cls.__new__(cls), lambda: cls.__mro__[1].__new__(cls), lambda: object.__new__(cls), Silent):
        with pytest.raises(TypeError):
            make()
