# SPDX-License-Identifier: BSD-3-Clause
"""Diagnostics of routing and experts: pure functions of a trace, of choices, of outputs or of weights.

docs/diagnostics.md lists them by question. `collect` keeps the choices that those per token need."""

from __future__ import annotations

from switchgear.diagnostics.choices import Choices, LayerChoices, collect
from switchgear.diagnostics.embedding import RoutingEmbedding, prompt_eol, routing_embedding
from switchgear.diagnostics.routers import (
    Cacheability,
    TokensById,
    cacheability,
    coactivation,
    dispatch_entropy,
    drop_by_position,
    router_margin,
    router_saturation,
    routing_change,
    routing_stability,
    token_id_specialization,
)
from switchgear.diagnostics.similarity import (
    expert_similarity,
    gate_embedding_correlation,
    neuron_order,
    neurons,
    norm_vs_score_rank,
    output_similarity,
    principal_components,
)
from switchgear.diagnostics.usage import (
    ExpertScores,
    Outcome,
    Usage,
    activation_by_example,
    affinity,
    auc,
    contrastive_activation,
    core_activation,
    ftri,
    gate_entropy,
    outcome_by_expert,
    steered,
    usage,
)
from switchgear.trace.routing_trace import expert_outputs

__all__ = [
    "Cacheability",
    "Choices",
    "ExpertScores",
    "LayerChoices",
    "Outcome",
    "RoutingEmbedding",
    "TokensById",
    "Usage",
    "activation_by_example",
    "affinity",
    "auc",
    "cacheability",
    "coactivation",
    "collect",
    "contrastive_activation",
    "core_activation",
    "dispatch_entropy",
    "drop_by_position",
    "expert_outputs",
    "expert_similarity",
    "ftri",
    "gate_embedding_correlation",
    "gate_entropy",
    "neuron_order",
    "neurons",
    "norm_vs_score_rank",
    "outcome_by_expert",
    "output_similarity",
    "principal_components",
    "prompt_eol",
    "router_margin",
    "router_saturation",
    "routing_change",
    "routing_embedding",
    "routing_stability",
    "steered",
    "token_id_specialization",
    "usage",
]
