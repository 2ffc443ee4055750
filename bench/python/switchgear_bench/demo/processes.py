# SPDX-License-Identifier: BSD-3-Clause
"""The parent's side of the demo's workers: start them, call them, and stop them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from typing import Any

from switchgear_bench.processes import Child

from .worker import Settings, Step, serve


class Client(Child):
    """A worker process. `call` waits for its answer; `train` yields the steps one by one."""

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__(name, serve, settings)

    def call(self, command: str, **arguments: Any) -> Any:
        self.connection.send((command, arguments))
        return self.receive()

    def train(self, count: int) -> Iterator[Step]:
        self.connection.send(("train", {"count": count}))
        for _ in range(count):
            yield self.receive()


@contextmanager
def workers(settings: Mapping[str, Settings]) -> Iterator[dict[str, Client]]:
    """Starts one process per entry, all at once, and stops them on exit, also after an error."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(closing(Client(name, setting))) for name, setting in settings.items()}
