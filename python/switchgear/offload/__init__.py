# SPDX-License-Identifier: BSD-3-Clause
"""Experts on disk: a model bigger than memory, and what a cache of experts would do before memory is bought.

`offload` runs a model whose experts are in a store (`write_store`, `load_model`). `Accesses.of` takes what
`diagnostics.collect` or `routing.record` recorded; `simulate` and `simulate_all` count hits, misses and bytes.
Predictors (`NextGate`, `Follows`, `FromPreGate`, `FromPreRouter`) say what the next layers need; `recall` and `watch`
count how often they are right, and `timeline` what prefetch hides. docs/offload.md.

attach.py      offload; attachment.py: the change of one module; targets.py: the modules whose experts a store has;
               sizes.py: how many rows of memory
cache.py       the cache of a running model; residency.py: which experts it holds; policies.py: which one leaves;
               pool.py: its memory; statistics.py: what it did
device.py      streams and memory of a GPU; staging.py: reads through pinned memory; moving.py: experts of host
               memory on a GPU; hot_cold.py: experts split between device and host
store.py       Store, write_store; store_writer.py: layer by layer; store_sources.py: from a model or checkpoint;
               store_index.py: index.json; store_records.py: the record of an expert; errors.py: StoreError
load_model.py  a model without its experts; saving.py: save_pretrained of one
predictors.py  what predictors share; next_gate.py, follows.py, from_pre_router.py: the predictors; recall.py: how
               often they are right
accesses.py    the experts that a run uses; simulation.py: hits and misses; timeline.py: what prefetch hides;
               batches.py: requests that share experts
"""

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
