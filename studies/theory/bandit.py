"""One decision: does a step towards a better teacher raise the student's expected reward?

Student q = softmax(logits), teacher p, reward r, J(q) = sum_a q_a r_a. A small step d of the logits changes the
reward by <grad J, d>, grad J = q (r - J). With the gradients of the objectives

    forward CE    g = q - p
    reverse KL    g = q (u - E_q u),  u = log(q / p)
    JSD           g = q (u - E_q u),  u = log(2 q / (p + q)) / 2

a plain step is d = -g, a natural step d = -F^+ g with the Fisher matrix F = diag(q) - q q^T. As F (g / q) = g for
every g whose entries sum to 0, the natural step is -g / q up to a constant, which softmax does not see. For forward
CE it is d = p / q - 1, so that <grad J, d> = sum_a (r_a - J) (p_a - q_a) = J(p) - J(q): the teacher's advantage.

Source: the counter-examples follow the paper's claim (arXiv 2606.05152, abstract and project page); the numbers, the
random pairs and the identity as written here are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from studies.theory.finding import Finding, verdict

TEACHER = (0.05, 0.65, 0.30)
STUDENT = (0.35, 0.05, 0.60)
REWARD = (1.0, 1.0, 0.0)
STEP_SIZE = 0.5
NUM_STEPS = 60
NUM_PAIRS = 100_000
NUM_ACTIONS = 4
MARGIN = 0.1


def forward_ce_gradient(student: Tensor, teacher: Tensor) -> Tensor:
    return student - teacher


def reverse_kl_gradient(student: Tensor, teacher: Tensor) -> Tensor:
    return _centred(student, (student / teacher).log())


def jsd_gradient(student: Tensor, teacher: Tensor) -> Tensor:
    return _centred(student, (2 * student / (student + teacher)).log() / 2)


GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_ce": forward_ce_gradient,
    "reverse_kl": reverse_kl_gradient,
    "jsd": jsd_gradient,
}
"""Gradients of the objectives in the student's logits, by name: (student, teacher), each [..., A], to [..., A]."""


def _centred(student: Tensor, values: Tensor) -> Tensor:
    """The gradient [..., A] of E_student[values] in the student's logits."""
    return student * (values - (student * values).sum(-1, keepdim=True))


def plain_change(student: Tensor, reward: Tensor, gradient: Tensor) -> Tensor:
    """The first-order change [...] of the expected reward per unit of a plain gradient step."""
    return -(_centred(student, reward) * gradient).sum(-1)


def natural_change(student: Tensor, reward: Tensor, gradient: Tensor) -> Tensor:
    """The first-order change [...] of the expected reward per unit of a natural-gradient step."""
    return plain_change(student, reward, gradient / student)


@dataclass(frozen=True)
class Share:
    """The share of pairs with a better teacher in which a step lowers the student's reward."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class BanditResult:
    teacher_reward: float
    student_reward: float
    first_order: dict[str, float]
    """First-order change of the reward by a plain step, three actions, by objective."""
    first_order_natural: dict[str, float]
    """First-order change of the reward by a natural step."""
    rewards: dict[str, list[float]]
    """Expected reward after 0, 1, ... NUM_STEPS plain steps of STEP_SIZE."""
    num_pairs: dict[str, int]
    """Random pairs with a better teacher, by kind of pair."""
    hurts: dict[str, dict[str, dict[str, Share]]]
    """Shares of hurt pairs: kind of pair -> "plain" or "natural" -> objective."""
    identity_error: float
    """Largest |natural change under forward CE - (J(teacher) - J(student))| over all NUM_PAIRS pairs."""


def measure(seed: int) -> BanditResult:
    teacher, student, reward = (torch.tensor(x, dtype=torch.float64) for x in (TEACHER, STUDENT, REWARD))
    gradients = {name: gradient(student, teacher) for name, gradient in GRADIENTS.items()}
    num_pairs, hurts, identity_error = _random_pairs(seed)
    return BanditResult(
        teacher_reward=float(teacher @ reward),
        student_reward=float(student @ reward),
        first_order={name: float(plain_change(student, reward, g)) for name, g in gradients.items()},
        first_order_natural={name: float(natural_change(student, reward, g)) for name, g in gradients.items()},
        rewards={name: _rewards(student, teacher, reward, gradient) for name, gradient in GRADIENTS.items()},
        num_pairs=num_pairs,
        hurts=hurts,
        identity_error=identity_error,
    )


def _rewards(
    student: Tensor, teacher: Tensor, reward: Tensor, gradient: Callable[[Tensor, Tensor], Tensor]
) -> list[float]:
    logits, rewards = student.log(), [float(student @ reward)]
    for _ in range(NUM_STEPS):
        logits = logits - STEP_SIZE * gradient(logits.softmax(-1), teacher)
        rewards.append(float(logits.softmax(-1) @ reward))
    return rewards


def random_pairs(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws student and teacher uniformly on the simplex, rewards in [0, 1], and a teacher made from the student.

    Returns:
        Student, teacher, tilted teacher (softmax of student logits + 2 reward + normal noise), reward;
        each [pairs, actions].
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_PAIRS, NUM_ACTIONS)

    def uniform() -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    # Normalised exponentials are uniform on the simplex.
    student, teacher = ((e := -(1 - uniform()).log()) / e.sum(-1, keepdim=True) for _ in range(2))
    reward = uniform()
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return student, teacher, (student.log() + 2 * reward + noise).softmax(-1), reward


def _random_pairs(seed: int) -> tuple[dict[str, int], dict[str, dict[str, dict[str, Share]]], float]:
    student, teacher, tilted, reward = random_pairs(seed)
    advantage = ((teacher - student) * reward).sum(-1)
    tilted_advantage = ((tilted - student) * reward).sum(-1)
    natural = natural_change(student, reward, forward_ce_gradient(student, teacher))
    identity_error = float((natural - advantage).abs().max())
    kinds = {
        "any better teacher": (teacher, advantage > 0),
        f"better by {MARGIN} or more": (teacher, advantage >= MARGIN),
        "student tilted to reward": (tilted, tilted_advantage > 0),
    }
    num_pairs = {kind: int(is_better.sum()) for kind, (_, is_better) in kinds.items()}
    hurts = {
        kind: {
            step: {
                name: _share(change(student, reward, gradient(student, expert))[is_better] < 0)
                for name, gradient in GRADIENTS.items()
            }
            for step, change in (("plain", plain_change), ("natural", natural_change))
        }
        for kind, (expert, is_better) in kinds.items()
    }
    return num_pairs, hurts, identity_error


def _share(is_hurt: Tensor) -> Share:
    value = float(is_hurt.double().mean())
    return Share(value, (value * (1 - value) / is_hurt.numel()) ** 0.5)


LABELS = {"forward_ce": "forward CE", "reverse_kl": "reverse KL", "jsd": "JSD"}


def findings(result: BanditResult) -> list[Finding]:
    rows = []
    teacher, start = result.teacher_reward, result.student_reward
    for name, change in result.first_order.items():
        quantity = f"{LABELS[name]}: first-order change of reward"
        rows.append(
            Finding(
                "bandit", quantity, f"{change:+.4f}", f"> 0: teacher {teacher - start:+.2f} better", verdict(change > 0)
            )
        )
    for name, rewards in result.rewards.items():
        quantity = f"{LABELS[name]}: reward after 5 steps of {STEP_SIZE}"
        compared = f">= start {start:.3f}; {rewards[-1]:.3f} after {NUM_STEPS}"
        rows.append(Finding("bandit", quantity, f"{rewards[5]:.3f}", compared, verdict(rewards[5] >= start)))
    error = f"{result.identity_error:.1e}"
    quantity = "natural forward CE step gains J(T) - J(S): error"
    rows.append(Finding("bandit", quantity, error, f"{NUM_PAIRS} random pairs", verdict(result.identity_error < 1e-14)))
    for kind, steps in result.hurts.items():
        for step, shares in steps.items():
            for name, share in shares.items():
                measured = f"{100 * share.value:.2f} % ± {100 * share.standard_error:.2f}"
                quantity = f"{LABELS[name]}: {step} step hurts"
                rows.append(Finding("random pairs", quantity, measured, f"never: {kind}", verdict(share.value == 0)))
    return rows
