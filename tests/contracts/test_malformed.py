# SPDX-License-Identifier: BSD-3-Clause
"""Malformed arguments of the public functions, on kernels and reference: a ValueError or TypeError names the argument,
what was expected and what was given; and the next valid call works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from native_calls import PLAN, WEIGHTS, sizes_of
from test_malformed_native import Defect, linked, longer, retyped, without
from torch import Tensor

import switchgear
from errors import raises

SIZES = sizes_of()
T, K, E, H, I, N, S = (SIZES[letter] for letter in "TKEHINS")  # noqa: E741


def permute(x: Any, expert_offsets: Any, token_indices: Any, slot_indices: Any, topk_weights: Any) -> Any:
    return switchgear.permute(x, switchgear.Plan(expert_offsets, token_indices, slot_indices), topk_weights)


def combine(permuted_y: Any, expert_offsets: Any, token_indices: Any, slot_indices: Any, topk_weights: Any) -> Any:
    return switchgear.combine(permuted_y, switchgear.Plan(expert_offsets, token_indices, slot_indices), topk_weights)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "route": switchgear.route,
    "plan": switchgear.plan,
    "permute": permute,
    "combine": combine,
    "grouped_gemm": switchgear.grouped_gemm,
    "glu": switchgear.glu,
    "moe": switchgear.moe,
}
# sizes and dtype of each tensor; ids may also be int64, and weights any floating dtype
TENSORS: dict[str, dict[str, str]] = {
    "route": {"router_logits": "TE float", "selection_bias": "E weights"},
    "plan": {"topk_ids": "TK ids"},
    "permute": {"x": "TH float", **PLAN, "topk_weights": "TK weights"},
    "combine": {"permuted_y": "SH float", **PLAN, "topk_weights": "TK weights"},
    "grouped_gemm": {
        "x": "TH float", "weight": "ENH float", "expert_offsets": "F int32", "bias": "EN float",
        "token_indices": "S int32",
    },
    "glu": {"h": "SN float"},
    "moe": {
        "x": "TH float", **{name: spec.removesuffix(" rows") for name, spec in WEIGHTS.items()},
        "topk_ids": "TK ids", "topk_weights": "TK weights",
    },
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "route": {
        "top_k": K, "score_function": "softmax", "normalize": False, "scale": 1.0,
        "num_groups": 1, "topk_groups": 1, "group_score": "max",
    },
    "plan": {"num_experts": E},
    "glu": {"activation": "silu", "gated": True, "interleaved": False, "alpha": 1.702, "limit": None},
}  # fmt: skip
OPTIONS["moe"] = OPTIONS["glu"]
OPTIONAL = {"selection_bias", "bias", "gate_up_bias", "down_bias", "token_indices"}


def good_arguments(function: str, sizes: dict[str, int] = SIZES) -> dict[str, Any]:
    topk_ids = torch.arange(sizes["S"], dtype=torch.int32).view(sizes["T"], sizes["K"]) * 5 % (sizes["E"] + 1) - 1
    given = dict(zip(PLAN, switchgear.plan(topk_ids, sizes["E"]), strict=True)) | {"topk_ids": topk_ids}
    args: dict[str, Any] = {}
    for name, spec in TENSORS[function].items():
        shape = [sizes[letter] for letter in spec.split()[0]]
        args[name] = given[name] if name in given else torch.randn(shape)
    return args | OPTIONS.get(function, {})


def spec_of(function: str, name: str) -> tuple[str, str]:
    sizes, dtype, *_ = TENSORS[function][name].split()
    return sizes, dtype


WRONG_DTYPES = {
    "float": (torch.int32, torch.bool, torch.complex64),
    "weights": (torch.int32, torch.bool, torch.complex64),
    "int32": (torch.int64, torch.float32),
    "ids": (torch.int16, torch.float32, torch.bool),
}


def defects(function: str, name: str) -> Iterator[Defect]:
    sizes, dtype = spec_of(function, name)
    for wrong in WRONG_DTYPES[dtype]:
        yield str(wrong).removeprefix("torch."), retyped(wrong)
    if dtype == "float" and function in ("grouped_gemm", "moe"):
        yield "bfloat16 beside float32", retyped(torch.bfloat16)
        yield "float64 beside float32", retyped(torch.float64)
    if function not in ("route", "glu") or name == "selection_bias":
        yield "one dimension less", lambda t: t.select(0, 0)
        yield "one dimension more", lambda t: t.unsqueeze(0).repeat(2, *[1] * t.dim())
    yield "no dimension", lambda t: t.flatten()[0]
    if len(TENSORS[function]) > 1:
        yield "on meta", lambda t: t.to("meta")
    yield "a string", lambda t: "x"
    yield "a number", lambda t: 3
    yield "a list", lambda t: t.tolist()
    if name not in OPTIONAL and not (name == "topk_weights" and function != "moe"):
        yield "none", lambda t: None
    for dim, letter in enumerate(sizes):
        if is_shared(function, letter):
            yield f"{letter} + 1", longer(dim)
        if letter not in "TSF":
            yield f"{letter} = 0", without(dim)


def is_shared(function: str, letter: str) -> bool:
    """Whether another tensor has this size. Any number of rows may be gathered from any number."""
    if function == "plan" or (function == "grouped_gemm" and letter in "TS"):
        return False
    letters = "".join(spec_of(function, name)[0] for name in TENSORS[function])
    return sum(letters.count(other) for other in linked(letter)) > 1


def names_to_blame(function: str, name: str) -> set[str]:
    sizes, dtype = spec_of(function, name)

    def related(other: str) -> bool:
        other_sizes, other_dtype = spec_of(function, other)
        return bool(set(map(linked, sizes)) & set(map(linked, other_sizes))) or dtype == other_dtype == "float"

    return {other for other in TENSORS[function] if other == name or related(other)}


def check_refused(function: str, args: dict[str, Any], spoiled: dict[str, Any], blamed: set[str]) -> None:
    wanted = FUNCTIONS[function](**args)
    with pytest.raises((ValueError, TypeError)) as info:
        FUNCTIONS[function](**args | spoiled)
    assert info.type in (ValueError, TypeError)
    message = str(info.value)
    argument, _, rest = message.partition(": ")
    assert argument.partition("[")[0] in blamed, message
    assert rest.startswith("expected ") or " expected " in rest, message
    assert ", got" in rest, message
    again = FUNCTIONS[function](**args)
    for a, b in zip(*((r if isinstance(r, tuple) else (r,)) for r in (wanted, again)), strict=True):
        assert not isinstance(a, Tensor) or torch.equal(a, b)


@pytest.fixture(params=["native", "reference"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    with switchgear.use_backend(request.param):
        yield


CASES = [(f, name, defect) for f, parts in TENSORS.items() for name in parts for defect in defects(f, name)]


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(("function", "name", "defect"), CASES, ids=lambda v: v if isinstance(v, str) else v[0])
@pytest.mark.some(200)
def test_spoiled_tensor(function: str, name: str, defect: Defect) -> None:
    args = good_arguments(function)
    blamed = set(TENSORS[function]) if defect[0] == "on meta" else names_to_blame(function, name)
    check_refused(function, args, {name: defect[1](args[name])}, blamed)


# ---- options ---------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
WRONG_OPTIONS: dict[str, tuple[Any, ...]] = {
    "top_k": (0, -1, E + 1, 2.0, "2", None),
    "num_experts": (0, -1, 2.0, "3", None),
    "score_function": ("relu", "", 3, None),
    "group_score": ("mean", "", 1, None),
    "normalize": ("yes",),
    "scale": (NAN, INF, "x", "2.5", None),
    "num_groups": (0, 2, E + 1, -1, 1.0, "1"),
    "topk_groups": (0, 2, -1, "1"),
    "activation": ("swish", "", 1, None),
    "gated": ("yes",),
    "interleaved": ("yes",),
    "alpha": (NAN, INF, "x", "2.5", None),
    "limit": (0.0, -1.0, NAN, INF, "x"),
}
OPTION_CASES = [(f, name, value) for f, options in OPTIONS.items() for name in options for value in WRONG_OPTIONS[name]]


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(("function", "name", "value"), OPTION_CASES)
def test_wrong_option(function: str, name: str, value: Any) -> None:
    check_refused(function, good_arguments(function), {name: value}, {name})


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("function", ["glu", "moe"])
def test_gated_activation_of_plain_experts(function: str) -> None:
    check_refused(function, good_arguments(function), {"activation": "swiglu_oai", "gated": False}, {"activation"})


# ---- contents --------------------------------------------------------------------------------------------------------

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
OUT_OF_RANGE = {
    "topk_ids": (-2, E, INT_MIN, INT_MAX),
    "token_indices": (-1, T, INT_MIN, INT_MAX),
    "slot_indices": (-2, S, INT_MIN, INT_MAX),
}
INDICES = [
    (function, name, value)
    for function, parts in TENSORS.items()
    for name, values in OUT_OF_RANGE.items()
    if name in parts
    for value in values
]


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(("function", "name", "value"), INDICES)
def test_index_out_of_range(function: str, name: str, value: int) -> None:
    args = good_arguments(function)
    indices = args[name].clone()
    indices.view(-1)[0] = value
    check_refused(function, args, {name: indices}, {name})


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("value", [-2, E, INT_MAX + 1, 2**32, 2**32 + 1, -(2**32), -(2**63), 2**63 - 1])
@pytest.mark.parametrize("function", ["plan", "moe"])
def test_wide_ids_do_not_wrap_around(function: str, value: int) -> None:
    args = good_arguments(function)
    ids = args["topk_ids"].long()
    ids[1, 1] = value
    check_refused(function, args, {"topk_ids": ids}, {"topk_ids"})


OFFSETS = (
    [1, 2, 4, 5], [0, 4, 2, 5], [0, 2, 4, 9], [0, -1, 4, 5], [-1, 0, 2, 3], [0, 2, INT_MAX, 5], [0, 2, 4, INT_MAX]
)  # fmt: skip


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
@pytest.mark.parametrize("function", ["permute", "combine", "grouped_gemm"])
def test_offsets(function: str, offsets: list[int]) -> None:
    spoiled = {"expert_offsets": torch.tensor(offsets, dtype=torch.int32)}
    check_refused(function, good_arguments(function), spoiled, {"expert_offsets"})


# ---- the containers of tensors ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("plan", [None, "x", 3, (), (1, 2), [1, 2, 3]], ids=str)
def test_no_plan(plan: Any) -> None:
    for function in (switchgear.permute, switchgear.combine):
        with raises(TypeError):
            function(torch.randn(T, H), plan)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(
    "weight",
    [[], [torch.randn(2, H)], [torch.randn(2, H)] * 4, [torch.randn(2, H), torch.randn(2, H), None], "x", [1, 2, 3]],
    ids=["none", "too few", "too many", "one missing", "a string", "numbers"],
)
def test_no_list_of_matrices(weight: Any) -> None:
    args = good_arguments("grouped_gemm") | {"bias": None}
    good = args | {"weight": [torch.randn(2, H)] * E}
    check_refused("grouped_gemm", good, {"weight": weight}, {"weight", "expert_offsets"})


@pytest.mark.parametrize("function", ["moe", "grouped_gemm"])
def test_arrays_of_two_libraries(function: str) -> None:
    """The first argument determines the library."""
    args = good_arguments(function)
    for name in list(TENSORS[function])[1:]:
        check_refused(function, args, {name: args[name].numpy()}, {name})


def test_arguments_by_name_come_in_any_order() -> None:
    logits = torch.randn(T, E)
    assert torch.equal(switchgear.route(top_k=K, router_logits=logits).topk_ids, switchgear.route(logits, K).topk_ids)
    numbers = np.random.default_rng(0).standard_normal((T, E), np.float32)
    assert isinstance(switchgear.route(top_k=K, router_logits=numbers).topk_ids, np.ndarray)


def test_missing_and_unknown_arguments() -> None:
    with raises(TypeError, "top_k"):
        switchgear.route(torch.randn(T, E))
    with raises(TypeError):
        switchgear.route(torch.randn(T, E), 2, top=2)
