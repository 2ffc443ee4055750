# SPDX-License-Identifier: BSD-3-Clause
"""Matrices [N,C] of 4 bits as published, one tensor for each: how they are named, checked and read.

nf4 as bitsandbytes serialises it (Linear4bit), beside the names of matrices the suffixes

    (none)      uint8 [N·C/2, 1]    .absmax                           float32 [N·C/64]
    .quant_map  float32 [16]        .quant_state.bitsandbytes__nf4    JSON in uint8

With double quantisation .absmax is uint8, an index into .nested_quant_map [256], and

    absmax = nested_quant_map[.absmax] · nested_absmax + nested_offset

with a .nested_absmax for 256 of them and the offset in the JSON.

nvfp4 as ModelOpt and compressed-tensors ("nvfp4-pack-quantized") write it; column 2i in the lower half of byte i
    .weight         uint8 [N,C/2]      .weight_scale float8_e4m3fn [N,C/16]   .weight_scale_2      float32
    .weight_packed  the same           .weight_scale the same                 .weight_global_scale float32 [1]

The global scale is the reciprocal of .weight_scale_2. Scales of activations (.input_scale, .input_global_scale) and of
caches (.k_scale, .v_scale) are not read: activations are not rounded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switchgear.integrations.checkpoint_files import Reader
from switchgear.integrations.published_keys import Checks, Piece, Pieces
from switchgear.reference import nf4
from switchgear.reference.minifloat import NF4_BLOCK, NVFP4_BLOCK, decode_nvfp4

ABSMAX, NF4_MAP, NF4_STATE = ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4"
NESTED_ABSMAX, NESTED_MAP = ".nested_absmax", ".nested_quant_map"
NESTED_BLOCK = 256
LONGEST_STATE = 4096  # bytes of JSON, about 170 in practice


METHODS = ("bitsandbytes", "modelopt", "compressed-tensors")  # of quantisation, in config.json


def takes(options: dict[str, Any]) -> bool:
    """Whether a quantization_config is one of matrices that are read here. ValueError for another kind of a method."""
    if options.get("quant_method") == "bitsandbytes" and options.get("bnb_4bit_quant_type") != "nf4":
        got = options.get("bnb_4bit_quant_type")
        raise ValueError(f"path: expected bnb_4bit_quant_type nf4 in config.json, got {got}")
    if options.get("quant_method") == "modelopt" and options.get("quant_algo") != "NVFP4":
        raise ValueError(f"path: expected quant_algo NVFP4 in config.json, got {options.get('quant_algo')}")
    if options.get("quant_method") == "compressed-tensors":
        return options.get("format") == "nvfp4-pack-quantized"
    return options.get("quant_method") in METHODS


class Matrices(NamedTuple):
    """How a format of 4 bits is published."""

    format: str  # of the weight
    mark: str  # the suffix that only these have
    suffixes: tuple[str, ...]  # of names; all
    check: Callable[[str, Pieces, Piece, tuple[int, int], Checks], None]  # names, shapes and dtypes of one matrix
    read: Callable[[Reader, Pieces, Piece, tuple[int, int]], tuple[Tensor, ...]]  # values and scales as published
    decode: Callable[..., Tensor]  # of what is read, of all experts
    ignored: tuple[str, ...] = ()  # suffixes of tensors that weights do not need


def matrices_of(pieces: Pieces) -> Matrices | None:
    """How the tensors are published; None if they are no matrices of 4 bits."""
    suffixes = {piece.suffix for piece in pieces}
    return next((kind for kind in KINDS if kind.mark in suffixes), None)


# ---- nf4 -------------------------------------------------------------------------------------------------------------


def _check_nf4(target: str, pieces: Pieces, of: Piece, shape: tuple[int, int], checks: Checks) -> None:
    """Checks names, shapes and dtypes of one matrix; `of` is the piece of its values."""
    own = {piece: key for piece, key in pieces.items() if piece._replace(suffix="") == of}
    is_nested = of._replace(suffix=NESTED_ABSMAX) in own
    blocks = math.prod(shape) // NF4_BLOCK
    expected: dict[str, tuple[tuple[int, ...], str]] = {
        "": ((math.prod(shape) // 2, 1), "U8"),
        ABSMAX: ((blocks,), "U8" if is_nested else "F32"),
        NF4_MAP: ((len(nf4.VALUES),), "F32"),
    }
    if is_nested:
        expected |= {NESTED_ABSMAX: ((-(-blocks // NESTED_BLOCK),), "F32"), NESTED_MAP: ((256,), "F32")}
    if shape[1] % NF4_BLOCK:
        checks.problems.append(f"{target}: expected a multiple of {NF4_BLOCK} columns in nf4, got {shape[1]}")
    if checks.expect_all(target, own, [of._replace(suffix=suffix) for suffix in (*expected, NF4_STATE)]):
        for suffix, (wanted, dtype) in expected.items():
            checks.expect(own[of._replace(suffix=suffix)], wanted, (dtype,))
        key = own[of._replace(suffix=NF4_STATE)]
        size = checks.headers[key].shape[:1]
        checks.expect(key, size if size and size[0] <= LONGEST_STATE else (LONGEST_STATE,), ("U8",))


def _read_nf4(reader: Reader, pieces: Pieces, of: Piece, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The codes [N,C/2] and absmax [N,C/64], float32. ValueError unless the numbers beside them are those of nf4."""

    def tensor(suffix: str) -> Tensor:
        return reader.tensor(pieces[of._replace(suffix=suffix)])

    is_nested = of._replace(suffix=NESTED_ABSMAX) in pieces
    state = _state_of(bytes(tensor(NF4_STATE).tolist()))
    expected: dict[str, Any] = {"quant_type": "nf4", "blocksize": NF4_BLOCK, "shape": list(shape)}
    if is_nested:
        expected["nested_blocksize"] = NESTED_BLOCK
    for name, wanted in expected.items():
        if state.get(name) != wanted:
            raise ValueError(f"{NF4_STATE}: expected {name} {wanted}, got {state.get(name)}")
    if tensor(NF4_MAP).tolist() != torch.tensor(nf4.VALUES).tolist():
        raise ValueError(f"{NF4_MAP}: expected the values of nf4, got {tensor(NF4_MAP).tolist()}")
    absmax = tensor(ABSMAX)
    if is_nested:
        offset = state.get("nested_offset")
        if not isinstance(offset, float) or not math.isfinite(offset):
            raise ValueError(f"{NF4_STATE}: expected nested_offset to be a finite number, got {offset}")
        scales = tensor(NESTED_ABSMAX).repeat_interleave(NESTED_BLOCK)[: len(absmax)]
        absmax = tensor(NESTED_MAP)[absmax.int()] * scales + offset
    return tensor("").view(shape[0], -1), absmax.view(shape[0], -1)


def _state_of(text: bytes) -> dict[str, Any]:
    try:
        state = json.loads(text)
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise ValueError(f"{NF4_STATE}: expected a JSON object, got {text[:80]!r}")
    return state


# ---- nvfp4 -----------------------------------------------------------------------------------------------------------

PACKED, BLOCK_SCALE, SCALE_2, GLOBAL = ".weight_packed", ".weight_scale", ".weight_scale_2", ".weight_global_scale"


def _check_nvfp4(target: str, pieces: Pieces, of: Piece, shape: tuple[int, int], checks: Checks) -> None:
    own = {piece: key for piece, key in pieces.items() if piece._replace(suffix="") == of}
    values, whole = ("", SCALE_2) if of._replace(suffix=SCALE_2) in own else (PACKED, GLOBAL)
    if shape[1] % NVFP4_BLOCK:
        checks.problems.append(f"{target}: expected a multiple of {NVFP4_BLOCK} columns in nvfp4, got {shape[1]}")
    if checks.expect_all(target, own, [of._replace(suffix=suffix) for suffix in (values, BLOCK_SCALE, whole)]):
        checks.expect(own[of._replace(suffix=values)], (shape[0], shape[1] // 2), ("U8",))
        checks.expect(own[of._replace(suffix=BLOCK_SCALE)], (shape[0], shape[1] // NVFP4_BLOCK), ("F8_E4M3",))
        key = own[of._replace(suffix=whole)]
        checks.expect(key, (1,) if checks.headers[key].shape == (1,) else (), ("F32",))


def _read_nvfp4(reader: Reader, pieces: Pieces, of: Piece, shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """The codes [N,C/2], scales [N,C/16] and the tensor's scale [1]."""

    def tensor(suffix: str) -> Tensor:
        return reader.tensor(pieces[of._replace(suffix=suffix)])

    if of._replace(suffix=SCALE_2) in pieces:
        return tensor(""), tensor(BLOCK_SCALE), tensor(SCALE_2).view(1)
    return tensor(PACKED), tensor(BLOCK_SCALE), tensor(GLOBAL).view(1).reciprocal()


_OF_ACTIVATIONS = (".input_scale", ".input_global_scale", ".k_scale", ".v_scale")
KINDS = (
    Matrices(
        "nf4", NF4_STATE, (ABSMAX, NF4_MAP, NF4_STATE, NESTED_ABSMAX, NESTED_MAP), _check_nf4, _read_nf4, nf4.decode_nf4
    ),
    Matrices("nvfp4", SCALE_2, (SCALE_2, BLOCK_SCALE), _check_nvfp4, _read_nvfp4, decode_nvfp4, _OF_ACTIVATIONS),
    Matrices("nvfp4", GLOBAL, (GLOBAL, PACKED, BLOCK_SCALE), _check_nvfp4, _read_nvfp4, decode_nvfp4),
)  # fmt: skip
SUFFIXES = tuple(suffix for kind in KINDS for suffix in kind.suffixes)
IGNORED = tuple(suffix for kind in KINDS for suffix in kind.ignored)
