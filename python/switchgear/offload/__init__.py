# SPDX-License-Identifier: BSD-3-Clause
"""Experts on disk: a model bigger than memory, and what a cache of experts would do before memory is bought.

`offload` runs a model whose experts are in a store (`write_store`, `load_model`). `Accesses.of` takes what
`diagnostics.collect` or `routing.record` recorded; `simulate` and `simulate_all` count hits, misses and bytes.
Predictors (`NextGate`, `Follows`, `FromPreGate`, `FromPreRouter`) say what the next layers need; `recall` and `watch`
count how often they are right, and `timeline` what prefetch hides. docs/offload.md."""

from __future__ import annotations

from switchgear.offload.accesses import Accesses
from switchgear.offload.attach import Offloaded, offload
from switchgear.offload.batches import expert_batches
from switchgear.offload.errors import StoreError
from switchgear.offload.follows import Follows
from switchgear.offload.from_pre_router import FromPreRouter
from switchgear.offload.hot_cold import HotColdSplit, SplitCost
from switchgear.offload.load_model import load_model
from switchgear.offload.next_gate import FromPreGate, NextGate
from switchgear.offload.policies import (
    LFRU,
    LFU,
    LIFO,
    LRU,
    POLICIES,
    Belady,
    FrequencyDistance,
    LeastStale,
    Now,
    Policy,
    StaticFrequency,
    Use,
)
from switchgear.offload.predictors import Predictor
from switchgear.offload.recall import LayerRecall, Recall, recall, watch
from switchgear.offload.saving import save_pretrained
from switchgear.offload.simulation import LayerHits, Simulation, simulate, simulate_all
from switchgear.offload.statistics import LayerStatistics, Statistics
from switchgear.offload.store import Store, write_store
from switchgear.offload.store_records import Part, Records
from switchgear.offload.timeline import Interval, Timeline, pregated, timeline

__all__ = [
    "LFRU",
    "LFU",
    "LIFO",
    "LRU",
    "POLICIES",
    "Accesses",
    "Belady",
    "Follows",
    "FrequencyDistance",
    "FromPreGate",
    "FromPreRouter",
    "HotColdSplit",
    "Interval",
    "LayerHits",
    "LayerRecall",
    "LayerStatistics",
    "LeastStale",
    "NextGate",
    "Now",
    "Offloaded",
    "Part",
    "Policy",
    "Predictor",
    "Recall",
    "Records",
    "Simulation",
    "SplitCost",
    "StaticFrequency",
    "Statistics",
    "Store",
    "StoreError",
    "Timeline",
    "Use",
    "expert_batches",
    "load_model",
    "offload",
    "pregated",
    "recall",
    "save_pretrained",
    "simulate",
    "simulate_all",
    "timeline",
    "watch",
    "write_store",
]
