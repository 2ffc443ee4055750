# SPDX-License-Identifier: BSD-3-Clause
"""Calls the public functions and modules with hostile arguments:

    python tests/fuzz/hostile_calls.py --calls 100000 --seed 0

Each call draws a function, an argument, a defect and an instruction set (or the reference). It must raise ValueError or
TypeError that names an argument, or return what it returns for a clean copy of the argument. It must not crash or hang.
Call number i depends on the seed and i alone, so `--first i --calls 1` repeats it. Calls run in child processes; a new
one continues after a crash.
"""

from __future__ import annotations

import argparse
import collections
import mmap
import random
import re
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
LIMIT = 20.0  # seconds for a call


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


# ---- many calls, in child processes ----------------------------------------------------------------------------------


def child(seed: int, numbers: range, progress: Path) -> None:
    """Runs calls; writes the number of the current one to a file, and faults to the standard output."""
    warnings.simplefilter("ignore")
    with progress.open("r+b") as file, mmap.mmap(file.fileno(), 8) as shared:
        for number in numbers:
            struct.pack_into("q", shared, 0, number)
            fault = check(seed, number)
            if fault is not None:
                print(f"{number} {fault}".replace("\n", " "), flush=True)
        struct.pack_into("q", shared, 0, -2)


class Child:
    """A child process over a range of calls. It is restarted after a call that ends it."""

    def __init__(self, seed: int, numbers: range, folder: Path) -> None:
        self.seed, self.numbers, self.faults = seed, numbers, list[str]()
        self.progress = folder / f"progress {numbers.start}"
        self.output = folder / f"output {numbers.start}"
        self.start()

    def start(self) -> None:
        self.progress.write_bytes(struct.pack("q", -1))
        numbers = [str(number) for number in (self.numbers.start, self.numbers.stop, self.numbers.step)]
        command = [sys.executable, __file__, "--seed", str(self.seed), "--child", *numbers, str(self.progress)]
        with self.output.open("a") as out:
            self.process = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        self.current, self.since = -1, time.monotonic()

    def is_done(self) -> bool:
        """Looks at the process; ends and restarts it if needed."""
        (current,) = struct.unpack("q", self.progress.read_bytes())
        if current != self.current:
            self.current, self.since = current, time.monotonic()
        ended = self.process.poll()
        limit = LIMIT if self.current >= 0 else 300  # the import may be slow
        if ended is None and time.monotonic() - self.since < limit:
            return False
        if self.current == -2 and ended == 0:
            return True
        if ended is None:
            self.process.kill()
            self.process.wait()
        if self.current == -1:
            raise RuntimeError(f"the child process does not start: exit status {ended}")
        what = f"hangs for {LIMIT:.0f} s" if ended is None else f"ends the process: status {ended}"
        self.faults.append(f"{self.current} {draw(self.seed, self.current).title} {what}")
        self.numbers = range(self.current + self.numbers.step, self.numbers.stop, self.numbers.step)
        if not self.numbers:
            return True
        self.start()
        return False


def run(calls: int, seed: int, jobs: int, first: int = 0) -> list[str]:
    """The faults of some calls, each as a line."""
    with tempfile.TemporaryDirectory() as folder:
        children = [Child(seed, range(first + job, first + calls, jobs), Path(folder)) for job in range(jobs)]
        try:
            while sum(one.is_done() for one in children) < jobs:
                time.sleep(0.05)
        finally:
            for one in children:
                if one.process.poll() is None:
                    one.process.kill()
        written = [line for one in children for line in one.output.read_text().splitlines()]
        return sorted(
            written + [fault for one in children for fault in one.faults], key=lambda line: int(line.split()[0])
        )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        child(args.seed, range(*map(int, args.child[:3])), Path(args.child[3]))
        return 0
    start = time.monotonic()
    faults = run(args.calls, args.seed, args.jobs, args.first)
    kinds = collections.Counter(re.sub(r"\d+", "#", fault.partition(" ")[2]) for fault in faults)
    shown = set()
    for fault in faults:
        kind = re.sub(r"\d+", "#", fault.partition(" ")[2])
        if kind not in shown:
            print(f"{kinds[kind]} x, first: {fault}")
            shown.add(kind)
    print(f"{args.calls} calls, {len(faults)} faults, {time.monotonic() - start:.0f} s")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
