# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench offload`: its model, its runs, its limit and its tables, at a toy size."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from errors import raises
from switchgear.cli import main
from switchgear_bench import memory_group as cgroup
from switchgear_bench.memory_group import memory_limit

pytest.importorskip("rich", reason="rich is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")

from switchgear import offload as ours
from switchgear.cli.common import CommandError
from switchgear.weights import stored_of
from switchgear.weights.store import LinearLayers
from switchgear_bench import offload, offload_tables
from switchgear_bench import offload_model_files as model_files
from switchgear_bench import offload_model_worker as model_worker
from switchgear_bench import offload_models as models
from switchgear_bench import offload_routings as routings
from switchgear_bench.offload_disk import read_rate
from switchgear_bench.offload_files import (
    CHECKPOINT,
    SHARED,
    STORE,
    TOPIC,
    TOPICS,
    Spec,
    drop_pages,
    topics_of,
    write_checkpoint,
)
from switchgear_bench.offload_worker import RUNNERS, decode

TOY = offload.QUICK


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("offload")
    write_checkpoint(TOY, path)
    return path


def decoded(name: str, folder: Path) -> dict[str, Any]:
    return decode(
        RUNNERS[name](offload.task_of(name, TOY, folder, 1, True)), offload.task_of(name, TOY, folder, 1, True)
    )


def test_text_follows_itself_and_a_wrong_run_is_found(folder: Path) -> None:
    base = decoded("resident", folder)
    first = base["tokens"][0]
    assert base["tokens"] == [first + i for i in range(offload.QUICK_TOKENS)]
    assert len(set(base["logits"])) == offload.QUICK_TOKENS
    same = decoded("mmap", folder)
    assert (same["tokens"], same["logits"]) == (base["tokens"], base["logits"])
    for found in (base, same):
        found["peak_bytes"] = None
    assert not offload._row("mmap", same, base)["wrong"]
    same["logits"][-1] = "another"
    assert offload._row("mmap", same, base)["wrong"]
    assert not offload._row("llama.cpp", same, base)["wrong"]  # rounds in another order
    same["tokens"][-1] += 1
    assert offload._row("llama.cpp", same, base)["wrong"]


@pytest.mark.parametrize("runner", ["offload", "prefetch", "replay"])
def test_a_cache_of_a_quarter_has_the_bits_of_the_resident_model(folder: Path, runner: str) -> None:
    if not (folder / STORE).exists():
        ours.write_store(folder / CHECKPOINT, folder / STORE)
    base, found = decoded("resident", folder), decoded(runner, folder)
    assert (found["tokens"], found["logits"]) == (base["tokens"], base["logits"])
    counts = found["statistics"]
    assert counts["hits"] > 0
    assert counts["misses"] > 0
    assert counts["loaded_bytes"] == counts["misses"] * TOY.record_bytes
    assert counts.get("replayed_bytes", counts["loaded_bytes"]) == counts["loaded_bytes"]


def test_a_replay_makes_the_same_reads_in_the_same_order(tmp_path: Path) -> None:
    """Rows are read over while others are read: memory holds what the recorded reads left there."""
    from switchgear import _C
    from switchgear_bench.offload_replay import PIECE, Recorder, Replay

    path, record = tmp_path / "records", 2 * PIECE + 4096
    path.write_bytes(torch.arange(4 * record // 4, dtype=torch.int32).numpy().tobytes())
    memory = torch.zeros(2 * record + 4096, dtype=torch.uint8)
    begin = memory.data_ptr() + -memory.data_ptr() % 4096
    reader = Recorder(_C.Reader([str(path)]))
    tickets = [reader.submit((0, i * record, record, None), begin + i * record) for i in (0, 1)]
    for i in (2, 3):
        reader.wait(tickets[i - 2], 10)
        tickets.append(reader.submit((0, i * record, record, None), begin + i % 2 * record))
    for ticket in tickets[2:]:
        reader.wait(ticket, 10)
    reader.close()
    wanted = memory.clone()
    memory.zero_()
    replay = Replay([path])
    nbytes, seconds = replay(reader.events)
    assert torch.equal(memory, wanted)
    assert (nbytes, seconds > 0) == (4 * record, True)
    with path.open("r+b") as opened:
        opened.truncate(record)
    with raises(OSError):
        replay(reader.events)
    replay.close()


@pytest.mark.slow
def test_the_command_at_a_toy_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    path.touch()
    names = "offload,mmap,all fits"
    assert main(["bench", "offload", "--quick", "--competitors", names, "--json", str(path)]) == 0
    results = json.loads(path.read_text())
    assert [row["runner"] for row in results["results"]] == ["resident", "offload", "mmap", "all fits"]
    assert "with a slot for each expert" in capsys.readouterr().out


def test_accelerate_reads_the_checkpoint_from_the_disk(folder: Path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    base, found = decoded("resident", folder), decoded("accelerate", folder)
    assert found["tokens"] == base["tokens"][: len(found["tokens"])]


def test_mapped_weights_are_pages_of_the_files(folder: Path) -> None:
    from switchgear_bench.offload_files import mapped_experts

    found = mapped_experts(folder)
    assert len(found) == 2 * TOY.num_layers
    assert sum(tensor.nbytes for tensor in found.values()) == TOY.expert_bytes
    files = {str(path) for path in (folder / CHECKPOINT).glob("*.safetensors")}
    maps = Path("/proc/self/maps")
    if maps.exists():
        ranges = [line.split() for line in maps.read_text().splitlines()]
        mapped = [fields[0].split("-") for fields in ranges if fields[-1] in files]
        for tensor in found.values():
            assert any(int(low, 16) <= tensor.data_ptr() < int(high, 16) for low, high in mapped)


def test_routing_is_as_local_as_in_a_trained_model() -> None:
    """Hits of LRU in the model of train-tiny, on held-out text: 31, 37, 44 and 69 %."""
    spec, generator = Spec(), torch.Generator().manual_seed(0)
    topics = topics_of(spec, generator)

    def logits(rows: int) -> torch.Tensor:
        return torch.randn(rows, spec.num_layers, spec.num_experts, generator=generator)

    total = TOPIC**0.5 * logits(TOPICS)[topics] + SHARED**0.5 * logits(1)
    total += (1 - TOPIC - SHARED) ** 0.5 * logits(spec.vocab_size)
    run = ours.Accesses.of([[layer.tolist() for layer in step] for step in total.topk(spec.top_k).indices])
    for slots, hits in ((2, 0.31), (3, 0.37), (4, 0.44), (8, 0.69)):
        assert ours.simulate(run, ours.LRU(), slots=slots).hit_rate == pytest.approx(hits, abs=0.05)


def test_a_group_kills_what_exceeds_its_limit() -> None:
    command = [sys.executable, "-S", "-c", "import sys; print(len(bytearray(int(sys.argv[1]) << 20)))"]
    with memory_limit(64 << 20) as group:
        if isinstance(group, str):
            pytest.skip(f"no control group can be made: {group}")
        done = [
            subprocess.run(group.command([*command, size]), capture_output=True, text=True) for size in ("8", "200")
        ]
        assert done[0].stdout.strip() == str(8 << 20)
        assert done[1].returncode == -9
        assert (group.peak_bytes() or 64 << 20) <= 64 << 20
    assert not group.folder.exists()


class FakeGroups:
    """A folder like /sys/fs/cgroup of version 2: files of the kernel appear with their folder."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, own: str) -> None:
        self.root, self.made = root, []
        root.mkdir()
        monkeypatch.setattr(cgroup, "ROOT", root)
        read, make, remove = Path.read_text, Path.mkdir, Path.rmdir

        def read_text(path: Path, *args: Any, **kwargs: Any) -> str:
            return f"0::{own}\n" if path == Path("/proc/self/cgroup") else read(path, *args, **kwargs)

        def mkdir(path: Path, *args: Any, **kwargs: Any) -> None:
            make(path, *args, **kwargs)
            if path.name.startswith("switchgear-"):
                self.made.append(path)
                for name in ("cgroup.procs", "memory.max", "memory.peak", "memory.stat"):
                    (path / name).touch()

        def rmdir(path: Path) -> None:
            if path in self.made:
                for file in path.iterdir():
                    file.unlink()
            remove(path)

        monkeypatch.setattr(Path, "read_text", read_text)
        monkeypatch.setattr(Path, "mkdir", mkdir)
        monkeypatch.setattr(Path, "rmdir", rmdir)

    def add(self, path: str, controllers: str) -> None:
        folder = self.root / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup.subtree_control").write_text(controllers)


def test_groups_of_version_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our group has processes, so its parent, which controls the memory of its children, gets another child."""
    fake = FakeGroups(tmp_path / "cgroup", monkeypatch, "/user.slice/session")
    fake.add("", "cpu memory pids\n")
    fake.add("user.slice", "memory pids\n")
    fake.add("user.slice/session", "\n")
    with memory_limit(64 << 20) as group:
        assert isinstance(group, cgroup.MemoryGroup), group
        assert group.folder.parent == fake.root / "user.slice"
        assert (group.folder / "memory.max").read_text() == str(64 << 20)
        (group.folder / "memory.stat").write_text("file 7\nanon 4096\nanon_thp 8192\n")
        (group.folder / "memory.peak").write_text("8192\n")
        assert (group.own_bytes(), group.peak_bytes()) == (4096, 8192)
        done = subprocess.run(group.command(["sh", "-c", "echo $$"]), capture_output=True, text=True, check=True)
        assert (group.folder / "cgroup.procs").read_text() == done.stdout, "the command is in the group from the start"
    assert not group.folder.exists()
    assert [path.parent for path in fake.made] == [fake.root / "user.slice"]


def test_groups_of_version_2_that_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next group up is tried, and the one that was made for nothing is removed; without any, a reason."""
    fake = FakeGroups(tmp_path / "cgroup", monkeypatch, "/a/b")
    fake.add("", "memory")
    fake.add("a", "memory")
    fake.add("a/b", "cpu")
    write = Path.write_text

    def write_text(path: Path, text: str, *args: Any, **kwargs: Any) -> int:
        if path.name == "memory.max" and path.parent.parent.name == "a":
            raise PermissionError(13, "Permission denied")
        return write(path, text, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", write_text)
    with memory_limit(1 << 20) as group:
        assert isinstance(group, cgroup.MemoryGroup), group
        assert group.folder.parent == fake.root
    fake.add("", "cpu")
    with memory_limit(1 << 20) as group:
        assert isinstance(group, str)
        assert "memory.max: Permission denied" in group
    fake.add("a", "cpu")
    with memory_limit(1 << 20) as group:
        assert group == "this system has no control groups for memory"
    assert not any(path.exists() for path in fake.made)
    assert len(fake.made) == 3


def test_the_rate_of_the_disk_counts_whole_records(folder: Path) -> None:
    drop_pages(folder)
    files = sorted((folder / CHECKPOINT).glob("*.safetensors"))
    assert read_rate(files, 4096, 2, 1 << 20) > 0
    with raises(ValueError):
        read_rate(files, 1 << 30, 2, 1 << 30)


def row(runner: str, seconds: float, **more: Any) -> dict[str, Any]:
    return {
        "runner": runner, "tokens": 10, "seconds": seconds, "read_bytes": 10**9, "peak_bytes": 0, "same_tokens": True,
        "same_logits": True, "wrong": False, **more,
    }  # fmt: skip


def results_of(*rows: dict[str, Any]) -> dict[str, Any]:
    machine = {"model": "m", "threads": 2, "isa": "i", "torch": "t", "transformers": "t", "switchgear": "s"}
    model = Spec()._asdict() | {"expert_bytes": Spec().expert_bytes}
    return {
        "schema": offload.SCHEMA, "machine": machine, "model": model, "limit": offload.LIMIT, "disk_rates": [2e9, 1e9],
        "results": list(rows), "skipped": [{"runner": "llama.cpp", "reason": "not installed"}],
    }  # fmt: skip


def test_tables_and_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counted = {"hits": 1, "misses": 3, "waited_seconds": 0.5, "busy_seconds": 1.0, "loaded_bytes": 14 * 10**8}
    rows = [row("offload", seconds, **counted) for seconds in (2.0, 4.0, 2.0)]
    rows += [row("resident", 1.0), row("mmap", 2.2), row("accelerate", 12.0)]
    results = results_of(*rows, row("all fits", 1.0, offloaded_ms=10.2, resident_ms=10.0))
    results["results"].append(row("replay", 2.0, **counted, replayed_bytes=2 * 10**9, replayed_seconds=1.0))
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    assert main(["bench", "offload", "--from", str(path)]) == 0
    text = capsys.readouterr().out
    assert "| **switchgear**, LRU | 5.00 | 3 | 100 | 25 % | 50 | equal, equal |" in text
    assert "6.0x accelerate, disk offload (at least 5x: yes)" in text
    assert "1.1x switchgear's kernels on mapped files (at least 1.2x: **no**)" in text
    assert "+2.0 % time of the resident model (at most 3 %: yes)" in text
    assert "the cache reads 1.40 GB/s, 70 % of what a plain loop reads" in text
    assert "(at least 85 %: **no**)" in text
    assert "llama.cpp: not installed" in text
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- bench:offload -->\n<!-- /bench:offload -->\nafter\n")
    assert main(["bench", "offload", "--from", str(path), "--markdown", str(page)]) == 0
    assert page.read_text().startswith("before\n<!-- bench:offload -->\n8 layers of 16 experts, top 2")
    assert offload_tables.speed(results["results"][:3]) == 5.0


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["bench", "offload", "--quick", "--checkpoint", str(tmp_path)]) == 2
    assert "expected a new folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ---- published models ------------------------------------------------------------------------------------------------

TINY = {
    "model_type": "qwen3_moe", "hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8,
    "num_experts_per_tok": 2, "vocab_size": 128, "max_position_embeddings": 128,
}  # fmt: skip
OSS = {
    "model_type": "gpt_oss", "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 8,
    "num_experts_per_tok": 2, "vocab_size": 128, "max_position_embeddings": 8192,
}  # fmt: skip


def config_of(entries: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**entries)


@pytest.mark.parametrize("form", model_files.FORMS)
@pytest.mark.parametrize("entries", [TINY, OSS], ids=["qwen3", "gpt-oss"])
def test_generated_experts_fit_the_model_and_differ(entries: dict[str, Any], form: str, tmp_path: Path) -> None:
    store = model_files.write_experts(config_of(entries), form, tmp_path / "store")
    checksums = [sum_ for records in store.layers.values() for sum_ in records.checksums]
    assert len(set(checksums)) == len(checksums) == entries["num_hidden_layers"] * 8
    model = model_files.fill(model_files.build_on_meta(config_of(entries)), "int4")
    assert {
        str(getattr(stored_of(linear), "form", None)) for _, linear in LinearLayers(("gate", "router")).find(model)
    } == {"int4"}
    with torch.no_grad(), ours.offload(model, store, slots=3):
        logits = model(torch.arange(12)[None]).logits
    assert logits.isfinite().all()
    assert 0.01 < logits.std() < 10


def test_as_many_layers_as_the_disk_has_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(OSS)
    layer = model_files.layer_bytes(model_files.sources(model_files.build_on_meta(config), "int4").layers[0])

    def fitting(layers: float) -> Any:
        usage = types.SimpleNamespace(free=model_files.KEEP + int(layers * layer))
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        return model_files.fit_layers(config, "int4", tmp_path)

    assert fitting(5) is config
    assert (fitting(1.5).num_hidden_layers, len(fitting(1.5).layer_types)) == (1, 1)
    with raises(CommandError):
        fitting(0.5)


def test_a_scaled_trace_is_as_local_as_the_recorded_one() -> None:
    torch.manual_seed(0)
    trace = torch.tensor([[(t // 7) % 16, (t // 7 + 1 + t % 3) % 16] for t in range(400)])
    for num_experts, top_k in ((128, 4), (8, 2), (64, 8)):
        scaled = routings.scale(trace, num_experts, top_k, 600)
        assert scaled.shape == (600, top_k)
        assert (scaled.sort(1).values.diff(dim=1) > 0).all(), "distinct"
        if num_experts < 16:
            continue
        for share in (4, 2):
            hits = [
                ours.simulate(
                    ours.Accesses.of([[row] for row in ids.tolist()], num_experts=count),
                    ours.LRU(),
                    slots=count // share,
                ).hit_rate
                for ids, count in ((trace, 16), (scaled, num_experts))
            ]
            assert hits[1] == pytest.approx(hits[0], abs=0.06)


def test_layers_get_the_drawn_experts_one_row_after_the_other() -> None:
    from transformers import AutoModelForCausalLM

    from switchgear import routing
    from switchgear.integrations.moe_blocks import moe_blocks

    model: Any = AutoModelForCausalLM.from_config(config_of(TINY))  # type: ignore[no-untyped-call]
    model.eval()
    blocks = list(moe_blocks(model).values())
    drawn = routings.draw("zipf", [(8, 2)] * 3, 5)
    with torch.no_grad(), routings.chosen(model, [b.layer for b in blocks], drawn), routing.record(model) as found:
        for ids in ([1, 2], [3, 4], [5, 6]):
            model(torch.tensor([ids]), use_cache=False)
    for layer, rows in zip(found.layers.values(), drawn, strict=True):
        assert torch.equal(layer.topk_ids().sort(1).values, rows[[0, 1, 2, 3, 4, 0]].sort(1).values)


def task_in(folder: Path, **changes: Any) -> model_worker.Task:
    model_files.write_experts(config_of(OSS), "mxfp4", folder / "store")
    torch.save([torch.randint(16, (50, 2))], folder / "traces.pt")
    task = model_worker.Task(
        OSS, str(folder / "store"), str(folder / "result.json"), "int4", list(routings.ROUTINGS),
        str(folder / "traces.pt"), 5, 3, 4, 0, 0.0, 1, 3,
    )  # fmt: skip
    return task._replace(**changes)


def test_decoding_counts_the_tokens_after_the_warm_ones(tmp_path: Path) -> None:
    found = model_worker.run(task_in(tmp_path))
    assert [row["routing"] for row in found["results"]] == list(routings.ROUTINGS)
    records = next(iter(ours.Store.open(tmp_path / "store").layers.values()))
    for row in found["results"]:
        assert (row["tokens"], row["hits"] + row["misses"]) == (4, 4 * 2 * 2)
        assert row["read_bytes"] == row["misses"] * records.record_bytes
        assert row["prompt_bytes"] > 0


def test_a_step_of_training(tmp_path: Path) -> None:
    found = model_worker.run(task_in(tmp_path, steps=2, routings=["uniform"]))["training"]
    assert found["parameters"] == 2 * 8 * 4 * (64 + 64 + 32 + 64)
    assert all(0 < loss < 20 for loss in found["losses"])
    assert found["forward_seconds"] < found["step_seconds"]


def test_the_command_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """In this process; the folder of the store is gone afterwards, also if the run fails."""
    folder, path = tmp_path / "model", tmp_path / "results.json"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(OSS))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stores = []

    def run_here(task: model_worker.Task, limit: int) -> dict[str, Any]:
        stores.append(Path(task.store))
        assert stores[-1].is_dir()
        if fails:
            raise CommandError("failed")
        return models.finish(model_worker.run(task._replace(limit=limit)), None)

    monkeypatch.setattr(models, "run_apart", run_here)
    fails = False
    command = [
        "bench",
        "offload",
        "--model",
        str(folder),
        "--memory",
        "1G",
        "--slots",
        "3",
        "--quick",
        "--json",
        str(path),
    ]
    assert main([*command, "--routing", "uniform"]) == 0
    assert main([*command, "--routing", "zipf"]) == 0
    assert main([*command, "--train"]) == 0
    (entry,) = json.loads(path.read_text())["models"]
    assert [row["routing"] for row in entry["results"]] == ["uniform", "zipf"]
    assert (entry["slots"], entry["training"]["tokens"]) == (3, models.QUICK)
    assert "a step of LoRA" in capsys.readouterr().out
    fails = True
    assert main([*command, "--routing", "zipf"]) == 2
    assert not any(store.parent.exists() for store in stores)


def test_a_model_needs_a_limit() -> None:
    assert main(["bench", "offload", "--model", "olmoe"]) == 2
