# SPDX-License-Identifier: BSD-3-Clause
"""A cache over a store on disk, with the native reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from offload_cases import check, make_model, outputs_of, same_bits, steps_of

import switchgear
from errors import raises
from switchgear import offload
from switchgear.offload import NextGate, StoreError

pytestmark = pytest.mark.usefixtures("memory")
FORMS: dict[str, dict[str, Any]] = {"plain": {}, "int4": {}, "groups": {}, "mixed": {"bits": [4, 1, 3, 2, 2, 4]}}


@pytest.mark.parametrize("form", FORMS)
def test_a_store_on_disk(form: str, tmp_path: Path) -> None:
    size = 128 if form == "mixed" else 32
    model, steps = make_model(size=size), steps_of(size=size)
    if form != "plain":
        switchgear.store(model, "groups" if form == "mixed" else form, **FORMS[form])
    wanted = outputs_of(model, steps)
    store = offload.write_store(model, tmp_path / "experts", "as published" if form != "plain" else form)
    for options in ({}, {"shared": True}, {"prefetch": NextGate(model)}, {"verify": False, "threads": 1}, {"slots": 6}):
        with offload.offload(model, tmp_path / "experts", **{"slots": 2, **options}) as cache:  # type: ignore[arg-type]
            for _ in range(5):
                assert all(map(same_bits, outputs_of(model, steps), wanted))
            found = cache.statistics
            most = found.misses * store.layers["0.experts"].record_bytes
            assert found.bytes < most if form == "mixed" and not cache.is_inert else found.bytes == most
            if not cache.is_inert:
                check(cache)
                assert found.misses > 0
        assert all(map(same_bits, outputs_of(model, steps), wanted))


def test_any_path_names_a_store(tmp_path: Path) -> None:
    class Named:
        def __fspath__(self) -> str:
            return str(tmp_path / "experts")

    model = make_model()
    offload.write_store(model, Named())
    with offload.offload(model, Named(), slots=2) as cache:
        assert not cache.is_inert


def test_a_store_that_changes_while_it_runs(tmp_path: Path) -> None:
    """Truncated, and written over: the error names layer and expert, and what is in memory still runs."""
    model, steps = make_model(), steps_of()
    wanted = outputs_of(model, steps)
    store = offload.write_store(model, tmp_path / "experts")
    record = store.layers["1.experts"].record_bytes
    cache = offload.offload(model, store, slots=2)
    file = tmp_path / "experts" / store.layers["1.experts"].file
    good = file.read_bytes()
    for bad in (good[:record], good[:-record] + bytes(record)):
        with file.open("r+b") as opened:
            opened.write(bad)
            opened.truncate(len(bad))
        failed = []
        for x in steps * 2:
            try:
                outputs_of(model, [x])
            except StoreError as error:
                failed.append(str(error))
        assert failed
        assert all(error.startswith("1.experts, expert ") for error in failed)
        with file.open("r+b") as opened:
            opened.write(good)
        assert all(map(same_bits, outputs_of(model, steps), wanted))
        check(cache)
    file.unlink()
    cache.close()  # the file is still open
    assert all(map(same_bits, outputs_of(model, steps), wanted))
    with pytest.raises(StoreError):
        offload.offload(model, tmp_path / "experts", slots=2)
    with pytest.raises(StoreError):
        offload.offload(model, tmp_path / "nowhere", slots=2)
    assert all(map(same_bits, outputs_of(model, steps), wanted))


def test_load_model_and_generate(tmp_path: Path) -> None:
    """Experts that were never in memory."""
    from switchgear.integrations.transformers import accelerate
    from tiny_models import build

    whole = build("mixtral").eval()
    accelerate(whole)
    whole.save_pretrained(tmp_path / "checkpoint")  # type: ignore[operator]
    prompt = torch.arange(1, 9)[None]
    wanted = whole.generate(prompt, max_new_tokens=8, do_sample=False)  # type: ignore[operator]
    store = offload.write_store(tmp_path / "checkpoint", tmp_path / "experts")
    model = offload.load_model(tmp_path / "checkpoint", store)
    with raises(ValueError):
        model(prompt)
    with offload.offload(model, store, slots=2):
        assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False), wanted)
    with raises(RuntimeError):
        model(prompt)
