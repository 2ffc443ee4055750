# SPDX-License-Identifier: BSD-3-Clause
"""Conversions between dense and Mixture-of-Experts models; docs/conversion.md explains them.

To experts:    upcycle, split_dense, distill_layers, from_dense_experts; attention_to_moe, attention_from_experts
To one model:  to_dense, merge_models
Checkpoints:   run(recipe, source, target), Recipe, Report; store_checkpoint(source, target, form), StoredCheckpoint;
               ConversionError, RecipeError, DamagedCheckpoint, DiskFull
Modules:       MixtureOfAttention, ParallelBlock; Projected, ModuleExperts; SequenceLogits; EqualTopK
Parts:         FeedForward, feed_forward; Partition, partition, balanced_kmeans, neuron_importance, layer_importance;
               add_domain_expert, sequence_perplexities, use_threshold, prior_approximate

split.py        a network into experts that compute the same, or into parts of it; partitions.py: its neurons in groups,
                and how much each matters
layers.py       experts that learn the output of a layer; experts.py: of networks that were trained apart
attention.py    attention layers as experts
dense.py        an MoE layer into a dense one; average.py: models into one
modules.py      the networks of dense modules, and where a model has them
models.py       whole models in memory; checkpoints.py: checkpoints in directories; directory.py: their files;
                stored.py: a checkpoint into a packed one
recipes.py      plans of whole models; plans.py: how each tensor is made; families.py: which MoE family takes a dense
                one; layouts.py: experts in checkpoints
"""

from switchgear.convert.attention import MixtureOfAttention, ParallelBlock, attention_from_experts, attention_to_moe
from switchgear.convert.average import merge_models
from switchgear.convert.checkpoints import Recipe, Report, run
from switchgear.convert.dense import to_dense
from switchgear.convert.directory import ConversionError, DamagedCheckpoint, DiskFull, RecipeError
from switchgear.convert.experts import (
    ModuleExperts,
    Projected,
    SequenceLogits,
    add_domain_expert,
    from_dense_experts,
    sequence_perplexities,
)
from switchgear.convert.layers import Distillation, Distilled, distill_layers, use_threshold
from switchgear.convert.modules import Conversion, Converted, feed_forward
from switchgear.convert.partitions import Partition, balanced_kmeans, layer_importance, neuron_importance, partition
from switchgear.convert.split import prior_approximate, split_dense, upcycle
from switchgear.convert.stored import StoredCheckpoint, store_checkpoint
from switchgear.integrations.blocks import FeedForward
from switchgear.papers.parts.selections import EqualTopK

__all__ = [
    "Conversion",
    "ConversionError",
    "Converted",
    "DamagedCheckpoint",
    "DiskFull",
    "Distillation",
    "Distilled",
    "EqualTopK",
    "FeedForward",
    "MixtureOfAttention",
    "ModuleExperts",
    "ParallelBlock",
    "Partition",
    "Projected",
    "Recipe",
    "RecipeError",
    "Report",
    "SequenceLogits",
    "StoredCheckpoint",
    "add_domain_expert",
    "attention_from_experts",
    "attention_to_moe",
    "balanced_kmeans",
    "distill_layers",
    "feed_forward",
    "from_dense_experts",
    "layer_importance",
    "merge_models",
    "neuron_importance",
    "partition",
    "prior_approximate",
    "run",
    "sequence_perplexities",
    "split_dense",
    "store_checkpoint",
    "to_dense",
    "upcycle",
    "use_threshold",
]
