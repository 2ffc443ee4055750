# SPDX-License-Identifier: BSD-3-Clause
"""Mistakes in the exchange with two levels, in rows of 8 bits, in exchanges of a fixed size and in training that goes
on. The functions of test_mistakes.py with the names here must detect each."""

from __future__ import annotations

from functools import partial

import planting
from planting import Mistake

MISTAKES = {
    "relays_deliver": (
        Mistake("two_level.py", "a relay passes on rows of the first chunk",
                "sent_rows=row - starts_on_device[chunk]", "sent_rows=row"),
        Mistake("two_level.py", "a relay passes on each row once",
                "choices[:, :num_members].nonzero()", "(choices[:, :num_members].cumsum(1) == 1).nonzero()"),
        Mistake("two_level.py", "a row per rank returns to the relay",
                "lengths = choices[row, member]", "lengths = choices[row, member].clamp(max=1)"),
        Mistake("layout.py", "rows to a relay are counted per rank",
                "sent_rows = torch.zeros_like(rows).index_add_(0, piece, sent.long())", "sent_rows = rows"),
        Mistake("layout.py", "what returns is ordered by ranks, not relays",
                "pair_relay = choice.via[pair_rank]", "pair_relay = pair_rank"),
        Mistake("layout.py", "rows arrive in the order of sources, not relays",
                "key=lambda source: (via[source], source)", "key=lambda source: source"),
    ),
    "nodes": (
        Mistake("nodes.py", "the first rank of a node relays all rows",
                "members[self.same(source).index(source) % len(members)]", "members[0]"),
    ),
    "two_levels": (
        Mistake("two_level.py", "pairs return in the order of ranks, not sources",
                "(chunk[pair] * num_ranks + source_of_row[row[pair]]).argsort", "(chunk[pair] * num_ranks).argsort"),
        Mistake("two_level.py", "results are summed as those of the first chunk",
                "plan.table[plan.starts[c] : plan.starts[c + 1]]", "plan.table[: plan.starts[c + 1] - plan.starts[c]]"),
        Mistake("two_level.py", "pairs return as those of the first chunk",
                "begin = sum(map(sum, plan.pairs_in[:c]))", "begin = 0"),
        Mistake("two_level.py", "results of the first rank alone return",
                "table[row, column[row, member]] = position.int()",
                "table[row[member == 0], 0] = position[member == 0].int()"),
        Mistake("two_level.py", "rows of the first chunk are passed on again",
                "self._out.chunk(c)[which]", "self._out.chunk(0)[which]"),
        Mistake("two_level.py", "empty choices have routes", "    per_rank[:, num_ranks] = 0\n", ""),
    ),
    "copies_on_the_node": (
        Mistake("exchange.py", "copies on the node are not known",
                "parallel.nodes.same(parallel.rank) if parallel.levels == 2 else ()", "()"),
        Mistake("placement.py", "copies on the node are not preferred",
                "[rank for rank in ranks if rank in near] or ranks", "ranks"),
        Mistake("exchange.py", "each rank is its own relay", "[nodes.relay(rank, other) for other in others]",
                "list(others)"),
    ),
    "relays_look": (
        Mistake("experts.py", "no relay looks without gradients", "layer.parallel.levels == 2 and on_cpu(x)", "False"),
        Mistake("exchange.py", "no relay looks in backward", "layer.options, each, rows.look)\n    else:",
                "layer.options, each)\n    else:"),
    ),
    "rows_in_8_bits": (
        Mistake("rows.py", "a scale for all rows", "wide.abs().amax(1, keepdim=True)",
                "wide.abs().amax().expand(len(rows), 1)"),
        Mistake("rows.py", "rows of zeros have no scale",
                "(largest / _LARGEST).clamp(min=torch.finfo(torch.float32).tiny)", "largest / _LARGEST"),
        Mistake("rows.py", "two fraction bits", "to(torch.float8_e4m3fn)",
                "to(torch.float8_e5m2).float().to(torch.float8_e4m3fn)"),
    ),
    "buckets": (
        Mistake("static.py", "one row too many", "place < capacity", "place <= capacity"),
        Mistake("static.py", "results of the first ranks alone are added", "slot.sort(1).values", "slot"),
        Mistake("static.py", "all tokens overflow", "(present & ~kept).sum(0)", "present.sum(0)"),
        Mistake("static.py", "ids that no expert has are the last expert's",
                "torch.where(valid, rank_of[ids], num_ranks)", "rank_of[ids]"),
    ),
    "fixed_sizes": (
        Mistake("static.py", "gradients of rows are means too", "apply(_ScaledGrad, tensor, 1 / share)",
                "apply(_ScaledGrad, tensor, 1.0)"),
        Mistake("static.py", "gradients of experts are sums", "share = 1.0 / len(parallel.twins) if", "share = 1.0 if"),
    ),
    "a_change_by_all_or_none": (
        Mistake("membership.py", "a change counts once all have applied it", "done = max(member.done for",
                "done = min(member.done for"),
        Mistake("membership.py", "a change that is dropped is kept", "complete()\n        self._apply = None",
                "complete()"),
        Mistake("membership.py", "half a change counts as none", "self.empty = True  # half", "pass  # half"),
    ),
    "members_without_state": (
        Mistake("membership.py", "members without state propose",
                "if not own.empty and not missing", "if not missing"),
    ),
    "clipping": (
        Mistake("elastic.py", "the norm counts each copy", "module.placement.owners[expert][0] == rank",
                "rank in module.placement.owners[expert]"),
        Mistake("elastic.py", "gradients of experts are averaged", " and name not in experts\n", "\n"),
    ),
    "moving": (
        Mistake("moves.py", "the optimizer's state stays",
                "for key in sorted(rows)]", "for key in ()]"),
        Mistake("moves.py", "experts are in another order",
                "in enumerate(mine):", "in enumerate(reversed(mine)):"),
        Mistake("moves.py", "the first experts of a rank move",
                "[number[e] for experts in sent for e in experts]",
                "[place for experts in sent for place in range(len(experts))]"),
    ),
    "joining": (
        Mistake("moves.py", "the optimizer's options stay",
                "        group.update(options)\n", "        pass\n"),
        Mistake("moves.py", "a newcomer counts its own steps",
                '    training.membership.steps = common["steps"]\n', ""),
    ),
    "commits": (
        Mistake("elastic.py", "a step is prepared once all are known to be there",
                """    membership.prepare(apply)
    numbers = agree(training.parallel, "commit", (what, membership.done), number)
""",
                """    numbers = agree(training.parallel, "commit", (what, membership.done), number)
    membership.prepare(apply)
"""),
        Mistake("elastic.py", "a step that others have applied is repeated",
                "        if membership.steps > begun:\n            recount()\n            return loss\n", ""),
    ),
}  # fmt: skip

planted = partial(planting.planted, "switchgear.parallel")
