# SPDX-License-Identifier: BSD-3-Clause
"""No op reads or writes beside its operands. Each operand ends right before a page without access, then begins right
after one (guarded.py), and the results have the bits that they have in ordinary memory. `make sanitize KIND=python`
runs this under the address sanitizer."""

from __future__ import annotations

import faulthandler
import functools
import itertools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from guarded import SIDES, Guards, Region, strides_of
from native_calls import GLU, OPS, arguments, function_of, native_arguments, outputs_of, poison, sizes_of, spec_of
from problems import DTYPES, counts
from torch import Tensor

from backends_in_use import QUANTIZED_ISAS
from fuzz.forged_arrays import Forged
from switchgear import _C, reference
from switchgear.reference import formats, gguf
from switchgear.weights import Fp8, Groups, Int4, Int8, Mxfp4, Nf4, Nvfp4, Panels, Weight
from switchgear.weights.exact import compacted
from switchgear.weights.gguf import gguf_weight

on_every_isa = pytest.mark.parametrize("isa", QUANTIZED_ISAS, indirect=True)


class NativeCall(NamedTuple):
    """_C.<op>(*args). `layouts` has those of tensors that need not be contiguous, by id."""

    op: str
    args: Sequence[Any]
    outputs: list[Tensor]
    layouts: dict[int, str]

    def changed(self, change: Callable[[Tensor], Tensor]) -> NativeCall:
        """The call with other tensors."""
        changes: dict[int, Tensor] = {}

        def put(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                items = [put(item) for item in value]
                return tuple(items) if isinstance(value, tuple) else items
            if not isinstance(value, Tensor):
                return value
            changes[id(value)] = change(value)
            return changes[id(value)]

        args = [put(value) for value in self.args]
        return NativeCall(self.op, args, [changes[id(output)] for output in self.outputs], {})

    def run(self) -> list[Tensor]:
        getattr(_C, self.op)(*self.args)
        return self.outputs


def check_guarded(call: NativeCall, guards: Guards, side: str, columns: bool, gap: int) -> None:
    def place(tensor: Tensor) -> Tensor:
        layout = call.layouts.get(id(tensor), "contiguous")
        if layout == "matrices":
            layout = "columns" if columns else "rows"
        return guards.place(tensor, side, layout, gap)

    wanted = call.changed(torch.clone).run()
    guarded = call.changed(place)
    with guards.closed():
        guarded.run()
    for a, b in zip(guarded.outputs, wanted, strict=True):
        assert torch.equal(bytes_of(a), bytes_of(b)), call.op


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


# ---- every op --------------------------------------------------------------------------------------------------------


def random_sizes(rng: np.random.Generator) -> dict[str, int]:
    """Sizes around those of vectors, panels and tiles; no tokens; more rows per expert than a tile has."""
    tokens = int(rng.choice([0, 1, 2, 3, 7, 16, 17, 40]))
    experts = int(rng.choice([1, 2, 3, 8, 9, 17]))
    widths = [1, 2, 3, 5, 7, 8, 15, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 127, 128, 130]
    hidden_size, intermediate_size = (int(rng.choice(widths)) for _ in range(2))
    top_k = min(experts, int(rng.integers(1, 5)))
    return sizes_of(tokens, top_k, experts, hidden_size, intermediate_size)


def op_call(op: str, sizes: dict[str, int], dtype: torch.dtype, num_threads: int) -> NativeCall:
    args = arguments(op, sizes, dtype)
    layouts = {id(args[name]): spec_of(op, name).layout for name in OPS[op].tensors}
    outputs = [args[name] for name in outputs_of(op)]
    return NativeCall(function_of(op), native_arguments(op, args | {"num_threads": num_threads}), outputs, layouts)


@on_every_isa
@counts(ci=10, full=200)
def test_every_op(isa: str, count: int) -> None:
    rng, guards = np.random.default_rng(3), Guards()
    for op in OPS:
        for index in range(count * len(SIDES)):
            call = op_call(op, random_sizes(rng), DTYPES[rng.integers(3)], int(rng.integers(1, 3)))
            check_guarded(call, guards, SIDES[index % 2], bool(rng.integers(2)), int(rng.choice([0, 0, 1, 9])))


def test_no_op_is_missing() -> None:
    """Every native function that takes arrays is in the table of calls or below."""
    helpers = {"read", "pack_compact", "expand_compact", "encode_weight"}
    helpers |= {"attention_block", "decoder_layers"}  # they call ops of the table
    without_reading = {
        "advise_huge_pages",
        "collapse_into_huge_pages",
        "interleave_pages",
        "check_capsule",
        "simulate_loop",
    }
    signatures = {name: str(getattr(_C, name).__doc__) for name in dir(_C) if callable(getattr(_C, name))}
    takes_arrays = {name for name, text in signatures.items() if f"{name}(" in text and "object" in text}
    assert takes_arrays - without_reading == set(map(function_of, OPS)) | helpers


# ---- every form of a weight ------------------------------------------------------------------------------------------


def blocks_like(name: str, w: Tensor, parts: int) -> Weight:
    shape = len(w), parts, w.shape[1] // parts, gguf.row_bytes(name, w.shape[2])
    return gguf_weight(name, torch.randint(0, 60, shape, dtype=torch.uint8), w.shape[2], w.dtype)


FORMS: dict[str, Callable[[Tensor, int], Weight | str]] = {
    "plain": lambda w, parts: Weight("plain", w, *w.shape[1:], w.dtype),
    "panels": lambda w, parts: Panels().encode("weight", w, parts),
    "compact": lambda w, parts: compacted(w),
    "int8": lambda w, parts: Int8().encode("weight", w, parts),
    "int4": lambda w, parts: Int4(group_size=16).encode("weight", w, parts),
    "int4 with zeros": lambda w, parts: Int4(group_size=32, symmetric=False).encode("weight", w, parts),
    "fp8": lambda w, parts: Fp8().encode("weight", w, parts),
    "fp8 by row": lambda w, parts: Fp8(block="row").encode("weight", w, parts),
    "mxfp4": lambda w, parts: Mxfp4().encode("weight", w, parts),
    "nf4": lambda w, parts: Nf4().encode("weight", w, parts),
    "nvfp4": lambda w, parts: Nvfp4().encode("weight", w, parts),
    "groups": lambda w, parts: Groups(bits=3, group_size=32).encode("weight", w, parts),
    "groups with zeros": lambda w, parts: Groups(bits=2, group_size=0, symmetric=False).encode("weight", w, parts),
    **{name: functools.partial(blocks_like, name) for name in gguf.TYPES},
}


def stored(form: str, shape: tuple[int, int, int], dtype: torch.dtype, parts: int, with_slots: bool) -> Weight:
    weight = FORMS[form]((torch.randn(shape) / 8).to(dtype), parts)
    assert isinstance(weight, Weight)
    if with_slots:
        order = torch.randperm(shape[0])
        return weight.permuted(order)
    return weight


def form_calls(form: str, rng: np.random.Generator, dtype: torch.dtype) -> Iterator[NativeCall]:
    """A layer, a product with the weight, and with its transpose."""
    sizes = random_sizes(rng)
    E, N, H, I = (sizes[letter] for letter in "ENHI")  # noqa: E741
    if form in gguf.TYPES:
        H, I, N = 256, 512, 1024  # noqa: E741
    elif form == "panels":
        H, I = 64 * int(rng.integers(1, 3)), 64  # noqa: E741
        N = 2 * I
    with_slots, num_threads = bool(rng.integers(2)), int(rng.integers(1, 3))
    first, second = stored(form, (E, N, H), dtype, 2, with_slots), stored(form, (E, H, I), dtype, 1, with_slots)
    layouts = {id(w.data): "matrices" if form == "plain" else "experts" for w in (first, second)}
    for w in (first, second):
        layouts |= {id(field): "experts" for field in (w.scales, w.row_scales, w.zeros) if field is not None}
        if "groups" in form:  # planes of an expert are consecutive
            del layouts[id(w.data)]

    def rows(count: int, width: int, out: bool = False) -> Tensor:
        tensor = torch.randn(count, width).to(dtype)
        layouts[id(tensor)] = "rows"
        return poison(tensor) if out else tensor

    topk_ids = torch.randint(-1, E, (sizes["T"], sizes["K"]), dtype=torch.int32)
    x, y, h = rows(sizes["T"], H), rows(sizes["T"], H, True), rows(sizes["S"], N, True)
    biases, weights = (rows(E, N), rows(E, H)), torch.rand(topk_ids.shape)
    weights_in = first.tensors, first.form, second.tensors, second.form
    layer = tuple(reference.Layer(*weights_in, *biases, topk_ids, weights, *GLU.values()))
    yield NativeCall("moe_forward", ((x,), layer, (y, h), num_threads), [y, h], layouts)
    offsets, tokens, _ = reference.plan(topk_ids, E)
    out = rows(sizes["S"], N, True)
    product = (x, first.tensors, first.form, biases[0], offsets, tokens), (False, False), (out,), num_threads
    yield NativeCall("grouped_gemm", product, [out], layouts)
    transposed = form not in ("plain", "panels", "compact")
    grad, grad_x = rows(sizes["S"], N), rows(sizes["S"], H, True)
    if transposed:
        product = (grad, first.tensors, first.form, None, offsets, None), (True, False), (grad_x,), num_threads
        yield NativeCall("grouped_gemm", product, [grad_x], layouts)


@on_every_isa
@pytest.mark.parametrize("form", FORMS)
@counts(ci=10, full=200)
def test_every_form(isa: str, form: str, count: int) -> None:
    rng, guards = np.random.default_rng(4), Guards()
    for index in range(count * len(SIDES)):
        dtype = DTYPES[rng.integers(2 if form == "compact" else 3)]
        for call in form_calls(form, rng, dtype):
            check_guarded(call, guards, SIDES[index % 2], bool(rng.integers(2)), int(rng.choice([0, 1, 9])))


@on_every_isa
@counts(ci=10, full=200)
def test_matrices_of_their_own(isa: str, count: int) -> None:
    """A list of matrices [N_e,C], some of them without rows."""
    rng, guards = np.random.default_rng(5), Guards()
    for index in range(count * len(SIDES)):
        sizes, dtype = random_sizes(rng), DTYPES[rng.integers(3)]
        topk_ids = torch.randint(-1, sizes["E"], (sizes["T"], sizes["K"]), dtype=torch.int32)
        offsets, tokens, _ = reference.plan(topk_ids, sizes["E"])
        heights = rng.integers(0, 40, sizes["E"]).tolist()
        heights[-1] = 33
        matrices = [torch.randn(height, sizes["H"]).to(dtype) for height in heights]
        x = torch.randn(sizes["T"], sizes["H"]).to(dtype)
        out = poison(torch.empty(sizes["S"], max(heights), dtype=dtype))
        layouts = {id(x): "rows", id(out): "rows"}
        arguments = (x, matrices, (), None, offsets, tokens), (False, False), (out,), 1
        call = NativeCall("grouped_gemm", arguments, [out], layouts)
        check_guarded(call, guards, SIDES[index % 2], False, int(rng.choice([0, 1, 9])))


@on_every_isa
def test_helpers(isa: str) -> None:
    """Packing, expanding and reading, of rows with and without exceptions."""
    guards = Guards()
    for side in SIDES:
        for width in (1, 3, 31, 32, 33, 64, 100, 513):
            for dtype in (torch.bfloat16, torch.float32):
                weight = torch.randn(2, 3, width).to(dtype)
                weight[0, 0, ::7] = 2.0**-60  # exceptions
                compact = compacted(weight)
                elements = weight.to(compact.elements)
                out = poison(torch.empty_like(compact.data))
                check_guarded(NativeCall("pack_compact", [elements, out, 1], [out], {}), guards, side, False, 0)
                plain = poison(torch.empty_like(elements))
                call = NativeCall("expand_compact", [compact.data, plain, 1], [plain], {})
                check_guarded(call, guards, side, False, 0)
                check_guarded(NativeCall("read", [[weight, compact.data], 1], [], {}), guards, side, False, 0)


@on_every_isa
@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("plain", "panels", "compact")])
def test_encoding_keeps_to_its_arrays(isa: str, form: str) -> None:
    guards = Guards()
    for side, (rows, columns) in itertools.product(
        SIDES, ((6, 256), (40, 512)) if form in gguf.TYPES else ((6, 70), (34, 31))
    ):
        for dtype in DTYPES:
            like = FORMS[form](torch.ones(1, rows, columns, dtype=dtype), 2)
            assert isinstance(like, Weight)
            numbers = torch.randn(rows, columns).to(dtype)
            outputs = [poison(t) for t in like.tensors if t is not like.records]
            tensors = [*outputs] if like.records is None else [*outputs, like.records]
            scale_rows = 1 if "row" in form else 128
            call = NativeCall(
                "encode_weight", [numbers, tensors, like.form, scale_rows, 1], outputs, {id(numbers): "rows"}
            )
            check_guarded(call, guards, side, False, 5)


def test_no_format_is_missing() -> None:
    assert {form.partition(" ")[0] for form in FORMS} == set(formats.FORMATS)


# ---- the guards themselves -------------------------------------------------------------------------------------------


def ends_the_process(function: Callable[[], object]) -> bool:
    """A child of a process with threads may wait forever for a lock that one of them held, so it is tried again."""
    for _ in range(5):
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(10)
            faulthandler.disable()
            os.close(2)  # where a sanitizer would report
            function()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM):
            return status != 0
    raise AssertionError("expected the child to end, it was stopped five times after 10 s")


@on_every_isa
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["h", "a"])
def test_one_element_too_far(isa: str, side: str, name: str) -> None:
    """A tensor that claims one element more than it has, which an op then reads or writes."""

    def glu(shift: int) -> None:
        tensors = {"h": torch.zeros(3, 34), "a": torch.zeros(3, 17)}
        placed = Region().place(tensors[name], strides_of(tensors[name].shape, "contiguous", 0), side)
        tensors[name] = Forged(tuple(placed.shape), data=placed.data_ptr() + 4 * shift)
        _C.glu((tensors["h"],), tuple(GLU.values()), (tensors["a"],), 1)

    assert not ends_the_process(lambda: glu(0))
    assert ends_the_process(lambda: glu(1 if side == "after" else -1))
