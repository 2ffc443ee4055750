# SPDX-License-Identifier: BSD-3-Clause
"""The native reader of records, as Python sees it; tests/cpp/test_reader.cpp has priorities and injected faults."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from errors import raises
from switchgear import _C

SIZE = 5 << 20


@pytest.fixture
def record(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    data = torch.randint(0, 256, (SIZE,), dtype=torch.uint8)
    path = tmp_path / "records"
    path.write_bytes(data.numpy().tobytes())
    return path, data


def aligned(nbytes: int) -> torch.Tensor:
    whole = torch.zeros(nbytes + 4096, dtype=torch.uint8)
    first = -whole.data_ptr() % 4096
    return whole[first : first + nbytes]


def sum_of(data: torch.Tensor) -> int:
    return _C.checksum(data.data_ptr(), data.numel())


def python_sum(words: list[int], nbytes: int) -> int:
    """Independent of the native one: csrc/reader.cpp."""
    step, total = 0x9E3779B97F4A7C15, 0
    for index, word in [*enumerate(words), (None, nbytes)]:
        key = 0x2545F4914F6CDD1D if index is None else (index + 1) * step
        keyed = (word + key) % 2**64
        total += (keyed & 0xFFFFFFFF) * (keyed >> 32) + keyed
    return total % 2**64


def test_the_checksum_is_the_documented_sum() -> None:
    data = torch.randint(0, 256, (8 * 37,), dtype=torch.uint8)
    words = [int.from_bytes(bytes(data[i : i + 8].tolist()), "little") for i in range(0, len(data), 8)]
    assert sum_of(data) == python_sum(words, len(data))
    odd = data[: 8 * 36 + 3]
    words[-1] &= 0xFFFFFF
    assert sum_of(odd) == python_sum(words, len(odd))


@pytest.mark.parametrize("direct", [True, False])
def test_reads_a_record(record: tuple[Path, torch.Tensor], direct: bool) -> None:
    path, data = record
    reader = _C.Reader([str(path)], threads=2, direct=direct, chunk=1 << 20)
    memory = aligned(SIZE)
    ticket = reader.submit((0, 0, SIZE, sum_of(data)), memory.data_ptr())
    reader.wait(ticket, 30)
    assert torch.equal(memory, data)
    assert reader.statistics()[:2] == (SIZE, 1)
    assert reader.statistics()[2] > 0
    assert not (reader.is_direct(0) and not direct)
    unaligned = (0, 1, 1000, sum_of(data[1:1001].clone()))
    reader.wait(reader.submit(unaligned, memory.data_ptr() + 3, urgent=False), 30)
    assert torch.equal(memory[3:1003], data[1:1001])
    reader.close()
    reader.close()


def error_of(reader: _C.Reader, ticket: int) -> _C.ReadError:
    with pytest.raises(_C.ReadError) as caught:
        reader.wait(ticket, 30)
    return caught.value


def test_errors_name_the_record(record: tuple[Path, torch.Tensor]) -> None:
    path, data = record
    reader = _C.Reader([str(path)], threads=2)
    memory = aligned(2 * SIZE)
    good = sum_of(data[: 1 << 20])
    short = error_of(reader, reader.submit((0, 1 << 20, SIZE, None), memory.data_ptr()))
    assert (short.kind, short.file, short.offset, short.nbytes) == ("short", str(path), 1 << 20, SIZE)
    assert isinstance(short, OSError)
    assert f"ends at {SIZE}" in str(short)
    wrong = error_of(reader, reader.submit((0, 0, 1 << 20, good ^ 1), memory.data_ptr()))
    assert wrong.kind == "checksum"
    reader.wait(reader.submit((0, 0, 1 << 20, good), memory.data_ptr()), 30)
    with open(path, "r+b") as file:
        file.write(b"changed")
    os.utime(path, ns=(1, 1))
    assert error_of(reader, reader.submit((0, 0, 1 << 20, good), memory.data_ptr())).kind == "replaced"


def test_a_record_that_moved_or_changed_is_found(record: tuple[Path, torch.Tensor]) -> None:
    path, data = record
    before = sum_of(data)
    for change in ("bit", "page of zeros", "swapped pages", "swapped words", "rotated"):
        changed = data.clone()
        if change == "bit":
            changed[123_457] ^= 4
        elif change == "page of zeros":
            changed[8192:12288] = 0
        elif change == "swapped pages":
            changed[:4096], changed[4096:8192] = data[4096:8192], data[:4096]
        elif change == "swapped words":
            changed[:8], changed[8:16] = data[8:16], data[:8]
        else:
            changed = data.roll(512)
        path.write_bytes(changed.numpy().tobytes())
        reader = _C.Reader([str(path)])
        memory = aligned(SIZE)
        assert error_of(reader, reader.submit((0, 0, SIZE, before), memory.data_ptr())).kind == "checksum", change


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux")
def test_an_error_of_the_system_has_its_number(record: tuple[Path, torch.Tensor]) -> None:
    reader = _C.Reader(["/proc/self/mem", str(record[0])])
    memory = aligned(1 << 20)
    failing = reader.submit((0, 0, 4096, None), memory.data_ptr())  # no memory at 0: EIO
    good = reader.submit((1, 0, 4096, sum_of(record[1][:4096])), memory.data_ptr() + 8192)
    error = error_of(reader, failing)
    assert error.kind == "system"
    assert error.errno == errno.EIO
    reader.wait(good, 30)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("none", "fifo", "."):
        with pytest.raises(_C.ReadError) as caught:
            _C.Reader([str(tmp_path / name)])
        assert caught.value.kind == "open"
        assert caught.value.file == str(tmp_path / name)


def busy_reader(path: Path) -> tuple[_C.Reader, torch.Tensor, int]:
    """A reader with seconds of work, all into the same memory, and the last ticket."""
    size = 64 << 20
    with open(path, "wb") as file:
        file.truncate(size)
    memory = aligned(size)
    reader = _C.Reader([str(path)], threads=1)
    tickets = [reader.submit((0, 0, size, 0), memory.data_ptr()) for _ in range(1000)]
    return reader, memory, tickets[-1]


def test_a_wait_ends_in_time_and_close_cancels(tmp_path: Path) -> None:
    reader, memory, last = busy_reader(tmp_path / "sparse")
    begin = time.monotonic()
    with raises(TimeoutError):
        reader.wait(last, 0.12)
    assert 0.1 < time.monotonic() - begin < 5
    assert not reader.is_done(last)
    waited: list[Exception] = []

    def wait() -> None:
        try:
            reader.wait(last, 60)
        except OSError as error:
            waited.append(error)

    threads = [threading.Thread(target=wait) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    reader.close()
    for thread in threads:
        thread.join()
    assert [error.kind for error in waited if isinstance(error, _C.ReadError)] == ["closed", "closed"]
    with raises(_C.ReadError):
        reader.submit((0, 0, 4096, None), memory.data_ptr())


def test_cancel_and_promote(tmp_path: Path) -> None:
    reader, memory, last = busy_reader(tmp_path / "sparse")
    guessed = reader.submit((0, 0, 4096, None), memory.data_ptr(), urgent=False)
    reader.promote(guessed)
    assert reader.cancel(guessed)
    assert reader.cancel(last)
    with raises(ValueError):
        reader.wait(last, 1)
    del reader  # ends its threads


@pytest.mark.usefixtures("interruptible")
def test_a_signal_interrupts_a_wait(tmp_path: Path) -> None:
    reader, _memory, last = busy_reader(tmp_path / "sparse")
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        reader.wait(last, 60)
    assert time.monotonic() - begin < 5
    reader.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_refused(record: tuple[Path, torch.Tensor]) -> None:
    script = """
        import os, sys
        from switchgear import _C
        reader = _C.Reader([sys.argv[1]])
        child = os.fork()
        if child == 0:
            try:
                reader.is_done(1)
            except _C.ReadError as error:
                code = 0 if error.kind == "process" and "belongs to process" in str(error) else 2
                del reader
                os._exit(code)
            os._exit(1)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(record[0])], timeout=60, check=False)
    assert done.returncode == 0


def test_bad_arguments(record: tuple[Path, torch.Tensor]) -> None:
    path = str(record[0])
    for arguments, name in (({"threads": 0}, "threads"), ({"chunk": 1000}, "chunk")):
        with raises(ValueError, name):
            _C.Reader([path], **arguments)
    with raises(ValueError):
        _C.Reader([])
    reader = _C.Reader([path])
    memory = aligned(4096)
    for request, name in (
        (((1, 0, 4096, None), memory.data_ptr()), "file"),
        (((0, -1, 4096, None), memory.data_ptr()), "offset"),
        (((0, 0, 0, None), memory.data_ptr()), "nbytes"),
        (((0, 0, 4096, None), 0), "address"),
    ):
        with raises(ValueError, name):
            reader.submit(*request)
    with raises(ValueError):
        reader.wait(1, -1)
    with raises(ValueError):
        reader.wait(1, float("nan"))
    with raises(ValueError):
        reader.is_done(1)
