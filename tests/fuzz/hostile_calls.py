# SPDX-License-Identifier: BSD-3-Clause
"""Calls the public functions and modules with hostile arguments:

    python tests/fuzz/hostile_calls.py --calls 100000 --seed 0

Each call draws a function, an argument, a defect and an instruction set (or the reference). It must raise ValueError or
TypeError that names an argument, or return what it returns for a clean copy of the argument. It must not crash or hang.
Call number i depends on the seed and i alone, so `--first i --calls 1` repeats it. Calls run in child processes; a new
one continues after a crash.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import children
import defects
import numpy as np
import torch
import valid_calls
from torch import Tensor
from valid_calls import Call

import switchgear

BACKENDS = ("reference", *switchgear.available_cpu_isas())
DIRECT = (
    "route",
    "plan",
    "permute",
    "combine",
    "grouped_gemm",
    "glu",
    "moe",
)  # no function of torch comes before theirs


class Spoiled(NamedTuple):
    """A call with one argument replaced, and with a clean copy of that (None: there is none)."""

    title: str
    call: Call
    args: dict[str, Any]
    clean: dict[str, Any] | None
    backend: str
    num_threads: int


# ---- one call --------------------------------------------------------------------------------------------------------


def draw(seed: int, number: int) -> Spoiled:
    rng = random.Random(f"{seed} {number}")
    torch.manual_seed(rng.getrandbits(63))
    backend = rng.choice(BACKENDS)
    call = valid_calls.draw(rng)
    name = rng.choice(list(call.args))
    value = call.args[name]
    if isinstance(value, Tensor):
        defect = rng.choice([defect for defect in defects.OF_TENSORS if _applies(defect, call, backend)])
        try:
            spoiled, clean = defect(value, rng)
        except (RuntimeError, ValueError, TypeError, IndexError):  # not for this dtype or shape
            spoiled, clean = defects.same(value)
        kind = defect.__name__
    else:
        # 2^31 - 1 is a valid size of a module, of more memory than there is.
        spoiled = clean = rng.choice(defects.OF_OPTIONS if call.name != "MoE()" else defects.SMALL_OPTIONS)
        kind = repr(spoiled)[:40]
    title = f"{call.name}({name}: {kind}) on {backend}"
    args, copied = call.args | {name: spoiled}, None if clean is defects.NEVER else call.args | {name: clean}
    return Spoiled(title, call, args, copied, backend, rng.choice((1, 1, 2)))


def _applies(defect: defects.Defect, call: Call, backend: str) -> bool:
    if defect is defects.freed:  # functions of torch do not survive these
        return backend != "reference" and call.name in DIRECT
    if defect is defects.inference:  # torch saves none for a backward pass
        return call.name != "moe_gradients"
    return defect is not defects.not_dense or call.name != "Router"  # torch multiplies sparse rows


def judge(spoiled: Spoiled) -> str | None:
    """What is wrong with a call; None if nothing is."""
    result, error = attempt(spoiled.call, spoiled.args)
    if error is not None:
        return complaint_about(error, (*spoiled.call.args, *spoiled.call.others))
    if spoiled.clean is None:
        on_meta = all(tensor.is_meta for tensor in tensors_in(result))  # a call of one tensor runs without data
        return None if on_meta else "accepted"
    wanted, error = attempt(spoiled.call, spoiled.clean)
    if error is not None:
        return f"accepted, but a clean copy raises {type(error).__name__}: {error}"
    uses_torch = spoiled.backend == "reference" or spoiled.call.name.startswith(("MoE", "Router"))
    return None if are_equal(result, wanted, exact=not uses_torch) else "differs from a clean copy"


def attempt(call: Call, args: dict[str, Any]) -> tuple[Any, Exception | None]:
    try:
        return call.function(**args), None
    except Exception as error:
        return None, error


def complaint_about(error: Exception, names: Sequence[str]) -> str | None:
    """What is wrong with an error; None if it is a ValueError or TypeError with the name of an argument."""
    if type(error) in (ValueError, TypeError):
        argument = re.match(r"\w+", str(error))
        if argument is not None and argument[0] in names and "expected" in str(error):
            return None
    return f"raises {type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"


def tensors_in(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, np.ndarray):
        yield torch.from_numpy(result)
    elif isinstance(result, (tuple, list)):
        for item in result:
            yield from tensors_in(item)


def are_equal(got: Any, wanted: Any, exact: bool) -> bool:
    """Bit for bit but for NaNs; nearly, where torch's products take part, whose sums depend on strides."""
    pairs = list(zip(tensors_in(got), tensors_in(wanted), strict=False))
    return all(_is_equal(a, b, exact) for a, b in pairs)


def _is_equal(a: Tensor, b: Tensor, exact: bool) -> bool:
    if a.shape != b.shape or a.dtype is not b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    a, b = a.detach().double(), b.detach().double()
    if exact:
        return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    if not (a.isfinite().all() and b.isfinite().all()):
        return True  # sums in another order may overflow elsewhere
    scale = float(b.abs().max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=2**-6, atol=2**-6 * scale)


def check(seed: int, number: int) -> str | None:
    """Runs a call; returns its title and what is wrong with it, or None."""
    spoiled = draw(seed, number)
    torch.set_num_threads(spoiled.num_threads)
    if spoiled.backend != "reference":
        switchgear.set_cpu_isa(spoiled.backend)
    with switchgear.use_backend("reference" if spoiled.backend == "reference" else "native"):
        fault = judge(spoiled)
    return None if fault is None else f"{spoiled.title} {fault}"


FUZZER = children.Fuzzer(__file__, "calls", lambda seed, number: draw(seed, number).title, check)

if __name__ == "__main__":
    sys.exit(children.main(FUZZER, __doc__))
