# SPDX-License-Identifier: BSD-3-Clause
"""Parameters of shape [1] that were scalars once, which FSDP2 does not shard."""

from __future__ import annotations

from typing import Any

from torch import nn


class LoadsScalars(nn.Module):
    """Loads state dicts that have a scalar for one of `once_scalars`, too."""

    once_scalars: tuple[str, ...] = ()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.once_scalars:
            value = state_dict.get(f"{prefix}{name}")
            if value is not None and value.dim() == 0:
                state_dict[f"{prefix}{name}"] = value.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)
