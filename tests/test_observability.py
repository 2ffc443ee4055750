# SPDX-License-Identifier: BSD-3-Clause
"""What a profiler and a log see."""

from __future__ import annotations

import logging

import pytest
import torch

import switchgear


def test_a_profile_has_the_ops_with_shapes() -> None:
    moe = switchgear.MoE(64, 32, 8, 2)
    x = torch.randn(5, 64)
    with torch.profiler.profile(record_shapes=True) as profile:
        moe(x).sum().backward()
        with torch.no_grad():
            moe(x)
    shapes = {row.key: row.input_shapes for row in profile.key_averages(group_by_input_shape=True)}
    names = {"gate", "route", "gate_route", "moe_forward", "moe_backward", "route_backward"}
    assert {f"switchgear::{name}" for name in names} <= shapes.keys()
    assert [5, 64] in shapes["switchgear::moe_forward"]


def test_the_log_says_what_changed(caplog: pytest.LogCaptureFixture) -> None:
    moe = switchgear.MoE(64, 32, 8, 2)
    with caplog.at_level(logging.INFO, "switchgear"):
        switchgear.store(moe, "int8")
        switchgear.restore(moe)
    stored, restored = (record.getMessage() for record in caplog.records)
    assert "1 module of experts as int8" in stored
    assert restored == "restored modules: 1"


def test_the_library_prints_nothing_by_itself() -> None:
    assert [type(handler) for handler in logging.getLogger("switchgear").handlers] == [logging.NullHandler]
