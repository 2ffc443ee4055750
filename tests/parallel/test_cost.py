# SPDX-License-Identifier: BSD-3-Clause
"""The cost model of an exchange: byte counts, pipeline times, and the commands that print them."""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parallel_pool import Pool

from switchgear import moe, ops
from switchgear.cli import main
from switchgear.parallel import ExpertParallel, ParallelExperts, Placement
from switchgear.parallel.cost import (
    CHUNKS,
    Layer,
    Link,
    Machine,
    Rates,
    choose_chunks,
    count,
    draw_routing,
    expected_losses,
    pipeline,
    predict,
    rows_per_token,
    two_level_pipeline,
)
from switchgear.parallel.nodes import Nodes
from switchgear.parallel.transport import Network
from switchgear_bench import parallel as bench
from switchgear_bench.case import flops_of
from switchgear_bench.shapes import SHAPES

TOKENS, EXPERTS, TOP_K, HIDDEN = 96, 12, 3, 16


def send(rank: int, skew: float, nodes: int | None = None, wire: str = "exact") -> dict[str, int]:
    with ExpertParallel(timeout=20, nodes=nodes, wire=wire) as parallel:
        experts = ParallelExperts(HIDDEN, 8, EXPERTS, parallel=parallel)
        ids = draw_routing(4 * TOKENS, EXPERTS, TOP_K, skew)[rank * TOKENS : (rank + 1) * TOKENS]
        x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
        weights = torch.rand(TOKENS, TOP_K, requires_grad=True)
        y = experts(x, ids, weights)
        forward = Counter(parallel.record.bytes)
        y.sum().backward()
        backward = parallel.record.bytes - forward
        far = parallel.record.between_nodes
    sent = {"forward": forward.total() - forward["header"], "backward": backward.total() - backward["header"]}
    return sent | {"between": far.total() - far["header"]}


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


@pytest.mark.parametrize("wire", ["exact", "fp8_dispatch"])
def test_predicted_bytes_of_two_levels(pool: Pool, wire: str) -> None:
    sent = pool.run(send, 0.5, 2, wire)
    placement, nodes = Placement.contiguous(EXPERTS, 4), Nodes((0, 0, 1, 1))
    ids = list(torch.split(draw_routing(4 * TOKENS, EXPERTS, TOP_K, 0.5), TOKENS))
    traffic = count(ids, placement, nodes)
    machine = Machine(1e9, 1e6, 1e6, 2)
    layer = Layer(HIDDEN, 8, EXPERTS, TOP_K)
    predicted = predict(layer, traffic, placement, machine, 4, 1, wire=wire)
    assert predicted.bytes_forward == max(counts["forward"] for counts in sent)
    assert predicted.bytes_backward == max(counts["backward"] for counts in sent)
    one = predict(layer, traffic._replace(between=None, within=None), placement, machine, 4, 1, wire=wire)
    assert predicted.bytes_between_nodes < one.bytes_between_nodes
    between, within = traffic.legs
    assert int(between.sum()) < int(traffic.rows.sum())
    assert int(within.sum()) == int(traffic.rows.sum())  # a row for each token and rank, however it comes


def test_predictions_by_hand() -> None:
    """Four tokens of rank 0, two ranks on a node, two experts on each. To rank 1 goes a row of 40 bytes, 4 bytes/s, and
    a choice; to 2 three rows and four choices, to 3 one of each, 10 bytes/s. Rank 2 multiplies for 24 s."""
    ids = [torch.tensor([[0, 2], [4, 5], [4, 6], [5, -1]]), *[torch.empty(0, 2, dtype=torch.int64)] * 3]
    placement, nodes = Placement.contiguous(8, 4), Nodes((0, 0, 1, 1))
    layer, machine = Layer(10, 5, 8, 2), Machine(50.0, 10.0, 40.0, 2, overhead=0.25)
    one = predict(layer, count(ids, placement), placement, machine, 4, 1)
    assert (one.forward.seconds, one.backward.seconds) == (16 + 24.25 + 16, 16 + 24.25 + 24)
    assert (one.forward.experts, one.backward.experts) == (24.25, 48.25)
    assert (one.bytes_forward, one.bytes_backward) == (5 * 40 + 6 * 8, 5 * 40)
    assert one.bytes_between_nodes == 4 * 40 + 5 * 8
    assert (one.rows_without_sharing, one.load) == pytest.approx((6 / 5, 4 / (7 / 4)))
    assert one.weight_bytes == 2 * 3 * 10 * 5 * 4
    assert one.activation_bytes == 3 * 40 + 4 * (2 * 5 * 4 + 8)
    # Three rows to the other node, each with its choices on two ranks in 2 bytes; one passes on from 2 to 3.
    two = predict(layer, count(ids, placement, nodes), placement, machine, 4, 1)
    assert two.forward.seconds == pytest.approx(12 + 1 + 24.25 + 1 + 12)
    assert two.backward.seconds == pytest.approx(12 + 1 + 24.25 + 1 + 24)
    assert two.bytes_forward == (3 + 1) * 40 + 3 * 2 * 2 + 6 * 8
    assert two.bytes_backward == (3 + 1) * 40 + 4 * 4  # of rank 2, which returns gradients of weights, too
    assert two.bytes_between_nodes == 3 * 40 + 3 * 2 * 2 + 5 * 8
    assert two.rows_without_sharing == pytest.approx(5 / 3)


def test_copies_on_the_node_come_first() -> None:
    placement = Placement(2, ((0,), (0,), (1,), (0, 1)))
    near = [placement.routes(source, near=(2, 3))[0].tolist() for source in range(4)]
    assert near == [[0, 2], [1, 3], [3, 2], [3, 3]]
    assert [placement.routes(source)[0].tolist() for source in range(4)] == [[0, 2], [1, 3], [3, 2], [3, 3]]
    three = Placement(1, ((0,), (0,), (0,), ()))
    assert three.routes(3, near=(2, 3))[0].tolist() == [2]
    assert three.routes(3)[0].tolist() == [0]


def test_routings_of_groups() -> None:
    """DeepSeek-V3: 8 of 256 experts, from 4 of 8 groups."""
    ids = draw_routing(500, 256, 8, groups=(8, 4))
    assert all(len(set(row)) == 8 for row in ids.tolist())
    assert max(len({e // 32 for e in row}) for row in ids.tolist()) == 4
    assert max(len({e // 32 for e in row}) for row in draw_routing(500, 256, 8).tolist()) > 4


@given(
    between=st.floats(0.01, 10), within=st.floats(0.001, 1), experts=st.floats(0.01, 10), tail=st.floats(0, 5),
    chunks=st.sampled_from(CHUNKS),
)  # fmt: skip
def test_two_level_pipelines(between: float, within: float, experts: float, tail: float, chunks: int) -> None:
    """No faster than each link or the experts allow, no slower than one after the other; as one level if the links
    within nodes take no time."""
    line = two_level_pipeline((between, between), (within, within), experts, chunks, tail=tail)
    assert line.seconds <= 2 * (between + within) + experts + tail + 1e-9
    assert line.seconds >= max(2 * between, 2 * within, experts + tail) - 1e-9
    for lane in ("link", "near", "experts"):
        spans = sorted((i.begin, i.end) for i in line.events if i.lane == lane)
        assert len(spans) == {"experts": chunks + (tail > 0)}.get(lane, 2 * chunks)
        assert all(first[1] <= second[0] + 1e-9 for first, second in itertools.pairwise(spans))
    one = two_level_pipeline((between, between), (within, within), experts, 1, tail=tail)
    assert one.seconds == pytest.approx(between + 2 * within + experts + max(between, tail))


def test_a_fast_link_within_nodes_costs_nothing() -> None:
    for chunks in CHUNKS:
        assert two_level_pipeline((1.0, 1.0), (0.0, 0.0), 2.0, chunks).exposed == pytest.approx(
            pipeline(1.0, 2.0, 1.0, chunks).exposed
        )


def test_losses_of_failures() -> None:
    """Computed by hand: 2048 ranks that fail every 50,000 hours."""
    rates = Rates(2048, 3600 * 50_000, 10.0, 600.0, 1800.0, 10.0, 30.0, 3600 * 12)
    got = expected_losses(rates, Placement(4, ((0, 1), (1, 2), (2, 3))))
    assert got.failures == pytest.approx(2048 * 24 / 50_000)
    assert got.steps_restarting == pytest.approx(got.failures * (600 + 900) / 10)
    assert got.steps_continuing == pytest.approx(got.failures * (5 + 10 + 30 + 43200 / 2048) / 10)
    assert got.fraction_restarting == pytest.approx(got.failures * 1500 / 86400)
    assert got.fraction_continuing == pytest.approx(got.steps_continuing * 10 / 86400)
    assert got.experts_without_copy == pytest.approx(2 / 3)
    often = expected_losses(rates._replace(mtbf=3600.0), Placement(1, ((0,),)))
    assert (often.fraction_restarting, often.fraction_continuing) == (1, 1)


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
    for lane, number in (("link", 2 * chunks), ("experts", chunks + (tail > 0))):  # intervals of a lane do not overlap
        spans = sorted((i.begin, i.end) for i in line.events if i.lane == lane)
        assert len(spans) == number
        assert all(first[1] <= second[0] + 1e-9 for first, second in itertools.pairwise(spans))


def test_equal_link_and_experts_hide_all_but_a_chunk() -> None:
    for chunks in CHUNKS:
        assert pipeline(1.0, 2.0, 1.0, chunks).hidden == pytest.approx(1 - 1 / chunks)
    assert pipeline(0.0, 2.0, 0.0, 2).hidden == 1


def test_an_exchange_in_one_piece_hides_nothing() -> None:
    """Nor less than nothing, by rounding."""
    for dispatch, experts in itertools.product((0.1, 0.2, 0.3), (0.1, 0.4, 0.7, 1.1)):
        assert 0 <= pipeline(dispatch, experts, 0.1, 1).hidden <= 1e-15


def test_chunks_grow_with_the_rows() -> None:
    link = Link(bandwidth=1e9, overhead=1e-3)
    chosen = [choose_chunks(tokens, 2, 4, 4096, link) for tokens in (0, 16, 256, 1024, 4096, 65536)]
    assert chosen == [1, 1, 2, 4, 8, 8]  # near the root of 2·T·1.3125·4096 bytes at 1 GB/s in ms
    assert choose_chunks(1, 2, 4, 4096, Link(overhead=0.0)) == 8


def test_plan_parallel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    arguments = ["plan-parallel", "--model", "mixtral", "--ep", "4", "--nodes", "2", "--tokens", "64"]
    assert main([*arguments, "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "PREDICTIONS" in text
    assert "Mixtral-8x7B" in text
    result = json.loads(out.read_text())
    lines = result["predictions"]
    assert [(line["levels"], line["chunks"]) for line in lines] == [(n, c) for n in (1, 2) for c in CHUNKS]
    assert lines[-1]["bytes_between_nodes"] < lines[0]["bytes_between_nodes"]
    assert "recommended:" in text
    assert "fp8_dispatch" in text
    assert all(line["forward_seconds"] >= line["forward_experts"] for line in lines)
    # 2 of 8 experts on each rank: 3 projections of 4096 · 14336 bfloat16 each, in 32 layers
    assert lines[0]["memory"]["weights"] == 2 * 3 * 4096 * 14336 * 2 * 32
    slow = tmp_path / "slow.json"
    assert main([*arguments, "--bandwidth", "1", "--json", str(slow)]) == 0
    slower = json.loads(slow.read_text())["predictions"]
    assert slower[0]["forward_exposed"] > lines[0]["forward_exposed"]
    assert slower[0]["bytes_forward"] == lines[0]["bytes_forward"]


@pytest.mark.parametrize(("ranks", "nodes"), [(4, 1), (12, 2), (20, 4), (64, 8)])
def test_nodes_follow_the_ranks(ranks: int, nodes: int, capsys: pytest.CaptureFixture[str]) -> None:
    """At most 8 on each, equally many."""
    assert main(["plan-parallel", "--ep", str(ranks), "--tokens", "8"]) == 0
    assert f"{ranks} ranks on {nodes} nodes" in " ".join(capsys.readouterr().out.split())


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
        (["--ep", "4", "--nodes", "4", "--levels", "2"], "--levels: expected 1 unless there are several nodes"),
        (["--ep", "8", "--gpus", "3"], "--gpus: expected at least 8 (--ep), got 3"),
        (["--ep", "8", "--gpus", "12"], "--gpus: expected a multiple of 8 (--ep), got 12"),
        (["--model", "mixtral", "--stages", "33"], "--stages: expected at most 32, the layers of mixtral, got 33"),
        (
            ["--ep", "1", "--nodes", "1", "--flops", "1e300", "--overhead", "0"],
            "expected speeds at which a step takes some time",
        ),
    ],
)
def test_plan_parallel_names_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan-parallel", "--tokens", "8", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--bandwidth", "--local-bandwidth", "--flops", "--mtbf", "--step"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "x"])
def test_speeds_and_times_are_above_zero(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan-parallel", option, value])
    assert f"{option}: expected a number above 0, got '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["--overhead", "--skew", "--restart", "--checkpoint-every", "--shrink", "--join", "--repair"]
)
def test_other_numbers_are_not_negative(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("-1", "nan", "inf"):
        with pytest.raises(SystemExit):
            main(["plan-parallel", option, value])
        assert f"{option}: expected a number of at least 0, got '{value}'" in capsys.readouterr().err
    for counted in ("--replicas", "--optimizer-bytes"):
        with pytest.raises(SystemExit):
            main(["plan-parallel", counted, "-1"])
        assert f"{counted}: expected an integer of at least 0, got '-1'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("ids", "message"),
    [([[0, 1, 2]], "expected 2 choices of each token, got 3"), ([[-1, -1]], "expected at least one choice")],
)
def test_a_trace_fits_the_model(
    ids: list[list[int]], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.pt"
    torch.save(torch.tensor(ids), trace)
    assert main(["plan-parallel", "--model", "mixtral", "--tokens", "8", "--trace", str(trace)]) == 2
    assert f"--trace: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "0 1\n", "root:x:0:0:root:/root:/bin/bash\n", "PK\3\4"])
def test_a_trace_of_something_else_is_named_in_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "trace.txt"
    trace.write_text(text)
    assert main(["plan-parallel", "--trace", str(trace)]) == 2
    error = capsys.readouterr().err
    assert f"--trace: cannot read {trace}: " in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_bench_parallel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It fails unless results agree and bytes are minimal; times are not tested."""
    out = tmp_path / "bench.json"
    arguments = ["bench", "parallel", "2", "--shapes", "tiny", "--tokens", "32", "--quick", "--modes", "train"]
    assert main([*arguments, "--json", str(out), "--plot", str(tmp_path)]) == 0
    (result,) = json.loads(out.read_text())["results"]
    plain, *ours = result["variants"]
    assert plain["sent_bytes"] > ours[0]["sent_bytes"] == ours[1]["sent_bytes"] == ours[2]["sent_bytes"]
    assert all(variant["at_floor"] for variant in ours)
    assert (tmp_path / "parallel-train.png").stat().st_size > 1000
    assert "switchgear, 4 chunks" in capsys.readouterr().out


@pytest.mark.slow
def test_bench_parallel_on_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes are minimal with both numbers of levels, and fewer between nodes with two; times are not tested."""
    out = tmp_path / "bench.json"
    arguments = ["bench", "parallel", "4", "--nodes", "2", "--shapes", "tiny", "--tokens", "32", "--quick"]
    assert main([*arguments, "--modes", "train", "--json", str(out), "--plot", str(tmp_path)]) == 0
    (result,) = json.loads(out.read_text())["results"]
    ours = [variant for variant in result["variants"] if variant["chunks"]]
    assert all(variant["at_floor"] for variant in ours)
    one, two = ([v for v in ours if v["levels"] == n] for n in (1, 2))
    assert two[0]["between_bytes"] < one[0]["between_bytes"]
    assert (tmp_path / "parallel-train-2-nodes.png").stat().st_size > 1000
    assert "two levels, 4 chunks" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["forward", "train"])
@pytest.mark.parametrize("is_plain", [True, False])
def test_flop_that_the_bench_counts(is_plain: bool, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of every op that runs experts, as --gflops times them."""
    counted = []

    def count(own: Any, flop: Any, *args: Any, **options: Any) -> Any:
        result = own(*args, **options)
        counted.append(flop(result, *args))
        return result

    for name, flop in bench.FLOP.items():
        monkeypatch.setattr(ops, name, partial(count, getattr(ops, name), flop))
    shape = SHAPES["tiny"]
    with ExpertParallel() as parallel:
        experts = ParallelExperts(shape.hidden_size, shape.intermediate_size, shape.num_experts, parallel=parallel)
        x = torch.randn(7, shape.hidden_size, requires_grad=True)
        choice = draw_routing(7, shape.num_experts, shape.top_k), torch.rand(7, shape.top_k, requires_grad=True)
        with torch.set_grad_enabled(mode == "train"):
            y = moe(x, *experts.parameters(), *choice) if is_plain else experts(x, *choice)
        if mode == "train":
            y.sum().backward()
    assert sum(counted) == flops_of(shape, 7, mode)


def test_a_throttled_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of nodes (0, 1) and (2, 3): each direction of each link is busy for its bytes, whatever the order."""
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    network = Network((True, True, False, False), 10.0, 100.0)
    assert network.send(0, [9, 0, 0, 0], [9, 0, 0, 0], 10) == (100, 100)
    assert network.send(0, [9, 0, 1, 2], [9, 0, 2, 0], 10) == (100, 103)  # 30 bytes come, 20 leave
    assert network.send(0, [0, 0, 0, 1], [0, 0, 1, 1], 10) == (103, 104)  # 40 bytes each way
    assert network.send(0, [0, 5, 0, 0], [0, 1, 0, 0], 10) == (100, 100.5)  # within the node
    assert network.send(0, [0, 1, 0, 0], [0, 0, 0, 1], 10) == (104, 105)
    assert Network((True, True, False, False), 10.0, None).send(0, [0, 2, 1, 0], [0, 0, 0, 0], 10) == (100, 103)


def test_nodes_of_the_bench_must_divide(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "parallel", "4", "--nodes", "3"]) == 2
    assert "--nodes: expected a divisor of 4" in capsys.readouterr().err
