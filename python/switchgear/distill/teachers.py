# SPDX-License-Identifier: BSD-3-Clause
"""Distillation from a Mixture-of-Experts teacher that uses all of its experts (arXiv:2502.12947).

The teacher's routers are switchgear's. A student learns from text that it wrote itself (on-policy): pass such text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from switchgear.checks import Finite, Optimizer, Size, checked
from switchgear.functional import Routing
from switchgear.papers.parts.auxiliary import kl_divergence, mean_of_tokens, without_padding
from switchgear.papers.parts.stochastic import SampledTopK
from switchgear.routing.balance import load_balancing_loss
from switchgear.routing.context import Select, most_experts, scored
from switchgear.routing.counting import kept_counts
from switchgear.routing.ranking import choose
from switchgear.routing.router import Router
from switchgear.routing.selection import Dense
from switchgear.trace.override import override


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
