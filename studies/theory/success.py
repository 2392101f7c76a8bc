"""A lower bound on the success probability, and Pass@N of students trained to convergence.

Bound. R(y) in {0, 1}, J(pi) = sum_y pi(y) R(y), teacher T with J_T = J(T) > 0, T_R(y) = T(y) R(y) / J_T its successes:

    log J(pi) = H(T_R) - H(T_R, pi) + KL(T_R || pi_R)            pi_R the student's successes
              >= H(T_R) - H(T_R, pi)                             (1) the teacher-weighted likelihood of successes
              >= H(T_R) - H(T, pi) / J_T                         (2) the forward cross-entropy to the whole teacher

(1) is Jensen's inequality with the gap written out; (2) holds because no term T(y) (-log pi(y)) is negative. So
lowering the forward cross-entropy raises a lower bound on log J, and on Pass@N = 1 - (1 - J)^N, for every N.

Pass@N. An answer is a pair (i, j), i, j < 4. The instance z is hidden from the student; only (z, z) solves it. The
teacher has seen feedback: .70 on (z, z), a floor over all sixteen answers, the rest on the other diagonal pairs. The
student is too small: it draws i and j independently. It minimises the mean over z of a divergence between
whole-answer distributions, or the on-policy sum of the two tokens' cross-entropies, with or without future credit.

Source: that the objective optimises a lower bound on the teacher-weighted likelihood of success, and that this lifts
Pass@N, is the paper's claim (abstract); (1) and (2), the problem and its reading are ours. pass@k is the unbiased
estimator of Chen et al. (2021), 1 - C(n - c, k) / C(n, k).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import comb

import torch
from torch import Tensor

from studies.theory.finding import Finding, verdict

NUM_PAIRS = 100_000
NUM_ANSWERS, NUM_SUCCESSES = 8, 3
TEACHER = (0.40, 0.25, 0.15, 0.05, 0.05, 0.04, 0.03, 0.03)
STUDENT = (0.02, 0.03, 0.05, 0.30, 0.20, 0.15, 0.15, 0.10)
PATH_STEP_SIZE, PATH_STEPS = 0.5, 100

NUM_MODES = 4
INSTANCE_PROB = 0.70
"""The teacher's probability of the answer that solves the instance, floor aside."""
FLOORS = (0.05, 0.002)
NUM_STARTS, START_SCALE = 8, 0.3
STEP_SIZE, MAX_STEPS, CONVERGED = 2.0, 2500, 1e-8
MAX_N = 64


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """An unbiased estimate of the probability that one of k answers is correct, from n answers of which c are correct.

    Raises:
        ValueError: c is not within [0, n], or k not within [1, n].
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"[pass_at_k] needs 0 <= c <= n and 1 <= k <= n, got n={num_samples}, c={num_correct}, k={k}")
    return 1 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def success_bounds(student: Tensor, teacher: Tensor, success: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns log J(pi), bound (1), bound (2) and KL(T_R || pi_R), each [...]; the arguments are [..., A]."""
    success = success.to(student.dtype)
    teacher_success = (teacher * success).sum(-1, keepdim=True)
    teacher_successes = teacher * success / teacher_success
    entropy = -torch.special.xlogy(teacher_successes, teacher_successes).sum(-1)
    log_success = (student * success).sum(-1).log()
    likelihood = (teacher_successes * student.log()).sum(-1)
    cross_entropy_term = (teacher * student.log()).sum(-1) / teacher_success.squeeze(-1)
    student_success_logprobs = torch.where(success > 0, student, 1.0).log() - log_success[..., None]
    gap = -entropy - (teacher_successes * student_success_logprobs).sum(-1)
    return log_success, entropy + likelihood, entropy + cross_entropy_term, gap


def instance_teachers(floor: float) -> Tensor:
    """The teacher's distributions [instances, answers]; i is the slow index of an answer (i, j)."""
    teachers = torch.full((NUM_MODES,) * 3, floor / NUM_MODES**2, dtype=torch.float64)
    other_mode_prob = (1 - INSTANCE_PROB - floor) / (NUM_MODES - 1)
    for i in range(NUM_MODES):
        teachers[:, i, i] += other_mode_prob
        teachers[i, i, i] += INSTANCE_PROB - other_mode_prob
    return teachers.flatten(1)


def _answer_logprobs(logits: Tensor) -> Tensor:
    """The log-probs [K, 1, answers] of answers with independent tokens of logits [K, 2, modes]."""
    first, second = logits.log_softmax(-1).unbind(-2)
    return (first[:, :, None] + second[:, None, :]).flatten(1)[:, None]


def _forward_ce(logits: Tensor, teachers: Tensor) -> Tensor:
    return -(teachers * _answer_logprobs(logits)).sum(-1)


def _reverse_kl(logits: Tensor, teachers: Tensor) -> Tensor:
    logprobs = _answer_logprobs(logits)
    return (logprobs.exp() * (logprobs - teachers.log())).sum(-1)


def _jsd(logits: Tensor, teachers: Tensor) -> Tensor:
    logprobs = _answer_logprobs(logits)
    log_middle = ((logprobs.exp() + teachers) / 2).log()
    return ((logprobs.exp() * (logprobs - log_middle)).sum(-1) + (teachers * (teachers.log() - log_middle)).sum(-1)) / 2


def _on_policy(logits: Tensor, teachers: Tensor, credited: bool) -> Tensor:
    """The expectation, over the student's first token, of both tokens' cross-entropies."""
    pairs = teachers.unflatten(-1, (NUM_MODES, NUM_MODES))
    first_teacher = pairs.sum(-1)
    first, second = logits.log_softmax(-1).unbind(-2)
    costs = -(pairs / first_teacher[..., None] * second[:, None, None]).sum(-1)
    probs = first.exp() if credited else first.exp().detach()
    return -(first_teacher * first[:, None]).sum(-1) + (probs[:, None] * costs).sum(-1)


OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward CE": _forward_ce,
    "reverse KL": _reverse_kl,
    "JSD": _jsd,
    "on-policy CE": partial(_on_policy, credited=False),
    "on-policy CE + credit": partial(_on_policy, credited=True),
}
"""Objectives (logits [K, 2, modes], teachers [K, instances, answers]) -> [K, instances]; training minimises their mean
over instances."""


def _train(objective: Callable[[Tensor, Tensor], Tensor], teachers: Tensor, start: Tensor) -> tuple[Tensor, float]:
    """Trains to convergence; returns the probs [K, modes] of the diagonal answers and the largest gradient entry."""
    logits = start.clone()
    gradient = torch.zeros_like(logits)
    for _ in range(MAX_STEPS):
        leaf = logits.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(leaf, teachers).mean(-1).sum(), leaf)
        if float(gradient.abs().max()) < CONVERGED:
            break
        logits = logits - STEP_SIZE * gradient
    probs = _answer_logprobs(logits).exp().unflatten(-1, (NUM_MODES, NUM_MODES))[:, 0]
    return probs.diagonal(dim1=1, dim2=2), float(gradient.abs().max())


@dataclass(frozen=True)
class SuccessResult:
    bound_excess: dict[str, float]
    """Largest difference, bound minus log J, over NUM_PAIRS random pairs; at most rounding."""
    gap_error: float
    """Largest |log J - bound (1) - KL(T_R || pi_R)| over the same pairs."""
    bound_path: dict[str, list[float]]
    """log J and both bounds after 0, 1, ... PATH_STEPS plain forward CE steps from STUDENT to TEACHER."""
    estimator_error: float
    """Largest |mean of pass_at_k over Binomial(16, p) - (1 - (1 - p)^k)|."""
    pass_at_n: dict[str, dict[str, list[float]]]
    """floor -> objective -> probability that one of N = 1 ... MAX_N answers solves the instance; mean over starts."""
    pass_any_at_n: dict[str, dict[str, list[float]]]
    """floor -> objective -> probability that one of N answers is any diagonal answer."""
    spread: dict[str, dict[str, float]]
    """floor -> objective -> standard deviation over starts of pass@MAX_N."""
    gradient_left: dict[str, float]
    """Largest entry of the gradient at the end of training, by objective."""


def measure(seed: int) -> SuccessResult:
    generator = torch.Generator().manual_seed(seed)
    excess, gap_error = _random_bounds(generator)
    start = START_SCALE * torch.randn(NUM_STARTS, 2, NUM_MODES, generator=generator, dtype=torch.float64)
    # Floors and starts train side by side: K = floors * starts.
    teachers = torch.stack([instance_teachers(floor) for floor in FLOORS]).repeat_interleave(NUM_STARTS, 0)
    pass_at_n: dict[str, dict[str, list[float]]] = {f"{floor:g}": {} for floor in FLOORS}
    pass_any: dict[str, dict[str, list[float]]] = {f"{floor:g}": {} for floor in FLOORS}
    spread: dict[str, dict[str, float]] = {f"{floor:g}": {} for floor in FLOORS}
    gradient_left = {}
    counts = torch.arange(1, MAX_N + 1)
    for name, objective in OBJECTIVES.items():
        diagonal, gradient_left[name] = _train(objective, teachers, start.repeat(len(FLOORS), 1, 1))
        solved = 1 - (1 - diagonal[..., None]) ** counts  # [K, instances, N]
        any_solved = 1 - (1 - diagonal.sum(-1, keepdim=True)) ** counts  # [K, N]
        for i, floor in enumerate(pass_at_n):
            starts = slice(i * NUM_STARTS, (i + 1) * NUM_STARTS)
            pass_at_n[floor][name] = solved[starts].mean((0, 1)).tolist()
            pass_any[floor][name] = any_solved[starts].mean(0).tolist()
            spread[floor][name] = float(solved[starts, :, -1].mean(1).std())
    return SuccessResult(
        excess, gap_error, _bound_path(), _estimator_error(), pass_at_n, pass_any, spread, gradient_left
    )


def _random_bounds(generator: torch.Generator) -> tuple[dict[str, float], float]:
    shape = (2, NUM_PAIRS, NUM_ANSWERS)
    student, teacher = torch.randn(shape, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
    success = torch.arange(NUM_ANSWERS) < NUM_SUCCESSES
    log_success, first, second, gap = success_bounds(student, teacher, success.expand_as(student))
    excess = {"(1)": float((first - log_success).max()), "(2)": float((second - log_success).max())}
    return excess, float((log_success - first - gap).abs().max())


def _bound_path() -> dict[str, list[float]]:
    teacher, student = (torch.tensor(x, dtype=torch.float64) for x in (TEACHER, STUDENT))
    success = torch.arange(NUM_ANSWERS) < NUM_SUCCESSES
    logits, rows = student.log(), []
    for _ in range(PATH_STEPS + 1):
        rows.append(torch.stack(success_bounds(logits.softmax(-1), teacher, success)[:3]))
        logits = logits - PATH_STEP_SIZE * (logits.softmax(-1) - teacher)
    return dict(zip(("log J", "bound (1)", "bound (2)"), torch.stack(rows, 1).tolist(), strict=True))


def _estimator_error(num_samples: int = 16) -> float:
    errors = []
    for p in (0.03, 0.25, 0.6):
        for k in range(1, num_samples + 1):
            mean = sum(
                comb(num_samples, c) * p**c * (1 - p) ** (num_samples - c) * pass_at_k(num_samples, c, k)
                for c in range(num_samples + 1)
            )
            errors.append(abs(mean - (1 - (1 - p) ** k)))
    return max(errors)


def findings(result: SuccessResult) -> list[Finding]:
    rows = []
    for bound, excess in result.bound_excess.items():
        quantity = f"bound {bound} minus log success: largest"
        rows.append(
            Finding("success", quantity, f"{excess:+.1e}", f"{NUM_PAIRS} random pairs", verdict(excess < 1e-12))
        )
    path = result.bound_path["bound (2)"]
    rising = all(a <= b + 1e-12 for a, b in pairwise(path))
    quantity = "bound (2) rises at every forward CE step"
    rows.append(
        Finding("success", quantity, f"{path[0]:.2f} to {path[-1]:.2f}", f"{PATH_STEPS} steps", verdict(rising))
    )
    log_success = result.bound_path["log J"]
    measured = f"{log_success[0]:.2f} to {log_success[-1]:.2f}"
    rows.append(Finding("success", "log success on that path", measured, "teacher -0.22", ""))
    error = f"{result.estimator_error:.1e}"
    quantity = "1 - C(n-c, k) / C(n, k): largest bias, n = 16"
    rows.append(Finding("Pass@N", quantity, error, "1 - (1 - p)^k", verdict(result.estimator_error < 1e-12)))
    for floor, curves in result.pass_at_n.items():
        for name, curve in curves.items():
            measured = f"{curve[0]:.4f}  {curve[7]:.4f}  {curve[-1]:.4f} ± {result.spread[floor][name]:.3f}"
            compared = f"any mode: {result.pass_any_at_n[floor][name][0]:.3f} at 1"
            rows.append(Finding("Pass@N", f"{name}, floor {floor}: N = 1, 8, {MAX_N}", measured, compared, ""))
    return rows
