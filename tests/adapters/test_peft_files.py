# SPDX-License-Identifier: BSD-3-Clause
"""load_peft and save_peft: files that PEFT wrote, both layouts of PEFT's history, and files that are refused.

Round trips of every model type are in test_lora_models.py.
"""

import copy
import json
import re
import warnings
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import switchgear
from errors import raises
from full_disk import full_disk
from switchgear.adapters import add_lora, add_lora_experts, load_peft, lora_of, remove_lora, save_peft
from switchgear.adapters.peft_format import _matches, read_lora
from switchgear.integrations.transformers import accelerate
from tiny_models import build, example_inputs

peft = pytest.importorskip("peft", reason="peft is not installed")
safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
WRITTEN = {
    "mixtral": BOTH,
    "gpt_oss": BOTH,
    "nemotron_h": ["experts.up_proj", "experts.down_proj"],
    "llama4_text": BOTH,
    "longcat_flash": BOTH,
    "step3p7": ["experts.down_proj"],
    "jetmoe": ["mlp.input_linear.weight", "mlp.output_linear.weight"],
}


def written_by_peft(model: nn.Module, path: Path, **options: Any) -> Tensor:
    """Saves random adapters; returns the logits of PEFT's model, without switchgear."""
    torch.manual_seed(1)
    config = peft.LoraConfig(**({"init_lora_weights": False, "target_modules": []} | options))
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    wrapped.save_pretrained(path)
    logits: Tensor = next(iter(wrapped(**example_inputs(model)).values()))
    return logits.detach()


def logits_of(model: nn.Module) -> Tensor:
    logits: Tensor = next(iter(model(**example_inputs(model)).values()))
    return logits.detach()


@pytest.mark.parametrize("model_type", WRITTEN)
@pytest.mark.parametrize("options", [{"r": 2, "lora_alpha": 6}, {"r": 3, "use_rslora": True}], ids=["plain", "rslora"])
def test_files_of_peft(model_type: str, options: dict[str, Any], tmp_path: Path) -> None:
    base = build(model_type)
    want = written_by_peft(base, tmp_path / "theirs", target_parameters=WRITTEN[model_type], **options)
    accelerate(base)
    load_peft(base, tmp_path / "theirs")
    assert (logits_of(base) - want).abs().max() < 1e-4 * want.abs().max()
    save_peft(base, tmp_path / "ours")
    ours, theirs = (safetensors.load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    if model_type != "longcat_flash":  # PEFT also adapts rows that no expert uses
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def test_ranks_and_alphas_of_single_parameters(tmp_path: Path) -> None:
    base = build("mixtral")
    patterns = {
        "rank_pattern": {"experts.down_proj": 5}, "alpha_pattern": {r"layers\.1\.mlp\.experts\.gate_up_proj": 9},
    }  # fmt: skip
    want = written_by_peft(base, tmp_path / "theirs", r=2, lora_alpha=4, target_parameters=BOTH, **patterns)
    accelerate(base)
    load_peft(base, tmp_path / "theirs")
    assert (logits_of(base) - want).abs().max() < 1e-4 * want.abs().max()
    assert {(a.options.rank, a.options.alpha) for a in lora_of(base).values()} == {(2, 4.0), (5, 4.0), (2, 9.0)}
    save_peft(base, tmp_path / "ours")
    wrapped = peft.PeftModel.from_pretrained(build("mixtral"), tmp_path / "ours")
    assert (logits_of(wrapped.get_base_model()) - want).abs().max() < 1e-4 * want.abs().max()


def test_names_do_not_start_at_the_wrapper_of_other_modules(tmp_path: Path) -> None:
    base = build("mixtral")
    accelerate(base)
    for parameter in add_lora(base, 2, alpha=3):
        nn.init.normal_(parameter)
    save_peft(base, tmp_path / "bare")
    saved = [adapter.a for adapter in lora_of(base).values()]
    remove_lora(base)
    wrapped = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    load_peft(wrapped, tmp_path / "bare")
    assert all(torch.equal(*pair) for pair in zip([x.a for x in lora_of(wrapped).values()], saved, strict=True))
    save_peft(wrapped, tmp_path / "wrapped")
    first, other = (safetensors.load_file(tmp_path / to / "adapter_model.safetensors") for to in ("bare", "wrapped"))
    assert first.keys() == other.keys()
    assert all(torch.equal(first[key], other[key]) for key in first)
    first, other = ((tmp_path / to / "adapter_config.json").read_text() for to in ("bare", "wrapped"))
    assert first == other


def test_linear_layers_of_single_experts(tmp_path: Path) -> None:
    base = build("switch_transformers")
    modules = r".*\.experts\.expert_\d+\.(wi|wo)"
    want = written_by_peft(base, tmp_path, r=2, target_modules=modules)
    accelerate(base)
    load_peft(base, tmp_path)
    assert (logits_of(base) - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_layouts_of_earlier_versions(square: bool, transposed: bool, tmp_path: Path) -> None:
    """PEFT before 0.19 took [E,d1,d2] for [E,in,out], so that W + Aᵀ·Bᵀ. Only the version tells if d1 = d2."""
    torch.manual_seed(0)
    hidden, inner, rank = 64, 64 if square else 32, 3
    net = nn.Sequential(switchgear.MoE(hidden, inner, 4, 2, gated=False, transposed=transposed))
    parameter = net[0].experts.down_proj
    count, d1, d2 = parameter.shape
    a, b = torch.randn(count * rank, d1), torch.randn(d2, rank * count)
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_parameters": ["experts.down_proj"],
        "target_modules": [], "peft_version": "0.18.1",
    }  # fmt: skip
    name = "base_model.model.0.experts.lora_{}.weight"
    safetensors.save_file({name.format("A"): a, name.format("B"): b}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    want = copy.deepcopy(net)
    with torch.no_grad():
        delta = torch.einsum("ore,eri->eio", b.view(d2, rank, count), a.view(count, rank, d1))
        want[0].experts.down_proj += delta
    load_peft(net, tmp_path)
    x = torch.randn(7, hidden)
    torch.testing.assert_close(net(x), want(x), rtol=1e-4, atol=1e-4)


def ours(path: Path) -> nn.Module:
    net = build("mixtral")
    accelerate(net)
    torch.manual_seed(2)
    for parameter in add_lora(net, 2):
        nn.init.normal_(parameter)
    save_peft(net, path)
    return net


def test_bfloat16_and_a_chosen_dtype(tmp_path: Path) -> None:
    net = build("mixtral").bfloat16()
    accelerate(net)
    for parameter in add_lora(net, 2):
        nn.init.normal_(parameter)
    save_peft(net, tmp_path)
    other = build("mixtral").bfloat16()
    accelerate(other)
    load_peft(other, tmp_path, dtype=torch.float32)
    for got, want in zip(lora_of(other).values(), lora_of(net).values(), strict=True):
        assert got.a.dtype is torch.float32
        assert torch.equal(got.a, want.a.float())


def stored_experts(form: str) -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(switchgear.MoE(64, 64, 4, 2))
    if form != "plain":
        switchgear.store(net, form)
    return net


@pytest.mark.parametrize(
    ("saved", "now", "named"),
    [
        ("nf4", "plain", ("nf4", "plain")),
        ("plain", "nf4", ("plain", "nf4")),
        ("int4", "nf4", ("int4", "nf4")),
        ("nf4", "nf4", None),
        ("plain", "panels", None),
        ("panels", "plain", None),
    ],
)
def test_another_form_of_the_base_warns(saved: str, now: str, named: tuple[str, str] | None, tmp_path: Path) -> None:
    """Lossless forms count as plain: their weights have the same bits."""
    base = stored_experts(saved)
    add_lora(base, 2)
    save_peft(base, tmp_path)
    other = stored_experts(now)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_peft(other, tmp_path)
    assert len(lora_of(other)) == 2
    assert [w.category for w in caught] == ([] if named is None else [RuntimeWarning])
    if named is not None:
        assert all(form in str(caught[0].message) for form in named)
        assert caught[0].filename == __file__


def test_files_of_torch_save_and_negative_alphas(tmp_path: Path) -> None:
    net = switchgear.MoE(24, 8, 3, 2)  # not square: the file of torch.save does not say who wrote it
    add_lora(net, 2, alpha=-3.0)
    for parameter in (p for name, p in net.named_parameters() if name.endswith("lora_B")):
        nn.init.normal_(parameter)
    save_peft(net, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    torch.save(safetensors.load_file(file), tmp_path / "adapter_model.bin")
    file.unlink()
    other = switchgear.MoE(24, 8, 3, 2)
    load_peft(other, tmp_path)
    for name, adapter in lora_of(net).items():
        assert lora_of(other)[name].options == adapter.options
        assert torch.equal(lora_of(other)[name].b, adapter.b)


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(path: Path, change: Any) -> None:
    file = path / "adapter_model.safetensors"
    tensors = safetensors.load_file(file)
    change(tensors)
    safetensors.save_file(tensors, file)


FIRST = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"


def rename(tensors: dict[str, Tensor]) -> None:
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = tensors[FIRST].clone()


def with_nan(tensors: dict[str, Tensor]) -> None:
    tensors[FIRST][0, 0] = float("nan")


def fewer_experts(tensors: dict[str, Tensor]) -> None:
    tensors[FIRST] = tensors[FIRST][2:].clone()


def as_integers(tensors: dict[str, Tensor]) -> None:
    tensors[FIRST] = tensors[FIRST].int()


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda path: edit_tensors(path, rename), "path"),
        (lambda path: edit_tensors(path, with_nan), FIRST),
        (lambda path: edit_tensors(path, fewer_experts), "base_model.model.model.layers.0.mlp.experts.base_layer"),
        (lambda path: edit_tensors(path, as_integers), FIRST),
        (lambda path: edit_tensors(path, lambda t: t.pop(FIRST)), FIRST),
        (lambda path: edit_config(path, r=3), "base_model.model.model.layers.0.mlp.experts.base_layer"),
        (lambda path: edit_config(path, r=0), "r"),
        (lambda path: edit_config(path, lora_dropout=1.5), "lora_dropout"),
        (lambda path: edit_config(path, rank_pattern={"(": 2}), "rank_pattern"),
        (lambda path: edit_config(path, alpha_pattern={"(a+)+": 2}), "alpha_pattern"),
        (lambda path: edit_config(path, r=None), "r"),
        (lambda path: edit_config(path, lora_alpha="2"), "lora_alpha"),
        (lambda path: edit_config(path, init_lora_weights="pissa"), "init_lora_weights"),
        (lambda path: edit_config(path, use_dora=True), "use_dora"),
        (lambda path: edit_config(path, peft_type="IA3"), "peft_type"),
        (lambda path: edit_config(path, target_parameters="experts"), "target_parameters"),
        (lambda path: edit_config(path, target_parameters=[]), "path"),
        (lambda path: edit_config(path, rank_pattern={"down_proj": "2"}), "rank_pattern"),
        (lambda path: (path / "adapter_config.json").write_text("{"), "path"),
        (lambda path: (path / "adapter_config.json").unlink(), "path"),
        (lambda path: (path / "adapter_model.safetensors").unlink(), "path"),
        (lambda path: (path / "adapter_model.safetensors").write_bytes(b"x" * 99), "path"),
    ],
)  # fmt: skip
def test_refused_files(spoil: Any, match: str, tmp_path: Path) -> None:
    ours(tmp_path)
    spoil(tmp_path)
    net = build("mixtral")
    accelerate(net)
    before = [(name, id(p), p.requires_grad) for name, p in net.named_parameters()]
    with raises(ValueError, match):
        load_peft(net, tmp_path)
    assert [(name, id(p), p.requires_grad) for name, p in net.named_parameters()] == before
    assert lora_of(net) == {}


@pytest.mark.parametrize("pattern", ["(" + "a|a" * 9 + ")*b", "(.*)*$b", r"([a-z_]+\.?)+!", "(a|b|ab)*c", "a" * 2000])
def test_patterns_that_take_years_are_refused(pattern: str) -> None:
    state = {"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa.lora_A.weight": torch.ones(2, 4)}
    with raises(ValueError, "rank_pattern"):
        read_lora((state, {"lora_alpha": 4, "rank_pattern": {pattern: 2}}))


def test_patterns_match_as_python_s() -> None:
    """Also those for which `re` tries each way to match after the other."""
    parts = ["a", "b", ".", r"\.", "[ab]", "[^a]", r"\d", "a*", ".*?", "b{1,2}", "(a|b.)", "(?:a|ab)?", "^", "$", "|"]
    random = Random(0)
    for _ in range(500):
        pattern = "".join(random.choices(parts, k=random.randint(1, 5)))
        for name in ("".join(random.choices("ab1.", k=random.randint(0, 7))) for _ in range(5)):
            assert _matches(pattern, name) == bool(re.match(rf"(.*\.)?({pattern})$", name)), (pattern, name)
    assert not _matches("(a|a)" * 150 + "b", "a" * 999)
    assert not _matches(".*" * 100 + "b", "a" * 999)


def test_a_file_that_asks_for_more_than_it_has(tmp_path: Path) -> None:
    """4 KB that describe a tensor of 256 GiB."""
    ours(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({FIRST: torch.zeros(1).expand(1 << 18, 1 << 18)}, tmp_path / "adapter_model.bin")
    net = build("mixtral")
    accelerate(net)
    with raises(ValueError, "path"):
        load_peft(net, tmp_path)
    with raises(ValueError, "adapter"):
        read_lora(tmp_path)


def test_shapes_are_compared_before_numbers_are_read(tmp_path: Path) -> None:
    ours(tmp_path)
    edit_tensors(tmp_path, with_nan)
    edit_config(tmp_path, r=3)
    net = build("mixtral")
    accelerate(net)
    with raises(ValueError, "rank"):
        load_peft(net, tmp_path)


def test_a_failed_save_keeps_the_earlier_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of them, although the tensors are written before the configuration fails."""
    net = ours(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(safetensors, "save_file", lambda tensors, path, metadata: Path(path).write_bytes(b"tensors"))
    with full_disk(), raises(OSError):
        save_peft(net, tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_path_of_another_type() -> None:
    with raises(TypeError, "path"):
        load_peft(switchgear.MoE(8, 8, 2, 1), 5)  # type: ignore[arg-type]


def test_refused_models(tmp_path: Path) -> None:
    net = ours(tmp_path)
    with raises(ValueError):
        load_peft(net, tmp_path)
    other = build("nemotron_h")
    accelerate(other)
    with raises(ValueError):
        load_peft(other, tmp_path)
    assert lora_of(other) == {}
    with raises(ValueError, "model"):
        save_peft(other, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    mixed = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    add_lora_experts(mixed, 2, 1, targets=["1"])
    with raises(ValueError, "model"):
        save_peft(mixed, tmp_path / "other")
    experts = switchgear.Experts(64, 32, 4)
    add_lora(experts, 2)
    with raises(ValueError, "model"):
        save_peft(experts, tmp_path / "other")
