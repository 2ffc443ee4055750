# SPDX-License-Identifier: BSD-3-Clause
"""Matrices [N,C] in integers with scales per group, w = scale · (q - zero), as GPTQ, AWQ and compressed-tensors publish
them. G groups of columns; int32 words hold q and zeros.

GPTQ, of 2 to 4 bits, beside the name of a linear layer:
    .qweight [C·bits/32, N]   of each row of W one stream of bits, the first column in the lowest
    .qzeros  [G, N·bits/32]   the same along the rows of W; "gptq" stores zero - 1 modulo 2^bits, "gptq_v2" zero
    .scales  [G, N]           .g_idx [C]: the group of each column, optional
AWQ, of 4 bits:
    .qweight [C, N/8], .qzeros [G, N/8]: row 8·i + (0, 2, 4, 6, 1, 3, 5, 7)[k] in bits 4·k of word i    .scales [G, N]
compressed-tensors, "pack-quantized" of 4 bits:
    .weight_packed [N, C/8], .weight_zero_point [N/8, G]: bits 4·k of word i are element 8·i + k, a signed one plus 8
    .weight_scale [N, G]   .weight_shape [2]   .weight_g_idx [C], optional
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from switchgear.integrations.checkpoint_files import Reader
from switchgear.integrations.published_keys import (
    CT_GROUPS,
    CT_PACKED,
    CT_SCALE,
    CT_SHAPE,
    CT_ZEROS,
    FLOATS,
    GROUPS_OF,
    QSCALES,
    QWEIGHT,
    QZEROS,
    Checks,
    Piece,
    Pieces,
)
from switchgear.reference import groups
from switchgear.reference.minifloat import COLUMNS

METHODS = ("gptq", "awq", "compressed-tensors")
AWQ_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)


class Packing(NamedTuple):
    """How a checkpoint packs its matrices."""

    method: str  # of METHODS
    bits: int
    group_size: int  # 0: the whole row
    symmetric: bool
    zero_offset: int = 0  # of stored zeros


class Matrix(NamedTuple):
    """An unpacked matrix."""

    q: Tensor  # [N,C] uint8
    scales: Tensor  # [N,G] float16
    zeros: Tensor | None  # [N,G] uint8


def packing_of(options: dict[str, Any]) -> Packing:
    """The packing of a quantization_config. ValueError, which names the entry, if it is not read here."""
    method = options["quant_method"]
    if method == "compressed-tensors":
        return _compressed(options)
    bits, size, version = options.get("bits"), options.get("group_size"), options.get("checkpoint_format", "gptq")
    if method == "awq":
        _expect("version", str(options.get("version", "gemm")).lower(), ("gemm",))
        _expect("bits", bits, (4,))
        return Packing(method, 4, _group_size(size), not options.get("zero_point", True))
    _expect("bits", bits, (2, 3, 4))
    _expect("checkpoint_format", version, ("gptq", "gptq_v2"))
    return Packing(method, int(bits or 0), _group_size(size), bool(options.get("sym", True)), int(version == "gptq"))


def _compressed(options: dict[str, Any]) -> Packing:
    _expect("format", options.get("format"), ("pack-quantized",))
    found = options.get("config_groups")
    schemes = list(found.values()) if isinstance(found, dict) else []
    if len(schemes) != 1 or not isinstance(schemes[0], dict):
        raise ValueError(f"path: expected one of config_groups in config.json, got {len(schemes)}")
    weights = schemes[0].get("weights")
    weights = weights if isinstance(weights, dict) else {}
    _expect("input_activations", schemes[0].get("input_activations"), (None,))
    for name, wanted in (("num_bits", (4,)), ("type", ("int",)), ("strategy", ("group", "channel"))):
        _expect(name, weights.get(name), wanted)
    size = weights.get("group_size") if weights["strategy"] == "group" else -1
    return Packing("compressed-tensors", 4, _group_size(size), bool(weights.get("symmetric", True)))


def _expect(name: str, got: object, wanted: tuple[object, ...]) -> None:
    if got not in wanted:
        raise ValueError(f"path: expected {name} {', '.join(map(str, wanted))} in config.json, got {got}")


def _group_size(size: object) -> int:
    if size == -1:
        return 0
    if not isinstance(size, int) or size < 1 or size % COLUMNS:
        raise ValueError(f"path: expected group_size -1 or a multiple of {COLUMNS} in config.json, got {size}")
    return size


def is_packed(pieces: Pieces) -> bool:
    """Whether some of the tensors are of a packed matrix."""
    return any(piece.suffix in (QWEIGHT, CT_PACKED) for piece in pieces)


def num_groups(columns: int, packing: Packing) -> int:
    return -(-columns // (packing.group_size or columns))


def check(target: str, pieces: Pieces, of: Piece, shape: tuple[int, int], packing: Packing, checks: Checks) -> None:
    """Checks names, shapes and dtypes of one matrix [N,C]; `of` is the piece of its values."""
    own = {piece.suffix: key for piece, key in pieces.items() if piece._replace(suffix="") == of}
    (rows, columns), bits, count = shape, packing.bits, num_groups(shape[1], packing)
    words, int32 = 32 // bits, ("I32",)
    if columns % 32 or rows % 32:
        checks.problems.append(f"{target}: expected multiples of 32 rows and columns, got {list(shape)}")
        return
    wanted: dict[str, tuple[tuple[int, ...], tuple[str, ...]]]
    if packing.method == "gptq":
        wanted = {
            QWEIGHT: ((columns * bits // 32, rows), int32),
            QZEROS: ((count, rows * bits // 32), int32),
            QSCALES: ((count, rows), FLOATS),
            GROUPS_OF: ((columns,), int32),
        }
    elif packing.method == "awq":
        wanted = {QWEIGHT: ((columns, rows // words), int32), QSCALES: ((count, rows), FLOATS)}
        if not packing.symmetric or QZEROS in own:
            wanted[QZEROS] = ((count, rows // words), int32)
    else:
        wanted = {
            CT_PACKED: ((rows, columns // words), int32),
            CT_SCALE: ((rows, count), FLOATS),
            CT_SHAPE: ((2,), ("I64", "I32")),
            CT_GROUPS: ((columns,), int32),
        }
        if not packing.symmetric:
            wanted[CT_ZEROS] = ((rows // words, count), int32)
    for optional in (GROUPS_OF, CT_GROUPS):
        if optional not in own:
            wanted.pop(optional, None)
    named = {of._replace(suffix=suffix): key for suffix, key in own.items()}
    if checks.expect_all(target, named, [of._replace(suffix=suffix) for suffix in wanted]):
        for suffix, (expected, dtypes) in wanted.items():
            checks.expect(own[suffix], expected, dtypes)


def read(reader: Reader, pieces: Pieces, of: Piece, shape: tuple[int, int], packing: Packing) -> Matrix:
    """The matrix as published. ValueError for numbers that a weight in groups does not hold, by name."""

    def tensor(suffix: str) -> Tensor:
        return reader.tensor(pieces[of._replace(suffix=suffix)])

    def has(suffix: str) -> bool:
        return of._replace(suffix=suffix) in pieces

    bits, method = packing.bits, packing.method
    zeros: Tensor | None = None
    if method == "compressed-tensors":
        if tensor(CT_SHAPE).tolist() != list(shape):
            raise ValueError(f"{CT_SHAPE}: expected {list(shape)}, got {tensor(CT_SHAPE).tolist()}")
        q, scales = _unpack(tensor(CT_PACKED), bits), tensor(CT_SCALE)
        if has(CT_ZEROS):
            zeros = _unpack(tensor(CT_ZEROS).mT, bits).mT
    elif method == "awq":
        q, scales = _unpack_awq(tensor(QWEIGHT)).mT, tensor(QSCALES).mT
        if has(QZEROS):
            zeros = _unpack_awq(tensor(QZEROS)).mT
    else:
        q, scales = _unpack(tensor(QWEIGHT).mT, bits), tensor(QSCALES).mT
        zeros = (_unpack(tensor(QZEROS), bits).mT + packing.zero_offset) & (1 << bits) - 1
    for name in (GROUPS_OF, CT_GROUPS):
        if has(name):
            _check_order(name, tensor(name), shape[1], packing)
    if zeros is not None and packing.symmetric:
        middle = 1 << (bits - 1)
        if not bool((zeros == middle).all()):
            raise ValueError(f"expected zeros of {middle} in symmetric weights, got others")
        zeros = None
    return Matrix(q.contiguous(), _as_float16(scales), None if zeros is None else zeros.contiguous())


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Consecutive numbers in a stream of bits, int32 [A,B] -> uint8 [A, 32·B/bits]."""
    count = 32 // bits if 32 % bits == 0 else 32
    span = words.reshape(len(words), -1, bits * count // 32).long() & 0xFFFFFFFF  # whole words of `count` numbers
    numbers = []
    for i in range(count):
        word, place = divmod(bits * i, 32)
        number = span[..., word] >> place
        if place + bits > 32:  # of two words
            number = number | span[..., word + 1] << (32 - place)
        numbers.append((number & (1 << bits) - 1).to(torch.uint8))
    return torch.stack(numbers, -1).flatten(1)


def _unpack_awq(words: Tensor) -> Tensor:
    """[A, N/8] -> [A, N]"""
    numbers = _unpack(words, 4).view(*words.shape, len(AWQ_ROWS))
    return numbers[..., torch.tensor(AWQ_ROWS).argsort()].flatten(1)


def _check_order(name: str, group_of: Tensor, columns: int, packing: Packing) -> None:
    if not torch.equal(group_of.long(), torch.arange(columns) // (packing.group_size or columns)):
        raise ValueError(
            f"{name}: expected groups of consecutive columns, got those of another order (desc_act, actorder)"
        )


def _as_float16(scales: Tensor) -> Tensor:
    halves = scales.to(torch.float16).contiguous()
    if not bool(halves.isfinite().all()) or not torch.equal(halves.double(), scales.double()):
        raise ValueError(f"scales: expected finite numbers of float16, got others in {scales.dtype}")
    return halves


def decode(matrix: Matrix, packing: Packing) -> Tensor:
    """[N,C] in float32, exactly."""
    zeros = None if matrix.zeros is None else matrix.zeros[None]
    levels = groups.Levels(matrix.q[None], matrix.scales[None], zeros, (packing.bits,))
    return groups.dequantize(levels, packing.group_size)[0]
