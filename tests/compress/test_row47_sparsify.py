# SPDX-License-Identifier: BSD-3-Clause
"""prune_weights: MoE-Pruner's metric against loops, exact numbers of zeros, and the layer that remains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import clone, expert, hugging_face, our_model, row_batches, tied_model, token_batches
from torch import Tensor

from errors import raises
from switchgear.compress import calibrate, prune_weights
from switchgear.compress.prune import choose_zeros
from switchgear.integrations.blocks import expert_layers
from switchgear.integrations.moe_blocks import moe_blocks


def zeros_by_the_paper(weight: Tensor, x: Tensor, count: int) -> Tensor:
    """S_ij = |W_ij| · ‖X_j‖₂ compared within each row (arXiv:2410.12013, eq. 7); X [n,C] has the gates inside."""
    mask = torch.zeros_like(weight, dtype=torch.bool)
    for i in range(weight.shape[0]):
        scores = [float(weight[i, j].abs() * x[:, j].norm()) for j in range(weight.shape[1])]
        for j in sorted(range(weight.shape[1]), key=scores.__getitem__)[:count]:
            mask[i, j] = True
    return mask


@pytest.mark.parametrize("metric", ["router_wanda", "wanda"])
def test_row47_zeros_are_those_of_the_paper(metric: str) -> None:
    model, batches = our_model(dtype=torch.float64), row_batches(2, dtype=torch.float64)
    sparse = clone(model)
    prune_weights(sparse, 0.5, metric, calibration=calibrate(model, batches))
    x0 = torch.cat([batch["x"] for batch in batches])
    block, routing = moe_blocks(model)["layers.0"], model.layers[0].gate(x0)
    for e in range(8):
        rows, gates = [], []
        for t in range(len(x0)):
            for chosen, g in zip(routing.topk_ids[t].tolist(), routing.topk_weights[t].tolist(), strict=True):
                if chosen == e:
                    rows.append(t)
                    gates.append(g if metric == "router_wanda" else 1.0)
        x = x0[rows]
        gate = torch.tensor(gates, dtype=torch.float64)[:, None]
        inputs = (x, expert(block, e, x)[0])
        for name, values in zip(("gate_up_proj", "down_proj"), inputs, strict=True):
            weight = getattr(block.experts, name)[e].detach()
            want = zeros_by_the_paper(weight, values * gate, weight.shape[1] // 2)
            got = getattr(sparse.layers[0].experts, name)[e] == 0
            assert torch.equal(got, want), (e, name)


def test_row47_gates_of_one_equal_wanda() -> None:
    """top_k = 1 with normalised weights: g = 1."""
    model = our_model(top_k=1, normalize=True)
    calibration = calibrate(model, row_batches())
    one, other = clone(model), clone(model)
    prune_weights(one, 0.5, "router_wanda", calibration=calibration)
    prune_weights(other, 0.5, "wanda", calibration=calibration)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("sparsity", [0.5, 0.25, "2:4"])
def test_row47_exact_numbers_of_zeros(model_type: str, sparsity: Any) -> None:
    """Per row of the product, whatever the layout of the parameter; gpt-oss stores it transposed."""
    model = hugging_face(model_type)
    result = prune_weights(model, sparsity, calibration=calibrate(model, token_batches()))
    for layer in expert_layers(model).values():
        for rows in (layer.projection(index) for index in range(2)):
            if sparsity == "2:4":
                assert bool(((rows.unflatten(-1, (-1, 4)) == 0).sum(-1) == 2).all())
            else:
                assert bool(((rows == 0).sum(-1) == round(sparsity * rows.shape[-1])).all())
    share = 0.5 if sparsity == "2:4" else sparsity
    assert all(layer.zeros == pytest.approx(share, abs=0.02) for layer in result.layers.values())
    assert "of the experts' weights are zero" in str(result)


def test_row47_the_sparse_layer_is_the_dense_one_with_masked_weights() -> None:
    model = our_model()
    sparse, masked = clone(model), clone(model)
    prune_weights(sparse, 0.5, "magnitude")
    with torch.no_grad():
        for layer in masked.layers:
            for weight in (layer.experts.gate_up_proj, layer.experts.down_proj):
                limit = weight.abs().sort(-1).values[..., weight.shape[-1] // 2 - 1, None]
                weight.mul_(weight.abs() > limit)
    x = torch.randn(20, 16)
    assert torch.equal(sparse(x), masked(x))


def test_row47_streamed_statistics_give_the_same_zeros() -> None:
    model, batches = our_model(), row_batches(4)
    whole = {"x": torch.cat([batch["x"] for batch in batches]), "domain": "a"}
    results = []
    for data in (batches, [whole]):
        results.append(clone(model))
        prune_weights(results[-1], 0.5, calibration=calibrate(model, data))
    assert all(torch.equal(a, b) for a, b in zip(results[0].parameters(), results[1].parameters(), strict=True))


def test_starved_experts_are_pruned_by_magnitude_and_named() -> None:
    model = our_model()
    batch = {"x": torch.randn(1, 16), "domain": "a"}
    calibration = calibrate(model, [batch])
    counts = calibration.layers["layers.0"].sums().counts
    plain = clone(model)
    result = prune_weights(model, 0.5, calibration=calibration)
    prune_weights(plain, 0.5, "magnitude")
    starved = (counts == 0).nonzero().flatten().tolist()
    assert result.layers["layers.0"].starved == starved
    for e in starved:
        assert torch.equal(model.layers[0].experts.down_proj[e], plain.layers[0].experts.down_proj[e])


def test_ties_go_to_the_first_columns() -> None:
    assert choose_zeros(torch.ones(2, 8), None, 0.5).tolist() == [[True] * 4 + [False] * 4] * 2
    assert choose_zeros(torch.ones(1, 8), None, "2:4").tolist() == [[True, True, False, False] * 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.0,), "sparsity"),
        ((1.0,), "sparsity"),
        (("4:8",), "sparsity"),
        ((None,), "sparsity"),
        ((0.5, "obd"), "metric"),
        ((0.5, "wanda"), "calibration"),
    ],
)
def test_wrong_arguments(arguments: tuple[Any, ...], message: str) -> None:
    model = our_model()
    with raises(ValueError, message):
        prune_weights(model, *arguments)
    with raises(TypeError, "calibration"):
        prune_weights(model, 0.5, calibration="x")  # type: ignore[arg-type]
    with raises(ValueError, "calibration"):
        prune_weights(model, 0.5, calibration=calibrate(our_model(seed=1), row_batches()))
    assert all(int((p == 0).sum()) == 0 for p in model.parameters() if p.dim() == 3)


@pytest.mark.parametrize("metric", ["wanda", "magnitude"])
def test_shared_experts_are_refused(metric: str) -> None:
    """Each layer would add its zeros to those of the other."""
    model = tied_model()
    with raises(ValueError):
        prune_weights(model, 0.5, metric, calibration=calibrate(model, row_batches()))
    assert all(int((p == 0).sum()) == 0 for p in model.parameters() if p.dim() == 3)


@pytest.mark.parametrize("metric", ["wanda", "router_wanda"])
def test_statistics_that_are_not_finite_are_refused(metric: str) -> None:
    model, batches = our_model(), row_batches()
    calibration = calibrate(model, batches)
    calibration.layers["layers.1"].domains["a"].hidden[2, 0] = torch.inf
    calibration.layers["layers.1"].domains["a"].gated_hidden[2, 0] = torch.inf
    with raises(ValueError, "calibration"):
        prune_weights(model, 0.5, metric, calibration=calibration)
    assert bool(model.layers[0].experts.down_proj.all())  # the layer before it
    prune_weights(model, 0.5, metric, calibration=calibration, domains="b")
