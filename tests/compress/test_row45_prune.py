# SPDX-License-Identifier: BSD-3-Clause
"""prune_experts: the subset, the scores, the pruned layer against a masked one, checkpoints, what is refused."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import (
    FAMILIES,
    clone,
    expert,
    hugging_face,
    in_a_step,
    our_model,
    row_batches,
    tied_model,
    token_batches,
)
from torch import Tensor

import switchgear
from errors import raises
from switchgear import routing
from switchgear.compress import calibrate, prune_experts
from switchgear.integrations.moe_blocks import MoeBlock, moe_blocks
from switchgear.trace import Observation, observe

KEEP = [0, 2, 3, 6, 7]


def masked_choice(block: MoeBlock, x: Tensor, keep: list[int]) -> Tensor:
    """Dense weights [T,E] in float64 if the router's experts outside `keep` are masked before everything."""
    gate: Any = block.gate
    kind, out = type(gate).__name__, [e for e in range(block.num_experts) if e not in keep]
    weight = block.gate_weight()
    logits = x.double() @ weight.detach().double().mT
    if "GptOss" in kind:
        logits = logits + gate.bias.detach().double()
    logits[:, out] = -torch.inf
    if "Deepseek" in kind:
        scores = logits.sigmoid()
        choice = (scores + gate.e_score_correction_bias.double()).masked_fill(logits.isinf(), -torch.inf)
        grouped = choice.view(len(x), gate.num_group, -1)
        best = grouped.topk(2, -1).values.sum(-1).topk(gate.topk_group, -1).indices
        allowed = torch.zeros(len(x), gate.num_group, dtype=torch.bool).scatter(1, best, True)
        choice = grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(1)
        ids = choice.topk(block.top_k, -1).indices
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) * gate.routed_scaling_factor
    elif "GptOss" in kind:
        top, ids = logits.topk(block.top_k, -1)
        weights = top.softmax(-1)
    else:
        weights, ids = logits.softmax(-1).topk(block.top_k, -1)
        if "Mixtral" in kind or getattr(gate, "norm_topk_prob", getattr(gate, "normalize", False)):
            weights = weights / weights.sum(-1, keepdim=True)
    return torch.zeros_like(logits).scatter(1, ids, weights)


def output(block: MoeBlock, x: Tensor, dense: Tensor) -> Tensor:
    """Σ_e w_e · expert_e(x), token by token and expert by expert."""
    y = torch.zeros(len(x), x.shape[1], dtype=torch.float64)
    for e in range(dense.shape[1]):
        y += dense[:, e : e + 1] * expert(block, e, x)[1]
    return y


def observed(model: Any, batch: dict[str, Any]) -> dict[str, Observation]:
    found: dict[str, Observation] = {}
    with torch.no_grad(), observe(model, lambda name, seen: found.update({name: seen})):
        model(**{key: value for key, value in batch.items() if key != "domain"})
    return found


def check_against_masked(before: Any, after: Any, batch: dict[str, Any], kept: dict[str, list[int]]) -> None:
    old, new = moe_blocks(before), moe_blocks(after)
    for name, seen in observed(after, batch).items():
        want = masked_choice(old[name], seen.x, kept[name])
        got = torch.zeros_like(want)
        table = torch.tensor(kept[name])
        got.scatter_(1, table[seen.topk_ids.long()], seen.topk_weights.double())
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        y = new[name].experts(seen.x, seen.topk_ids, seen.topk_weights).double()
        reference = output(old[name], seen.x, want)
        torch.testing.assert_close(y, reference, rtol=1e-4, atol=float(reference.abs().max()) * 1e-5)


def grouped_deepseek(seed: int = 0) -> Any:
    """Two groups, of which one is chosen."""
    model = hugging_face("deepseek_v3", seed)
    for block in moe_blocks(model).values():
        block.gate.num_group, block.gate.topk_group = 2, 1
    model.config.n_group, model.config.topk_group = 2, 1
    return model


# ---- the pruned layer is the masked one ------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_row45_pruned_equals_masked(model_type: str) -> None:
    model = hugging_face(model_type)
    pruned = clone(model)
    keep = dict.fromkeys(moe_blocks(model), KEEP)
    result = prune_experts(pruned, keep)
    assert all(layer.kept == KEEP and layer.removed == [1, 4, 5] for layer in result.layers.values())
    check_against_masked(model, pruned, token_batches(1)[0], keep)


def test_row45_grouped_routers_keep_equally_many_of_each_group() -> None:
    model = grouped_deepseek()
    calibration = calibrate(model, token_batches())
    for criterion in ("reap", "frequency", "random", "reconstruction"):
        pruned = clone(model)
        result = prune_experts(pruned, 4, criterion, calibration=calibration)
        kept = {name: layer.kept for name, layer in result.layers.items()}
        assert all(sum(e < 4 for e in experts) == 2 for experts in kept.values())
        for layer in result.layers.values() if criterion != "reconstruction" else ():
            scores = layer.scores
            best = [sorted(range(g, g + 4), key=lambda e, scores=scores: (-scores[e], e))[:2] for g in (0, 4)]
            assert layer.kept == sorted(best[0] + best[1])
        check_against_masked(model, pruned, token_batches(1)[0], kept)
    for keep in (5, 2):
        with raises(ValueError, "keep"):
            prune_experts(clone(model), keep, "random")
    with raises(ValueError, "keep"):
        prune_experts(clone(model), {name: [0, 1, 2, 4] for name in moe_blocks(model)})


@pytest.mark.parametrize("options", [{}, {"normalize": True, "router_bias": True, "selection_bias": True}])
def test_row45_our_pruned_layers_equal_masked_ones(options: dict[str, Any]) -> None:
    """Renormalised weights do not know of removed experts, and experts are added in the same order."""
    model = our_model(**{"normalize": True, **options})
    pruned = clone(model)
    prune_experts(pruned, {"layers.0": KEEP, "layers.1": [1, 4]})
    assert [layer.experts.num_experts for layer in pruned.layers] == [5, 2]
    x = torch.randn(30, 16)
    removed = {"layers.0.gate": [1, 4, 5], "layers.1.gate": [0, 2, 3, 5, 6, 7]}
    for name, experts in removed.items():
        index = int(name[7])
        with switchgear.override(model, disable=experts, layers=[name]):
            want = model.layers[index](x)
        torch.testing.assert_close(pruned.layers[index](x), want, rtol=1e-6, atol=1e-7)


# ---- criteria --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_row45_reap_is_the_mean_of_weight_times_norm(model_type: str) -> None:
    """arXiv:2510.13999, eq. 9, token by token. Mixtral renormalises its weights, Qwen2 does not."""
    model, batch = hugging_face(model_type), token_batches(1)[0]
    result = prune_experts(clone(model), 3, "reap", calibration=calibrate(model, [batch]))
    for name, seen in observed(model, batch).items():
        block = moe_blocks(model)[name]
        sums, counts = torch.zeros(8, dtype=torch.float64), torch.zeros(8)
        for t in seen.token_mask.nonzero().flatten().tolist():
            for e, g in zip(seen.topk_ids[t].tolist(), seen.topk_weights[t].tolist(), strict=True):
                sums[e] += g * float(expert(block, e, seen.x[t : t + 1])[1].norm())
                counts[e] += 1
        saliency = sums / counts.clamp(min=1)
        torch.testing.assert_close(torch.tensor(result.layers[name].scores).double(), saliency, rtol=1e-5, atol=1e-9)
        assert result.layers[name].kept == sorted(saliency.argsort(descending=True)[:3].tolist())


def test_row45_reconstruction_is_the_best_of_all_subsets() -> None:
    """6 choose 4, against a loop over subsets with masked routers."""
    model = our_model(num_experts=6, normalize=True)
    batches = row_batches(2)
    calibration = calibrate(model, batches, samples=100)
    result = prune_experts(clone(model), 4, "reconstruction", calibration=calibration)
    for name, block in moe_blocks(model).items():
        x = calibration.layers[name].sample().x
        full = output(block, x, masked_choice(block, x, list(range(6))))
        errors = {
            subset: float((output(block, x, masked_choice(block, x, list(subset))) - full).norm() / full.norm())
            for subset in itertools.combinations(range(6), 4)
        }
        best = min(errors, key=errors.__getitem__)
        assert tuple(result.layers[name].kept) == best
        assert result.layers[name].search == "exact"
        assert result.layers[name].error == pytest.approx(errors[best], rel=1e-4)


def test_row45_beyond_the_limit_experts_are_removed_one_by_one() -> None:
    model = our_model(num_experts=6, normalize=True)
    calibration = calibrate(model, row_batches(2))
    exact = prune_experts(clone(model), 4, "reconstruction", calibration=calibration).layers["layers.0"]
    greedy = prune_experts(clone(model), 4, "reconstruction", calibration=calibration, exact_subsets=14)
    layer = greedy.layers["layers.0"]
    assert layer.search == "greedy"
    assert exact.error <= layer.error <= 2 * exact.error


def test_row45_all_experts_are_the_identity() -> None:
    model = hugging_face("mixtral")
    calibration = calibrate(model, token_batches())
    for criterion in ("reap", "reconstruction", "random"):
        same = clone(model)
        result = prune_experts(same, 8, criterion, calibration=calibration)
        assert result.parameters_before == result.parameters_after
        for (name, a), b in zip(model.state_dict().items(), same.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    assert {layer.error for layer in prune_experts(
        same, 8, "reconstruction", calibration=calibration).layers.values()} == {0.0}  # fmt: skip


def test_domains_choose_different_experts() -> None:
    model = our_model(num_experts=16, top_k=2)
    batches = [
        {"x": batch["x"] + (3.0 if batch["domain"] == "a" else -3.0), "domain": batch["domain"]}
        for batch in row_batches(4)
    ]
    calibration = calibrate(model, batches)
    kept = {
        domain: prune_experts(clone(model), 4, "frequency", calibration=calibration, domains=domain)
        for domain in ("a", "b")
    }
    assert kept["a"].layers["layers.0"].kept != kept["b"].layers["layers.0"].kept


def test_random_depends_on_the_seed_alone() -> None:
    model = our_model()
    one, same, other = (prune_experts(clone(model), 3, "random", seed=seed).as_dict() for seed in (0, 0, 1))
    assert one == same != other
    json.dumps(one)


# ---- scope and replacements ------------------------------------------------------------------------------------------


def test_global_scope_keeps_the_best_of_all_layers() -> None:
    model = our_model()
    calibration = calibrate(model, row_batches())
    result = prune_experts(model, 0.5, "reap", calibration=calibration, scope="global")
    kept = {name: layer.kept for name, layer in result.layers.items()}
    assert sum(map(len, kept.values())) == 8
    scores = {(n, e): s for n, layer in result.layers.items() for e, s in enumerate(layer.scores)}
    chosen = {(name, e) for name, experts in kept.items() for e in experts}
    free = [s for key, s in scores.items() if key not in chosen]
    for name, experts in kept.items():
        ranked = sorted(experts, key=lambda e: -scores[name, e])
        assert all(scores[name, e] >= max(free) for e in ranked[2:]), "beyond top_k, no better one was dropped"
    model(torch.randn(5, 16))


def test_global_scope_pads_where_the_router_has_a_bias() -> None:
    """gpt-oss: empty places have a bias that no logit outweighs; the checkpoint keeps one number of experts."""
    model = hugging_face("gpt_oss")
    calibration = calibrate(model, token_batches())
    pruned = clone(model)
    result = prune_experts(pruned, 4, "reap", calibration=calibration, scope="global")
    kept = {name: layer.kept for name, layer in result.layers.items()}
    sizes = {len(layer.kept) + layer.padding for layer in result.layers.values()}
    assert len({len(experts) for experts in kept.values()}) > 1
    assert sizes == {pruned.config.num_local_experts}
    check_against_masked(model, pruned, token_batches(1)[0], kept)


def test_global_scope_is_refused_where_the_config_cannot_say_it() -> None:
    model = hugging_face("mixtral")
    before = clone(model).state_dict()
    calibration = calibrate(model, token_batches())
    with raises(ValueError):
        prune_experts(model, 4, "reap", calibration=calibration, scope="global")
    with raises(ValueError, "keep"):
        prune_experts(model, {"model.layers.0.mlp": [0, 1]})
    with raises(ValueError, "keep"):
        prune_experts(model, {name: [0, 1, *[2] * (name[13] == "0")] for name in moe_blocks(model)})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with raises(ValueError, "model"):
        prune_experts(model.model.layers[0], 4, "random")
    assert model.config.num_local_experts == 8


def test_constants_replace_removed_experts() -> None:
    """MoNE: a removed expert returns its mean output over its tokens; routing stays as it was."""
    model, batches = our_model(), row_batches()
    pruned = clone(model)
    calibration = calibrate(model, batches)
    result = prune_experts(pruned, 4, "reap", calibration=calibration, replace="constant")
    x = batches[0]["x"]
    for name, block in moe_blocks(model).items():
        index = int(name[7])
        y = torch.zeros(len(x), 16, dtype=torch.float64)
        routing = model.layers[index].gate(x)
        sums = calibration.layers[name].sums()
        for t, e, g in zip(
            torch.arange(len(x)).repeat_interleave(2).tolist(),
            routing.topk_ids.flatten().tolist(), routing.topk_weights.flatten().double().tolist(), strict=True,
        ):  # fmt: skip
            if e in result.layers[name].kept:
                y[t] += g * expert(block, e, x[t : t + 1])[1][0]
            else:
                y[t] += g * sums.outputs[e] / sums.counts[e]
        torch.testing.assert_close(pruned.layers[index](x).double(), y, rtol=1e-4, atol=1e-5)
    assert result.parameters_after < result.parameters_before
    mixtral = hugging_face("mixtral")
    with raises(ValueError, "replace"):
        prune_experts(mixtral, 4, "random", calibration=calibrate(mixtral, token_batches()), replace="constant")


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_row45_checkpoints_load_in_transformers(model_type: str, tmp_path: Path) -> None:
    model, batch = hugging_face(model_type), token_batches(1)[0]
    inputs = {key: value for key, value in batch.items() if key != "domain"}
    prune_experts(model, 4, "reap", calibration=calibrate(model, [batch]))
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert all(block.num_experts == 4 for block in moe_blocks(loaded).values())
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**inputs).logits, model(**inputs).logits, rtol=0, atol=1e-5)
    model(**inputs, labels=inputs["input_ids"], output_router_logits=True).loss.backward()


def test_pruned_experts_still_run_on_switchgear_and_train() -> None:
    model, batch = hugging_face("mixtral"), token_batches(1)[0]
    inputs = {key: value for key, value in batch.items() if key != "domain"}
    prune_experts(model, 4, "random")
    want = model(**inputs).logits
    switchgear.accelerate(model)
    torch.testing.assert_close(model(**inputs).logits, want, rtol=1e-4, atol=1e-5)
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "experts" in name)


@pytest.mark.parametrize(("criterion", "replace"), [("reap", "none"), ("reconstruction", "none"), ("reap", "constant")])
def test_pruned_layers_train_and_count(criterion: str, replace: str) -> None:
    """The step goes on with the counts of the experts that are kept, and the bias follows them."""
    model, x = in_a_step(our_model(balance=[routing.SwitchLoss(), routing.LossFreeBias(0.5)])), torch.randn(30, 16)
    counts = model.layers[0].gate.tokens_per_expert.clone()
    calibration = calibrate(model, row_batches())
    pruned = prune_experts(model, 5, criterion, calibration=calibration, replace=replace).layers["layers.0"]
    layer = model.layers[0]
    counts = counts[[*pruned.kept, *pruned.removed] if replace == "constant" else pruned.kept]
    assert torch.equal(layer.gate.tokens_per_expert, counts)
    counts += 2 * layer.gate(x).topk_ids.flatten().bincount(minlength=len(counts))  # of layer(x), too
    (layer(x).sum() + layer.losses["switch"]).backward()
    assert torch.equal(layer.gate.tokens_per_expert, counts)
    switchgear.after_step(model)
    assert torch.equal(layer.gate.e_score_correction_bias, 0.5 * (counts.float().mean() - counts).sign())


def test_counts_of_a_loss_in_the_middle_of_a_step_are_refused() -> None:
    model = in_a_step(our_model(balance=[routing.SwitchLoss(scope="global", accumulate=True)]))
    with raises(ValueError):
        prune_experts(model, 4, "random")
    assert len(model.layers[0].gate.weight) == len(model.layers[0].gate.tokens_per_expert) == 8
    switchgear.after_step(model)
    prune_experts(model, 4, "random")
    model(torch.randn(9, 16))


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "options", "message"),
    [
        (1, {}, "keep"),
        (9, {}, "keep"),
        (0.1, {}, "keep"),
        (1.5, {}, "keep"),
        (4, {"criterion": "best"}, "criterion"),
        (4, {"scope": "model"}, "scope"),
        (4, {"replace": "zero"}, "replace"),
        (4, {"criterion": "reap"}, "calibration"),
        ({"layers.2": [0, 1]}, {}, "keep"),
        ({"layers.0": [0, 0]}, {}, "keep"),
        ({"layers.0": [0.0, 1.0]}, {}, "keep"),
        ({"layers.0": [True, False]}, {}, "keep"),
        ({"layers.0": None}, {}, "keep"),
        (4, {"seed": "x"}, "seed"),
        (4, {"seed": 2**63}, "seed"),
        (4, {"exact_subsets": -1}, "exact_subsets"),
        (4, {"criterion": "reap", "calibration": "x"}, "calibration"),
        ({"layers.0": [0, 8]}, {}, "keep"),
        ({}, {}, "keep"),
    ],
)
def test_wrong_arguments(keep: Any, options: dict[str, Any], message: str) -> None:
    model = our_model()
    before = clone(model).state_dict()
    with raises((TypeError, ValueError), message):
        prune_experts(model, keep, **{"criterion": "random", **options})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("domains", "got"), [("c", "'c'"), (["a", "c"], "'c'"), ([], r"\[\]")])
def test_unknown_domains_are_refused(domains: Any, got: str) -> None:
    """Their sums would be zero, and the first experts kept."""
    model = our_model()
    calibration = calibrate(model, row_batches())
    for criterion in ("reap", "reconstruction", "frequency"):
        with raises(ValueError, "domains"):
            prune_experts(model, 4, criterion, calibration=calibration, domains=domains)
        with raises(TypeError, "domains"):
            prune_experts(model, 4, criterion, calibration=calibration, domains=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keep", "options"), [(4, {}), (4, {"criterion": "frequency"}), ({"layers.1": [0, 1]}, {"replace": "constant"})]
)
def test_layers_without_tokens_are_refused(keep: Any, options: dict[str, Any]) -> None:
    """All scores would be zero, and the first experts kept."""
    model = our_model()
    calibration = calibrate(model, row_batches())
    del calibration.layers["layers.1"].domains["b"]  # type: ignore[attr-defined]
    with raises(ValueError, "calibration"):
        prune_experts(model, keep, calibration=calibration, domains="b", **options)
    assert all(len(layer.experts.down_proj) == 8 for layer in model.layers)
    prune_experts(model, 4, "random", calibration=calibration, domains="b")


@pytest.mark.parametrize("options", [{"criterion": "reap"}, {}, {"exact_subsets": 1}])
def test_experts_whose_outputs_are_not_finite_are_refused(options: dict[str, Any]) -> None:
    model = our_model()
    with torch.no_grad():
        model.layers[0].experts.down_proj[3] = torch.nan
    calibration = calibrate(model, row_batches())
    with raises(ValueError, "calibration"):
        prune_experts(model, 4, **{"criterion": "reconstruction", **options}, calibration=calibration)
    assert model.layers[0].experts.down_proj.shape[0] == 8


def test_constants_of_statistics_that_are_not_finite_are_refused() -> None:
    model, batches = our_model(), row_batches()
    batches[0]["x"][0, 3] = torch.nan
    calibration = calibrate(model, batches)
    finite = calibration.layers["layers.0"].sums().outputs.isfinite().all(1)
    keep = {"layers.0": finite.nonzero().flatten().tolist()}
    with raises(ValueError, "calibration"):
        prune_experts(model, keep, calibration=calibration, replace="constant")
    assert type(model.layers[0].experts) is switchgear.Experts
    assert len(model.layers[0].experts.down_proj) == 8


def test_integers_of_numpy_are_numbers_of_experts() -> None:
    assert len(prune_experts(our_model(), np.int64(4), "random").layers["layers.0"].kept) == 4


def test_refused_layers() -> None:
    with raises(ValueError):
        prune_experts(tied_model(), 4, "random")
    with raises(ValueError):
        prune_experts(our_model(score=routing.Cosine(16, 8)), 4, "random")
    with raises(TypeError, "keep"):
        prune_experts(our_model(), {"layers.0": 3}, "random")  # type: ignore[dict-item]
    with raises(ValueError, "calibration"):
        prune_experts(our_model(), 4, "reap", calibration=calibrate(our_model(seed=1), row_batches()))
    with raises(ValueError):
        prune_experts(our_model(null_experts=2), 4, "random")
    with raises(ValueError, "model"):
        prune_experts(torch.nn.Linear(2, 2), 4, "random")
    with raises(TypeError, "model"):
        prune_experts("model", 4, "random")  # type: ignore[arg-type]
