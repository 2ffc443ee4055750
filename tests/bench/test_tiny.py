# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear train-tiny`, with a few steps: the text, the training, the conditions, the folder."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import raises
from switchgear.cli import main
from switchgear.cli.common import CommandError
from switchgear_bench.tiny import text
from switchgear_bench.tiny.cache import load, newest, save
from switchgear_bench.tiny.sensitivity import Sensitivity
from switchgear_bench.tiny.text import DOMAINS, Domain, evenly, load_domain, load_domains, windows

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

FEW = Sensitivity(
    {"a": 1.0}, busiest=[0.1, 0.2], all_busiest=0.3, by_frequency=0.2, at_random=[0.5, 0.55, 0.6], between_domains=0.3,
    within_domains=0.1,
)  # fmt: skip


@pytest.fixture
def domains() -> list[Domain]:
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(32 * i, 32 * i + 32, (2, 4096), generator=generator, dtype=torch.uint8) for i in range(4)]
    return [Domain(name, "of the test", *rows) for name, rows in zip("abcd", texts, strict=True)]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, domains: list[Domain], tmp_path: Path) -> None:
    """A smaller model on a text of its own, with the cache in the test's folder."""
    from switchgear_bench.tiny import model

    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setattr(model, "CONFIG", model.CONFIG | sizes | {"num_key_value_heads": 2, "num_experts": 4})
    monkeypatch.setattr(text, "load_domains", lambda: domains)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_text_is_real_the_same_each_time_and_kept_apart() -> None:
    first, again = load_domains(), load_domains()
    assert [domain.name for domain in first] == list(DOMAINS) == ["python", "english", "c", "perl"]
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.train, other.train)
        assert torch.equal(one.held_out, other.held_out)
        assert one.train.numel() >= text.ENOUGH
        assert one.held_out.numel() >= 2**13
        piece = bytes(one.held_out[:200].tolist())
        assert piece not in bytes(one.train.tolist()) or one.name == "c"  # headers share their licence


def test_a_missing_source_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Any:
        raise ImportError("no such text")

    there = ("twenty pieces", lambda: iter([bytes([i]) * 2**15 for i in range(20)]))
    monkeypatch.setitem(DOMAINS, "perl", (("absent", absent), ("short", lambda: iter([b"x"])), there))
    domain = load_domain("perl")
    assert domain.source == "twenty pieces"
    assert domain.held_out.unique().tolist() == [19]
    monkeypatch.setitem(DOMAINS, "perl", (("absent", absent),))
    with raises(CommandError):
        load_domain("perl")


def test_windows() -> None:
    data = torch.arange(100, dtype=torch.uint8)
    for taken in (windows(data, 3, 10, torch.Generator().manual_seed(1)), evenly(data, 3, 10)):
        assert torch.equal(taken - taken[:, :1], torch.arange(10).expand(3, 10))
    assert evenly(data, 3, 10)[:, 0].tolist() == [0, 45, 90]
    with raises(CommandError):
        evenly(data, 1, 101)


@pytest.mark.usefixtures("small")
def test_training_balances_each_layer_over_the_whole_batch(domains: list[Domain]) -> None:
    from switchgear.routing import load_balancing_loss
    from switchgear_bench.tiny.model import build, gates_of
    from switchgear_bench.tiny.train import losses

    model = build(0)
    batch = torch.cat([windows(d.train, 1, 16, torch.Generator().manual_seed(0)) for d in domains])
    cross_entropy, balance = losses(model, batch)
    out = model(input_ids=batch, labels=batch, output_router_logits=True, use_cache=False)
    assert float(cross_entropy.detach()) == pytest.approx(
        float((out.loss - model.config.router_aux_loss_coef * out.aux_loss).detach())
    )
    layers = [load_balancing_loss(logits, logits.topk(2).indices) for logits in out.router_logits]
    assert float(balance.detach()) == pytest.approx(float(torch.stack(layers).detach().mean()))
    torch.autograd.backward(balance)
    assert all(gate.weight.grad is not None for gate in gates_of(model))


@pytest.mark.usefixtures("small")
def test_a_command_trains_once_and_writes_a_checkpoint(
    capsys: pytest.CaptureFixture[str], domains: list[Domain]
) -> None:
    assert main(["train-tiny", "--steps", "2"]) in (0, 1)
    printed = capsys.readouterr()
    assert "training: 2 of 2" in printed.err
    assert "without each layer's busiest expert the loss grows by" in printed.out
    tiny = newest()
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.folder)  # unmodified transformers
    x = evenly(domains[0].held_out, 2, 32)
    with torch.no_grad():
        assert torch.allclose(model(x).logits, tiny.model()(x).logits, atol=1e-5)
    assert [torch.equal(ours.held_out, theirs.held_out) for ours, theirs in zip(tiny.domains, domains, strict=True)]
    assert str(tiny.folder.parent) not in (tiny.folder / "tiny.json").read_text()
    before = (tiny.folder / "tiny.json").stat().st_mtime_ns
    main(["train-tiny", "--steps", "2"])
    assert "in the cache" in capsys.readouterr().out
    assert (tiny.folder / "tiny.json").stat().st_mtime_ns == before
    main(["train-tiny", "--steps", "1"])
    assert len(list(tiny.folder.parent.iterdir())) == 2  # another recipe, another place


@pytest.mark.usefixtures("small")
def test_pruned_experts_are_those_that_no_token_chooses() -> None:
    from switchgear_bench.tiny.model import build, gates_of
    from switchgear_bench.tiny.sensitivity import without

    model = build(0)
    ids = []
    hook = gates_of(model)[1].register_forward_hook(lambda *seen: None)
    x = torch.randint(256, (2, 30))
    with torch.no_grad():
        before = model(x).logits
        with without(model, {1: torch.tensor([0, 3])}):
            seen = gates_of(model)[1].register_forward_hook(lambda module, args, output: ids.append(output))
            changed = model(x).logits
            seen.remove()
        after = model(x).logits
    hook.remove()
    assert set(ids[0][2].unique().tolist()) <= {1, 2}
    assert torch.allclose(ids[0][1].sum(-1), torch.ones(60))
    assert not torch.equal(before, changed)
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("changes", "condition"),
    [
        ({"all_busiest": 0.09}, 0),
        ({"by_frequency": 0.51}, 1),  # 0.04 from the mean of the random ones, whose deviation is 0.05
        ({"at_random": [0.25, 0.25, 0.25], "by_frequency": 0.25}, 1),
        ({"within_domains": 0.2}, 2),
    ],
)
def test_each_condition_can_fail(changes: dict[str, Any], condition: int) -> None:
    assert FEW.accepted
    changed = replace(FEW, **changes)
    assert [not holds for holds in changed.conditions().values()] == [i == condition for i in range(3)]
    assert not changed.accepted


def test_a_gain_has_its_sign() -> None:
    assert "by frequency: -0.250 nat, at random +" in [*replace(FEW, by_frequency=-0.25).conditions()][1]


@pytest.mark.usefixtures("small")
def test_a_full_disk_leaves_what_was_there(
    domains: list[Domain], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from switchgear_bench.tiny.model import build
    from switchgear_bench.tiny.train import QUICK

    model, folder = build(0), tmp_path / "model"
    save(model, QUICK, domains, FEW, folder)
    (folder / "mark").touch()

    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with raises(CommandError):
        save(model, QUICK, domains, FEW, folder)
    assert (folder / "mark").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.usefixtures("small")
def test_a_trained_model_stays_if_it_cannot_replace_another(
    domains: list[Domain], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from switchgear_bench.tiny.model import build
    from switchgear_bench.tiny.train import QUICK

    model, folder = build(0), tmp_path / "model"
    save(model, QUICK, domains, FEW, folder)
    (folder / "mark").touch()
    rename = Path.rename

    def busy(path: Path, target: Path) -> Path:
        if target == folder and not path.name.endswith("-before"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", busy)
    with raises(CommandError) as error:
        save(model, QUICK, domains, FEW, folder)
    assert (folder / "mark").exists()
    assert load(str(error.value).rpartition(" ")[2]).domains
    assert len(list(tmp_path.iterdir())) == 2
    (folder / "tiny.json").unlink()  # while the model was trained
    with raises(CommandError):
        save(model, QUICK, domains, FEW, folder)


@pytest.mark.usefixtures("small")
def test_an_earlier_model_is_not_taken_for_another(
    domains: list[Domain], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from switchgear_bench.tiny import text, train
    from switchgear_bench.tiny.model import build
    from switchgear_bench.tiny.train import QUICK

    folder = save(build(0), QUICK, domains, FEW, tmp_path / "model").folder
    command = ["train-tiny", "--out", str(folder)]
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("trained"))
    assert main([*command, "--quick"]) == 0
    assert "--again trains anew" in capsys.readouterr().out
    for options, message in (
        ([], f"--steps: expected 700, as in {folder}, got 5000; --again trains anew"),
        (["--quick", "--seed", "1"], f"--seed: expected 0, as in {folder}, got 1"),
    ):
        assert main([*command, *options]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setattr(text, "load_domains", lambda: domains[:1])
    assert main([*command, "--quick"]) == 2
    assert "--out: expected a model of the text of this machine" in capsys.readouterr().err
    about = json.loads((folder / "tiny.json").read_text())
    del about["text"]  # as earlier versions wrote it
    (folder / "tiny.json").write_text(json.dumps(about))
    assert main([*command, "--quick"]) == 0


@pytest.mark.usefixtures("small")
def test_the_folder_is_one_that_can_be_replaced(
    domains: list[Domain], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What cannot be is refused before the training; a link is followed."""
    from switchgear_bench.tiny import train

    empty, link, loop = tmp_path / "empty", tmp_path / "link", tmp_path / "loop"
    empty.mkdir()
    link.symlink_to(tmp_path / "model")
    loop.symlink_to(loop)
    command = ["train-tiny", "--steps", "1", "--again", "--out"]
    for _ in range(2):
        assert main([*command, str(link)]) in (0, 1)
    assert link.is_symlink()
    assert (tmp_path / "model" / "tiny.json").exists()
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("trained"))
    monkeypatch.chdir(empty)
    for out, message in (
        (".", "--out: expected a folder that can be replaced"),
        (str(loop), "--out: expected a new folder"),
        ("/dev/null/model", "--out: cannot write to /dev/null"),
    ):
        assert main([*command, out]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux")
@pytest.mark.usefixtures("small")
def test_a_folder_without_room_for_files_is_named_before_the_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from switchgear_bench.tiny import train

    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("trained"))
    assert main(["train-tiny", "--steps", "1", "--out", "/proc/model"]) == 2
    assert "--out: cannot write to /proc" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_calibration_does_not_read_the_held_out_text(domains: list[Domain], tmp_path: Path) -> None:
    from switchgear.cli.checkpoint import read_texts
    from switchgear_bench.tiny.model import build
    from switchgear_bench.tiny.train import QUICK

    folder = save(build(0), QUICK, domains, FEW, tmp_path / "model").folder
    held_out = {domain.name: bytes(domain.held_out.tolist()) for domain in domains}
    trained_on = {domain.name: bytes(domain.train.tolist()) for domain in domains}
    assert read_texts([], folder) == held_out
    assert read_texts([], folder, to_calibrate=True) == trained_on


@pytest.mark.usefixtures("small")
def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").touch()
    assert main(["train-tiny", "--steps", "1", "--out", str(other)]) == 2
    assert "expected a new folder" in capsys.readouterr().err
    assert main(["train-tiny", "--steps", "1", "--out", "/dev/null/model"]) == 2
    assert "cannot write to" in capsys.readouterr().err
    with raises(CommandError):
        newest()
    for about in ({"domains": 3}, {"domains": {}, "sensitivity": {"losses": {}}}):
        (other / "tiny.json").write_text(json.dumps(about))
        with raises(CommandError):
            load(other)
