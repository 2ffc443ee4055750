# SPDX-License-Identifier: BSD-3-Clause
"""Mistakes in the order of reads, copies and kernels on a GPU. test_staging.py must detect each."""

from __future__ import annotations

from functools import partial

import planting
from planting import Mistake

MISTAKES = (
    Mistake("pool.py", "kernels do not wait for the copy",
            "            self.device.compute().wait_event(read.copied)\n", "            pass\n"),
    Mistake("pool.py", "kernels wait for a copy that is queued last",
            "read.copied is not None and not read.is_unwanted", "not self.begun"),
    Mistake("pool.py", "a copy does not wait for the kernels of the row",
            "            copies.wait_event(last)\n", "            pass\n"),
    Mistake("pool.py", "kernels wait for the row, copies do not",
            "            copies.wait_event(last)\n", "            self.device.compute().wait_event(last)\n"),
    Mistake("pool.py", "the last use of a row is that of the copies",
            "self.last_use[row] = self.device.compute().record_event()",
            "self.last_use[row] = self.device.copies.record_event()"),
    Mistake("pool.py", "the first use of a row counts as the last",
            "self.last_use[row] = self.device.compute().record_event()",
            "self.last_use.setdefault(row, self.device.compute().record_event())"),
    Mistake("pool.py", "the event is recorded before the copy",
            """        self.device.copy(self.arena[read.row, :nbytes], self.buffers[read.buffer, :nbytes])
        read.copied = self.copying[read.buffer] = copies.record_event()
""",
            """        read.copied = self.copying[read.buffer] = copies.record_event()
        self.device.copy(self.arena[read.row, :nbytes], self.buffers[read.buffer, :nbytes])
"""),
    Mistake("pool.py", "the event is recorded on the stream of kernels",
            "self.copying[read.buffer] = copies.record_event()",
            "self.copying[read.buffer] = self.device.compute().record_event()"),
    Mistake("pool.py", "a buffer is free before its copy is done", " | self.copying.keys()", ""),
    Mistake("pool.py", "a buffer is free once its copy is queued", "            if event.query():\n",
            "            if True:\n"),
    Mistake("pool.py", "a buffer is free while it is read into",
            "{self.reads[ticket].buffer for ticket in self.begun} | self", "self"),
    Mistake("pool.py", "a needed read takes a buffer that is copied",
            "                next(iter(self.copying.values())).synchronize()\n",
            "                self.copying.clear()\n"),
    Mistake("pool.py", "the memory's last user may still write",
            "        device.copies.wait_event(device.compute().record_event())\n", ""),
    Mistake("pool.py", "a read that goes on is dropped",
            "(ticket in self.begun and self.reader.cancel(self.begun[ticket]))", "ticket in self.begun"),
    Mistake("pool.py", "a read of guesses takes all buffers",
            "is_guess and guesses >= len(self.buffers) // 2", "False"),
    Mistake("pool.py", "guesses go first", "not self.reads[t].is_urgent))", "self.reads[t].is_urgent))"),
    Mistake("pool.py", "a row is free without its last use", "            self.staging.release(row)\n",
            "            pass\n"),
    Mistake("cache.py", "experts leave before their wave is queued",
            """            yield Wave(experts[at], experts[end - 1], at == 0 and end == len(experts))
            for expert in experts[at:end]:
                if first + expert in passing:
                    self.cache.release(first + expert)
""",
            """            for expert in experts[at:end]:
                if first + expert in passing:
                    self.cache.release(first + expert)
            yield Wave(experts[at], experts[end - 1], at == 0 and end == len(experts))
"""),
    Mistake("cache.py", "slots are uploaded after the wave",
            """            self._upload()
            yield Wave(experts[at], experts[end - 1], at == 0 and end == len(experts))
""",
            """            yield Wave(experts[at], experts[end - 1], at == 0 and end == len(experts))
            self._upload()
"""),
    Mistake("cache.py", "slots of guesses are not uploaded",
            "        self._is_stale = True\n        reads",
            "        self._is_stale |= is_urgent\n        reads"),
    Mistake("cache.py", "planes of experts with other bits are not uploaded",
            "for table, source in self._tables:", "for table, source in self._tables[-1:]:"),
    Mistake("cache.py", "another stream does not wait for the last one",
            "            stream.wait_event(self.stream.record_event())\n", "            pass\n"),
    Mistake("cache.py", "the last stream is that of the first call", "        self.stream = stream\n", ""),
    Mistake("hot_cold.py", "kernels do not wait for experts",
            "        device.compute().wait_event(device.copies.record_event())\n", ""),
    Mistake("hot_cold.py", "experts are copied to memory that is in use",
            "        device.copies.wait_event(device.compute().record_event())", "        pass"),
    Mistake("hot_cold.py", "a buffer is filled before its copy is done", "            event.synchronize()\n",
            "            pass\n"),
    Mistake("hot_cold.py", "the event of a buffer is recorded before its copy",
            """        self.device.copy(to, buffer)
        self._copying[number] = self.device.copies.record_event()
""",
            """        self._copying[number] = self.device.copies.record_event()
        self.device.copy(to, buffer)
"""),
    Mistake("hot_cold.py", "the host reads rows before they are there",
            "    event.synchronize()\n    return y", "    return y"),
)  # fmt: skip

planted = partial(planting.planted, "switchgear.offload")
