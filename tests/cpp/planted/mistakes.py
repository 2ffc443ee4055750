# SPDX-License-Identifier: BSD-3-Clause
"""Mistakes in the CPU kernels that tests/mutants.py plants beside those that it makes up. All must be detected."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    file: str  # in csrc/cpu
    name: str
    before: str  # occurs in the file exactly once
    after: str


MISTAKES = (
    Mistake("token_sum.cpp", "sums restart in each wave", "args.accumulate ? args.out : TensorView{}", "TensorView{}"),
    Mistake("integers/moe_forward.cpp", "sums restart in each wave",
            "stride, args.sums, block", "stride, TensorView{}, block"),
    Mistake("route_dynamic.cpp", "min_experts counts for nothing",
            "rank >= options.min_experts && !(mass < options.top_p)", "!(mass < options.top_p)"),
    Mistake("route_dynamic.cpp", "the mass is that of the next expert",
            "!(mass < options.top_p)) break;", "!(mass + row.scores[0] < options.top_p)) break;"),
    Mistake("route_dynamic.cpp", "scores below the threshold", "!(score >= options.threshold)", "false"),
    Mistake("route_dynamic.cpp", "weights behind the last choice",
            "      std::fill(weights + count, weights + max_experts, 0.0f);\n", ""),
    Mistake("ranking.h", "ties to the highest expert", "(~index & 0xffffffff)", "(index & 0xffffffff)"),
    Mistake("column_topk.cpp", "the last of equal tokens is left", "t <= cut[e].last", "t < cut[e].last"),
    Mistake("column_topk.cpp", "a bin that is taken whole", "rest > histogram[bin]", "rest >= histogram[bin]"),
    Mistake("column_topk.cpp", "one sequence for all",
            "? sequence_ids[t] : 0) * num_experts", "? 0 : 0) * num_experts"),
    Mistake("ranking.h", "-0 below 0", "std::bit_cast<int32_t>(value + 0.0f)", "std::bit_cast<int32_t>(value)"),
    Mistake("ranking.h", "NaN is large",
            "v = v > -kFloatMax ? v : -kFloatMax;", "v = v < -kFloatMax ? -kFloatMax : v;"),
    Mistake("fit_capacity.cpp", "one place too many", "if (size <= limit) return;", "if (size <= limit + 1) return;"),
    Mistake("fit_capacity.cpp", "holes take places",
            "topk_ids[i] < 0 ? -1 : group_of(i / top_k, topk_ids[i])", "group_of(i / top_k, std::max(topk_ids[i], 0))"),
    Mistake("fit_capacity.cpp", "choices by token", "i % top_k * num_tokens + i / top_k", "i"),
    Mistake("fit_capacity.cpp", "priorities that are NaN",
            "~key_of(sanitise(priorities[i]), i)", "~key_of(priorities[i], i)"),
    Mistake("fit_capacity.cpp", "full experts have room",
            "room[g] = std::max<int64_t>(0, limit - size);", "room[g] = limit;"),
    Mistake("fit_capacity.cpp", "offers in any order",
            "    std::sort(offers.begin(), offers.end(), precedence.before());\n", ""),
    Mistake("fit_capacity.cpp", "rerouted to an expert that it has", "heap[chosen[k]] = -1;", ";"),
    Mistake("assign_balanced.cpp", "the last experts get one more",
            "(e < sizes[b] % num_experts)", "(e >= num_experts - sizes[b] % num_experts)"),
    Mistake("assign_balanced.cpp", "prices stay",
            "price[shop] = value_of(*std::min_element(held.begin(), held.end()));", "price[shop] = 0.0f;"),
    Mistake("assign_balanced.cpp", "leftover tokens to full experts",
            "while (std::ssize(holders[first + e]) == places[first + e]) ++e;", ""),
    Mistake("assign_capped.cpp", "a charge m times as wrong",
            "if (charge > last) return last;", "if (charge > last) return charge;"),
    Mistake("assign_capped.cpp", "the first j that comes",
            "if (next.count == at.count || next.count >= total)", "if (true)"),
    Mistake("assign_capped.cpp", "tokens are paid", "num_experts, cap, 0.0f,", "num_experts, cap, -1.0f,"),
    Mistake("assign_capped.cpp", "the limit of the first sequence", "limits[b], n)", "limits[0], n)"),
    Mistake("assign_capped.cpp", "tokens are charged last", "false);\n    a.charge_experts();\n", "false);\n"),
    Mistake("assign_capped.cpp", "the first to settle stops all",
            "return std::all_of(settled", "return std::any_of(settled"),
    Mistake("assign_capped.cpp", "tokens in the order of sequences",
            "as<float>() + sequences.members[i] *", "as<float>() + i *"),
    Mistake("gate.cpp", "bias of the first columns", "offset(args.bias, column)", "offset(args.bias, 0)"),
    Mistake("gate.cpp", "rows widened over each other", "widened + m * row_bytes", "widened + m * 4"),
    Mistake("gate.cpp", "a whole panel at the end of a piece", "std::min(panel, end - column)", "panel"),
    Mistake("gate.cpp", "a row between pieces is left",
            "task / pieces.across * pieces.rows,", "task / pieces.across * (pieces.rows + 1),"),
    Mistake("gate.cpp", "the last piece of columns is left",
            "across = ceil_div(num_experts, columns);", "across = std::max<int64_t>(1, num_experts / columns);"),
    Mistake("gate.cpp", "rows without their stride", "row_of(x, first_row + m)", "offset(x, (first_row + m) * depth)"),
)  # fmt: skip
