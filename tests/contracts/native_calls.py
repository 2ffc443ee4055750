# SPDX-License-Identifier: BSD-3-Clause
"""A table with a valid call of every op of `_C`, for tests that corrupt, restride or repeat its arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from switchgear import _C, reference
from switchgear.reference import Layer, weight_dtype
from switchgear.reference.formats import FORMATS

BYTES = {"int8": torch.int8, "uint8": torch.uint8}
GLU = {"activation": "silu", "gated": True, "interleaved": False, "alpha": 1.5, "limit": 0.0}
ROUTE = {"score_function": "softmax", "normalize": True, "scale": 1.0}
PLAN = {"expert_offsets": "F int32", "token_indices": "S int32", "slot_indices": "TK int32"}
WEIGHTS = {
    "gate_up_proj": "ENH float matrices",
    "down_proj": "EHI float matrices",
    "gate_up_bias": "EN float rows",
    "down_bias": "EH float rows",
}
# 4 bits, groups of 16, in blocks: N rows are A and H rows D blocks; H columns are W words and G groups, I are V and J.
FIELDS = ("scales", "row_scales", "zeros", "slots")


def integers(name: str, blocks: str, words: str, groups: str) -> dict[str, str]:
    return {
        name: f"E{blocks}{words}Q uint8 experts",
        f"{name}_scales": f"E{blocks}{groups}R int8 experts",
        f"{name}_row_scales": f"E{blocks}R float32 experts",
        f"{name}_zeros": f"E{blocks}{groups}R uint8 experts",
    }


CHOICES = {"topk_ids": "TK int32", "topk_weights": "TK float32"}


PLAIN: dict[str, tuple[str, ...]] = {"gate_up_proj": (), "down_proj": ()}


class Op(NamedTuple):
    """tensors: name -> sizes, dtype ("float" is one dtype for all), and layout: "rows" need contiguous rows, "matrices"
    contiguous rows or columns, "experts" contiguous parts a multiple of 64 bytes apart, others are contiguous; "out" is
    an output. Options follow the tensors; an option that is the letter of a size takes its value. weights: the tensors
    that are the data of a weight, with the letters of its rows and columns if it is stored in integers, () if it is
    plain. parts and group_size are those of its form."""

    tensors: dict[str, str]
    options: dict[str, Any]
    weights: dict[str, tuple[str, ...]] = {}  # noqa: RUF012


OPS = {
    "route": Op(
        {"router_logits": "TE float rows", "selection_bias": "E float32"}
        | {name: spec + " out" for name, spec in CHOICES.items()},
        ROUTE | {"num_groups": 1, "topk_groups": 1, "group_score": "max"},
    ),
    "route_backward": Op(
        {
            "grad_topk_weights": "TK float32",
            "router_logits": "TE float rows",
            "topk_ids": "TK int32",
            "grad_router_logits": "TE float rows out",
        },
        ROUTE,
    ),
    "gate": Op(
        {"x": "TH float rows", "weight": "EH float rows", "bias": "E float", "router_logits": "TE float rows out"}, {}
    ),
    "gate_route": Op(
        {"x": "TH float rows", "weight": "EH float rows", "bias": "E float", "selection_bias": "E float32"}
        | {"router_logits": "TE float rows out"}
        | {name: spec + " out" for name, spec in CHOICES.items()},
        ROUTE | {"num_groups": 1, "topk_groups": 1, "group_score": "max"},
    ),
    "route_dynamic": Op(
        {"router_logits": "TE float rows", "selection_bias": "E float32"}
        | {name: spec + " out" for name, spec in CHOICES.items()},
        {
            "min_experts": 1,
            "score_function": "softmax",
            "top_p": 0.5,
            "threshold": 0.1,
            "normalize": True,
            "scale": 1.0,
        },
    ),
    "column_topk": Op(
        {"values": "TE float rows", "sequence_ids": "T int32", "limits": "B int32", "topk_ids": "TE int32 out"}, {}
    ),
    "fit_capacity": Op(
        {
            "topk_ids": "TK int32",
            "priorities": "TK float32",
            "scores": "TE float32",
            "sequence_ids": "T int32",
            "limits": "B int32",
            "kept_ids": "TK int32 out",
        },
        {"num_experts": 3, "drop": "priority", "candidates": 3},
    ),
    "assign_balanced": Op(
        {"values": "TE float32", "sequence_ids": "T int32", "expert_ids": "T int32 out"},
        {"num_sequences": 2, "eps": -1.0, "max_iterations": 5},
    ),
    "assign_capped": Op(
        {"values": "TE float rows", "sequence_ids": "T int32", "limits": "B int32", "assignment": "TE float32 out"},
        {"cap": 2, "entropy": 1e-3, "iterations": 5, "tolerance": 0.1},
    ),
    "plan": Op({"topk_ids": "TK int32"} | {name: spec + " out" for name, spec in PLAN.items()}, {}),
    "permute": Op(
        {"x": "TH float rows", **PLAN, "topk_weights": "TK float32", "permuted_x": "SH float rows out"},
        {},
    ),
    "combine": Op({"permuted_y": "SH float rows", **PLAN, "topk_weights": "TK float32", "y": "TH float rows out"}, {}),
    "combine_weight_backward": Op(
        {
            "grad_y": "TH float rows",
            "permuted_y": "SH float rows",
            **PLAN,
            "grad_topk_weights": "TK float32 out",
        },
        {},
    ),
    "grouped_gemm": Op(
        {
            "x": "TH float rows",
            "weight": "ENH float matrices",
            "bias": "EN float rows",
            "expert_offsets": "F int32",
            "token_indices": "S int32",
            "out": "SN float rows out",
        },
        {"transposed": False, "input_gradient": False},
        {"weight": ()},
    ),
    "grouped_gemm_wgrad": Op(
        {
            "grad_out": "SN float rows",
            "x": "TH float rows",
            "expert_offsets": "F int32",
            "token_indices": "S int32",
            "experts": "E int32",
            "grad_weight": "ENH float matrices out",
        },
        {},
    ),
    "glu": Op({"h": "SN float rows", "a": "SI float rows out"}, GLU),
    "glu_backward": Op({"grad_a": "SI float rows", "h": "SN float rows", "grad_h": "SN float rows out"}, GLU),
    "attend": Op(
        {
            "q": "BKPX float rows",
            "keys": "BOLX float rows",
            "values": "BOLY float rows",
            "starts": "B int32",
            "sinks": "P float32",
            "out": "BKPY float rows out",
        },
        {"length": "K", "scale": 0.5, "window": 2},
    ),
    "rms_norm": Op(
        {
            "x": "TH float rows",
            "residual": "TH float rows",
            "weight": "H float",
            "y": "TH float rows out",
            "sum": "TH float rows out",
        },
        {"eps": 1e-6},
    ),
    "rotate_heads": Op(
        {
            "q": "BKPX float rows",
            "k": "BKOX float rows",
            "v": "BKOY float rows",
            "cos": "BKZ float rows",
            "sin": "BKZ float rows",
            "q_weight": "X float",
            "k_weight": "X float",
            "q_out": "BKPX float rows out",
            "k_out": "BKOX float rows out",
            "v_out": "BKOY float rows out",
        },
        {"eps": 1e-6, "interleaved": True},
    ),
    "moe_forward": Op(
        {"x": "TH float rows", **WEIGHTS, **CHOICES, "y": "TH float rows out", "h": "SN float rows out"},
        GLU,
        PLAIN,
    ),
    "moe_accumulate": Op(
        {"x": "TH float rows", **WEIGHTS, **CHOICES, "sums": "TH float32 rows out"},
        GLU,
        PLAIN,
    ),
    "moe_backward": Op(
        {
            "grad_y": "TH float rows",
            "x": "TH float rows",
            "h": "SN float rows",
            **WEIGHTS,
            **CHOICES,
            "experts": "E int32",
            "grad_x": "TH float rows out",
            **{f"grad_{name}": spec + " out" for name, spec in WEIGHTS.items()},
            "grad_topk_weights": "TK float32 out",
        },
        GLU,
        PLAIN,
    ),
    "grouped_gemm in int4": Op(
        {
            "x": "TH float rows",
            **integers("weight", "A", "W", "G"),
            "bias": "EN float rows",
            "expert_offsets": "F int32",
            "token_indices": "S int32",
            "out": "SN float rows out",
        },
        {"parts": 2, "group_size": 16, "transposed": False, "input_gradient": False},
        {"weight": ("N", "H")},
    ),
    "moe_forward in int4": Op(
        {
            "x": "TH float rows",
            **integers("gate_up_proj", "A", "W", "G"),
            **integers("down_proj", "D", "V", "J"),
            "gate_up_bias": "EN float rows",
            "down_bias": "EH float rows",
            **CHOICES,
            "y": "TH float rows out",
            "h": "SN float rows out",
        },
        {"parts": 2, "group_size": 16, **GLU},
        {"gate_up_proj": ("N", "H"), "down_proj": ("H", "I")},
    ),
    "moe_accumulate in int4": Op(
        {
            "x": "TH float rows",
            **integers("gate_up_proj", "A", "W", "G"),
            **integers("down_proj", "D", "V", "J"),
            "gate_up_bias": "EN float rows",
            "down_bias": "EH float rows",
            **CHOICES,
            "sums": "TH float32 rows out",
        },
        {"parts": 2, "group_size": 16, **GLU},
        {"gate_up_proj": ("N", "H"), "down_proj": ("H", "I")},
    ),
}


def function_of(op: str) -> str:
    """The native function of an entry of OPS."""
    return op.partition(" ")[0]


class Spec(NamedTuple):
    sizes: str
    dtype: str
    layout: str
    out: bool


def spec_of(op: str, name: str) -> Spec:
    sizes, dtype, *flags = OPS[op].tensors[name].split()
    layout = next((flag for flag in flags if flag != "out"), "contiguous")
    return Spec(sizes, dtype, layout, "out" in flags)


ACCUMULATING = frozenset({"moe_accumulate", "moe_accumulate in int4"})  # add to what their outputs hold


def outputs_of(op: str) -> list[str]:
    return [name for name in OPS[op].tensors if spec_of(op, name).out]


def is_optional(op: str, name: str) -> bool:
    optional = {
        "column_topk": {"sequence_ids"},
        "fit_capacity": {"scores", "sequence_ids"},
        "assign_balanced": {"sequence_ids"},
        "assign_capped": {"sequence_ids"},
        "permute": {"topk_weights"},
        "combine": {"topk_weights"},
        "grouped_gemm": {"token_indices"},
        "grouped_gemm_wgrad": {"token_indices", "experts"},
        "attend": {"starts", "sinks"},
        "rotate_heads": {"q_weight", "k_weight"},
        "moe_forward": {"h"},
        "moe_backward": {"experts", *outputs_of("moe_backward")},
    }
    return name.endswith(("bias", "_zeros")) or name in optional.get(function_of(op), set())


def sizes_of(T: int = 4, K: int = 2, E: int = 3, H: int = 5, I: int = 7) -> dict[str, int]:  # noqa: E741
    """Sizes by letter; F is E + 1, B is 2. The defaults are all different, so mixed-up sizes are noticed. Attention: K
    new tokens, L positions, P and O heads of q and of the cache, widths X and Y, Z angles."""
    sizes = {"T": T, "K": K, "E": E, "H": H, "I": I, "N": 2 * I, "S": T * K, "F": E + 1, "B": 2, "Q": 64, "R": 16}
    blocks = {"A": 2 * -(-I // 16), "D": -(-H // 16)}
    words = {"W": -(-H // 8), "V": -(-I // 8), "G": -(-H // 16), "J": -(-I // 16)}
    heads = {"L": K + 9, "P": 6, "O": 3, "X": 10, "Y": 13, "Z": 4}
    return sizes | blocks | words | heads


def arguments(op: str, sizes: dict[str, int], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """The arguments of a valid call, by name and in order, from torch's generator; outputs are poisoned."""
    topk_ids = torch.randint(-1, sizes["E"], (sizes["T"], sizes["K"]), dtype=torch.int32)
    if op == "route_backward":
        topk_ids = torch.rand(sizes["T"], sizes["E"]).argsort(-1)[:, : sizes["K"]].int()
    given = dict(zip(PLAN, reference.plan(topk_ids, sizes["E"]), strict=True)) | {"topk_ids": topk_ids}
    given["sequence_ids"] = torch.randint(sizes["B"], (sizes["T"],), dtype=torch.int32)
    given["experts"] = torch.arange(sizes["E"], dtype=torch.int32)
    given["starts"] = torch.randint(-1, sizes["K"], (sizes["B"],), dtype=torch.int32)
    given["limits"] = torch.randint(sizes["T"] + 1, (sizes["B"],), dtype=torch.int32)
    dtypes = {"float": dtype, "float32": weight_dtype(dtype), "int32": torch.int32}
    args: dict[str, Any] = {}
    for name in OPS[op].tensors:
        spec = spec_of(op, name)
        shape = [sizes[letter] for letter in spec.sizes]
        if spec.out:
            args[name] = poison(torch.empty(shape, dtype=dtypes[spec.dtype]))
        elif name in given:
            args[name] = given[name]
        elif spec.dtype in BYTES:
            args[name] = torch.randint(0, 128, shape, dtype=BYTES[spec.dtype])
        else:
            size = 0.001 if name.endswith("row_scales") else 1.0  # scales multiply products of two bytes
            args[name] = (size * torch.randn(shape)).to(dtypes[spec.dtype])
    options = {name: sizes.get(value, value) for name, value in OPS[op].options.items()}
    if "num_experts" in options:
        options = options | {"num_experts": sizes["E"], "candidates": sizes["E"]}
    args |= options | {"num_threads": 1}
    for name, letters in OPS[op].weights.items():
        args[f"{name}_form"] = [INT4, *(sizes[letter] for letter in letters)] if letters else []
    return args


INT4 = FORMATS.index("int4")


def weight_of(op: str, args: dict[str, Any], name: str) -> tuple[Any, tuple[int, ...]]:
    """The tensors and the form of a weight."""
    form = args[f"{name}_form"]
    if not form:
        return args[name], ()
    present = [(bit, args.get(f"{name}_{field}")) for bit, field in enumerate(FIELDS)]
    fields = sum(1 << bit for bit, tensor in present if tensor is not None)
    parts = 1 if name == "down_proj" else args["parts"]
    tensors = [args[name], *(tensor for _, tensor in present if tensor is not None)]
    return tensors, (*form, parts, args["group_size"], fields, 0)


def inputs_of(op: str, args: dict[str, Any]) -> list[Any]:
    """The tensors of a call in order, with weights as their tensors and their form, without outputs."""
    weights = OPS[op].weights
    parts_of_weights = {f"{name}_{field}" for name in weights for field in FIELDS}
    given: list[Any] = []
    for name in OPS[op].tensors:
        if name in weights:
            given += weight_of(op, args, name)
        elif name not in parts_of_weights and not spec_of(op, name).out:
            given.append(args[name])
    return given


def options_of(op: str, args: dict[str, Any]) -> list[Any]:
    """The options of a call in order."""
    return [args[name] for name in OPS[op].options if name not in ("parts", "group_size")]


def memory(tensor: Tensor) -> Tensor:
    """All bytes of the tensor's storage, writable."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def poison(tensor: Tensor, byte: int = 0xA5) -> Tensor:
    """Fills the tensor's memory with a byte: 0xA5 is a small negative number in every dtype, 0xFF a NaN or -1."""
    memory(tensor).fill_(byte)
    return tensor


def native_arguments(op: str, args: dict[str, Any]) -> tuple[Any, ...]:
    """Inputs, options or a layer, outputs and execution: the arguments of the native function."""
    inputs, options = inputs_of(op, args), options_of(op, args)
    outputs = [args[name] for name in outputs_of(op)]
    function, given = function_of(op), options
    if function.startswith("moe_"):
        first = 3 if function == "moe_backward" else 1  # inputs before the layer, which has eight of them
        given = [*Layer(*inputs[first : first + 8], *options)]
        del inputs[first : first + 8]
    if function == "moe_backward":
        outputs += [None, None, None, None, False, False]  # no adapters; it does not add
    if function == "moe_accumulate":
        outputs += [None]  # h
    return tuple(inputs), tuple(given), tuple(outputs), args["num_threads"]


def call(op: str, args: dict[str, Any]) -> None:
    getattr(_C, function_of(op))(*native_arguments(op, args))
