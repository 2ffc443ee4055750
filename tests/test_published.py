# SPDX-License-Identifier: BSD-3-Clause
"""Published checkpoints, made here from tiny models: load_published and transformers give the same model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

import switchgear
from errors import raises
from switchgear.convert import store_checkpoint
from switchgear.integrations.checkpoint_files import INDEX, Reader
from switchgear.integrations.published import load_published, planned
from switchgear.integrations.transformers import is_decorated, path_of
from switchgear.reference import minifloat
from switchgear.weights import restore, stored_of
from switchgear.weights.form import FORMS
from tiny_configs import tiny_config
from tiny_models import build, example_inputs

MODELS = {"gpt_oss": "mxfp4", "qwen3_moe": "fp8", "deepseek_v3": "fp8", "mixtral": "fp8", "minimax_m2": "fp8"}
SIZES = {
    "mxfp4": {"hidden_size": 64, "intermediate_size": 96},
    "fp8": {
        "hidden_size": 256,
        "moe_intermediate_size": 128,
        "intermediate_size": 128,
        "shared_intermediate_size": 128,
    },
}
models = pytest.mark.parametrize("model_type", MODELS)
decodes_to_any_dtype = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"), reason="this transformers decodes to another dtype"
)
DEQUANTIZE = {"mxfp4": Mxfp4Config(dequantize=True), "fp8": FineGrainedFP8Config(dequantize=True)}
CONFIGS = {
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
}
OPTIONS = {"mixtral": {"block": "64x128"}}  # of the form


def config_of(model_type: str) -> dict[str, Any]:
    own = {"weight_block_size": [64, 128]} if model_type in OPTIONS else {}
    return CONFIGS[MODELS[model_type]] | own


def as_published(key: str, weight: Tensor, config: dict[str, Any]) -> dict[str, Tensor]:
    """The published tensors of a plain one."""
    method = config["quant_method"]
    if method == "mxfp4" and key.endswith(("gate_up_proj", "down_proj")):
        blocks, scales, _ = minifloat.encode_mxfp4(weight.mT.contiguous())
        return {f"{key}_blocks": blocks, f"{key}_scales": scales}
    if method == "fp8" and weight.dim() == 2 and any(part in key for part in ("_proj", ".w1.", ".w2.", ".w3.")):
        values, scales, _ = minifloat.encode_fp8(weight[None], tuple(config["weight_block_size"]))
        return {key: values[0].view(torch.float8_e4m3fn), f"{key}_scale_inv": scales[0]}
    return {key: weight}


def publish(folder: Path, model_type: str, **options: Any) -> None:
    """A checkpoint of a tiny random model, in several files."""
    method = MODELS[model_type]
    tiny = tiny_config(CONFIG_MAPPING[model_type]).to_dict()
    taken = {name: size for name, size in (SIZES[method] | options).items() if name in tiny}
    config = CONFIG_MAPPING[model_type](**{**tiny, **taken})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "expert" in name:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    for name, buffer in model.named_buffers():
        if "correction_bias" in name:
            nn.init.normal_(buffer)
    model.save_pretrained(folder, max_shard_size="100KB")
    listed = {}
    for file in folder.glob("*.safetensors"):
        tensors: dict[str, Tensor] = {}
        for key, weight in load_file(file).items():
            tensors |= as_published(key, weight, config_of(model_type))
        save_file(tensors, file, metadata={"format": "pt"})
        listed |= dict.fromkeys(tensors, file.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"quantization_config": config_of(model_type)}))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp(model_type)
            publish(made[model_type], model_type)
        return made[model_type]

    return of


@decodes_to_any_dtype
@models
def test_weights_are_those_that_transformers_reads(published: Callable[[str], Path], model_type: str) -> None:
    path, method = published(model_type), MODELS[model_type]
    want = AutoModelForCausalLM.from_pretrained(path, quantization_config=DEQUANTIZE[method], dtype=torch.bfloat16)
    got = load_published(path)
    stored = [state for module in got.modules() if (state := stored_of(module)) is not None]
    num_linears = sum(len(state.layout.names) == 1 for state in stored)
    assert len(stored) - num_linears == len(list(experts_of(got))) > 0
    assert (num_linears > 0) == (method == "fp8")
    assert {state.form for state in stored} == {FORMS[method](**OPTIONS.get(model_type, {}))}
    restore(got)
    expected = dict(want.named_parameters()) | dict(want.named_buffers())
    found = dict(got.named_parameters()) | dict(got.named_buffers())
    assert sorted(expected) == sorted(found)
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    assert not got.training


@decodes_to_any_dtype
@models
def test_logits_are_those_of_transformers(published: Callable[[str], Path], model_type: str) -> None:
    """In float32, with a tight tolerance: decoding is exact, or has one rounding of scale · value."""
    path, method = published(model_type), MODELS[model_type]
    options = {"dtype": torch.float32, "experts_implementation": "eager"}
    want = AutoModelForCausalLM.from_pretrained(path, quantization_config=DEQUANTIZE[method], **options)
    got = load_published(path, dtype=torch.float32)
    inputs = example_inputs(want)
    logits = want(**inputs).logits
    assert (got(**inputs).logits - logits).abs().max() <= 2e-5 * logits.abs().max()
    assert {path_of(module) for module in experts_of(got)} == {"moe"}


@models
def test_state_dict_has_the_published_bytes(published: Callable[[str], Path], model_type: str) -> None:
    path, method = published(model_type), MODELS[model_type]
    state = load_published(path).state_dict()
    files = {key: tensor for file in path.glob("*.safetensors") for key, tensor in load_file(file).items()}
    if method == "mxfp4":
        for key in (key for key in files if key.endswith(("_blocks", "_scales"))):
            assert torch.equal(state[key], files[key])
        return
    down = next(key for key in state if key.endswith("experts.down_proj"))
    third = r"experts\.3\.(down_proj|w2)\.weight"
    values, scale = (
        next(files[key] for key in sorted(files) if re.search(third + end, key) and layer_of(key) == layer_of(down))
        for end in ("$", "_scale_inv$")
    )
    assert torch.equal(state[down][3].view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(state[f"{down}_scale_inv"][3], scale)


def layer_of(key: str) -> str:
    return key.split(".")[2]


def experts_of(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if is_decorated(module))


# ---- what does not fit -----------------------------------------------------------------------------------------------


def copied(path: Path, to: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """The checkpoint in one file without an index, with changed tensors."""
    tensors: dict[str, Tensor] = {}
    for file in path.glob("*.safetensors"):
        tensors |= load_file(file)
    change(tensors)
    save_file(tensors, to / "model.safetensors")
    (to / "config.json").write_text((path / "config.json").read_text())
    return to


EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"
BLOCKS = "model.layers.1.mlp.experts.down_proj_blocks"


def _spoil(key: str, value: int) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors[key].view(torch.uint8).flatten()[7:8].fill_(value)


FAULTS: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], str]] = {
    "no weight": ("qwen3_moe", lambda t: t.pop(EXPERT), "path"),
    "no scale": ("qwen3_moe", lambda t: t.pop(f"{EXPERT}_scale_inv"), "path"),
    "no norm": ("qwen3_moe", lambda t: t.pop("model.norm.weight"), "path"),
    "no layer": (
        "qwen3_moe",
        lambda t: [t.pop(key) for key in list(t) if "layers.1." in key],
        "path",
    ),
    "another key": ("qwen3_moe", lambda t: t.update({"model.extra": torch.ones(3)}), "path"),
    "twice": (
        "qwen3_moe",
        lambda t: t.update({"norm.weight": t["model.norm.weight"].clone()}),
        "path",
    ),
    "another expert": (
        "qwen3_moe",
        lambda t: t.update({EXPERT.replace(".5.", ".8."): t[EXPERT].clone()}),
        "path",
    ),
    "scale of nothing": (
        "qwen3_moe",
        lambda t: t.pop("model.layers.0.self_attn.q_proj.weight"),
        "path",
    ),
    "shape": (
        "qwen3_moe",
        lambda t: t.update({EXPERT: t[EXPERT][:64].clone()}),
        "path",
    ),
    "scales": (
        "qwen3_moe",
        lambda t: t.update({f"{EXPERT}_scale_inv": torch.ones(2, 2)}),
        "path",
    ),
    "dtype": (
        "qwen3_moe",
        lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e5m2)}),
        "path",
    ),
    "NaN": (
        "qwen3_moe",
        _spoil(EXPERT, 0x7F),
        "layers.2.mlp.experts.gate_up_proj, expert 5: values",
    ),
    "no blocks": ("gpt_oss", lambda t: t.pop(BLOCKS), "path"),
    "blocks": (
        "gpt_oss",
        lambda t: t.update({BLOCKS: t[BLOCKS][:, :, :2].clone()}),
        "path",
    ),
    "NaN scale": (
        "gpt_oss",
        _spoil(BLOCKS.replace("blocks", "scales"), 255),
        "down_proj, expert 0: scales",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_and_change_nothing(published: Callable[[str], Path], tmp_path: Path, fault: str) -> None:
    model_type, change, message = FAULTS[fault]
    path = copied(published(model_type), tmp_path, change)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    before = model.config._experts_implementation
    with raises(ValueError, message):
        load_published(path, model)
    assert model.config._experts_implementation == before
    assert all(parameter.is_meta for parameter in model.parameters())


def test_one_file_and_a_model_that_is_there(published: Callable[[str], Path], tmp_path: Path) -> None:
    path = copied(published("gpt_oss"), tmp_path, lambda tensors: None)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.float32)
    assert load_published(path, model) is model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert path_of(model.model.layers[0].mlp.experts) == "moe"


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    publish(tmp_path, "qwen3_moe", tie_word_embeddings=True)
    model: Any = load_published(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head.weight.is_meta


def test_experts_that_were_not_quantised_stay_plain(published: Callable[[str], Path], tmp_path: Path) -> None:
    def decode(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if "layers.1.mlp.experts" in key and not key.endswith("_scale_inv")]:
            scales = tensors.pop(f"{key}_scale_inv")[None]
            tensors[key] = minifloat.decode_fp8(tensors[key][None], scales)[0].bfloat16()

    path = published("qwen3_moe")
    want, got = (load_published(folder, linears=False) for folder in (path, copied(path, tmp_path, decode)))
    assert [stored_of(module) is None for module in experts_of(got)] == [False, True, False, False]
    assert restore(want) == 4
    assert restore(got) == 3
    for (name, ours), theirs in zip(got.named_parameters(), want.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_moe"])
def test_packed_checkpoints(published: Callable[[str], Path], model_type: str, tmp_path: Path) -> None:
    """The published bytes, in the order of the kernels; or another form of some."""
    path = published(model_type)
    model = load_published(path)
    inputs = example_inputs(model)
    done = store_checkpoint(path, tmp_path / "same", None)
    assert done.experts == len(list(experts_of(model)))
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "same")
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        restore(model)
    switchgear.store(model, "int8", linears="int4")
    store_checkpoint(path, tmp_path / "other", "int8", linears="int4")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def saved(path: Path, model_type: str) -> Any:
    """A tiny model in float32, and its checkpoint, not quantised."""
    model = build(model_type)
    model.save_pretrained(path)
    return model


def test_a_name_that_is_the_models_own_is_not_renamed(tmp_path: Path) -> None:
    """DeepSeek-V4's renamings are for norms of parts too, and would catch the model's last one."""
    want = saved(tmp_path, "deepseek_v4").state_dict()
    plan = planned(tmp_path, torch.float32)
    reader = Reader(plan.files.headers)
    assert plan.reads.keys() == want.keys()
    for target, read in plan.reads.items():
        assert torch.equal(cast(Tensor, read(reader, torch.device("cpu"))), want[target]), target


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("kimi_linear", r"conv1d.weight: expected one tensor, got 3 \(transformers joins them, here only those of exp"),
        ("longcat_flash", r"experts.down_proj: expected one tensor, got \d+ \(transformers joins them"),
        ("lara_mini", r"expected a tensor for each .* got .*linear_attn.in_proj.weight, which transformers splits"),
    ],
)
def test_tensors_that_are_joined_or_split_are_named(tmp_path: Path, model_type: str, message: str) -> None:
    saved(tmp_path, model_type)
    with raises(ValueError, "path"):
        planned(tmp_path, torch.float32)


def test_layers_that_transformers_leaves_out_are_left_out(published: Callable[[str], Path], tmp_path: Path) -> None:
    key = "model.layers.61.mlp.experts.0.up_proj.weight"  # DeepSeek's multi-token prediction layer
    load_published(copied(published("deepseek_v3"), tmp_path, lambda tensors: tensors.update({key: torch.ones(2, 2)})))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "config.json").unlink(), "expected a directory with config.json, got"),
        (lambda path: (path / "model.safetensors").unlink(), "expected safetensors files in"),
        (
            lambda path: (path / "model.safetensors").write_bytes(b"\x08" + bytes(30)),
            "expected a safetensors file, got",
        ),
        (
            lambda path: index(path, '{"weight_map": {"a": "b.safetensors"}}'),
            "expected a safetensors file, got .*b.safetensors",
        ),
        (lambda path: index(path, '{"weight_map": {"a": "shard.safetensors"}}'), "expected a in .*index"),
        (lambda path: index(path, "[]"), "expected a weight_map in"),
        (lambda path: index(path, "[" * 100_000), "expected a weight_map in"),
        (
            lambda path: index(path, '{"weight_map": {"a": "b\\u0000"}}'),
            "expected a safetensors file, got",
        ),
        (
            lambda path: (path / "config.json").write_text("{"),
            "expected one of a model of transformers, got .*config.json .JSON",
        ),
        (lambda path: (path / "generation_config.json").write_text("{"), "expected .* got .*/generation_config.json"),
        (lambda path: resize(path, num_hidden_layers=10**9), "expected .*num_hidden_layers is 1000000000, but there"),
        (lambda path: resize(path, vocab_size="x"), "expected .*config.json .*vocab_size"),
        (lambda path: configure(path, {"quant_method": ["fp8"]}), "expected quant_method mxfp4, fp8, bitsandbytes"),
        (lambda path: configure(path, CONFIGS["fp8"] | {"weight_block_size": 128}), "expected weight_block_size"),
        (lambda path: configure(path, CONFIGS["fp8"] | {"weight_block_size": [1, 0]}), "expected weight_block_size"),
        (lambda path: configure(path, None), "expected a quantization_config in config.json, got none"),
        (
            lambda path: configure(path, {"quant_method": "hqq"}),
            "expected quant_method .*bitsandbytes.* in .*, got hqq",
        ),
        (
            lambda path: configure(path, CONFIGS["fp8"] | {"weight_block_size": [64, 64]}),
            r"expected weight_block_size \(128, 128\), \(64, 128\) in config.json, got \(64, 64\)",
        ),
    ],
)
def test_files_that_are_not_a_checkpoint(
    published: Callable[[str], Path], tmp_path: Path, change: Callable[[Path], Any], message: str
) -> None:
    path = copied(published("gpt_oss"), tmp_path, lambda tensors: None)
    change(path)
    with raises(ValueError, "path"):
        load_published(path)


def index(path: Path, text: str) -> None:
    """The weights in one file of an index."""
    (path / "model.safetensors").rename(path / "shard.safetensors")
    (path / INDEX).write_text(text)


def test_the_files_are_those_that_transformers_reads(published: Callable[[str], Path], tmp_path: Path) -> None:
    path = copied(published("gpt_oss"), tmp_path, lambda tensors: None)
    key = "model.norm.weight"
    whole, want = path / "model.safetensors", load_file(path / "model.safetensors")[key]
    other = {key: torch.zeros_like(want)}
    save_file(other, path / "adapter.safetensors")
    save_file(other, path / "shard.safetensors")
    (path / INDEX).write_text(json.dumps({"weight_map": {key: "shard.safetensors"}}))  # of an earlier save
    assert torch.equal(load_published(path).state_dict()[key], want)
    listed = dict.fromkeys(load_file(whole), "shard.safetensors")
    whole.rename(path / "shard.safetensors")
    (path / INDEX).write_text(json.dumps({"weight_map": listed}))
    assert torch.equal(load_published(path).state_dict()[key], want)
    (path / INDEX).unlink()
    with raises(ValueError, "path"):
        load_published(path)
    (path / "adapter.safetensors").unlink()
    assert torch.equal(load_published(path).state_dict()[key], want)


def resize(path: Path, **sizes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | sizes))


def configure(path: Path, quantization: dict[str, Any] | None) -> None:
    config = json.loads((path / "config.json").read_text())
    config.pop("quantization_config")
    (path / "config.json").write_text(
        json.dumps(config | ({"quantization_config": quantization} if quantization else {}))
    )


# ---- memory ----------------------------------------------------------------------------------------------------------

PEAK = """
import sys
from switchgear.integrations import checkpoint_files
from switchgear.integrations.published import load_published, planned

def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))

small, large = sys.argv[1:]
checkpoint_files.MAPPED = 1 << 20
load_published(small)  # what is imported and allocated once
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = kilobytes("VmRSS")
model = load_published(large)
tensors = [*model.parameters(), *model.buffers()]
print((kilobytes("VmHWM") - before) * 1024, sum(t.nbytes for t in tensors), max(t.nbytes for t in tensors))
"""


@pytest.mark.slow  # starts a process that imports transformers
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux says what the peak was")
@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_moe"])
def test_peak_is_the_stored_model_and_a_tensor(
    published: Callable[[str], Path], tmp_path: Path, model_type: str
) -> None:
    publish(tmp_path, model_type, hidden_size=512, intermediate_size=512, moe_intermediate_size=512)
    command = [sys.executable, "-c", PEAK, str(published(model_type)), str(tmp_path)]
    peak, stored, largest = map(int, subprocess.run(command, check=True, capture_output=True).stdout.split())
    plain = 2 * 4 * 8 * 3 * 512 * 512  # bytes of all experts in bfloat16, 4 layers of 8 experts
    constant = 8 << 20
    assert stored <= peak + constant  # the measurement works
    assert peak <= stored + largest + constant < plain
