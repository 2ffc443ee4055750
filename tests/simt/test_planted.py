# SPDX-License-Identifier: BSD-3-Clause
"""Checks in a second, before anything is built, that the mistakes of planted.py still match the kernels."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "planted"))

from kernels import MISTAKES, Mistake
from stored import STORED

KERNELS = Path(__file__).parents[2] / "csrc" / "cuda"


@pytest.mark.parametrize("mistake", [*MISTAKES, *STORED], ids=lambda mistake: mistake.name)
def test_a_mistake_edits_one_place(mistake: Mistake) -> None:
    assert (KERNELS / mistake.header).read_text().count(mistake.before) == 1
    assert mistake.before != mistake.after
