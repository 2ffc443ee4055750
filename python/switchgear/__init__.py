# SPDX-License-Identifier: BSD-3-Clause
"""switchgear: Mixture-of-Experts layers for PyTorch on hand-written kernels.

Modules:    MoE (router, experts and shared experts), Router, Experts; layers composed of them in switchgear.layers
Routing:    scores, selections, capacities and losses in switchgear.routing; policies of papers in switchgear.presets
Functions:  moe (a whole layer of experts), and its stages: route, plan, permute, grouped_gemm, glu, combine
Results:    Routing, Plan
Losses:     load_balancing_loss, z_loss; balance_loss(model) and after_step(model) of routers with a balance
Models:     accelerate(model) puts the kernels under a Hugging Face model; use_huge_pages(model), pack_weights(model)
            (of weights that are stored transposed) and pack_panels(model) (for inference) make it faster on CPUs
Looking:    RoutingTrace records what routers do, override(model, …) changes what they choose for a while
Compression: compress.compact(model), weights in 4 bits fewer each, without loss; compress.quantize(model, "int8" or
            "int4"); compress.expand and compress.dequantize, their inverses; compress.add_lora
Backends:   use_backend, available_cpu_isas, cpu_isa, set_cpu_isa
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from switchgear import compress, layers, presets, routing
from switchgear.backends import backend, use_backend
from switchgear.experts import Experts
from switchgear.functional import Plan, Routing, combine, glu, grouped_gemm, moe, permute, plan, route
from switchgear.modules import MoE, after_step, balance_loss
from switchgear.ops import available_cpu_isas, cpu_isa, set_cpu_isa, version
from switchgear.packing import pack_weights, unpack_weights
from switchgear.pages import use_huge_pages
from switchgear.panels import pack_panels, unpack_panels
from switchgear.routing import Context, Router, load_balancing_loss, override, z_loss
from switchgear.trace import RoutingTrace

if TYPE_CHECKING:
    from switchgear.integrations.transformers import accelerate

__version__ = version

__all__ = [
    "Context",
    "Experts",
    "MoE",
    "Plan",
    "Router",
    "Routing",
    "RoutingTrace",
    "__version__",
    "accelerate",
    "after_step",
    "available_cpu_isas",
    "backend",
    "balance_loss",
    "combine",
    "compress",
    "cpu_isa",
    "glu",
    "grouped_gemm",
    "layers",
    "load_balancing_loss",
    "moe",
    "override",
    "pack_panels",
    "pack_weights",
    "permute",
    "plan",
    "presets",
    "route",
    "routing",
    "set_cpu_isa",
    "unpack_panels",
    "unpack_weights",
    "use_backend",
    "use_huge_pages",
    "z_loss",
]


def __getattr__(name: str) -> Any:
    if name == "accelerate":  # imports transformers, so only for those who ask
        from switchgear.integrations.transformers import accelerate

        return accelerate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
