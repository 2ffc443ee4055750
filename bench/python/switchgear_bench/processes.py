# SPDX-License-Identifier: BSD-3-Clause
"""A separate process for each measurement: its own threads, caches, allocator and peak memory."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from switchgear.cli.common import CommandError


class Child:
    """A new process that runs serve(connection, *arguments), which sends its answers as ("ok", value).

    It ends when it is closed. `receive` re-raises its errors: a CommandError, or a RuntimeError with the traceback.
    """

    def __init__(self, name: str, serve: Callable[..., None], *arguments: Any) -> None:
        # spawn: torch's thread pool does not survive a fork, and peak memory must not include the parent's
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(serve, theirs, *arguments), name=name, daemon=True)
        # Ctrl-C reaches all processes of a terminal; until _run takes it, each would print a traceback.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    def receive(self) -> Any:
        try:
            status, value = self.connection.recv()
        except EOFError:
            self._process.join(5)
            raise CommandError(f"the process of {self.name} ended (exit code {self._process.exitcode})") from None
        if status == "refused":
            raise CommandError(value)
        if status == "failed":
            raise RuntimeError(f"the process of {self.name} failed:\n{value}")
        return value

    def close(self) -> None:
        self.connection.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _run(serve: Callable[..., None], connection: Connection, *arguments: Any) -> None:
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        serve(connection, *arguments)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):  # the parent has exited or is exiting
        pass
    except CommandError as error:
        connection.send(("refused", str(error)))
    except Exception:
        connection.send(("failed", traceback.format_exc()))
