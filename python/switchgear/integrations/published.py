# SPDX-License-Identifier: BSD-3-Clause
"""Loads published checkpoints with mxfp4 experts (gpt-oss), fp8 experts in blocks of 128 x 128 (DeepSeek-V3,
Qwen3-MoE) or 64 x 128, nf4 experts (bitsandbytes, one matrix per expert) or experts of 2 to 4 bits (GPTQ, AWQ,
compressed-tensors), and linear layers likewise. Weights are not rounded again, and no plain copy of the model is made
in memory.

    model = load_published("/models/gpt-oss-20b")
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from switchgear.files import AnyPath, read_json
from switchgear.integrations import published_matrices
from switchgear.integrations.checkpoint_files import (
    BLOCKS,
    CONFIG,
    FLOATS,
    SCALES,
    CheckpointFiles,
    Checks,
    Piece,
    Pieces,
    Reader,
    matches,
    pieces_of,
)
from switchgear.integrations.modules import recognize
from switchgear.integrations.published_matrices import Matrices, matrices_of, num_groups
from switchgear.integrations.transformers import Replacement, accelerate, undo_accelerate
from switchgear.reference import groups, minifloat
from switchgear.weights import Form, Layout, Mxfp4, Weight, advise_huge_pages, layout_of
from switchgear.weights.form import linear_layout_of
from switchgear.weights.module import Kind, Projection, StoredProjections, Tie, put
from switchgear.weights.store import PLAIN_LINEARS, LinearLayers

METHODS = ("mxfp4", "fp8", *published_matrices.METHODS)  # of quantisation
Read = Callable[[Reader, torch.device], Tensor | Weight]


def load_published(
    path: AnyPath,
    model: nn.Module | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    linears: bool = True,
) -> nn.Module:
    """Loads a causal language model of transformers on switchgear, in eval mode, with its experts and linear layers as
    published.

    Files are read one expert at a time, directly into place. Peak memory is the stored model plus one tensor or 64 MiB.
    Linear layers outside of experts are stored as with `switchgear.store(…, linears=…)`. Those that it leaves plain by
    default are decoded. Everything else is cast to the dtype of its parameter, as in `from_pretrained`.
    `switchgear.restore` converts stored weights to plain ones.

    Args:
        path: a directory with config.json and safetensors files.
        model: the model to fill, made under torch.device("meta"). By default it is made from config.json.
        dtype: of a model made here.
        device: where tensors are placed.
        linears: False decodes all linear layers.

    Raises:
        ValueError: config.json names another quantisation; the model has no experts that run on the fused kernel; keys
            are missing or unexpected; shapes, dtypes or numbers differ from those expected. Everything but the numbers
            is checked before any data is read. On failure nothing is loaded.
    """
    return fill(planned(Path(path), dtype, model, is_quantized=True, linears=linears), torch.device(device))


class Planned(NamedTuple):
    """A model on meta, and how to read its tensors."""

    model: Any
    files: CheckpointFiles
    replacements: list[Replacement]
    reads: dict[str, Read]  # by name in the state dict
    forms: dict[str, Form]  # of the projections that are not plain, likewise

    def experts(self) -> list[tuple[str, Layout, tuple[int, ...]]]:
        """Name, layout, and E, N, C, N, C of the projections, of each module of experts."""
        found = []
        for name, module in self.model.named_modules():
            if (layout := layout_of(module)) is not None:
                first, second = (getattr(module, projection) for projection in layout.names)
                shapes = [tuple((p.mT if layout.transposed else p).shape) for p in (first, second)]
                found.append((name, layout, (*shapes[0], *shapes[1][1:])))
        return found


def planned(
    path: Path,
    dtype: torch.dtype | None,
    model: nn.Module | None = None,
    *,
    is_quantized: bool = False,
    needs_experts: bool = True,
    linears: bool = False,
) -> Planned:
    """Checks a checkpoint against a model, by default one made from config.json, whose experts run on the fused kernel
    then. Nothing is read but headers. dtype None: that of the config. is_quantized: others are refused. needs_experts:
    dense models are, too. linears: linear layers are read as published, not decoded."""
    files = CheckpointFiles(path)
    config = config_of(files)
    configured = take_quantization(config, is_quantized)
    if dtype is None:
        found = getattr(config, "dtype", None)
        dtype = found if isinstance(found, torch.dtype) else torch.bfloat16
    made: Any = made_on_meta(path, config, dtype) if model is None else model
    is_dense = all(recognize(module) is None for module in made.modules())
    replacements = [] if is_dense and not needs_experts else accelerate(made)
    try:
        return Planned(made, files, replacements, *plan_of(made, files, configured, linears))
    except BaseException:
        undo_accelerate(replacements)
        raise


def undo(plan: Planned) -> None:
    """Lets the experts of the model run as before."""
    undo_accelerate(plan.replacements)


def fill(plan: Planned, device: torch.device, without: Collection[str] = ()) -> nn.Module:
    """Reads the tensors into the model, all but those `without`. On failure nothing is loaded."""
    try:
        compute_buffers(plan.model, device)
        reader = Reader(plan.files.headers)
        loaded = {target: read(reader, device) for target, read in plan.reads.items() if target not in without}
    except BaseException:
        undo(plan)
        raise
    commit(plan.model, loaded, plan.forms)
    return plan.model.eval()  # type: ignore[no-any-return]


def config_of(files: CheckpointFiles) -> Any:
    """The config of the model. The layers are counted first, since transformers makes any number of them."""
    file = files.path / CONFIG
    with _naming_file(file):
        most, numbers = len(files.headers), read_json(file)
        for name, number in _numbers(numbers):
            if name.endswith(("layers", "n_layer")) and number > most:
                raise ValueError(f"{name} is {number}, but there are {most} tensors")
        return AutoConfig.from_pretrained(files.path, trust_remote_code=False)


def _numbers(entries: Any) -> Iterator[tuple[str, float]]:
    for name, entry in entries.items():
        if isinstance(entry, dict):
            yield from _numbers(entry)
        elif isinstance(entry, (int, float)):
            yield name, entry


@contextmanager
def _naming_file(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers raises many kinds for files of others
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(f"path: expected one of a model of transformers, got {file} ({reason})") from error


def take_quantization(config: Any, is_needed: bool) -> Matrices | None:
    """Removes the quantisation from the config, since it is read here; ValueError for an unsupported one. Returns how
    integers, or blocks of fp8, are published."""
    found = getattr(config, "quantization_config", None)
    if found is None and not is_needed:
        return None
    if found is None:
        raise ValueError("path: expected a quantization_config in config.json, got none")
    options = found if isinstance(found, dict) else getattr(found, "to_dict", dict)()
    method = options.get("quant_method")
    if method not in METHODS:  # it may be no string
        raise ValueError(f"path: expected quant_method {', '.join(METHODS)} in config.json, got {method}")
    configured = published_matrices.find_configured(options)
    del config.quantization_config
    return configured


def made_on_meta(path: Path, config: Any, dtype: torch.dtype) -> Any:
    with _naming_file(path / CONFIG), torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    if (file := path / "generation_config.json").is_file():
        with _naming_file(file):
            model.generation_config = GenerationConfig.from_pretrained(path)
    return model


# ---- what is read ----------------------------------------------------------------------------------------------------


class Wanted(NamedTuple):
    """A projection of an experts module."""

    experts: int
    rows: int  # N
    columns: int  # C
    parts: int
    transposed: bool  # the parameter is [E,C,N]
    dtype: torch.dtype


def plan_of(
    model: Any, files: CheckpointFiles, configured: Matrices | None, linears: bool = False
) -> tuple[dict[str, Read], dict[str, Form]]:
    """How to read each tensor of the model, and the forms of projections that are not plain, by names in the state
    dict."""
    state, projections, checks = model.state_dict(), _projections(model), Checks(files.headers)
    layers = _linear_weights(model) if linears else {}
    plan: dict[str, Read] = {}
    forms: dict[str, Form] = {}
    keys = [key for key in files.headers if key in state or not key.endswith(published_matrices.IGNORED)]
    found = pieces_of(model, keys, state, published_matrices.SUFFIXES)
    for target, pieces in found.items():
        kind = matrices_of(pieces, configured)
        if target in projections and set(pieces) != {Piece()}:
            plan[target] = _plan_projection(target, projections[target], pieces, checks, kind)
            if kind is not None:
                forms[target] = kind.form
            elif BLOCKS in {piece.suffix for piece in pieces}:
                forms[target] = Mxfp4()
        elif target in layers and kind is not None and {piece[1:] for piece in pieces} == {Piece()[1:]}:
            matrix = {piece._replace(expert=0): key for piece, key in pieces.items()}
            plan[target] = _plan_projection(target, layers[target], matrix, checks, kind)
            forms[target] = kind.form
        elif target in state:
            plan[target] = _plan_tensor(target, state[target], pieces, checks, kind)
        elif not matches(model._keys_to_ignore_on_load_unexpected, target):
            checks.problems += [f"unexpected {key}" for key in pieces.values()]
    for first, second in zip(list(projections)[::2], list(projections)[1::2], strict=True):
        one, other = ({piece.suffix for piece in found.get(name, {})} for name in (first, second))
        if one != other:
            checks.problems.append(f"{first} and {second.rpartition('.')[2]}: expected one format")
    tied, optional = model.all_tied_weights_keys, model._keys_to_ignore_on_load_missing
    absent = [name for name in state if name not in plan and name not in tied and not matches(optional, name)]
    checks.problems += [f"missing {name}" for name in absent]
    checks.complain(files.path)
    return plan, forms


def _projections(model: nn.Module) -> dict[str, Wanted]:
    """The projections of experts on the fused kernel, by their names in the state dict."""
    found = {}
    for prefix, module in model.named_modules():
        if (layout := layout_of(module)) is not None:
            for index, name in enumerate(layout.names):
                parameter: Tensor = getattr(module, name)
                experts, rows, columns = (parameter.mT if layout.transposed else parameter).shape
                options = (layout.parts(index), layout.transposed, parameter.dtype)
                found[f"{prefix}.{name}"] = Wanted(experts, rows, columns, *options)
    return found


def _linear_weights(model: nn.Module) -> dict[str, Wanted]:
    """The weights of linear layers that can be stored, outside of experts, by their names in the state dict."""
    experts = tuple(f"{name}." for name, module in model.named_modules() if recognize(module) is not None)
    found = {}
    for path, module in LinearLayers(PLAIN_LINEARS).find(model):
        if not path.startswith(experts):
            weight: Any = module.weight
            rows, columns = weight.shape
            found[f"{path}.weight"] = Wanted(1, rows, columns, 1, False, weight.dtype)
    return found


def _plan_tensor(target: str, like: Tensor, pieces: Pieces, checks: Checks, kind: Matrices | None) -> Read:
    """Reads it as it is, or decodes the matrix that it is."""
    shape, dtype = tuple(like.shape), like.dtype
    if (joined := len({piece[1:] for piece in pieces})) > 1:
        reason = "transformers joins them, here only those of experts with a stored layout are"
        checks.problems.append(f"{target}: expected one tensor, got {joined} ({reason})")
        return _nothing
    if kind is not None and len(shape) == 2:
        kind.check(target, pieces, Piece(), shape, checks)

        def decode(reader: Reader, device: torch.device) -> Tensor:
            with _naming(target):
                published = kind.read(reader, pieces, Piece(), (shape[0], shape[1]))
                return kind.decode(*(tensor[None].to(device) for tensor in published))[0].to(dtype)

        return decode
    if not checks.expect_all(target, pieces, [Piece()]):
        return _nothing
    weight = pieces[Piece()]
    checks.expect(weight, shape, FLOATS if dtype.is_floating_point else None)
    return lambda reader, device: reader.tensor(weight).to(device=device, dtype=dtype, copy=True)


def _nothing(reader: Reader, device: torch.device) -> Tensor:
    """A placeholder for a tensor that fails the checks."""
    raise AssertionError("a tensor that failed the checks is never read")


def _plan_projection(target: str, wanted: Wanted, pieces: Pieces, checks: Checks, kind: Matrices | None) -> Read:
    """Reads it as published: mxfp4 of all experts, or other formats or plain numbers of each."""
    experts, rows, columns, parts, transposed, _ = wanted
    if {piece.suffix for piece in pieces} & {BLOCKS, SCALES}:
        if checks.expect_all(target, pieces, [Piece(BLOCKS), Piece(SCALES)]):
            checks.expect(pieces[Piece(BLOCKS)], (experts, rows, -(-columns // 32), 16), ("U8",))
            checks.expect(pieces[Piece(SCALES)], (experts, rows, -(-columns // 32)), ("U8",))
        return partial(_read_mxfp4, target, wanted, pieces)
    if experts * parts > len(pieces):
        checks.problems.append(f"{target}: expected {experts} experts, got {len(pieces)} tensors")
        return _nothing
    if transposed:
        checks.problems.append(f"{target}: expected weights of all experts in one tensor, since they are transposed")
    shape = rows // parts, columns  # gates and ups are published separately, and are stored so
    matrices = dict.fromkeys(Piece("", *of) for of in itertools.product(range(experts), range(parts)))
    if kind is None:
        if checks.expect_all(target, pieces, list(matrices)):
            for key in pieces.values():
                checks.expect(key, shape, FLOATS)
        return partial(_read_plain, wanted, pieces)
    checks.problems += [
        f"unexpected {key}" for piece, key in pieces.items() if piece._replace(suffix="") not in matrices
    ]
    for piece in matrices:
        kind.check(target, pieces, piece, shape, checks)
    return partial(_read_matrices if kind.packing is None else _read_packed, target, wanted, pieces, kind)


# ---- projections -----------------------------------------------------------------------------------------------------


def _read_mxfp4(target: str, wanted: Wanted, pieces: Pieces, reader: Reader, device: torch.device) -> Weight:
    data, scales = _empty("mxfp4", wanted, device)
    for expert in range(wanted.experts):
        block, scale = (reader.part(pieces[Piece(suffix)], expert).to(device) for suffix in (BLOCKS, SCALES))
        out = data[expert, None], scales[expert, None]
        with _naming(target, expert):
            minifloat.to_blocks(block, scale, "mxfp4", wanted.parts, out=out)
    return _weight("mxfp4", data, scales, wanted)


def _read_each(
    target: str, wanted: Wanted, pieces: Pieces, kind: Matrices, reader: Reader, write: Callable[..., None]
) -> None:
    """write(expert, source, *tensors [1,…] as published) for each matrix."""
    for expert, source in itertools.product(range(wanted.experts), range(wanted.parts)):
        with _naming(target, expert):
            shape = wanted.rows // wanted.parts, wanted.columns
            write(expert, source, *(t[None] for t in kind.read(reader, pieces, Piece("", expert, source), shape)))


def _read_matrices(
    target: str, wanted: Wanted, pieces: Pieces, kind: Matrices, reader: Reader, device: torch.device
) -> Weight:
    format = kind.form.name
    data, scales = _empty(format, wanted, device)
    has_row_scales = minifloat.MINIFLOATS[format].row_scales
    row_scales = scales.new_empty(*data.shape[:2], minifloat.ROWS, dtype=torch.float32) if has_row_scales else None
    blocks = data.shape[1] // wanted.parts

    def write(expert: int, source: int, *published: Tensor) -> None:
        share = slice(source * blocks, (source + 1) * blocks)
        values, own, *wholes = (tensor.to(device) for tensor in published)
        out = data[expert, None, share], scales[expert, None, share]
        minifloat.to_blocks(values, own, format, group=kind.group, out=out)
        if row_scales is not None:
            row_scales[expert, share] = minifloat.to_row_scales(wholes[0], wanted.rows // wanted.parts)[0]

    _read_each(target, wanted, pieces, kind, reader, write)
    return _weight(format, data, scales, wanted, row_scales)


def _read_packed(
    target: str, wanted: Wanted, pieces: Pieces, kind: Matrices, reader: Reader, device: torch.device
) -> Weight:
    packing = kind.packing
    assert packing is not None
    bits, columns = packing.bits, wanted.columns
    blocks, steps = -(-wanted.rows // wanted.parts // minifloat.ROWS), -(-columns // minifloat.COLUMNS)
    data = torch.empty(
        wanted.experts * bits, wanted.parts * blocks, steps, groups.PLANE, dtype=torch.uint8, device=device
    )
    advise_huge_pages(data)
    sizes = wanted.experts, wanted.parts * blocks, num_groups(columns, packing), minifloat.ROWS
    scales = torch.empty(sizes, dtype=torch.float16, device=device)
    zeros = None if packing.symmetric else torch.empty(sizes, dtype=torch.uint8, device=device)
    records = data.view(wanted.experts, -1, steps, bits * groups.PLANE)

    def write(expert: int, source: int, q: Tensor, own: Tensor, its_zeros: Tensor | None = None) -> None:
        stored = groups.to_blocks(groups.Levels(q, own, its_zeros, (bits,)))
        share = slice(source * blocks, (source + 1) * blocks)
        records[expert, share] = stored.data.view(blocks, steps, -1)
        scales[expert, share] = stored.scales[0]
        if zeros is not None and stored.zeros is not None:
            zeros[expert, share] = stored.zeros[0]

    _read_each(target, wanted, pieces, kind, reader, write)
    return Weight(
        "groups", data, wanted.rows, columns, wanted.dtype, scales, zeros=zeros,
        records=groups.records_of((bits,) * wanted.experts), parts=wanted.parts, group_size=packing.group_size,
        is_exact=True,
    )  # fmt: skip


def _read_plain(wanted: Wanted, pieces: Pieces, reader: Reader, device: torch.device) -> Tensor:
    weight = torch.empty(wanted.experts, wanted.rows, wanted.columns, dtype=wanted.dtype, device=device)
    advise_huge_pages(weight)
    for (_, expert, source), key in pieces.items():
        rows = wanted.rows // wanted.parts
        weight[expert, source * rows : (source + 1) * rows] = reader.tensor(key)
    return weight


def _empty(format: str, wanted: Wanted, device: torch.device) -> tuple[Tensor, Tensor]:
    """Uninitialised data and scales of all experts."""
    kind, (blocks, *sizes) = minifloat.MINIFLOATS[format], minifloat.blocks_shape(*wanted[1:3], format, wanted.parts)
    data = torch.empty(wanted.experts, blocks, *sizes, dtype=torch.uint8, device=device)
    advise_huge_pages(data)
    count = -(-wanted.columns // (kind.group or minifloat.BLOCK[1]))
    return data, torch.empty(wanted.experts, blocks, count, minifloat.ROWS, dtype=kind.scales, device=device)


def _weight(format: str, data: Tensor, scales: Tensor, wanted: Wanted, row_scales: Tensor | None = None) -> Weight:
    return Weight(
        format, data, wanted.rows, wanted.columns, wanted.dtype, scales, row_scales, parts=wanted.parts,
        group_size=minifloat.MINIFLOATS[format].group or minifloat.BLOCK[1], is_exact=True,
    )  # fmt: skip


@contextmanager
def _naming(target: str, expert: int | None = None) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        of = target if expert is None else f"{target}, expert {expert}"
        raise ValueError(f"{of}: {error}") from None


# ---- into the model --------------------------------------------------------------------------------------------------


def compute_buffers(model: Any, device: torch.device) -> None:
    """Computes buffers that no checkpoint has, such as the rotary frequencies; the model has them on the meta device.

    When transformers initialises weights, it computes the buffers of each module that is not marked as initialised,
    and skips marked ones.
    """
    marked: Any
    buffers = []
    for marked in (*model.parameters(), *model.buffers()):
        marked._is_hf_initialized = True
    for prefix, marked in model.named_modules():
        names = [name for name in marked._non_persistent_buffers_set if marked._buffers[name] is not None]
        marked._is_hf_initialized = not names
        for name in names:
            empty = torch.empty_like(marked._buffers[name], device=device)
            marked._buffers[name] = empty.fill_(torch.nan) if empty.is_floating_point() else empty
            buffers.append((f"{prefix}.{name}", marked, name))
    model.initialize_weights()
    for key, module, name in buffers:
        if module._buffers[name].isnan().any():
            raise ValueError(f"model: expected {key} to be computed by {type(model).__name__}.initialize_weights")


def commit(model: Any, loaded: dict[str, Tensor | Weight], forms: dict[str, Form]) -> None:
    for prefix, module in model.named_modules():
        if (layout := layout_of(module) or linear_layout_of(module)) is not None:
            weights = [w for name in layout.names if isinstance(w := loaded.get(f"{prefix}.{name}"), Weight)]
            if weights:
                _put(module, forms[f"{prefix}.{layout.names[0]}"], layout, tuple(weights))
    for target, tensor in loaded.items():
        prefix, _, name = target.rpartition(".")
        module = model.get_submodule(prefix)
        if isinstance(tensor, Weight):
            continue
        if name in module._parameters:
            trained = module._parameters[name].requires_grad
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=trained))
        else:
            module._buffers[name] = tensor
    model.tie_weights()


def _put(module: nn.Module, form: Form, layout: Layout, weights: tuple[Weight, ...]) -> None:
    trained = (getattr(module, name).requires_grad for name in layout.names)
    projections = tuple(Projection(Kind.of(weight), t, Tie()) for weight, t in zip(weights, trained, strict=True))
    put(module, StoredProjections(form, layout, projections), weights)
