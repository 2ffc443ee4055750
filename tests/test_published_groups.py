# SPDX-License-Identifier: BSD-3-Clause
"""Checkpoints of GPTQ, AWQ and compressed-tensors, made here from tiny models: load_published gives their numbers bit
for bit."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from errors import raises
from switchgear.integrations.published import load_published
from switchgear.integrations.published_matrices import _unpack, _unpack_awq
from switchgear.weights import Groups, restore, stored_of
from tiny_configs import tiny_config
from tiny_models import example_inputs

SIZES = {"hidden_size": 128, "moe_intermediate_size": 64, "intermediate_size": 64, "shared_intermediate_size": 64}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Kind(NamedTuple):
    """A kind of checkpoint."""

    method: str
    bits: int = 4
    group_size: int = 64  # -1: the whole row
    symmetric: bool = False
    version: str = "gptq"
    scales: torch.dtype = torch.float16

    @property
    def config(self) -> dict[str, Any]:
        options: dict[str, Any] = {"quant_method": self.method, "bits": self.bits, "group_size": self.group_size}
        if self.method == "gptq":
            return options | {"sym": self.symmetric, "desc_act": False, "checkpoint_format": self.version}
        if self.method == "awq":
            return options | {"zero_point": not self.symmetric, "version": "gemm"}
        weights = {"num_bits": 4, "type": "int", "symmetric": self.symmetric, "strategy": "group"}
        weights |= {"strategy": "channel"} if self.group_size < 0 else {"group_size": self.group_size}
        group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
        return {"quant_method": self.method, "format": "pack-quantized", "config_groups": {"group_0": group}}


KINDS = (
    Kind("gptq"),
    Kind("gptq", version="gptq_v2", group_size=32),
    Kind("gptq", bits=3),
    Kind("gptq", bits=2, group_size=-1, symmetric=True),
    Kind("awq"),
    Kind("compressed-tensors"),
    Kind("compressed-tensors", symmetric=True, group_size=-1, scales=torch.bfloat16),
)


def words_of(numbers: Tensor, bits: int) -> Tensor:
    """Consecutive numbers of each row as one stream of bits, the lowest first."""
    stream = (numbers.long()[..., None] >> torch.arange(bits) & 1).flatten(1).view(len(numbers), -1, 32)
    return (stream << torch.arange(32)).sum(-1).to(torch.int32)


def awq_words(numbers: Tensor) -> Tensor:
    """[A,N] -> [A,N/8]"""
    ordered = numbers.long().view(len(numbers), -1, 8)[..., list(AWQ_ORDER)]
    return (ordered << 4 * torch.arange(8)).sum(-1).to(torch.int32)


def as_published(key: str, weight: Tensor, kind: Kind) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a checkpoint, and the weight that they encode, exactly in float32. Libraries compute it in the
    dtype of scales, which is the same number rounded."""
    is_linear = any(part in key for part in ("_proj.", ".w1.", ".w2.", ".w3."))
    if weight.dim() != 2 or not is_linear or weight.shape[0] % 32 or weight.shape[1] % 32:
        return {key: weight}, weight.float()
    (rows, columns), bits = weight.shape, kind.bits
    size = columns if kind.group_size < 0 else kind.group_size
    q = torch.randint(1 << bits, (rows, columns))
    scales = (torch.rand(rows, -(-columns // size)) / 64 + 1e-3).to(kind.scales)
    zeros = torch.randint(1 << bits, scales.shape)
    if kind.symmetric:
        zeros.fill_(1 << (bits - 1))
    levels, by_column = (
        (q - zeros.repeat_interleave(size, 1)[:, :columns]),
        scales.repeat_interleave(size, 1)[:, :columns],
    )
    decoded = levels.float() * by_column.float()
    assert torch.equal(decoded.to(kind.scales), levels.to(kind.scales) * by_column)
    name = key.removesuffix("weight")
    if kind.method == "awq":
        return {
            f"{name}qweight": awq_words(q.mT), f"{name}qzeros": awq_words(zeros.mT), f"{name}scales": scales.mT
        }, decoded  # fmt: skip
    if kind.method == "gptq":
        stored = (zeros - int(kind.version == "gptq")) & (1 << bits) - 1
        order = torch.arange(columns, dtype=torch.int32) // size
        return {
            f"{name}qweight": words_of(q, bits).mT, f"{name}qzeros": words_of(stored.mT, bits),
            f"{name}scales": scales.mT, f"{name}g_idx": order,
        }, decoded  # fmt: skip
    tensors = {f"{name}weight_packed": words_of(q, 4), f"{name}weight_scale": scales}
    tensors[f"{name}weight_shape"] = torch.tensor([rows, columns])
    if not kind.symmetric:
        tensors[f"{name}weight_zero_point"] = words_of(zeros.mT, 4).mT
    return tensors, decoded


def publish(folder: Path, model_type: str, kind: Kind) -> nn.Module:
    """A checkpoint of a tiny random model. Returns the model with decoded weights, in float32."""
    tiny = tiny_config(CONFIG_MAPPING[model_type]).to_dict()
    sizes = {name: size for name, size in SIZES.items() if name in tiny}
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**{**tiny, **sizes})
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    published: dict[str, Tensor] = {}
    decoded: dict[str, Tensor] = {}
    for key, weight in load_file(file).items():
        tensors, numbers = as_published(key, weight, kind)
        published |= {name: tensor.contiguous() for name, tensor in tensors.items()}
        decoded[key] = numbers
    save_file(decoded, file, metadata={"format": "pt"})
    options: Any = {"dtype": torch.float32, "experts_implementation": "eager"}
    wanted: nn.Module = AutoModelForCausalLM.from_pretrained(folder, **options)
    save_file(published, file, metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"quantization_config": kind.config}))
    return wanted


@pytest.mark.parametrize(("kind", "model_type"), [*((kind, "qwen3_moe") for kind in KINDS), (KINDS[0], "mixtral")])
@pytest.mark.some(4)
def test_weights_are_the_decoded_ones(tmp_path: Path, kind: Kind, model_type: str) -> None:
    wanted = publish(tmp_path, model_type, kind)
    got = load_published(tmp_path, dtype=torch.float32)
    stored = [found for module in got.modules() if (found := stored_of(module)) is not None]
    form = Groups(kind.bits, max(kind.group_size, 0), kind.symmetric)
    assert [found.form for found in stored] == [form] * len(stored)
    inputs = example_inputs(wanted)
    logits = wanted(**inputs).logits
    assert (got(**inputs).logits - logits).abs().max() <= 2e-5 * logits.abs().max()  # sums of float32 in another order
    assert restore(got) == len(stored) > 0
    same_dtype = load_published(tmp_path, dtype=kind.scales)
    restore(same_dtype)
    models = got.named_parameters(), wanted.parameters(), same_dtype.parameters()
    for (name, ours), theirs, rounded in zip(*models, strict=True):
        assert torch.equal(ours, theirs), name
        assert torch.equal(rounded, theirs.to(kind.scales)), name


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_words_element_by_element(bits: int) -> None:
    words = torch.randint(-(2**31), 2**31, (3, 2 * bits), dtype=torch.int32)
    unpacked = _unpack(words, bits)
    for row in range(3):
        stream = sum((int(word) & 0xFFFFFFFF) << 32 * i for i, word in enumerate(words[row]))
        assert unpacked[row].tolist() == [stream >> bits * k & (1 << bits) - 1 for k in range(64)]
    if bits == 4:
        rows = _unpack_awq(words)
        for a, i, k in itertools.product(range(3), range(8), range(8)):
            assert rows[a, 8 * i + AWQ_ORDER[k]] == int(words[a, i]) >> 4 * k & 15


EXPERT = "model.layers.1.mlp.experts.5.up_proj"


def _config(**changes: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], Any]:
    return lambda tensors, config: config["quantization_config"].update(changes)


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Any]], Any], str]] = {
    "no scales": (lambda t, c: t.pop(f"{EXPERT}.scales"), r"missing .*gate_up_proj\.scales of expert 5, part 1"),
    "no words": (lambda t, c: t.pop(f"{EXPERT}.qweight"), "expert 5"),
    "shape": (lambda t, c: t.update({f"{EXPERT}.qzeros": t[f"{EXPERT}.qzeros"][1:].clone()}),
        r"expected shape \[2, 8\]"),
    "dtype": (lambda t, c: t.update({f"{EXPERT}.qweight": t[f"{EXPERT}.qweight"].float()}), "expected I32, got F32"),
    "another expert": (
        lambda t, c: t.update({f"{EXPERT.replace('.5.', '.9.')}.qweight": t[f"{EXPERT}.qweight"].clone()}),
        r"unexpected .*experts\.9\.up_proj"),
    "order": (lambda t, c: t[f"{EXPERT}.g_idx"].copy_(t[f"{EXPERT}.g_idx"].flip(0)),
        "gate_up_proj, expert 5: .g_idx"),
    "infinity": (lambda t, c: t[f"{EXPERT}.scales"].fill_(torch.inf), "expert 5: scales"),
    "precise scales": (lambda t, c: t.update({f"{EXPERT}.scales": t[f"{EXPERT}.scales"].float() + 1e-6}),
        "expert 5: scales"),
    "symmetric": (_config(sym=True), "expert 0"),
    "bits": (_config(bits=8), "path"),
    "other bits": (_config(bits=3), "expected shape"),
    "group": (_config(group_size=48), "path: expected group_size -1 or a multiple of 32 in config.json, got 48"),
    "format": (_config(checkpoint_format="marlin"), "path"),
    "awq": (_config(quant_method="awq", version="gemv"), "path"),
    "compressed": (_config(quant_method="compressed-tensors", format="dense"),
        "path"),
    "schemes": (_config(quant_method="compressed-tensors", format="pack-quantized", config_groups=[]),
        "path"),
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gptq")
    publish(folder, "qwen3_moe", Kind("gptq"))
    return folder


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.some(8)
def test_faults_are_named(path: Path, tmp_path: Path, fault: str) -> None:
    change, message = FAULTS[fault]
    tensors, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    change(tensors, config)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with raises(ValueError, message):
        load_published(tmp_path)


def test_a_state_dict_has_the_published_scales(path: Path) -> None:
    state, files = load_published(path).state_dict(), load_file(path / "model.safetensors")
    key = next(key for key in state if re.search(r"layers\.1\..*down_proj_scales$", key))
    published = files["model.layers.1.mlp.experts.5.down_proj.scales"]  # [G,N]; in blocks of 16 rows
    assert torch.equal(state[key][5].transpose(1, 2).reshape(-1, len(published)), published.mT)
