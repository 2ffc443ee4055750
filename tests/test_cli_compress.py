# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear compress`: its results load in transformers, it goes on after an interruption, it names mistakes."""

from __future__ import annotations

import errno
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import switchgear
from switchgear.cli import main

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    made = transformers.OlmoeForCausalLM(transformers.OlmoeConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_experts=6, num_experts_per_tok=2, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    ))  # fmt: skip
    made.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "LICENSE").write_text("free")
    (tmp_path / "code.txt").write_bytes(b"for i in range(10): print(i)\n" * 40)
    (tmp_path / "prose.txt").write_bytes(b"It was the best of times, it was the worst of times. " * 20)
    return tmp_path / "model"


def write(model: Path, *steps: dict[str, Any], **calibration: Any) -> str:
    path = model.parent / "recipe.json"
    how = {"text": ["code.txt", "prose.txt"], "tokens": 512, "length": 64} | calibration
    path.write_text(json.dumps({"calibration": how, "steps": steps}))
    return str(path)


def run(model: Path, recipe: str, *arguments: str) -> int:
    return main(["compress", str(model), "--recipe", recipe, "--out", str(model.parent / "small"), *arguments])


PRUNE = {"do": "prune_experts", "keep": 4, "criterion": "reap"}
QUANTIZE = {"do": "quantize", "bits": 4, "method": "gptq", "group_size": 32, "min_tokens": 1}


def test_a_recipe_gives_a_checkpoint_that_transformers_loads(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, write(model, PRUNE, QUANTIZE)) == 0
    printed = capsys.readouterr().out
    assert "4 of 6 experts kept by reap" in printed
    assert "bits by gptq" in printed
    small = model.parent / "small"
    assert not (model.parent / "small.partial").exists()
    assert (small / "LICENSE").read_text() == "free"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(small).eval()
    assert loaded.config.num_experts == 4
    for layer in loaded.model.layers:
        rows = layer.mlp.experts.down_proj.detach()[0]
        assert all(row[:32].unique().numel() <= 16 for row in rows)  # 4 bits
    x = torch.randint(256, (1, 20))
    with torch.no_grad():
        want = loaded(x).logits
        switchgear.accelerate(loaded)
        assert torch.allclose(loaded(x).logits, want, atol=1e-5)
    about = json.loads((small / "compression.json").read_text())
    assert [step["do"] for step in about["steps"]] == ["prune_experts", "quantize"]
    kept = about["steps"][0]["result"]["layers"]["model.layers.0.mlp"]["kept"]
    original = transformers.AutoModelForCausalLM.from_pretrained(model)
    gate = original.model.layers[0].mlp.gate.weight[kept]
    assert torch.equal(loaded.model.layers[0].mlp.gate.weight, gate)
    assert str(model.parent) not in (small / "compression.json").read_text()


def test_merging_by_a_recipe(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model, write(model, {"do": "merge_experts", "keep": 4})) == 0
    assert "merge_experts: " in capsys.readouterr().out
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model.parent / "small")
    assert loaded.config.num_experts == 4


def test_bits_by_expert_keep_their_average(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = {"do": "quantize", "bits": {"of": [1, 2, 3], "average": 2}, "group_size": 32}
    assert run(model, write(model, mixed)) == 0
    assert "at 2.00 bits" in capsys.readouterr().out


def test_bits_by_expert_within_a_tolerance(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = {"do": "quantize", "bits": {"of": [1, 2, 4], "tolerance": 1e9}, "group_size": 32}
    assert run(model, write(model, mixed)) == 0
    assert "at 1.00 bits" in capsys.readouterr().out


def test_a_stored_step_before_a_calibrated_one(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = {"do": "quantize", "bits": 4, "group_size": 32, "store": True}
    assert run(model, write(model, stored, {"do": "prune_experts", "keep": 4})) == 0
    assert "4 of 6 experts kept" in capsys.readouterr().out


def test_the_recipe_of_a_result_is_one(model: Path) -> None:
    from switchgear.cli.compress.work import parse

    found = parse({"calibration": {"text": ["code.txt"]}, "steps": [PRUNE]}, model.parent)
    assert parse(found.as_dict(), model.parent) == found


def test_bits_by_layer_need_no_text(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_layer = {"do": "quantize", "bits": {"model.layers.0.mlp": 2, "model.layers.1.mlp": 4}, "group_size": 32}
    assert run(model, write(model, by_layer, text=[])) == 0
    assert "at 3.00 bits" in capsys.readouterr().out


def test_an_interrupted_run_goes_on(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from switchgear import compress
    from switchgear.cli.compress import work

    recipe = write(model, PRUNE, QUANTIZE)
    assert run(model, recipe) == 0
    small = model.parent / "small"
    want = {file.name: file.read_bytes() for file in small.iterdir()}
    small.rename(model.parent / "before")

    @functools.wraps(compress.quantize)
    def stopped(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compress, "quantize", stopped)
        assert run(model, recipe) == 130
    assert not small.exists()
    calls = []
    monkeypatch.setattr(work, "calibrate", lambda *args, **options: calls.append(args))
    assert run(model, recipe) == 0  # neither prunes nor calibrates again
    assert "continuing after step 1 of 2" in capsys.readouterr().out
    assert not calls
    assert {file.name: file.read_bytes() for file in small.iterdir()} == want


def test_another_recipe_begins_anew(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from switchgear.cli.compress import work

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(work.Partial, "finish", full)
        assert run(model, write(model, PRUNE)) == 2
    assert (model.parent / "small.partial").exists()
    other = {"do": "prune_experts", "keep": 3, "criterion": "frequency"}
    assert run(model, write(model, other)) == 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model.parent / "small")
    assert loaded.config.num_experts == 3


def test_a_run_that_ended_after_its_result_begins_anew(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last model has become OUT, so there is nothing to go on with."""
    from switchgear.cli.compress import work

    with monkeypatch.context() as patch:
        patch.setattr(work.Partial, "_remove", lambda self: None)  # killed
        assert run(model, write(model, PRUNE)) == 0
    (model.parent / "small").rename(model.parent / "first")
    assert run(model, write(model, PRUNE)) == 0
    assert (model.parent / "small/config.json").read_bytes() == (model.parent / "first/config.json").read_bytes()
    assert not (model.parent / "small.partial").exists()


def test_a_full_disk_leaves_no_checkpoint(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(self: Any, folder: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    assert run(model, write(model, PRUNE)) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (model.parent / "small").exists()


def test_a_half_copied_file_is_copied_again(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(source: Path, target: Path) -> None:
        target.write_text("fr")
        raise OSError(errno.ENOSPC, "No space left on device", str(source), None, str(target))

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", full)
        assert run(model, write(model, PRUNE)) == 2
    partial = model.parent / "small.partial"
    assert f"cannot write {partial / 'step-1' / 'LICENSE'}" in capsys.readouterr().err
    (partial / "step-1" / "LICENSE.unfinished").write_text("fr")  # killed
    assert run(model, write(model, PRUNE)) == 0
    small = model.parent / "small"
    assert (small / "LICENSE").read_text() == "free"
    assert not list(small.glob("*.unfinished"))


def test_a_folder_of_something_else_is_left_alone(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    partial = model.parent / "small.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("years of work")
    assert run(model, write(model, PRUNE)) == 2
    assert "left as it is" in capsys.readouterr().err
    assert (partial / "thesis.txt").exists()


@pytest.mark.parametrize("link", ["small.partial", "small.partial/step-1", "small.partial/journal.json"])
def test_a_planted_link_is_not_followed(link: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model.parent / "mine").mkdir()
    (model.parent / link).parent.mkdir(exist_ok=True)
    (model.parent / link).symlink_to(model.parent / "mine")
    assert run(model, write(model, PRUNE), "--fresh") == 2
    assert "small.partial" in capsys.readouterr().err
    assert not list((model.parent / "mine").iterdir())


@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
def test_a_folder_of_another_command_is_left_alone(
    fresh: list[str], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = model.parent / "small.partial"
    partial.mkdir()
    for journal in ({"identity": "0" * 64, "shards": {}}, {"command": "convert", "steps": [], "calibrations": []}, []):
        (partial / "journal.json").write_text(json.dumps(journal))
        (partial / "model-00001-of-00009.safetensors").write_bytes(b"half of it")
        before = {file.name: file.read_bytes() for file in partial.iterdir() if file.name != "lock"}
        assert run(model, write(model, PRUNE), *fresh) == 2
        assert "left as it is" in capsys.readouterr().err
        assert {file.name: file.read_bytes() for file in partial.iterdir() if file.name != "lock"} == before


def test_only_what_the_command_wrote_is_deleted(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from switchgear.cli.compress import work

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    partial = model.parent / "small.partial"
    with monkeypatch.context() as patch:
        patch.setattr(work.Partial, "finish", full)
        assert run(model, write(model, PRUNE)) == 2
    (partial / "thesis.txt").write_text("years of work")
    assert run(model, write(model, PRUNE), "--fresh") == 0
    assert [file.name for file in partial.iterdir()] == ["thesis.txt"]


def test_one_run_at_a_time(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from switchgear.cli.compress import work

    codes, real = [], work.Partial.finish

    def meanwhile(*args: Any) -> None:
        monkeypatch.setattr(work.Partial, "finish", real)
        before = sorted((model.parent / "small.partial").iterdir())
        codes.extend(run(model, write(model, PRUNE), *fresh) for fresh in ([], ["--fresh"]))
        assert sorted((model.parent / "small.partial").iterdir()) == before
        real(*args)

    monkeypatch.setattr(work.Partial, "finish", meanwhile)
    assert run(model, write(model, PRUNE)) == 0
    assert codes == [2, 2]
    assert "another process" in capsys.readouterr().err
    assert not (model.parent / "small.partial").exists()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "recipe: expected an object"),
        ('{"step": []}', "recipe: expected calibration, steps, got 'step'"),
        ('{"steps": []}', "recipe: steps: expected a list of at least one"),
        ('{"steps": [{"do": "shrink"}]}', "recipe: steps[0]: do: expected one of prune_experts"),
        ('{"steps": [{"do": "prune_experts", "kep": 4}]}', "recipe: steps[0]: expected options of prune_experts (keep"),
        ('{"steps": [{"do": "prune_experts"}]}', "missing a required argument: 'keep'"),
        (
            '{"steps": [{"do": "prune_experts", "keep": 99, "criterion": "random"}]}',
            "recipe: steps[0]: prune_experts: keep",
        ),
        ('{"steps": [{"do": "prune_experts", "keep": 4}]}', "calibration.text: expected files"),
        ('{"calibration": {"length": 1}, "steps": [{"do": "quantize"}]}', "calibration.length: expected"),
        ('{"calibration": {"tokens": true}, "steps": [{"do": "quantize"}]}', "calibration.tokens: expected"),
        ('{"calibration": {"text": "a"}, "steps": [{"do": "quantize"}]}', "calibration.text: expected a list"),
        ('{"steps": [{"do": "quantize", "bits": {"average": 2, "width": 3}}]}', "bits: expected of, average"),
        ('{"steps": [{"do": "quantize", "bits": {"of": [1, 2], "avrage": 2}}]}', "bits: expected of, average"),
    ],
)
def test_a_wrong_recipe_is_named(recipe: str, message: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = model.parent / "recipe.json"
    path.write_text(recipe)
    assert run(model, str(path)) == 2
    assert message in capsys.readouterr().err
    assert not (model.parent / "small").exists()


def test_a_truncated_shard_is_named(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert run(model, write(model, PRUNE)) == 2
    assert "cannot load" in capsys.readouterr().err
    assert sorted(path.name for path in model.parent.iterdir()) == ["code.txt", "model", "prose.txt", "recipe.json"]


def with_pictures(folder: Path) -> None:
    """A checkpoint whose causal language model is a part of it."""
    config = transformers.Llama4Config(
        text_config={
            "vocab_size": 256, "hidden_size": 16, "intermediate_size": 16, "intermediate_size_mlp": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
            "num_local_experts": 4, "interleave_moe_layer_step": 1, "pad_token_id": 0,
        },
        vision_config={
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
            "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16, "image_size": 28,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.Llama4ForConditionalGeneration(config).save_pretrained(folder)


def test_all_parts_of_a_model_are_written(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    with_pictures(tmp_path / "model")
    beside = (
        "tokenizer.model", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
        "chat_template.json", "additional_chat_templates/tools.jinja",
    )  # fmt: skip
    (tmp_path / "model" / "additional_chat_templates").mkdir()
    for name in beside:
        (tmp_path / "model" / name).write_text(f"the text of {name}")
    random = {"do": "prune_experts", "keep": 2, "criterion": "random"}
    assert run(tmp_path / "model", write(tmp_path / "model", random, text=[])) == 0
    want, got = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "small"))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want if "feed_forward" not in key)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["architectures"] == ["Llama4ForConditionalGeneration"]
    assert config["text_config"]["num_local_experts"] == 2
    assert all((tmp_path / "small" / name).read_text() == f"the text of {name}" for name in beside)


def test_a_step_that_the_model_refuses_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    recipe = write(tmp_path / "model", {"do": "quantize", "bits": 4}, text=[])
    assert run(tmp_path / "model", recipe) == 2
    assert "recipe: steps[0]: quantize: model: expected" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "recipe.json"]


def test_a_link_that_leads_nowhere_is_in_the_way(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder cannot replace it; that is said before the work."""
    (model.parent / "small").symlink_to("nowhere")
    recipe = write(model, PRUNE)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", lambda *_: pytest.fail("loaded"))
    commands = (
        ["compress", str(model), "--recipe", recipe], ["offload-store", str(model)],
        ["convert", str(model), "--operation", "split"],
    )  # fmt: skip
    for command in commands:
        assert main([*command, "--out", str(model.parent / "small")]) == 2
        assert "--out: expected a folder that does not exist, got" in capsys.readouterr().err
    assert not (model.parent / "small.partial").exists()


def test_tensors_that_would_be_lost_are_named(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    file = model / "model.safetensors"
    save_file({**load_file(file), "vision.weight": torch.ones(2)}, file, {"format": "pt"})
    assert run(model, write(model, PRUNE)) == 2
    assert "expected tensors of OlmoeForCausalLM alone, got 1 others, such as vision.weight" in capsys.readouterr().err
    assert not (model.parent / "small.partial").exists()
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["OwnForCausalLM"]}))
    assert run(model, write(model, PRUNE)) == 2
    assert "expected a class of transformers, got OwnForCausalLM" in capsys.readouterr().err


def test_an_error_of_the_model_itself_is_named(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise AttributeError("no such output")

    monkeypatch.setattr(transformers.OlmoeForCausalLM, "forward", broken)
    assert run(model, write(model, PRUNE)) == 2
    assert "cannot calibrate: AttributeError: no such output" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("step", "argument"),
    [
        ({"do": "prune_experts", "keep": 0}, "keep"),
        ({"do": "prune_experts", "keep": 1.5}, "keep"),
        ({"do": "prune_experts", "keep": True}, "keep"),
        ({"do": "prune_experts", "keep": {"model.layers.0.mlp": [-1]}}, "keep"),
        ({"do": "prune_experts", "keep": 4, "criterion": "reep"}, "criterion"),
        ({"do": "prune_experts", "keep": 4, "scope": "all"}, "scope"),
        ({"do": "prune_experts", "keep": 4, "seed": "a"}, "seed"),
        ({"do": "merge_experts", "keep": 4, "router": ["keep"]}, "router"),
        ({"do": "merge_experts", "keep": 4, "align": "yes"}, "align"),
        ({"do": "prune_weights", "sparsity": 1.0}, "sparsity"),
        ({"do": "prune_weights", "metric": None}, "metric"),
        ({"do": "quantize", "bits": 9}, "bits"),
        ({"do": "quantize", "bits": 8, "store": True}, "bits"),
        ({"do": "quantize", "bits": {"model.layers.0.mlp": [3, 0]}}, "bits"),
        ({"do": "quantize", "bits": {"average": "two"}}, "average"),
        ({"do": "quantize", "bits": {"of": [3, 0], "average": 2}}, "of"),
        ({"do": "quantize", "bits": 3, "group_size": 33}, "group_size"),
        ({"do": "quantize", "bits": 3, "method": "gtpq"}, "method"),
        ({"do": "quantize", "bits": 3, "damping": -1}, "damping"),
    ],
)
def test_a_wrong_value_is_named_before_the_model_is_loaded(
    step: dict[str, Any], argument: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in model.glob("*.safetensors"):
        file.unlink()
    assert run(model, write(model, PRUNE, step)) == 2
    assert f"recipe: steps[1]: {step['do']}: {argument}" in capsys.readouterr().err
    assert not (model.parent / "small.partial").exists()
