# SPDX-License-Identifier: BSD-3-Clause
"""GrowingCache under transformers' generate: the tokens of transformers' own cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import DynamicCache

from errors import raises
from switchgear.integrations.cache import GrowingCache, GrowingLayer, adopt_layer
from tiny_models import build

NEW = 12
IDS = torch.randint(3, 250, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS).index_fill(1, torch.arange(3), 0) | torch.tensor([[0], [1]])  # the first is padded
MODES = {
    "greedy": {"do_sample": False},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "assisted": {"do_sample": False, "prompt_lookup_num_tokens": 3},
}


def generate(model: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return model.generate(max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model_type", ["olmoe", "gpt_oss", "mixtral"])
def test_tokens_are_those_of_a_dynamic_cache(model_type: str, mode: str) -> None:
    model: Any = build(model_type)
    config = model.config.get_text_config()
    if getattr(config, "sliding_window", None) is not None:
        config.sliding_window = 5
    for layer in model.modules():
        if getattr(layer, "sliding_window", None) is not None:
            layer.sliding_window = 5
    inputs = {"input_ids": IDS[:1] if mode == "assisted" else IDS}
    if mode != "assisted":
        inputs["attention_mask"] = MASK
    want = generate(model, **inputs, **MODES[mode])
    cache = GrowingCache(model.config.get_text_config())
    assert torch.equal(generate(model, **inputs, **MODES[mode], past_key_values=cache), want)
    assert cache.get_seq_length() >= IDS.shape[1] + NEW - 1
    assert all(type(layer) is GrowingLayer for layer in cache.layers)


def test_memory_is_written_in_place() -> None:
    layer = GrowingLayer(capacity=200)
    tokens = [torch.randn(2, 3, 1, 4) for _ in range(300)]
    pointers = set()
    for count, token in enumerate(tokens, 1):
        keys, values = layer.update(token, token[..., :2])
        pointers.add(keys.data_ptr())
        assert keys.shape == (2, 3, count, 4)
        assert layer.get_mask_sizes(7) == (count + 7, 0)
    assert len(pointers) == 2  # 256 positions, then 512
    assert torch.equal(keys, torch.cat(tokens, 2))
    assert torch.equal(values, torch.cat(tokens, 2)[..., :2])


def test_selecting_and_removing() -> None:
    cache = GrowingCache()
    states = torch.randn(2, 3, 5, 4)
    cache.update(states, states, 1)
    assert [layer.get_seq_length() for layer in cache.layers] == [0, 5]
    cache.crop(-2)
    assert torch.equal(cache.layers[1].keys, states[:, :, :3])
    assert cache.layers[0].keys is None
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[1].values, states[[0, 0, 1, 1], :, :3])
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    cache.batch_select_indices(torch.tensor([0, 1]))
    assert torch.equal(cache.layers[1].keys, states[[1, 0], :, :3])
    cache.layers[1].crop(1)
    assert cache.layers[1].get_seq_length() == 1
    cache.reset()
    assert cache.layers[1].get_seq_length() == 0
    with raises(ValueError, "capacity"):
        GrowingCache(capacity=-1)


def test_gradients_pass() -> None:
    cache = GrowingCache()
    first, second = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(2))
    cache.update(first, first, 0)
    keys, values = cache.update(second, second, 0)
    (keys.sum() + values.square().sum()).backward()
    for states in (first, second):
        torch.testing.assert_close(states.grad, 1 + 2 * states.detach())


def test_layers_of_a_dynamic_cache_are_replaced() -> None:
    states = torch.randn(2, 3, 5, 4)
    cache = DynamicCache()
    cache.update(states, states, 0)
    layer = adopt_layer(cache, 0)
    assert layer is cache.layers[0]
    assert torch.equal(layer.keys, states)
    assert type(adopt_layer(cache, 2)) is GrowingLayer
    assert adopt_layer(object(), 0) is None
