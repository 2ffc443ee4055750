# SPDX-License-Identifier: BSD-3-Clause
"""The tables of the documents are those of the files of results: `--from` changes nothing in them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from switchgear.cli import main

pytest.importorskip("rich", reason="rich is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

ROOT = Path(__file__).parents[2]
RESULTS = {  # of each document with tables: the mode of `switchgear bench`, and the file
    "README.md": ("layers", "cpu-avx512bf16"),
    "docs/adapters.md": ("adapters", "adapters-avx512bf16-zen5"),
    "docs/benchmarks.md": ("quality", "quality-avx512bf16"),
    "docs/compression.md": ("compress", "compression-avx512bf16"),
    "docs/huggingface.md": ("generate", "generate-avx512bf16-zen5"),
    "docs/offload.md": ("offload", "offload-avx512bf16-zen5"),
    "docs/performance.md": ("layers", "cpu-avx512bf16"),
    "docs/performance_amx.md": ("layers", "cpu-amx"),
    "docs/performance_avx2.md": ("layers", "cpu-avx2-zen3"),
    "docs/performance_threads.md": ("threads", "threads-zen3"),
    "docs/performance_zen5.md": ("layers", "cpu-avx512bf16-zen5"),
    "docs/routing_costs.md": ("routers", "routers-avx512bf16"),
    "docs/weights.md": ("layers", "cpu-avx512bf16-zen5-minifloat"),
}


@pytest.mark.parametrize("document", RESULTS)
def test_tables_are_those_of_the_results(document: str, tmp_path: Path) -> None:
    mode, results = RESULTS[document]
    copy = shutil.copy(ROOT / document, tmp_path)
    assert main(["bench", mode, "--from", f"{ROOT}/bench/results/{results}.json", "--markdown", str(copy)]) == 0
    assert Path(copy).read_text() == (ROOT / document).read_text()


def test_each_document_with_tables_is_compared() -> None:
    documents = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    found = {path for path in documents if re.search(r"^<!-- bench:\w+ -->$", path.read_text(), re.MULTILINE)}
    assert found == {ROOT / document for document in RESULTS}
