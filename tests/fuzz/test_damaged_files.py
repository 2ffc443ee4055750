# SPDX-License-Identifier: BSD-3-Clause
"""A short run of the program, and what it reports for readers that are broken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import damaged_files
import pytest
import torch
from file_formats import FORMATS, Tensors, read_trace

pytest.importorskip("transformers", reason="transformers is not installed")


def test_damaged_files() -> None:
    assert [fault for number in range(6 * len(FORMATS)) if (fault := damaged_files.check(1, number))] == []


def test_a_case_depends_on_the_seed_and_its_number() -> None:
    titles = [damaged_files.title(seed, 11) for seed in range(20)]
    assert titles[7] == damaged_files.title(7, 11)
    assert len(set(titles)) > 5


def that_raises_another_error(folder: Path) -> Tensors:
    raise KeyError("expected")


def that_raises_beside_exceptions(folder: Path) -> Tensors:
    raise GeneratorExit("expected")


def that_explains_nothing(folder: Path) -> Tensors:
    raise ValueError("invalid")


def that_leaves_out_a_tensor(folder: Path) -> Tensors:
    return dict(list(read_trace(folder).items())[1:])


def that_rounds(folder: Path) -> Tensors:
    return {key: tensor * (1 + 2**-50) if tensor.is_floating_point() else tensor
            for key, tensor in read_trace(folder).items()}  # fmt: skip


def that_widens(folder: Path) -> Tensors:
    return {key: tensor.double() for key, tensor in read_trace(folder).items()}


BROKEN: dict[Callable[[Path], Tensors], str] = {
    that_raises_another_error: "raises KeyError",
    that_raises_beside_exceptions: "raises GeneratorExit",
    that_explains_nothing: "raises ValueError: invalid",
    that_leaves_out_a_tensor: "gives other tensors",
    that_rounds: "gives other numbers in",
    that_widens: "as torch.float64",
}


@pytest.mark.parametrize("reader", BROKEN, ids=lambda reader: reader.__name__)
def test_faults(reader: Callable[[Path], Tensors], tmp_path: Path) -> None:
    format = FORMATS["trace"]
    format.write(tmp_path)
    assert damaged_files.judge(format, tmp_path) is None
    assert BROKEN[reader] in str(damaged_files.judge(format._replace(read=reader), tmp_path))


def test_a_file_that_only_the_reader_accepts(tmp_path: Path) -> None:
    (tmp_path / "trace").write_bytes(b"")
    format = FORMATS["trace"]._replace(read=lambda folder: {"": torch.zeros(1)})
    assert "but the plain reader raises" in str(damaged_files.judge(format, tmp_path))
