# SPDX-License-Identifier: BSD-3-Clause
"""override on the routers of every Hugging Face model type: chosen anew from logits, weighted as the model does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import switchgear
from errors import raises
from model_types import sampled
from switchgear.integrations.moe_blocks import moe_blocks
from switchgear.routing import RankK
from switchgear.trace import Observation, observe

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_configs import MODEL_TYPES  # noqa: E402
from tiny_models import BARE, build, example_inputs  # noqa: E402

NOT_OVERRIDDEN = {
    "inkling_text": "InklingTopkRouter",  # the choice also weighs the shared experts, whose logits are not returned
    "nllb-moe": "NllbMoeTop2Router",  # its choice is not what runs
}
TYPES = [t for t in MODEL_TYPES if t not in (*NOT_OVERRIDDEN, *BARE, "vitpose_backbone")]
UNLIKE_RANKS = ("phimoe", "switch_transformers", "deepseek_v4")  # their weights or choices are no ranks
# Their tiny models amplify one ulp in the embeddings to this much in the output.
AMPLIFYING = ("diffusion_gemma", "gemma4_text", "muse_spark")


def prepared(model_type: str) -> nn.Module:
    """A tiny model whose routers have logits that differ, and no zeros where a trained model has none."""
    model = build(model_type)
    generator = torch.Generator().manual_seed(3)
    for block in moe_blocks(model).values():
        gate: Any = block.gate
        with torch.no_grad():
            for parameter in gate.parameters():
                if parameter.dim() == 2:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 2 * parameter.shape[1] ** -0.5)
            if (bias := block.selection_bias(flat=False)) is not None:
                bias.copy_(torch.randn(bias.shape, generator=generator) * 0.05)
            if hasattr(gate, "tid2eid"):
                keys = torch.rand(len(gate.tid2eid), block.num_experts, generator=generator)
                gate.tid2eid.copy_(keys.topk(gate.top_k).indices)
    return model


def run(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, list[Observation]]]:
    seen: dict[str, list[Observation]] = {}
    torch.manual_seed(0)
    with torch.no_grad(), observe(model, lambda name, one: seen.setdefault(name, []).append(one)):
        output = model(**inputs)
    values = output.values() if hasattr(output, "values") else output
    return next(v for v in values if isinstance(v, Tensor)), seen


def dense(one: Observation) -> Tensor:
    """[T,E]: the weight of each expert."""
    kept = torch.where(one.topk_ids < 0, 0, one.topk_weights.double())
    return torch.zeros(len(kept), one.num_experts, dtype=torch.float64).scatter_add(1, one.topk_ids.clamp(min=0), kept)


def first(seen: dict[str, list[Observation]]) -> Observation:
    return next(iter(seen.values()))[0]


@pytest.mark.parametrize("model_type", sampled(TYPES))
@pytest.mark.some(6)
def test_no_change_is_the_model_itself(model_type: str) -> None:
    model = prepared(model_type)
    inputs = example_inputs(model)
    plain, before = run(model, inputs)
    looked_up = any(hasattr(block.gate, "tid2eid") for block in moe_blocks(model).values())
    with switchgear.override(model, gain={0: 1.0}, **({} if looked_up else {"bias": [0.0] * 8})) as names:
        anew, after = run(model, inputs)
    assert names == [block.layer for block in moe_blocks(model).values()]
    scale = plain.abs().max()
    assert (anew - plain).abs().max() <= (1e-3 if model_type in AMPLIFYING else 1e-5) * scale
    torch.testing.assert_close(dense(first(after)), dense(first(before)), rtol=1e-5, atol=1e-7)
    again, _ = run(model, inputs)
    assert torch.equal(again, plain)


@pytest.mark.parametrize("model_type", sampled(TYPES))
def test_disabled_and_forced_experts(model_type: str) -> None:
    model = prepared(model_type)
    inputs = example_inputs(model)
    plain, seen = run(model, inputs)
    before = first(seen)
    busiest = int(torch.bincount(before.topk_ids[before.topk_ids >= 0], minlength=8).argmax())
    other = (busiest + 1) % 8
    with switchgear.override(model, disable=[busiest], force=[other]):
        changed, seen = run(model, inputs)
    for calls in seen.values():
        for one in calls:
            assert not (one.topk_ids == busiest).any()
            assert (one.topk_ids == other).any(1).all() or model_type == "switch_transformers"
    after = first(seen)
    assert (after.topk_ids >= 0).sum() >= (before.topk_ids >= 0).sum()  # a disabled expert is replaced
    assert not torch.equal(changed, plain)


@pytest.mark.parametrize("topk_groups", [1, 2])
def test_a_group_stays_open_without_one_of_its_two_experts(topk_groups: int) -> None:
    """Against a loop over tokens; with too few experts left, choices stay empty and do not go to other groups."""
    model = prepared("deepseek_v3")
    for block in moe_blocks(model).values():
        gate: Any = block.gate
        gate.num_group, gate.topk_group = 4, topk_groups
    with switchgear.override(model, disable=[5]):
        _, seen = run(model, example_inputs(model))
    one, bias = first(seen), moe_blocks(model)[next(iter(seen))].selection_bias()
    assert one.router_logits is not None
    for ids, scores in zip(one.topk_ids.tolist(), (one.router_logits.sigmoid() + bias).tolist(), strict=True):
        groups = sorted(([0, 1], [2, 3], [4], [6, 7]), key=lambda group: -sum(scores[e] for e in group))
        rest = sorted((e for group in groups[:topk_groups] for e in group), key=lambda e: -scores[e])
        assert {e for e in ids if e >= 0} == set(rest[: len(ids)])
    assert (one.topk_ids == 4).any()


@pytest.mark.parametrize("model_type", sampled(t for t in TYPES if t not in UNLIKE_RANKS))
def test_another_selection(model_type: str) -> None:
    """The ranks that the model itself takes give its own output; in routers without groups."""
    model = prepared(model_type)
    inputs = example_inputs(model)
    blocks = moe_blocks(model)
    top_k = next(iter(blocks.values())).top_k
    plain, _ = run(model, inputs)
    with switchgear.override(model, select=RankK(range(int(top_k or 1)))):
        same, _ = run(model, inputs)
    assert (same - plain).abs().max() <= (1e-3 if model_type in AMPLIFYING else 1e-5) * plain.abs().max()
    if model_type == "longcat_flash":
        return  # its loop needs two choices
    with switchgear.override(model, select=RankK((7,))):
        _, seen = run(model, inputs)
    one = first(seen)
    assert one.topk_ids.shape[1] == 1
    assert one.router_logits is not None
    block = blocks[next(iter(seen))]
    if block.selection_bias() is None and one.router_logits.shape[1] == 8:
        assert torch.equal(one.topk_ids[:, 0], one.router_logits.argmin(1))


@pytest.mark.parametrize("model_type", NOT_OVERRIDDEN)
def test_routers_that_are_not_known_are_named(model_type: str) -> None:
    model = build(model_type)
    inputs = example_inputs(model)
    plain, _ = run(model, inputs)
    name = NOT_OVERRIDDEN[model_type]
    attributes = [dict(vars(block.gate)) for block in moe_blocks(model).values()]  # NLLB-MoE's: a capacity
    with raises(ValueError, name), switchgear.override(model, disable=[0]):
        pass
    assert [vars(block.gate) for block in moe_blocks(model).values()] == attributes
    assert torch.equal(run(model, inputs)[0], plain)


def test_a_probe_leaves_weights_and_graphs_alone() -> None:
    model = prepared("deepseek_v3").train()
    inputs = example_inputs(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = model(**inputs).logits.square().mean()
    torch.manual_seed(5)
    with switchgear.override(model, disable=[0]):
        first = torch.rand(1)
        loss = loss + model(**inputs).logits.square().mean()
    loss.backward()  # the first forward's graph has the gate's weights
    torch.manual_seed(5)
    assert torch.equal(first, torch.rand(1))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    gate: Any = next(iter(moe_blocks(model).values())).gate
    assert gate.weight.grad.abs().max() > 0


def test_a_router_that_differs_is_found_out() -> None:
    """A subclass of a known router with another normalisation is no longer reproduced."""
    model = prepared("mixtral")
    gate: Any = model.model.layers[2].mlp.gate
    forward = gate.forward

    def squared(x: Tensor) -> Any:
        logits, weights, ids = forward(x)
        return logits, weights.square(), ids

    gate.forward = squared
    with (
        raises(ValueError),
        switchgear.override(model, disable=[0]),
    ):
        pass


def test_overrides_nest() -> None:
    model = prepared("glm4_moe")
    inputs = example_inputs(model)
    with switchgear.override(model, disable=[0]):
        with switchgear.override(model, disable=[1]):
            _, seen = run(model, inputs)
            assert not ({0, 1} & set(first(seen).topk_ids.flatten().tolist()))
        _, seen = run(model, inputs)
        assert 0 not in first(seen).topk_ids
        assert 1 in first(seen).topk_ids


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_on_switchgear_too(model_type: str) -> None:
    model = prepared(model_type)
    inputs = example_inputs(model)
    with switchgear.override(model, disable=[0], force=[3], gain={3: 2.0}):
        want, _ = run(model, inputs)
        switchgear.accelerate(model)
        got, _ = run(model, inputs)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "granitemoe"])
def test_gradients_reach_the_router(model_type: str) -> None:
    """Weights anew have the model's own gradient."""
    model = prepared(model_type)
    inputs = example_inputs(model)
    gradients = []
    for options in ({}, {"bias": [0.0] * 8}):
        model.zero_grad()
        with switchgear.override(model, **options) if options else torch.enable_grad():
            output = model(**inputs).logits
        (output * torch.linspace(-1, 1, output.shape[-1])).sum().backward()
        gradients.append([b.gate_weight().grad.clone() for b in moe_blocks(model).values()])  # type: ignore[union-attr]
    for want, got in zip(*gradients, strict=True):
        assert want.abs().max() > 0
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6 * float(want.abs().max()))


@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "qwen3_moe"])
def test_in_bfloat16(model_type: str) -> None:
    """Scores may be equal there, and then either expert is right: the weights are those of the model."""
    model = prepared(model_type).bfloat16()
    inputs = example_inputs(model)
    _, before = run(model, inputs)
    with switchgear.override(model, bias=[0.0] * 8):
        _, after = run(model, inputs)
    one, two = first(before), first(after)
    assert two.topk_weights.dtype is one.topk_weights.dtype
    same = (dense(one) - dense(two)).abs().amax(1) <= 2 * torch.finfo(torch.bfloat16).eps
    assert same.float().mean() >= 0.9
    with switchgear.override(model, disable=[0]):
        _, seen = run(model, inputs)
    assert not any((o.topk_ids == 0).any() for calls in seen.values() for o in calls)


@pytest.mark.parametrize("model_type", ["inkling2_text"])
def test_a_router_that_cannot_run_is_named(model_type: str) -> None:
    """Its own code multiplies float32 by bfloat16, if all weights are cast."""
    model = build(model_type).bfloat16()
    with (
        raises(ValueError),
        switchgear.override(model, disable=[0]),
    ):
        pass


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_empty_slots_on_other_implementations(implementation: str) -> None:
    """Not an id that transformers' grouped_mm leaves undefined: the second choice of half of the tokens is empty."""

    def select(router_logits: Tensor, context: Any = None, bias: Any = None) -> switchgear.Routing:
        routing = switchgear.route(router_logits.float(), 2)
        ids = routing.topk_ids.clone()
        ids[::2, 1] = -1
        return routing._replace(topk_ids=ids, topk_weights=routing.topk_weights.masked_fill(ids < 0, 0))

    outputs = []
    for name in ("eager", implementation):
        model = prepared("mixtral")
        model.set_experts_implementation(name)  # type: ignore[operator]
        with switchgear.override(model, select=select):
            outputs.append(run(model, example_inputs(model))[0])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["gpt_oss", "nemotron_h", "openai_privacy_filter"])
@pytest.mark.filterwarnings("ignore:.*keeps its own implementation")
def test_empty_slots_where_the_class_takes_no_id_e(model_type: str) -> None:
    """In eager, and where switchgear lets the class's own code run. A parametrization gives the class another name."""
    outputs = []
    for implementation, change in (("switchgear", None), ("eager", None), ("switchgear", "odd"), ("eager", "class")):
        model = prepared(model_type)
        model.set_experts_implementation(implementation)  # type: ignore[operator]
        for block in moe_blocks(model).values():
            if change == "odd":
                block.experts.down_proj = torch.nn.Parameter(block.experts.down_proj.detach().as_subclass(Odd))
            elif change == "class":
                register_parametrization(block.experts, "down_proj", torch.nn.Identity())
        with switchgear.override(model, disable=range(1, 8)):
            outputs.append(run(model, example_inputs(model))[0])
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-4)


class Odd(torch.Tensor):
    """A weight that the kernels do not read."""


def test_no_tokens() -> None:
    """Routers that choose groups first, and choices that are looked up, take an empty batch."""
    from switchgear.integrations.routers import LookupMethod, SelectByMethod, TopKMethod

    block = next(iter(moe_blocks(build("deepseek_v3")).values()))
    block.gate.num_group, block.gate.topk_group = 2, 1  # type: ignore[union-attr, assignment]
    top = TopKMethod(block, "sigmoid", "sigmoid", normalize=True, scaled=False, group_score="top2")
    logits = torch.zeros(0, block.num_experts)
    for method in (top, LookupMethod(top, torch.zeros(0, 2, dtype=torch.int64))):
        routing = SelectByMethod(method, 2)(logits)
        assert routing.topk_ids.shape == routing.topk_weights.shape == (0, 2)
