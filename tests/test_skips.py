# SPDX-License-Identifier: BSD-3-Clause
"""A run fails if a test is skipped for an unknown reason, or takes too long."""

from __future__ import annotations

import ast
from pathlib import Path

import skips

SKIPS = ("skip", "skipif", "importorskip")
SAMPLES = ("word", "8", "sm_80")  # of what stands in the braces of an f-string


def reason_of(call: ast.Call) -> ast.expr | None:
    named = [keyword.value for keyword in call.keywords if keyword.arg == "reason"]
    positional = call.args if ast.unparse(call.func) == "pytest.skip" else []
    return next(iter([*named, *positional]), None)


def is_known(reason: ast.expr | None) -> bool:
    """True for a reason that is computed, too: the run that skips checks it."""
    if isinstance(reason, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else None for part in reason.values]
        filled = ["".join(sample if part is None else str(part) for part in parts) for sample in SAMPLES]
        return any(map(skips.is_allowed, filled))
    if isinstance(reason, ast.Constant):
        return skips.is_allowed(str(reason.value))
    return reason is not None


def unknown_reasons(source: str) -> list[str]:
    """The calls that skip tests without a reason, or for one that tests/skips.py does not list."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    skipping = [call for call in calls if ast.unparse(call.func).split(".")[-1] in SKIPS]
    return [ast.unparse(call) for call in skipping if not is_known(reason_of(call))]


def test_every_reason_in_the_tests_is_known() -> None:
    """Also of tests that are not skipped on this machine."""
    found = {path.name: unknown_reasons(path.read_text()) for path in Path(__file__).parent.rglob("*.py")}
    assert not {name: calls for name, calls in found.items() if calls}
