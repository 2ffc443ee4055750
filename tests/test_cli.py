# SPDX-License-Identifier: BSD-3-Clause
"""The command line: what all commands share, and `info`. Mistakes must be named."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import switchgear
from switchgear.cli import COMMANDS, info, machine, main
from switchgear.cli.common import CommandError, console, require
from switchgear.utils.packages import failed_import, first_line

# ---- info ------------------------------------------------------------------------------------------------------------


def test_info_prints_valid_json() -> None:
    command = [sys.executable, "-m", "switchgear", "info", "--json"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    info = json.loads(output)
    assert info["versions"]["torch"] == torch.__version__
    assert info["backends"]["cpu"]["isa"] in info["backends"]["cpu"]["isas_available"]
    assert info["threads"]["torch"] >= 1
    assert len(info["threads"]["openmp_runtimes"]) <= 1, info["warnings"]  # torch's and ours are the same
    assert info["backends"]["cuda"]["available"] or info["backends"]["cuda"]["reason"]


def test_info_prints_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for word in ("versions", "machine", "backends", "threads", "native CPU", "CUDA", "huge pages", "OpenMP runtimes"):
        assert word in text


def test_info_prints_the_folder_of_the_cmake_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(info._C, "__file__", str(tmp_path / "_C.so"))
    assert main(["info", "--cmake-dir"]) == 2
    package = tmp_path / "lib/cmake/switchgear"
    package.mkdir(parents=True)
    capsys.readouterr()
    assert main(["info", "--cmake-dir"]) == 0
    assert capsys.readouterr().out == f"{package}\n"


def test_a_reader_that_ends_early_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """`switchgear info | head -3`: no traceback, also from the flush at exit."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["info"]) == 141
        pipe.write("more")


def test_output_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["info"]) == 1
        full.write("more")
    assert "switchgear info: cannot write: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_that_cannot_be_written_is_named(
    argument: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for buffering in (-1, 1):  # it fails when it is flushed, or when argparse writes it
        with open("/dev/full", "w", buffering) as full:
            monkeypatch.setattr(sys, "stdout", full)
            assert main([argument]) == 1
        assert capsys.readouterr().err == "switchgear: cannot write: No space left on device\n"


def test_a_table_whose_reader_ends_early_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich", reason="rich is not installed")
    monkeypatch.setattr(info, "run", lambda _: console().print("a table"))
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["info"]) == 141


def test_an_interrupt_while_commands_are_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("switchgear.cli.Program.parser", interrupted)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "switchgear: interrupted\n"


@pytest.mark.parametrize("package", ["switchgear", "switchgear_bench"])
@pytest.mark.parametrize("is_module", [False, True])
def test_an_interrupt_while_torch_is_imported(package: str, is_module: bool, tmp_path: Path) -> None:
    """By the console script, and by `python -m`."""
    pytest.importorskip(package, reason="switchgear_bench is not installed")
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise ImportError")
    name = "main" if package == "switchgear" else "bench"
    script = f"import sys; from switchgear_command import {name}; sys.exit({name}())"
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    ended = subprocess.run(
        [sys.executable, *(["-m", package] if is_module else ["-c", script]), "info"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (130, "switchgear: interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_that_a_library_turns_into_another_error(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], interruptible: None
) -> None:
    before = signal.getsignal(number)

    def run(_: Any) -> int:
        try:
            signal.raise_signal(number)
        except KeyboardInterrupt:
            raise ImportError("could not import") from None
        return 0

    monkeypatch.setattr(info, "run", run)
    assert main(["info"]) == 128 + number
    assert capsys.readouterr().err == "switchgear info: interrupted\n"
    assert signal.getsignal(number) is before


LONG = {
    "doctor": "",
    "inspect": "MODEL --text TEXT --length 32 --out OUT",
    "compress": "MODEL --recipe RECIPE --out OUT",
    "convert": "MODEL --operation dense --out OUT",
    "offload-plan": "MODEL --memory 1M --text TEXT",
    "plan": "MODEL --memory 8M --disk-rate 1M",
    "offload-store": "MODEL --out OUT",
    "plan-parallel": "--model mixtral --ep 8 --nodes 2",
    "bench": "layers --quick --shapes tiny --tokens 5 --dtypes fp32 --threads 1",
    "demo": "--model mixtral --steps 3 --out OUT",
    "train-tiny": "--steps 2 --out OUT",
}


@pytest.fixture(scope="module")
def long_arguments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("long")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.OlmoeConfig(**sizes, num_attention_heads=2, num_experts=4, num_experts_per_tok=2)
    transformers.OlmoeForCausalLM(config).save_pretrained(folder / "model")
    (folder / "text").write_bytes(bytes(range(256)) * 8)
    calibration = {"text": ["text"], "tokens": 512, "length": 64}
    steps = [{"do": "prune_experts", "keep": 3, "criterion": "reap"}]
    (folder / "recipe").write_text(json.dumps({"calibration": calibration, "steps": steps}))
    return {word: str(folder / word.lower()) for word in ("MODEL", "TEXT", "RECIPE")}


@pytest.mark.parametrize("calls", [50, 100])
@pytest.mark.parametrize("command", LONG)
@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_of_a_long_command(
    command: str, calls: int, long_arguments: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At some call of a function of the package, in the middle of its work: one line, no traceback."""
    places, done = long_arguments | {"OUT": str(tmp_path / "out")}, 0

    def interrupt(frame: types.FrameType, event: str, _: Any) -> None:
        nonlocal done
        if frame.f_code.co_flags & inspect.CO_GENERATOR:
            return  # Python ignores an interrupt while it closes one
        if event == "call" and str(frame.f_globals.get("__name__")).startswith("switchgear"):
            done += 1
            if done == calls:
                signal.raise_signal(signal.SIGINT)

    arguments = [places.get(word, word) for word in LONG[command].split()]
    try:
        sys.setprofile(interrupt)
        status = main([command, *arguments])
    finally:
        sys.setprofile(None)
    assert status == 130
    assert capsys.readouterr().err.splitlines()[-1].endswith(": interrupted")


FILES = [
    (["compress", "MODEL", "--out", "OUT", "--recipe"], "--recipe"),
    (["convert", "MODEL", "--out", "OUT", "--recipe"], "recipe"),
    (["plan-parallel", "--trace"], "--trace"),
    (["inspect", "MODEL", "--out", "OUT", "--text"], "--text"),
    (["offload-plan", "MODEL", "--memory", "1G", "--text"], "--text"),
]


@pytest.mark.parametrize(("arguments", "option"), FILES)
def test_a_file_without_end_is_refused(
    arguments: list[str], option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, and a pipe without a writer, too."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    pytest.importorskip("rich", reason="rich is not installed")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "pipe")
    places = {"MODEL": str(tmp_path / "model"), "OUT": str(tmp_path / "out")}
    for file in ("/dev/zero", str(tmp_path / "pipe"), str(tmp_path)):
        assert main([*(places.get(word, word) for word in arguments), file]) == 2
        error = capsys.readouterr().err
        assert f"{option}: " in error
        assert error.count("\n") == 1


def test_a_checkpoint_with_a_pipe_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    (tmp_path / "config.json").write_text("{}")
    os.mkfifo(tmp_path / "tokenizer.json")
    assert main(["offload-store", str(tmp_path), "--out", str(tmp_path / "store")]) == 2
    assert "tokenizer.json" in capsys.readouterr().err


def test_output_may_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["info"]) == 0


def test_errors_of_a_library_are_not_those_of_the_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: Any) -> int:
        raise OSError("cannot identify a picture")

    monkeypatch.setattr(info, "run", fails)
    assert main(["info"]) == 1
    assert capsys.readouterr().err == "switchgear info: cannot identify a picture\n"


def test_errors_may_be_closed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`switchgear convert 2>&-`: they go nowhere, not to the output, nor to the next file that is opened."""
    kept = os.dup(2)
    os.close(2)
    try:
        monkeypatch.setattr(sys, "stderr", None)
        assert main(["convert"]) == 2
        assert os.path.samestat(os.fstat(2), os.stat(os.devnull))
        assert os.get_inheritable(2)
        assert not capsys.readouterr().out
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def test_help_shows_defaults_that_are_not_empty(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan-parallel", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "placed by load (default: 0)" in text
    assert "(default: None)" not in text
    assert "(default: --ep)" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"switchgear {switchgear.__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_can_be_printed_in_any_locale(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.isascii()


def test_openmp_runtimes_are_told_apart() -> None:
    maps = """\
7f00-7f01 r-xp 00000000 08:01 11 /opt/torch/lib/libgomp.so.1
7f01-7f02 r--p 00001000 08:01 11 /opt/torch/lib/libgomp.so.1
7f03-7f04 r-xp 00000000 08:01 12 /opt/sklearn.libs/libgomp-a34b3233.so.1.0.0
7f05-7f06 r-xp 00000000 08:01 13 /opt/my folder/libiomp5.so
7f07-7f08 r-xp 00000000 08:01 14 /opt/llvm/libomp.so.5 (deleted)
7f09-7f0a r-xp 00000000 08:01 15 /opt/llvm/libomptarget.so
7f0b-7f0c rw-p 00000000 00:00 0  [heap]
7f0d-7f0e rw-p 00000000 00:00 0
"""
    names = [Path(path).name for path in machine.openmp_runtimes(maps)]
    assert sorted(names) == [
        "libgomp-a34b3233.so.1.0.0", "libgomp.so.1", "libiomp5.so", "libomp.so.5 (deleted)",
    ]  # fmt: skip


# ---- wrong arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "command"),
        (["train"], "invalid choice"),
        (["info", "--jason"], "switchgear info: error: unrecognized arguments: --jason"),
        (["demo", "--model", "gpt5"], "invalid choice"),
        (["demo", "--steps", "0"], "--steps: expected an integer of at least 1, got '0'"),
        (["demo", "--sequence-length", "1"], "at least 2"),
        (["demo", "--learning-rate", "nan"], "--learning-rate: expected a number of at least 0, got 'nan'"),
        (["demo", "--seed", str(2**63)], "--seed: expected an integer of 64 bits, got '9223372036854775808'"),
        (["train-tiny", "--seed", str(-(2**63) - 1)], "--seed: expected an integer of 64 bits"),
        (["train-tiny", "--seed", "one"], "--seed: expected an integer of 64 bits, got 'one'"),
        (["bench", "layers", "--routing", "skewed"], "invalid choice"),
        (["bench", "layers", "--dtypes", "fp6"], "--dtypes: expected a list of bf16"),
        (["bench", "layers", "--modes", "backward"], "--modes: expected a list of forward, train"),
        (["bench", "layers", "--tokens", "1,-2"], "--tokens: expected an integer of at least 1, got '-2'"),
        (["bench", "layers", "--tokens", "many"], "--tokens: expected an integer of at least 1, got 'many'"),
        (["bench", "layers", "--budget", "nan"], "--budget: expected a number above 0, got 'nan'"),
        (["bench", "layers", "--budget", "-1"], "--budget: expected a number above 0, got '-1'"),
        (["bench", "parallel", "2", "--bandwidth", "nan"], "--bandwidth: expected a number of at least 0, got 'nan'"),
    ],
)
def test_argparse_names_the_mistake(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "layers", "--shapes", "mixtrall"], "--shapes: expected a list of tiny"),
        (["bench", "layers", "--competitors", "megablocks"], "--competitors: expected"),
        (["bench", "layers", "--json", "/nowhere/results.json"], "--json: cannot write"),
        (["bench", "layers", "--from", "/nowhere/results.json"], "--from: cannot read"),
        (["plan-parallel", "--json", "/nowhere/results.json"], "--json: cannot write"),
        (["demo", "--implementations", "eager,eager"], "--implementations: expected distinct names"),
        (["demo", "--text", "/nowhere/text"], "--text: cannot read"),
        (["demo", "--text", "/dev/zero"], "--text: expected a regular file"),
        (["demo", "--out", "/dev/null/report"], "--out: cannot write to"),
        (
            ["offload-plan", "/nowhere", "--memory", "1G", "--plot", "/nowhere/hits.pdf"],
            "--plot: expected a name that ends in .png, got /nowhere/hits.pdf",
        ),
        (
            ["offload-plan", "/nowhere", "--memory", "1G", "--plot", "/nowhere/hits"],
            "--plot: expected a name that ends in .png",
        ),
        (
            ["compress", "/nowhere", "--recipe", "r.json", "--out", "/dev/null"],
            "--out: expected a folder that does not",
        ),
        (["offload-store", "/nowhere", "--out", "/dev/null"], "--out: expected a folder that does not exist"),
        (
            ["convert", "/nowhere", "--out", "/dev/null", "--operation", "split"],
            "--out: expected a folder that does not",
        ),
    ],
)
def test_commands_name_the_mistake(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_a_missing_extra_says_what_to_install(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # import raises ImportError
    assert main(["demo", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"needs {package}" in error
    assert "pip install 'switchgear[" in error


def test_an_error_that_begins_with_an_empty_line_has_a_reason() -> None:
    assert first_line(ImportError("\nit requires torch\npip install torch")) == "ImportError: it requires torch"


def test_failed_imports_say_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    late = ModuleNotFoundError("Could not import module 'AutoConfig'. Are this object's requirements defined?")
    late.__cause__ = ModuleNotFoundError("No module named 'rich.table'", name="rich.table")
    absent = ModuleNotFoundError("No module named 'numpy'", name="numpy")
    damaged = ImportError("libfoo.so is missing")
    within = ImportError("no name", name="transformers.generation")
    other = ModuleNotFoundError("No module named 'peft'", name="peft")

    def lazy(name: str) -> Any:
        raise late

    broken = types.ModuleType("transformers")
    monkeypatch.setattr(broken, "__getattr__", lazy, raising=False)
    wanted = "needs rich (No module named 'rich.table'); pip install 'switchgear[bench]'"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "transformers", broken)
        with pytest.raises(CommandError, match=re.escape(wanted)):
            require("transformers")
    for error, module, words in (
        (absent, "transformers", "needs numpy (No module named 'numpy'); pip install 'switchgear[transformers]'"),
        (absent, "matplotlib.pyplot", "needs numpy (No module named 'numpy'); pip install 'switchgear[bench]'"),
        (damaged, "PIL.Image", "PIL is installed but cannot be imported: libfoo.so is missing"),
        (damaged, "", "libfoo.so is missing"),
        (within, "switchgear.integrations.transformers", "transformers is installed but cannot be imported: no name"),
        (other, "", "needs peft (No module named 'peft'); pip install peft"),
    ):
        assert failed_import(error, module) == words
    monkeypatch.setattr(info, "run", lambda _: lazy(""))
    assert main(["info"]) == 2
    assert capsys.readouterr().err == f"switchgear info: {wanted}\n"


def test_info_needs_torch_alone() -> None:
    """So do the other commands, up to the point where they need more. Nothing imports torch's compiler, and the package
    itself nothing of the commands."""
    expected = {
        "info": (0, "native CPU"), "demo": (2, "needs"),
        "bench layers": (2, "needs rich"), "train-tiny": (2, "needs transf"),
        "inspect tiny": (2, "needs transf"), "compress tiny --recipe r --out o": (2, "needs transf"),
    }  # fmt: skip
    code = f"""
import contextlib, io, json, sys
sys.modules.update(dict.fromkeys(["numpy", "rich", "matplotlib", "transformers", "PIL"]))
import switchgear
assert not {{"switchgear.cli", "switchgear_bench"}} & set(sys.modules)
from switchgear.cli import main
for command in {list(expected)}:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        status = main(command.split())
    assert "torch._dynamo" not in sys.modules, command
    assert command != "info" or "torch.distributed.checkpoint" not in sys.modules  # plan-parallel needs it
    print(json.dumps([status, text.getvalue()]))
"""
    command = [sys.executable, "-W", "ignore", "-c", code]
    answers = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for (status, words), answer in zip(expected.values(), map(json.loads, answers), strict=True):
        assert answer[0] == status, answer[1]
        assert words in answer[1]
