# SPDX-License-Identifier: BSD-3-Clause
"""merge_experts: groups, weighted averages, alignment of neurons, routers, checkpoints."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import FAMILIES, clone, expert, hugging_face, in_a_step, our_model, row_batches, token_batches

import switchgear
from errors import raises
from switchgear.compress import calibrate, merge_experts
from switchgear.compress.merge import cluster_around_dominant, cluster_hierarchically
from switchgear.diagnostics.similarity import match_rows
from switchgear.integrations.moe_blocks import moe_blocks
from switchgear.routing import LossFreeBias, SwitchLoss


def with_twins(model: Any, noise: float = 0.0) -> Any:
    """Experts e and e + 4 are equal, up to noise."""
    with torch.no_grad():
        for block in moe_blocks(model).values():
            for parameter in block.experts.parameters():
                parameter[4:] = parameter[:4] + noise * torch.randn_like(parameter[:4])
    return model


TWINS = [[0, 4], [1, 5], [2, 6], [3, 7]]


# ---- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 3, 4, 6, 9])
def test_hierarchical_equals_a_loop(count: int) -> None:
    """Average linkage: the mean of all distances between the members of two clusters."""
    points = torch.randn(20, 2, dtype=torch.float64)
    distances = torch.cdist(points, points)
    clusters = [[index] for index in range(20)]
    while len(clusters) > count:
        a, b = min(
            itertools.combinations(range(len(clusters)), 2),
            key=lambda pair: float(distances[clusters[pair[0]]][:, clusters[pair[1]]].mean()),
        )
        joined = sorted(clusters[a] + clusters[b])
        clusters = [c for index, c in enumerate(clusters) if index not in (a, b)] + [joined]
    assert cluster_hierarchically(distances, count) == sorted(clusters)


def test_around_dominant() -> None:
    similarity = torch.tensor([[1.0, 0.2, 0.9, 0.1], [0.2, 1, 0.3, 0.8], [0.9, 0.3, 1, 0.2], [0.1, 0.8, 0.2, 1]])
    assert cluster_around_dominant(similarity, torch.tensor([5.0, 1, 2, 9]), 2) == [[0, 2], [1, 3]]


def test_matching_with_and_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    similarity = torch.randn(7, 7)
    best = max(itertools.permutations(range(7)), key=lambda p: float(similarity[range(7), list(p)].sum()))
    assert match_rows(similarity) == list(best)
    monkeypatch.setitem(__import__("sys").modules, "scipy.optimize", None)
    assert match_rows(similarity) == list(best)


@pytest.mark.parametrize("similarity", ["outputs", "weights"])
@pytest.mark.parametrize("cluster", ["hierarchical", "dominant"])
def test_twins_are_merged(similarity: str, cluster: str) -> None:
    model = with_twins(our_model(), 1e-3)
    with torch.no_grad():
        for layer in model.layers:
            layer.gate.weight[4:] *= 0.1  # the twins of the first four are rarely chosen
    calibration = calibrate(model, row_batches())
    result = merge_experts(model, 4, calibration=calibration, similarity=similarity, cluster=cluster)
    if cluster == "hierarchical":
        assert all(layer.groups == TWINS for layer in result.layers.values())
    else:
        counts = {name: calibration.layers[name].sums().counts for name in result.layers}
        for name, layer in result.layers.items():
            dominant = set(counts[name].argsort(descending=True, stable=True)[:4].tolist())
            assert all(len(dominant & set(group)) == 1 for group in layer.groups)
            assert all(pair in layer.groups for pair in TWINS if len(dominant & set(pair)) == 1)


def test_twins_of_the_router_are_found_by_logits() -> None:
    model = our_model()
    with torch.no_grad():
        for layer in model.layers:
            layer.gate.weight[4:] = layer.gate.weight[:4] * 1.5 + 1e-3 * torch.randn(4, 16)
    result = merge_experts(model, 4, calibration=calibrate(model, row_batches()), similarity="logits")
    assert all(layer.groups == TWINS for layer in result.layers.values())


# ---- what the merged layer computes ----------------------------------------------------------------------------------


def test_weights_are_averages_by_frequency() -> None:
    model = our_model(bias=True, router_bias=True)
    calibration = calibrate(model, row_batches())
    merged = clone(model)
    result = merge_experts(merged, 3, calibration=calibration)
    for name, layer in result.layers.items():
        old, new = moe_blocks(model)[name], moe_blocks(merged)[name]
        counts = calibration.layers[name].sums().counts.double()
        assert sorted(itertools.chain(*layer.groups)) == list(range(8))
        for index, group in enumerate(layer.groups):
            for module, other in ((old.experts, new.experts), (old.gate, new.gate)):
                for key, parameter in module.named_parameters(recurse=False):
                    want = sum(counts[e] * parameter[e].double() for e in group) / counts[group].sum()
                    got = getattr(other, key)[index].double()
                    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_equal_experts_with_the_old_router_change_nothing() -> None:
    """router="keep" copies the merged expert to all of its group."""
    model = with_twins(our_model())
    merged = clone(model)
    result = merge_experts(merged, 4, calibration=calibrate(model, row_batches()), router="keep")
    assert result.parameters_before == result.parameters_after
    x = torch.randn(30, 16)
    torch.testing.assert_close(merged(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["ours", "ours interleaved", "mixtral", "gpt_oss"])
def test_aligned_copies_merge_into_the_same_function(kind: str) -> None:
    """Expert e + 4 is e with its neurons in another order; without alignment the average computes something else."""
    if kind.startswith("ours"):
        options = {"interleaved": True, "transposed": True} if "inter" in kind else {}
        model, batches = our_model(**options), row_batches()
        interleaved, transposed = bool(options), bool(options)
    else:
        model, batches = hugging_face(kind), token_batches()
        interleaved = transposed = kind == "gpt_oss"
    model = with_twins(model)
    with torch.no_grad():
        for block in moe_blocks(model).values():
            experts: Any = block.experts
            inner = experts.down_proj.shape[1 if transposed else 2]
            order = torch.randperm(inner)
            rows = torch.stack([2 * order, 2 * order + 1], 1).flatten() if interleaved else torch.cat(
                [order, order + inner]
            )  # fmt: skip
            dim = -1 if transposed else -2
            experts.gate_up_proj[4:] = experts.gate_up_proj[4:].index_select(dim, rows)
            experts.down_proj[4:] = experts.down_proj[4:].index_select(-2 if transposed else -1, order)
            if hasattr(experts, "gate_up_proj_bias") and experts.gate_up_proj_bias is not None:
                experts.gate_up_proj_bias[4:] = experts.gate_up_proj_bias[4:][:, rows]
    calibration = calibrate(model, batches)
    for align in (True, False):
        merged = clone(model)
        result = merge_experts(merged, 4, calibration=calibration, align=align, router="keep")
        assert all(layer.groups == TWINS for layer in result.layers.values())
        inputs = {key: value for key, value in batches[0].items() if key != "domain"}
        with torch.no_grad():
            outputs = [m(**inputs) for m in (merged, model)]
        got, want = [getattr(output, "logits", output) for output in outputs]
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-5) == align


def test_dominant_rows() -> None:
    model = our_model()
    calibration = calibrate(model, row_batches())
    merged = clone(model)
    result = merge_experts(merged, 3, calibration=calibration, router="dominant", similarity="weights")
    for name, layer in result.layers.items():
        counts = calibration.layers[name].sums().counts
        best = [max(group, key=lambda e: (int(counts[e]), -e)) for group in layer.groups]
        assert torch.equal(moe_blocks(merged)[name].gate.weight, moe_blocks(model)[name].gate.weight[best])


def test_all_experts_are_the_identity() -> None:
    model = our_model()
    merged = clone(model)
    merge_experts(merged, 8, calibration=calibrate(model, row_batches()), align=True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), merged.parameters(), strict=True))


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_checkpoints_load_in_transformers(model_type: str, tmp_path: Path) -> None:
    model, batch = hugging_face(model_type), token_batches(1)[0]
    inputs = {key: value for key, value in batch.items() if key != "domain"}
    result = merge_experts(
        model, 0.5, calibration=calibrate(model, [batch]), similarity="logits", cluster="dominant", align=True
    )
    assert result.parameters_after < result.parameters_before
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)


def test_grouped_routers_merge_within_groups() -> None:
    model = hugging_face("deepseek_v3")
    for block in moe_blocks(model).values():
        block.gate.num_group, block.gate.topk_group = 2, 1
    result = merge_experts(model, 4, calibration=calibrate(model, token_batches()))
    for layer in result.layers.values():
        assert [{e // 4 for e in group} for group in layer.groups] == [{0}, {0}, {1}, {1}]
    model(**{key: value for key, value in token_batches(1)[0].items() if key != "domain"})


@pytest.mark.parametrize("router", ["average", "dominant"])
def test_merged_layers_train_and_count(router: str) -> None:
    """A merged expert goes on with the counts of its group, and the bias follows them."""
    model, x = in_a_step(our_model(balance=[SwitchLoss(), LossFreeBias(0.5)])), torch.randn(30, 16)
    old = model.layers[0].gate.tokens_per_expert.tolist()
    groups = (
        merge_experts(model, 3, calibration=calibrate(model, row_batches()), router=router).layers["layers.0"].groups
    )
    layer, counts = model.layers[0], torch.tensor([sum(old[expert] for expert in group) for group in groups])
    assert torch.equal(layer.gate.tokens_per_expert, counts)
    counts += 2 * layer.gate(x).topk_ids.flatten().bincount(minlength=3)  # of layer(x), too
    (layer(x).sum() + layer.losses["switch"]).backward()
    bias = layer.gate.e_score_correction_bias.clone()
    switchgear.after_step(model)
    assert torch.equal(layer.gate.e_score_correction_bias, bias + 0.5 * (counts.float().mean() - counts).sign())


def test_mean_outputs_are_over_all_tokens() -> None:
    """HC-SMoE compares what experts return for every token, whoever was routed to them."""
    model = our_model()
    calibration = calibrate(model, row_batches(1), samples=100)
    name = "layers.0"
    x, block = calibration.layers[name].sample().x, moe_blocks(model)[name]
    mean = torch.stack([expert(block, e, x)[1].mean(0) for e in range(8)])
    want = cluster_hierarchically(torch.cdist(mean, mean), 3)
    assert merge_experts(model, 3, calibration=calibration).layers[name].groups == want


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 1}, "keep"),
        ({"similarity": "names"}, "similarity"),
        ({"cluster": "kmeans"}, "cluster"),
        ({"router": "sum"}, "router"),
        ({"align": "no"}, "align"),
        ({"calibration": None}, "calibration"),
        ({"domains": "other"}, "domains"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str) -> None:
    model = our_model()
    calibration = calibrate(model, row_batches(), samples=0)
    with raises((TypeError, ValueError), message):
        merge_experts(model, **{"keep": 4, "calibration": calibration, **options})
    with raises(ValueError, "calibration"):
        merge_experts(model, 4, calibration=calibration)
    assert model.layers[0].experts.num_experts == 8
    switchgear.store(model, "int8")
    with raises(ValueError):
        merge_experts(model, 4, calibration=calibration)
