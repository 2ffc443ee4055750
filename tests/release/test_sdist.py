# SPDX-License-Identifier: BSD-3-Clause
"""The source distribution has what a build and its tests need, and nothing that was built."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_an_sdist_has_sources_tests_and_the_licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = pytest.importorskip("scikit_build_core.build", reason="scikit-build-core is not installed")
    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / build.build_sdist(str(tmp_path))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "PKG-INFO", "README.md", "CMakeLists.txt", "constraints.txt"} <= names
    assert {"python", "csrc", "include", "tests", "docs"} <= {name.partition("/")[0] for name in names}
    assert not [name for name in names if name.startswith(("build/", "dist/")) or name.endswith((".so", ".o", ".pyc"))]
