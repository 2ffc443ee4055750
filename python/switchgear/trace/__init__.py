# SPDX-License-Identifier: BSD-3-Clause
"""What the routers of a model do while it runs: `observe` calls a function at each layer, `RoutingTrace` keeps sums."""

from switchgear.trace.layer import LayerTrace
from switchgear.trace.observe import Observation, observe
from switchgear.trace.record import RoutingTrace
from switchgear.trace.summary import LayerSummary

__all__ = ["LayerSummary", "LayerTrace", "Observation", "RoutingTrace", "observe"]
