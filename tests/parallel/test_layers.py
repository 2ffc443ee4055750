# SPDX-License-Identifier: BSD-3-Clause
"""Distributed layers with more than plain experts compute what one process does."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parallel_pool import Pool
from torch import Tensor, nn

import switchgear
from errors import raises
from switchgear.adapters import add_lora, load_peft, save_peft
from switchgear.layers import HeterogeneousExperts
from switchgear.parallel import ExpertParallel, Placement, checkpoint
from switchgear.routing import SparsityAware

HIDDEN, TOKENS = 64, 20


def both(parallel: ExpertParallel, options: dict[str, Any], experts: int = 6) -> list[switchgear.MoE]:
    """A layer on all ranks, and the same layer on this rank only."""
    layers = []
    for group in (parallel, None):
        torch.manual_seed(3)
        layers.append(switchgear.MoE(HIDDEN, 64, experts, 2, parallel=group, **options))
    return layers


def tokens(rank: int) -> Tensor:
    torch.manual_seed(rank)
    return torch.randn(TOKENS + rank, HIDDEN)


# ---- experts of several widths --------------------------------------------------------------------------------------

WIDTHS = [1, 3, 2, 5, 1, 4]
PLACED = ((0, 2), (), (1, 3, 4), (5,))


def widths(rank: int, options: dict[str, Any], ranks: Any) -> tuple[int, int]:
    """Everything equals one process bit for bit. Returns the rows sent, and those for plain experts."""
    placement = None if ranks is None else Placement(6, ranks)
    with ExpertParallel(timeout=20, invariant=True, average_gradients=False, placement=placement) as parallel:
        moe, whole = both(parallel, options | {"widths": WIDTHS})
        experts, reference = moe.experts, whole.experts
        assert isinstance(experts, HeterogeneousExperts)
        assert isinstance(reference, HeterogeneousExperts)
        xs = [tokens(r) for r in range(4)]
        begin = sum(map(len, xs[:rank]))
        x, all_x = xs[rank].requires_grad_(), torch.cat(xs).detach().requires_grad_()
        routing = whole.gate(all_x.detach())  # of all tokens: the bits of torch's matmul depend on their number
        ids, weights = routing.topk_ids, routing.topk_weights.detach()
        mine = slice(begin, begin + len(x))
        y, want = experts(x, ids[mine], weights[mine]), reference(all_x, ids, weights)
        assert torch.equal(y, want[mine])
        sent = parallel.record.bytes["dispatch"]
        y.square().sum().backward()
        want.square().sum().backward()
        assert torch.equal(x.grad, all_x.grad[mine])
        local = experts.slices.placement.experts_of_rank[rank]
        for got, expected in zip(experts.parameters(), reference.parameters(), strict=True):
            assert torch.equal(got, expected[list(local)])
            assert torch.equal(got.grad, expected.grad[list(local)])
        held = parallel.placement(6).experts_of_rank[rank]
        for expert in range(6):
            if expert in held:
                assert all(map(torch.equal, experts.weights_of(expert), reference.weights_of(expert)))
            else:
                with raises(ValueError, "expert"):
                    experts.weights_of(expert)
        parallel.record.clear()
        both(parallel, {})[0].experts(x, ids[mine], weights[mine])
        return sent, parallel.record.bytes["dispatch"]


@pytest.mark.parametrize("options", [{}, {"transposed": True, "interleaved": True}], ids=["plain", "transposed"])
@pytest.mark.parametrize("ranks", [None, PLACED], ids=["contiguous", "placed"])
def test_experts_of_several_widths(pool: Pool, options: dict[str, Any], ranks: Any) -> None:
    for sent, plain in pool.run(widths, options, ranks):
        assert sent == plain  # a token is sent to a rank once, for any number of slices


def widths_in_a_checkpoint(rank: int, path: str) -> None:
    with ExpertParallel(timeout=20, invariant=True) as parallel:
        moe, whole = both(parallel, {"widths": WIDTHS})
        checkpoint.save(moe, path)
        with torch.no_grad():
            for parameter in moe.parameters():
                parameter.zero_()
        checkpoint.load(moe, path)
        entries = checkpoint.load_whole(path)
        assert all(torch.equal(entries[name], tensor) for name, tensor in whole.state_dict().items())
        assert torch.equal(moe(tokens(rank)), whole(tokens(rank)))


def test_checkpoint_of_several_widths(pool: Pool, tmp_path: Any) -> None:
    pool.run(widths_in_a_checkpoint, str(tmp_path))


# ---- packed weights --------------------------------------------------------------------------------------------------


def packed_weights(rank: int, path: str) -> None:
    """They train and are saved as in one process, and as unpacked weights."""
    with ExpertParallel(timeout=20, invariant=True) as parallel:
        moe, whole = both(parallel, {"transposed": True})
        plain = both(parallel, {"transposed": True})[0]
        assert switchgear.store(moe, "plain").modules == 1
        for layer in (moe, plain):
            layer(tokens(rank)).square().sum().backward()
        for got, expected in zip(moe.parameters(), plain.parameters(), strict=True):
            assert torch.equal(got.grad, expected.grad)
        checkpoint.save(moe, path)
        with torch.no_grad():
            for parameter in moe.parameters():
                parameter.zero_()
        checkpoint.load(moe, path)
        assert moe.experts.down_proj.mT.is_contiguous()
        entries = checkpoint.load_whole(path)
        assert all(torch.equal(entries[name], tensor) for name, tensor in whole.state_dict().items())
        assert torch.equal(moe(tokens(rank)), whole(tokens(rank)))


def test_packed_weights(pool: Pool, tmp_path: Any) -> None:
    pool.run(packed_weights, str(tmp_path))


# ---- virtual experts -------------------------------------------------------------------------------------------------


def virtual(rank: int) -> None:
    """Null, copy and constant experts are computed on the tokens' rank."""
    options = {"null_experts": 2, "copy_experts": 1, "constant_experts": 1}
    with ExpertParallel(timeout=20, invariant=True) as parallel:
        for more in ({}, {"widths": WIDTHS}):
            moe, whole = both(parallel, options | more)
            assert torch.equal(moe(tokens(rank)), whole(tokens(rank)))


def test_virtual_experts(pool: Pool) -> None:
    pool.run(virtual)


# ---- weights that are not plain --------------------------------------------------------------------------------------


def global_tokens(parallel: ExpertParallel, rank: int) -> tuple[Tensor, Tensor, slice]:
    """This rank's tokens and those of all ranks, as leaves, and where the first are among the second."""
    xs = [tokens(r) for r in range(parallel.size)]
    begin = sum(map(len, xs[:rank]))
    return xs[rank].requires_grad_(), torch.cat(xs).detach().requires_grad_(), slice(begin, begin + len(xs[rank]))


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4 * max([1e-3, *want.abs().flatten().tolist()]))


def run_by_a_module(rank: int, how: str, options: dict[str, Any], invariant: bool, ranks: Any) -> None:
    """Stored experts, and those with adapters: values and gradients of one process."""
    placement = None if ranks is None else Placement(6, ranks)
    given: dict[str, Any] = {"invariant": invariant, "average_gradients": False, "placement": placement}
    with ExpertParallel(timeout=20, num_chunks=None if invariant else 2, **given) as parallel:
        moe, whole = both(parallel, options)
        adapters = []
        for layer in (moe, whole):
            if how != "adapters":
                layer.requires_grad_(False)
                switchgear.store(layer, how.removesuffix(" and adapters"))
            if "adapters" in how:
                torch.manual_seed(5)
                adapters.append(add_lora(layer.experts, 3, alpha=6))
        mine = list(moe.experts.placement.experts_of_rank[rank])
        for ours, theirs in zip(*adapters, strict=True) if adapters else ():
            assert torch.equal(ours, theirs[mine])  # the same numbers on any rank
            with torch.no_grad():
                theirs.copy_(torch.randn(theirs.shape, generator=torch.Generator().manual_seed(len(theirs))) * 0.2)
                ours.copy_(theirs[mine])
        x, all_x, part = global_tokens(parallel, rank)
        routing = whole.gate(all_x.detach())
        ids, weights = routing.topk_ids, routing.topk_weights.detach()
        own, everyone = weights[part].clone().requires_grad_(), weights.clone().requires_grad_()
        y, want = moe.experts(x, ids[part], own), whole.experts(all_x, ids, everyone)
        close(y, want[part])
        y.square().sum().backward()
        want.square().sum().backward()
        close(x.grad, all_x.grad[part])
        # Rounded weights: <dy, y> with `invariant`, else <dy·W, a>, in which only W is rounded.
        assert (own.grad - everyone.grad[part]).norm() < (1e-4 if how == "adapters" else 0.03) * own.grad.norm()
        for ours, theirs in zip(*adapters, strict=True) if adapters else ():
            close(ours.grad, theirs.grad[mine])
        with torch.no_grad():
            close(moe.experts(x, ids[part], own), want[part])


COPIES = ((0, 2), (1, 2), (3, 4), (0, 5))


@pytest.mark.parametrize("how", ["int8", "adapters", "int4 and adapters"])
@pytest.mark.parametrize("invariant", [True, False])
def test_experts_that_a_module_runs(pool: Pool, how: str, invariant: bool) -> None:
    pool.run(run_by_a_module, how, {}, invariant, None)


@pytest.mark.parametrize("options", [{"transposed": True, "bias": True}, {"gated": False, "activation": "relu"}])
@pytest.mark.parametrize("ranks", [PLACED, COPIES], ids=["a rank without experts", "copies"])
def test_adapters_of_other_layouts_and_placements(pool: Pool, options: dict[str, Any], ranks: Any) -> None:
    pool.run(run_by_a_module, "adapters", options, False, ranks)


def saved_adapters(rank: int, folder: str, ranks: Any) -> None:
    """One file of all experts' adapters, as one process writes it."""
    from safetensors.torch import load_file

    placement = None if ranks is None else Placement(6, ranks)
    with ExpertParallel(timeout=20, placement=placement) as parallel:
        moe, whole = both(parallel, {})
        mine = list(moe.experts.placement.experts_of_rank[rank])
        for layer, held in ((moe, mine), (whole, list(range(6)))):
            for number, adapter in enumerate(add_lora(layer.experts, 3, alpha=6)):
                values = torch.randn(6, *adapter.shape[1:], generator=torch.Generator().manual_seed(number))
                with torch.no_grad():
                    adapter.copy_(values[held])
        save_peft(nn.Sequential(moe), f"{folder}/ours")
        if rank == 0:
            save_peft(nn.Sequential(whole), f"{folder}/one")
            files = [load_file(f"{folder}/{which}/adapter_model.safetensors") for which in ("ours", "one")]
            assert files[0].keys() == files[1].keys()
            assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
            configs = [(Path(folder) / which / "adapter_config.json").read_text() for which in ("ours", "one")]
            assert configs[0] == configs[1]
        dist.barrier()
        again = both(parallel, {})[0]
        load_peft(nn.Sequential(again), f"{folder}/ours")
        x = tokens(rank)
        assert torch.equal(again(x), moe(x))


@pytest.mark.parametrize("ranks", [None, PLACED, COPIES], ids=["contiguous", "a rank without experts", "copies"])
def test_saved_adapters(pool: Pool, tmp_path: Path, ranks: Any) -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    pool.run(saved_adapters, str(tmp_path), ranks)


def observed(rank: int, options: dict[str, Any]) -> None:
    """Norms of experts' outputs run them again, as often on a rank without tokens as on the others."""
    with ExpertParallel(timeout=20) as parallel:
        moe, whole = both(parallel, options)
        x = tokens(rank)[: 0 if rank == 2 else 8 * rank + 1]
        traces = []
        for layer in (moe, whole):
            with switchgear.RoutingTrace(layer, record=("norms",)) as trace, torch.no_grad():
                layer(x)
            traces.append(trace.layers["gate"].norm_per_expert)
        torch.testing.assert_close(*traces)


@pytest.mark.parametrize("options", [{}, {"widths": WIDTHS}], ids=["plain", "widths"])
def test_norms_of_experts_outputs(pool: Pool, options: dict[str, Any]) -> None:
    pool.run(observed, options)


def scores_of_the_weights(rank: int, ranks: Any, tp: bool) -> None:
    """SparsityAware reads all experts; gradients through the score reach each expert, with those of its tokens."""
    placement = None if ranks is None else Placement(6, ranks)
    twins = [rank // 2 * 2, rank // 2 * 2 + 1] if tp else None
    with ExpertParallel(timeout=20, invariant=True, placement=placement, tp_group=twins) as parallel:
        score = partial(SparsityAware, scale=9.0)
        moe, whole = both(parallel, {"score": score})
        sets = 2 if tp else 4
        own = tokens(rank // 2 if tp else rank)
        y = moe(own)
        close(y, whole(own))
        y.square().sum().backward()
        for number in range(sets):  # the mean over those with different tokens
            (whole(tokens(number)).square().sum() / sets).backward()
        held = list(moe.experts.placement.experts_of_rank[rank])
        for ours, theirs in zip(moe.experts.parameters(), whole.experts.parameters(), strict=True):
            close(ours.grad, theirs.grad[held])


@pytest.mark.parametrize("ranks", [None, PLACED, COPIES], ids=["contiguous", "a rank without experts", "copies"])
@pytest.mark.parametrize("tp", [False, True])
def test_scores_of_the_experts_weights(pool: Pool, ranks: Any, tp: bool) -> None:
    pool.run(scores_of_the_weights, ranks, tp)
