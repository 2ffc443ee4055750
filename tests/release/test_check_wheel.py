# SPDX-License-Identifier: BSD-3-Clause
"""A wheel that lacks a module is not published."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import check_wheel
import pytest

FILES = [
    "switchgear/__init__.py", "switchgear/py.typed", "switchgear/_C.pyi", "switchgear/include/switchgear/ops.h",
    "switchgear/lib/libswitchgear_core.a", "switchgear/lib/cmake/switchgear/switchgear-config.cmake",
]  # fmt: skip
CPU, CUDA = "switchgear/_C.cpython-312-x86_64-linux-gnu.so", "switchgear/_cuda.cpython-312-x86_64-linux-gnu.so"
WITHOUT_CPU, WITHOUT_CUDA = r"no file is switchgear/_C\..*\.so", r"no file is switchgear/_cuda\..*\.so"


@pytest.mark.parametrize(
    ("modules", "setting", "complaints"),
    [
        ([CPU, CUDA], "ON", []),
        ([CPU], "ON", [WITHOUT_CUDA]),
        ([CPU], "OFF", []),
        ([CPU], "AUTO", []),
        ([CUDA], "AUTO", [WITHOUT_CPU]),
        ([CPU, "switchgear/cli/info.h"], "OFF", ["switchgear/cli/info.h does not belong in a wheel"]),
        ([], "ON", [WITHOUT_CPU, WITHOUT_CUDA]),
    ],
)
def test_modules(
    modules: list[str], setting: str, complaints: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    wheel = tmp_path / "switchgear-0.1.0-cp312-cp312-linux_x86_64.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in FILES + modules:
            archive.writestr(name, "")
    monkeypatch.setattr(check_wheel, "readelf", lambda module, *options: "GLIBC_2.28")
    monkeypatch.setattr("sys.argv", ["check_wheel.py", str(wheel)])
    monkeypatch.setenv("SWITCHGEAR_CUDA", setting)
    assert check_wheel.main() == bool(complaints)
    assert [line.removeprefix("  error: ") for line in capsys.readouterr().out.splitlines() if "error" in line] == (
        complaints
    )


def test_metadata_name_the_license_and_each_python_that_has_a_wheel() -> None:
    root = Path(__file__).parents[2]
    text = (root / "pyproject.toml").read_text()  # Python 3.10 has no tomllib
    assert re.findall(r"Python :: 3\.(\d+)", text) == re.findall(r"cp3(\d+)-\*", text)
    license_file = re.search(r'^license-files = \["(.*)"\]$', text, re.MULTILINE)
    assert license_file is not None
    assert (root / license_file[1]).is_file()
