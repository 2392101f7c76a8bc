"""A lower bound on the success probability, and Pass@N of students trained to convergence.

Bound. R(y) in {0, 1}, J(pi) = sum_y pi(y) R(y), teacher T with J_T = J(T) > 0, T_R(y) = T(y) R(y) / J_T its successes:

    log J(pi) = H(T_R) - H(T_R, pi) + KL(T_R || pi_R)            pi_R the student's successes
              >= H(T_R) - H(T_R, pi)                             (1) the teacher-weighted likelihood of successes
              >= H(T_R) - H(T, pi) / J_T                         (2) the forward cross-entropy to the whole teacher

(1) is Jensen's inequality with the gap written out; (2) holds because no term T(y) (-log pi(y)) is negative. So
lowering the forward cross-entropy raises a lower bound on log J, and on Pass@N = 1 - (1 - J)^N, for every N.

Pass@N. An answer is a pair (i, j), i, j < 4. The instance z is hidden from the student; only (z, z) solves it. The
teacher has seen feedback: .70 on (z, z), .25 over the other diagonal pairs, .05 over all sixteen. One student is too
small (it draws i and j independently), one can represent everything. Each minimises the mean over z of a divergence
between whole-answer distributions, or the on-policy sum of token cross-entropies with or without future credit.

Source: that the objective optimises a lower bound on the teacher-weighted likelihood of success, and that this lifts
Pass@N, is the paper's claim (abstract); (1) and (2), the problem and its reading are ours. pass@k is the unbiased
estimator of Chen et al. (2021), 1 - C(n - c, k) / C(n, k).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

from distil_kernels.theory.finding import Finding, held

NUM_PAIRS = 100_000
NUM_ANSWERS, NUM_SUCCESSES = 8, 3
NUM_MODES = 4
NUM_STARTS = 8
START_SCALE = 0.1
STEP_SIZE, NUM_STEPS = 0.5, 4000
MAX_N = 64
OBJECTIVES = ("forward CE", "reverse KL", "JSD", "on-policy CE", "on-policy CE + credit")


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the probability that one of k answers is correct, from n answers of which c are."""
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(f"[pass_at_k] needs 0 <= c <= n and 1 <= k <= n, got n={num_samples}, c={num_correct}, k={k}")
    return 1 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def success_bounds(student: Tensor, teacher: Tensor, success: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log J(pi), bound (1), bound (2), and KL(T_R || pi_R), each [...]; distributions and `success` are [..., A]."""
    success = success.to(student.dtype)
    teacher_success = (teacher * success).sum(-1, keepdim=True)
    teacher_right = teacher * success / teacher_success
    entropy = -torch.special.xlogy(teacher_right, teacher_right).sum(-1)
    log_success = (student * success).sum(-1).log()
    likelihood = (teacher_right * student.log()).sum(-1)
    whole = (teacher * student.log()).sum(-1) / teacher_success.squeeze(-1)
    gap = -entropy - likelihood + log_success
    return log_success, entropy + likelihood, entropy + whole, gap


@dataclass(frozen=True)
class SuccessResult:
    bound_violation: float
    """Largest amount by which a bound exceeded log J over NUM_PAIRS random pairs (negative: never)."""
    bound_path: dict[str, list[float]]
    """Mean over instances along a forward CE descent of the small student: log J, both bounds."""
    pass_at_n: dict[str, dict[str, list[float]]]
    """student -> objective -> probability that N = 1 ... MAX_N answers solve the instance; mean over starts."""
    pass_any_at_n: dict[str, dict[str, list[float]]]
    """The same where any diagonal answer counts."""
    pass_1_spread: dict[str, dict[str, float]]
    """Standard deviation over starts of the first instance-wise number."""
    largest_gradient: float


def measure(seed: int) -> SuccessResult:
    raise NotImplementedError
