# SPDX-License-Identifier: BSD-3-Clause
"""Mistakes in the real kernels: each is one edit of a copy of csrc/cuda, with the file to compile again and the program
that must then fail. The sources do not refer to them; it is an error if an edit's text is no longer in the source."""

from __future__ import annotations

from mistake import ASAN, BOTH, RACE, Mistake
from unseen import UNSEEN


def _of_plan(name: str, builds: tuple[str, ...], before: str, after: str, header: str = "plan.cuh") -> Mistake:
    tests = ("plan_at_the_edges",)
    return Mistake(f"plan: {name}", builds, header, before, after, "csrc/cuda/plan.cu", "simt_test_plan", tests)


def _of_route(name: str, header: str, before: str, after: str, test: str) -> Mistake:
    return Mistake(f"route: {name}", RACE, header, before, after, "csrc/cuda/route.cu", "simt_test_route", (test,))


def _of_gate(name: str, before: str, after: str, builds: tuple[str, ...] = BOTH) -> Mistake:
    return Mistake(f"gate: {name}", builds, "gate.cuh", before, after, "csrc/cuda/gate.cu", "simt_test_gate")


def _of_policies(name: str, builds: tuple[str, ...], header: str, before: str, after: str, op: str) -> Mistake:
    program = "simt_test_policies"
    return Mistake(f"{op}: {name}", builds, header, before, after, f"csrc/cuda/{op}.cu", program, (op,))


def _of_sm80(name: str, builds: tuple[str, ...], header: str, before: str, after: str) -> Mistake:
    program = "simt_planted_gemm_sm80"
    return Mistake(f"sm_80: {name}", builds, header, before, after, "tests/simt/planted/gemm_sm80.cpp", program)


def _of_sm90(name: str, builds: tuple[str, ...], before: str, after: str, header: str = "gemm_sm90.cuh") -> Mistake:
    program = "simt_planted_gemm_sm90"
    return Mistake(f"sm_90: {name}", builds, header, before, after, "tests/simt/planted/gemm_sm90.cpp", program)


def _of_store(
    name: str, before: str, after: str, builds: tuple[str, ...] = BOTH, header: str = "gemm_sm90_store.cuh"
) -> Mistake:
    return _of_sm90(f"store: {name}", builds, before, after, header)


def _of_glu(name: str, before: str, after: str) -> Mistake:
    return _of_sm90(f"glu: {name}", BOTH, before, after, "gemm_sm90_glu.cuh")


def _of_pairs(
    name: str, before: str, after: str, builds: tuple[str, ...] = BOTH, header: str = "gemm_sm90.cuh"
) -> Mistake:
    return _of_sm90(f"pairs: {name}", builds, before, after, header)


def _of_queue(name: str, before: str, after: str, builds: tuple[str, ...] = BOTH) -> Mistake:
    return _of_sm90(f"queue: {name}", builds, before, after, "tile_queue.cuh")


def _of_separate(name: str, before: str, after: str) -> Mistake:
    return _of_sm90(f"separate: {name}", BOTH, before, after, "gemm_sm90_separate.cuh")


def _of_low_rank(
    name: str, source: str, test: str, before: str, after: str, header: str, builds: tuple[str, ...] = BOTH
) -> Mistake:
    program = "simt_test_low_rank"
    return Mistake(f"adapter: {name}", builds, header, before, after, f"csrc/cuda/{source}.cu", program, (test,))


def _of_exchange(name: str, before: str, after: str, builds: tuple[str, ...] = RACE) -> Mistake:
    program = "simt_test_exchange"
    return Mistake(f"exchange: {name}", builds, "exchange.cuh", before, after, "tests/simt/test_exchange.cpp", program)


MISTAKES = (
    _of_plan(
        "no barrier before the sums of warps",
        RACE,
        "sums[warp] = inclusive;\n  __syncthreads();",
        "sums[warp] = inclusive;",
        "scan.cuh",
    ),
    _of_plan("no __syncwarp between reads and the write", RACE, "+ rank;\n    __syncwarp();", "+ rank;"),
    _of_plan("no barrier after zeroing the counters", RACE, "counters[e] = 0;\n  __syncthreads();", "counters[e] = 0;"),
    _of_plan(
        "no barrier before placing pairs", RACE, "num_used);\n  __syncthreads();\n  if (warp", "num_used);\n  if (warp"
    ),
    Mistake(
        "plan: weights in the order of tokens",
        BOTH,
        "plan.cuh",
        "p.extras.slot_weights[slot] = ",
        "p.extras.slot_weights[i] = ",
        "csrc/cuda/plan.cu",
        "simt_test_moe",
        ("moe_backward_on_sm90",),
    ),
    _of_plan("tail not filled", BOTH, "if (i >= num_used) p.token_indices[i] = -1;", ""),
    _of_route(
        "no __syncwarp before the weights' sum",
        "route.cuh",
        "scale.score(logit);\n  }\n  __syncwarp();",
        "scale.score(logit);\n  }",
        "route_has_the_bits",
    ),
    _of_route(
        "no __syncwarp before the groups are read",
        "route.cuh",
        "    __syncwarp();\n    take_best_groups",
        "    take_best_groups",
        "route_has_the_bits",
    ),
    _of_route(
        "no __syncwarp before an expert is taken",
        "ranking.cuh",
        "    __syncwarp();  // what other lanes read before\n",
        "",
        "route_of_thousands",
    ),
    _of_route(
        "no __syncwarp between two stores",
        "route.cuh",
        "store_expert(e, 0.0);\n    __syncwarp();",
        "store_expert(e, 0.0);",
        "route_backward_has_the_bits",
    ),
    Mistake(
        "route: sums in another order",
        BOTH,
        "score.cuh",
        "  const int64_t exponent = smallest_bits >> 23;",
        "  return true;\n  const int64_t exponent = smallest_bits >> 23;",
        "tests/simt/test_route.cpp",
        "simt_test_route",
        ("sums_are_those",),
    ),
    _of_gate("whole vectors at the end of a row", "aligned && count - i >= kVector", "aligned"),
    _of_gate("half of the lanes added", "int step = 16; step > 0;", "int step = 8; step > 0;"),
    _of_gate("no predicate for experts", " || expert >= p.num_experts) return;", ") return;"),
    _of_gate(
        "rows past the last",
        "first_token + t < p.num_tokens ? first_token + t : p.num_tokens - 1",
        "first_token + t",
        ASAN,
    ),
    _of_gate("bias of the tile's expert", "p.bias_dtype, expert)", "p.bias_dtype, expert - first_expert)"),
    _of_gate(
        "sums in another order in a tile",
        "sums[t][e] = fmaf(rows[t][i], column[i], sums[t][e]);",
        "{\n          const int k = kTokens > 1 ? kGateRun - 1 - i : i;\n"
        "          sums[t][e] = fmaf(rows[t][k], column[k], sums[t][e]);\n        }",
    ),
    _of_policies(
        "no barrier before the next digit is counted",
        RACE,
        "select.cuh",
        "    __syncthreads();  // cuts, and bins that are empty again\n",
        "",
        "column_topk",
    ),
    _of_policies(
        "ties go to the last token", BOTH, "select.cuh", "(((1u << place_bits) - 1) - place)", "place", "column_topk"
    ),
    _of_policies(
        "a token goes to an expert twice",
        ASAN,
        "fit_capacity.cuh",
        "keys[p.topk_ids[i]] = kTaken;",
        ";",
        "fit_capacity",
    ),
    _of_policies(
        "no barrier before the prices",
        RACE,
        "assign_balanced.cuh",
        "    __syncthreads();\n    waiting = num_waiting;",
        "    waiting = num_waiting;",
        "assign_balanced",
    ),
    _of_policies(
        "no barrier of the grid before the tokens",
        RACE,
        "assign_capped.cuh",
        "    charge_experts(p, scratch, round);\n    grid_barrier(p.arrived, target);\n",
        "    charge_experts(p, scratch, round);\n",
        "assign_capped",
    ),
    _of_policies(
        "a barrier of the grid without acquire",
        RACE,
        "assign_capped.cuh",
        "ptx::ld_acquire_gpu(arrived)",
        "ptx::ld_relaxed_gpu(arrived)",
        "assign_capped",
    ),
    _of_policies(
        "moves of a round in the half that it reads",
        RACE,
        "assign_capped.cuh",
        "atomicMax(p.moved(b, round + 1), now);",
        "atomicMax(p.moved(b, round), now);",
        "assign_capped",
    ),
    _of_policies(
        "partial sums in another order",
        BOTH,
        "assign_capped.cuh",
        "int step = kChunkLanes / 2; step > 0; step /= 2) own",
        "int step = 1; step < kChunkLanes; step *= 2) own",
        "assign_capped",
    ),
    _of_policies(
        "only the first chunk of a row",
        BOTH,
        "assign_capped.cuh",
        "if (base + c * kChunk < n) sum",
        "if (base + c == 0) sum",
        "assign_capped",
    ),
    _of_policies(
        "tokens without a sequence are not written",
        BOTH,
        "assign_capped.cuh",
        "    p.assignment[at] = -p.huge;\n",
        "",
        "assign_capped",
    ),
    Mistake(
        "permute: no barrier before unassigned slots",
        RACE,
        "permute.cuh",
        ": kClaimed;\n  __syncthreads();",
        ": kClaimed;",
        "csrc/cuda/permute.cu",
        "simt_test_permute",
        ("permute_writes_all_rows",),
    ),
    Mistake(
        "combine: whole vectors at the end of a row",
        BOTH,
        "combine.cuh",
        "p.hidden_size - column < kVector ? p.hidden_size - column : kVector",
        "kVector",
        "csrc/cuda/combine.cu",
        "simt_test_combine",
        ("combine_at_every_width",),
    ),
    Mistake(
        "moe: no barrier before the bias gradient's sums",
        RACE,
        "moe.cuh",
        "= sum;\n  __syncthreads();",
        "= sum;",
        "csrc/cuda/moe_backward.cu",
        "simt_test_moe",
        ("moe_backward_on_sm90",),
    ),
    _of_exchange("blocks counted without release", "atom_add_acq_rel_gpu", "atom_add_relaxed_gpu"),
    _of_exchange("flag without release", "st_release_sys(p.flags(target)", "st_relaxed_sys(p.flags(target)"),
    _of_exchange("flag for this device alone", "st_release_sys(p.flags(target)", "st_release_gpu(p.flags(target)"),
    _of_exchange(
        "window written before it is read",
        "    if (!block_reaches(own.read + target, piece + 1 - kSlots, p.stop)) return;\n",
        "",
    ),
    _of_exchange("a batch repeats its first unit", "= batch[j];", "= batch[0];", BOTH),
    _of_exchange(
        "the rest after the batches is left out", "for (; i < count; i += step) target", "if (i < 0) target", BOTH
    ),
    _of_exchange("a batch past the end", "i + (kBatch - 1) * step < count", "i < count", ASAN),
    _of_exchange("every poll reads *stop", "polls % kPollsPerStop == 0 && ", "", BOTH),
    _of_sm80("cp.async.wait_group one too lax", RACE, "gemm_sm80.cuh", "kStages - 2>();", "kStages - 1>();"),
    _of_sm80(
        "no barrier in the ring",
        RACE,
        "gemm_sm80.cuh",
        "    __syncthreads();  // the next stage has arrived",
        "    // the next stage",
    ),
    _of_sm80(
        "no barrier before the first fragments",
        RACE,
        "gemm_sm80.cuh",
        "  __syncthreads();  // the first stage has arrived",
        "  // the first stage",
    ),
    _of_sm80(
        "the first stage is not awaited", RACE, "gemm_sm80.cuh", "  ptx::cp_async_wait<Tile::kStages - 1>();\n", ""
    ),
    _of_sm80(
        "a stage refilled while it is read",
        RACE,
        "gemm_sm80.cuh",
        "    reader.multiply(sums, a, a + Tile::kABytes);\n    ptx::cp_async_wait<Tile::kStages - 2>();",
        "    load_next(stage);\n    next -= kDepth;\n    reader.multiply(sums, a, a + Tile::kABytes);\n"
        "    ptx::cp_async_wait<Tile::kStages - 2>();",
    ),
    _of_sm80(
        "rows of the step itself read ahead",
        BOTH,
        "gemm_sm80.cuh",
        "read_ahead(j, step + 1, a, b);",
        "read_ahead(j, step, a, b);",
    ),
    _of_sm80(
        "the next stage's rows from this stage",
        BOTH,
        "gemm_sm80.cuh",
        "reader.finish(sums, next_a, next_a + Tile::kABytes);",
        "reader.finish(sums, a, next_a + Tile::kABytes);",
    ),
    _of_sm80(
        "the first columns are not read ahead",
        BOTH,
        "gemm_sm80.cuh",
        "    if (j + 1 == kPairs) step_[step % 2].read_b(0, b, step, at_);\n",
        "    if (j + 1 == kPairs && step > 0) step_[step % 2].read_b(0, b, step, at_);\n",
    ),
    _of_sm80(
        "no barrier between two passes of the epilogue",
        RACE,
        "gemm_sm80.cuh",
        "      __syncthreads();  // the last stage, or the last pass, has been read\n",
        "      if (pass == 0) __syncthreads();\n",
    ),
    _of_sm80("both passes store the same rows", BOTH, "gemm_sm80.cuh", "sums.v[pass * kMmas + i][j];", "sums.v[i][j];"),
    _of_sm80(
        "rows of the other pass",
        BOTH,
        "gemm_sm80.cuh",
        "band * Tile::kWarpRows + pass * kPassRows, kPassRows);",
        "band * Tile::kWarpRows + (1 - pass) * kPassRows, kPassRows);",
    ),
    _of_sm80(
        "rows past the expert's in a pass",
        RACE,
        "gemm_sm80.cuh",
        "tile.rows - first, tile.column};",
        "tile.rows, tile.column};",
    ),
    _of_sm80(
        "no barrier before the ring is used again",
        RACE,
        "gemm_sm80.cuh",
        "  __syncthreads();  // no warp reads the last stage",
        "  // no warp reads the last stage",
    ),
    _of_sm80(
        "no barrier before the next tile", RACE, "gemm_sm80.cuh", "    __syncthreads();  // the ring is free again", ""
    ),
    _of_sm80("no predicate for rows", ASAN, "gemm_sm80.cuh", "i < tile.rows && !unassigned ?", "true ?"),
    _of_sm80(
        "no zeros behind the last column",
        BOTH,
        "gemm_load.cuh",
        "count < 0 ? 0 : count < kChunk ? count : kChunk, false);",
        "count <= 0 ? 0 : kChunk, false);",
    ),
    _of_sm80(
        "whole chunks behind the last depth",
        BOTH,
        "gemm_load.cuh",
        "if (aligned_ && (left >= kChunk || left <= 0)) {",
        "if (aligned_) {",
    ),
    _of_sm80("rows that are none are copied", ASAN, "gemm_load.cuh", "rows_[i] >= 0 && left > 0);", "left > 0);"),
    _of_sm80(
        "depths behind the last are copied", ASAN, "gemm_load.cuh", "rows_[i] >= 0 && left > 0);", "rows_[i] >= 0);"
    ),
    _of_sm80(
        "rows one by one: always the first",
        BOTH,
        "gemm_load.cuh",
        "value = i == k ? values[k] : value;",
        "value = values[0];",
    ),
    Mistake(
        "sm_80: offsets of rows in 32 bits",
        BOTH,
        "gemm_load.cuh",
        "static_cast<uint64_t>(static_cast<uint32_t>(row)) * row_bytes",
        "static_cast<uint32_t>(row) * row_bytes",
        "tests/simt/planted/many_experts.cpp",
        "simt_planted_many_experts",
    ),
    Mistake(
        "sm_80: strides in 32 bits",
        BOTH,
        "gemm_launch.cuh",
        "return stride * size_of(dtype) < int64_t{1} << 32;",
        "return stride > 0;",
        "csrc/cuda/gemm_f32.cu",
        "simt_test_far",
        ("far_rows_of_a_product",),
    ),
    _of_sm80(
        "no swizzle",
        BOTH,
        "gemm_load.cuh",
        "  static_assert(kDepthBytes == 64 || kDepthBytes == 128);",
        "  return row * kDepthBytes + chunk * kChunkBytes;",
    ),
    _of_sm80("weights not transposed", BOTH, "gemm_decode.cuh", "      transpose_quad(b[0].w);\n", ""),
    _of_sm90(
        "producer skips the empty wait",
        BOTH,
        "ptx::mbar_wait(ring.empty + ring.index(position), ring.parity(position) ^ 1);\n      if (threadIdx.x == 0) {",
        "ptx::prefetch_tensor_map(&params.maps.weights);\n      if (threadIdx.x == 0) {",
    ),
    _of_sm90("half of the bytes expected", BOTH, "mbar_expect_tx(full, bytes);", "mbar_expect_tx(full, bytes / 2);"),
    _of_sm90("no bytes expected", BOTH, "mbar_expect_tx(full, bytes);", "mbar_arrive(full);"),
    _of_sm90(
        "wrong phase",
        BOTH,
        "mbar_wait(ring.full + ring.index(position), ring.parity(position));",
        "mbar_wait(ring.full + ring.index(position), ring.parity(position) ^ 1);",
    ),
    _of_sm90(
        "tiles added up before they are counted",
        RACE,
        "tiles(slots(expert));\n    }\n    __syncthreads();",
        "tiles(slots(expert));\n    }",
    ),
    _of_queue(
        "entry stored before the last one was read",
        "    ptx::mbar_wait(empty + i, (n / kQueueEntries & 1) ^ 1);\n",
        "",
    ),
    _of_queue(
        "entry read before it is stored",
        "      ptx::mbar_wait(full + i, parity);\n",
        "",
    ),
    _of_queue("entry released by a lane before others read", "    if (whole_warp) __syncwarp();\n", "", RACE),
    _of_queue("entry never released", "      ptx::mbar_arrive(empty + n % kQueueEntries);\n", ""),
    _of_queue("no end for one consumer", "  queue.push(n + 1, {num_tiles, 0});\n", ""),
    _of_queue(
        "stages of another tile", "queued.position + static_cast<uint32_t>(stages_of(queued.tile))", "queued.position"
    ),
    _of_queue("counter not reset", "    atomicExch(&counter->taken, 0);\n", ""),
    _of_queue(
        "counter reset by the first block",
        "!= static_cast<int32_t>(gridDim.x) / kCluster - 1) return;",
        "!= 0) return;",
        RACE,
    ),
    _of_queue("a tile is skipped", "{source.take(n + 1), queued", "{source.take(n + 1) + (n == 1), queued"),
    _of_pairs(
        "stage released in the own block only",
        "  if constexpr (kCluster > 1) ptx::mbar_arrive_remote(empty, ptx::cluster_rank() ^ 1);\n",
        "",
    ),
    _of_pairs(
        "wait without what the other block did",
        "      ptx::mbar_wait_cluster(full + i, parity);\n",
        "      ptx::mbar_wait(full + i, parity);\n",
        RACE,
        "tile_queue.cuh",
    ),
    _of_pairs(
        "no barrier before the other block is used",
        "  sync_cluster<C::kCluster>();  // the barriers are initialised in both blocks\n",
        "",
        RACE,
    ),
    _of_pairs(
        "a block ends while the other one uses it",
        "  sync_cluster<C::kCluster>();  // no block still uses the other's memory\n",
        "",
        RACE,
    ),
    _of_pairs(
        "both blocks load the first columns",
        "const int n = rank == 0 ? first : middle;",
        "const int n = first;",
    ),
    _of_pairs(
        "both blocks store the first half", "to + rank * kHalf * kRowBytes, map, full, k, n,", "to, map, full, k, n,"
    ),
    _of_pairs(
        "weights for the own block only",
        "constexpr uint16_t kBothBlocks = 3;",
        "#define kBothBlocks static_cast<uint16_t>(1u << ptx::cluster_rank())\n//",
    ),
    _of_pairs(
        "both blocks have the same rows",
        "position.row * C::kCluster + rank;",
        "position.row * C::kCluster;",
    ),
    _of_pairs(
        "half of the pairs are missing",
        "return row_tiles / C::kCluster * columns;",
        "return row_tiles / C::kCluster / 2 * columns;",
    ),
    _of_pairs("last rows: both blocks have the same columns", "2 * (index - before) + rank}", "2 * (index - before)}"),
    _of_pairs("last rows: no tile for the last column", "((columns + 1) / 2)", "(columns / 2)"),
    _of_pairs("last rows: the weights go to both blocks", "    if (tile.alone) {\n", "    if (false) {\n"),
    _of_pairs(
        "last rows: half of the weights",
        "      ptx::tma_load_3d(to + kHalf * kRowBytes, map, full, k, middle, expert);\n",
        "",
    ),
    _of_pairs(
        "along n: both blocks load the first depths",
        "map, full, n, k + skipped, expert, kBothBlocks);",
        "map, full, n, k, expert, kBothBlocks);",
    ),
    _of_pairs(
        "along n, last rows: the first depths twice",
        "map, full, n, k + skipped, expert);",
        "map, full, n, k, expert);",
    ),
    _of_pairs(
        "along n, last rows: the weights go to both blocks",
        "if (C::kCluster > 1 && !tile.alone) {",
        "if (C::kCluster > 1) {",
    ),
    _of_pairs("cooperative consumers multiply the same rows", "C::kCooperative ? this_consumer() : 0;", "0;"),
    _of_pairs("cooperative consumers count as one", "4 * (kCooperative ? 2 : 1) * kCluster;", "4 * kCluster;"),
    _of_pairs(
        "entry stored in the first block only",
        "      ptx::st_cluster(entries + i, rank, entry);\n",
        "",
        BOTH,
        "tile_queue.cuh",
    ),
    _of_pairs(
        "other block reads entries before they are stored",
        "      ptx::st_cluster(entries + i, rank, entry);\n      ptx::mbar_arrive_cluster(full + i, rank);\n",
        "      ptx::mbar_arrive_cluster(full + i, rank);\n      ptx::st_cluster(entries + i, rank, entry);\n",
        RACE,
        "tile_queue.cuh",
    ),
    _of_pairs(
        "entry released in the own block",
        "      ptx::mbar_arrive_remote(empty + n % kQueueEntries, 0);\n",
        "      ptx::mbar_arrive(empty + n % kQueueEntries);\n",
        BOTH,
        "tile_queue.cuh",
    ),
    _of_pairs(
        "weight gradient: both blocks load the first slots",
        "                                   first + skipped, 0, kBothBlocks);",
        "                                   first, 0, kBothBlocks);",
        BOTH,
        "gemm_sm90_wgrad.cuh",
    ),
    _of_pairs(
        "weight gradient: the gathered operand is paired",
        "int32_t& paired = shares_a() ? position.column : position.row;",
        "int32_t& paired = shares_b() ? position.column : position.row;",
        BOTH,
        "gemm_sm90_wgrad.cuh",
    ),
    _of_store(
        "rows are read before their matrices are stored",
        "  __syncwarp();\n  column += lane % 8 * 8;",
        "  column += lane % 8 * 8;",
        RACE,
    ),
    _of_store(
        "matrices are stored before rows are read",
        "  __syncwarp();  // before the next columns are staged\n",
        "",
        RACE,
    ),
    _of_store("matrices of other columns", "lane / 16 + 2 * sixteen", "lane / 8 % 2 + 2 * sixteen"),
    _of_store(
        "warps share their memory",
        "const int warp = (this_thread() - kProducers) / 32;",
        "const int warp = 0;",
        RACE,
        "gemm_sm90.cuh",
    ),
    _of_store(
        "rows of the next expert",
        "if (r >= tile.rows) return nullptr;",
        "if (tile.first_row + r >= g.num_slots) return nullptr;",
        RACE,
        "gemm_sm90.cuh",
    ),
    _of_store("columns past the last", "if (row != nullptr && column < columns)", "if (row != nullptr)"),
    _of_store(
        "box: no proxy fence", "  ptx::fence_proxy_async();\n  __syncwarp();\n  if", "  __syncwarp();\n  if", RACE
    ),
    _of_store(
        "box: stored before other lanes have staged",
        "  ptx::fence_proxy_async();\n  __syncwarp();\n  if",
        "  ptx::fence_proxy_async();\n  if",
        RACE,
    ),
    _of_store("box: memory written before it is read", "ptx::tma_store_wait_read<0>();", ";"),
    _of_store(
        "box: rows of the warps before",
        "tile.first_row + row, 0, adjusted",
        "tile.first_row, 0, adjusted",
        BOTH,
        "gemm_sm90.cuh",
    ),
    _of_store(
        "box: rows of the next expert",
        "staging.lent != nullptr && row + 16 <= tile.rows",
        "staging.lent != nullptr",
        RACE,
        "gemm_sm90.cuh",
    ),
    _of_store(
        "box: the other consumer still multiplies the stage",
        "ptx::bar_sync(1, kConsumers * 128);",
        ";",
        RACE,
        "gemm_sm90.cuh",
    ),
    _of_store(
        "box: the ring's memory after the next tile has it",
        "  wait_for_boxes();\n  release",
        "  release",
        BOTH,
        "gemm_sm90.cuh",
    ),
    _of_store(
        "rows staged before other lanes have read their tile",
        "    __syncwarp();  // before other lanes stage rows there\n    finish<T, kEpilogue>",
        "    finish<T, kEpilogue>",
        RACE,
        "gemm_sm90.cuh",
    ),
    _of_store(
        "box: another matrix", "column, row, matrix, AsIs{}", "column, row, 0, AsIs{}", BOTH, "gemm_sm90_wgrad.cuh"
    ),
    _of_store(
        "box: h not read before a is staged",
        "    if (part == 0 && boxes_of_h) wait_for_boxes();",
        "",
        RACE,
        "gemm_sm90_glu.cuh",
    ),
    _of_store(
        "box: gates where ups are",
        "boxes && (!halves || first + 128 <= first_end);",
        "boxes;",
        RACE,
        "gemm_sm90_glu.cuh",
    ),
    _of_sm90(
        "indices of the same stage",
        BOTH,
        "next_b.read(g.b, first + kDepth, end);",
        "next_b.read(g.b, first, end);",
        "gemm_sm90_wgrad.cuh",
    ),
    _of_sm90(
        "indices past the expert's last", BOTH, "rows[i] = slot >= end ? -1 :", "rows[i] =", "gemm_sm90_wgrad.cuh"
    ),
    _of_glu("bias of the other half", "(j < 16 ? first : second) + j % 16 * 8;", "first + j % 16 * 8;"),
    _of_glu("pairs are not separated", "  if (interleaved) separate_pairs(acc);\n", ""),
    _of_glu("gates of the other row", "i % 2 * 8 + lane / 4", "(i + 1) % 2 * 8 + lane / 4"),
    _of_glu("h from the first half", "(pass < 2 ? first : second) + pass % 2", "first + pass % 2"),
    _of_glu("second half of plain gates not moved", "acc[k] = acc[k + 64];", "acc[k] = acc[k];"),
    _of_glu("columns past the last", "column, pass < 2 ? first_end : n, row_of", "column, 2 * n, row_of"),
    _of_sm90("no proxy fence after cp.async", RACE, "if (copied(stage)) ptx::fence_proxy_async();", ""),
    _of_sm90(
        "stage released before its products are done",
        RACE,
        "      ptx::wgmma_wait<1>();",
        "      ptx::wgmma_wait<2>();",
    ),
    _of_sm90(
        "stage released twice",
        BOTH,
        "if (num_stages > 0 && !C::kCooperative) release",
        "for (int i = 0; i < 2 && num_stages > 0 && !C::kCooperative; ++i) release",
    ),
    _of_sm90(
        "accumulators used before the wait", BOTH, "  ptx::wgmma_wait<0>();\n  if", "  ptx::wgmma_wait<1>();\n  if"
    ),
    _of_sm90("no wgmma.fence", BOTH, "    ptx::wgmma_fence();\n", ""),
    _of_sm90(
        "dependent: offsets read before the wait",
        RACE,
        "  ptx::wait_for_kernel_before();\n  tiles.count();\n",
        "  tiles.count();\n  ptx::wait_for_kernel_before();\n",
    ),
    _of_sm90("dependent: no wait", BOTH, "  ptx::wait_for_kernel_before();\n  tiles.count();\n", "  tiles.count();\n"),
    _of_sm90(
        "dependent: producers alone wait in a weight gradient",
        BOTH,
        "  ptx::wait_for_kernel_before();",
        "  if (threadIdx.x < kProducers) ptx::wait_for_kernel_before();",
        "gemm_sm90_wgrad.cuh",
    ),
    _of_sm90("no fence after mbarrier.init", BOTH, "    ptx::fence_barrier_init();\n", ""),
    _of_sm90(
        "no barrier after mbarrier.init",
        RACE,
        "  tiles.count();\n  __syncthreads();",
        "  tiles.count();",
    ),
    _of_sm90(
        "consumers take no turns",
        BOTH,
        "  ptx::mbar_wait(ring.turn + consumer, consumer == 0 ? (n & 1) ^ 1 : n & 1);",
        "",
    ),
    _of_sm90(
        "no barrier around scratch memory",
        RACE,
        "  ptx::bar_sync(1 + consumer, 128);\n#pragma unroll 1\n",
        "#pragma unroll 1\n",
    ),
    _of_sm90("cp.async swizzled wrongly", BOTH, "(chunk ^ r % 8) * 16", "(chunk ^ r / 8 % 8) * 16"),
    _of_sm90(
        "next expert's rows in a weight gradient",
        BOTH,
        "const bool tail = tile.has_tail(stage);",
        "const bool tail = false;",
        "gemm_sm90_wgrad.cuh",
    ),
    Mistake(
        "sm_90: a stale tensor map",
        BOTH,
        "tensor_map.cu",
        "  CUtensorMap map;\n",
        "  static CUtensorMap map;\n  static bool encoded = false;\n  if (encoded) return map;\n  encoded = true;\n",
        "csrc/cuda/tensor_map.cu",
        "simt_planted_gemm_sm90",
    ),
    _of_sm90(
        "no predicate for rows",
        RACE,
        "stored = r < tile.rows;",
        "stored = slot < g.num_slots;",
        "gemm_sm90_epilogue.cuh",
    ),
    _of_sm90(
        "weights of the next column",
        BOTH,
        "map, full, k, first, expert);\n    if (halves)",
        "map, full, k, first + 1, expert);\n    if (halves)",
    ),
    _of_separate(
        "maps are not acquired",
        "  ptx::fence_tensor_map_acquire(reinterpret_cast<const CUtensorMap*>(matrix.tensor_map));\n",
        "",
    ),
    _of_separate("maps are not released", "  ptx::fence_tensor_map_release();\n", ""),
    _of_separate("one address for all", "    ptx::tensor_map_replace_address(to.tensor_map, data);\n", ""),
    _of_separate("one number of rows for all", "replace_size<kRowDimension>(", "replace_size<2>("),
    _of_separate("rows in the other dimension", "? write_maps_sm90_kernel<1>", "? write_maps_sm90_kernel<0>"),
    _of_separate("an expert without rows is read", "return matrix.rows > 0 ? expert : ~expert;", "return expert;"),
    _of_low_rank(
        "elements past a rank are read",
        "gemm_bf16",
        "low_rank_is_more",
        "    if (b.ends != nullptr) bound(b, b.ends[e]);\n",
        "",
        "gemm_sm80.cuh",
    ),
    _of_low_rank(
        "no barrier before the weights' stages",
        "gemm_bf16",
        "low_rank_is_more",
        "      __syncthreads();  // the adapter's last stage has been read\n",
        "",
        "gemm_sm80.cuh",
        RACE,
    ),
    _of_low_rank(
        "mask of other columns",
        "gemm_bf16",
        "low_rank_is_masked",
        "tile.first_row, column, WarpPlace",
        "tile.first_row, column + 8, WarpPlace",
        "gemm_sm80.cuh",
    ),
    _of_low_rank(
        "sm_90 reads the weights' map",
        "gemm_sm90",
        "sm90_low_rank",
        "low ? params.low : params.maps;",
        "params.maps;",
        "gemm_sm90.cuh",
    ),
    _of_low_rank(
        "sm_90 expects the bytes of copied rows",
        "gemm_sm90",
        "sm90_low_rank",
        "copies = gather && !low;",
        "copies = gather;",
        "gemm_sm90.cuh",
    ),
    _of_low_rank(
        "cooperative consumers mask the same rows",
        "gemm_sm90",
        "sm90_low_rank_is_masked_in_cooperative_tiles",
        "block = kBlocks == 1 ? this_thread() / 128 - 1 : i / 2;",
        "block = i / 2;",
        "gemm_sm90_epilogue.cuh",
    ),
    _of_low_rank(
        "sm_90 masks sums that are not done",
        "gemm_sm90",
        "sm90_low_rank_is_masked",
        "        ptx::wgmma_wait<0>();  // the products before are done\n",
        "",
        "gemm_sm90.cuh",
    ),
    *UNSEEN,
)
