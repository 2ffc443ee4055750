# SPDX-License-Identifier: BSD-3-Clause
"""Models of transformers out of GGUF files, whose weights stay in the mapped files, and GGUF files of models.

A model is built on meta, and each parameter is replaced by its tensor of the file. gguf_architectures.py has the table
of what is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from switchgear.checks import checked
from switchgear.files import AnyPath
from switchgear.integrations.gguf_architectures import (
    ARCHITECTURE,
    ARCHITECTURES,
    EMBEDDING,
    FACTORS,
    HEAD,
    LATENT_HEADS,
    OWN,
    VECTOR,
    Architecture,
    Split,
    build_error,
    choose_architecture,
    find_architecture,
    find_factors,
    find_layout,
    find_name,
    name_experts,
    name_module,
    name_parameter,
    read_config,
    read_key,
    reorder_heads,
    take_part,
    write_config,
)
from switchgear.integrations.gguf_file import PLAIN, DeferredTensor, GgufFile, GgufTensor, Value, read_gguf, write_gguf
from switchgear.integrations.transformers import accelerate
from switchgear.reference import gguf
from switchgear.weights.adapted import has_adapters
from switchgear.weights.form import FORMS, Layout, embedding_layout_of, layout_of, linear_layout_of
from switchgear.weights.gguf import encode_rows, gguf_weight
from switchgear.weights.module import (
    FLOATS,
    Kind,
    Projection,
    StoredProjections,
    Tie,
    check_before_load,
    put,
    stored_of,
)
from switchgear.weights.weight import Weight

__all__ = ["ARCHITECTURES", "Architecture", "FileExperts", "load_gguf", "load_without_experts", "save_gguf"]

FLOAT_TYPES = ("f32", "f16", "bf16", "f64")

# ---- reading ---------------------------------------------------------------------------------------------------------


@checked
def load_gguf(path: AnyPath, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Loads a model of transformers from a GGUF file. Experts, linear layers and embeddings in a type of
    `weights` (q4_k, q8_0, …) stay in the mapped file, and are multiplied as they are there.

        model = switchgear.load_gguf("olmoe-q4_k_m.gguf")

    It runs as after `accelerate(model)`; call that again with whole_layers=True for more. The file must stay as it is
    while the model lives. Copied are: tensors of plain types, rows of q and k in architectures that reorder them, gates
    and ups whose tensors are in different files of a split one or in the other order. Experts whose gates and ups have
    different types, or of which a tensor is plain, are decoded.

    Args:
        path: the file, of a split model any of its files.
        dtype: of activations and of plain parameters.

    Raises:
        ValueError: it is no GGUF file, not a whole one, its architecture is not in `ARCHITECTURES`, a key or a tensor
            is missing, or of another type or shape than the others tell, or unknown. The message names it.
            OSError: a file cannot be read.
    """
    model, experts = load_without_experts(path, dtype)
    for each in experts:
        parameters = [each.module.get_parameter(own) for own in each.layout.names]
        found = each.read()
        if isinstance(found[0], Weight):
            _put(each.module, each.layout, parameters, found)
            continue
        for own, parameter, plain in zip(each.layout.names, parameters, found, strict=True):
            each.module.register_parameter(own, nn.Parameter(plain, parameter.requires_grad))
    check_before_load(model)
    return model


class FileExperts(NamedTuple):
    """Experts of a file. read: returns both projections, as weights in blocks or with the parameters' shapes. release:
    frees the pages of the file that were read."""

    path: str  # in the model
    module: nn.Module
    layout: Layout
    read: Callable[[], Sequence[Any]]
    release: Callable[[], None]


def load_without_experts(path: AnyPath, dtype: torch.dtype) -> tuple[PreTrainedModel, list[FileExperts]]:
    """`load_gguf`, but for experts, which stay on meta; and what reads them."""
    if dtype not in FLOATS:
        raise ValueError(f"dtype: expected a floating dtype of at least 16 bits, got {dtype}")
    file = read_gguf(path)
    name = read_key(file, ARCHITECTURE, str)
    known = find_architecture(file, name)
    model = _build(file, name, known, dtype)
    return model, _Loading(file, model, known, dtype).run()


def _build(file: GgufFile, name: str, known: Architecture, dtype: torch.dtype) -> PreTrainedModel:
    """The model on meta, with its experts on switchgear."""
    fields = read_config(file, name, known)
    if (table := file.tensors.get(EMBEDDING)) is None:
        raise build_error(file, f"tensor {EMBEDDING!r}", "one", "none")
    is_tied = HEAD not in file.tensors and table.type not in gguf.TYPES
    try:
        config = AutoConfig.for_model(
            known.model_type, vocab_size=table.shape[0], tie_word_embeddings=is_tied, **fields
        )
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    except (ArithmeticError, RuntimeError, TypeError, ValueError, LookupError) as error:
        raise build_error(file, f"keys {name}.*", "sizes of a model", error) from error
    model.name_or_path = str(file.path)
    accelerate(model)
    made: PreTrainedModel = model.eval()
    return made


_AT_ONCE = 1 << 24  # bytes of a file that are copied or decoded before their pages are freed


class _Loading:
    """Puts the tensors of a file into a model on meta, all but those of experts."""

    def __init__(self, file: GgufFile, model: Any, known: Architecture, dtype: torch.dtype) -> None:
        self._file, self._model, self._known, self._dtype = file, model, known, dtype
        self._left = {each: tensor for each, tensor in file.tensors.items() if self._is_of_the_model(each)}

    def _is_of_the_model(self, name: str) -> bool:
        """Not of the layers that follow the model's own."""
        if name == FACTORS and self._model.config.rope_parameters["rope_type"] == "llama3":
            return False  # the config has them
        layer = name.split(".")[1] if name.startswith("blk.") else ""
        return not layer.isdecimal() or int(layer) < self._model.config.num_hidden_layers

    def run(self) -> list[FileExperts]:
        experts = []
        modules = dict(self._model.named_modules())
        for path, module in modules.items():
            is_expert = layout_of(module) is not None or (name_module(path, self._known) or "").endswith("exps")
            if is_expert and (layout := find_layout(module, self._known)) is not None:
                experts.append(self._find_experts(path, module, layout))
                continue
            for own, parameter in list(module.named_parameters(recurse=False)):
                name = name_parameter(path, own, self._known) or f"{path}.{own}"
                self._load(name, module, own, parameter)
            for own, buffer in list(module.named_buffers(recurse=False)):
                if (name_of_buffer := find_name(f"{path}.{own}", OWN)) is not None:
                    data = _decode(self._take(name_of_buffer, buffer.shape))
                    setattr(module, own, data.to(buffer.dtype, copy=True))
        if self._left:
            raise self._error(min(self._left), f"none in a model of {self._known.model_type}", "one")
        for path, module in modules.items():
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):  # made of the config alone
                self._model.set_submodule(path, type(module)(self._model.config))
        check_before_load(self._model)
        return experts

    def _error(self, name: str, expected: str, got: object) -> ValueError:
        return build_error(self._file, f"tensor {name!r}", expected, got)

    def _take(self, name: str, shape: Sequence[int]) -> GgufTensor:
        tensor = self._left.pop(name, None)
        if tensor is None and name == HEAD:
            tensor = self._file.tensors[EMBEDDING]
        if tensor is None:
            raise self._error(name, "one", "none")
        if tensor.type not in gguf.TYPES and tensor.type not in FLOAT_TYPES:
            raise self._error(name, f"a type of {', '.join((*FLOAT_TYPES, *gguf.TYPES))}", tensor.type)
        wanted = tuple(shape[1:] if name.endswith(VECTOR) and len(tensor.shape) == 1 else shape)
        if tensor.shape != wanted:
            raise self._error(name, f"shape {list(wanted)}", list(tensor.shape))
        return tensor

    def _load(self, name: str, module: nn.Module, own: str, parameter: nn.Parameter) -> None:
        if name == HEAD and HEAD not in self._left and self._model.config.tie_word_embeddings:
            module.register_parameter(own, self._model.get_input_embeddings().weight)
            return
        split = self._known.splits.get(name.split(".")[-2])
        if split is not None and name not in self._left:
            shapes = [part.shape for part in split.split(parameter, self._model.config)]
            names = [name.replace(name.split(".")[-2], each) for each in split.names]
            data = split.join(
                [_decode(self._take(*each)) for each in zip(names, shapes, strict=True)], self._model.config
            )
            module.register_parameter(own, nn.Parameter(data.to(parameter.dtype), parameter.requires_grad))
            return
        tensor = self._take(name, parameter.shape)
        data = tensor.data
        if self._known.has_interleaved_rope and len(tensor.shape) <= 2 and name.startswith("blk."):
            data = reorder_heads(name, data, self._model.config, is_back=True)
            if data is not tensor.data:
                self._file.release(tensor.data)
        layout = linear_layout_of(module) or embedding_layout_of(module)
        if tensor.type in gguf.TYPES and layout is not None and own == "weight":
            _put(module, layout, [parameter], [self._weigh(tensor, data[None, None])])
            return
        module.register_parameter(own, self._plain(tensor.type, data, parameter))

    def _plain(self, type: str, data: Tensor, like: nn.Parameter) -> nn.Parameter:
        plain = torch.empty(like.shape, dtype=like.dtype)
        self._fill(plain if data.dim() > 1 else plain.view(-1), type, data)
        return nn.Parameter(plain, like.requires_grad)

    def _fill(self, out: Tensor, type: str, data: Tensor) -> None:
        """Copies numbers or matrices, a few at a time: pages of the file are memory, too."""
        count = max(1, _AT_ONCE // data[0].nbytes)
        for some, source in zip(torch.split(out, count), torch.split(data, count), strict=True):
            some.copy_(gguf.decode(type, source) if type in gguf.TYPES else source)
            self._file.release(source)

    def _weigh(self, tensor: GgufTensor, data: Tensor) -> Weight:
        return gguf_weight(tensor.type, data, tensor.shape[-1], self._dtype)

    def _find_experts(self, path: str, module: nn.Module, layout: Layout) -> FileExperts:
        name = name_module(path, self._known) or path
        parameters = [module.get_parameter(own) for own in layout.names]
        experts, rows, columns = layout.view(parameters[0]).shape
        names, half = name_experts(name), (experts, rows // 2, columns)
        gates, ups, down = map(self._take, names, (half, half, layout.view(parameters[1]).shape))
        self._load_biases(name, module, layout, (half[:2], half[:2], tuple(down.shape[:2])))
        shapes = [parameter.shape for parameter in parameters]
        read = partial(self._read_experts, layout, shapes, gates, ups, down)
        return FileExperts(path, module, layout, read, partial(self._release, gates, ups, down))

    def _release(self, *tensors: GgufTensor) -> None:
        for tensor in tensors:
            self._file.release(tensor.data)

    def _read_experts(
        self, layout: Layout, shapes: Sequence[torch.Size], gates: GgufTensor, ups: GgufTensor, down: GgufTensor
    ) -> Sequence[Any]:
        types = {gates.type, ups.type, down.type}
        if types <= gguf.TYPES.keys() and gates.type == ups.type:
            pairs = gates.data, ups.data
            data = _side_by_side(*pairs) if layout.split_gates else _join(*pairs, layout)[:, None]
            if data.data_ptr() != gates.data.data_ptr():
                self._release(gates, ups)
            return self._weigh(gates, data), self._weigh(down, down.data[:, None])
        found = [torch.empty(shape, dtype=self._dtype) for shape in shapes]
        for plain, tensors in zip(found, ((gates, ups), (down,)), strict=True):
            for index, tensor in enumerate(tensors):
                part = take_part(layout.view(plain), len(tensors), layout.split_gates, index)
                self._fill(part, tensor.type, tensor.data)
        return found

    def _load_biases(self, name: str, module: nn.Module, layout: Layout, shapes: Sequence[Sequence[int]]) -> None:
        first, second = (module._parameters.get(f"{own}_bias") for own in layout.names)
        if first is None or second is None:
            return
        gates, ups, down = map(self._take, name_experts(name, "bias"), shapes)
        both = _join(_decode(gates), _decode(ups), layout)
        for own, data, parameter in zip(layout.names, (both, _decode(down)), (first, second), strict=True):
            module.register_parameter(f"{own}_bias", self._plain("f32", data, parameter))


def _put(module: nn.Module, layout: Layout, parameters: Sequence[nn.Parameter], weights: Sequence[Weight]) -> None:
    kinds = zip(weights, parameters, strict=True)
    projections = tuple(Projection(Kind.of(weight), p.requires_grad, Tie()) for weight, p in kinds)
    put(module, StoredProjections(FORMS[weights[0].format](), layout, projections), tuple(weights))


def _decode(tensor: GgufTensor) -> Tensor:
    return gguf.decode(tensor.type, tensor.data) if tensor.type in gguf.TYPES else tensor.data


def _join(gates: Tensor, ups: Tensor, layout: Layout) -> Tensor:
    """[E,I,...] twice as [E,2I,...]: gates first, or alternating."""
    return torch.cat((gates, ups), 1) if layout.split_gates else torch.stack((gates, ups), 2).flatten(1, 2)


def _side_by_side(gates: Tensor, ups: Tensor) -> Tensor:
    """[E,N,B] twice as [E,2,N,B]: a view if both are in one memory, gates first; else a copy."""
    apart = ups.storage_offset() - gates.storage_offset()
    if gates.untyped_storage().data_ptr() != ups.untyped_storage().data_ptr() or apart < 0:
        return torch.stack((gates, ups), 1)
    experts, rows, length = gates.shape
    return gates.as_strided((experts, 2, rows, length), (rows * length, apart, length, 1))


# ---- writing ---------------------------------------------------------------------------------------------------------

RECIPES = {"q3_k_m": ("q3_k", "q5_k"), "q4_k_m": ("q4_k", "q6_k"), "q5_k_m": ("q5_k", "q6_k")}
"""Types of most matrices, and of the head, and of values and second projections in half of the layers."""
_NARROW = {"q2_k": "q4_0", "q3_k": "q4_0", "iq4_xs": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


@checked
def save_gguf(model: nn.Module, path: AnyPath, type: str | None = None, *, like: AnyPath | None = None) -> None:
    """Writes a model of transformers as a GGUF file, which replaces `path` when it is whole.

    Weights stored in a GGUF type keep their bytes. Other matrices are encoded as `type` says; norms and routers are
    float32. Columns that are no multiple of a type's block take a type of 32 columns that is no smaller, or f16.

    Args:
        model: of an architecture in `ARCHITECTURES`.
        type: f32, f16, bf16, a type of `weights`, or a mixture (`RECIPES`) such as "q4_k_m". None: the types of
            `like`, or q8_0 without it.
        like: a GGUF file whose metadata, with its vocabulary, and order of tensors the new one gets; sizes are those of
            the model. What was loaded from it and is unchanged has the same bytes. None: there is no vocabulary.

    Raises:
        ValueError: the architecture or type is unknown, `like` is of another, the model has adapters, experts on disk,
            or parameters that the format has no name for. OSError: a file cannot be read or written.
    """
    names = (*FLOAT_TYPES[:3], *gguf.TYPES, *RECIPES)
    if type is not None and type not in names:
        raise ValueError(f"type: expected one of {', '.join(names)}, got {type!r}")
    write_gguf(path, *describe_model(model, type, like))


def describe_model(
    model: Any, type: str | None, like: AnyPath | None = None
) -> tuple[dict[str, Value], dict[str, DeferredTensor]]:
    """The metadata and tensors that `save_gguf` writes."""
    name, known = choose_architecture(model)
    source = None if like is None else read_gguf(like)
    if source is not None and source.get(ARCHITECTURE) != name:
        raise ValueError(f"like: expected a file of {name}, got {source.get(ARCHITECTURE)!r}")
    metadata = write_config(model.config, name, known, source)
    old = {} if source is None else source.tensors
    choose = _chooser(type, old, model.config.num_hidden_layers)
    order = {each: index for index, each in enumerate(old)}
    tensors = sorted(_list_tensors(model, known, choose, old), key=lambda item: order.get(item[0], len(order)))
    return metadata, dict(tensors)


def _chooser(type: str | None, like: Mapping[str, GgufTensor], layers: int) -> Callable[[str, Sequence[int]], str]:
    """The type of a tensor by name and shape."""
    small, large = RECIPES.get(type or "q8_0", (type or "q8_0",) * 2)

    def choose(name: str, shape: Sequence[int]) -> str:
        if type is None and name in like and _fits(like[name].type, shape[-1]):
            return like[name].type
        if len(shape) == 1 or "ffn_gate_inp" in name or name.endswith(".bias"):
            return "f32"
        chosen = small
        if name == HEAD:
            chosen = large
        elif name.split(".")[-2] in LATENT_HEADS["attn_kv_b"].names and small not in FLOAT_TYPES:
            chosen = "q8_0"
        elif "attn_v" in name or "ffn_down" in name:
            layer, eighth = int(name.split(".")[1]), layers // 8
            chosen = large if layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2 else small
        if not _fits(chosen, shape[-1]):
            chosen = _NARROW.get(chosen, "f16")
        return chosen if _fits(chosen, shape[-1]) else "f16"

    return choose


def _fits(type: str, columns: int) -> bool:
    return type in FLOAT_TYPES or (type in gguf.TYPES and not columns % gguf.TYPES[type].columns)


def _list_tensors(
    model: Any, known: Architecture, choose: Callable[[str, Sequence[int]], str], like: Mapping[str, GgufTensor]
) -> Iterator[tuple[str, DeferredTensor]]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if (rope := model.config.rope_parameters).get("rope_type") == "llama3":
        factors = find_factors(rope, model.config.head_dim)
        yield FACTORS, _defer(FACTORS, _Part(tuple(factors.shape), None, lambda: factors), choose)
    for path, module in model.named_modules():
        if has_adapters(module):
            raise ValueError(f"model.{path}: expected no adapters; merge them first")
        stored, name = stored_of(module), name_module(path, known)
        if stored is not None and not stored.is_in_memory:
            raise ValueError(f"model.{path}: expected weights in memory, got {stored.form}; {stored.form.remedy}")
        owned: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
        owned |= {own: b for own, b in module.named_buffers(recurse=False) if find_name(f"{path}.{own}", OWN)}
        if stored is None and not owned:
            continue
        names = {own: name_parameter(path, own, known) for own in owned}
        if (name is None and stored is not None) or None in names.values():
            raise ValueError(f"model.{path}: expected a module of {known.model_type}, got {module.__class__.__name__}")
        layout = find_layout(module, known)
        if name is not None and name.endswith("exps"):
            if layout is None:
                raise ValueError(f"model.{path}: expected experts on switchgear; call accelerate(model) first")
            weights: Any = stored.weights(module) if stored else [layout.view(owned[own]) for own in layout.names]
            biases = [owned[f"{own}_bias"] for own in layout.names if f"{own}_bias" in owned]
            for own, pair in (("weight", weights), ("bias", biases)):
                if pair:
                    parts = [*_split(pair[0], 2, layout.split_gates), *_split(pair[1], 1)]
                    for each, part in zip(name_experts(name, own), parts, strict=True):
                        yield each, _defer(each, part, choose)
            continue
        if module is head and HEAD not in like and is_same(head, embedding):
            continue
        own_parts = {own: _Part(tuple(p.shape), None, p.detach) for own, p in owned.items()}
        if stored is not None:
            own_parts["weight"] = _split(stored.weights(module)[0], 1)[0].first()
        for own, part in own_parts.items():
            each = names.get(own) or f"{name}.{own}"
            split = known.splits.get(each.split(".")[-2])
            if split is not None and each not in like:
                for stem, piece in zip(split.names, _split_rows(part, split, model.config), strict=True):
                    tensor = each.replace(each.split(".")[-2], stem)
                    yield tensor, _defer(tensor, piece, choose)
                continue
            if known.has_interleaved_rope and each.startswith("blk."):
                part = part._replace(read=partial(_read_in_order, each, part.read, model.config))
            yield each, _defer(each, part.first() if each.endswith(VECTOR) else part, choose)


def _read_in_order(name: str, read: Callable[[], Tensor], config: Any) -> Tensor:
    return reorder_heads(name, read(), config, is_back=False)


def is_same(head: nn.Module, embedding: nn.Module) -> bool:
    """Whether a head and an embedding have one weight."""
    ours, theirs = stored_of(head), stored_of(embedding)
    if ours is None or theirs is None:
        return head._parameters.get("weight") is embedding._parameters.get("weight") is not None
    one, other = ours.weights(head)[0], theirs.weights(embedding)[0]
    return one.format == other.format and torch.equal(one.data, other.data)


class _Part(NamedTuple):
    """A tensor of a file, in the model. read: returns its numbers [*shape], or rows in blocks of the type `kind`."""

    shape: tuple[int, ...]
    kind: str | None
    read: Callable[[], Tensor]

    def first(self) -> _Part:
        """The first matrix or row of it."""
        return _Part(self.shape[1:], self.kind, lambda: self.read()[0])


def _split(weight: Tensor | Weight, parts: int, is_apart: bool = True) -> list[_Part]:
    """The parts of the rows of a weight [E,N,C], or of a bias [E,N], each [E,N/parts,…]. is_apart: the rows of a part
    are together; else they alternate with those of the others."""
    experts, rows, *columns = weight.shape
    kind = weight.format if isinstance(weight, Weight) and weight.format in gguf.TYPES else None
    read = partial(_read_part, weight, parts, is_apart)
    return [_Part((experts, rows // parts, *columns), kind, partial(read, index)) for index in range(parts)]


def _read_part(weight: Tensor | Weight, parts: int, is_apart: bool, index: int) -> Tensor:
    if isinstance(weight, Weight) and weight.format in gguf.TYPES:
        if is_apart and parts == weight.parts:
            part = weight.data[:, index]
        else:
            part = take_part(weight.data.flatten(1, 2), parts, is_apart, index)
        return part if weight.slots is None else part[weight.slots.long()]
    plain = weight.plain() if isinstance(weight, Weight) else weight.detach()
    return take_part(plain, parts, is_apart, index)


def _split_rows(part: _Part, split: Split, config: Any) -> list[_Part]:
    """The tensors of a matrix that files have as several, decoded."""
    shapes = [piece.shape for piece in split.split(torch.empty(part.shape, device="meta"), config)]
    read = partial(_read_piece, part, split, config)
    return [_Part(tuple(shape), None, partial(read, index)) for index, shape in enumerate(shapes)]


def _read_piece(part: _Part, split: Split, config: Any, index: int) -> Tensor:
    rows = part.read() if part.kind is None else gguf.decode(part.kind, part.read())
    return split.split(rows, config)[index]


def _defer(name: str, part: _Part, choose: Callable[[str, Sequence[int]], str]) -> DeferredTensor:
    kind = part.kind or choose(name, part.shape)
    return DeferredTensor(kind, part.shape, partial(_encode, name, part, kind))


def _encode(name: str, part: _Part, kind: str) -> Tensor:
    data = part.read().cpu()
    if part.kind is not None:
        return data
    if kind in FLOAT_TYPES:
        return data.to(PLAIN[kind][1])
    return encode_rows(kind, data, name)
