# SPDX-License-Identifier: BSD-3-Clause
"""Four domains of text that machines have, as bytes: Python, English, C and Perl, or what takes their place.

Each domain has sources in order of preference; the first that has enough text is used, and its name is kept. Every
source is read in the order of its files' names, so a machine gives the same text each time. Every 20th piece is held
out.
"""

from __future__ import annotations

import gzip
import importlib
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from switchgear.cli.common import CommandError
from switchgear.files import AnyPath

HELD_OUT_EVERY = 20
MOST_BYTES = 4 * 2**20  # of a domain, for training
ENOUGH = 2**18  # a source with less is passed over
MOST_OF_FILE = 2**16  # a longer file would be a domain of its own
HELD_OUT_BYTES = 2**16
SLICE = 2**12


class Domain(NamedTuple):
    name: str
    source: str  # in words; no path of this machine
    train: Tensor  # [n] uint8
    held_out: Tensor  # [m] uint8


def _files(folders: Iterable[AnyPath], patterns: Iterable[str]) -> Iterator[bytes]:
    for folder in map(Path, folders):
        found = {file for pattern in patterns for file in folder.glob(pattern)}
        for file in sorted(found, key=lambda file: file.as_posix()):
            try:
                if file.is_file():
                    yield file.read_bytes()[:MOST_OF_FILE]
            except OSError:
                continue


def _python() -> Iterator[bytes]:
    return _files([sysconfig.get_path("stdlib")], ["*.py", "[a-d]*/*.py", "[f-k]*/*.py", "[m-r]*/*.py"])


def _topics() -> Iterator[bytes]:
    topics = importlib.import_module("pydoc_data.topics").topics
    paragraphs = dict.fromkeys(text for name in sorted(topics) for text in topics[name].split("\n\n"))  # topics overlap
    text = "\n\n".join(paragraphs).encode()  # in slices, since a few topics are most of it
    return (text[i : i + SLICE] for i in range(0, len(text), SLICE))


def _licences() -> Iterator[bytes]:
    return _files([sysconfig.get_path("purelib")], ["*.dist-info/METADATA", "*.dist-info/**/LICENSE*"])


def _headers() -> Iterator[bytes]:
    return _files(["/usr/include"], ["*.h", "linux/*.h"])


def _headers_of_torch() -> Iterator[bytes]:
    return _files([Path(torch.__file__).parent / "include"], ["c10/**/*.h", "ATen/*.h", "ATen/native/**/*.h"])


def _perl() -> Iterator[bytes]:
    folders = [
        folder for pattern in ("share/perl/*.*", "lib/*/perl/*.*") for folder in sorted(Path("/usr").glob(pattern))
    ]
    return _files(folders, ["*.pm", "*.pod", "*/*.pm", "*/*.pod"])


def _manuals() -> Iterator[bytes]:
    for data in _files(["/usr/share/man"], [f"man{i}/*.gz" for i in (1, 2, 3, 5, 7, 8)]):
        try:
            yield gzip.decompress(data)[:MOST_OF_FILE]
        except (OSError, EOFError):
            continue


def _tables() -> Iterator[bytes]:
    return _files([Path(sysconfig.get_path("stdlib")) / "encodings"], ["*.py"])


Source = tuple[str, Callable[[], Iterator[bytes]]]
# The last source of each domain is a part of Python or torch.
DOMAINS: dict[str, tuple[Source, ...]] = {
    "python": (("modules of the Python standard library", _python),),
    "english": (("topics of Python's help", _topics), ("descriptions and licences of Python packages", _licences)),
    "c": (("C headers of the system", _headers), ("C++ headers of torch", _headers_of_torch)),
    "perl": (("Perl's modules", _perl), ("manual pages", _manuals), ("tables of Python's encodings", _tables)),
}


def _read(pieces: Iterable[bytes]) -> tuple[bytes, bytes]:
    """Text for training and held-out text. A held-out piece follows each 19 others."""
    train, held_out = bytearray(), bytearray()
    for i, piece in enumerate(pieces):
        if len(train) >= MOST_BYTES:
            break
        (held_out if i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else train).extend(piece)
    return bytes(train[:MOST_BYTES]), bytes(held_out[:HELD_OUT_BYTES])


def load_domain(name: str) -> Domain:
    """CommandError if no source of the domain has enough text."""
    for words, pieces in DOMAINS[name]:
        try:
            train, held_out = _read(pieces())
        except (ImportError, OSError):
            continue
        if len(train) >= ENOUGH and held_out:
            return Domain(name, words, tensor(train), tensor(held_out))
    raise CommandError(f"no text for the domain {name!r}: looked for {', '.join(words for words, _ in DOMAINS[name])}")


def load_domains() -> list[Domain]:
    return [load_domain(name) for name in DOMAINS]


def tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """`count` random windows of a text: [count, length] int64."""
    starts = torch.randint(_last_start(text, length) + 1, (count, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


def evenly(text: Tensor, count: int, length: int) -> Tensor:
    """`count` windows at equal distances: [count, length] int64, the same each time."""
    starts = torch.linspace(0, _last_start(text, length), count).long()[:, None]
    return text[starts + torch.arange(length)].long()


def _last_start(text: Tensor, length: int) -> int:
    """Where the last window begins. CommandError for a text shorter than a window."""
    last = text.numel() - length
    if last < 0:
        raise CommandError(f"the text is too short: {text.numel()} bytes, a window has {length}")
    return last
