# SPDX-License-Identifier: BSD-3-Clause
"""Matrices [N,C] of 2 to 8 bits as published, a few tensors for each: how they are named, checked and read.

fp8 has float32 scales of blocks of 128 x 128 or 64 x 128 in .weight_scale_inv, beside .weight.

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

Integers with scales per group of columns, w = scale · (q - zero), as GPTQ, AWQ and compressed-tensors publish them: G
groups, and int32 words that hold q and zeros.

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

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switchgear.integrations.checkpoint_files import BLOCKS, FLOATS, SCALE, SCALES, Checks, Piece, Pieces, Reader
from switchgear.reference import groups, nf4
from switchgear.reference.minifloat import BLOCK, COLUMNS, NF4_BLOCK, NVFP4_BLOCK, decode_fp8, decode_nvfp4
from switchgear.weights import Form, Fp8, Groups, Nf4, Nvfp4
from switchgear.weights.minifloat import BLOCKS as FP8_BLOCKS

QWEIGHT, QZEROS, QSCALES, GROUPS_OF = ".qweight", ".qzeros", ".scales", ".g_idx"
CT_PACKED, CT_ZEROS, CT_SCALE = ".weight_packed", ".weight_zero_point", ".weight_scale"
CT_SHAPE, CT_GROUPS = ".weight_shape", ".weight_g_idx"
OF_GROUPS = (QWEIGHT, QZEROS, QSCALES, GROUPS_OF, CT_PACKED, CT_ZEROS, CT_SCALE, CT_SHAPE, CT_GROUPS)
METHODS = ("bitsandbytes", "modelopt", "compressed-tensors", "gptq", "awq")  # of quantisation, in config.json

Shapes = Mapping[str, tuple[int, ...]]  # of the tensors of a matrix, by suffix
Wanted = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]  # their shapes and dtypes


class Packing(NamedTuple):
    """How a checkpoint packs integers."""

    method: str  # of METHODS
    bits: int
    group_size: int  # 0: the whole row
    symmetric: bool
    zero_offset: int = 0  # of stored zeros


class Matrices(NamedTuple):
    """How a format is published."""

    form: Form  # of the weight
    mark: str  # the suffix that only these have
    multiple: tuple[int, int]  # of rows and columns
    want: Callable[[tuple[int, int], Shapes], Wanted]  # the tensors of a matrix of a shape, of those that there are
    take: Callable[[dict[str, Tensor], tuple[int, int]], tuple[Tensor, ...]]  # values and scales as published
    decode: Callable[..., Tensor]  # of what is read, of all experts
    suffixes: tuple[str, ...] = ()  # of names
    ignored: tuple[str, ...] = ()  # suffixes of tensors that weights do not need
    packing: Packing | None = None  # of integers
    group: tuple[int, int] = BLOCK  # rows and columns that share a scale of fp8

    def check(self, target: str, pieces: Pieces, of: Piece, shape: tuple[int, int], checks: Checks) -> None:
        """Checks names, shapes and dtypes of one matrix; `of` is the piece of its values."""
        rows, columns = self.multiple
        if shape[0] % rows or shape[1] % columns:
            sizes = f"a multiple of {columns} columns{f' and of {rows} rows' if rows > 1 else ''}"
            checks.problems.append(f"{target}: expected {sizes} in {self.form.name}, got {list(shape)}")
            return
        own = {piece: key for piece, key in pieces.items() if piece._replace(suffix="") == of}
        wanted = self.want(shape, {piece.suffix: checks.headers[key].shape for piece, key in own.items()})
        if checks.expect_all(target, own, [of._replace(suffix=suffix) for suffix in wanted]):
            for suffix, (expected, dtypes) in wanted.items():
                checks.expect(own[of._replace(suffix=suffix)], expected, dtypes)

    def read(self, reader: Reader, pieces: Pieces, of: Piece, shape: tuple[int, int]) -> tuple[Tensor, ...]:
        """Values and scales of one matrix as published. ValueError, by name, for numbers that no form holds."""
        own = {suffix: pieces.get(of._replace(suffix=suffix)) for suffix in ("", *self.suffixes)}
        return self.take({suffix: reader.tensor(key) for suffix, key in own.items() if key is not None}, shape)


def matrices_of(pieces: Pieces, configured: Matrices | None) -> Matrices | None:
    """How the tensors are published; None if they are none of these. configured: what the config says of them."""
    suffixes = {piece.suffix for piece in pieces}
    kinds = KINDS if configured is None else (configured, *KINDS)
    return next((kind for kind in kinds if kind.mark in suffixes), None)


def find_configured(options: dict[str, Any]) -> Matrices | None:
    """The integers, or the blocks of fp8, of a quantization_config; None for other formats. ValueError, which names the
    entry, if a method has a kind that is not read here."""
    method, packing = options["quant_method"], None
    if method == "fp8":
        found = options.get("weight_block_size")
        block: Any = tuple(found) if isinstance(found, (list, tuple)) else found
        _expect("weight_block_size", block, tuple(FP8_OF_BLOCK))
        return _fp8(FP8_OF_BLOCK[block])
    if method == "bitsandbytes":
        _expect("bnb_4bit_quant_type", options.get("bnb_4bit_quant_type"), ("nf4",))
    elif method == "modelopt":
        _expect("quant_algo", options.get("quant_algo"), ("NVFP4",))
    elif method == "compressed-tensors" and options.get("format") != "nvfp4-pack-quantized":
        packing = _read_compressed(options)
    elif method == "awq":
        _expect("version", str(options.get("version", "gemm")).lower(), ("gemm",))
        _expect("bits", options.get("bits"), (4,))
        packing = Packing(method, 4, _group_size(options.get("group_size")), not options.get("zero_point", True))
    elif method == "gptq":
        bits, version = options.get("bits"), options.get("checkpoint_format", "gptq")
        _expect("bits", bits, (2, 3, 4))
        _expect("checkpoint_format", version, ("gptq", "gptq_v2"))
        size, is_symmetric = _group_size(options.get("group_size")), bool(options.get("sym", True))
        packing = Packing(method, int(bits or 0), size, is_symmetric, int(version == "gptq"))
    if packing is None:
        return None
    form = Groups(packing.bits, packing.group_size, packing.symmetric)
    return Matrices(
        form, CT_PACKED if method == "compressed-tensors" else QWEIGHT, (32, 32), partial(_want_groups, packing),
        partial(_take_groups, packing), partial(_decode_groups, packing), suffixes=OF_GROUPS, packing=packing,
    )  # fmt: skip


def _read_compressed(options: dict[str, Any]) -> Packing:
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


# ---- nf4 -------------------------------------------------------------------------------------------------------------

ABSMAX, NF4_MAP, NF4_STATE = ".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4"
NESTED_ABSMAX, NESTED_MAP = ".nested_absmax", ".nested_quant_map"
NESTED_BLOCK = 256
LONGEST_STATE = 4096  # bytes of JSON, about 170 in practice


def _want_nf4(shape: tuple[int, int], found: Shapes) -> Wanted:
    blocks, size = math.prod(shape) // NF4_BLOCK, found.get(NF4_STATE, ())[:1]
    wanted: Wanted = {
        "": ((math.prod(shape) // 2, 1), ("U8",)),
        ABSMAX: ((blocks,), ("U8" if NESTED_ABSMAX in found else "F32",)),
        NF4_MAP: ((len(nf4.VALUES),), ("F32",)),
        NF4_STATE: (size if size and size[0] <= LONGEST_STATE else (LONGEST_STATE,), ("U8",)),
    }
    if NESTED_ABSMAX in found:
        wanted |= {NESTED_ABSMAX: ((-(-blocks // NESTED_BLOCK),), ("F32",)), NESTED_MAP: ((256,), ("F32",))}
    return wanted


def _take_nf4(tensors: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """The codes [N,C/2] and absmax [N,C/64], float32. ValueError unless the numbers beside them are those of nf4."""
    state = _state_of(bytes(tensors[NF4_STATE].tolist()))
    expected: dict[str, Any] = {"quant_type": "nf4", "blocksize": NF4_BLOCK, "shape": list(shape)}
    if NESTED_ABSMAX in tensors:
        expected["nested_blocksize"] = NESTED_BLOCK
    for name, wanted in expected.items():
        if state.get(name) != wanted:
            raise ValueError(f"{NF4_STATE}: expected {name} {wanted}, got {state.get(name)}")
    if tensors[NF4_MAP].tolist() != torch.tensor(nf4.VALUES).tolist():
        raise ValueError(f"{NF4_MAP}: expected the values of nf4, got {tensors[NF4_MAP].tolist()}")
    absmax = tensors[ABSMAX]
    if NESTED_ABSMAX in tensors:
        offset = state.get("nested_offset")
        if not isinstance(offset, float) or not math.isfinite(offset):
            raise ValueError(f"{NF4_STATE}: expected nested_offset to be a finite number, got {offset}")
        scales = tensors[NESTED_ABSMAX].repeat_interleave(NESTED_BLOCK)[: len(absmax)]
        absmax = tensors[NESTED_MAP][absmax.int()] * scales + offset
    return tensors[""].view(shape[0], -1), absmax.view(shape[0], -1)


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


def _want_nvfp4(shape: tuple[int, int], found: Shapes) -> Wanted:
    values, whole = ("", SCALE_2) if SCALE_2 in found else (PACKED, GLOBAL)
    return {
        values: ((shape[0], shape[1] // 2), ("U8",)),
        BLOCK_SCALE: ((shape[0], shape[1] // NVFP4_BLOCK), ("F8_E4M3",)),
        whole: ((1,) if found.get(whole) == (1,) else (), ("F32",)),
    }


def _take_nvfp4(tensors: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """The codes [N,C/2], scales [N,C/16] and the tensor's scale [1]."""
    if SCALE_2 in tensors:
        return tensors[""], tensors[BLOCK_SCALE], tensors[SCALE_2].view(1)
    return tensors[PACKED], tensors[BLOCK_SCALE], tensors[GLOBAL].view(1).reciprocal()


# ---- integers --------------------------------------------------------------------------------------------------------

AWQ_ROWS = (0, 2, 4, 6, 1, 3, 5, 7)


def num_groups(columns: int, packing: Packing) -> int:
    return -(-columns // (packing.group_size or columns))


def _want_groups(packing: Packing, shape: tuple[int, int], found: Shapes) -> Wanted:
    (rows, columns), bits, count = shape, packing.bits, num_groups(shape[1], packing)
    words, int32 = 32 // bits, ("I32",)
    wanted: Wanted
    if packing.method == "gptq":
        wanted = {
            QWEIGHT: ((columns * bits // 32, rows), int32),
            QZEROS: ((count, rows * bits // 32), int32),
            QSCALES: ((count, rows), FLOATS),
            GROUPS_OF: ((columns,), int32),
        }
    elif packing.method == "awq":
        wanted = {QWEIGHT: ((columns, rows // words), int32), QSCALES: ((count, rows), FLOATS)}
        if not packing.symmetric or QZEROS in found:
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
        if optional not in found:
            wanted.pop(optional, None)
    return wanted


def _take_groups(packing: Packing, tensors: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, ...]:
    """q [N,C] uint8, scales [N,G] float16, and zeros [N,G] uint8 if the matrix is asymmetric."""
    bits, method, zeros = packing.bits, packing.method, None
    if method == "compressed-tensors":
        if tensors[CT_SHAPE].tolist() != list(shape):
            raise ValueError(f"{CT_SHAPE}: expected {list(shape)}, got {tensors[CT_SHAPE].tolist()}")
        q, scales = _unpack(tensors[CT_PACKED], bits), tensors[CT_SCALE]
        if CT_ZEROS in tensors:
            zeros = _unpack(tensors[CT_ZEROS].mT, bits).mT
    elif method == "awq":
        q, scales = _unpack_awq(tensors[QWEIGHT]).mT, tensors[QSCALES].mT
        if QZEROS in tensors:
            zeros = _unpack_awq(tensors[QZEROS]).mT
    else:
        q, scales = _unpack(tensors[QWEIGHT].mT, bits), tensors[QSCALES].mT
        zeros = (_unpack(tensors[QZEROS], bits).mT + packing.zero_offset) & (1 << bits) - 1
    for name in (GROUPS_OF, CT_GROUPS):
        if name in tensors:
            _check_order(name, tensors[name], shape[1], packing)
    if zeros is not None and packing.symmetric:
        middle = 1 << (bits - 1)
        if not bool((zeros == middle).all()):
            raise ValueError(f"expected zeros of {middle} in symmetric weights, got others")
        zeros = None
    found = q.contiguous(), _as_float16(scales)
    return found if zeros is None else (*found, zeros.contiguous())


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


def _decode_groups(packing: Packing, q: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Tensor:
    """[E,N,C] in float32, exactly."""
    return groups.dequantize(groups.Levels(q, scales, zeros, (packing.bits,)), packing.group_size)


# ---- fp8 -------------------------------------------------------------------------------------------------------------

FP8_OF_BLOCK = {FP8_BLOCKS[form.block]: form for form in (Fp8(), Fp8("64x128"))}


def _fp8(form: Fp8) -> Matrices:
    rows, columns = group = FP8_BLOCKS[form.block]

    def want(shape: tuple[int, int], found: Shapes) -> Wanted:
        return {"": (shape, ("F8_E4M3",)), SCALE: ((-(-shape[0] // rows), -(-shape[1] // columns)), FLOATS)}

    def take(tensors: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, ...]:
        return tensors[""], tensors[SCALE].float()

    return Matrices(form, SCALE, (1, 1), want, take, partial(decode_fp8, group=group), (SCALE,), group=group)


KINDS = (
    _fp8(Fp8()),
    Matrices(
        Nf4(), NF4_STATE, (1, NF4_BLOCK), _want_nf4, _take_nf4, nf4.decode_nf4,
        (ABSMAX, NF4_MAP, NF4_STATE, NESTED_ABSMAX, NESTED_MAP),
    ),
    Matrices(
        Nvfp4(), SCALE_2, (1, NVFP4_BLOCK), _want_nvfp4, _take_nvfp4, decode_nvfp4, (SCALE_2, BLOCK_SCALE),
        (".input_scale", ".input_global_scale", ".k_scale", ".v_scale"),
    ),
    Matrices(
        Nvfp4(), GLOBAL, (1, NVFP4_BLOCK), _want_nvfp4, _take_nvfp4, decode_nvfp4, (GLOBAL, PACKED, BLOCK_SCALE)
    ),
)  # fmt: skip
SUFFIXES = (SCALE, BLOCKS, SCALES, *OF_GROUPS, *(suffix for kind in KINDS for suffix in kind.suffixes))
IGNORED = tuple(suffix for kind in KINDS for suffix in kind.ignored)
