# SPDX-License-Identifier: BSD-3-Clause
"""`switchgear bench` refuses options that it would ignore."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from switchgear.cli import main
from switchgear_bench import run
from switchgear_bench.modes import FILES, LAYERS, MODES

ELSEWHERE = {*FILES, "competitors_folder"}  # options that are read outside the module of a mode


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--parallel 2 --from FILE", "--from: not with --parallel"),
        ("--generate --from FILE --csv FILE", "--csv: not with --generate"),
        ("--model --markdown FILE", "--markdown: not with --model"),
        ("--model --routers --quality", "--quality: not with --model"),
        ("--device cuda --plot DIR", "--plot: not with --device cuda"),
        ("--threads-model --threads 999", "--threads: not with --threads-model"),
        ("--list --json FILE", "--json: not with --list"),
        ("--checkpoint DIR", "--checkpoint: only with --compress or --offload"),
        ("--from FILE --tokens 3", "--tokens: not with --from, which measures nothing"),
        ("--routers --from FILE --shapes olmoe", "--shapes: not with --from, which measures nothing"),
    ],
)
def test_an_option_that_would_be_ignored(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments.split()]) == 2
    assert capsys.readouterr().err == f"switchgear bench: {message}\n"
    assert not list(tmp_path.iterdir())


def test_options_of_the_modes_exist() -> None:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    options = set(vars(parser.parse_args([])))
    taken = LAYERS.options.union(*(mode.options for mode in MODES.values()))
    assert set(MODES).isdisjoint(taken)
    assert options == taken | set(MODES)


@pytest.mark.parametrize("name", [name for name in MODES if name != "list"])
def test_a_mode_takes_what_its_module_reads(name: str) -> None:
    mode = MODES[name]
    source = Path(run.__file__).with_name(f"{mode.module}.py").read_text()
    read = set(re.findall(r"\bargs\.(\w+)", source)) - {name}
    assert read <= mode.options
    assert mode.options - read <= ELSEWHERE
