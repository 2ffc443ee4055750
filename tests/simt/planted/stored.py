# SPDX-License-Identifier: BSD-3-Clause
"""Mistakes in the products with stored weights, as in kernels.py. Wrong results show in both builds; one is enough."""

from __future__ import annotations

from kernels import ASAN, RACE, Mistake


def _of_stored(
    name: str,
    header: str,
    before: str,
    after: str,
    builds: tuple[str, ...] = ASAN,
    source: str = "stored_gemm_int4",
    test: str = "stored_at_the_edges",
) -> Mistake:
    program = "simt_test_stored"
    return Mistake(f"stored: {name}", builds, header, before, after, f"csrc/cuda/{source}.cu", program, (test,))


# The tile with twice the warps.
def _of_warps(
    name: str,
    before: str,
    after: str,
    builds: tuple[str, ...] = ASAN,
    header: str = "stored_gemm.cuh",
    source: str = "stored_gemm_int4",
) -> Mistake:
    return _of_stored(f"warps: {name}", header, before, after, builds, source, "stored_bits_do_not_depend_on_warps")


def _of_sm90(
    name: str,
    before: str,
    after: str,
    builds: tuple[str, ...] = ASAN,
    source: str = "stored_sm90_int4",
    header: str = "stored_sm90.cuh",
    test: str = "stored_sm90_at_the_edges",
) -> Mistake:
    program = "simt_test_stored_sm90"
    return Mistake(f"stored sm_90: {name}", builds, header, before, after, f"csrc/cuda/{source}.cu", program, (test,))


STORED = (
    _of_sm90(
        "registers are decoded again under their products",
        "ptx::wgmma_wait<1>();",
        "",
    ),
    _of_sm90(
        "no wgmma.fence after decoding",
        "    ptx::wgmma_fence();\n#pragma unroll\n    for (int half",
        "#pragma unroll\n    for (int half",
    ),
    _of_sm90("copies are not fenced", "    ptx::fence_proxy_async();\n  };", "  };", RACE),
    _of_sm90(
        "a stage is freed too early",
        "release_stored<C>(ring, position - 1);\n        product",
        "release_stored<C>(ring, position);\n        product",
    ),
    _of_sm90("a stage is freed for the whole warp by one lane", "  __syncwarp();\n  release<1>", "  release<1>", RACE),
    _of_sm90("a group's sums stay", "half > 0 || goes_on);", "true);"),
    _of_sm90(
        "the next group's first step",
        "left = product.w.group_steps;\n      }",
        "left = product.w.group_steps + 1;\n      }",
    ),
    _of_sm90(
        "scales of the other eight columns",
        "scale_at(C::kFormat, scales, lane / 4 + 8)",
        "scale_at(C::kFormat, scales, lane / 4)",
    ),
    _of_sm90("scales of the wrong slots", "+ C::kXScales) + lane % 4 * 2;", "+ C::kXScales) + lane % 4;"),
    _of_sm90("scales of the first block of activations", "w.x_blocks == 1 ? 0 : stage * C::kSteps >> w.x_shift", "0"),
    _of_sm90(
        "zeros of the first eight columns",
        "decode_with(shift_at(0), shift_at(8));",
        "decode_with(shift_at(0), shift_at(0));",
    ),
    _of_sm90("halves of a fragment exchanged", "2 * half + i / 2, i % 2", "2 * half + 1 - i / 2, i % 2"),
    _of_sm90("row scales of the first eight columns", "m.row_scales[row + 8]", "m.row_scales[row]"),
    _of_sm90(
        "sums are read before they are written",
        "  ptx::bar_sync(1, kConsumers * 128);\n#pragma unroll 1",
        "#pragma unroll 1",
        RACE,
    ),
    _of_sm90(
        "sums are overwritten",
        "  ptx::bar_sync(1, kConsumers * 128);  // before the next tile is written there\n",
        "",
        RACE,
    ),
    _of_sm90("a step of the next stage", "codes.advance(1);", "codes.advance(2);"),
    _of_sm90(
        "nf4 without its table",
        "  Pairs<C::kFormat, typename C::A>::fill(ring.table());\n",
        "",
        ASAN,
        "stored_sm90_nf4",
    ),
    _of_sm90(
        "an adapter's rows of another slot",
        "source_row(g.low.a, tile.first_row + r)",
        "source_row(g.low.a, r)",
        test="stored_sm90_adapters_at_the_edges",
    ),
    _of_sm90(
        "an adapter's stage is not freed",
        "    release_stored<C>(ring, position);\n",
        "",
        test="stored_sm90_adapters_at_the_edges",
    ),
    _of_sm90(
        "any group size",
        "w.group_size != kHalfGroup && ",
        "",
        ASAN,
        "stored_sm90",
        "stored_sm90.cu",
        "stored_sm90_leaves_the_rest",
    ),
    _of_stored(
        "no barrier after a stage has arrived",
        "stored_gemm.cuh",
        "    __syncthreads();  // the stage has arrived for all threads, and all have read the stage refilled next\n",
        "",
        RACE,
    ),
    _of_stored(
        "wait for one stage less",
        "stored_gemm.cuh",
        "cp_async_wait<Tile::kStages - 2>",
        "cp_async_wait<Tile::kStages - 1>",
        RACE,
    ),
    _of_stored("groups end a step late", "stored_gemm.cuh", "ends = --left == 0 ||", "ends = --left < 0 ||"),
    _of_stored(
        "scales of the other eight columns", "stored_gemm.cuh", "row_of(j) + at.lane % 4 * 2);", "at.lane % 4 * 2);"
    ),
    _of_stored("a group's sums stay", "stored_gemm.cuh", "    clear_sums(part);\n", ""),
    _of_stored("scale of the first half group", "stored_gemm.cuh", "two_groups ? half : 0);", "0);"),
    _of_stored("zero of the first half group", "stored_gemm.cuh", "(two_groups ? half * kStepRows : 0)", "0"),
    _of_stored(
        "row scales of the other eight columns",
        "stored_gemm.cuh",
        "* kStepRows + eight + at.lane",
        "* kStepRows + at.lane",
    ),
    _of_warps(
        "codes of the other eight columns", "== 1 ? at.column % kStepRows : j % 2 * 8; }", "== 1 ? 0 : j % 2 * 8; }"
    ),
    _of_warps(
        "row scales of the other warp",
        "eight = Tile::kMmaColumns == 1 ? at.column % kStepRows",
        "eight = Tile::kMmaColumns == 1 ? 0",
    ),
    _of_warps("steps behind a stage are copied", "own < Tile::kStageSteps;", "true;", RACE),
    _of_warps("half of the steps are copied", "own < Tile::kStageSteps;", "own < Tile::kStageSteps / 2;"),
    _of_warps(
        "the adapter's other eight columns",
        "    if (kHalf && at.column % 16 != 0) b[j][0] = b[j][2], b[j][1] = b[j][3];\n",
        "",
        header="gemm_sm80.cuh",
        source="stored_gemm_fp8",
    ),
    _of_stored(
        "scales of the first block of activations", "stored_gemm.cuh", "w.x_blocks == 1 ? 0 : next >> w.x_shift", "0"
    ),
    _of_stored(
        "parts without padding", "stored_load.cuh", "part * w.part_blocks + ", "part * w.part_rows / kStepRows + "
    ),
    _of_stored(
        "codes past the end of a block",
        "stored_load.cuh",
        ", left_ > i);",
        ", true);",
        ASAN,
    ),
    _of_stored(
        "any slot", "stored_load.cuh", "slot >= 0 && slot < w.num_stored", "slot >= 0", ASAN, test="stored_survives"
    ),
    _of_stored("one scale for two groups", "stored_load.cuh", "groups = w.group_size == 16 ? 2 : 1", "groups = 1"),
    _of_stored(
        "fp8 of half the size", "stored_decode.cuh", "(kBf16 ? 120 : 8)", "(kBf16 ? 119 : 7)", ASAN, "stored_gemm_fp8"
    ),
    _of_stored("mxfp4 without signs", "stored_decode.cuh", "(w & 0x00080008u) << 12 | ", "", ASAN, "stored_gemm_mxfp4"),
    _of_stored(
        "int8 relative to 127",
        "stored_decode.cuh",
        "^ (power_pair<T>(8) | kMinusZeros)",
        "^ 0xc37fc37fu",
        ASAN,
        "stored_gemm_int8",
    ),
    _of_stored(
        "three bits without the split code",
        "stored_decode.cuh",
        "if (bits == 3 && code == 15) {\n      q = 0;\n#pragma",
        "if (false) {\n      q = 0;\n#pragma",
        ASAN,
        "stored_gemm_groups",
    ),
    _of_stored(
        "decoded while it is read",
        "decoded_gemm.cuh",
        "    __syncthreads();\n    Product::template",
        "    Product::template",
        RACE,
        "decoded_gemm_bf16",
    ),
    _of_stored(
        "padding of rows is decoded",
        "decoded_gemm.cuh",
        "used && (!kTransposed || depth + i / 4 * kStepRows + row < places.end_row - places.first_row)",
        "used",
        ASAN,
        "decoded_gemm_f32",
    ),
    _of_stored(
        "the first part's rows for all parts",
        "decoded_gemm.cuh",
        "+ (kTransposed ? first : 0);",
        ";",
        ASAN,
        "decoded_gemm_f32",
    ),
    _of_stored("rounded towards zero", "quantize_rows.cuh", "rintf(", "truncf(", ASAN, "quantize_rows"),
    _of_stored(
        "scale of magnitudes of one lane",
        "quantize_rows.cuh",
        "  most = __reduce_max_sync(0xffffffffu, most);\n",
        "",
        ASAN,
        "quantize_rows",
    ),
)
