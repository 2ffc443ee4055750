# SPDX-License-Identifier: BSD-3-Clause
"""A run fails if a test is skipped for an unknown reason, or takes too long."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import skips

TESTS = {
    "known": ("def test(): pytest.skip('needs nvcc')", 0, "1 skipped"),
    "unknown": ("def test(): pytest.skip('not today')", 1, "test_one.py::test: not today"),
    "a whole file": ("pytest.skip('not today', allow_module_level=True)", 1, "test_one.py: not today"),
    "expected to fail": ("@pytest.mark.xfail(reason='not yet')\ndef test(): raise KeyError", 0, "1 xfailed"),
    "hangs": ("import conftest\nconftest.TIME_LIMIT = 1\ndef test():\n    while True: pass", 1, "takes more than 1 s"),
}

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


def test_an_unknown_reason_is_found() -> None:
    known = ("pytest.skip('needs nvcc')", "pytest.skip(f'no {isa} kernels: this build on this processor has {isas}')")
    unknown = ("pytest.skip('not today')", "pytest.skip(f'not on {day}')", "pytest.importorskip('scipy')")
    assert unknown_reasons("\n".join((*known, *unknown))) == list(unknown)


@pytest.mark.slow  # each starts a process
@pytest.mark.parametrize("name", TESTS)
def test_a_run(name: str, tmp_path: Path) -> None:
    text, status, line = TESTS[name]
    for file in ("conftest.py", "skips.py", "backends_in_use.py", "native_modules.py"):
        shutil.copy(Path(__file__).parent / file, tmp_path)
    (tmp_path / "test_one.py").write_text(f"import pytest\n{text}\n")
    options = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(tmp_path)]
    result = subprocess.run(options, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert (result.returncode, line in result.stdout) == (status, True), result.stdout + result.stderr
