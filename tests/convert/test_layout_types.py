# SPDX-License-Identifier: BSD-3-Clause
"""Layouts of the experts of every model type that has them in model.layers.0.mlp.experts: transformers reads what is
written, and all comes back."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from errors import raises
from model_types import sampled

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers.core_model_loading import revert_weight_conversion  # noqa: E402

from switchgear.convert.layouts import LAYOUTS, plan_layout  # noqa: E402
from switchgear.convert.plans import StateDict  # noqa: E402
from tiny_configs import MODEL_TYPES  # noqa: E402
from tiny_models import BARE, build, example_inputs  # noqa: E402

# Their experts are elsewhere, have biases, or are stored in another form.
REFUSED = """
aria dbrx deepseek_ocr2 diffusion_gemma ernie4_5_vl_moe gemma4_text glm4v_moe_text glm5_next_text gpt_oss granitemoe
granitemoe_swa granitemoehybrid granitemoeshared hy_v4_vl_text jamba jetmoe kimi_k25 lfm2_moe llama4_text longcat_flash
minimax_m3_vl mistral_large4 muse_spark nemotron_h nllb-moe openai_privacy_filter qwen3_omni_moe_thinker qwen3_vl_moe
step3p7 switch_transformers unlimited_ocr vitpose_backbone
""".split()  # noqa: SIM905
FUSED_ALONE = (
    "deepseek_v4", "hy_v4", "inkling2_loop_text", "inkling2_text", "inkling_text", "lara_mini", "mistral4", "zaya",
)  # fmt: skip
# Keys of routers in transformers and in published checkpoints
ROUTER = r"model\.layers\.\d+\.(?:mlp|moe|block_sparse_moe)\.(?:(?:gate|router|moe_statics|experts)\.)*{}"
MIXTRALS = ("kimi_linear", "minimax", "minimax_m2", "mixtral", "phimoe")
ROUTERS = ("ernie4_5_moe", "hunyuan_v1_moe", "minimax_m2")  # with names of their own
TYPES = [t for t in MODEL_TYPES if t not in (*REFUSED, *BARE)]


def written(model: Any, tensors: dict[str, Tensor], to: str) -> dict[str, Tensor]:
    return {item.key: item.make() for item in plan_layout(model.config.to_dict(), StateDict(tensors), to).items}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def read_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors in transformers' own names, tied ones once, with random biases of routers."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    state = {key: tensor for key, tensor in model.state_dict().items() if key not in tied}
    torch.manual_seed(1)
    for key, tensor in state.items():
        if re.fullmatch(ROUTER.format("(?:expert_bias|e_score_correction_bias)"), key):
            tensor.uniform_(0, 0.1)
    return state


def usual(types: Iterable[str]) -> list[Any]:
    """The sample, and ROUTERS, in the usual run."""
    return [*ROUTERS, *sampled(t for t in types if t not in ROUTERS)]


@pytest.mark.parametrize("model_type", usual(TYPES))
def test_layouts_of_every_type(model_type: str) -> None:
    model: Any = build(model_type)
    fused = read_tensors(model)
    for to in ("megatron_grouped", "megatron_te"):
        megatron = written(model, fused, to)
        assert same(written(model, megatron, "fused"), fused)
        left = [key for key in megatron if re.fullmatch(ROUTER.format("(?:wg.|classifier.)?(?:weight|.*_bias)"), key)]
        assert not left
        biases = [tensor for key, tensor in megatron.items() if key.endswith(".mlp.router.expert_bias")]
        assert all(bias.shape == (8,) for bias in biases)
    if model_type in FUSED_ALONE:
        with raises(ValueError, "to"):
            written(model, fused, "per_expert")
        return
    single = written(model, fused, "per_expert")
    assert same(written(model, single, "fused"), fused)
    assert same(written(model, megatron, "per_expert"), single)
    options = {"config": model.config, "state_dict": single, "output_loading_info": True}
    read, info = type(model).from_pretrained(None, **options)
    assert not set(info["missing_keys"]) - set(getattr(model, "all_tied_weights_keys", None) or ())
    assert not info["unexpected_keys"]
    inputs = example_inputs(model)
    with torch.no_grad():
        assert torch.equal(read.eval()(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("model_type", usual(t for t in TYPES if t not in FUSED_ALONE))
def test_layouts_have_the_names_of_published_checkpoints(model_type: str) -> None:
    model: Any = build(model_type)
    fused = read_tensors(model)
    published = {key: tensor.clone() for key, tensor in revert_weight_conversion(model, dict(fused)).items()}
    single = written(model, fused, "per_expert")
    renamed = single.keys() - fused.keys()
    assert all(torch.equal(single[key], published[key]) for key in renamed)
    assert any(".block_sparse_moe.experts.1.w1." in key for key in renamed) == (model_type in MIXTRALS)
    assert "model.layers.1.mlp.gate.weight" not in renamed
    read = written(model, published, "fused")
    moved = fused.keys() - single.keys()
    assert moved
    assert all(torch.equal(read[key], fused[key]) for key in moved)


@pytest.mark.parametrize("model_type", sampled(REFUSED))
def test_other_types_are_refused(model_type: str) -> None:
    model: Any = build(model_type)
    for to in LAYOUTS:
        with raises(ValueError, "source"):
            written(model, dict(model.state_dict()), to)


def test_a_type_that_transformers_does_not_know() -> None:
    model: Any = build("olmoe")
    fused, config = read_tensors(model), {**model.config.to_dict(), "model_type": "another"}
    single = written(model, fused, "per_expert")
    for tensors in (fused, single):  # single experts keep the names that they have
        assert plan_layout(config, StateDict(tensors), "megatron").items
    assert {item.key for item in plan_layout(config, StateDict(single), "per_expert").items} == single.keys()
    with raises(ValueError, "to"):
        plan_layout(config, StateDict(fused), "per_expert")


def test_the_config_is_written_as_it_was() -> None:
    """transformers fills in entries of the dicts in it."""
    model = build("glm4_moe")
    config = model.config.to_dict() | {"rope_scaling": {"type": "yarn", "factor": 4.0}}
    before = copy.deepcopy(config)
    plan = plan_layout(config, StateDict(model.state_dict()), "per_expert")
    assert config == before == plan.config


def test_names_do_not_depend_on_how_attention_is_computed() -> None:
    model = build("glm4_moe")
    config = model.config.to_dict() | {"_attn_implementation": "flash_attention_2", "dtype": "nonsense"}
    assert plan_layout(config, StateDict(model.state_dict()), "per_expert").items
    with raises(ValueError, "config"):
        plan_layout(config | {"hidden_act": "nonsense"}, StateDict(model.state_dict()), "per_expert")
