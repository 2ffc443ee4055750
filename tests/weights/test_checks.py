# SPDX-License-Identifier: BSD-3-Clause
"""Functions that read the parameters of experts refuse models that compute with more than these."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import switchgear
from errors import raises
from switchgear import adapters, compress, convert, finetune, offload
from switchgear.compress.progressive import copy_expert
from switchgear.layers.heterogeneous import HeterogeneousExperts
from switchgear.weights.module import check_plain

H = 16


def add_lora(model: nn.Module) -> None:
    for parameter in adapters.add_lora(model, 2):
        nn.init.normal_(parameter)


def add_and_merge(model: nn.Module) -> None:
    add_lora(model)
    adapters.merge(model)


def select(model: nn.Module) -> None:
    finetune.freeze_except(model, {"0.experts.slices" if hasattr(model[0].experts, "slices") else "0": [1]})


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "adapters": (add_lora, "adapters"),
    "selected": (select, "finetune.unfreeze(model)"),
    "stored": (lambda model: switchgear.store(model, "int8"), "switchgear.restore(model)"),
}
BATCH = {"input": torch.ones(2, 3, H)}
READERS: dict[str, Callable[[Any], Any]] = {
    "to_dense": lambda model: convert.to_dense(model[0]),
    "add_domain_expert": lambda model: convert.add_domain_expert(model[0], nn.Identity(), torch.ones(4)),
    "dense_expert": lambda model: copy_expert("0", model[0].experts, 0),
    "calibrate": lambda model: compress.calibrate(model, [BATCH]),
    "prune_weights": lambda model: compress.prune_weights(model, 0.5),
    "quantize": lambda model: compress.quantize(model, 4),
}


def model_for(reader: str) -> nn.Sequential:
    torch.manual_seed(0)
    if reader == "add_domain_expert":
        mlps = [switchgear.layers.SharedExperts(H, 8) for _ in range(4)]
        return nn.Sequential(convert.from_dense_experts(mlps, 1, embeddings=torch.ones(4, 4)))
    return nn.Sequential(switchgear.MoE(H, 8, 4, 2))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("change", CHANGES)
def test_readers_refuse(reader: str, change: str) -> None:
    model, (apply, message) = model_for(reader), CHANGES[change]
    apply(model)
    with raises(ValueError, message):
        READERS[reader](model)


@pytest.mark.parametrize("change", CHANGES)
def test_experts_of_other_widths_refuse(change: str) -> None:
    model, (apply, message) = nn.Sequential(switchgear.MoE(H, 8, 2, 2, widths=[1, 3])), CHANGES[change]
    experts = model[0].experts
    assert isinstance(experts, HeterogeneousExperts)
    apply(model)
    for read in (lambda: experts.weights_of(0), lambda: convert.to_dense(model[0], "topk")):
        with raises(ValueError, message):
            read()


def test_offloaded_experts_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(switchgear.MoE(H, 8, 4, 2))
    with offload.offload(model, offload.write_store(model, tmp_path / "experts"), slots=2):
        for reader in ("to_dense", "calibrate", "prune_weights"):
            with raises(ValueError):
                READERS[reader](model)
        with raises(ValueError):
            finetune.freeze_except(model, {"0": [1]})
        for options in ({}, {"form": "int8"}):
            with raises(ValueError):
                offload.write_store(model, tmp_path / "again", **options)


def test_merged_adapters_are_part_of_the_weights() -> None:
    """Changing the weights would leave the adapters behind, so only what reads them allows it."""
    model = nn.Sequential(switchgear.MoE(H, 8, 1, 1, normalize=True)).double()
    add_and_merge(model)
    x = torch.randn(5, H, dtype=torch.float64)
    torch.testing.assert_close(convert.to_dense(model[0])(x), model(x))
    with raises(ValueError):
        compress.prune_weights(model, 0.5)
    adapters.merge(model, keep_adapters=False)
    assert not adapters.lora_of(model)
    torch.testing.assert_close(convert.to_dense(model[0])(x), model(x))


def test_merged_layers_do_not_average_experts_that_train_alone() -> None:
    layer = switchgear.layers.MergedExperts(switchgear.Router(H, 4, 2), switchgear.Experts(H, 8, 4))
    finetune.freeze_except(layer, {"experts": [1]})
    with raises(ValueError):
        layer(torch.randn(2, 3, H))


def test_hugging_face_models() -> None:
    tiny = pytest.importorskip("tiny_models", reason="transformers is not installed")
    for change in ("adapters", "stored"):
        model, (apply, message) = tiny.build("mixtral"), CHANGES[change]
        switchgear.accelerate(model)
        apply(model)
        for dense in (model.model.layers[0].mlp, model):
            with raises(ValueError, message):
                convert.to_dense(dense)
    adapters.add_lora(model := accelerated(tiny, "jetmoe"), 2)  # its adapters are in parts of the block
    with raises(ValueError):
        compress.prune_weights(model, 0.5)
    add_and_merge(model := accelerated(tiny, "mixtral"))
    with raises(ValueError, "model"):
        convert.to_dense(model)


def accelerated(tiny: Any, model_type: str) -> Any:
    model = tiny.build(model_type)
    switchgear.accelerate(model)
    return model


def test_adapters_of_peft_are_refused() -> None:
    tiny = pytest.importorskip("tiny_models", reason="transformers is not installed")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny.build("mixtral")
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"]))
    with raises(ValueError):
        convert.to_dense(model.model.layers[0].mlp)
    with raises(ValueError):
        convert.to_dense(model)


def test_plain_experts_pass() -> None:
    model = nn.Sequential(switchgear.MoE(H, 8, 4, 2))
    check_plain("model", model)
    add_lora(model)
    adapters.remove_lora(model)
    select(model)
    finetune.unfreeze(model)
    check_plain("model", model)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda m: switchgear.store(m, "int8", low_memory="no"), "low_memory"),
        (lambda m: switchgear.store(m, "auto", lossless="no"), "lossless"),
        (lambda m: switchgear.store(m, "auto", tokens_per_step=math.nan), "tokens_per_step"),
        (lambda m: switchgear.store(m, "auto", tokens_per_step=True), "tokens_per_step"),
        (lambda m: switchgear.store(m, "auto", tokens_per_step="1"), "tokens_per_step"),
        (lambda m: switchgear.store(m, ["int8"]), "form"),
        (lambda m: switchgear.store(None, "int8"), "model"),
        (lambda m: switchgear.restore(None), "model"),
        (lambda m: switchgear.store(m, "groups", symmetric="no"), "symmetric"),
        (lambda m: switchgear.store(m, "int4", symmetric=2), "symmetric"),
        (lambda m: switchgear.store(m, "groups", bits=None), "bits"),
    ],
)
def test_arguments_of_another_type_are_named(call: Callable[[Any], Any], argument: str) -> None:
    model = switchgear.MoE(32, 32, 4, 2)
    with raises(TypeError, argument):
        call(model)
    assert isinstance(model.experts.down_proj, torch.nn.Parameter)
