# SPDX-License-Identifier: BSD-3-Clause
"""What operators allocate, for tests of memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class MadeTensors(TorchDispatchMode):
    """Inside the block, `num_bytes` gets the size of each tensor that an operator makes; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [value.untyped_storage().data_ptr() for value in args if isinstance(value, Tensor)]
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in given:
            self.num_bytes.append(result.nbytes)
        return result
