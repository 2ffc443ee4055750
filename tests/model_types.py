# SPDX-License-Identifier: BSD-3-Clause
"""Model types of transformers as test parameters: a sample in the usual run, all of them in the slow one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

# One of each way to select: softmax before and after top-k, sigmoid with a bias, with groups, scaled per expert, looked
# up by token id, more classes than experts, looped layers, and places other than the arguments of the experts.
SAMPLE = (
    "dbrx", "deepseek_v2", "deepseek_v3", "deepseek_v4", "gemma4_text", "gpt_oss", "inkling2_loop_text", "jetmoe",
    "kolibri1", "llama4_text", "longcat_flash", "mistral4", "mixtral", "phimoe", "switch_transformers", "zaya",
)  # fmt: skip


def sampled(types: Iterable[str]) -> list[Any]:
    return [t if t in SAMPLE else pytest.param(t, marks=pytest.mark.slow) for t in types]
