# SPDX-License-Identifier: BSD-3-Clause
"""switchgear: Mixture-of-Experts layers for PyTorch on hand-written kernels.

Modules:    MoE (router, experts and shared experts), Router, Experts; layers composed of them in switchgear.layers
Routing:    scores, selections, capacities and losses in switchgear.routing; policies of papers in switchgear.presets
Functions:  moe (all experts of a layer), and its stages: gate, route, plan, permute, grouped_gemm, glu, combine;
            linear (a product with one matrix)
Results:    Routing, Plan
Losses:     load_balancing_loss, z_loss; balance_loss(model) and after_step(model) for routers with load balancing
Models:     accelerate(model) runs a Hugging Face model on the kernels; as_linears(model): experts as nn.Linear, for
            tools; load_gguf, save_gguf, …: GGUF files
Weights:    store(model, form) converts the experts to a faster or smaller form: "auto", "plain", "panels", "compact",
            "int8", "fp8" and others (docs/weights.md); restore(model) decodes it again. The parts are in
            switchgear.weights
Analysis:   RoutingTrace records the choices of routers; override(model, …) changes them temporarily; diagnostics reads
            traces, choices and weights; analysis has costs and scaling laws; generation.SelfContrast decodes
Adapters:   adapters.add_lora(model, rank), load_peft, save_peft, merge; mixtures of adapters in any model:
            adapters.mixture, adapters.LoRAExperts
Conversion: convert.upcycle, split_dense, from_dense_experts, merge_models, to_dense, …; convert.run for checkpoints
Compression: compress calibrates, then prunes, merges, sparsifies or quantizes experts, with bits per expert
Offload:    offload.write_store, offload.offload: experts on disk, cached and prefetched; simulate predicts the hits
Training:   finetune trains some experts alone; distill; optim.Muon; accumulate_into_grad for micro-batches
Backends:   use_backend, available_cpu_isas, cpu_isa, set_cpu_isa, cuda_kernels, set_cuda_kernels
Logging:    the logger "switchgear" says at level INFO what of a model was changed, and at ERROR which rank failed
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import TYPE_CHECKING, Any

if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] in ("switchgear", "switchgear_bench"):
    from switchgear_command import end_on_interrupt  # `python -m` imports this package before its __main__.py

    end_on_interrupt()

from switchgear import adapters, compress, convert, distill, finetune, layers, offload, optim, presets, routing, weights
from switchgear.backends import backend, use_backend
from switchgear.cuda import cuda_kernels, set_cuda_kernels
from switchgear.experts import Experts
from switchgear.functional import Plan, Routing, combine, gate, glu, grouped_gemm, linear, moe, permute, plan, route
from switchgear.functional.gradients import accumulate_into_grad
from switchgear.integrations import is_too_old
from switchgear.integrations.as_linears import as_linears
from switchgear.modules import MoE, after_step, balance_loss
from switchgear.ops import available_cpu_isas, cpu_isa, set_cpu_isa, version
from switchgear.routing import Context, Router, load_balancing_loss, z_loss
from switchgear.trace import RoutingTrace, override
from switchgear.utils.packages import failed_import, installed_version, is_installed
from switchgear.weights import Weight, restore, store

if TYPE_CHECKING:
    from switchgear.integrations.gguf import load_gguf, save_gguf
    from switchgear.integrations.gguf_adapters import save_gguf_adapter
    from switchgear.integrations.transformers import accelerate

__version__ = version
logging.getLogger(__name__).addHandler(logging.NullHandler())  # the program decides what it shows

__all__ = [
    "Context",
    "Experts",
    "MoE",
    "Plan",
    "Router",
    "Routing",
    "RoutingTrace",
    "Weight",
    "__version__",
    "accelerate",
    "accumulate_into_grad",
    "adapters",
    "after_step",
    "as_linears",
    "available_cpu_isas",
    "backend",
    "balance_loss",
    "combine",
    "compress",
    "convert",
    "cpu_isa",
    "cuda_kernels",
    "distill",
    "finetune",
    "gate",
    "glu",
    "grouped_gemm",
    "layers",
    "linear",
    "load_balancing_loss",
    "load_gguf",
    "moe",
    "offload",
    "optim",
    "override",
    "permute",
    "plan",
    "presets",
    "restore",
    "route",
    "routing",
    "save_gguf",
    "save_gguf_adapter",
    "set_cpu_isa",
    "set_cuda_kernels",
    "store",
    "use_backend",
    "weights",
    "z_loss",
]
_OF_TRANSFORMERS = {  # imported on first use
    "accelerate": "transformers",
    "load_gguf": "gguf",
    "save_gguf": "gguf",
    "save_gguf_adapter": "gguf_adapters",
}
# A star import takes every name of the list.
if not TYPE_CHECKING and (not is_installed("transformers") or is_too_old(installed_version("transformers") or "")):
    __all__ = [name for name in __all__ if name not in _OF_TRANSFORMERS]


def __getattr__(name: str) -> Any:
    if name in _OF_TRANSFORMERS:
        try:
            module = importlib.import_module(f"switchgear.integrations.{_OF_TRANSFORMERS[name]}")
        except ImportError as error:
            reason = failed_import(error, "transformers")
            raise ImportError(f"switchgear.{name}: {reason}", name=error.name) from error
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
