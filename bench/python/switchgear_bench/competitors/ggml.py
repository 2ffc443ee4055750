# SPDX-License-Identifier: BSD-3-Clause
"""ggml, the library of llama.cpp, through its C interface: the graph that llama.cpp builds for a layer of experts.

Its shared libraries are loaded from the folder `ggml/lib` of SWITCHGEAR_COMPETITORS, else from llama-cpp-python.
Activations are float32, which ggml rounds itself. Sizes are in ggml's order, the contiguous dimension first.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..case import Case, Inputs, Layer
from .quantised import ggml_mxfp4, published
from .registry import Skip, competitor, folder

# Fixed by the file format GGUF.
TYPES = {"f32": 0, "q4_0": 2, "q8_0": 8, "q4_K": 12, "i32": 26, "bf16": 30, "mxfp4": 39}
REPACKED_ROWS = 8  # rows that the fastest kernels interleave
CONTEXT_BYTES = 1 << 20  # the descriptions of tensors and of the graph; their data is stored elsewhere


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _Library:
    """Functions of ggml by name, without the prefix. Pointers are c_void_p, plain integers are int64_t or size_t."""

    def __init__(self) -> None:
        places = [place / "ggml" / "lib" for place in (folder(),) if place]
        spec = importlib.util.find_spec("llama_cpp")
        places += [Path(place) / "lib" for place in (spec and spec.submodule_search_locations) or ()]
        place = next((place for place in places if (place / "libggml-cpu.so").exists()), None)
        if place is None:
            raise Skip("ggml is not installed")
        names = ("libggml-base.so", "libggml-cpu.so")
        self._libraries = [ctypes.CDLL(str(place / name), ctypes.RTLD_GLOBAL) for name in names]

    def __call__(self, name: str, *arguments: Any, result: Any = None) -> Any:
        function = next(
            getattr(library, f"ggml_{name}") for library in self._libraries if hasattr(library, f"ggml_{name}")
        )
        function.restype = result
        return function(*(c_int64(value) if isinstance(value, int) else value for value in arguments))

    def pointer(self, name: str, *arguments: Any) -> c_void_p:
        return c_void_p(self(name, *arguments, result=c_void_p))


def _repacking(ggml: _Library, backend: c_void_p) -> c_void_p:
    """The buffer type that stores weights in the order of the fastest kernels."""
    device = ggml.pointer("backend_get_device", backend)
    registry = ggml.pointer("backend_dev_backend_reg", device)
    address = ggml("backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts", result=c_void_p)
    if address:
        types = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(device)
        index = 0
        while types[index]:
            if b"REPACK" in ggml("backend_buft_name", c_void_p(types[index]), result=c_char_p):
                return c_void_p(types[index])
            index += 1
    raise Skip("ggml has no repacked layouts on this machine")


def _sources(case: Case, type_name: str) -> list[Tensor]:
    """gate_up_proj and down_proj [E,N,…]; for mxfp4 the same bytes in ggml's order."""
    return [ggml_mxfp4(*pair) for pair in published(case)] if type_name == "mxfp4" else case.weights


def _in_type(ggml: _Library, weight: Tensor, type_name: str) -> Tensor:
    """weight [E,N,C] in a format of ggml, as bytes."""
    if type_name in ("f32", "bf16", "mxfp4"):
        return weight.contiguous()
    num_experts, rows, columns = weight.shape
    number = c_int(TYPES[type_name])
    size = rows * ggml("row_size", number, columns, result=c_size_t)
    target = torch.empty(num_experts, size, dtype=torch.uint8)
    ggml("quantize_init", number)  # fills tables before threads use them

    def quantize(expert: int) -> None:
        source = weight[expert].float().contiguous()
        data, out = (c_void_p(tensor.data_ptr()) for tensor in (source, target[expert]))
        ggml("quantize_chunk", number, data, out, 0, rows, columns, None, result=c_size_t)

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        list(threads.map(quantize, range(num_experts)))
    return target


def _layer(case: Case, type_name: str, repack: bool = False) -> Layer:
    ggml, shape = _Library(), case.shape
    hidden, inner, top_k, tokens = shape.hidden_size, shape.intermediate_size, shape.top_k, case.tokens
    if repack and (hidden % REPACKED_ROWS or inner % REPACKED_ROWS):
        raise Skip(f"repacked layouts need sizes that are multiples of {REPACKED_ROWS}")
    backend = ggml.pointer("backend_cpu_init")
    ggml("backend_cpu_set_n_threads", backend, c_int(torch.get_num_threads()))
    parameters = _InitParams(CONTEXT_BYTES, None, True)

    def tensor(context: c_void_p, type_name: str, *sizes: int) -> c_void_p:
        return ggml.pointer(f"new_tensor_{len(sizes)}d", context, c_int(TYPES[type_name]), *sizes)

    stored = ggml.pointer("init", parameters)
    gate, up = (tensor(stored, type_name, hidden, inner, shape.num_experts) for _ in range(2))
    down = tensor(stored, type_name, inner, hidden, shape.num_experts)
    place = _repacking(ggml, backend) if repack else ggml.pointer("backend_cpu_buffer_type")
    buffer = ggml.pointer("backend_alloc_ctx_tensors_from_buft", stored, place)
    if not buffer:
        raise Skip("ggml finds no memory for the weights")
    gate_up_proj, down_proj = _sources(case, type_name)
    sources = (gate_up_proj[:, :inner], gate_up_proj[:, inner:], down_proj)
    for target, source in zip((gate, up, down), sources, strict=True):
        data = _in_type(ggml, source, type_name)
        ggml("backend_tensor_set", target, c_void_p(data.data_ptr()), 0, data.nbytes)
    base, size = (ggml(f"backend_buffer_get_{name}", buffer, result=c_size_t) for name in ("base", "size"))
    case.on_its_pages(torch.frombuffer((ctypes.c_uint8 * size).from_address(base), dtype=torch.uint8))

    context = ggml.pointer("init", parameters)
    x = tensor(context, "f32", hidden, tokens)
    ids = tensor(context, "i32", top_k, tokens)
    weights = tensor(context, "f32", 1, top_k, tokens)
    for given in (x, ids, weights):
        ggml("set_input", given)
    rows = ggml.pointer("reshape_3d", context, x, hidden, 1, tokens)
    gates, ups = (ggml.pointer("mul_mat_id", context, weight, rows, ids) for weight in (gate, up))
    a = ggml.pointer("swiglu_split", context, gates, ups)
    y = ggml.pointer(
        "mul", context, ggml.pointer("mul_mat_id", context, down, a, ids), weights
    )  # [tokens][top_k][hidden]
    graph = ggml.pointer("new_graph", context)
    total = None
    for choice in range(top_k):
        part = ggml.pointer("view_2d", context, y, hidden, tokens, 4 * hidden * top_k, 4 * hidden * choice)
        ggml("build_forward_expand", graph, part)
        total = ggml.pointer("add", context, total, part) if total else part
        ggml("build_forward_expand", graph, total)
    if top_k == 1:
        total = ggml.pointer("cont", context, total)
    ggml("set_output", total)
    ggml("build_forward_expand", graph, total)
    allocator = ggml.pointer("gallocr_new", ggml.pointer("backend_cpu_buffer_type"))
    if not ggml("gallocr_alloc_graph", allocator, graph, result=c_bool):
        raise Skip("ggml finds no memory for its graph")

    def layer(inputs: Inputs) -> Tensor:
        given = ((x, inputs.x.float()), (ids, inputs.topk_ids), (weights, inputs.topk_weights))
        for target, source in given:
            ggml("backend_tensor_set", target, c_void_p(source.data_ptr()), 0, source.nbytes)
        status = ggml("backend_graph_compute", backend, graph, result=c_int)
        if status != 0:
            raise RuntimeError(f"ggml: the graph ended with status {status}")
        result = torch.empty(tokens, hidden)
        ggml("backend_tensor_get", total, c_void_p(result.data_ptr()), 0, result.nbytes)
        return result

    return layer


def _register(name: str, dtype: str, type_name: str, repack: bool, about: str) -> None:
    def make(case: Case) -> Layer:
        return _layer(case, type_name, repack)

    make.__doc__ = f"{about}, of ggml (mul_mat_id); float32 activations."
    register: Callable[[Callable[[Case], Layer]], object] = competitor(
        name, dtypes=(dtype,), modes=("forward",), default=False
    )
    register(make)


_register("ggml_bf16", "bf16", "bf16", False, "bfloat16 weights")
_register("ggml_f32", "fp32", "f32", False, "float32 weights")
_register("ggml_q8_0", "int8", "q8_0", False, "8-bit weights, a scale for 32")
_register("ggml_q4_0", "int4", "q4_0", False, "4-bit weights, a scale for 32")
_register("ggml_q4_K", "int4", "q4_K", False, "4-bit weights with offsets, 6-bit scales of 32 in blocks of 256")
_register("ggml_q4_0_repacked", "int4", "q4_0", True, "q4_0 with rows interleaved")
_register("ggml_q4_K_repacked", "int4", "q4_K", True, "q4_K with rows interleaved")
_register("ggml_mxfp4", "mxfp4", "mxfp4", False, "the same mxfp4 bytes, activations rounded to int8")
_register("ggml_mxfp4_repacked", "mxfp4", "mxfp4", True, "mxfp4 with rows interleaved")
