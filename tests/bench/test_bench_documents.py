# SPDX-License-Identifier: BSD-3-Clause
"""The tables of the documents are those of the files of results: `switchgear-bench tables` changes nothing in them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="rich is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from switchgear_bench import main

ROOT = Path(__file__).parents[2]
DOCUMENTS = [path for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")) if "<!-- bench:" in path.read_text()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_those_of_the_results(document: Path, tmp_path: Path) -> None:
    text = document.read_text()
    emptied = re.sub(r"^(<!-- bench:.* -->\n)(?:(?!<!-- ).*\n)*", r"\1", text, flags=re.MULTILINE)
    assert emptied != text
    copy = Path(shutil.copy(document, tmp_path))
    copy.write_text(emptied)
    assert main(["tables", "--results", str(ROOT / "bench/results"), str(copy)]) == 0
    assert copy.read_text() == text
