# SPDX-License-Identifier: BSD-3-Clause
"""Reads damaged files of each format (file_formats.py):

    python tests/fuzz/damaged_files.py --count 3000 --seed 0

Each case draws a damage: of bytes, or of what is in the file. The reader must raise its documented error, or give the
same tensors as a plain reader of the same bytes. It must not crash or hang. Case number i depends on the seed and i
alone, so `--first i --count 1` repeats it. Cases run in child processes; a new one continues after a crash. 3,000
cases are more than 150 for each format.
"""

from __future__ import annotations

import functools
import random
import re
import struct
import sys
import tempfile
from pathlib import Path

import children
import torch
from file_formats import FORMATS, NUMBERS, SAFETENSORS, Format, Tensors

# ---- damages of bytes ------------------------------------------------------------------------------------------------


def header(data: bytes) -> int:
    """The bytes before the numbers of a safetensors file; all of any other small file, where most damages should be."""
    length = 8 + int.from_bytes(data[:8], "little")
    return length if length <= len(data) else min(len(data), 4096)


def bits(data: bytes, rng: random.Random) -> bytes:
    """Flips one to three bits, mostly of the header."""
    spoiled = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        spoiled[rng.randrange(header(data) if rng.random() < 0.8 else len(data))] ^= 1 << rng.randrange(8)
    return bytes(spoiled)


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.choice((0, 1, 8, header(data), len(data) - 1, rng.randrange(len(data))))]


def extended(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.choice((1, 8, 5000)))


def zeros(data: bytes, rng: random.Random) -> bytes:
    begin, length = rng.randrange(len(data)), rng.choice((1, 8, 64))
    return data[:begin] + bytes(len(data[begin : begin + length])) + data[begin + length :]


def sizes(data: bytes, rng: random.Random) -> bytes:
    """Writes a number of 8 bytes somewhere, or over the header's length."""
    begin = rng.choice((0, rng.randrange(max(len(data) - 8, 1))))
    return data[:begin] + struct.pack("<Q", rng.choice(NUMBERS) % 2**64) + data[begin + 8 :]


def repeated(data: bytes, rng: random.Random) -> bytes:
    """Repeats a stretch."""
    begin, length = rng.randrange(header(data)), rng.choice((1, 8, 100))
    return data[: begin + length] + data[begin:]


def words(data: bytes, rng: random.Random) -> bytes:
    """Replaces a number or a dtype in the header's text, with the header's length corrected; or doubles a key."""
    length = header(data)
    is_framed = data[8:9] == b"{"
    begin = 8 if is_framed else 0
    text = data[begin:length]
    kind = rng.choice((rb"\d+", rb"[A-Z]+[0-9]+[A-Z0-9_]*", rb"\"[^\"]+\":\s?(\{[^{}]*\}|[^,{}\[\]]+)", rb"[,:\[\]{}]"))
    found = list(re.finditer(kind, text))
    if not found:
        return bits(data, rng)
    match = rng.choice(found)
    new = {
        rb"\d+": str(rng.choice(NUMBERS)).encode(),
        rb"[A-Z]+[0-9]+[A-Z0-9_]*": rng.choice(list(SAFETENSORS)).encode(),
        rb"[,:\[\]{}]": rng.choice((b"", b"[" * 100_000, b"null", b"NaN,", b"{}", b"\xff")),
    }.get(kind, match[0] + b"," + match[0])
    text = text[: match.start()] + new + text[match.end() :]
    return (struct.pack("<Q", len(text)) if is_framed else b"") + text + data[length:]


BYTES = (bits, bits, truncated, extended, zeros, sizes, repeated, words, words)

# ---- one case --------------------------------------------------------------------------------------------------------


@functools.cache
def clean(name: str) -> dict[str, bytes]:
    """The files of a format, which must be read as they are."""
    with tempfile.TemporaryDirectory() as folder:
        FORMATS[name].write(Path(folder))
        fault = judge(FORMATS[name], Path(folder))
        if fault is not None or not FORMATS[name].read(Path(folder)):
            raise AssertionError(f"a clean file of {name} {fault}")
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def damage(name: str, folder: Path, rng: random.Random) -> str:
    """Damages the files in a folder; returns how."""
    if rng.random() < 0.4:
        return FORMATS[name].change(folder, rng)
    file = folder / rng.choice(sorted(clean(name)))
    way = rng.choice(BYTES)
    data = file.read_bytes()
    spoiled = way(data, rng)
    file.write_bytes(spoiled if spoiled != data else bits(data, rng))
    return f"{way.__name__} in {file.name}"


def judge(format: Format, folder: Path) -> str | None:
    """What is wrong with how files are read; None if nothing is."""
    try:
        got = format.read(folder)
    except BaseException as error:
        line = str(error).partition("\n")[0][:200]
        return None if format.is_documented(error) else f"raises {type(error).__name__}: {line}"
    try:
        wanted = format.plain(folder)
    except Exception as error:
        return f"is read, but the plain reader raises {type(error).__name__}: {error}"
    return difference(got, wanted)


def difference(got: Tensors, wanted: Tensors) -> str | None:
    if got.keys() != wanted.keys():
        return f"gives other tensors: {sorted(got.keys() ^ wanted.keys())[:3]}"
    for key, tensor in got.items():
        want = wanted[key]
        if tensor.shape != want.shape or tensor.dtype is not want.dtype:
            return f"gives {key} as {tensor.dtype} {list(tensor.shape)}, not {want.dtype} {list(want.shape)}"
        if not torch.equal(_bytes(tensor), _bytes(want)):
            return f"gives other numbers in {key}"
    return None


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def draw(seed: int, number: int, folder: Path) -> tuple[str, str]:
    """Writes the files of a case; returns its format and its title."""
    rng = random.Random(f"{seed} {number}")
    torch.manual_seed(rng.getrandbits(63))
    name = list(FORMATS)[number % len(FORMATS)]
    for file, data in clean(name).items():
        (folder / file).write_bytes(data)
    return name, f"{name}: {damage(name, folder, rng)}"


def title(seed: int, number: int) -> str:
    with tempfile.TemporaryDirectory() as folder:
        return draw(seed, number, Path(folder))[1]


def check(seed: int, number: int) -> str | None:
    """Runs a case; returns its title and what is wrong, or None."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        name, about = draw(seed, number, Path(folder))
        fault = judge(FORMATS[name], Path(folder))
    return None if fault is None else f"{about} {fault.replace(folder, '')}"


FUZZER = children.Fuzzer(__file__, "count", title, check)

if __name__ == "__main__":
    sys.exit(children.main(FUZZER, __doc__))
