# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear plan MODEL --memory 12G --disk-rate 2G`: what a model with its experts on disk needs, before it is there.

PREDICTIONS from a config and rates. `switchgear offload-plan` replays the choices of a model that is there.
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

from .. import _C, analysis
from ..analysis.models import MODELS
from . import offload_plan
from .common import above_zero, console, positive, require, size, table

NOTICE = "PREDICTIONS from sizes and rates, not measurements."
# Published for LRU on a model with 512 experts (github.com/kekzl/imp, pull request 2061): 43.5, 62.0, 72.0 and 78.9 %
# hits in 300 tokens of text with 93, 186, 279 and 372 slots. Draws with this skew hit 43.1, 61.2, 72.6 and 80.3 %, if
# a token chooses 10 experts, which is our assumption.
ZIPF = 0.8
ROUTINGS = {"uniform": 0.0, "Zipf": ZIPF}
# Shares of a plain read that decoding of one short text reaches, measured on two cores of Zen 4 that read 35 GB/s.
WHOLE_LAYERS = 0.56  # of Qwen3-30B-A3B in Q4_0; OLMoE in bfloat16: 0.60
OWN_LAYERS = 0.31  # of OLMoE in bfloat16, with nothing but the experts replaced
FROM_DISK = 0.2  # of Qwen3-30B-A3B and gpt-oss-120b with experts on disk, without the waits for it
STEPS, WARM = 1500, 500  # tokens that are drawn, and those of them that only fill the cache


# fmt: off
def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help=f"{', '.join(MODELS)}, or a folder with a config.json")
    add("--memory", type=size, required=True, metavar="SIZE", help="for weights, keys and values: 12G")
    add("--disk-rate", type=size, required=True, metavar="SIZE", help="bytes per second that the disk reads: 2.5G")
    add("--memory-rate", type=size, metavar="SIZE",
        help="bytes per second of a plain read of memory (default: measured here, with all cores)")
    add("--own-layers", action="store_true", help="a model whose layers do not run as a whole, only its experts")
    add("--bits", type=above_zero, default=4.5, metavar="N", help="per weight of linear layers: int4")
    add("--expert-bits", type=above_zero, default=4.25, metavar="N", help="per weight of experts: mxfp4")
    add("--context", type=positive, default=4096, metavar="N", help="tokens whose keys and values are kept")
# fmt: on


class Prediction(NamedTuple):
    """Of a token, once the cache is full. hits: share of its experts. read_bytes: from the disk. reading, computing:
    seconds."""

    routing: str
    hits: float
    read_bytes: float
    reading: float
    computing: float


def run(args: argparse.Namespace) -> int:
    require("rich")
    found, budget, memory, predictions = predict(config_of(args.model), args)
    made = table("routing", "hits", "MB read per token", "tokens/s at most", "tokens/s, nothing overlaps")
    for name, hits, missed, reading, computing in predictions:
        made.add_row(
            name, f"{hits:.0%}", f"{missed / 1e6:.0f}", f"{1 / max(reading, computing):.2f}",
            f"{1 / (reading + computing):.2f}",
        )  # fmt: skip
    made.caption = f"LRU; Zipf: the n-th expert is n^-{ZIPF} times as likely as the first"
    print(NOTICE)
    print(f"{args.model}: {found}")
    print(budget)
    print(memory)
    console().print(made)
    return 0


class MemoryRate(NamedTuple):
    """At which a model reads its weights in memory. plain: bytes per second of a plain read. share: of that."""

    plain: float
    share: float

    def __str__(self) -> str:
        return (
            f"weights in memory: {self.plain * self.share / 1e9:.1f} GB/s, {self.share:.0%} of a plain read of "
            f"{self.plain / 1e9:.1f} GB/s, a share measured with one short text on two cores of Zen 4"
        )


def predict(
    config: Any, args: argparse.Namespace
) -> tuple[analysis.Cost, offload_plan.Budget, MemoryRate, list[Prediction]]:
    """What it costs and what fits, how fast weights in memory are read, and a prediction for each of ROUTINGS."""
    budget, found = offload_plan.budget_of(config, args, is_stored=True)
    fits = budget.slots == budget.num_experts
    share = FROM_DISK if not fits else OWN_LAYERS if args.own_layers else WHOLE_LAYERS
    memory = MemoryRate(args.memory_rate or _C.read_bandwidth(), share)
    head = offload_plan.count_head(config) * (offload_plan.dtype_bits(config) - args.bits) / 8  # store leaves it plain
    read = found.decode_bytes(0, 1, args.bits, args.expert_bits) + head
    top_k = max(k for _, k, _ in found.moe_layers)
    predictions = []
    for name, skew in ROUTINGS.items():
        hits = 1.0 if fits else hit_rate(budget, top_k, skew)
        missed = (1 - hits) * sum(k for _, k, _ in found.moe_layers) * budget.record
        computing = read / (memory.plain * memory.share)
        predictions.append(Prediction(name, hits, missed, missed / args.disk_rate, computing))
    return found, budget, memory, predictions


def hit_rate(budget: offload_plan.Budget, top_k: int, skew: float) -> float:
    """The share of the experts of a token that an LRU of a layer has, once it is full."""
    from ..offload import LRU, Accesses, simulate
    from ..parallel.cost import draw_routing

    ids = draw_routing(STEPS, budget.num_experts, top_k, skew)
    drawn = Accesses.of([[row] for row in ids.tolist()], num_experts=budget.num_experts)
    warm, whole = (simulate(run, LRU(), slots=budget.slots) for run in (drawn.split(WARM)[0], drawn))
    return (whole.hits - warm.hits) / ((STEPS - WARM) * top_k)


def config_of(model: str) -> Any:
    """Of a model in MODELS, or of the folder of a checkpoint."""
    auto = require("transformers").AutoConfig
    if model in MODELS:
        return auto.for_model(**MODELS[model])
    return offload_plan.read_config(model)
