# SPDX-License-Identifier: BSD-3-Clause
"""RoutingRecord: the choices of a model's routers for a number of sequences, packed.

A choice takes ceil(log2 C) bits, C being the router's classes, and one class more if choices are empty somewhere: 7
bits for 128 experts. The rank of a token's choice among all combinations would take fewer (41 instead of 56 for 8 of
128), but it loses the order, which tells the slots of the weights, and costs a search per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import torch
from torch import Tensor

from switchgear.checks import NotEmpty, Range, Shape, checked
from switchgear.files import AnyPath, load_saved, save_whole
from switchgear.reference.checks import MAX_EXPERTS, check_range
from switchgear.trace.batches import stacked
from switchgear.utils.packages import first_line

_FORMAT = 1  # version of the file format
_Recording = TypeVar("_Recording")
_ROWS = 1 << 16  # choices that are packed at a time


@dataclass(frozen=True)
class LayerRecord:
    """The choices of one layer for N tokens.

    Attributes:
        num_classes: C, the classes of its router: its experts, and in some models others.
        top_k: K.
        bits: of a choice.
        data: [ceil(N·K·bits / 8)] uint8; choices in order of tokens and slots, the lowest bit first.
    """

    num_classes: int
    top_k: int
    bits: int
    data: Tensor
    num_tokens: int

    @classmethod
    @checked
    def of(
        cls, topk_ids: Annotated[Tensor, Shape("N", "K")], num_classes: Annotated[int, Range(1, MAX_EXPERTS)]
    ) -> LayerRecord:
        """Packs topk_ids [N,K], -1 for none."""
        if topk_ids.dtype.is_floating_point:
            raise TypeError(f"topk_ids: expected integers, got {topk_ids.dtype}")
        if topk_ids.shape[1] > num_classes:
            raise ValueError(f"topk_ids: expected at most {num_classes} choices of a token, got {topk_ids.shape[1]}")
        ids = topk_ids.to("cpu", torch.int64)
        if wrong := ids[(ids < -1) | (ids >= num_classes)].tolist():
            raise ValueError(f"topk_ids: expected ids from -1 to {num_classes - 1}, got {wrong[0]}")
        empty = bool((ids < 0).any())
        bits = max(1, (num_classes + empty - 1).bit_length())
        codes = torch.where(ids < 0, num_classes, ids).flatten()
        # A multiple of 8 choices at a time fills whole bytes.
        data = torch.cat([_packed(part, bits) for part in torch.split(codes, _ROWS)])
        return cls(num_classes, ids.shape[1], bits, data, len(ids))

    def topk_ids(self) -> Tensor:
        """[N,K] int32, -1 for none."""
        parts = torch.split(self.data, _ROWS * self.bits // 8)
        codes = torch.cat([_unpacked(part, self.bits) for part in parts])[: self.num_tokens * self.top_k]
        return torch.where(codes == self.num_classes, -1, codes).view(self.num_tokens, self.top_k)

    def check(self, num_tokens: int) -> None:
        """Raises ValueError for anything but what `of` makes of N tokens."""
        if (
            not 1 <= self.num_classes <= MAX_EXPERTS
            or not 0 <= self.top_k <= self.num_classes
            or not 1 <= self.bits <= 25
        ):
            raise ValueError("expected sizes of a layer")
        size = -(-num_tokens * self.top_k * self.bits // 8)
        if self.num_tokens != num_tokens or self.data.dtype is not torch.uint8 or self.data.shape != (size,):
            raise ValueError("expected the choices of all tokens")
        ids = self.topk_ids()
        if ids.numel() and int(ids.max()) >= self.num_classes:
            raise ValueError("expected choices in range")


def _packed(codes: Tensor, bits: int) -> Tensor:
    flat = ((codes[:, None] >> torch.arange(bits)) & 1).flatten()
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (flat << torch.arange(8)).sum(1).to(torch.uint8)


def _unpacked(data: Tensor, bits: int) -> Tensor:
    flat = ((data[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten().int()
    flat = flat[: len(flat) // bits * bits].view(-1, bits)
    return (flat << torch.arange(bits, dtype=torch.int32)).sum(1, dtype=torch.int32)


def _repeated(topk_ids: Tensor) -> Tensor:
    """The ids of topk_ids [N,K] that a token has before, from 0 on."""
    ids = topk_ids.sort(1).values
    return ids[:, 1:][(ids[:, 1:] == ids[:, :-1]) & (ids[:, 1:] >= 0)]


class RoutingRecord:
    """Choices by layer, sequence and position; padding is left out.

    Attributes:
        layers: LayerRecord by name of the router (ours) or of the experts (Hugging Face), as in a RoutingTrace; "#1"
            follows for the second call of the same layer in a forward, and so on.
        lengths: [n] int64, tokens of each sequence. Layers hold the tokens of the first sequence, then the next.
        token_ids: [N] int32, or None if the model got none. Replay compares them.
    """

    def __init__(self) -> None:
        self.layers: dict[str, LayerRecord] = {}
        self.lengths = torch.zeros(0, dtype=torch.int64)
        self.token_ids: Tensor | None = None

    def __repr__(self) -> str:
        tokens, ids = int(self.lengths.sum()), "" if self.token_ids is None else ", with token ids"
        return f"RoutingRecord({len(self.layers)} layers, {self.num_sequences} sequences, {tokens} tokens{ids})"

    @classmethod
    def of(
        cls,
        topk_ids: Mapping[str, Tensor],
        lengths: Sequence[int] | Tensor,
        num_classes: int | Mapping[str, int],
        token_ids: Tensor | None = None,
    ) -> RoutingRecord:
        """A record of choices from elsewhere, such as those that an inference engine returns: topk_ids [N,K] by layer
        for sequences of these lengths, one after the other. num_classes: E, or by layer."""
        record = cls()
        given = torch.as_tensor(lengths)
        if given.is_floating_point() and given.numel():
            raise TypeError(f"lengths: expected integers, got {given.dtype}")
        record.lengths = given.to("cpu", torch.int64).contiguous()  # not expanded: a file holds what it describes
        if record.lengths.dim() != 1 or bool((record.lengths < 0).any()):
            raise ValueError(f"lengths: expected tokens of each sequence, got {record.lengths.tolist()}")
        total = int(record.lengths.sum())
        for name, ids in topk_ids.items():
            if len(ids) != total:
                raise ValueError(f"topk_ids: expected {total} tokens in {name}, got {len(ids)}")
            if not isinstance(num_classes, int) and name not in num_classes:
                raise ValueError(f"num_classes: expected a number for {name}, got those of {', '.join(num_classes)}")
            classes = num_classes if isinstance(num_classes, int) else num_classes[name]
            record.layers[name] = LayerRecord.of(ids, classes)
            if len(twice := _repeated(ids)):
                expert = int(twice[0])
                raise ValueError(f"topk_ids: expected different experts of a token in {name}, got {expert} twice")
        if token_ids is not None:
            if token_ids.numel() != total:
                raise ValueError(f"token_ids: expected {total}, got {token_ids.numel()}")
            wide_ids = token_ids.reshape(-1).to("cpu", torch.int64)
            check_range("token_ids", wide_ids, -(2**31), 2**31)
            record.token_ids = wide_ids.int()
        return record

    @property
    def num_sequences(self) -> int:
        """Sequences that the record holds."""
        return len(self.lengths)

    @property
    def num_bytes(self) -> int:
        """Of all packed choices."""
        return sum(layer.data.numel() for layer in self.layers.values())

    @staticmethod
    @checked
    def join(records: Annotated[Sequence[RoutingRecord], NotEmpty]) -> RoutingRecord:
        """The sequences of several records of one model, one after the other."""
        first = records[0]
        for record in records:
            if list(record.layers) != list(first.layers) or (record.token_ids is None) != (first.token_ids is None):
                raise ValueError("records: expected those of one model, got different layers")
        ids = {name: stacked([record.layers[name].topk_ids() for record in records]) for name in first.layers}
        classes = {name: max(record.layers[name].num_classes for record in records) for name in first.layers}
        tokens = (
            None if first.token_ids is None else torch.cat([r.token_ids for r in records if r.token_ids is not None])
        )
        return RoutingRecord.of(ids, torch.cat([record.lengths for record in records]), classes, tokens)

    def save(self, path: AnyPath) -> None:
        """Writes the record with torch.save."""
        save_whole(path, self._state())

    def _state(self) -> dict[str, Any]:
        layers = {name: [r.num_classes, r.top_k, r.bits, r.data, r.num_tokens] for name, r in self.layers.items()}
        return {"format": _FORMAT, "layers": layers, "lengths": self.lengths, "token_ids": self.token_ids}

    @classmethod
    def load(cls, path: AnyPath) -> RoutingRecord:
        """Loads a saved record. Raises ValueError for any other file."""
        return load_recording(path, "RoutingRecord", _FORMAT, cls._of_state)

    @classmethod
    def _of_state(cls, state: dict[str, Any]) -> RoutingRecord:
        record = cls()
        record.lengths, record.token_ids = state["lengths"], state["token_ids"]
        if record.lengths.dtype is not torch.int64 or record.lengths.dim() != 1 or bool((record.lengths < 0).any()):
            raise ValueError("expected lengths of sequences")
        total = int(record.lengths.sum())
        if (ids := record.token_ids) is not None and (ids.dtype is not torch.int32 or ids.shape != (total,)):
            raise ValueError("expected a token id for each token")
        for name, (classes, top_k, bits, data, num_tokens) in state["layers"].items():
            layer = LayerRecord(int(classes), int(top_k), int(bits), data, int(num_tokens))
            layer.check(total)
            record.layers[str(name)] = layer
        return record


def load_recording(
    path: AnyPath, kind: str, file_format: int, of_data: Callable[[dict[str, Any]], _Recording]
) -> _Recording:
    """of_data(the dict in the file). ValueError, which names the class `kind`, for any other file."""
    try:
        data = load_saved(path)
        if not isinstance(data, dict) or data["format"] != file_format:
            raise ValueError("another format")
        return of_data(data)
    except OSError:
        raise
    except Exception as error:  # entries may be of any type
        reason = first_line(error)
        raise ValueError(f"path: expected a file of {kind}.save, got {path} ({reason})") from error
