# SPDX-License-Identifier: BSD-3-Clause
"""The cost model of the CUDA kernels. Only a GPU can show that it is right. These tests check that it counts the work
of the existing kernels and never exceeds the hardware's peak."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from errors import raises
from switchgear.cli import main
from switchgear_bench.cost_model import (
    COOPERATIVE_EPILOGUE,
    DEPENDENT_LAUNCH_SECONDS,
    EPILOGUE,
    EXPECTED,
    GPUS,
    LAUNCH_SECONDS,
    Gpu,
    Tile,
    after_product,
    cycles_of_tile,
    gemm,
    pick_tile,
    pick_wgrad_tile,
    predict,
    routed,
    wgrad,
)
from switchgear_bench.cost_model_stored import HOPPER, STORED_FORMATS, cycles_of_step, predict_stored
from switchgear_bench.decode_model import BLOCKS, STEP_INSTRUCTIONS, WARPS, decode_rows, plain, stored, tile_columns
from switchgear_bench.model import best_published
from switchgear_bench.published import FIGURES
from switchgear_bench.shapes import GPU_SHAPES, GPU_TOKENS, Shape, forward_flops

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
gpus = pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)


ROWS128, ROWS192 = Tile(128, 128), Tile(128, 192)
PAIRS128, PAIRS192, PAIRS256 = Tile(128, 128, 1, 2), Tile(128, 192, 1, 2), Tile(128, 256, 1, 2, True)


def test_instructions_of_cooperative_epilogues_are_those_that_tiles_are_picked_by() -> None:
    text = (SOURCES / "tiles_sm90.h").read_text()
    for name, value in (("kStore", "store"), ("kGlu", "glu"), ("kWgrad", "wgrad")):
        assert f"{name}Instructions = {COOPERATIVE_EPILOGUE[value]}" in text


def test_tiles_are_picked_as_by_the_kernels() -> None:
    """The cases of test_gemm_sm90.cpp, through the module."""
    gpu = GPUS[1]
    assert [pick_tile(gpu, rows, 256, 64).rows for rows in (1, 16, 17, 64, 65)] == [16, 16, 64, 64, 128]
    assert pick_tile(gpu, 255, 1536, 64) == ROWS192
    assert pick_tile(gpu, 255.5, 1536, 64) == pick_tile(gpu, 256, 1536, 64) == PAIRS192
    for rows in (1, 64, 255):
        assert pick_tile(gpu, rows, 1536, 64, "glu_backward") == ROWS128
    assert pick_tile(gpu, 256, 1536, 64, "glu_backward") == PAIRS128
    for columns, depth, epilogue, tile in (
        (512, 1536, "glu", PAIRS256), (1536, 256, "store", PAIRS192), (1536, 512, "store", PAIRS256),
        (2048, 4096, "glu", PAIRS256), (4096, 1024, "store", PAIRS256), (4096, 2048, "store", PAIRS256),
        (128, 4096, "store", ROWS128),
    ):  # fmt: skip
        assert pick_tile(gpu, 10000, columns, depth, epilogue) == tile
    assert pick_wgrad_tile(gpu, 2048, 4096, 2048, False) == PAIRS256
    assert pick_wgrad_tile(gpu, 4096, 1024, 2048, True) == PAIRS256
    assert pick_wgrad_tile(gpu, 128, 1024, 2048, True) != PAIRS256
    assert pick_wgrad_tile(gpu, 1024, 256, 2048, False) != PAIRS256
    assert [pick_tile(GPUS[0], rows, 256, 64) for rows in (16.5, 17, 81)] == [
        Tile(16, 128, 2), Tile(64, 128, 2), Tile(128, 128, 2),
    ]  # fmt: skip
    with raises(ValueError, "epilogue"):
        pick_tile(gpu, 1, 256, 64, "relu")


@gpus
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_all_work_is_counted_and_takes_at_least_the_time_of_the_hardware(gpu: Gpu, shape: str) -> None:
    sizes, tokens = GPU_SHAPES[shape], GPU_TOKENS[shape]
    for mode, times in (("forward", 1), ("backward", 2), ("train", 3)):
        prediction = predict(gpu, sizes, tokens, mode)
        flops = sum(kernel.flops for kernel in prediction.kernels)
        assert flops == times * forward_flops(sizes, tokens)
        assert prediction.seconds >= flops / (gpu.tensor_rate * gpu.sustained)
        weights = 3 * 2 * sizes.num_experts * sizes.hidden_size * sizes.intermediate_size
        assert prediction.seconds >= weights / gpu.bandwidth
        for kernel in prediction.kernels:
            assert kernel.seconds >= max(kernel.bytes / gpu.bandwidth, kernel.flops / gpu.tensor_rate)


@gpus
def test_decoding_is_bound_by_the_weights(gpu: Gpu) -> None:
    sizes = GPU_SHAPES["qwen3-30b-a3b"]
    prediction = predict(gpu, sizes, 1, "forward")
    touched = 3 * 2 * sizes.top_k * sizes.hidden_size * sizes.intermediate_size
    floor = touched / (gpu.bandwidth * gpu.sustained_bandwidth)
    assert floor < prediction.seconds < floor + len(prediction.kernels) * 2 * LAUNCH_SECONDS


@gpus
def test_few_rows_are_padded(gpu: Gpu) -> None:
    """17 rows need a larger tile than 16. Empty experts cost nothing in a product; their weight gradients are zeros."""
    assert pick_tile(gpu, 16, 256, 128).rows == 16 < pick_tile(gpu, 17, 256, 128).rows
    assert gemm(gpu, "", [100, 0, 28], 256, 128, 0).tiles == (2 + 1) * 2  # 64 x 128
    assert gemm(gpu, "", [0, 0], 256, 128, 0).tiles == 0
    assert gemm(gpu, "", [5], 256, 128, 0).flops == 2 * 5 * 256 * 128
    assert wgrad(gpu, "", [0, 0], 64, 32).bytes == 2 * 2 * 64 * 32


def test_an_odd_row_tile_is_paired_with_itself() -> None:
    """Two experts of 3 and 4 row tiles, 3 columns of tiles: 3 + 2 pairs, and 2 · 3 pairs."""
    gpu = GPUS[1]
    assert pick_tile(gpu, 448, 768, 4096) == PAIRS256
    assert gemm(gpu, "", [384, 512], 768, 4096, 0).tiles == 2 * (3 + 2 + 6)


def test_l2_binds_tiles_without_multicast() -> None:
    """128 x 192 do 77 flop per byte that a block loads, 128 x 128 do 64: at 8 TB/s 614 and 512 TFLOP/s."""
    gpu = GPUS[1]
    assert gpu.l2_rate == pytest.approx(8e12, rel=1e-3)
    for columns, epilogue, limit in ((4608, "store", 614e12), (4096, "glu_backward", 512e12)):
        kernel = gemm(gpu, "", [255] * 64, columns, 4096, 0, epilogue)  # too few rows for pairs
        assert kernel.bound == "L2"
        assert kernel.flops / kernel.l2_bytes * gpu.l2_rate == pytest.approx(limit, rel=1e-2)
    few = gpu._replace(multiprocessors=10)  # 640 bytes a cycle reach ten of them
    assert few.l2_rate == 640 * gpu.clock


def test_an_epilogue_is_hidden_by_the_other_tile_or_not_at_all() -> None:
    gpu, deep, short = GPUS[1], 4096, 64
    pingpong, cooperative = Tile(128, 128), Tile(128, 128, 1, 2, True)
    stored = EPILOGUE["glu_backward"] * 128.0  # a warp's accumulators, one per lane and column
    product, period = cycles_of_tile(gpu, pingpong, deep, "glu_backward")
    assert period == product
    product, period = cycles_of_tile(gpu, pingpong, short, "glu_backward")
    assert period == (product + stored) / 2 > product
    product, period = cycles_of_tile(gpu, cooperative, deep, "glu")
    # Each consumer has half of the tile, and they share the schedulers.
    assert period == product + COOPERATIVE_EPILOGUE["glu"] * 128.0


def test_launches_and_what_is_expected() -> None:
    forward = predict(GPUS[1], GPU_SHAPES["sonic-7b-n256"], GPU_TOKENS["sonic-7b-n256"], "forward")
    assert [kernel.launches for kernel in forward.kernels] == [3, 1, 1, 1]
    for kernel in forward.kernels:
        assert kernel.seconds > kernel.launches * LAUNCH_SECONDS
    after = after_product(GPUS[1], forward.kernels[1])
    assert forward.kernels[1].seconds - after.seconds == pytest.approx(LAUNCH_SECONDS - DEPENDENT_LAUNCH_SECONDS)
    assert after_product(GPUS[0], forward.kernels[1]) == forward.kernels[1]
    assert forward.expected_tflops == EXPECTED * forward.tflops


def test_routing_is_the_same_every_time() -> None:
    shape = Shape(8, 8, 16, 3, "of the tests")
    assert routed(shape, 100) == routed(shape, 100)
    assert sum(routed(shape, 100)) == 300
    skewed = routed(shape, 100, "zipf")
    assert skewed[0] == max(skewed) > 300 / 16


def test_published_figures_belong_to_a_shape() -> None:
    assert {figure.shape for figure in FIGURES} <= set(GPU_SHAPES)
    assert set(GPU_SHAPES) == set(GPU_TOKENS)
    for figure in FIGURES:
        assert figure.mode in ("forward", "backward", "train")
        assert figure.source


def test_bench_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.json"
    assert main(["bench", "model", "--shapes", "sonic-7b-n256", "--json", str(file)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("PREDICTIONS of a model, not measurements")
    assert "predicted for H100" in text
    assert "expected: 0.87 of it" in text
    assert "published, H100: SonicMoE 366 TFLOP/s" in text
    assert "366 (SonicMoE, H100)" in text
    results = json.loads(file.read_text())
    assert {row["gpu"] for row in results["predictions"]} == {"A100", "H100"}
    assert {(row["gpu"], row["tokens"]) for row in results["decode"]} == {
        (g, t) for g in ("A100", "H100") for t in (1, 4, 16)
    }
    assert all(figure["source"] for figure in results["published"])


def test_the_model_is_near_what_the_best_tuned_kernels_reach() -> None:
    """SonicMoE has the same structure on the same card. A prediction far from its figures would be an error of the
    model or an unrealistic promise."""
    figures = [figure for figure in FIGURES if figure.who == "SonicMoE"]
    assert len(figures) == 8
    for figure in figures:
        predicted = predict(GPUS[1], GPU_SHAPES[figure.shape], GPU_TOKENS[figure.shape], figure.mode).tflops
        assert 0.8 < predicted / figure.tflops < 1.3, figure


def test_the_best_figure_is_the_fastest() -> None:
    best = best_published("sonic-7b-n256", "forward")
    assert best is not None
    assert (best.who, best.tflops) == ("SonicMoE", 366)
    assert best_published("e512-k10", "backward") is None


def test_few_tiles_of_stored_weights_are_narrow() -> None:
    """The tiles and the rule of stored_gemm.cuh, which spreads few tiles over narrow ones."""
    table = re.search(r"kStoredTiles\[\] = \{(.*?)\n\};", (SOURCES / "tiles_sm80.h").read_text(), re.DOTALL)
    assert table is not None
    tiles = [
        [int(number) for number in row]
        for row in re.findall(r"\{16, (\d+), (\d+), (\d+), (\d+), .*, (\d+)\}", table[1])
    ]
    for columns, tile in zip((64, 32), tiles, strict=True):
        assert columns in STEP_INSTRUCTIONS
        assert (tile[1], tile[2] * tile[3], tile[4]) == (columns, WARPS, BLOCKS)
    text = (SOURCES / "stored_gemm.cuh").read_text()
    assert "return tiles <= resident_blocks(kTile.blocks, 0, g.schedule);" in text
    gpu = GPUS[0]
    places = BLOCKS * gpu.multiprocessors
    assert tile_columns(gpu, 1, 32 * places) == 32
    assert tile_columns(gpu, 1, 32 * places + 1) == 64
    assert stored(gpu, 1, 4096, 14336, 32).seconds < stored(gpu, 1, 4096, 14336, 64).seconds
    for row in decode_rows(gpu):
        assert row.now.seconds <= row.before.seconds
        assert row.plain.seconds > 0


def test_bytes_in_flight_bound_few_warps() -> None:
    """A latency of 0.8 us and 4 KB a warp: 256 warps reach 1.3 TB/s, and ten times as many the whole bandwidth."""
    gpu = GPUS[1]
    few, many = plain(gpu, 1, 4096, 4096), plain(gpu, 10, 4096, 4096)
    assert (few.bound, many.bound) == ("in flight", "memory")
    assert 2 * 4096 * 4096 / few.seconds == pytest.approx(256 * 4096 / 0.8e-6)


def test_bench_model_names_the_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "model", "--shapes", "tiny"]) == 2
    assert "--shapes: expected a list of sonic-7b-n256" in capsys.readouterr().err


def test_stored_weights_on_wgmma_are_predicted_faster() -> None:
    shape = GPU_SHAPES[next(iter(GPU_SHAPES))]
    for stored_format in STORED_FORMATS:
        before, now = (predict_stored(shape, 16384, stored_format, wgmma) for wgmma in (False, True))
        assert before.tflops < now.tflops <= HOPPER.tensor_rate / 1e12 * HOPPER.sustained
        cycles = cycles_of_step(HOPPER, stored_format, True)
        assert cycles["arithmetic"] * HOPPER.products_per_cycle == pytest.approx(2 * 128 * 32 * 128)
