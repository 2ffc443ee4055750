# SPDX-License-Identifier: BSD-3-Clause
"""Performance targets of switchgear's CPU kernels, and whether a run met them.

Ratios are a competitor's time over ours in one run: 2 means that switchgear is 2× faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

OURS = (
    "switchgear", "switchgear_panels", "switchgear_compact", "switchgear_int8", "switchgear_int4", "switchgear_fp8",
    "switchgear_mxfp4", "switchgear_groups4", "switchgear_groups3", "switchgear_groups2", "switchgear_groups1",
)  # fmt: skip


def is_ours(competitor: str) -> bool:
    return competitor in OURS


def ours_in(dtype: str) -> tuple[str, ...]:
    """Our competitors that multiply weights of this dtype directly. For fp8 and mxfp4, plain `switchgear` multiplies
    decoded weights, like libraries without kernels for the format."""
    own = f"switchgear_{dtype}"
    return (own,) if own in OURS else OURS


HF_DEFAULT = ("hf_grouped_mm",)
TORCH = ("hf_grouped_mm", "torch_grouped_mm", "torch_loop")
FASTEST_FP32 = ("vllm", "zentorch")
OTHER_MXFP4 = ("sglang_mxfp4", "ggml_mxfp4", "ggml_mxfp4_repacked")
GGML_Q4 = ("ggml_q4_0", "ggml_q4_K", "ggml_q4_0_repacked", "ggml_q4_K_repacked")
ANY_SHAPE: tuple[str, ...] = ()


class Target(NamedTuple):
    dtype: str
    mode: str
    tokens: tuple[int, int]  # from, to
    at_least: float
    than: tuple[str, ...] | str  # a ratio to the best of these competitors, or a share of the "floor" or of the "read"
    shapes: tuple[str, ...] = ANY_SHAPE
    allocator: str = "default"

    def covers(self, row: dict[str, Any]) -> bool:
        return (
            (row["dtype"], row["mode"], row["allocator"], row["routing"])
            == (self.dtype, self.mode, self.allocator, "balanced")
            and self.tokens[0] <= row["tokens"] <= self.tokens[1]
            and (not self.shapes or row["shape"] in self.shapes)
        )


MODELS = ("olmoe", "qwen3-30b-a3b", "mixtral-half", "deepseek-v2-lite", "gpt-oss-20b")  # tiny fits in the cache
FEW_TOKENS = ("olmoe", "qwen3-30b-a3b")  # per expert
DECODE, PREFILL, LONG = (1, 16), (256, 512), (2048, 2048)
TARGETS = (
    Target("bf16", "forward", DECODE, 1.0, ("sglang",)),
    Target("bf16", "forward", DECODE, 1.0, ("zentorch",)),
    Target("bf16", "forward", DECODE, 0.95, "read", MODELS),
    Target("bf16", "forward", DECODE, 3.0, HF_DEFAULT, MODELS),
    Target("bf16", "forward", PREFILL, 1.05, ("zentorch",)),
    Target("bf16", "forward", (512, 512), 1.25, ("zentorch",), ("qwen3-30b-a3b",)),
    Target("bf16", "forward", LONG, 1.0, ("zentorch",)),
    Target("bf16", "forward", LONG, 0.95, "floor"),
    Target("fp32", "forward", DECODE, 1.0, FASTEST_FP32),
    Target("fp32", "forward", DECODE, 0.95, "read", MODELS),
    Target("fp32", "forward", (256, 2048), 1.1, FASTEST_FP32),
    Target("fp32", "forward", (256, 2048), 2.5, TORCH),
    Target("fp32", "forward", LONG, 0.92, "floor"),
    Target("bf16", "train", (512, 512), 2.2, HF_DEFAULT, FEW_TOKENS),
    Target("bf16", "train", (512, 512), 1.5, HF_DEFAULT, FEW_TOKENS, "tuned"),
    Target("bf16", "train", (256, 256), 1.7, HF_DEFAULT, ("mixtral-half",)),
    Target("bf16", "train", (256, 256), 1.2, HF_DEFAULT, ("mixtral-half",), "tuned"),
    Target("bf16", "train", (256, 512), 0.75, "floor", MODELS),
    Target("fp32", "train", (256, 512), 2.5, TORCH, MODELS),
    Target("fp32", "train", (256, 512), 2.2, TORCH, MODELS, "tuned"),
    Target("fp32", "train", (256, 512), 0.75, "floor", MODELS),
    Target("int8", "forward", (1, 1), 1.0, ("sglang_int8", "zentorch_int8")),
    Target("int8", "forward", (512, 512), 1.1, ("zentorch_int8",)),
    Target("int4", "forward", (1, 1), 1.0, ("ggml_q4_0_repacked", "ggml_q4_K_repacked")),
    Target("int4", "forward", (512, 512), 2.0, GGML_Q4),
    Target("fp8", "forward", DECODE, 1.0, ("sglang_fp8",), MODELS),
    Target("fp8", "forward", PREFILL, 1.0, ("sglang_fp8",), MODELS),
    Target("mxfp4", "forward", DECODE, 1.0, OTHER_MXFP4, MODELS),
    Target("mxfp4", "forward", PREFILL, 1.0, OTHER_MXFP4, MODELS),
)


class Verdict(NamedTuple):
    case: str
    target: str
    reached: str
    holds: bool


def judge(cases: Sequence[Sequence[dict[str, Any]]]) -> list[Verdict]:
    """A line for each target and each case that it covers, if the compared competitors were measured."""
    return [
        verdict
        for target in TARGETS
        for rows in cases
        if rows and target.covers(rows[0])
        if (verdict := _verdict(target, {row["competitor"]: row for row in rows if row["ms"]})) is not None
    ]


def _fastest(timed: dict[str, dict[str, Any]], names: Sequence[str]) -> dict[str, Any] | None:
    return min((timed[name] for name in names if name in timed), key=lambda row: row["ms"], default=None)


def _verdict(target: Target, timed: dict[str, dict[str, Any]]) -> Verdict | None:
    ours = _fastest(timed, ours_in(target.dtype))
    if ours is None:
        return None
    case = f"{ours['shape']}, T={ours['tokens']}, {ours['dtype']}, {ours['mode']}"
    case += ", tuned allocator" if target.allocator == "tuned" else ""
    form = ours["competitor"].removeprefix("switchgear")
    case += f", {form[1:]}" if form in ("_panels", "_compact") else ""
    if isinstance(target.than, str):
        reached = (ours["floor_ms"] if target.than == "floor" else ours["read_ms"]) / ours["ms"]
        of = "the floor" if target.than == "floor" else "the read of the touched weights"
        return Verdict(case, f"{target.at_least:.0%} of {of}", f"{reached:.0%}", reached >= target.at_least)
    theirs = _fastest(timed, target.than)
    if theirs is None:
        return None
    ratio = theirs["ms"] / ours["ms"]
    precise = target.dtype not in ("int8", "int4") or ours["relative_error"] <= theirs["relative_error"]
    reached = f"{ratio:.2f}x ({theirs['competitor']})"
    if not precise:
        reached += f", but an error of {ours['relative_error']:.1e} against {theirs['relative_error']:.1e}"
    return Verdict(
        case, f"{target.at_least:g}x {' and '.join(target.than)}", reached, ratio >= target.at_least and precise
    )
