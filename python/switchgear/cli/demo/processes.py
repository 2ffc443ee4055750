# SPDX-License-Identifier: BSD-3-Clause
"""The parent's side of the demo's workers: start them, call them, and stop them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ...common import CommandError
from .worker import Settings, Step, serve


class Client:
    """A worker process. `call` waits for its answer; `train` yields the steps one by one."""

    def __init__(self, name: str, settings: Settings) -> None:
        # spawn: torch's thread pool does not survive a fork, and the memory must be the worker's own
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, settings), name=f"demo {name}", daemon=True)
        self.process.start()
        theirs.close()

    def receive(self) -> Any:
        try:
            status, value = self._connection.recv()
        except EOFError:
            self.process.join(5)
            raise CommandError(f"the process of {self.name} ended (exit code {self.process.exitcode})") from None
        if status == "refused":
            raise CommandError(value)
        if status == "error":
            raise RuntimeError(f"the process of {self.name} failed:\n{value}")
        return value

    def call(self, command: str, **arguments: Any) -> Any:
        self._connection.send((command, arguments))
        return self.receive()

    def train(self, count: int) -> Iterator[Step]:
        self._connection.send(("train", {"count": count}))
        for _ in range(count):
            yield self.receive()

    def close(self) -> None:
        self._connection.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


@contextmanager
def workers(settings: Mapping[str, Settings]) -> Iterator[dict[str, Client]]:
    """Start one process per entry, all at once; they are gone afterwards, whatever happens."""
    clients: dict[str, Client] = {}
    try:
        for name, setting in settings.items():
            clients[name] = Client(name, setting)
        yield clients
    finally:
        for client in clients.values():
            client.close()
