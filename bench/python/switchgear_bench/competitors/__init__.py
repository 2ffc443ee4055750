# SPDX-License-Identifier: BSD-3-Clause
"""The implementations that `switchgear bench layers` compares: one small function each.

A competitor is a function of a case. It does all preparation (modules, packed weights) and returns the layer:
Inputs -> y [T,H], differentiable for training. It raises Skip if it cannot run. To add one:

    @competitor("mine", modes=("forward",))
    def mine(case: Case) -> Layer:
        return lambda inputs: my_moe(inputs.x, case.gate_up_proj, case.down_proj, inputs.topk_ids, inputs.topk_weights)

Libraries, and packages that need another torch than this one, are loaded from the folder named by the environment
variable SWITCHGEAR_COMPETITORS; docs/benchmarks.md says how to fill it.
"""

from __future__ import annotations

from . import ggml, hugging_face, ours, plain_torch, vllm, zentorch  # noqa: F401  in the order of --list
from .registry import COMPETITORS, Competitor, Skip, competitor, look_in_folder

__all__ = ["COMPETITORS", "Competitor", "Skip", "competitor", "look_in_folder"]
