# SPDX-License-Identifier: BSD-3-Clause
"""Defects of an argument. Each maps a tensor to a hostile value and to a clean copy of it, a contiguous tensor of the
same numbers; NEVER if there is none, so the call must raise."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from forged_arrays import Forged
from numpy.lib.stride_tricks import as_strided
from torch import Tensor

Pair = tuple[Any, Any]
NEVER = object()  # no clean copy: the call must raise


def same(value: Tensor) -> Pair:
    return value, value.detach().resolve_neg().clone(memory_format=torch.contiguous_format)


# ---- tensors in other memory: the result is that of a copy -----------------------------------------------------------


def every_second(t: Tensor, rng: random.Random) -> Pair:
    dim = rng.randrange(t.dim())
    return same(torch.stack((t, t + 1), dim + 1).select(dim + 1, 0))


def transposed(t: Tensor, rng: random.Random) -> Pair:
    return same(t.transpose(0, -1).contiguous().transpose(0, -1))


def first_repeated(t: Tensor, rng: random.Random) -> Pair:
    dim = rng.randrange(t.dim())
    return same(t.narrow(dim, 0, min(1, t.shape[dim])).expand(t.shape))


def overlapping(t: Tensor, rng: random.Random) -> Pair:
    if t.numel() < 2:
        return same(t)
    return same(torch.as_strided(t.flatten().repeat(2), t.shape, [1] * t.dim()))


def at_an_offset(t: Tensor, rng: random.Random) -> Pair:
    return same(torch.cat((t.flatten()[:1], t.flatten()))[min(1, t.numel()) :].view(t.shape))


def negated(t: Tensor, rng: random.Random) -> Pair:
    return same(torch._neg_view(-t)) if t.dtype is not torch.bool else same(t)


def imaginary(t: Tensor, rng: random.Random) -> Pair:
    return same(torch.complex(t.float(), -t.float()).conj().imag)


def parameter(t: Tensor, rng: random.Random) -> Pair:
    return torch.nn.Parameter(t, requires_grad=False), t


def inference(t: Tensor, rng: random.Random) -> Pair:
    with torch.inference_mode():
        return t.clone(), t


def misaligned(t: Tensor, rng: random.Random) -> Pair:
    buffer = bytearray(1 + max(t.nbytes, t.element_size()))
    flat = torch.frombuffer(buffer, dtype=t.dtype, offset=1, count=max(t.numel(), 1))[: t.numel()]
    return same(flat.view(t.shape).copy_(t))


# ---- other contents, shapes and dtypes: the same as of a copy, or an error -------------------------------------------


def extreme(t: Tensor, rng: random.Random) -> Pair:
    values = (float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45, -0.0)
    if not t.is_floating_point():
        values = (-(2**31), 2**31 - 1, -1, -2, 0, 1, 2**30, 7)
    t = t.clone()
    for _ in range(rng.randint(1, 3)):
        if t.numel():
            t.view(-1)[rng.randrange(t.numel())] = rng.choice(values)
    return same(t)


def wide_ids(t: Tensor, rng: random.Random) -> Pair:
    t = t.long()
    if t.numel():
        t.view(-1)[rng.randrange(t.numel())] += rng.choice((2**32, -(2**32), 2**63 - 1, 0))
    return same(t)


def retyped(t: Tensor, rng: random.Random) -> Pair:
    names = ("float64", "float32", "bfloat16", "float16", "int8", "uint8", "int16", "int64", "bool", "complex64",
             "float8_e4m3fn", "uint16", "complex32")  # fmt: skip
    return same(t.to(getattr(torch, rng.choice(names))))


def reshaped(t: Tensor, rng: random.Random) -> Pair:
    dim = rng.randrange(t.dim())
    size = t.shape[dim]
    changes: tuple[Callable[[], Tensor], ...] = (
        lambda: t.unsqueeze(dim),
        lambda: t.select(dim, 0) if size else t,
        lambda: t.narrow(dim, 0, 0),
        lambda: torch.cat((t, t), dim),
        lambda: t.narrow(dim, 0, max(size - 1, 0)),
        lambda: t.flatten(),
        lambda: t.reshape(*[1] * rng.choice((3, 6, 40)), *t.shape),
        lambda: t.sum() if t.is_floating_point() else t.sum().int(),
    )
    return same(rng.choice(changes)())


# ---- no tensors of memory: an error ----------------------------------------------------------------------------------


def not_dense(t: Tensor, rng: random.Random) -> Pair:
    kind = rng.choice(("sparse", "mkldnn", "meta", "nested"))
    if kind == "sparse":
        return t.to_sparse(), NEVER
    if kind == "mkldnn":
        return t.float().to_mkldnn(), NEVER
    return (t.to("meta") if kind == "meta" else torch.nested.nested_tensor([t, t])), NEVER


def freed(t: Tensor, rng: random.Random) -> Pair:
    """Only where the kernels are called directly: torch's own functions crash for these."""
    if t.numel() == 0:
        return same(t)
    both = torch.stack((t, t))
    half = both[rng.randrange(2)]
    both.untyped_storage().resize_(0)
    return half, NEVER


def not_a_tensor(t: Tensor, rng: random.Random) -> Pair:
    values = ("x", 3, 1.5, b"", object(), {}, t.tolist(), [t, None], True, np.float32(1), slice(None))
    return rng.choice(values), NEVER


# ---- arrays of numpy, and forged ones --------------------------------------------------------------------------------


def array(t: Tensor, rng: random.Random) -> Pair:
    a = t.numpy() if t.dtype is not torch.bfloat16 else t.float().numpy()
    read_only = a.copy()
    read_only.setflags(write=False)
    kinds: tuple[Callable[[], np.ndarray], ...] = (
        lambda: a,
        lambda: a[::-1],
        lambda: a[..., ::-1],
        lambda: np.asfortranarray(a),
        lambda: read_only,
        lambda: np.broadcast_to(a[:1], a.shape) if len(a) else a,
        lambda: as_strided(a[:1], a[:1].shape, (2**62, *a.strides[1:])),
    )
    chosen = rng.choice(kinds)()
    return chosen, torch.from_numpy(chosen.copy())


def odd_array(t: Tensor, rng: random.Random) -> Pair:
    a = t.float().numpy()
    dtype = rng.choice((">f4", ">i4", np.longdouble, object, str, "M8[s]", "V4"))
    return (a.astype(dtype) if dtype != "V4" else np.zeros(a.shape, "V4")), NEVER


def forged(t: Tensor, rng: random.Random) -> Pair:
    huge = (2**63 - 1, -(2**63), 2**62, -(2**62), -1)
    strides = (rng.choice(huge), 1)
    fields = rng.choice(({}, {"lanes": 2}, {"bits": 4}, {"code": 77}, {"ndim": -1}, {"data": 0}))
    return Forged((3, 2) if rng.random() < 0.8 else (2**40, 2**40), strides, **fields), NEVER


Defect = Callable[[Tensor, random.Random], Pair]
OF_TENSORS: tuple[Defect, ...] = (
    every_second, transposed, first_repeated, overlapping, at_an_offset, negated, imaginary, parameter, inference,
    misaligned, extreme, wide_ids, retyped, reshaped, not_dense, freed, not_a_tensor, array, odd_array, forged,
)  # fmt: skip

NAN, INF = float("nan"), float("inf")
OF_OPTIONS: tuple[Any, ...] = (
    0, -1, 1, 3, 2**31 - 1, 2**40, 2**63, 2**80, -(2**80), 1.5, NAN, INF, -INF, 1e-50, 1e50, -0.0, "x", "", None, True,
    [], b"", (), {}, object(), np.int64(2), np.float32(2), torch.tensor(2), torch.tensor([1, 2]), 1j,
)  # fmt: skip
SMALL_OPTIONS = tuple(value for value in OF_OPTIONS if not (isinstance(value, int) and value == 2**31 - 1))
