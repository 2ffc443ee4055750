# SPDX-License-Identifier: BSD-3-Clause
"""Real text as bytes: by default the modules of Python's own standard library."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch

from switchgear.cli.common import CommandError

HELD_OUT_EVERY = 20  # 5 %: every 20th file (or slice of a single file) is for validation
MAX_BYTES = 16 * 2**20


class Corpus(NamedTuple):
    train: torch.Tensor  # [n] uint8
    held_out: torch.Tensor  # [m] uint8
    source: str  # for the report; no path of this machine


def load_corpus(path: str | None = None) -> Corpus:
    """The text of `path`, or the standard library's top-level .py files in order of name."""
    if path is None:
        folder = Path(os.__file__).parent
        pieces = [file.read_bytes() for file in sorted(folder.glob("*.py"), key=lambda file: file.name)]
        source = f"{len(pieces)} modules of the Python standard library"
    else:
        file = Path(path)
        if file.exists() and not (file.is_file() or file.is_dir()):  # a device may never end; each process reads it
            raise CommandError(f"--text: expected a regular file, got {path}")
        try:
            with file.open("rb") as stream:
                text = stream.read(HELD_OUT_EVERY * MAX_BYTES)  # of which MAX_BYTES are held out
        except OSError as error:
            raise CommandError(f"--text: cannot read {path}: {error.strerror}") from None
        size = max(1, len(text) // (10 * HELD_OUT_EVERY))  # 200 slices, of which 10 are held out
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        source = Path(path).name
    held_out = b"".join(pieces[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
    train = b"".join(piece for i, piece in enumerate(pieces) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1)
    return Corpus(_tensor(train[:MAX_BYTES]), _tensor(held_out[:MAX_BYTES]), source)


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def batches(text: torch.Tensor, count: int, batch_size: int, sequence_length: int, seed: int) -> torch.Tensor:
    """`count` batches of random windows: [count, batch_size, sequence_length] int64, the same for the same seed."""
    last = text.numel() - sequence_length
    if last < 0:
        raise CommandError(f"the text is too short: {text.numel()} bytes, a sequence has {sequence_length}")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(last + 1, (count, batch_size, 1), generator=generator)
    return text[starts + torch.arange(sequence_length)].long()
