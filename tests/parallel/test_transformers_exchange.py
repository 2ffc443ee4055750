# SPDX-License-Identifier: BSD-3-Clause
"""A transformers model that reaches its experts through switchgear's exchange, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_pool import Pool
from torch import Tensor
from torch.distributed.tensor import DTensor

pytest.importorskip("transformers.distributed.expert_parallel", reason="needs transformers with EPImplementation")
pytestmark = pytest.mark.slow  # two processes import transformers


def full(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def compare(rank: int, path: str) -> dict[str, Any]:
    import os

    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from switchgear.integrations.tiny_models import example_inputs
    from switchgear.integrations.transformers import is_decorated
    from switchgear.parallel.transformers import _groups

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    config = DistributedConfig(tp_size=2, ep_size=2, ep_implementation="switchgear")
    model = AutoModelForCausalLM.from_pretrained(
        path, experts_implementation="switchgear", distributed_config=config
    ).eval()
    reference = AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager").eval()
    inputs = example_inputs(reference)
    want = reference(**inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(full(model(**inputs).logits), want, rtol=1e-4, atol=1e-5)
    got = model(**inputs).logits
    torch.testing.assert_close(full(got), want, rtol=1e-4, atol=1e-5)
    got.square().mean().backward()
    want.square().mean().backward()
    layers = [[m for m in whole.modules() if is_decorated(m)] for whole in (model, reference)]
    for experts, reference_experts in zip(*layers, strict=True):
        for parameter, expected in zip(experts.parameters(), reference_experts.parameters(), strict=True):
            torch.testing.assert_close(full(parameter.grad), expected.grad, rtol=1e-4, atol=1e-7)
    (parallel,) = _groups.values()
    sent = dict(parallel.record.bytes)
    dist.barrier()
    return sent


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_two_processes_agree_with_one(name: str, tmp_path: Path) -> None:
    from switchgear.integrations.tiny_models import build

    build(name).save_pretrained(tmp_path)
    pool = Pool(2)
    try:
        sent = pool.run(compare, str(tmp_path), timeout=120)
    finally:
        pool.close()
    assert all(counts["dispatch"] > 0 and counts["join"] > 0 for counts in sent)
