# SPDX-License-Identifier: BSD-3-Clause
"""Steps of construction that may block: each runs on a thread of its own, so that the caller can give up in time.

A store of torch.distributed may live in a process that is stopped, and gloo connects in one blocking call. Neither can
be interrupted. A step that was given up ends by itself, at the latest at the timeout of the store or of gloo, and what
it made is discarded.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_LONGEST_PAUSE = 0.05


class Background(Generic[T]):
    """Runs a function on a thread. Waitable; `result` holds what it returned once the wait is over."""

    result: T

    def __init__(self, function: Callable[[], T], discard: Callable[[T], None] | None = None) -> None:
        self._function, self._discard = function, discard
        self._error: BaseException | None = None
        self._given_up = False
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="switchgear-connect", daemon=True).start()

    def _run(self) -> None:
        try:
            result = self._function()
        except BaseException as error:
            self._error = error
        else:
            with self._lock:
                self.result = result
                if self._given_up and self._discard is not None:
                    self._discard(result)
        self._ended.set()

    def wait_for(self, seconds: float) -> bool:
        if not self._ended.wait(seconds):
            return False
        if self._error is not None:
            raise self._error
        return True

    def give_up(self) -> None:
        """What the function returns, now or later, is discarded."""
        with self._lock:
            if self._given_up:
                return
            self._given_up = True
            if self._discard is not None and hasattr(self, "result"):
                self._discard(self.result)


def get(store: Any, key: str, is_over: Callable[[], bool]) -> str:
    """The value of a key. Asks again and again, since a client of a store that waits blocks all its other users.

    Raises:
        TimeoutError: is_over() became true before the key was set.
    """
    pause = 1e-3
    while not store.check([key]):
        if is_over():
            raise TimeoutError(f"{key} was not set")
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE)
    return bytes(store.get(key)).decode()


def never() -> bool:
    return False


def own_client(store: Any) -> Any:
    """A client of the same store for one user that may block, or the store itself if it has none."""
    with contextlib.suppress(Exception):
        return store.clone()
    return store
