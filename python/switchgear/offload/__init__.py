# SPDX-License-Identifier: BSD-3-Clause
"""Which experts a cache would hold: a recorded run replayed through every cache policy, before memory is bought.

`Accesses.of` takes what `diagnostics.collect` or `routing.record` recorded; `simulate` and `simulate_all` count hits,
misses and bytes. docs/offload.md."""

from __future__ import annotations

from switchgear.offload.accesses import Accesses
from switchgear.offload.attach import Offloaded, offload
from switchgear.offload.errors import StoreError
from switchgear.offload.load_model import load_model
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
from switchgear.offload.simulation import LayerHits, Simulation, simulate, simulate_all
from switchgear.offload.statistics import LayerStatistics, Statistics
from switchgear.offload.store import Store, write_store
from switchgear.offload.store_records import Part, Records

__all__ = [
    "LFRU",
    "LFU",
    "LIFO",
    "LRU",
    "POLICIES",
    "Accesses",
    "Belady",
    "FrequencyDistance",
    "LayerHits",
    "LayerStatistics",
    "LeastStale",
    "Now",
    "Offloaded",
    "Part",
    "Policy",
    "Records",
    "Simulation",
    "StaticFrequency",
    "Statistics",
    "Store",
    "StoreError",
    "Use",
    "load_model",
    "offload",
    "simulate",
    "simulate_all",
    "write_store",
]
