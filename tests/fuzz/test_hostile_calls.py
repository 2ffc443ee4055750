# SPDX-License-Identifier: BSD-3-Clause
"""A short run of the program, and what it reports for functions that are broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import children
import hostile_calls
import pytest
import torch
from valid_calls import Call


def test_hostile_calls() -> None:
    assert children.run(hostile_calls.FUZZER, count=600, seed=1, jobs=1) == []


def test_a_call_depends_on_the_seed_and_its_number() -> None:
    assert hostile_calls.draw(0, 7).title == hostile_calls.draw(0, 7).title
    assert len({hostile_calls.draw(seed, 7).title for seed in range(20)}) > 10


def without_name(x: Any) -> Any:
    raise ValueError("something went wrong")


def of_another_kind(x: Any) -> Any:
    raise RuntimeError("x: expected less, got more")


def that_sees_memory(x: Any) -> Any:
    return x.untyped_storage()[0] + torch.zeros(())


BROKEN: dict[str, tuple[Callable[..., Any], str]] = {
    "no name": (without_name, "raises ValueError"),
    "another error": (of_another_kind, "raises RuntimeError"),
    "another result": (that_sees_memory, "differs from a clean copy"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_faults(name: str) -> None:
    function, fault = BROKEN[name]
    x = torch.arange(256, dtype=torch.uint8)
    call = Call(name, function, {"x": x})
    spoiled = hostile_calls.Spoiled(name, call, {"x": x[3:]}, {"x": x[3:].clone()}, "native", 1)
    assert str(hostile_calls.judge(spoiled)).startswith(fault)
    accepting = spoiled._replace(call=Call(name, lambda x: x, {"x": x}), clean=None)
    assert hostile_calls.judge(accepting) == "accepted"
