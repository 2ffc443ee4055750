# SPDX-License-Identifier: BSD-3-Clause
"""Models of transformers out of GGUF files, whose weights stay in the mapped files, and GGUF files of models.

ARCHITECTURES is the table of what is known: the keys of the config and the fixed values of it. Tensors have the names
of _MODULES in all of them. A model is built on meta, and each parameter is replaced by its tensor of the file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from switchgear.checks import checked
from switchgear.files import AnyPath
from switchgear.integrations.gguf_file import (
    PLAIN,
    DeferredTensor,
    GgufFile,
    GgufTensor,
    Value,
    read_gguf,
    write_gguf,
)
from switchgear.integrations.transformers import accelerate
from switchgear.reference import gguf
from switchgear.weights.adapted import has_adapters
from switchgear.weights.form import FORMS, Layout, embedding_layout_of, layout_of, linear_layout_of
from switchgear.weights.gguf import gguf_weight
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

__all__ = ["ARCHITECTURES", "Architecture", "load_gguf", "save_gguf"]

ARCHITECTURE = "general.architecture"
FLOAT_TYPES = ("f32", "f16", "bf16", "f64")
LAYERS = "model.layers."


class Architecture(NamedTuple):
    """A model in both worlds. Keys have the prefix "<name in llama.cpp>." in files."""

    model_type: str  # of transformers
    keys: Mapping[str, str]  # key -> field of the config; all are needed
    optional: Mapping[str, str] = {}  # those that a file may lack
    fixed: Mapping[str, Any] = {}  # fields of the config that no key has
    has_interleaved_rope: bool = False  # rows of q and k are in another order in files


_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "context_length": "max_position_embeddings",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
}
_ONE_WIDTH = _KEYS | {"feed_forward_length": "intermediate_size"}
_LOCAL = {**_ONE_WIDTH, "expert_count": "num_local_experts"}
_OWN_WIDTH = _KEYS | {"expert_feed_forward_length": "moe_intermediate_size"}
_ALL_SPARSE = {"decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False}

ARCHITECTURES = {
    "olmoe": Architecture("olmoe", _ONE_WIDTH, {"attention.clamp_kqv": "clip_qkv"}, {"norm_topk_prob": False}),
    "qwen2moe": Architecture(
        "qwen2_moe",
        _OWN_WIDTH | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"},
        {"feed_forward_length": "intermediate_size"},
        _ALL_SPARSE | {"norm_topk_prob": False},
    ),
    "qwen3moe": Architecture(
        "qwen3_moe",
        _OWN_WIDTH,
        {"feed_forward_length": "intermediate_size", "attention.key_length": "head_dim"},
        _ALL_SPARSE | {"norm_topk_prob": True},
    ),
    "llama": Architecture("mixtral", _LOCAL, {"rope.dimension_count": "head_dim"}, has_interleaved_rope=True),
    "granitemoe": Architecture(
        "granitemoe",
        _LOCAL,
        {
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
        has_interleaved_rope=True,
    ),
}
"""By the name in llama.cpp."""

_FLOAT_FIELDS = (
    "rms_norm_eps", "clip_qkv", "attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling",
)  # fmt: skip
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
_MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    # of a layer
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.router": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.experts": "exps",
    "block_sparse_moe.experts": "exps",
}
EMBEDDING, HEAD, VECTOR = "token_embd.weight", "output.weight", "ffn_gate_inp_shexp.weight"
_HEADS = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}


def _name_module(path: str) -> str | None:
    """The name of a module's tensors, without .weight; of experts with "exps" at the end. None if it is unknown."""
    if not path.startswith(LAYERS):
        return _MODULES.get(path)
    number, _, rest = path.removeprefix(LAYERS).partition(".")
    return None if (stem := _MODULES.get(rest)) is None else f"blk.{number}.{stem}"


def _name_experts(name: str) -> tuple[str, str, str]:
    """Gates, ups and the second projection."""
    gate, up, down = (f"{name.removesuffix('exps')}ffn_{part}_exps.weight" for part in ("gate", "up", "down"))
    return gate, up, down


def _in_order_of_files(name: str, rows: Tensor, config: Any, is_back: bool) -> Tensor:
    """Rows of q or k [N,...], each head's two halves interleaved; is_back: the inverse. Others as they are."""
    if (field := _HEADS.get(name.split(".")[-2])) is None:
        return rows
    heads = getattr(config, field)
    split = (heads, -1, 2) if is_back else (heads, 2, len(rows) // heads // 2)
    return rows.reshape(*split, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


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
    if dtype not in FLOATS:
        raise ValueError(f"dtype: expected a floating dtype of at least 16 bits, got {dtype}")
    file = read_gguf(path)
    name = _read_key(file, ARCHITECTURE, str)
    if name not in ARCHITECTURES:
        raise _error(file, f"key {ARCHITECTURE!r}", f"one of {', '.join(ARCHITECTURES)}", repr(name))
    model = _build(file, name, dtype)
    _Loading(file, model, ARCHITECTURES[name], dtype).run()
    return model


def _error(file: GgufFile, what: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{file.path}: {what}: expected {expected}, got {got}")


def _read_key(file: GgufFile, key: str, kind: type) -> Any:
    value = file.get(key)
    is_number = kind is not str and not isinstance(value, bool) and isinstance(value, (int, kind))
    if not is_number and type(value) is not kind:
        text = {int: "an integer", float: "a number", str: "a string"}[kind]
        raise _error(file, f"key {key!r}", text, "none" if value is None else file.metadata[key].type)
    if kind is int and value < 1:
        raise _error(file, f"key {key!r}", "a number from 1 on", value)
    return value


def _read_config(file: GgufFile, name: str) -> dict[str, Any]:
    known, prefix = ARCHITECTURES[name], f"{name}."
    present = {key: field for key, field in known.optional.items() if prefix + key in file.metadata}
    config: dict[str, Any] = dict(known.fixed)
    for key, field in {**known.keys, **present}.items():
        config[field] = _read_key(file, prefix + key, float if field in _FLOAT_FIELDS else int)
    if known.keys["block_count"] and (layers := config["num_hidden_layers"]) != (found := _count_layers(file)):
        raise _error(file, f"key {prefix + 'block_count'!r}", f"{found}, the layers that have tensors", layers)
    for key, field in _TOKENS.items():
        config[field] = file.get(f"tokenizer.ggml.{key}")
    return config | {"rope_parameters": _read_rope(file, prefix)}


def _count_layers(file: GgufFile) -> int:
    return len({name.split(".")[1] for name in file.tensors if name.startswith("blk.")})


def _read_rope(file: GgufFile, prefix: str) -> dict[str, Any]:
    key = f"{prefix}rope.freq_base"
    rope = {"rope_type": "default", "rope_theta": float(_read_key(file, key, float) if key in file.metadata else 1e4)}
    key = f"{prefix}rope.scaling.type"
    kind = _read_key(file, key, str) if key in file.metadata else "none"
    if kind == "none":
        return rope
    if kind not in ("linear", "yarn"):
        raise _error(file, f"key {key!r}", "none, linear or yarn", repr(kind))
    rope |= {"rope_type": kind, "factor": float(_read_key(file, f"{prefix}rope.scaling.factor", float))}
    if kind == "yarn":
        length = _read_key(file, f"{prefix}rope.scaling.original_context_length", int)
        rope["original_max_position_embeddings"] = length
    return rope


def _build(file: GgufFile, name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The model on meta, with its experts on switchgear."""
    fields = _read_config(file, name)
    if (table := file.tensors.get(EMBEDDING)) is None:
        raise _error(file, f"tensor {EMBEDDING!r}", "one", "none")
    is_tied = HEAD not in file.tensors and table.type not in gguf.TYPES
    try:
        config = AutoConfig.for_model(
            ARCHITECTURES[name].model_type, vocab_size=table.shape[0], tie_word_embeddings=is_tied, **fields
        )
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    except (ArithmeticError, RuntimeError, TypeError, ValueError, LookupError) as error:
        raise _error(file, f"keys {name}.*", "sizes of a model", error) from error
    model.name_or_path = str(file.path)
    accelerate(model)
    made: PreTrainedModel = model.eval()
    return made


_AT_ONCE = 1 << 24  # bytes of a file that are copied or decoded before their pages are freed


class _Loading:
    """Puts the tensors of a file into a model on meta."""

    def __init__(self, file: GgufFile, model: Any, known: Architecture, dtype: torch.dtype) -> None:
        self._file, self._model, self._known, self._dtype = file, model, known, dtype
        self._left = dict(file.tensors)

    def run(self) -> None:
        modules = dict(self._model.named_modules())
        for path, module in modules.items():
            name = _name_module(path) or path
            if (layout := layout_of(module)) is not None:
                self._load_experts(name, module, layout)
                continue
            for own, parameter in list(module.named_parameters(recurse=False)):
                self._load(f"{name}.{own}", module, own, parameter)
        if self._left:
            raise self._error(min(self._left), f"none in a model of {self._known.model_type}", "one")
        for path, module in modules.items():
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):  # made of the config alone
                self._model.set_submodule(path, type(module)(self._model.config))
        check_before_load(self._model)

    def _error(self, name: str, expected: str, got: object) -> ValueError:
        return _error(self._file, f"tensor {name!r}", expected, got)

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
        tensor = self._take(name, parameter.shape)
        data = tensor.data
        if self._known.has_interleaved_rope and len(tensor.shape) <= 2 and name.startswith("blk."):
            data = _in_order_of_files(name, data, self._model.config, is_back=True)
            if data is not tensor.data:
                self._file.release(tensor.data)
        layout = linear_layout_of(module) or embedding_layout_of(module)
        if tensor.type in gguf.TYPES and layout is not None and own == "weight":
            self._put(module, layout, [parameter], [self._weigh(tensor, data[None, None])])
            return
        plain = torch.empty(parameter.shape, dtype=self._dtype)
        self._fill(plain.view(tensor.shape), tensor.type, data)
        module.register_parameter(own, nn.Parameter(plain, parameter.requires_grad))

    def _fill(self, out: Tensor, type: str, data: Tensor) -> None:
        """Copies rows or matrices, a few at a time: their pages are memory, too."""
        count = max(1, _AT_ONCE // data[0].nbytes)
        for some, source in zip(out.split(count), data.split(count), strict=True):
            some.copy_(gguf.decode(type, source) if type in gguf.TYPES else source)
            self._file.release(source)

    def _weigh(self, tensor: GgufTensor, data: Tensor) -> Weight:
        return gguf_weight(tensor.type, data, tensor.shape[-1], self._dtype)

    def _put(
        self, module: nn.Module, layout: Layout, parameters: Sequence[nn.Parameter], weights: Sequence[Weight]
    ) -> None:
        kinds = zip(weights, parameters, strict=True)
        projections = tuple(Projection(Kind.of(weight), p.requires_grad, Tie()) for weight, p in kinds)
        put(module, StoredProjections(FORMS[weights[0].format](), layout, projections), tuple(weights))

    def _load_experts(self, name: str, module: nn.Module, layout: Layout) -> None:
        parameters = [module.get_parameter(own) for own in layout.names]
        experts, rows, columns = layout.view(parameters[0]).shape
        names, half = _name_experts(name), (experts, rows // 2, columns)
        gates, ups, down = map(self._take, names, (half, half, layout.view(parameters[1]).shape))
        types = {gates.type, ups.type, down.type}
        if types <= gguf.TYPES.keys() and gates.type == ups.type:
            both = _side_by_side(gates.data, ups.data)
            if both.data_ptr() != gates.data.data_ptr():
                self._file.release(gates.data)
                self._file.release(ups.data)
            self._put(module, layout, parameters, (self._weigh(gates, both), self._weigh(down, down.data[:, None])))
            return
        for own, parameter, tensors in zip(layout.names, parameters, ((gates, ups), (down,)), strict=True):
            plain = torch.empty(parameter.shape, dtype=self._dtype)
            for part, tensor in zip(layout.view(plain).chunk(len(tensors), 1), tensors, strict=True):
                self._fill(part, tensor.type, tensor.data)
            module.register_parameter(own, nn.Parameter(plain, parameter.requires_grad))


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
    config: Any = getattr(model, "config", None)
    found = [name for name, known in ARCHITECTURES.items() if known.model_type == getattr(config, "model_type", None)]
    if not found:
        known = ", ".join(each.model_type for each in ARCHITECTURES.values())
        raise ValueError(f"model: expected a model of {known}, got {getattr(config, 'model_type', model.__class__)}")
    names = (*FLOAT_TYPES[:3], *gguf.TYPES, *RECIPES)
    if type is not None and type not in names:
        raise ValueError(f"type: expected one of {', '.join(names)}, got {type!r}")
    source = None if like is None else read_gguf(like)
    if source is not None and source.get(ARCHITECTURE) != found[0]:
        raise ValueError(f"like: expected a file of {found[0]}, got {source.get(ARCHITECTURE)!r}")
    choose = _chooser(type, None if source is None else source.tensors, config.num_hidden_layers)
    has_head = source is not None and HEAD in source.tensors
    tensors = dict(_list_tensors(model, ARCHITECTURES[found[0]], choose, has_head))
    if source is not None:
        order = {name: index for index, name in enumerate(source.tensors)}
        tensors = dict(sorted(tensors.items(), key=lambda item: order.get(item[0], len(order))))
    write_gguf(path, _write_config(config, found[0], source), tensors)


def _chooser(
    type: str | None, like: Mapping[str, GgufTensor] | None, layers: int
) -> Callable[[str, Sequence[int]], str]:
    """The type of a tensor by name and shape."""
    small, large = RECIPES.get(type or "q8_0", (type or "q8_0",) * 2)

    def choose(name: str, shape: Sequence[int]) -> str:
        if type is None and like is not None and name in like and _fits(like[name].type, shape[-1]):
            return like[name].type
        if len(shape) == 1 or "ffn_gate_inp" in name:
            return "f32"
        chosen = small
        if name == HEAD:
            chosen = large
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
    model: Any, known: Architecture, choose: Callable[[str, Sequence[int]], str], has_head: bool
) -> Iterator[tuple[str, DeferredTensor]]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for path, module in model.named_modules():
        if has_adapters(module):
            raise ValueError(f"model.{path}: expected no adapters; merge them first")
        stored, name = stored_of(module), _name_module(path)
        if stored is not None and not stored.is_in_memory:
            raise ValueError(f"model.{path}: expected weights in memory, got {stored.form}; {stored.form.remedy}")
        owned = dict(module.named_parameters(recurse=False))
        if stored is None and not owned:
            continue
        if name is None:
            raise ValueError(f"model.{path}: expected a module of {known.model_type}, got {module.__class__.__name__}")
        layout = layout_of(module) if stored is None else stored.layout
        if name.endswith("exps"):
            if layout is None:
                raise ValueError(f"model.{path}: expected experts on switchgear; call accelerate(model) first")
            weights: Any = stored.weights(module) if stored else [layout.view(owned[own]) for own in layout.names]
            parts = [*_split(weights[0], 2), *_split(weights[1], 1)]
            for each, part in zip(_name_experts(name), parts, strict=True):
                yield each, _defer(each, part, choose)
            continue
        if module is head and not has_head and _is_same(head, embedding):
            continue
        own_parts = {own: _Part(tuple(p.shape), None, p.detach) for own, p in owned.items()}
        if stored is not None:
            own_parts["weight"] = _split(stored.weights(module)[0], 1)[0].first()
        for own, part in own_parts.items():
            each = f"{name}.{own}"
            if known.has_interleaved_rope and each.startswith("blk."):
                part = part._replace(read=partial(_read_in_order, each, part.read, model.config))
            yield each, _defer(each, part.first() if each.endswith(VECTOR) else part, choose)


def _read_in_order(name: str, read: Callable[[], Tensor], config: Any) -> Tensor:
    return _in_order_of_files(name, read(), config, is_back=False)


def _is_same(head: nn.Module, embedding: nn.Module) -> bool:
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


def _split(weight: Tensor | Weight, parts: int) -> list[_Part]:
    """The parts of the rows of a weight [E,N,C], each [E,N/parts,C]."""
    experts, rows, columns = weight.shape
    kind = weight.format if isinstance(weight, Weight) and weight.format in gguf.TYPES else None
    read = partial(_read_part, weight, parts)
    return [_Part((experts, rows // parts, columns), kind, partial(read, index)) for index in range(parts)]


def _read_part(weight: Tensor | Weight, parts: int, index: int) -> Tensor:
    if isinstance(weight, Weight) and weight.format in gguf.TYPES:
        part = weight.data[:, index] if parts == weight.parts else weight.data.flatten(1, 2).chunk(parts, 1)[index]
        return part if weight.slots is None else part[weight.slots.long()]
    plain = weight.plain() if isinstance(weight, Weight) else weight.detach()
    return plain.chunk(parts, 1)[index]


def _defer(name: str, part: _Part, choose: Callable[[str, Sequence[int]], str]) -> DeferredTensor:
    kind = part.kind or choose(name, part.shape)
    return DeferredTensor(kind, part.shape, partial(_encode, name, part, kind))


def _encode(name: str, part: _Part, kind: str) -> Tensor:
    data = part.read().cpu()
    if part.kind is not None:
        return data
    if kind in FLOAT_TYPES:
        return data.to(PLAIN[kind][1])
    if not all(row.isfinite().all() for row in data):
        raise ValueError(f"{name}: expected finite numbers to encode as {kind}")
    return gguf.encode(kind, data)


def _write_config(config: Any, name: str, source: GgufFile | None) -> dict[str, Value]:
    known = ARCHITECTURES[name]
    metadata = {ARCHITECTURE: Value("string", name)} if source is None else dict(source.metadata)
    for key, field in {**known.keys, **known.optional}.items():
        if (value := getattr(config, field, None)) is not None:
            kind = "float32" if field in _FLOAT_FIELDS else "uint32"
            is_added = source is None or key in known.keys
            _set(metadata, f"{name}.{key}", Value(kind, value), is_added)
    rope = config.rope_parameters
    _set(metadata, f"{name}.rope.freq_base", Value("float32", rope["rope_theta"]), source is None)
    if source is None:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
            _set(metadata, f"{name}.{key}", Value("uint32", head_dim))
        _set(metadata, f"{name}.vocab_size", Value("uint32", config.vocab_size))
        _set(metadata, "tokenizer.ggml.model", Value("string", "none"))
        if (kind := rope.get("rope_type", "default")) != "default":
            if kind not in ("linear", "yarn"):
                raise ValueError(f"model.config.rope_parameters: expected default, linear or yarn, got {kind!r}")
            _set(metadata, f"{name}.rope.scaling.type", Value("string", kind))
            _set(metadata, f"{name}.rope.scaling.factor", Value("float32", rope["factor"]))
            if kind == "yarn":
                length = Value("uint32", rope["original_max_position_embeddings"])
                _set(metadata, f"{name}.rope.scaling.original_context_length", length)
        for key, field in _TOKENS.items():
            if isinstance(token := getattr(config, field, None), int):
                _set(metadata, f"tokenizer.ggml.{key}", Value("uint32", token))
    return metadata


def _set(metadata: dict[str, Value], key: str, value: Value, is_added: bool = True) -> None:
    """Sets a value. One that is there keeps its type, and its bits if it is equal in float32."""
    if (old := metadata.get(key)) is None:
        if is_added:
            metadata[key] = value
    elif not isinstance(old.value, (int, float)) or struct.pack("<f", old.value) != struct.pack("<f", value.value):
        metadata[key] = value if not isinstance(old.value, (int, float)) else Value(old.type, value.value)
