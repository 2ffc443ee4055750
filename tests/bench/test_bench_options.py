# SPDX-License-Identifier: BSD-3-Clause
"""Each subcommand of `switchgear bench` refuses options that it would ignore."""

from __future__ import annotations

import builtins
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from switchgear.cli import main
from switchgear_bench import COMMANDS


@pytest.mark.parametrize("arguments", ["parallel 2 --from F", "generate --csv FILE", "model --markdown FILE",
                                       "cuda --plot DIR", "threads --threads 9", "layers --ranks 8"])  # fmt: skip
def test_an_option_of_another_subcommand(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", *arguments.split()])
    assert ended.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", ["layers --from FILE --tokens 3", "routers --from FILE --shapes olmoe",
                                       "quality --from FILE --quick", "threads --from FILE --dtypes fp32"])  # fmt: skip
def test_an_option_beside_from(
    arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command, *_, option = [word for word in arguments.split() if word.startswith("--") or word in COMMANDS]
    assert main(["bench", *arguments.split()]) == 2
    expected = f"switchgear bench {command}: {option}: not with --from, which measures nothing\n"
    assert capsys.readouterr().err == expected
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["bench layers", "demo", "train-tiny"])
def test_without_the_distribution(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def absent(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "switchgear_bench":
            raise ModuleNotFoundError("No module named 'switchgear_bench'", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    assert main(command.split()) == 2
    words = capsys.readouterr().err
    assert words.startswith(f"switchgear {command.split()[0]}: needs the distribution switchgear-bench")
    assert words.count("\n") == 1


def test_the_old_import_path() -> None:
    code = (
        "from switchgear.bench.case import Case; from switchgear.bench.competitors import competitor; "
        "import switchgear_bench.case as case, switchgear_bench.competitors as competitors; "
        "assert Case is case.Case and competitor is competitors.competitor"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
