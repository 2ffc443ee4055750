# SPDX-License-Identifier: BSD-3-Clause
"""moe_blocks finds the blocks of every model type, and observe sees what their experts get."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import switchgear
from errors import raises
from model_types import sampled
from switchgear import MoE
from switchgear.integrations import hook_points
from switchgear.integrations.blocks import expert_layer
from switchgear.integrations.moe_blocks import is_transposed, moe_blocks
from switchgear.trace import Observation, observe
from switchgear.trace.batches import real_tokens
from switchgear.trace.routing_trace import check_outputs

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from tiny_configs import MODEL_TYPES  # noqa: E402
from tiny_models import BARE, build, example_inputs  # noqa: E402

NO_BLOCKS = ("vitpose_backbone",)  # chooses by data set, not by token
NO_GATE = (*NO_BLOCKS, *BARE)  # the experts module by itself
WITH_BLOCKS = [model_type for model_type in MODEL_TYPES if model_type not in NO_BLOCKS]
NOT_STACKED = ("dbrx", "nllb-moe", "switch_transformers")
NO_LINEAR_GATE = ("zaya", *BARE)


def observations(model: nn.Module, inputs: dict[str, Any]) -> dict[str, list[Observation]]:
    seen: dict[str, list[Observation]] = {}
    torch.manual_seed(0)
    with torch.no_grad(), observe(model, lambda name, one: seen.setdefault(name, []).append(one)):
        model(**inputs)
    return seen


@pytest.mark.parametrize("model_type", sampled(WITH_BLOCKS))
def test_blocks_of_every_type(model_type: str) -> None:
    model = build(model_type)
    blocks = moe_blocks(model)
    assert blocks
    for name, block in blocks.items():
        assert model.get_submodule(name) is block.block
        assert model.get_submodule(block.layer) in (block.experts, block.block)
        assert (block.num_experts, block.gate is None) == (8, model_type in NO_GATE)
        assert block.top_k in (1, 2) or model_type in BARE
        weight = block.gate_weight()
        assert (weight is None) == (model_type in NO_LINEAR_GATE)
        assert weight is None or (weight.shape[0] >= 8 and weight.dim() == 2)
        bias = block.selection_bias()
        assert bias is None or bias.shape[0] >= 8
        if model_type in NOT_STACKED:
            with raises(ValueError):
                expert_layer(block)
        else:
            first, down = (parameter.value for parameter in expert_layer(block).parameters)
            transposed = is_transposed(block.experts)
            assert first.shape[0] >= 8
            assert down.shape[0] >= 8
            assert first.shape[1 if transposed else 2] == down.shape[2 if transposed else 1]
        if model_type not in BARE:
            config, num_experts, top_k = block.config_fields()
            assert getattr(config, str(num_experts)) in (8, [8, 8])
            assert top_k is None or getattr(config, top_k) in (1, 2)
            assert top_k is not None or model_type in ("switch_transformers", "nllb-moe")


def same_without_empty(ids: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """[T,E]: the weight of each expert."""
    kept = torch.where(ids < 0, 0, weights.double())
    return torch.zeros(len(ids), num_experts, dtype=torch.float64).scatter_add(1, ids.clamp(min=0).long(), kept)


@pytest.mark.parametrize("model_type", sampled(t for t in WITH_BLOCKS if t not in NO_GATE))
def test_observations_of_every_type(model_type: str) -> None:
    """In transformers and on switchgear, the same logits, ids and weights are seen, and the output does not change."""
    model, plain = build(model_type), build(model_type)
    inputs = example_inputs(model)
    seen = observations(model, inputs)
    assert set(seen) <= set(moe_blocks(model))
    assert seen
    for name, calls in seen.items():
        for one in calls:
            tokens = one.x.shape[0]
            assert one.block is not None
            assert one.block.name == name
            assert one.router_logits is not None
            assert one.router_logits.shape[0] == tokens
            assert one.router_logits.isfinite().all()
            assert one.topk_ids.shape == one.topk_weights.shape
            assert one.topk_ids.shape[1] == one.block.top_k
            assert int(one.topk_ids.max()) < 8
    assert has_hooks(model) == has_hooks(plain)
    switchgear.accelerate(model)
    again = observations(model, inputs)
    assert list(again) == list(seen)
    first = next(iter(seen))
    for one, two in zip(seen[first], again[first], strict=True):
        torch.testing.assert_close(one.router_logits, two.router_logits, rtol=1e-4, atol=1e-5)
        rows = [same_without_empty(o.topk_ids, o.topk_weights, 8) for o in (one, two)]
        torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-5)


def has_hooks(model: nn.Module) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_tokens_without_an_expert_are_seen_as_such() -> None:
    """Of routers that say so by a mask of zeros, or by a weight of 0."""
    x, logits = torch.randn(3, 4), torch.randn(3, 2)
    mask, weights = torch.tensor([[0, 1], [0, 0], [1, 0]]), torch.rand(3, 1)
    block = moe_blocks(MoE(4, 8, 2, 1))[""]
    choice = hook_points._Switch().read(block, x, (mask, weights, logits))
    assert choice.topk_ids.tolist() == [[1], [-1], [0]]
    ids = torch.tensor([[1], [0], [0]])
    choice = hook_points._Zaya().read(block, x, ids, torch.tensor([[0.5], [0.0], [0.7]]), logits)
    assert choice.topk_ids.tolist() == [[1], [-1], [0]]


def test_a_class_that_extends_the_model_s_is_known() -> None:
    """FSDP2 and torch's parametrizations extend the class of a module, under another name."""
    own: Any = type("Llama4TextMoe", (nn.Module,), {})
    extended = type("FSDPLlama4TextMoe", (own,), {})()
    block = replace(moe_blocks(MoE(4, 8, 2, 1))[""], block=extended)
    assert isinstance(hook_points.find_hook_point(block), hook_points._Llama4)
    with raises(ValueError):
        check_outputs(block)
    assert is_transposed(type("FSDPLlama4TextExperts", (nn.Module,), {})())


def test_our_blocks() -> None:
    model = nn.Sequential(MoE(16, 12, 8, 2, num_shared_experts=1), MoE(16, 12, 4, 1, num_groups=2, selection_bias=True))
    blocks = moe_blocks(model)
    assert [(b.name, b.layer, b.num_experts, b.top_k) for b in blocks.values()] == [
        ("0", "0.gate", 8, 2),
        ("1", "1.gate", 4, 1),
    ]
    assert blocks["0"].shared is model[0].shared_experts
    assert blocks["0"].gate_weight() is model[0].gate.weight
    assert blocks["1"].groups() == (2, 1)
    assert blocks["1"].selection_bias() is model[1].gate.e_score_correction_bias
    assert expert_layer(blocks["0"]).parameters[0].value is model[0].experts.gate_up_proj
    with raises(ValueError):
        _ = blocks["0"].config
    x = torch.randn(2, 5, 16)
    seen: list[tuple[str, Observation]] = []
    with observe(model, lambda *one: seen.append(one), layers=["1"]) as names:
        model(x)
    assert names == ["1"]
    ((name, one),) = seen
    routing = model[1].gate(model[0](x))
    assert name == "1"
    assert torch.equal(one.topk_ids, routing.topk_ids)
    torch.testing.assert_close(one.x, model[0](x).flatten(0, 1))
    with raises(ValueError, "layers"), observe(model, lambda *_: None, layers=["2"]):
        pass


def test_padding_in_masks_of_more_dimensions() -> None:
    """A token is padding if neither its own query nor a later one sees it; columns begin behind those of the cache."""
    rows, length, cached, width = 3, 4, 2, 8
    seen = torch.rand(rows, 1, length, width) < 0.3
    wanted = [
        [any(bool(seen[row, 0, query, cached + token]) for query in range(token, length)) for token in range(length)]
        for row in range(rows)
    ]
    added = torch.where(seen, 0.0, -torch.inf)
    for mask in (seen, seen.int(), added, seen[:, 0], {"full_attention": added, "sliding_attention": ~seen}):
        assert real_tokens(mask, rows, length, cached).tolist() == wanted
    assert real_tokens(seen[:1], rows, length, cached).tolist() == [wanted[0]] * rows
    one = seen[:, :, :1]
    assert torch.equal(real_tokens(one, rows, length, cached), one[:, 0, 0, cached : cached + length])
    assert torch.equal(real_tokens(one, rows, length, None), one[:, 0, 0, width - length :])  # no cache that tells
    assert torch.equal(real_tokens(one[:, 0, 0], rows, length, cached), one[:, 0, 0, width - length :])
    for mask in (seen[:2], seen[:, :, :3], seen[..., : length - 1], seen[0, 0, 0], {}, None):
        assert real_tokens(mask, rows, length, cached) is None


def test_padding_is_marked_with_a_static_cache() -> None:
    model = build("mixtral")
    ids = example_inputs(model)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    masks: list[Any] = []
    with torch.no_grad(), observe(model, lambda _, one: masks.append(one.token_mask)):
        model.generate(
            ids, attention_mask=mask, max_new_tokens=3, do_sample=False, cache_implementation="static",
            disable_compile=True,
        )  # fmt: skip
    layers = len(moe_blocks(model))
    assert torch.equal(masks[0], mask.flatten().bool())
    assert [m.tolist() for m in masks[layers:]] == [[True, True]] * (2 * layers)


def test_padding_is_marked() -> None:
    model = build("mixtral")
    ids = example_inputs(model)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    for one in (calls[0] for calls in observations(model, {"input_ids": ids, "attention_mask": mask}).values()):
        assert one.token_mask is not None
        assert torch.equal(one.token_mask, mask.flatten().bool())
        assert torch.equal(one.token_ids, ids.flatten())
    masks: list[Any] = []
    with torch.no_grad(), observe(model, lambda _, one: masks.append(one.token_mask)):
        model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    layers = len(moe_blocks(model))
    assert torch.equal(masks[0], mask.flatten().bool())
    assert [m.tolist() for m in masks[layers:]] == [[True, True]] * (2 * layers)


def test_outputs_of_routers_in_either_order() -> None:
    """Granite's router returns (ids, weights, logits) before transformers 5.21."""
    logits, weights, ids = torch.randn(3, 8), torch.rand(3, 2), torch.zeros(3, 2, dtype=torch.int64)
    for output in ((logits, weights, ids), (ids, weights, logits)):
        first, _, last = hook_points._put_logits_first(output)
        assert first is logits
        assert last is ids
