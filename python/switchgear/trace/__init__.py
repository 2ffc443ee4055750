# SPDX-License-Identifier: BSD-3-Clause
"""What sees and steers the routers of a model while it runs.

observe.py        a function at each layer; routing_trace.py: RoutingTrace, the sums of a run; layer.py: those of a
                  layer
record.py         record: the choices by sequence and position; routing_record.py: RoutingRecord; replay.py: replay;
                  routed_layers.py: the layers of both; batches.py: sequence and position of each token of a call
override.py       override: choices that change for a while
pre_router.py     PreRouter, a router outside the model, and decouple: its choices in the model; pregate: routers that
                  choose by the block before
load.py           LoadMeter: the load of experts in few numbers, and where they are written; callback.py: in
                  transformers' Trainer
"""

from switchgear.trace.layer import LayerSummary, LayerTrace
from switchgear.trace.load import LoadMeter, Log, log_to
from switchgear.trace.observe import Observation, observe
from switchgear.trace.override import override
from switchgear.trace.pre_router import PreRouter, decouple, pregate
from switchgear.trace.record import record
from switchgear.trace.replay import replay
from switchgear.trace.routing_record import RoutingRecord
from switchgear.trace.routing_trace import RoutingTrace

__all__ = [
    "LayerSummary",
    "LayerTrace",
    "LoadMeter",
    "Log",
    "Observation",
    "PreRouter",
    "RoutingRecord",
    "RoutingTrace",
    "decouple",
    "log_to",
    "observe",
    "override",
    "pregate",
    "record",
    "replay",
]
