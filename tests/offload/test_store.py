# SPDX-License-Identifier: BSD-3-Clause
"""Stores of experts: what is written has the bits of `store`, whatever is interrupted, damaged or hostile is named."""

from __future__ import annotations

import copy
import errno
import fcntl
import hashlib
import json
import os
import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import switchgear
from errors import raises
from full_disk import full_disk
from switchgear import Experts, MoE, offload
from switchgear.files import DiskFull
from switchgear.offload import Records, Store, StoreError, write_store
from switchgear.offload import store as stores
from switchgear.reference import gguf
from switchgear.weights import stored_of, weights_of
from switchgear.weights.form import layout_of
from switchgear.weights.store import FORMS

OPTIONS: dict[str, dict[str, Any]] = {
    "int4": {"group_size": 32},
    "groups": {"bits": 3, "group_size": 64, "symmetric": False},
}


def small(layers: int = 2, sizes: tuple[int, int] = (64, 96), experts: int = 5, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    blocks = [MoE(*sizes, num_experts=experts, top_k=2) for _ in range(layers)]
    return nn.Sequential(*blocks).bfloat16().requires_grad_(False).eval()


def arena_of(store: Store, records: Records, order: list[int]) -> Tensor:
    """Records read by the reader, row i that of expert order[i]."""
    whole = torch.zeros(len(order) * records.record_bytes + 4096, dtype=torch.uint8)
    begin = -whole.data_ptr() % 4096
    arena = whole[begin : begin + len(order) * records.record_bytes].view(len(order), -1)
    reader, reads = store.open_reader(threads=2), store.reads(records)
    for row, expert in enumerate(order):
        reader.wait(reader.submit(reads[expert], arena[row].data_ptr()), 30)
    reader.close()
    return arena


SIZES = dict.fromkeys(FORMS, (64, 64)) | {"compact": (1024, 512)}
SIZES |= {name: (kind.columns, kind.columns) for name, kind in gguf.TYPES.items()}  # rows of whole blocks


@pytest.mark.parametrize("form", sorted(FORMS))
def test_records_have_the_bits_of_stored_experts(tmp_path: Path, form: str) -> None:
    model = small(sizes=SIZES[form], experts=2 if form == "compact" else 5)
    options = OPTIONS.get(form, {})
    seen: list[Any] = []
    store = write_store(model, tmp_path / "s", form, progress=lambda *step: seen.append(step), **options)
    store.verify()
    assert seen == [(1, 2, "0.experts"), (2, 2, "1.experts")]
    if form != "plain":
        switchgear.store(model, form, **options)
    for name, records in store.layers.items():
        experts = model.get_submodule(name)
        expected = weights_of(experts, layout_of(experts)) if form == "plain" else stored_of(experts).weights(experts)
        order = list(reversed(range(records.num_experts)))
        slots = torch.tensor(order, dtype=torch.int32)
        arena = arena_of(store, records, order)
        got = records.weights(arena, slots)
        for weight, want in zip(got, expected, strict=True):
            assert weight.data.untyped_storage().data_ptr() == arena.untyped_storage().data_ptr()
            assert all(t.data_ptr() % 64 == 0 for t in weight.tensors if t.dtype is not torch.int32)
            same = want if isinstance(want, Tensor) else want.plain()
            assert torch.equal(weight.plain(), same)
    assert {path.name for path in tmp_path.iterdir()} == {"s"}


@pytest.mark.parametrize("form", sorted(FORMS))
def test_kernels_multiply_records_where_they_lie(tmp_path: Path, form: str) -> None:
    model = small(1, sizes=SIZES[form])
    options = OPTIONS.get(form, {})
    store = write_store(model, tmp_path / "s", form, **options)
    if form != "plain":
        switchgear.store(model, form, **options)
    records = store.layers["0.experts"]
    first, second = records.weights(
        arena_of(store, records, [4, 2, 0, 1, 3]), torch.tensor([2, 3, 1, 4, 0], dtype=torch.int32)
    )
    experts, x = model[0].experts, torch.randn(7, model[0].experts.hidden_size).bfloat16()
    ids = torch.stack([torch.randperm(5)[:2] for _ in range(7)]).int()
    weights = torch.rand(7, 2)
    got = switchgear.functional.moe(x, first, second, ids, weights)
    assert torch.equal(got, experts(x, ids, weights))


MIXED = {"bits": [1, 4, 2, 3, 4], "group_size": 32, "symmetric": False}


def test_experts_of_different_bits(tmp_path: Path) -> None:
    """A record has the bits of its expert alone. In memory any row has room for any expert."""
    model = small(1, sizes=(128, 128))
    store = write_store(model, tmp_path / "s", "groups", **MIXED)
    store.verify()
    records = store.layers["0.experts"]
    assert [bits for bits, _ in records.bits] == MIXED["bits"]
    assert records.sizes[1] == records.sizes[4] == records.record_bytes
    bit = 3 * 128 * 128 // 8
    for expert, bits in enumerate(MIXED["bits"]):
        assert abs(records.record_bytes - records.sizes[expert] - (4 - bits) * bit) < 4096
    assert store.nbytes == sum(records.sizes) == (tmp_path / "s" / records.file).stat().st_size
    switchgear.store(model, "groups", **MIXED)
    experts = model[0].experts
    wanted = stored_of(experts).weights(experts)
    for got, want in zip(records.weights(arena_of(store, records, list(range(5)))), wanted, strict=True):
        assert torch.equal(got.plain(), want.plain())
    order = [4, 2, 0, 1, 3]
    arena, slots = arena_of(store, records, order), torch.tensor([2, 3, 1, 4, 0], dtype=torch.int32)
    first, second = records.weights(arena, slots)
    place = records.placing((first, second))
    assert place is not None
    for row, expert in enumerate(order):
        place(expert, row)
    for got, want in zip((first, second), wanted, strict=True):
        assert got.data.untyped_storage().data_ptr() == arena.untyped_storage().data_ptr()
        assert torch.equal(got.plain(), want.plain())
    x, ids, weights = torch.randn(7, 128).bfloat16(), torch.randint(5, (7, 1)).int(), torch.rand(7, 1)
    assert torch.equal(switchgear.functional.moe(x, first, second, ids, weights), experts(x, ids, weights))


def test_the_arena_and_slots_of_records_are_checked(tmp_path: Path) -> None:
    write_store(nn.Sequential(switchgear.MoE(64, 96, 1, 1)), tmp_path / "one")
    (records,) = Store.open(tmp_path / "one").layers.values()
    size = records.record_bytes
    arena, slots = torch.zeros(2, size, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    records.weights(arena, slots)
    records.weights(arena[:1])
    hostile: list[tuple[str, Tensor, Tensor | None]] = [
        ("arena", arena.view(torch.int8), slots),
        ("arena", arena[0], slots),
        ("arena", arena[:, 1:], slots),
        ("arena", torch.zeros(2, 2 * size, dtype=torch.uint8)[:, ::2], slots),
        ("arena", torch.zeros(2, size + 1, dtype=torch.uint8)[:, :size], slots),
        ("arena", arena[:1].expand(2, -1), slots),
        ("arena", arena, None),
        ("slots", arena, slots.long()),
        ("slots", arena, slots[None]),
    ]
    for message, rows, places in hostile:
        with raises(ValueError, message):
            records.weights(rows, places)


def test_bits_of_experts_in_an_index_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write_store(small(1), path, "groups", **MIXED)
    index = path / "index.json"
    clean = json.loads(index.read_text())
    hostile: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
        ("bits", lambda e: e["bits"].pop()),
        ("bits", lambda e: e["bits"].__setitem__(0, [1])),
        ("bits", lambda e: e["bits"].__setitem__(0, [-1, 1])),
        ("bits", lambda e: e["bits"].__setitem__(0, [True, 1])),
        ("bits", lambda e: e["bits"].__setitem__(0, [5, 1])),
        ("bits", lambda e: e["bits"].__setitem__(0, [0, 1])),
        ("bytes", lambda e: e["bits"].__setitem__(0, [4, 4])),
        ("bytes", lambda e: e.pop("bits")),
        ("parts", lambda e: e["parts"].insert(0, e["parts"].pop())),
    ]
    for message, change in hostile:
        entries = copy.deepcopy(clean)
        change(entries["layers"][0])
        if message == "parts":  # in an order whose offsets would be right
            at = 0
            for part in entries["layers"][0]["parts"]:
                part["offset"] = at
                at += 64 * 1024
            entries["layers"][0]["record_bytes"] = at
        index.write_text(with_digest(entries))
        with raises(StoreError, message):
            Store.open(path)


def test_a_model_that_is_stored_keeps_its_bits(tmp_path: Path) -> None:
    model = small()
    switchgear.store(model, "int8")
    kept = write_store(model, tmp_path / "kept", offload.store.store_sources.AS_PUBLISHED)
    same = write_store(model, tmp_path / "same", "int8")
    assert kept.layers["0.experts"].checksums == same.layers["0.experts"].checksums
    with raises(ValueError):
        write_store(model, tmp_path / "other", "int4")


def test_one_module_of_experts(tmp_path: Path) -> None:
    experts = Experts(32, 32, 3)
    store = write_store(experts, tmp_path / "s")
    assert list(store.layers) == [""]
    assert store.nbytes == 3 * store.layers[""].record_bytes


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_sources_that_cannot_be_stored_leave_nothing(tmp_path: Path) -> None:
    from switchgear.parallel.experts import ParallelExperts

    part = ParallelExperts.__new__(ParallelExperts)
    nn.Module.__init__(part)
    model = small(1)
    (tmp_path / "there").mkdir()
    cases: list[tuple[Any, str, dict[str, Any], str]] = [
        (nn.Linear(2, 2), "s", {}, "source"),
        (nn.Sequential(part), "s", {}, "ParallelExperts"),
        (small(1).to("meta"), "s", {}, "source.0.experts.gate_up_proj"),
        (model, "there", {}, "path"),
        (model, "s", {"form": "zip"}, "form"),
        (model, "s", {"form": "auto"}, "form"),
        (model, "s", {"form": "int8", "bits": 3}, "bits"),
        (model, "s", {"form": "as published", "bits": 3}, "bits"),
        (model, "s", {"dtype": torch.float32}, "dtype"),
        (model, "s", {"form": "compact"}, "source"),
        (tmp_path / "there", "s", {}, "config.json"),
    ]
    for source, name, options, message in cases:
        with raises(ValueError, message):
            write_store(source, tmp_path / name, **options)
        assert [path.name for path in tmp_path.iterdir()] == ["there"], message


def test_bad_arenas_and_slots(tmp_path: Path) -> None:
    records = write_store(small(1), tmp_path / "s").layers["0.experts"]
    arena = torch.zeros(5, records.record_bytes, dtype=torch.uint8)
    slots = torch.zeros(5, dtype=torch.int32)
    for bad, of in ((arena[:, :-64], slots), (arena.int(), slots), (arena[0], slots)):
        with raises(ValueError):
            records.weights(bad, of)
    with raises(ValueError):
        records.weights(arena[:3])
    for wrong in (slots[:4], slots.long()):
        with raises(ValueError):
            records.weights(arena, wrong)


# ---- interruptions ---------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def stopping(after: int) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, name: str) -> None:
        if done == after:
            raise Stopped

    return progress


def written_layers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    written: list[str] = []
    write_layer = stores.write_layer

    def counted(file: Path, name: str, weights: Any) -> Records:
        written.append(name)
        return write_layer(file, name, weights)

    monkeypatch.setattr(stores, "write_layer", counted)
    return written


def test_an_interrupted_store_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = small(4), tmp_path / "s"
    with pytest.raises(Stopped):
        write_store(model, path, "int8", progress=stopping(2))
    with raises(StoreError):
        Store.open(path)
    written = written_layers(monkeypatch)
    with raises(StoreError, "path"):
        write_store(model, path, "int4")
    with raises(StoreError, "path"):
        write_store(small(3), path, "int8")
    assert written == []
    model[1].experts.gate_up_proj.data[2, 3, 4] += 1
    store = write_store(model, path, "int8")
    assert written == ["1.experts", "2.experts", "3.experts"], "the second layer changed meanwhile"
    store.verify()
    assert sorted(file.name for file in path.iterdir()) == ["index.json", *(f"layer-0000{i}.records" for i in range(4))]
    whole = write_store(model, tmp_path / "whole", "int8")
    assert {n: r.checksums for n, r in whole.layers.items()} == {n: r.checksums for n, r in store.layers.items()}


def test_pages_are_written_whatever_the_file_system_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the page cache or, where that is refused, through it; some at a time."""
    checksums = write_store(small(2), tmp_path / "whole").layers["1.experts"].checksums
    pwrite = os.pwrite

    def reluctant(file: int, memory: memoryview, offset: int) -> int:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "expected larger pages")
        return pwrite(file, memory[:4096], offset)

    monkeypatch.setattr(os, "pwrite", reluctant)
    store = write_store(small(2), tmp_path / "reluctant")
    store.verify()
    assert store.layers["1.experts"].checksums == checksums


@pytest.mark.parametrize("error", [errno.EIO, errno.EINVAL])
def test_a_failed_write_leaves_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    def failing(file: int, memory: memoryview, offset: int) -> int:
        raise OSError(error, "broken")

    monkeypatch.setattr(os, "pwrite", failing)
    with raises(StoreError):
        write_store(small(1), tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_a_truncated_layer_of_an_interrupted_store_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = small(3), tmp_path / "s"
    with pytest.raises(Stopped):
        write_store(model, path, progress=stopping(2))
    os.truncate(tmp_path / "s.partial" / "layer-00000.records", 4096)
    written = written_layers(monkeypatch)
    write_store(model, path).verify()
    assert written == ["0.experts", "2.experts"]


def test_a_source_is_a_model_or_a_folder(tmp_path: Path) -> None:
    with raises(TypeError, "source"):
        write_store(None, tmp_path / "s")  # type: ignore[arg-type]


def test_a_fresh_store_discards_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = small(2), tmp_path / "s"
    with pytest.raises(Stopped):
        write_store(model, path, progress=stopping(1))
    written = written_layers(monkeypatch)
    write_store(model, path, "int4", resume=False)
    assert written == ["0.experts", "1.experts"]


def test_other_folders_and_writers_are_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "s.partial"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with raises(StoreError, "path"):
        write_store(small(1), tmp_path / "s", resume=False)
    assert (other / "notes.txt").read_text() == "mine"
    (other / "notes.txt").unlink()
    with open(other / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with raises(StoreError, "path"):
            write_store(small(1), tmp_path / "s")


def test_no_room_is_named_and_finished_layers_stay(tmp_path: Path) -> None:
    model, path = nn.Sequential(*small(1), *small(1, sizes=(256, 256))), tmp_path / "s"
    with full_disk(1 << 20), raises(StoreError) as error:
        write_store(model, path)
    assert isinstance(error.value, DiskFull)
    assert not path.exists()
    assert sorted(file.name for file in (tmp_path / "s.partial").iterdir()) == [
        "journal.json",
        "layer-00000.records",
        "lock",
    ]
    write_store(model, path).verify()


# ---- damaged and hostile stores --------------------------------------------------------------------------------------


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "s"
    store = write_store(small(2), path)
    file = path / "layer-00001.records"
    data = file.read_bytes()
    with raises(StoreError):
        Store.open(tmp_path)
    for change in (
        lambda: os.truncate(file, len(data) - 4096),
        file.unlink,
        lambda: file.symlink_to("/dev/zero"),
    ):
        change()
        with raises(StoreError):
            Store.open(path)
    file.unlink()
    record = store.layers["1.experts"].record_bytes
    file.write_bytes(data[: 2 * record] + data[:record] + data[3 * record :])
    with raises(StoreError):
        Store.open(path).verify()
    file.unlink()
    with raises(StoreError):
        store.open_reader()


def with_digest(entries: dict[str, Any]) -> str:
    rest = {key: value for key, value in entries.items() if key != "digest"}
    return json.dumps({**rest, "digest": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()})


HOSTILE: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("version", lambda e: e.update(version=2)),
    ("format", lambda e: e.update(format="other")),
    ("layers", lambda e: e.update(layers=[])),
    ("layers", lambda e: e["layers"].clear()),
    ("layers", lambda e: e["layers"].append(e["layers"][0])),
    ("layers", lambda e: e["layers"][1].update(name=e["layers"][0]["name"])),
    ("layers", lambda e: e["layers"][1].update(file=e["layers"][0]["file"])),
    ("config_hash", lambda e: e["layers"][0].update(name="other")),
    ("file", lambda e: e["layers"][0].update(file="../layer-00000.records")),
    ("file", lambda e: e["layers"][0].update(file="/etc/passwd")),
    ("checksums", lambda e: e["layers"][0]["checksums"].pop()),
    ("checksums", lambda e: e["layers"][0]["checksums"].__setitem__(0, "-1")),
    ("record_bytes", lambda e: e["layers"][0].update(record_bytes=4097)),
    ("record_bytes", lambda e: e["layers"][0].update(record_bytes=4096)),
    ("bytes", lambda e: e["layers"][0].update(record_bytes=2**30)),
    ("num_experts", lambda e: e["layers"][0].update(num_experts=2**60)),
    ("num_experts", lambda e: e["layers"][0].update(num_experts=True)),
    ("offset", lambda e: e["layers"][0]["parts"][1].update(offset=0)),
    ("offset", lambda e: e["layers"][0]["parts"][1].update(offset=-64)),
    ("offset", lambda e: e["layers"][0]["parts"][1].update(offset=12289)),
    ("record_bytes", lambda e: e["layers"][0]["parts"][1].update(offset=2**30)),
    ("shape", lambda e: e["layers"][0]["parts"][0].update(shape=[0, 4])),
    ("shape", lambda e: e["layers"][0]["parts"][0].update(shape=[2**39, 2**39])),
    ("parts", lambda e: e["layers"][0]["parts"][0].update(shape=[64, 192])),
    ("parts", lambda e: e["layers"][0]["parts"][0].update(dtype="float16")),
    ("dtype", lambda e: e["layers"][0]["parts"][0].update(dtype="string")),
    ("parts", lambda e: e["layers"][0]["parts"].pop()),
    ("parts", lambda e: e["layers"][0]["parts"][0].update(field="scales")),
    ("projection", lambda e: e["layers"][0]["parts"][0].update(projection=2)),
    ("dtype", lambda e: e["layers"][0]["projections"][0].update(dtype="int8")),
    ("rows", lambda e: e["layers"][0]["projections"][0].update(rows=0)),
    ("fields", lambda e: e["layers"][0]["projections"][0].update(fields=["data", "slots"])),
    ("projections", lambda e: e["layers"][0]["projections"].pop()),
]


def test_a_hostile_index_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write_store(small(2), path)
    index = path / "index.json"
    clean = json.loads(index.read_text())
    index.write_text(with_digest(clean))
    Store.open(path)
    for message, change in HOSTILE:
        entries = copy.deepcopy(clean)
        change(entries)
        index.write_text(with_digest(entries))
        with raises(StoreError, message):
            Store.open(path)
    clean["form"] = "int4"
    index.write_text(json.dumps(clean))
    with raises(StoreError):
        Store.open(path)


VALUES = (
    None,
    True,
    -1,
    0,
    1,
    3,
    63,
    64,
    4096,
    2**31,
    2**40,
    2**63,
    2**64,
    10**40,
    1.5,
    "",
    "x",
    "data",
    "int8",
    [],
    {},
    [[]],
)


def damaged(entries: dict[str, Any], rng: random.Random) -> None:
    """Changes one value somewhere in the index."""
    at: Any = entries
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = rng.choice(keys)
        if isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.9:
            at = at[key]
            continue
        if rng.random() < 0.2:
            del at[key]
        else:
            at[key] = rng.choice(VALUES)
        return


@pytest.mark.parametrize("form", ["plain", "int4", "groups", "fp8", "mixed"])
def test_fuzzed_indexes(tmp_path: Path, form: str) -> None:
    """Of each form 150 damages, whose digests are right: a StoreError, or a store whose weights kernels can read."""
    path = tmp_path / "s"
    options = {"form": "groups", "bits": [4, 1]} if form == "mixed" else {"form": form}
    write_store(small(2, sizes=(64, 64), experts=2), path, **options)
    index, rng = path / "index.json", random.Random(form)
    text = index.read_text()
    opened, messages = 0, []
    for case in range(150):
        entries = json.loads(text)
        damaged(entries, rng)
        index.write_text(with_digest(entries) if case % 5 else json.dumps(entries))
        try:
            store = Store.open(path)
        except StoreError as error:
            messages.append(str(error))
            continue
        opened += 1
        for records in store.layers.values():
            memory = torch.zeros(records.num_experts, records.record_bytes, dtype=torch.uint8)
            for weight in records.weights(memory):
                weight.plain()
    assert opened < 60
    assert [message for message in messages if "expected" not in message] == []


def test_fuzzed_bytes_of_an_index(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write_store(small(1, experts=2), path, "int8")
    index, rng = path / "index.json", random.Random(0)
    data = index.read_bytes()
    for _ in range(150):
        spoiled = bytearray(data)
        for _ in range(rng.choice((1, 2, 5))):
            spoiled[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        cut = rng.choice((len(data), len(data), rng.randrange(len(data))))
        index.write_bytes(bytes(spoiled[:cut]))
        with raises(StoreError):
            Store.open(path)
    index.write_bytes(b"[" * 200_000)
    with raises(StoreError):
        Store.open(path)
    index.write_text('{"version": NaN}')
    with raises(StoreError):
        Store.open(path)


def test_the_index_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(small(1), tmp_path / "s")
    monkeypatch.setattr("switchgear.files.MOST_JSON", 100)
    with raises(StoreError):
        Store.open(tmp_path / "s")


# ---- memory ----------------------------------------------------------------------------------------------------------

PEAK = """
    import resource, sys, torch
    from pathlib import Path
    from switchgear import offload
    def kilobytes(name):
        return int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1])
    checkpoint, small, out, form = sys.argv[1:]
    offload.write_store(small, out + "-warm", form)
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = kilobytes("VmRSS")
    offload.write_store(checkpoint, out, form)
    print(kilobytes("VmHWM") - before)
"""


def peak_of(checkpoint: Path, small: Path, out: Path, form: str) -> int:
    """Bytes above those before."""
    arguments = [str(checkpoint), str(small), str(out), form]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK), *arguments],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout) * 1024
