# SPDX-License-Identifier: BSD-3-Clause
"""The command line: `switchgear info | demo | inspect | …`, each command a module with `add_arguments` and `run`."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType, ModuleType
from typing import Any

from ..ops import version
from ..utils.packages import failed_import
from .common import CommandError

COMMANDS = {
    "info": "versions, backends, threads and OpenMP runtimes of this installation",
    "doctor": "check each backend against float64, and say what is slow or missing here",
    "demo": "train a small Hugging Face MoE model with every experts implementation and compare them",
    "train-tiny": "train a small MoE model on real text, to try compression on",
    "inspect": "report how a model's routers use its experts: load, entropy, similarity, domains, caches",
    "compress": "prune, merge and quantize the experts of a checkpoint by a recipe",
    "plan": "predict what a model with its experts on disk needs, and its speed, from its sizes and your rates",
    "offload-plan": "predict the hits of a cache of experts, by policy and size, on your text",
    "offload-store": "write the experts of a checkpoint into a store, to run a model bigger than memory",
    "store": "write a checkpoint with its experts and linear layers in stored forms, for from_pretrained",
    "serve": "serve a model by transformers' OpenAI-style API",
    "chat": "chat with a model in the terminal",
    "convert": "convert checkpoints: dense to MoE and back, merges, layouts of experts",
    "bench": "time MoE layers at the shapes of real models, against other implementations",
    "plan-parallel": "predict bytes, waiting and memory of experts distributed over many ranks",
}
BENCHES = ("bench", "demo", "train-tiny")  # run by the distribution switchgear-bench


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Appends defaults, except empty ones and those that the text states."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_empty = action.default is None or action.default is False or action.default in ([], ())  # 0 is a default
        if is_empty or "(default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class _Parser(argparse.ArgumentParser):
    def _print_message(self, message: str, file: Any = None) -> None:
        """Help and versions that cannot be written are errors; argparse hides them."""
        if file is sys.stdout:
            file.write(message)
        else:
            super()._print_message(message, file)


class _CommandParser(_Parser):
    """The parser of one command, which is imported only if it is called: some take seconds."""

    module: Callable[[], ModuleType] | None = None  # imports the command, whose arguments are not added yet

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Unknown arguments are errors with the usage of the command; argparse leaves them to the program."""
        if self.module is not None:
            self.module().add_arguments(self)
            self.module = None
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown


@dataclass(frozen=True)
class Program:
    """A program whose commands are modules of a package, each with `add_arguments(parser)` and `run(args)`."""

    name: str
    about: str
    package: str
    commands: dict[str, str]  # what each does

    def module(self, command: str) -> ModuleType:
        return importlib.import_module(f"{self.package}.{command.replace('-', '_')}")

    def parser(self) -> argparse.ArgumentParser:
        parser = _Parser(prog=self.name, description=self.about)
        parser.add_argument("--version", action="version", version=f"switchgear {version}")
        commands = parser.add_subparsers(dest="command", metavar="command", required=True, parser_class=_CommandParser)
        for name, text in self.commands.items():
            sub = commands.add_parser(
                name, help=text, description=text[0].upper() + text[1:] + ".",
                formatter_class=_Help, allow_abbrev=False,
            )  # fmt: skip
            sub.module = partial(self.module, name)
        return parser

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Runs one command; returns the exit status: 0 done, 1 failed, 2 wrong arguments or a missing package."""
        _open_closed()
        program = self.name
        try:
            with _interruptible():
                try:
                    args = self.parser().parse_args(argv)
                finally:
                    sys.stdout.flush()  # argparse exits after --help
                program = f"{self.name} {args.command}"
                status = int(self.module(args.command).run(args))
                sys.stdout.flush()
                return status
        except CommandError as error:
            print(f"{program}: {error}", file=sys.stderr)
            return 2
        except ImportError as error:
            print(f"{program}: {failed_import(error)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt as error:
            print(f"{program}: interrupted", file=sys.stderr)
            return 128 + (error.args[0] if isinstance(error, _Interrupt) else signal.SIGINT)
        except BrokenPipeError:  # the reader of the output has ended, as in `switchgear info | head -3`
            _end_output()
            return 141
        except OSError as error:
            if error.filename is not None:  # of a file; without a name it is the output's
                raise
            if error.errno is None:  # nor of the system, but of a library
                print(f"{program}: {error}", file=sys.stderr)
                return 1
            print(f"{program}: cannot write: {error.strerror}", file=sys.stderr)
            _end_output()
            return 1


PROGRAM = Program("switchgear", "Mixture-of-Experts layers on hand-written kernels.", __name__, COMMANDS)
build_parser = PROGRAM.parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command of `switchgear`, and returns the exit status of `Program.main`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return _run_bench(arguments) if arguments and arguments[0] in BENCHES else PROGRAM.main(arguments)


def _run_bench(arguments: list[str]) -> int:
    """`switchgear bench layers` is `switchgear-bench layers`, `switchgear demo` is `switchgear-bench demo`."""
    try:
        import switchgear_bench
    except ModuleNotFoundError as error:
        if error.name != "switchgear_bench":
            raise
        how = "pip install ./bench/python, in a clone of switchgear"
        print(f"switchgear {arguments[0]}: needs the distribution switchgear-bench; {how}", file=sys.stderr)
        return 2
    if arguments[0] == "bench":
        return switchgear_bench.main(arguments[1:], "switchgear bench")
    return switchgear_bench.main(arguments, "switchgear")


class _Interrupt(KeyboardInterrupt):
    """By a signal, which is its argument."""


@contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C, and the signal by which a program is asked to end, raise _Interrupt, so that what a command has begun is
    undone; also for whatever error a library has made of it, such as "could not import"."""
    interrupts: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        raise _Interrupt(number)

    befores = {}
    if threading.current_thread() is threading.main_thread():
        for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if signal.getsignal(number) is default:
                befores[number] = signal.signal(number, interrupt)
    try:
        yield
    except Exception as error:
        if interrupts:
            raise _Interrupt(interrupts[0]) from error
        raise
    finally:
        for number, before in befores.items():
            signal.signal(number, before)


def _open_closed() -> None:
    """Discards outputs that the caller has closed. The next file would get their numbers if they stayed closed."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            os.set_inheritable(number, True)  # dup2 does so if the numbers differ
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _end_output() -> None:
    """Discards the rest of the output, or Python complains when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
