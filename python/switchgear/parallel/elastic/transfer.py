# SPDX-License-Identifier: BSD-3-Clause
"""What ranks tell and send each other besides the rows of layers: that all do the same, values, rows of weights, and
the mean of gradients. All on the transport of the exchange, with its failures."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from switchgear.files import bytes_of
from switchgear.parallel import header
from switchgear.parallel.errors import MORE_PHASES
from switchgear.parallel.layout import PIECES
from switchgear.parallel.rows import Transfers

if TYPE_CHECKING:
    from switchgear.parallel.group import ExpertParallel


def agree(parallel: ExpertParallel, phase: str, what: object, number: int = 0) -> list[int]:
    """Checks that all ranks are here with an equal `what`. Returns the numbers, >= 0, of all.

    It uses the header of an exchange, so a rank that runs a layer meanwhile disagrees, before data is sent.
    """
    size = parallel.size
    with parallel.peers.exchange():
        parallel.peers.enter(phase)
        fields = dict.fromkeys(header.Terms._fields, 0)
        fields |= {"magic": header.MAGIC, "exchange": parallel.peers.step, "layer": -1 - MORE_PHASES.index(phase)}
        fields |= {"options": header.digest(what), "sharing": parallel.sharing_digest}
        sent = header.encode(header.Terms(**fields), number, [0] * size, [[0] * size for _ in range(PIECES)])
        received = _all_to_all(parallel, "header", sent, [1] * size, [1] * size)
        terms, sizes = header.decode(received)
        failure = header.disagreement(terms)
        if failure is not None:
            parallel.peers.fail(failure)
        return [size.num_tokens for size in sizes]


def gather(parallel: ExpertParallel, phase: str, value: Any) -> list[Any]:
    """The values of all ranks; of JSON's types."""
    data = json.dumps(value).encode()
    lengths = agree(parallel, phase, "gather", len(data))
    own = torch.frombuffer(bytearray(data), dtype=torch.uint8).repeat(parallel.size)
    received = send_rows(parallel, phase, "values", own, [len(data)] * parallel.size, lengths)
    return [json.loads(bytes(bytes_of(part))) for part in torch.split(received, lengths)]


def send_rows(
    parallel: ExpertParallel, phase: str, kind: str, rows: Tensor, to: Sequence[int], of: Sequence[int]
) -> Tensor:
    """Sends to[r] rows to each rank r, in order, and returns the of[r] rows of each. All know the numbers already."""
    with parallel.peers.exchange():
        parallel.peers.enter(phase)
        return _all_to_all(parallel, kind, rows.contiguous(), to, of)


def _all_to_all(parallel: ExpertParallel, kind: str, rows: Tensor, to: Sequence[int], of: Sequence[int]) -> Tensor:
    received = rows.new_empty(sum(of), *rows.shape[1:])
    transfers = Transfers(parallel, rows.device)
    transfers.wait(transfers.start(kind, received, rows, of, to))
    return received


def average(parallel: ExpertParallel, tensors: Sequence[Tensor]) -> None:
    """Replaces each by its mean over the ranks, with the same bits on all: ranks are summed in ascending order. A rank
    sends 2 (W-1)/W of their bytes."""
    size = parallel.size
    if size == 1 or not tensors:
        return
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        kinds[tensor.device, tensor.dtype].append(tensor)
    for group in kinds.values():
        flat = torch.cat([tensor.flatten() for tensor in group])
        share = -(-len(flat) // size)
        padded = torch.nn.functional.pad(flat, (0, share * size - len(flat))).view(size, share)
        parts = send_rows(parallel, "gradients", "gradients", padded, [1] * size, [1] * size)
        total = parts[0]
        for part in parts[1:]:
            total += part
        total /= size
        whole = send_rows(parallel, "gradients", "gradients", total.repeat(size, 1), [1] * size, [1] * size).flatten()
        for tensor, part in zip(group, torch.split(whole[: len(flat)], [t.numel() for t in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


def to_bytes(value: Any) -> Tensor:
    """For values that torch.load(weights_only=True) reads."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return torch.frombuffer(bytearray(stream.getbuffer()), dtype=torch.uint8)


def of_bytes(data: Tensor) -> Any:
    """Runs no code from the data."""
    return torch.load(io.BytesIO(bytes_of(data)), weights_only=True, map_location="cpu")
