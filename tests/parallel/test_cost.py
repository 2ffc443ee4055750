# SPDX-License-Identifier: BSD-3-Clause
"""The cost model of an exchange: byte counts, pipeline times, and the commands that print them."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parallel_pool import Pool

from switchgear.cli import main
from switchgear.parallel import ExpertParallel, ParallelExperts, Placement
from switchgear.parallel.cost import (
    CHUNKS,
    Layer,
    Link,
    Machine,
    choose_chunks,
    count,
    draw_routing,
    pipeline,
    predict,
    rows_per_token,
)

TOKENS, EXPERTS, TOP_K, HIDDEN = 96, 12, 3, 16


def send(rank: int, skew: float) -> dict[str, int]:
    with ExpertParallel(timeout=20) as parallel:
        experts = ParallelExperts(HIDDEN, 8, EXPERTS, parallel=parallel)
        ids = draw_routing(4 * TOKENS, EXPERTS, TOP_K, skew)[rank * TOKENS : (rank + 1) * TOKENS]
        x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
        weights = torch.rand(TOKENS, TOP_K, requires_grad=True)
        y = experts(x, ids, weights)
        forward = Counter(parallel.record.bytes)
        y.sum().backward()
        backward = parallel.record.bytes - forward
    return {"forward": forward.total() - forward["header"], "backward": backward.total() - backward["header"]}


@pytest.mark.parametrize("skew", [0.0, 1.5])
def test_predicted_bytes_are_those_that_are_sent(pool: Pool, skew: float) -> None:
    sent = pool.run(send, skew)
    placement = Placement.contiguous(EXPERTS, 4)
    traffic = count(list(torch.split(draw_routing(4 * TOKENS, EXPERTS, TOP_K, skew), TOKENS)), placement)
    machine = Machine(1e9, 1e6, 1e6, 4)
    predicted = predict(Layer(HIDDEN, 8, EXPERTS, TOP_K), traffic, placement, machine, 4, 1)
    assert predicted.bytes_forward == max(counts["forward"] for counts in sent)
    assert predicted.bytes_backward == max(counts["backward"] for counts in sent)
    assert predicted.bytes_between_nodes == 0  # one node


def test_drawn_routings() -> None:
    ids = draw_routing(2000, 16, 4, skew=1.0)
    assert all(len(set(row)) == 4 for row in ids.tolist())
    shares = torch.bincount(ids.flatten().long(), minlength=16).sort(descending=True).values / 8000
    assert shares[0] > 3 * shares[-1]
    even = torch.bincount(draw_routing(2000, 16, 4).flatten().long(), minlength=16) / 8000
    assert float((even - 1 / 16).abs().max()) < 0.01  # five standard deviations for 2000 draws
    assert torch.equal(ids, draw_routing(2000, 16, 4, skew=1.0))


def test_expected_rows_of_a_token() -> None:
    """A token with 4 of many experts on 8 ranks reaches each of the 7 others with probability 1 - (7/8)^4."""
    traffic = count([draw_routing(4000, 800, 4)], Placement.contiguous(800, 8))
    others = (int(traffic.rows[0].sum()) - int(traffic.rows[0, 0])) / 4000
    assert others == pytest.approx(rows_per_token(4, 8), rel=0.02)


@given(
    dispatch=st.floats(0.01, 10), experts=st.floats(0.01, 10), combine=st.floats(0.01, 10), tail=st.floats(0, 5),
    chunks=st.sampled_from(CHUNKS),
)  # fmt: skip
def test_pipelines(dispatch: float, experts: float, combine: float, tail: float, chunks: int) -> None:
    """No faster than the link or the experts allow, no slower than serially, never slower with more chunks; and one
    chunk hides only the tail."""
    line = pipeline(dispatch, experts, combine, chunks, tail=tail)
    one = pipeline(dispatch, experts, combine, 1, tail=tail)
    least = max(dispatch + combine, experts + tail)
    assert least - 1e-9 <= line.seconds <= one.seconds + 1e-9
    assert one.seconds == pytest.approx(max(dispatch + experts + combine, dispatch + experts + tail))
    assert line.seconds <= least + (dispatch + combine + experts) / chunks + 1e-9 or dispatch + combine > experts
    for lane in ("link", "experts"):  # intervals of a lane do not overlap
        spans = sorted((i.begin, i.end) for i in line.intervals if i.lane == lane)
        assert all(first[1] <= second[0] + 1e-9 for first, second in itertools.pairwise(spans))


def test_equal_link_and_experts_hide_all_but_a_chunk() -> None:
    for chunks in CHUNKS:
        assert pipeline(1.0, 2.0, 1.0, chunks).hidden == pytest.approx(1 - 1 / chunks)


def test_chunks_grow_with_the_rows() -> None:
    link = Link(bandwidth=1e9, overhead=1e-3)
    chosen = [choose_chunks(tokens, 2, 4, 4096, link) for tokens in (0, 16, 256, 1024, 4096, 65536)]
    assert chosen == sorted(chosen)
    assert chosen[0] == 1
    assert chosen[-1] == 8


def test_plan_parallel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    arguments = ["plan-parallel", "--model", "mixtral", "--ep", "4", "--nodes", "2", "--tokens", "64"]
    assert main([*arguments, "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "PREDICTIONS" in text
    assert "Mixtral-8x7B" in text
    result = json.loads(out.read_text())
    lines = result["predictions"]
    assert [line["chunks"] for line in lines] == list(CHUNKS)
    assert all(line["forward_seconds"] >= line["forward_experts"] for line in lines)
    # 2 of 8 experts on each rank: 3 projections of 4096 · 14336 bfloat16 each, in 32 layers
    assert lines[0]["memory"]["weights"] == 2 * 3 * 4096 * 14336 * 2 * 32
    slow = tmp_path / "slow.json"
    assert main([*arguments, "--bandwidth", "1", "--json", str(slow)]) == 0
    slower = json.loads(slow.read_text())["predictions"]
    assert slower[0]["forward_exposed"] > lines[0]["forward_exposed"]
    assert slower[0]["bytes_forward"] == lines[0]["bytes_forward"]


def test_plan_parallel_of_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All tokens choose experts of one rank; replicas on the others reduce its load."""
    trace = tmp_path / "trace.pt"
    torch.save(torch.tensor([[0, 1]] * 50), trace)
    loads = []
    for replicas in ("0", "6"):
        out = tmp_path / f"{replicas}.json"
        arguments = ["plan-parallel", "--model", "mixtral", "--ep", "4", "--nodes", "1", "--tokens", "50"]
        assert main([*arguments, "--trace", str(trace), "--replicas", replicas, "--json", str(out)]) == 0
        loads.append(json.loads(out.read_text())["predictions"][0]["load"])
    assert loads == [4.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ep", "6", "--nodes", "4"], "--nodes: expected a divisor of 6"),
        (["--trace", "/nowhere.pt"], "--trace: cannot read /nowhere.pt"),
        (["--ep", "2", "--nodes", "1", "--replicas", "999"], "--replicas: num_replicas: expected 0 to 128"),
    ],
)
def test_plan_parallel_names_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan-parallel", "--tokens", "8", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_bench_parallel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It fails unless results agree and bytes are minimal; times are not tested."""
    out = tmp_path / "bench.json"
    arguments = ["bench", "--parallel", "2", "--shapes", "tiny", "--tokens", "32", "--quick", "--modes", "train"]
    assert main([*arguments, "--json", str(out), "--plot", str(tmp_path)]) == 0
    (result,) = json.loads(out.read_text())["results"]
    plain, *ours = result["variants"]
    assert plain["sent_bytes"] > ours[0]["sent_bytes"] == ours[1]["sent_bytes"] == ours[2]["sent_bytes"]
    assert all(variant["at_floor"] for variant in ours)
    assert (tmp_path / "parallel-train.png").stat().st_size > 1000
    assert "switchgear, 4 chunks" in capsys.readouterr().out
