# SPDX-License-Identifier: BSD-3-Clause
"""MoE layer performance on GPUs as published by other projects.

Nothing was measured here. Clocks, software and what was timed differ, so the figures give a scale for predictions, not
a comparison.
"""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    shape: str  # of GPU_SHAPES, with the tokens of GPU_TOKENS
    mode: str  # "forward", "backward" or "train"
    who: str
    tflops: float  # 6·T·K·H·I forward, 12·T·K·H·I backward, over the published time
    gpu: str
    source: str


# Read off bars of a chart, ±2 TFLOP/s. It shows whole layers with the router, but counts only the experts' flop.
_SONIC = "SonicMoE paper, figure 14 (read off the chart)"
_LIGER = "Liger-Kernel, benchmark/data/all_benchmark_data.csv, 2026-04"
_LIGER_NEXT = "Liger-Kernel pull request 1294"
_VEOMNI = "VeOmni pull request 460"
_LIGER_CUTE = "LigerCute README"

FIGURES = (
    Figure("sonic-7b-n256", "forward", "SonicMoE", 366, "H100", _SONIC),
    Figure("sonic-7b-n256", "forward", "DeepGEMM++", 259, "H100", _SONIC),
    Figure("sonic-7b-n256", "forward", "ScatterMoE", 207, "H100", _SONIC),
    Figure("sonic-7b-n256", "backward", "SonicMoE", 406, "H100", _SONIC),
    Figure("sonic-7b-n256", "backward", "DeepGEMM++", 276, "H100", _SONIC),
    Figure("sonic-7b-n256", "backward", "ScatterMoE", 213, "H100", _SONIC),
    Figure("sonic-30b-n256", "forward", "SonicMoE", 430, "H100", _SONIC),
    Figure("sonic-30b-n256", "forward", "DeepGEMM++", 280, "H100", _SONIC),
    Figure("sonic-30b-n256", "backward", "SonicMoE", 461, "H100", _SONIC),
    Figure("sonic-30b-n256", "backward", "DeepGEMM++", 329, "H100", _SONIC),
    Figure("sonic-120b-n1024", "forward", "SonicMoE", 560, "H100", _SONIC),
    Figure("sonic-120b-n1024", "forward", "DeepGEMM++", 519, "H100", _SONIC),
    Figure("sonic-120b-n1024", "backward", "SonicMoE", 569, "H100", _SONIC),
    Figure("sonic-120b-n1024", "backward", "DeepGEMM++", 423, "H100", _SONIC),
    Figure("sonic-120b-n2048", "forward", "SonicMoE", 597, "H100", _SONIC),
    Figure("sonic-120b-n2048", "forward", "DeepGEMM++", 575, "H100", _SONIC),
    Figure("sonic-120b-n2048", "backward", "SonicMoE", 587, "H100", _SONIC),
    Figure("sonic-120b-n2048", "backward", "DeepGEMM++", 446, "H100", _SONIC),
    Figure("qwen3-30b-a3b", "forward", "Liger Triton", 337, "H100", _LIGER),
    Figure("qwen3-30b-a3b", "forward", "Liger Triton, proposed", 501, "H100", _LIGER_NEXT),
    Figure("qwen3-30b-a3b", "forward", "torch grouped_mm", 242, "H100", _VEOMNI),
    Figure("qwen3-30b-a3b", "train", "Liger Triton", 263, "H100", _LIGER),
    Figure("qwen3-30b-a3b", "train", "Liger Triton, proposed", 413, "H100", _LIGER_NEXT),
    Figure("e512-k10", "forward", "torch grouped_mm", 180.7, "H100", _VEOMNI),
    Figure("mixtral-8x7b", "forward", "LigerCute", 613, "H200", _LIGER_CUTE),
    Figure("mixtral-8x7b", "forward", "TransformerEngine", 553, "H200", _LIGER_CUTE),
    Figure("mixtral-8x7b", "backward", "TransformerEngine", 452, "H200", _LIGER_CUTE),
    Figure("mixtral-8x7b", "backward", "LigerCute", 406, "H200", _LIGER_CUTE),
)


class OpFigure(NamedTuple):
    op: str
    case: str  # the name in cuda_ops.py
    who: str
    text: str
    gpu: str
    source: str


OP_FIGURES = (
    OpFigure("route", "softmax T=16384 E=128 K=8", "FreeToken", "12.4 us", "H100", "FreeToken pull request 319"),
    OpFigure("route", "softmax T=1 E=128 K=8", "FreeToken", "2.2 us", "H100", "FreeToken pull request 319"),
    OpFigure("route", "softmax T=8192 E=256 K=8", "SGLang", "13.9 us", "H100", "SGLang pull request 29771"),
    OpFigure("route", "sigmoid T=8192 E=512 K=8", "SGLang", "21.2 us", "H100", "SGLang pull request 29771"),
    OpFigure("grouped_gemm", "M=8192 K=5120 N=8192 E=16", "torch._grouped_mm", "1.31 ms, 525 TFLOP/s", "H100",
             "torchao pull request 2490"),
    OpFigure("grouped_gemm", "M=65536 K=2048 N=1536 E=128", "CUTLASS, SM90 cooperative", "160 TFLOP/s", "H100",
             "grouped_gemm pull request 37"),
    OpFigure("permute", "T=4096 K=8 E=128 H=7168", "TileOPs", "0.220 ms, 2.40 TB/s", "H200",
             "TileOPs pull request 2125"),
)  # fmt: skip
