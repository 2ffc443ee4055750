# SPDX-License-Identifier: BSD-3-Clause
"""Wrong arguments of layers and tools are named, before anything of torch or Python fails on them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

import switchgear
from errors import raises
from switchgear import adapters, convert, distill, layers, offload, routing
from switchgear.layers.shared import SharedExperts

H, E = 16, 4
EXPERTS, MLP, LOGITS = switchgear.Experts(H, 8, E), SharedExperts(H, 32), torch.randn(3, 5)
MODEL = nn.Sequential(switchgear.MoE(H, 8, E, 2))
PRE, X = routing.PreRouter(H, [E, E]), torch.randn(5, H)
LOW_RANK = adapters.Adapter({"0": adapters.LowRank(torch.randn(2, H), torch.randn(H, 2), 4.0)})


def lora(**options: Any) -> nn.Module:
    return adapters.LoRAExperts(nn.Linear(H, 8), E, 2, **options)


def mixed(features: Any = None, **options: Any) -> nn.Module:
    pair = [LOW_RANK.layers["0"]]
    return adapters.LoRAExperts.from_adapters(nn.Linear(H, H), **{"adapters": pair, "features": features, **options})


CALLS: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "hidden_size": (lambda v: switchgear.MoE(v, 8, E, 2), [None, 1.5, True, np.array([8, 8]), np.float32(8), 0, X]),
    "widths": (lambda v: switchgear.MoE(H, 16, 2, 1, widths=v), [[1.0, 3.0], 3, [1], [], ["a", "b"], [0, 1]]),
    "initialize": (lambda v: switchgear.MoE(H, 8, E, 1, initialize=v), [3]),
    "parallel": (lambda v: switchgear.MoE(H, 8, E, 1, parallel=v), [3, True]),
    "sources": (lambda v: switchgear.MoE(H, 8, E, 1).expand(2, sources=v), [3, [1.0, 2.0], [None, 1], [1]]),
    "sources of none": (lambda v: switchgear.MoE(H, 8, E, 1).expand(2, init="random", sources=v), [3, [1, 2]]),
    "moe": (lambda v: layers.MultiHeadMoE(v, H, 4), [None, 3]),
    "heads": (lambda v: layers.MultiHeadMoE(MODEL[0], H, v), [None, 1.5, 0, 3, "a"]),
    "experts": (lambda v: (layers.VirtualExperts if v else layers.SoftMoE)(v), [None, 3]),
    "null": (lambda v: layers.VirtualExperts(EXPERTS, null=v), [None, 1.5, -1, "a"]),
    "slots": (lambda v: layers.SoftMoE(EXPERTS, slots=v), [None, 1.5, 0, True]),
    "intermediate_sizes": (lambda v: layers.HeterogeneousExperts(H, v), [None, 3, [1.5], [], [0], "ab"]),
    "strata": (lambda v: layers.StratifiedMoE(H, 8, v), [None, 3, [1.5], [], [0]]),
    "top_k": (lambda v: layers.StratifiedMoE(H, 8, [2, 2], top_k=v), [None, 1.5, 0, 3]),
    "sqrt_n": (lambda v: layers.Monet(H, v, 4, 2), [None, 1.5, 0, "a"]),
    "intermediate_size": (lambda v: layers.AutonomousMoE(H, v, E, 1, d_low=4), [None, 1.5, 0]),
    "num_experts": (lambda v: routing.PreRouter(H, v), [None, 3, [1.5], [], torch.tensor(4)]),
    "embeddings": (PRE, [None, 3, X.double(), X[:, 1:], X[0], X[None, None]]),
    "topk_ids": (lambda v: PRE.loss(X, v), [None, 3, [None, None], []]),
    "pre_router of a model": (lambda v: routing.decouple(MODEL, v, MODEL, 1).__enter__(), [None]),
    "pre_router": (lambda v: offload.FromPreRouter(v, nn.Embedding(3, H), 1), [None]),
    "embedding": (lambda v: offload.FromPreRouter(PRE, v, 1), [None]),
    "centroids": (routing.ClusterPrior, [None, torch.zeros(3)]),
    "weight": (lambda v: routing.ClusterPrior(X, weight=v), [None, torch.nan, "a"]),
    "factor": (lambda v: routing.Capacity(v), [None, 0, "a"]),
    "table": (routing.Lookup, [None, torch.tensor(1), torch.zeros(0, dtype=torch.int64), torch.zeros(1, 1, 1)]),
    "router_logits": (switchgear.z_loss, [torch.ones(3, 4, dtype=torch.int64)]),
    "tokens_per_expert": (routing.max_violation, [None, [1, 2]]),
    "features": (lambda v: lora(features=v), [(8,), 8, (8, 1.5), (H, 8, 1), "ab"]),
    "features of adapters": (mixed, [(8,), 8]),
    "adapters": (lambda v: mixed(adapters=v), [None, 3, []]),
    "gates": (lambda v: mixed(gates=v), [3, [1.0], []]),
    "weights": (lambda v: convert.partition(v, 4, "random"), [None, MLP]),
    "rows": (lambda v: convert.balanced_kmeans(v, 2), [None, X[0], X.double()]),
    "num_clusters": (lambda v: convert.balanced_kmeans(X, v), [None, 1.5, 0, 6]),
    "models": (convert.merge_models, [3, None, []]),
    "models to combine": (convert.from_dense_experts, [3, None, []]),
    "x": (lambda v: convert.use_threshold(MODEL[0], v, 1.5), [None, X.double(), X[:, 1:]]),
    "lr": (lambda v: convert.distill_layers(MLP, 4, [X], lr=v), [-1, None]),
    "batches": (lambda v: convert.distill_layers(MLP, 4, v), [None, 3]),
    "batches of a module": (lambda v: convert.neuron_importance(MLP, v, lambda y: y.sum()), [None, 3]),
    "loss": (lambda v: convert.neuron_importance(MLP, [X], v), [None, 3]),
    "student_logits": (lambda v: distill.reverse_kl(v, LOGITS), [None, [1.0]]),
    "teacher_logits": (lambda v: distill.reverse_kl(LOGITS, v), [None, LOGITS[:1]]),
    "mask": (lambda v: distill.reverse_kl(LOGITS[None], LOGITS[None], v), [True, torch.ones(3), torch.ones(1, 3, 1)]),
    "teacher": (lambda v: distill.knowledge_augment(v, X), [None, 3]),
    "p_sample": (lambda v: distill.knowledge_augment(MODEL, X, p_sample=v), [None, "a", 1.5]),
    "optimizer": (lambda v: distill.student_aware_router(MODEL, X, v, X), [None, 3]),
    "source": (offload.Accesses.of, [3, [3], [[3]], [["ab"]], None]),
    "prompt": (lambda v: offload.Accesses.of([[[1]]], prompt=v), ["a", -1]),
    "smoothing": (lambda v: offload.Follows.of([[[1]]], smoothing=v), [None, "a", -1, torch.nan]),
    "predictor": (lambda v: offload.recall(v, offload.Accesses.of([[[1]]])), [None, offload.NextGate]),
    "accesses": (lambda v: offload.recall(offload.Follows.of([[[1]]]), v), [None, [[[1]]]]),
    "model": (offload.NextGate, [None, 3]),
    "also": (lambda v: switchgear.finetune.freeze_except(MODEL, {}, also=v), [None, 3, "0"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_wrong_arguments_are_named(name: str) -> None:
    call, values = CALLS[name]
    for value in values:
        with raises((TypeError, ValueError), name.partition(" ")[0]):
            call(value)


def test_sizes_may_be_of_any_integer_type() -> None:
    moe = switchgear.MoE(H, 16, 2, 1, widths=np.array([1, 3]))
    assert moe.experts.intermediate_sizes == (8, 24)
    two, small = np.int64(2), switchgear.MoE(H // 2, 8, E, 1)
    moe = switchgear.MoE(np.int64(H), np.int32(8), np.uint8(E), two)
    owners = (moe.gate, "hidden_size num_experts top_k"), (moe.experts, "hidden_size intermediate_size num_experts")
    assert all(type(getattr(owner, name)) is int for owner, names in owners for name in names.split())
    assert torch.equal(copy.deepcopy(moe)(X), moe(X))
    assert layers.MultiHeadMoE(small, np.int64(H), two).heads == 2
    assert layers.StratifiedMoE(H, 8, np.array([2, 2]), top_k=two).strata == [2, 2]
    assert layers.MonetRouter(np.int64(H), np.int64(4), two, top_k=two).heads == 2
    assert layers.AutonomousMoE(H, two, E, 1, d_low=4).up.shape == (E, 2, 4)
    assert layers.HeterogeneousExperts(H, [8, 16], unit=two).unit == 2
    assert routing.FromEmbedding(H, two, dim=3).linear.out_features == 2
    assert PRE.choose(X, two)[0].shape == (5, 2)
    assert convert.balanced_kmeans(X[:4], two).bincount().tolist() == [2, 2]


class Set(Dataset[torch.Tensor]):
    def __getitem__(self, index: int) -> torch.Tensor:
        return [X][index]


def test_lists_may_be_iterators_and_data_sets() -> None:
    scores = [convert.neuron_importance(MLP, batches, lambda y: y.sum()) for batches in (Set(), [X], iter([X]))]
    assert all(torch.equal(score, scores[0]) for score in scores)
    assert convert.from_dense_experts(iter([MLP, MLP])).experts.num_experts == 2
    assert torch.equal(convert.merge_models(iter([MLP, MLP])).down_proj.weight, MLP.down_proj.weight)
    assert mixed(gates=iter(X[:1])).gate.num_experts == 1
    ids = torch.zeros(5, 1, dtype=torch.int64)
    assert PRE.loss(X, iter([ids, ids])) == PRE.loss(X, [ids, ids])


def test_a_pre_router_takes_rows_of_16_bits() -> None:
    rows = X.bfloat16()
    assert all(map(torch.equal, PRE(rows), PRE(rows.float())))
