# SPDX-License-Identifier: BSD-3-Clause
"""GGUF files of published models at their true size, with drawn weights, and what a token reads of a file."""

from __future__ import annotations

import math
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from switchgear.integrations.gguf import RECIPES, describe_model
from switchgear.integrations.gguf_architectures import ARCHITECTURE, EMBEDDING, HEAD
from switchgear.integrations.gguf_file import PLAIN, read_gguf, write_gguf
from switchgear.reference import gguf
from switchgear.weights.gguf import encode_rows

from .offload_model_files import build_on_meta

KINDS = (*gguf.TYPES, *RECIPES)
STD = 0.02  # of matrices
BLOCKS = 262147  # of a type that are encoded. A prime, and more than the rows of a vocabulary, so that rows differ
AT_ONCE = 1 << 24  # bytes
STEP = 10007  # blocks between the beginnings of two tensors


def write_drawn(config: Any, kind: str, path: Path) -> None:
    """A file of a type of KINDS. As in files of llama.cpp, only experts are mxfp4, and the rest is q8_0."""
    metadata, tensors = describe_model(build_on_meta(config), kind)
    for number, (name, tensor) in enumerate(tensors.items()):
        type = "q8_0" if tensor.type == "mxfp4_gguf" and "_exps" not in name else tensor.type
        tensors[name] = tensor._replace(type=type, make=partial(_draw, name, type, tensor.shape, number))
    write_gguf(path, metadata, tensors)


def _draw(name: str, type: str, shape: tuple[int, ...], number: int) -> Tensor:
    """Norms are ones, biases zeros, and matrices the blocks of the pool, again and again."""
    if len(shape) == 1 or name.endswith(".bias"):
        return torch.full(shape, float(name.endswith("norm.weight")))
    pool = _encode_pool(type)
    count = math.prod(shape) // _count_columns(type)
    blocks = pool.roll(-number * STEP, 0).repeat(-(-count // BLOCKS), 1)[:count]
    return blocks.view(*shape[:-1], -1)


@lru_cache
def _encode_pool(type: str) -> Tensor:
    """[BLOCKS, bytes or numbers of a block]. Encoding all numbers of a model would take most of the time."""
    numbers = torch.randn(BLOCKS, _count_columns(type), generator=torch.Generator().manual_seed(0)).mul_(STD)
    return encode_rows(type, numbers) if type in gguf.TYPES else numbers.to(PLAIN[type][1])


def _count_columns(type: str) -> int:
    return gguf.TYPES[type].columns if type in gguf.TYPES else 32


class Sizes(NamedTuple):
    """Bytes. whole: of all weights; read: of those that a token reads; decoded: of all in bfloat16; head: of it."""

    whole: int
    read: int
    decoded: int
    head: int


def measure_sizes(path: Path) -> Sizes:
    """An embedding that is not the head is looked up, not read."""
    file = read_gguf(path)
    name = file.get(ARCHITECTURE)
    share = file.get(f"{name}.expert_used_count") / file.get(f"{name}.expert_count")
    sizes = {each: tensor.data.nbytes for each, tensor in file.tensors.items()}
    read = {each: size * share if "_exps." in each else size for each, size in sizes.items()}
    if HEAD in read:
        del read[EMBEDDING]
    decoded = 2 * sum(math.prod(tensor.shape) for tensor in file.tensors.values())
    return Sizes(sum(sizes.values()), round(sum(read.values())), decoded, sizes[HEAD if HEAD in sizes else EMBEDDING])


def read_through(path: Path) -> None:
    """Leaves the file in the page cache, as far as it has room."""
    buffer = bytearray(AT_ONCE)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
