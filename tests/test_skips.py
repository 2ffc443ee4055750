# SPDX-License-Identifier: BSD-3-Clause
"""A run fails if a test is skipped for an unknown reason, or takes too long."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = {
    "known": ("def test(): pytest.skip('needs nvcc')", 0, "1 skipped"),
    "unknown": ("def test(): pytest.skip('not today')", 1, "test_one.py::test: not today"),
    "a whole file": ("pytest.skip('not today', allow_module_level=True)", 1, "test_one.py: not today"),
    "expected to fail": ("@pytest.mark.xfail(reason='not yet')\ndef test(): raise KeyError", 0, "1 xfailed"),
    "hangs": ("import conftest\nconftest.TIME_LIMIT = 1\ndef test():\n    while True: pass", 1, "takes more than 1 s"),
}


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
