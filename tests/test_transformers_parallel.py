# SPDX-License-Identifier: BSD-3-Clause
"""transformers' own parallelism around the experts: two processes on gloo against one."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from switchgear.integrations.transformers import is_decorated, path_of
from tiny_models import build, example_inputs

parallel = pytest.importorskip("transformers.distributed", reason="needs transformers with DistributedConfig")

WORLD = 2


def tensor_parallel(path: Path) -> nn.Module:
    return _load(path, parallel.DistributedConfig(tp_size=WORLD))


def expert_parallel(path: Path) -> nn.Module:
    """Half of the experts each. Without gradients the ids of the other half are sentinels, and the ranks' sums are
    reduced; with gradients rows are exchanged, and a rank without rows gets a dummy one."""
    return _load(path, parallel.DistributedConfig(tp_size=WORLD, ep_size=WORLD))


def fully_sharded(path: Path) -> nn.Module:
    model = _load(path, None)
    for layer in model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer)
    return fully_shard(model)


def _load(path: Path, config: Any) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        path, experts_implementation="switchgear", distributed_config=config
    ).eval()


def _full(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _worker(rank: int, path: Path, wrap: Callable[[Path], nn.Module]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=WORLD)
    model = wrap(path)
    reference = AutoModelForCausalLM.from_pretrained(path, experts_implementation="eager").eval()
    inputs = example_inputs(reference)
    want = reference(**inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(_full(model(**inputs).logits), want, rtol=1e-4, atol=1e-5)
    got = model(**inputs).logits
    torch.testing.assert_close(_full(got), want, rtol=1e-4, atol=1e-5)
    got.square().mean().backward()
    want.square().mean().backward()
    experts, reference_experts = (
        next(module for module in whole.modules() if is_decorated(module)) for whole in (model, reference)
    )
    assert path_of(experts) == "moe"
    for parameter, expected in zip(experts.parameters(), reference_experts.parameters(), strict=True):
        torch.testing.assert_close(_full(parameter.grad), expected.grad, rtol=1e-4, atol=1e-7)
    dist.destroy_process_group()


@pytest.mark.slow  # two imports of transformers each
@pytest.mark.parametrize("wrap", [tensor_parallel, expert_parallel, fully_sharded])
def test_two_processes_agree_with_one(wrap: Callable[[Path], nn.Module], tmp_path: Path) -> None:
    """gpt_oss has experts with biases, transposed weights and an interleaved gate."""
    build("gpt_oss").save_pretrained(tmp_path)
    mp.spawn(_worker, (tmp_path, wrap), nprocs=WORLD)
