"""Problems of several decisions with every rollout enumerated: exact token-wise and sequence-level gradients.

A tabular student S(. | o) = softmax(logits[o]) meets each rollout y with probability pi(y) = prod_t S(y_t | o_t). With
C(y) the sum of the tokens' costs (forward cross-entropy, or KL), the two gradients of sum_y pi(y) C(y) are

    token-wise        sum_y pi(y) grad C(y)                             pi held fixed
    sequence-level    sum_y pi(y) grad C(y) + sum_y C(y) grad pi(y)     the whole derivative

Aliased problem: the first token L or R is free (the expert is indifferent), then the expert wants 0, 0 after L and
1, 1 after R, but the student's later steps do not see the first token. Reward 1 for L00 and R11.

Branch problem: the expert is indifferent between L and R; after L it is certain of the next of ten tokens, after R it
is uniform. The student sees everything.

`library_gradient` computes the same gradients with `fused_distil_loss`: one row per token of every rollout, hidden
states that are one-hot observations, so that the head's transpose is the table, and token weights pi(y).

Source: that token-wise gradients can settle at bad stationary points is the paper's claim; both problems are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from distil_kernels import fused_distil_loss
from studies.theory.finding import Finding, verdict

NEVER = -1000.0
"""Logit of a token that cannot occur: exp(-1000) is 0 in float64, and 0 times -1000 is 0."""


@dataclass(frozen=True)
class SequenceProblem:
    """A student's table, a teacher's table, and all `M` rollouts of `L` tokens that the student can make."""

    tokens: Tensor  # [M, L] int64
    student_states: Tensor  # [M, L] int64, rows of the student's table
    teacher_states: Tensor  # [M, L] int64, rows of the teacher's table
    start_logits: Tensor  # [student states, V]
    teacher_logits: Tensor  # [teacher states, V]
    context_probs: Tensor  # [M], probability of the choices that are not the student's (the hidden instance)

    @cached_property
    def logprob_map(self) -> Tensor:
        """A matrix [states * V, M] that maps the flattened log-probs of a table to log pi(y)."""
        return self._map(one_hot(self.tokens, self.start_logits.shape[1]).double())

    @cached_property
    def cost_map(self) -> Tensor:
        """A matrix [states * V, M] that maps the flattened log-probs of a table to minus the summed cross-entropies."""
        return self._map(self.teacher_logits.softmax(-1)[self.teacher_states])

    @cached_property
    def teacher_entropy(self) -> Tensor:
        """The teacher's entropy summed over each rollout's tokens, [M]."""
        teacher = self.teacher_logits.softmax(-1)
        return -(teacher * self.teacher_logits.log_softmax(-1)).sum(-1)[self.teacher_states].sum(-1)

    def _map(self, rows: Tensor) -> Tensor:
        """Adds up [M, L, V] rows by student state and rollout: [states * V, M]."""
        states = one_hot(self.student_states, self.start_logits.shape[0]).double()
        return torch.einsum("mls,mlv->svm", states, rows).flatten(0, 1)


@dataclass(frozen=True)
class Objective:
    """A cost ("ce" or "kl"), and whether each token is credited with the costs to come."""

    cost: str
    future_credit: bool


def rollout_logprobs(problem: SequenceProblem, logits: Tensor) -> Tensor:
    """The log-probs log pi(y), [..., M], of all rollouts under tables [..., states, V]."""
    return logits.log_softmax(-1).flatten(-2) @ problem.logprob_map


def exact_gradient(problem: SequenceProblem, logits: Tensor, objectives: Sequence[Objective]) -> Tensor:
    """The gradient [K, states, V] of sum_y pi(y) C(y) for K tables [K, states, V] with one objective each.

    Every token of a rollout is credited with all of C(y); costs up to the token itself cancel on average.
    """
    credited = torch.tensor([[float(objective.future_credit)] for objective in objectives], dtype=logits.dtype)
    is_kl = torch.tensor([[objective.cost == "kl"] for objective in objectives])
    logprobs = logits.log_softmax(-1).flatten(-2)
    probs = (logprobs @ problem.logprob_map).exp() * problem.context_probs
    costs = -(logprobs @ problem.cost_map) - is_kl * problem.teacher_entropy
    local = -(probs @ problem.cost_map.T)
    credit = (credited * probs * costs) @ problem.logprob_map.T
    upstream = (local + credit).view_as(logits)
    return upstream - logits.softmax(-1) * upstream.sum(-1, keepdim=True)


def library_gradient(problem: SequenceProblem, logits: Tensor, objective: Objective) -> Tensor:
    """The gradient [states, V] that `fused_distil_loss` gives one table, averaged over all rollouts."""
    num_rollouts, length = problem.tokens.shape
    table = logits.detach().clone().requires_grad_()
    probs = (rollout_logprobs(problem, table).exp() * problem.context_probs).detach()
    result = fused_distil_loss(
        one_hot(problem.student_states, table.shape[0]).flatten(0, 1).to(table.dtype),
        table.T,
        one_hot(problem.teacher_states, problem.teacher_logits.shape[0]).flatten(0, 1).to(table.dtype),
        problem.teacher_logits.T,
        tokens=problem.tokens.flatten(),
        cu_seqlens=length * torch.arange(num_rollouts + 1),
        token_weight=probs.repeat_interleave(length),
        cost=objective.cost,
        credit_span="future" if objective.future_credit else "none",
        normalizer=1.0,
        detach_hidden=True,
    )
    (gradient,) = torch.autograd.grad(result.loss, table)
    return gradient


def bounded_gradient(
    problem: SequenceProblem, logits: Tensor, teacher_ratio_clip: float | None, credit_clip: float | None
) -> Tensor:
    """The expected gradient [states, V] of cross-entropy with bounded future credit, against one sibling's costs."""
    teacher = problem.teacher_logits.softmax(-1)[problem.teacher_states]
    student = logits.log_softmax(-1)[problem.student_states]
    chosen = one_hot(problem.tokens, logits.shape[1]).to(logits.dtype)
    costs = -(teacher * student).sum(-1)
    to_come = costs.flip(1).cumsum(1).flip(1) - costs
    credit = to_come[:, None] - to_come  # [M, M, L]: of a rollout against each sibling
    if teacher_ratio_clip is not None:
        ratio = ((teacher * chosen).sum(-1) / (student.exp() * chosen).sum(-1)).clamp(max=teacher_ratio_clip)
        credit = ratio[:, None] * credit
    if credit_clip is not None:
        credit = credit.clamp(-credit_clip, credit_clip)
    probs = rollout_logprobs(problem, logits).exp() * problem.context_probs
    expected_credit = torch.einsum("mkl,k->ml", credit, probs)
    rows = student.exp() - teacher + expected_credit[..., None] * (chosen - student.exp())
    gradient = torch.zeros_like(logits)
    return gradient.index_add_(0, problem.student_states.flatten(), (probs[:, None, None] * rows).flatten(0, 1))


def descend(
    problem: SequenceProblem, objectives: Sequence[Objective], step_size: float, num_steps: int, record_every: int
) -> Tensor:
    """The tables [1 + num_steps / record_every, K, states, V] along a descent by exact gradient steps."""
    logits = problem.start_logits.expand(len(objectives), -1, -1)
    recorded = [logits]
    for step in range(1, num_steps + 1):
        logits = logits - step_size * exact_gradient(problem, logits, objectives)
        if step % record_every == 0:
            recorded.append(logits)
    return torch.stack(recorded)


def aliased_problem() -> SequenceProblem:
    """The problem whose later states do not show the student its first token."""
    tokens = torch.tensor(list(product((0, 1), repeat=3)))
    first = tokens[:, :1]
    return SequenceProblem(
        tokens=tokens,
        student_states=torch.arange(3).expand(8, 3),
        teacher_states=torch.cat([torch.zeros_like(first), first + 1, first + 1], 1),
        start_logits=torch.tensor([[0.02, 0.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64),
        teacher_logits=torch.tensor([[0.0, 0.0], [0.0, NEVER], [NEVER, 0.0]], dtype=torch.float64),
        context_probs=torch.ones(8, dtype=torch.float64),
    )


def aliased_reward(problem: SequenceProblem, logits: Tensor) -> Tensor:
    """The probability [...] of L00 or R11, the rollouts whose three tokens are equal."""
    is_rewarded = (problem.tokens == problem.tokens[:, :1]).all(1)
    return rollout_logprobs(problem, logits).exp()[..., is_rewarded].sum(-1)


def prob_left(logits: Tensor) -> Tensor:
    """The probability pi(L), [...], of tables [..., states, V]."""
    return logits[..., 0, :].softmax(-1)[..., 0]


def branch_problem(num_tokens: int = 10) -> SequenceProblem:
    """The problem whose expert is certain after L and uniform over `num_tokens` tokens after R."""
    tokens = torch.tensor(list(product((0, 1), range(num_tokens))))
    states = torch.stack([torch.zeros_like(tokens[:, 0]), tokens[:, 0] + 1], 1)
    first = torch.full((num_tokens,), NEVER, dtype=torch.float64)
    first[:2] = 0.0
    certain = torch.full_like(first, NEVER)
    certain[0] = 0.0
    uniform = torch.zeros_like(first)
    return SequenceProblem(
        tokens=tokens,
        student_states=states,
        teacher_states=states,
        start_logits=torch.stack([first, uniform, uniform]),
        teacher_logits=torch.stack([first, certain, uniform]),
        context_probs=torch.ones(tokens.shape[0], dtype=torch.float64),
    )


OBJECTIVES = {
    "token-wise": Objective("ce", future_credit=False),
    "sequence-level": Objective("ce", future_credit=True),
    "sequence-level, cost kl": Objective("kl", future_credit=True),
}
ALIASED_STEP_SIZE, ALIASED_STEPS = 0.3, 4000
BRANCH_STEP_SIZE, BRANCH_STEPS = 0.5, 3000
RECORD_EVERY = 20


@dataclass(frozen=True)
class TabularResult:
    """Curves by objective: a list has the values after 0, RECORD_EVERY, ... steps."""

    aliased_prob_left: dict[str, list[float]]
    aliased_reward: dict[str, list[float]]
    branch_prob_left: dict[str, list[float]]
    library_error: dict[str, float]
    """Largest |gradient of `fused_distil_loss` - exact gradient| over the recorded tables of both problems."""


def measure() -> TabularResult:
    aliased, branch = aliased_problem(), branch_problem()
    # A certain expert has no entropy: in the aliased problem the cost kl is the cost ce.
    names = [name for name, objective in OBJECTIVES.items() if objective.cost == "ce"]
    objectives = [OBJECTIVES[name] for name in names]
    aliased_tables = descend(aliased, objectives, ALIASED_STEP_SIZE, ALIASED_STEPS, RECORD_EVERY)
    branch_tables = descend(branch, list(OBJECTIVES.values()), BRANCH_STEP_SIZE, BRANCH_STEPS, RECORD_EVERY)
    errors = {
        name: max(
            largest_library_error(problem, tables[::20, names.index(name)], OBJECTIVES[name])
            for problem, tables, names in ((aliased, aliased_tables, names), (branch, branch_tables, list(OBJECTIVES)))
            if name in names
        )
        for name in OBJECTIVES
    }
    return TabularResult(
        aliased_prob_left=_by_name(names, prob_left(aliased_tables)),
        aliased_reward=_by_name(names, aliased_reward(aliased, aliased_tables)),
        branch_prob_left=_by_name(list(OBJECTIVES), prob_left(branch_tables)),
        library_error=errors,
    )


def largest_library_error(problem: SequenceProblem, tables: Tensor, objective: Objective) -> float:
    """The largest |library gradient - exact gradient| over tables [n, states, V]."""
    exact = exact_gradient(problem, tables, [objective] * len(tables))
    library = torch.stack([library_gradient(problem, table, objective) for table in tables])
    return float((library - exact).abs().max())


def _by_name(names: list[str], values: Tensor) -> dict[str, list[float]]:
    """Splits values [time, K] into one list for each of the K names."""
    return {name: values[:, i].tolist() for i, name in enumerate(names)}


def findings(result: TabularResult) -> list[Finding]:
    rows = []
    for name, rewards in result.aliased_reward.items():
        left = result.aliased_prob_left[name][-1]
        improves = rewards[-1] > rewards[0] + 0.1
        rows.append(Finding("aliased", f"{name}: pi(L)", f"{left:.3f}", f"after {ALIASED_STEPS} steps", ""))
        compared = f"start {rewards[0]:.3f}, best possible 1"
        rows.append(Finding("aliased", f"{name}: reward improves", f"{rewards[-1]:.3f}", compared, verdict(improves)))
    solution = stationary_prob_left(math.log(10))
    for name, values in result.branch_prob_left.items():
        expected = solution if name == "sequence-level" else 0.5
        compared = f"after {BRANCH_STEPS} steps; stationary at {expected:.3f}"
        is_stationary = abs(values[-1] - expected) < 5e-3
        rows.append(Finding("branch", f"{name}: pi(L)", f"{values[-1]:.3f}", compared, verdict(is_stationary)))
    for name, error in result.library_error.items():
        quantity = f"fused_distil_loss, {name}: error"
        rows.append(
            Finding("shipped op", quantity, f"{error:.1e}", "exact gradient, all rollouts", verdict(error < 1e-12))
        )
    return rows


def stationary_prob_left(cost_difference: float) -> float:
    """The a at which H((1/2, 1/2), (a, 1 - a)) - a * cost_difference is smallest.

    The derivative (2 a - 1) / (2 a (1 - a)) - c vanishes where c a^2 + (1 - c) a - 1/2 = 0.
    """
    c = cost_difference
    return ((c - 1) + math.sqrt((c - 1) ** 2 + 2 * c)) / (2 * c)
