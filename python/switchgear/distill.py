# SPDX-License-Identifier: BSD-3-Clause
"""Distillation of Mixture-of-Experts models. See docs/finetuning.md.

From a teacher that uses all of its experts (arXiv:2502.12947):
knowledge_augment     logits of several teacher passes, each with all experts but one, some of them sampled
student_aware_router  trains the teacher's routers on the student's logits; then the logits of all experts
reverse_kl            the loss of both

The teacher's routers are switchgear's. A student learns from text that it wrote itself (on-policy): pass such text.

From a teacher that the student was pruned from, expert by expert (MoE-Pruner, arXiv:2410.12013):
    L = L_CE + λ · Σ_layers Σ_e MSE(FFN_e^teacher(x), FFN_e^student(x))

expert_kd             the squared error of each expert's output
distill_experts       trains a student on it, together with the student's own loss; pruned weights stay zero
keep_zeros            weights that are zero stay zero
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switchgear.checks import Finite, NotNegative, Optimizer, Size, checked
from switchgear.functional import Routing
from switchgear.integrations.blocks import ExpertLayer, expert_layers
from switchgear.papers.parts.auxiliary import kl_divergence, mean_of_tokens, without_padding
from switchgear.papers.parts.stochastic import SampledTopK
from switchgear.routing.balance import load_balancing_loss
from switchgear.routing.context import Select, most_experts, scored
from switchgear.routing.counting import kept_counts
from switchgear.routing.ranking import choose
from switchgear.routing.router import Router
from switchgear.routing.selection import Dense
from switchgear.trace import Observation, observe
from switchgear.trace.override import override

__all__ = [
    "all_experts",
    "distill_experts",
    "expert_kd",
    "keep_zeros",
    "knowledge_augment",
    "reverse_kl",
    "router_parameters",
    "student_aware_router",
]


@checked
def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(student || teacher) of the softmax over the last dimension of logits [..., V], averaged over tokens, in nats:
    a float32 scalar, 0 for equal logits. A student's logit may be -inf. mask [...]: False for padding, whose logits
    may be NaN. Differentiable in both."""
    student_logits, teacher_logits = without_padding(mask, student_logits=student_logits, teacher_logits=teacher_logits)
    log_q, log_p = student_logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    return mean_of_tokens(kl_divergence(log_q, log_p), mask)


@checked
@contextmanager
def all_experts(teacher: nn.Module) -> Iterator[None]:
    """Inside the block every token goes to all experts, weighted by their scores."""
    with _override_selections(teacher, lambda _, options: Dense(**options)):
        yield


@checked
def knowledge_augment(
    teacher: nn.Module, *inputs: Any, samples: Size = 2, p_sample: float = 0.05, **keywords: Any
) -> list[Tensor]:
    """The teacher's logits [..., V] in each of `samples` passes, with all experts of a layer but one (knowledge
    augmentation).

    With probability p_sample a token's experts are drawn from the router's probabilities without replacement; otherwise
    they are the best ones. So with p_sample = 0 all passes are equal. The loss is the mean of reverse_kl over the
    passes. No gradients.

    Args:
        teacher: called as teacher(*inputs, **keywords); returns logits, or an object with the attribute logits.

    Raises ValueError for an option out of range, or a teacher without routers.
    """

    def sampled(router: Router, options: dict[str, Any]) -> Select:
        return SampledTopK(max(router.num_experts - 1, 1), p_sample, **options)

    with torch.no_grad(), _stop_counting(teacher), _override_selections(teacher, sampled):
        return [_get_logits(teacher(*inputs, **keywords)) for _ in range(samples)]


@checked
def student_aware_router(
    teacher: nn.Module,
    student_logits: Tensor,
    optimizer: Optimizer,
    *inputs: Any,
    beta: Finite = 0.01,
    mask: Tensor | None = None,
    **keywords: Any,
) -> Tensor:
    """One step of the teacher's routers on reverse_kl(student, teacher) + beta · load_balancing_loss, then the
    teacher's logits with all experts under the new routers, without gradients (student-aware router). Gradients that
    the parameters had, and what controllers have counted, stay.

    Args:
        teacher: called as in knowledge_augment. Its other parameters get no gradients.
        student_logits: [..., V], the student's for these inputs; their gradient is not needed.
        optimizer: over router_parameters(teacher).
        beta: the paper's weight of the balance loss, averaged over layers, for the router's own number of experts.

    Raises ValueError for a teacher without routers.
    """
    parameters = router_parameters(teacher)
    flags = {parameter: parameter.requires_grad for parameter in teacher.parameters()}
    seen: list[tuple[Router, Routing]] = []
    with ExitStack() as stack:
        for parameter in flags:  # no other weights need gradients
            stack.callback(parameter.requires_grad_, flags[parameter])
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        stack.enter_context(_stop_counting(teacher))
        for router in _find_routers(teacher).values():
            stack.callback(router.register_forward_hook(lambda r, _, routing: seen.append((r, routing))).remove)
        stack.enter_context(all_experts(teacher))
        with torch.enable_grad():
            loss = reverse_kl(student_logits.detach(), _get_logits(teacher(*inputs, **keywords)), mask)
            if beta:
                loss = loss + beta * torch.stack([_balance_loss(*pair) for pair in seen]).mean()
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, grad in zip(parameters, grads, strict=True):
            stack.callback(setattr, parameter, "grad", parameter.grad)
            parameter.grad = grad
        optimizer.step()
        with torch.no_grad():
            return _get_logits(teacher(*inputs, **keywords))


@checked
def router_parameters(teacher: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model's routers."""
    found = [parameter for router in _find_routers(teacher).values() for parameter in router.parameters()]
    return list(dict.fromkeys(found))


def _find_routers(teacher: nn.Module) -> dict[str, Router]:
    routers = {name: module for name, module in teacher.named_modules() if isinstance(module, Router)}
    if not routers:
        raise ValueError("teacher: expected one with switchgear's routers, got none")
    return routers


@contextmanager
def _stop_counting(teacher: nn.Module) -> Iterator[None]:
    """Routers count nothing inside the block: its choices are not theirs."""
    with ExitStack() as stack:
        for router in _find_routers(teacher).values():
            stack.callback(kept_counts(router))
        yield


@contextmanager
def _override_selections(teacher: nn.Module, select: Callable[[Router, dict[str, Any]], Select]) -> Iterator[None]:
    """Inside the block each router selects with select(router, options); the options are those of its scores."""
    with ExitStack() as stack:
        for name, router in _find_routers(teacher).items():
            now = scored(router.selection())
            options = {key: getattr(now, key) for key in ("score_function", "normalize", "scale") if hasattr(now, key)}
            stack.enter_context(override(teacher, select=select(router, options), layers=[name]))
        yield


def _balance_loss(router: Router, routing: Routing) -> Tensor:
    """load_balancing_loss of the experts that the router itself would choose."""
    logits = routing.router_logits
    top_k = router.top_k or most_experts(router.select) or 1
    return load_balancing_loss(logits, choose(logits.detach().float(), top_k))


def _get_logits(output: Any) -> Tensor:
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


class Losses(NamedTuple):
    """Of one step, before it."""

    own: float  # the student's loss
    experts: float  # expert_kd


@checked
def expert_kd(
    teacher: nn.Module, student: nn.Module, *inputs: Any, layers: Collection[str] | None = None, **keywords: Any
) -> Tensor:
    """The sum over layers and experts of the mean squared difference between both models' outputs of that expert: a
    float32 scalar, 0 for equal models. Differentiable in the student's experts.

    An expert is compared on the tokens that the teacher sends to it, with the teacher's x. So each layer is corrected
    by itself, whatever the layers before it do. Experts without tokens add nothing. Padding (attention_mask 0) is left
    out.

    Args:
        teacher: called as teacher(*inputs, **keywords), without gradients.
        student: has the same layers and numbers of experts; the experts may have other intermediate sizes.
        layers: names of blocks (moe_blocks); all if None.

    Raises ValueError for models without MoE layers, or of different ones, and for experts that are not plain.
    """
    pairs = _pair_experts(teacher, student, layers)
    found: list[Tensor] = []

    def see(name: str, seen: Observation) -> None:
        found.append(_compute_layer_loss(*pairs[name], seen))

    with torch.no_grad(), observe(teacher, see, layers=list(pairs)):
        teacher(*inputs, **keywords)
    if not found:
        raise ValueError("teacher: expected MoE layers that the call runs, got none that ran")
    return torch.stack(found).sum()


def _pair_experts(
    teacher: nn.Module, student: nn.Module, layers: Collection[str] | None
) -> dict[str, tuple[ExpertLayer, ExpertLayer]]:
    of_teacher, of_student = expert_layers(teacher, layers), expert_layers(student, layers)
    if list(of_teacher) != list(of_student):
        missing = sorted(set(of_teacher) ^ set(of_student))[0]
        raise ValueError(f"student: expected the teacher's layers, got a difference in {missing}")
    for name, layer in of_teacher.items():
        for what in ("num_experts", "hidden_size"):
            wanted, got = getattr(layer, what), getattr(of_student[name], what)
            if wanted != got:
                raise ValueError(f"student: expected the teacher's {what} in {name}, {wanted}, got {got}")
    return {name: (layer, of_student[name]) for name, layer in of_teacher.items()}


def _compute_layer_loss(teacher: ExpertLayer, student: ExpertLayer, seen: Observation) -> Tensor:
    x, ids, weights = seen.x, seen.topk_ids, seen.topk_weights
    if seen.token_mask is not None:
        kept = seen.token_mask.to(x.device)
        x, ids, weights = x[kept], ids[kept], weights[kept]
    ids = torch.where((ids < 0) | (ids >= teacher.num_experts), -1, ids)
    rows = teacher.rows(x, ids, weights)
    with torch.enable_grad():
        _, outputs = student.apply(rows.inputs.to(student.projection(0).dtype), rows.offsets)
        errors = (outputs.float() - rows.outputs.float()).square().mean(-1)
        tokens = rows.offsets.diff().clamp(min=1).to(errors.dtype)
        loss: Tensor = (errors / tokens[rows.experts]).sum()
        return loss


@checked
@contextmanager
def keep_zeros(model: nn.Module, layers: Collection[str] | None = None) -> Iterator[None]:
    """Inside the block, weights of the experts that are zero get no gradient, so optimizers without memory of earlier
    gradients leave them zero: the pattern of `compress.prune_weights` survives training. It takes a byte per weight."""
    parameter: Any
    with ExitStack() as stack:
        for layer in expert_layers(model, layers).values():
            for parameter in (each.value for each in layer.parameters):
                if parameter.requires_grad:
                    zeros = parameter.detach() == 0
                    hook = parameter.register_hook(lambda grad, zeros=zeros: grad.masked_fill(zeros, 0))
                    stack.callback(hook.remove)
        yield


@checked
def distill_experts(
    teacher: nn.Module,
    student: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    optimizer: Optimizer,
    *,
    weight: NotNegative | None = None,
    loss: Callable[[nn.Module, Mapping[str, Any]], Tensor] | None = None,
) -> list[Losses]:
    """One step on loss + weight · expert_kd per batch. The student's weights that are zero stay zero.

        student = copy.deepcopy(teacher)
        compress.prune_weights(student, 0.5, calibration=compress.calibrate(teacher, batches))
        optimizer = torch.optim.AdamW(student.parameters(), 1e-5)
        distill.distill_experts(teacher, student, batches, optimizer)

    Args:
        teacher: its parameters get no gradients.
        student: trained in the mode, train or eval, that it is in.
        batches: dicts of the forward's arguments, of both models; with labels for the default loss.
        optimizer: a new one, over parameters of the student.
        weight: λ. None: |own loss| / expert_kd at the first step at which the student differs, so that both start
            equal in size.
        loss: of the student for a batch, by default student(**batch).loss.

    Raises ValueError as expert_kd does, and for a loss that is not finite; steps before that remain.
    """
    _pair_experts(teacher, student, None)  # before a step
    done: list[Losses] = []
    with keep_zeros(student):
        for batch in batches:
            own = getattr(student(**batch), "loss", None) if loss is None else loss(student, batch)
            if not isinstance(own, Tensor):
                raise ValueError("batches: expected labels, so that the student returns a loss, got none")
            experts = expert_kd(teacher, student, **{key: value for key, value in batch.items() if key != "labels"})
            losses = Losses(float(own.detach()), float(experts.detach()))
            if weight is None and losses.experts:
                weight = abs(losses.own) / losses.experts
            total = own if weight is None else own + weight * experts
            if not bool(total.isfinite()):
                raise ValueError(f"batches: expected finite losses, got {losses}")
            optimizer.zero_grad()
            torch.autograd.backward(total)
            optimizer.step()
            done.append(losses)
    return done
