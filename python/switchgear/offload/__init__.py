# SPDX-License-Identifier: BSD-3-Clause
"""Experts on disk: a model bigger than memory, and what a cache of experts would do before memory is bought.

`offload` runs a model whose experts are in a store (`write_store`, `load_model`). `Accesses.of` takes what
`diagnostics.collect` or `routing.record` recorded; `simulate` and `simulate_all` count hits, misses and bytes.
Predictors (`NextGate`, `Follows`, `FromPreGate`, `FromPreRouter`) say what the next layers need; `recall` and `watch`
count how often they are right, and `timeline` what prefetch hides. docs/offload.md.

attach.py      offload; attachment.py: the modules whose experts a store has, and the change of each
cache.py       the cache of a running model; residency.py: how many experts it holds, which, and what it did;
               policies.py: which one leaves; pool.py: its memory, on a GPU with pinned buffers
device.py      streams and memory of a GPU; hot_cold.py: experts split between device and host
store.py       Store, write_store; store_sources.py: from a model or checkpoint; store_index.py: index.json;
               store_records.py: the record of an expert, StoreError
model_files.py load_model, a model without its experts, and save_pretrained of one
predictors.py  which experts the next layers need, and how often that is right
accesses.py    the experts that a run uses, and batches of requests; simulation.py: hits, misses, what prefetch hides
"""

from __future__ import annotations

from switchgear.offload.accesses import Accesses, expert_batches
from switchgear.offload.attach import Offloaded, offload
from switchgear.offload.hot_cold import HotColdSplit, SplitCost
from switchgear.offload.model_files import load_model, save_pretrained
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
from switchgear.offload.predictors import (
    Follows,
    FromPreGate,
    FromPreRouter,
    LayerRecall,
    NextGate,
    Predictor,
    Recall,
    recall,
    watch,
)
from switchgear.offload.residency import LayerStatistics, Statistics
from switchgear.offload.simulation import (
    Interval,
    LayerHits,
    Simulation,
    Timeline,
    pregated,
    simulate,
    simulate_all,
    timeline,
)
from switchgear.offload.store import Store, write_store
from switchgear.offload.store_records import Part, Records, StoreError

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
