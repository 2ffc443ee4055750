# SPDX-License-Identifier: BSD-3-Clause
"""Distillation of Mixture-of-Experts models. See docs/finetuning.md.

From a teacher that uses all of its experts (arXiv:2502.12947):
knowledge_augment     logits of several teacher passes, each with all experts but one, some of them sampled
student_aware_router  trains the teacher's routers on the student's logits; then the logits of all experts
reverse_kl            the loss of both

From a teacher that the student was pruned from, expert by expert (MoE-Pruner, arXiv:2410.12013):
expert_kd             the squared error of each expert's output
distill_experts       trains a student on it, together with the student's own loss; pruned weights stay zero
keep_zeros            weights that are zero stay zero
"""

from switchgear.distill.losses import (
    all_experts,
    distill_experts,
    expert_kd,
    keep_zeros,
    knowledge_augment,
    reverse_kl,
    router_parameters,
    student_aware_router,
)

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
