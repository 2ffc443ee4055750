# SPDX-License-Identifier: BSD-3-Clause
"""Shows stacked experts as one nn.Linear per expert and projection, for tools that hook, read or replace such modules.

Inside the block the linear layers have the parameters, which are views of the stacks; the stacks are attributes of
their module, but tensors: tools that look for stacked parameters find none. The experts' forward, or that of a block
whose forward reads its experts, is replaced on the instance, so fast paths that skip calls run the model's own code
around it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switchgear.checks import checked
from switchgear.integrations.blocks import ExpertLayer, expert_layer
from switchgear.integrations.experts import ExpertLinears, ExpertWeights, run_experts
from switchgear.integrations.forwards import get_forward, is_swapped, replace_forward, runs_own_forward
from switchgear.integrations.modules import recognize
from switchgear.integrations.moe_blocks import MoeBlock, moe_blocks
from switchgear.utils.modules import set_eval

__all__ = ["as_linears"]


@contextmanager
@checked
def as_linears(model: nn.Module) -> Iterator[None]:
    """Inside the block, each expert's projections are nn.Linear modules, and are called with the rows of the expert.

        with switchgear.as_linears(model):
            tool(model)  # finds model.layers.0.mlp.experts.5.gate_proj, up_proj and down_proj

    They are modules experts.<e>.<name> of torch.nn.Linear, without gate_proj where experts have no gate. Their weights
    [out,in] and biases are parameters that share memory with the stacked ones, which are not among the model's
    parameters and in its state dict meanwhile. Experts without rows are not called. An expert's rows are in the order
    of the tokens; results differ from those outside in the last bits.

    At the end the stacks are the model's parameters again, the same objects, with:

    - values: those of the weights and biases of the linear layers, in the dtype and on the device of the stack. A layer
      of another class, or with a weight of another class, such as one with an adapter or a quantised one, is applied to
      the unit vectors without its bias, in evaluation mode: the stack gets the matrix by which it multiplies.
    - gradients: those of the linear layers. A backward pass inside accumulates into the stacks' .grad at once.

    Optimizers of `model.parameters()` have the parameters of the side where they are made; those made outside step
    inside, too. requires_grad of the stacks stays. After an exception, values not written in place are dropped.

    Tools may cast and wrap modules, and put a module with the same names of layers in the place of the experts, which
    are put back.

    Args:
        model: one with layers of switchgear.MoE or of Hugging Face, whether or not it runs on switchgear. Layers whose
            experts are nn.Linear modules already stay as they are.

    Raises:
        ValueError: no such layers; experts that are not plain stacked parameters here: stored, offloaded, distributed,
            with adapters, or with a replaced forward. At the end: a layer that is gone, has another shape, is on the
            meta device, or computes no matrix product. Then no layer's values are taken over.
    """
    blocks = moe_blocks(model)
    if not blocks:
        raise ValueError("model: expected MoE layers of switchgear or Hugging Face, got none")
    stacked = [block for block in blocks.values() if not _has_linears(block)]
    views = [_View(expert_layer(block)) for block in stacked]
    with ExitStack() as restored:
        for view in views:
            for undo in view.show():
                restored.callback(undo)
        yield
        modules = set(model.modules())
        if gone := [view.layer.name for view in views if view.layer.block.block not in modules]:
            raise ValueError(f"model: expected its layer {gone[0]}, which is gone")
        for take_over in (False, True):  # all are read before one is written
            for view in views:
                for linear in view.linears:
                    for key, tensor in linear.read(view).items():
                        if take_over:
                            linear.stacks[key].take_over(tensor, linear.expert, linear.rows)


def _has_linears(block: MoeBlock) -> bool:
    router = [] if block.gate is None else list(block.gate.modules())  # JetMoE's experts are the block, with its router
    return any(isinstance(module, nn.Linear) and module not in router for module in block.experts.modules())


class _Stack:
    """A parameter [E,…] of experts, and the parameters of linear layers that are parts of it."""

    def __init__(self, parameter: nn.Parameter, transposed: bool) -> None:
        self.parameter, self.transposed = parameter, transposed and parameter.dim() == 3
        self.parts: list[tuple[nn.Parameter, int, slice]] = []
        self.shares_grad = parameter.grad is not None

    def view(self, stack: Tensor, expert: int, rows: slice) -> Tensor:
        """The part of the stack, or of its gradient."""
        return (stack[expert].mT if self.transposed else stack[expert])[rows]

    def add_part(self, expert: int, rows: slice) -> nn.Parameter:
        part = nn.Parameter(self.view(self.parameter.detach(), expert, rows), self.parameter.requires_grad)
        self.parts.append((part, expert, rows))
        if self.parameter.grad is not None:
            part.grad = self.view(self.parameter.grad, expert, rows)
        if part.requires_grad:
            # It is called before the gradient is accumulated.
            part.register_hook(lambda _: self._share_grad(part, expert, rows))  # type: ignore[no-untyped-call]
        return part

    @torch.no_grad()
    def _share_grad(self, part: nn.Parameter, expert: int, rows: slice) -> None:
        """Lets the gradient of a part be a part of the stack's gradient. An optimizer may have set either to None."""
        if self.parameter.grad is None:
            self.parameter.grad, self.shares_grad = torch.zeros_like(self.parameter), True
            for each, of, where in self.parts:
                each.grad = self.view(self.parameter.grad, of, where)
        elif part.grad is None:
            part.grad = self.view(self.parameter.grad, expert, rows).zero_()

    @torch.no_grad()
    def take_over(self, tensor: Tensor, expert: int, rows: slice) -> None:
        """Writes the value and the gradient of a part, as they are now, into the stack."""
        _copy(tensor, self.view(self.parameter.detach(), expert, rows))
        grad = tensor.grad if tensor.is_leaf else None
        if grad is not None and not self.shares_grad:  # else an optimizer has set the stack's to None
            self.parameter.grad, self.shares_grad = torch.zeros_like(self.parameter), True
        if self.parameter.grad is not None:
            into = self.view(self.parameter.grad, expert, rows)
            _copy(torch.zeros_like(into) if grad is None else grad, into)


def _copy(tensor: Tensor, into: Tensor) -> None:
    if tensor.data_ptr() != into.data_ptr() or tensor.stride() != into.stride():
        into.copy_(tensor)


class _Linear(NamedTuple):
    """A linear layer: rows of an expert's matrix."""

    expert: int
    name: str
    rows: slice
    stacks: dict[str, _Stack]  # weight, and bias if there is one

    def build(self) -> nn.Linear:
        parameters = {key: stack.add_part(self.expert, self.rows) for key, stack in self.stacks.items()}
        size_out, size_in = parameters["weight"].shape
        linear = nn.Linear(size_in, size_out, bias="bias" in parameters, device="meta")
        linear._parameters.update(parameters)
        return linear

    def read(self, view: _View) -> dict[str, Tensor]:
        """The tensors of the layer that is there now. Raises ValueError if the stacks cannot have them."""
        expected = f"{view.layer.name or 'model'}: expected a linear layer as {self.name} of expert {self.expert}"
        try:
            module: Any = view.find_experts().get_submodule(f"{self.expert}.{self.name}")
        except AttributeError:
            raise ValueError(f"{expected}, got none") from None
        now = {key: stack.view(stack.parameter.detach(), self.expert, self.rows) for key, stack in self.stacks.items()}
        matrix = _read_matrix(module, expected, now["weight"])
        found: dict[str, Any] = {"weight": matrix, "bias": getattr(module, "bias", None)}
        for key, tensor in found.items():
            want = f"{key} {list(now[key].shape)}" if key in now else f"no {key}"
            got = f"no {key}"
            if isinstance(tensor, Tensor):
                got = f"{key} {list(tensor.shape)}{' on the meta device' if tensor.is_meta else ''}"
            if got != want:
                raise ValueError(f"{expected} with {want}, got {got}")
        return {key: found[key] for key in self.stacks}


_TRIAL = 4  # rows
_TOLERANCE = 0.05  # quantising rows to 8 bits rounds by 1 %


@torch.no_grad()
def _read_matrix(module: Any, expected: str, now: Tensor) -> Tensor:
    """The matrix by which a linear layer multiplies, [out,in], as `now`, which the stack has."""
    weight: Any = getattr(module, "weight", None)
    bias: Any = getattr(module, "bias", None)
    runs_class = "forward" not in vars(module) and type(module).forward is nn.Linear.forward
    if runs_class and type(weight) in (Tensor, nn.Parameter):
        return weight  # type: ignore[no-any-return]
    kept = bias.clone() if isinstance(bias, Tensor) else None
    try:
        if kept is not None:
            bias.zero_()
        like = weight if isinstance(weight, Tensor) and weight.is_floating_point() else now
        size, generator = now.shape[1], torch.Generator().manual_seed(0)
        rows = torch.cat((torch.eye(size), torch.randn(_TRIAL, size, generator=generator)))
        rows = rows.to(like.device, like.dtype)
        with set_eval(module):
            results = module(rows)
    except Exception as error:
        raise ValueError(f"{expected}, got a {type(module).__name__} that cannot be called: {error}") from error
    finally:
        if kept is not None:
            bias.copy_(kept)
    matrix: Tensor = results[:size].mT
    got, want = results[size:].float(), rows[size:].float() @ results[:size].float()
    if not (got - want).norm() <= _TOLERANCE * got.norm():
        raise ValueError(f"{expected}, got a {type(module).__name__} whose results are no product with one matrix")
    return matrix


class _View:
    """The experts of a layer as linear layers."""

    def __init__(self, layer: ExpertLayer) -> None:
        self.layer, self.num_experts = layer, layer.num_experts
        both = layer.block.block, layer.experts
        self.owner = next((module for module in both if recognize(module) is not None), layer.experts)
        if not (runs_own_forward(self.owner) or is_swapped(self.owner)):
            kind = type(self.owner).__name__
            raise ValueError(f"{layer.name or 'model'}: expected the forward of {kind}, other code has replaced it")
        experts, width = layer.experts, layer.intermediate_size
        self.path = _find_path(layer.block.block, experts)
        self.is_interleaved = getattr(experts, "interleaved", not getattr(experts, "is_concatenated", True))
        names = {"up_proj": slice(None)}
        if getattr(experts, "gated", getattr(experts, "has_gate", True)):
            alternate = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
            names = alternate if self.is_interleaved else {"gate_proj": slice(width), "up_proj": slice(width, None)}
        self.names = names, {"down_proj": slice(None)}
        self.stacks: list[dict[str, _Stack]] = []
        for module, name, _ in layer.parameters:
            found = {"weight": module._parameters[name], "bias": module._parameters.get(f"{name}_bias")}
            self.stacks.append({key: _Stack(p, layer.transposed) for key, p in found.items() if p is not None})
        self.linears = [
            _Linear(expert, name, rows, stacks)
            for expert in range(self.num_experts)
            for of_projection, stacks in zip(self.names, self.stacks, strict=True)
            for name, rows in of_projection.items()
        ]

    def show(self) -> Iterator[Callable[[], None]]:
        """Puts the linear layers in place of the stacks, step by step: yields what undoes each step."""
        experts: nn.Module = self.layer.experts
        for module in dict.fromkeys(tensor.module for tensor in self.layer.parameters):
            stacks = {id(stack.parameter) for both in self.stacks for stack in both.values()}
            yield _hide(module, [name for name, p in module._parameters.items() if id(p) in stacks])
        yield self._put_back
        for linear in self.linears:
            if str(linear.expert) not in experts._modules:
                experts.add_module(str(linear.expert), nn.ModuleDict().train(experts.training))
            experts.get_submodule(str(linear.expert)).add_module(linear.name, linear.build().train(experts.training))
        yield replace_forward(self.owner, self._build_forward())

    def find_experts(self) -> nn.Module:
        """The module that is now where the experts were. Raises AttributeError if there is none."""
        return self.layer.block.block.get_submodule(self.path)

    def _put_back(self) -> None:
        """Removes the linear layers, and what a tool has put in the place of the experts."""
        for expert in range(self.num_experts):
            self.layer.experts._modules.pop(str(expert), None)
        if self.layer.experts not in self.layer.block.block.modules():  # where a wrapper may hold them
            self.layer.block.block.set_submodule(self.path, self.layer.experts)

    def _build_forward(self) -> Callable[..., Any]:
        path, before = _find_path(self.owner, self.layer.experts), get_forward(self.owner)
        signature = inspect.signature(type(self.owner).forward)
        patch = getattr(recognize(self.owner), "patch", None)
        options: list[Any] = []
        for index, names in enumerate(self.names):
            alternates, weight = self.is_interleaved and len(names) > 1, self.layer.projection(index)
            options.append((tuple(names), alternates, (*weight.shape,), weight.dtype))

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            experts = self.get_submodule(path)  # of this copy of the module
            if "0" not in experts._modules:  # a tool's wrapper has kept this forward longer than the block
                return before(self, *args, **kwargs)
            linears: Any = [ExpertLinears(experts, *each) for each in options]
            if patch is not None:
                return patch.forward(self, ExpertWeights(*linears), *args, **kwargs)
            _, x, topk_ids, topk_weights = signature.bind(self, *args, **kwargs).args
            rows = x.reshape(-1, x.shape[-1])
            ids = torch.where(topk_ids < linears[0].shape[0], topk_ids, -1).reshape(len(rows), -1)
            y = run_experts(rows, ids, topk_weights.reshape(ids.shape), ExpertWeights(*linears), self)
            return y.view(x.shape)

        forward.__signature__ = signature  # type: ignore[attr-defined]  # which tools that keep arguments ask
        return forward


def _find_path(module: nn.Module, part: nn.Module) -> str:
    path: str = next(name for name, each in module.named_modules() if each is part)
    return path


def _hide(module: nn.Module, names: list[str]) -> Callable[[], None]:
    """Takes parameters out of a module's; their tensors stay attributes. Returns an undo function."""
    own = module._parameters
    before: dict[str, Any] = dict(own)
    for name in names:
        vars(module)[name] = before[name].detach()
        del own[name]

    def undo() -> None:
        now = dict(module._parameters)
        module._parameters = own  # a tool that moves weights may have put one of its own there
        own.clear()
        own.update({name: p for name, p in (before | now).items() if name in now or name in names})  # in their order
        for name in names:
            vars(module).pop(name, None)
            own[name] = before[name]

    return undo
