# SPDX-License-Identifier: BSD-3-Clause
"""A transformers model that reaches its experts through switchgear's exchange, against one process."""

from __future__ import annotations

from collections.abc import Iterator
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


def load(rank: int, path: str) -> tuple[Any, Any]:
    """The model on two ranks, and on one."""
    import os

    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    import switchgear.parallel.transformers  # noqa: F401  registers the name

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    config = DistributedConfig(tp_size=2, ep_size=2, ep_implementation="switchgear")
    model = AutoModelForCausalLM.from_pretrained(
        path, experts_implementation="switchgear", distributed_config=config
    ).eval()
    return model, AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager").eval()


def compare(rank: int, path: str) -> dict[str, Any]:
    from switchgear.integrations.transformers import is_decorated
    from switchgear.parallel.transformers import _groups
    from tiny_models import example_inputs

    model, reference = load(rank, path)
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


@torch.no_grad()
def watch(rank: int, path: str) -> None:
    """What a trace, a record and diagnostics see, and what overrides and a replay change."""
    from switchgear import RoutingTrace, diagnostics, override, routing
    from switchgear.generation import SelfContrast
    from switchgear.integrations.moe_blocks import moe_blocks
    from tiny_models import example_inputs

    model, reference = load(rank, path)
    inputs = example_inputs(reference)
    with RoutingTrace(model) as trace, routing.record(model) as record, diagnostics.collect(model) as seen:
        model(**inputs)
    with (
        RoutingTrace(reference) as expected_trace,
        routing.record(reference) as expected_record,
        diagnostics.collect(reference) as expected_seen,
    ):
        reference(**inputs)
    (*_, block) = moe_blocks(model).values()
    e = block.num_experts
    for name, layer in expected_trace.layers.items():
        assert layer.tokens_per_expert[e // 2 :].any()  # experts of the other rank
        assert trace.layers[name].tokens_per_expert.tolist() == layer.tokens_per_expert.tolist()
    for name, recorded in expected_record.layers.items():
        assert torch.equal(record.layers[name].topk_ids(), recorded.topk_ids())
    for name, choices in expected_seen.items():
        assert torch.equal(full(seen[name].topk_ids), choices.topk_ids)

    def check(change: Any) -> None:
        with change(model):
            got = full(model(**inputs).logits)
        with change(reference):
            want = reference(**inputs).logits
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    check(lambda m: override(m, disable=[0, e - 1]))
    check(lambda m: override(m, force=[e - 1]))
    check(lambda m: override(m, bias={e - 2: 5.0}))
    check(lambda m: override(m, gain={e - 2: 3.0}))
    check(lambda m: override(m, select=routing.SkipBelow(routing.TopK(2), 0.5)))  # leaves slots empty
    check(SelfContrast(weak=routing.RankK((1,)), alpha=0).applied)
    check(lambda m: routing.replay(m, expected_record))
    dist.barrier()


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool(2)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_moe"])
def test_two_processes_agree_with_one(name: str, pool: Pool, tmp_path: Path) -> None:
    from tiny_models import build

    build(name).save_pretrained(tmp_path)
    sent = pool.run(compare, str(tmp_path), timeout=120)
    assert all(counts["dispatch"] > 0 and counts["join"] > 0 for counts in sent)


def test_traces_and_overrides_know_the_experts_of_all_ranks(pool: Pool, tmp_path: Path) -> None:
    from tiny_models import build

    build("qwen3_moe").save_pretrained(tmp_path)
    pool.run(watch, str(tmp_path), timeout=120)
