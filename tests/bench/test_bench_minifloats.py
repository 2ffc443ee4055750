# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench layers --dtypes fp8,mxfp4`: its weights, its competitors and its targets."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from errors import raises
from switchgear import _C
from switchgear.reference import minifloat
from switchgear.weights import Weight
from switchgear_bench.case import FORMATS, Case, forward, make_case
from switchgear_bench.ceilings import read_probe
from switchgear_bench.competitors import COMPETITORS, Skip, quantised
from switchgear_bench.layer_tables import BLOCKS
from switchgear_bench.minifloats import STANDARD_DEVIATION, decoded, in_bfloat16, make_stored
from switchgear_bench.results import SCHEMA, completed
from switchgear_bench.shapes import Shape
from switchgear_bench.targets import judge
from switchgear_bench.verify import expected, relative_error, tolerance

SMALL = Shape(160, 96, 4, 2, "of the tests")  # blocks of 128 x 128 are cut off at the edges
MINIFLOATS = ("fp8", "mxfp4")
STORED = (*MINIFLOATS, "groups4", "groups3", "groups1")


def small_case(dtype: str, tokens: int = 24, shape: Shape = SMALL) -> Case:
    stored = make_stored(dtype, shape, False)
    weights = in_bfloat16(stored[0], False), in_bfloat16(stored[1], False)
    return make_case("small", shape, dtype, tokens, "forward", "balanced", weights, "default", stored)


@pytest.mark.parametrize("dtype", MINIFLOATS)
def test_weights_are_those_of_a_checkpoint(dtype: str) -> None:
    case = small_case(dtype)
    assert case.stored is not None
    pairs = quantised.published(case)
    for weight, (values, scales), plain in zip(case.stored, pairs, case.weights, strict=True):
        parts = weight.parts
        minifloat.check_published(values, scales, dtype, parts)
        assert scales.is_contiguous()
        if dtype == "fp8":
            exact = minifloat.decode_fp8(values.view(torch.uint8), scales, parts=parts)
        else:
            exact = minifloat.decode_mxfp4(values, scales)
        assert torch.equal(torch.stack([decoded(weight, expert) for expert in range(4)]), exact)
        assert torch.equal(plain, exact.bfloat16())
        assert float(exact.std()) == pytest.approx(STANDARD_DEVIATION, rel=0.3)
        assert all(not torch.equal(exact[0], other) for other in exact[1:])
        stored_again, scales_again = minifloat.to_blocks(values, scales, dtype, parts)  # the same layout
        assert torch.equal(stored_again, weight.data)
        assert weight.scales is not None
        assert torch.equal(scales_again, weight.scales)


@pytest.mark.parametrize("dtype", STORED)
def test_bench_tells_right_from_wrong(dtype: str) -> None:
    case = small_case(dtype)
    want, limit = expected(case), tolerance(case)
    names = (f"switchgear_{dtype}", "switchgear", "hf_eager", "hf_grouped_mm")
    errors = {name: relative_error(case, COMPETITORS[name].make(case), want) for name in names}
    assert max(errors.values()) < limit, errors
    assert limit < 0.02  # the formats' own errors are 2.6 % and 12 % of a weight
    right = COMPETITORS["switchgear"].make(case)
    assert relative_error(case, lambda inputs: right(inputs) * 1.03, want) > limit


@pytest.mark.parametrize("dtype", MINIFLOATS)
def test_a_library_that_mistakes_a_scale_is_wrong(dtype: str) -> None:
    """The scale of one group in a hundred is wrong."""
    case = small_case(dtype, shape=Shape(256, 256, 4, 2, "of the tests"))
    assert case.stored is not None
    want, limit = expected(case), tolerance(case)
    first, second = case.stored
    assert first.scales is not None
    scales = first.scales.clone()
    scales.view(-1)[::100] = scales.view(-1)[::100] * 2 if dtype == "fp8" else scales.view(-1)[::100] + 1
    mistaken = case._replace(stored=(first.with_tensors({"scales": scales}), second))
    assert relative_error(mistaken, COMPETITORS[f"switchgear_{dtype}"].make(mistaken), want) > limit


def test_blocks_of_ggml_have_the_same_numbers() -> None:
    """block_mxfp4: e, then qs[16], whose lower halves are elements 0..15; 2^(e - 128) times a table of doubles."""
    case = small_case("mxfp4")
    assert case.stored is not None
    table = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.float64)
    for weight, (blocks, scales) in zip(case.stored, quantised.published(case), strict=True):
        data = quantised.ggml_mxfp4(blocks, scales)
        assert data.shape == (*blocks.shape[:-1], 17)
        exponents, bytes_of = data[..., :1].double() - 128, data[..., 1:].int()
        values = torch.cat((table[bytes_of & 15], table[bytes_of >> 4]), -1) * 2**exponents
        exact = torch.stack([decoded(weight, expert) for expert in range(4)])
        assert torch.equal(values.flatten(2), exact.double())


@pytest.mark.parametrize("dtype", STORED)
def test_the_floor_is_a_read_of_the_stored_bytes(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = small_case(dtype, tokens=1)
    assert case.stored is not None
    read: list[Tensor] = []
    monkeypatch.setattr(_C, "read", lambda tensors, threads: read.extend(tensors))
    read_probe(case)(0)
    experts = len(case.touched[0])
    stored = [tensor.view(4, -1) for weight in case.stored for tensor in weight.tensors[:2]]
    assert sum(tensor.nbytes for tensor in read) == experts * sum(tensor.nbytes for tensor in stored) // 4
    assert {tensor.data_ptr() for tensor in read} == {
        tensor[expert].data_ptr() for tensor in stored for expert in case.touched[0]
    }


def test_published_bytes_of_a_weight() -> None:
    """GB/s counts the scales that the format fixes, once."""
    shape = Shape(256, 128, 2, 1, "of whole blocks")
    for dtype in MINIFLOATS:
        case = small_case(dtype, shape=shape)
        total = sum(tensor.nbytes for pair in quantised.published(case) for tensor in pair)
        assert total == FORMATS[dtype].weight_bytes * sum(weight.numel() for weight in case.weights)


def test_multiplied_by_the_bytes_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    case = small_case("fp8")
    got: list[Any] = []

    def moe(x: Tensor, gate_up: Weight, down: Weight, *_: Any, **__: Any) -> Tensor:
        got.extend((gate_up, down))
        return x

    monkeypatch.setattr("switchgear_bench.competitors.ours.moe", moe)
    layer = COMPETITORS["switchgear_fp8"].make(case)
    forward(layer, case.inputs[0])
    assert case.stored is not None
    assert [weight.data.data_ptr() for weight in got] == [weight.data.data_ptr() for weight in case.stored]


def test_competitors_that_are_not_installed_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SWITCHGEAR_COMPETITORS", str(tmp_path))
    missing = {"vllm": ("sglang_fp8", "sglang_mxfp4"), "llama_cpp": ("ggml_mxfp4", "ggml_mxfp4_repacked")}
    for package, names in missing.items():
        for name in () if importlib.util.find_spec(package) else names:
            case = small_case(COMPETITORS[name].dtypes[0], shape=Shape(128, 128, 2, 1, "of whole blocks"))
            with raises(Skip):
                COMPETITORS[name].make(case)


def test_sglang_leaves_out_blocks_that_are_cut_off() -> None:
    with raises(Skip):
        COMPETITORS["sglang_fp8"].make(small_case("fp8"))


# ---- tables and targets ----------------------------------------------------------------------------------------------


def row(competitor: str, ms: float, dtype: str = "fp8") -> dict[str, Any]:
    return completed({
        "shape": "olmoe", "dtype": dtype, "mode": "forward", "tokens": 1, "routing": "balanced", "pages": "huge",
        "allocator": "default", "touched_experts": 8.0, "multiply_rate": 1e12, "read_ms": 0.8, "competitor": competitor,
        "ms": ms, "relative_error": 1e-3, "quiet_turns": 3,
    })  # fmt: skip


def test_decoded_weights_are_not_what_is_judged() -> None:
    rows = [row("switchgear", 1.5), row("switchgear_fp8", 1.0), row("hf_grouped_mm", 6.0), row("sglang_fp8", 1.25)]
    assert [(verdict.target, verdict.reached, verdict.holds) for verdict in judge([rows])] == [
        ("1x sglang_fp8", "1.25x (sglang_fp8)", True)
    ]
    rows[0], rows[1] = row("switchgear", 1.0), row("switchgear_fp8", 1.5)
    assert [verdict.holds for verdict in judge([rows])] == [False]


def test_tables_have_stored_weights_beside_decoded_ones() -> None:
    rows = [row("switchgear", 1.5), row("switchgear_fp8", 1.0), row("hf_grouped_mm", 6.0), row("sglang_fp8", 1.25)]
    plain = [row("switchgear", 2.0, "bf16"), row("hf_grouped_mm", 7.0, "bf16")]
    results = {"schema": SCHEMA, "machine": {}, "ceilings": {}, "results": [*rows, *plain], "skipped": []}
    cells = "| olmoe | 1 | fp8 | forward | 1.00 | 80 % |"
    assert BLOCKS["decoded"](results).splitlines()[2:] == [f"{cells} 1.50x | 6.00x | 1.25x sglang_fp8 |"]
    assert f"{cells} 6.00x | 1.25x sglang_fp8 |" in BLOCKS["cases"](results)
    summary = BLOCKS["summary"](results)
    assert "| olmoe | fp8 | 1.00 ms, 80 %, **6.0x** |" in summary
    assert "| olmoe | bf16 | 2.00 ms, 40 %, **3.5x** |" in summary
