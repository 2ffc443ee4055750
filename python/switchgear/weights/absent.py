# SPDX-License-Identifier: BSD-3-Clause
"""Absent: what a stored module has in place of the parameter of a projection.

Code that does not know stored weights reads the parameter: another experts implementation, an adapter library, an
initialisation. With None there, it would fail with a message about NoneType.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch.utils._pytree import tree_leaves


class Absent:
    """Any use raises an AttributeError that says what to call."""

    def __init__(self, name: str, form: str, undo: str) -> None:
        self.name, self.form, self.undo = name, form, undo

    def __repr__(self) -> str:
        return f"<{self.name} is stored as {self.form}>"

    def _refuse(self, *_: Any) -> NoReturn:
        raise AttributeError(
            f"{self.name} is stored as {self.form}, which only switchgear reads: call {self.undo} before "
            "using its plain weight, as other experts implementations and adapter libraries do"
        )

    def __getattr__(self, attribute: str) -> NoReturn:
        if attribute.startswith("__"):
            raise AttributeError(attribute)  # copy and pickle look for optional methods
        self._refuse()

    __getitem__ = __len__ = __iter__ = __call__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __matmul__ = __rmatmul__ = _refuse

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))._refuse()
