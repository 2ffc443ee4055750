# SPDX-License-Identifier: BSD-3-Clause
"""Papers as options: each function returns a dict for MoE; most work for Router too.

    moe = switchgear.MoE(2048, 1024, 64, **switchgear.presets.expert_choice())

A preset that composes several layers names their builder under "layer"; `build` takes any of the dicts:

    layer = switchgear.presets.build(2048, 1024, 64, **switchgear.presets.multi_head())

Callers may override what a preset sets: `{**presets.switch(), "jitter": 0.0}`. Parts with parameters or state are
functools.partial objects, so one dict serves any number of layers. `python -m switchgear.presets` prints the table in
docs/presets.md. Constants that could not be confirmed in the paper are arguments and are called unverified.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from switchgear.modules import MoE
from switchgear.presets.adapters import loramoe, mor1e, octavius, phatgoose, self_moe, smola
from switchgear.presets.balance import (
    deepseek_moe,
    global_balance,
    gradient_conflict,
    loss_free,
    moec,
    openmoe,
    skywork,
)
from switchgear.presets.compositions import (
    autonomy_of_experts,
    cartesian,
    deep_mixture,
    merged,
    monet,
    multi_head,
    soft_moe,
    stratified,
)
from switchgear.presets.experts import adamoe, hmoe, moe_x, word_experts
from switchgear.presets.models import deepseek_v3, gpt_oss, mixtral, phimoe, qwen3
from switchgear.presets.newer import llama4, mixture_of_depths, moe_plus_plus, remoe
from switchgear.presets.scores import bounded_gate, locmoe, sigma_moe, task_level, xmoe
from switchgear.presets.selections import (
    base_layer,
    batch_independent,
    capacity_aware,
    cluster_task,
    dynamic_top_p,
    expert_choice,
    grin,
    gshard,
    gumbel_gate,
    gw_moe,
    isolated_expert_choice,
    maskmoe,
    pmoe,
    sam,
    switch,
    thor,
)

__all__ = [
    "adamoe",
    "autonomy_of_experts",
    "base_layer",
    "batch_independent",
    "bounded_gate",
    "build",
    "capacity_aware",
    "cartesian",
    "cluster_task",
    "deep_mixture",
    "deepseek_moe",
    "deepseek_v3",
    "dynamic_top_p",
    "expert_choice",
    "global_balance",
    "gpt_oss",
    "gradient_conflict",
    "grin",
    "gshard",
    "gumbel_gate",
    "gw_moe",
    "hmoe",
    "isolated_expert_choice",
    "llama4",
    "locmoe",
    "loramoe",
    "loss_free",
    "maskmoe",
    "merged",
    "mixtral",
    "mixture_of_depths",
    "moe_plus_plus",
    "moe_x",
    "moec",
    "monet",
    "mor1e",
    "multi_head",
    "octavius",
    "openmoe",
    "phatgoose",
    "phimoe",
    "pmoe",
    "qwen3",
    "remoe",
    "sam",
    "self_moe",
    "sigma_moe",
    "skywork",
    "smola",
    "soft_moe",
    "stratified",
    "switch",
    "task_level",
    "thor",
    "word_experts",
    "xmoe",
]


def build(
    hidden_size: int, intermediate_size: int, num_experts: int, *, layer: Callable[..., nn.Module] = MoE, **options: Any
) -> nn.Module:
    """Builds the layer of a preset: layer(hidden_size, intermediate_size, num_experts, **options)."""
    return layer(hidden_size, intermediate_size, num_experts, **options)
