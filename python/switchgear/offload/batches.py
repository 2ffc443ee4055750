# SPDX-License-Identifier: BSD-3-Clause
"""Batches of requests that share experts (Read-ME, arXiv:2410.19123)."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Hashable, Mapping, Sequence

from torch import Tensor

from switchgear.complaints import integer
from switchgear.reference import check_size


def expert_batches(
    queue: Sequence[Collection[Hashable]], max_tokens: int, tokens: Sequence[int] | None = None
) -> list[list[int]]:
    """Groups waiting requests so that a batch needs few different experts. Returns the numbers of the requests of each
    batch; every request is in one.

    Each expert has a queue of the requests that need it. A batch starts in the one with the most tokens, and continues
    with the requests that bring the fewest new experts: first those of the fullest queue, then those that wait longest.
    Time grows with the number of requests times that of different sets of experts.

    Args:
        queue: the experts of each request, such as a PreRouter predicts: ids, or (layer, id), also in tensors.
        max_tokens: of a batch; a longer request is a batch alone.
        tokens: of each request; 1 if None.
    """
    check_size("max_tokens", max_tokens)
    sizes = [1] * len(queue) if tokens is None else list(tokens)
    if len(sizes) != len(queue):
        raise ValueError(f"tokens: expected {len(queue)} numbers, got {len(sizes)}")
    for size in sizes:
        check_size("tokens", size)
    groups: dict[frozenset[Hashable], deque[int]] = {}  # requests that need the same experts, in order of arrival
    load: Counter[Hashable] = Counter()  # tokens that wait for an expert
    for request, experts in enumerate(queue):
        needs = frozenset(map(_key, experts))
        groups.setdefault(needs, deque()).append(request)
        load.update(dict.fromkeys(needs, sizes[request]))
    batches = []
    while groups:
        batch: list[int] = []
        room, present = max_tokens, frozenset[Hashable]()
        free = dict.fromkeys(groups)  # those whose next request may fit
        while room > 0 and free:
            chosen = _next(free, present, groups, load)
            waiting = groups[chosen]
            while waiting and (sizes[waiting[0]] <= room or (not batch and sizes[waiting[0]] > max_tokens)):
                batch.append(waiting.popleft())
                room -= sizes[batch[-1]]
                load.subtract(dict.fromkeys(chosen, sizes[batch[-1]]))
                present |= chosen
            del free[chosen]
            if not waiting:
                del groups[chosen]
        batches.append(batch)
    return batches


def _key(expert: Hashable) -> Hashable:
    """Ids in tensors too, which are equal only to themselves."""
    if isinstance(expert, tuple):
        return tuple(map(_key, expert))
    return integer("queue", expert) if isinstance(expert, Tensor) else expert


def _next(
    free: Collection[frozenset[Hashable]],
    present: frozenset[Hashable],
    groups: Mapping[frozenset[Hashable], deque[int]],
    load: Mapping[Hashable, int],
) -> frozenset[Hashable]:
    def fullest(needs: frozenset[Hashable]) -> int:
        return max((load[expert] for expert in needs - present), default=0)

    if not present:
        return min(free, key=lambda needs: (-fullest(needs), len(needs), groups[needs][0]))
    return min(free, key=lambda needs: (len(needs - present), -fullest(needs), groups[needs][0]))
