# SPDX-License-Identifier: BSD-3-Clause
"""skip_experts: the second expert is skipped below the median ratio, but not by protected tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import clone, hugging_face, our_model, row_batches, token_batches

from errors import raises
from switchgear.compress import calibrate, skip_experts
from switchgear.integrations.moe_blocks import moe_blocks
from switchgear.trace import Observation, observe


def observed(model: Any, inputs: dict[str, Any]) -> dict[str, Observation]:
    found: dict[str, Observation] = {}
    with torch.no_grad(), observe(model, lambda name, seen: found.update({name: seen})):
        model(**inputs)
    return found


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe", "deepseek_v3"])
def test_row45_beta_is_the_median_and_skips_half(model_type: str) -> None:
    """In the first layer, whose input does not change: w2 < beta · w1 loses the second expert, and the sum stays."""
    model = hugging_face(model_type)
    batches = token_batches()
    inputs = {key: value for key, value in batches[0].items() if key != "domain"}
    calibration = calibrate(model, batches)
    name = next(iter(moe_blocks(model)))
    plain = observed(model, inputs)[name]
    with skip_experts(model, calibration) as skipped:
        less = observed(model, inputs)[name]
    assert skipped.ratios[name] == calibration.layers[name].ratio_median()
    order = plain.topk_weights.argsort(-1, descending=True)
    weights = plain.topk_weights.gather(1, order)
    alone = weights[:, 1] < skipped.ratios[name] * weights[:, 0]
    assert 0 < alone.sum() < len(alone)
    assert torch.equal((less.topk_ids < 0).any(1), alone)
    torch.testing.assert_close(less.topk_weights.sum(-1), plain.topk_weights.sum(-1))
    assert 0.1 < skipped.share < 0.4
    assert torch.equal(observed(model, inputs)[name].topk_ids, plain.topk_ids)


def test_row48_protected_tokens_skip_nothing() -> None:
    model = hugging_face("mixtral")
    batches = token_batches()
    inputs = {key: value for key, value in batches[0].items() if key != "domain"}
    calibration = calibrate(model, batches)
    name = next(iter(moe_blocks(model)))
    with skip_experts(model, calibration):
        alone = (observed(model, inputs)[name].topk_ids < 0).any(1)
    with skip_experts(model, calibration, protect=0.25):
        seen = observed(model, inputs)[name]
    best = seen.x.abs().sum(-1).topk(6).indices
    assert not (seen.topk_ids[best] < 0).any()
    rest = torch.ones(24, dtype=torch.bool)
    rest[best] = False
    assert torch.equal((seen.topk_ids < 0).any(1)[rest], alone[rest])
    with skip_experts(model, calibration, protect=1.0) as skipped:
        observed(model, inputs)
    assert skipped.skipped == 0


def test_row45_our_layers_select_by_skip_below() -> None:
    model, batches = our_model(), row_batches()
    calibration = calibrate(model, batches)
    x = batches[0]["x"]
    plain, before = model.layers[0].gate(x), clone(model)(x)
    with skip_experts(model, calibration) as skipped:
        routing = model.layers[0].gate(x)
    weights = plain.topk_weights.sort(-1, descending=True).values
    alone = weights[:, 1] < skipped.ratios["layers.0"] * weights[:, 0]
    assert torch.equal((routing.topk_ids < 0).any(1), alone)
    assert (skipped.choices, skipped.skipped) == (2 * len(x), int(alone.sum()))
    assert torch.equal(model(x), before)
    with skip_experts(model, calibration, protect=0.5), raises(ValueError, "importance"):
        model(x)


def test_the_score_function_of_the_wrapped_selection_is_found() -> None:
    """Routers look for the score function of the selection that is wrapped."""
    model = our_model(score_function="sigmoid", normalize=True)
    calibration = calibrate(model, row_batches())
    with skip_experts(model, calibration):
        select: Any = model.layers[0].gate.selection()
        while not hasattr(select, "score_function"):
            select = select.select
        assert select.score_function == "sigmoid"


def test_wrong_arguments() -> None:
    model = our_model(top_k=1)
    calibration = calibrate(model, row_batches())
    with (
        raises(ValueError, "calibration"),
        skip_experts(model, calibration),
    ):
        pass
    with (
        raises(ValueError, "model"),
        skip_experts(torch.nn.Linear(2, 2), calibration),
    ):
        pass
    with (
        raises(TypeError, "calibration"),
        skip_experts(model, "x"),  # type: ignore[arg-type]
    ):
        pass
    with raises(ValueError, "protect"), skip_experts(model, calibration, protect=2.0):
        pass
    with (
        raises(ValueError, "calibration"),
        skip_experts(our_model(), calibration),
    ):
        pass


def test_an_importance_that_is_no_function() -> None:
    model, batches = our_model(), row_batches()
    with (
        raises(TypeError, "importance"),
        skip_experts(model, calibrate(model, batches), importance=3),  # type: ignore[arg-type]
    ):
        pass
