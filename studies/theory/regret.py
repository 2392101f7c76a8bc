"""The DAgger loop as online learning: cumulative regret against its bounds as rounds grow.

Round n: roll out the student S_n; its states have distribution d_n (average over the horizon), which depends on every
earlier update; the round's loss is the local part of the objective on those states,

    l_n(S) = sum_s d_n(s) H(T_n(. | s), S(. | o(s)))        regret_N = sum_n l_n(S_n) - min_S sum_n l_n(S).

The student sees o(s) only, so that two states may share an observation and the minimum is not zero; the teacher T_n
changes from round to round with its feedback. With C(o, a) = sum_n sum_{s: o(s) = o} d_n(s) T_n(a | s) and
M(o) = sum_a C(o, a) the minimum is at S(a | o) = C / M.

Follow the leader    S_{n+1} = (C + 1) / (M + A): forward cross-entropy on the aggregated data, one count added (O
observations, A actions).   regret_N <= O (1 + A log(1 + N / O) + A log(1 + N / (O A)))

Gradient descent     logits_{n+1} = project(logits_n - eta_n g_n), eta_n = 2 R / (G sqrt(n)), g_n the token-wise
gradient (that of `fused_forward_ce` with rows weighted by d_n), on the ball of radius R; |g_n| <= G = sqrt(2).
regret_N <= 3 R G sqrt(N) against every student with logits in the ball.

Neither speaks about the future-credit term: its loss is not l_n.
Source: the reduction is Ross, Gordon and Bagnell (2011), the second bound Zinkevich's (2003) as in Hazan (2016,
theorem 3.1); the first, with its proof in docs/theory.md, is ours from standard parts (be the leader: Kalai and
Vempala 2005). The paper claims a regret guarantee; we do not know its form.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from distil_kernels import fused_forward_ce
from studies.theory.finding import Finding, verdict

NUM_STATES, NUM_OBSERVATIONS, NUM_ACTIONS, HORIZON = 6, 3, 3, 8
NUM_ROUNDS = 1000
CHECK_EVERY = 50
RADIUS = 6.0
GRADIENT_BOUND = math.sqrt(2.0)


@dataclass(frozen=True)
class Environment:
    """A Markov decision process seen through observations, and a teacher for each round."""

    transitions: Tensor  # [states, actions, states]
    teacher: Tensor  # [rounds, states, actions] probabilities
    observations: Tensor  # [states] int64


def random_environment(seed: int, num_rounds: int) -> Environment:
    """Draws transitions, pairs of states that share an observation, and a teacher that feedback tilts anew each round.

    The teacher never rules an action out: .02 of its weight is uniform, which keeps the best student's logits finite.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return 2.0 * torch.randn(shape, generator=generator, dtype=torch.float64)

    teacher_logits = normal(NUM_STATES, NUM_ACTIONS) + normal(num_rounds, NUM_STATES, NUM_ACTIONS)
    return Environment(
        transitions=normal(NUM_STATES, NUM_ACTIONS, NUM_STATES).softmax(-1),
        teacher=0.98 * teacher_logits.softmax(-1) + 0.02 / NUM_ACTIONS,
        observations=torch.arange(NUM_STATES) % NUM_OBSERVATIONS,
    )


def state_distribution(environment: Environment, student: Tensor) -> Tensor:
    """The share of time [states] that a student [observations, actions] spends in each state, starting in state 0."""
    step = torch.einsum("sa,sat->st", student[environment.observations], environment.transitions)
    state = one_hot(torch.tensor(0), NUM_STATES).to(step.dtype)
    total = state
    for _ in range(HORIZON - 1):
        state = state @ step
        total = total + state
    return total / HORIZON


@dataclass(frozen=True)
class RegretResult:
    """Curves by algorithm: a list has the values after each of `rounds`."""

    rounds: list[int]
    """Numbers of rounds, about evenly spaced in the logarithm."""
    regret: dict[str, list[float]]
    bound: dict[str, list[float]]
    average_loss: dict[str, list[float]]
    best_average_loss: dict[str, list[float]]
    """Average loss of the best fixed student in hindsight on the same rounds."""
    states_moved: dict[str, float]
    """Total variation between the state distributions of the first and the last round."""
    comparator_norm: float
    """Largest norm of the best logits in hindsight after any round; gradient descent's bound holds up to RADIUS."""
    library_error: float
    """Largest |`fused_forward_ce` - closed form| over loss and gradient, every CHECK_EVERY rounds."""


def follow_the_leader_bound(num_rounds: int) -> float:
    share = num_rounds / NUM_OBSERVATIONS
    logs = math.log1p(share) + math.log1p(share / NUM_ACTIONS)
    return NUM_OBSERVATIONS * (1 + NUM_ACTIONS * logs)


def gradient_descent_bound(num_rounds: int) -> float:
    return 3 * RADIUS * GRADIENT_BOUND * math.sqrt(num_rounds)


BOUNDS = {"follow the leader": follow_the_leader_bound, "gradient descent": gradient_descent_bound}


def measure(seed: int, num_rounds: int = NUM_ROUNDS) -> RegretResult:
    environment = random_environment(seed, num_rounds)
    spaced = 10 ** torch.linspace(0, math.log10(num_rounds), 61, dtype=torch.float64)
    rounds = torch.cat([spaced.round().long(), torch.tensor([10, 100])]).clamp(max=num_rounds).unique()
    regret, average, best_average, shift, norms, errors = {}, {}, {}, {}, [], []
    for name in BOUNDS:
        curves = _dagger_loop(environment, name)
        regret[name] = (curves.losses.cumsum(0) - curves.best_losses)[rounds - 1].tolist()
        average[name] = (curves.losses.cumsum(0)[rounds - 1] / rounds).tolist()
        best_average[name] = (curves.best_losses[rounds - 1] / rounds).tolist()
        shift[name] = float((curves.state_probs[-1] - curves.state_probs[0]).abs().sum() / 2)
        norms.append(float(curves.best_norms.max()))
        errors.append(curves.library_error)
    bound = {name: [bound_of(n) for n in rounds.tolist()] for name, bound_of in BOUNDS.items()}
    return RegretResult(rounds.tolist(), regret, bound, average, best_average, shift, max(norms), max(errors))


def leader_logits(counts: Tensor) -> Tensor:
    """The logits of follow the leader: one count is added to each action."""
    return (counts + 1).log()


class _Curves(NamedTuple):
    losses: Tensor  # [rounds]
    best_losses: Tensor  # [rounds], cumulative loss of the best student so far
    best_norms: Tensor  # [rounds], norm of the best student's centred logits
    state_probs: Tensor  # [rounds, states]
    library_error: float


def _dagger_loop(environment: Environment, algorithm: str) -> _Curves:
    """Runs every round of one algorithm of BOUNDS."""
    counts = torch.zeros(NUM_OBSERVATIONS, NUM_ACTIONS, dtype=torch.float64)
    logits = torch.zeros_like(counts)
    losses, count_history, state_history, error = [], [], [], 0.0
    for n, teacher in enumerate(environment.teacher, start=1):
        logprobs = logits.log_softmax(-1)
        state_probs = state_distribution(environment, logprobs.exp())
        labels = torch.zeros_like(counts).index_add(0, environment.observations, state_probs[:, None] * teacher)
        loss = -(labels * logprobs).sum()
        gradient = labels.sum(-1, keepdim=True) * logprobs.exp() - labels
        if n % CHECK_EVERY == 0:
            library_loss, library_gradient = library_loss_and_gradient(environment, teacher, logits, state_probs)
            error = max(error, float((library_loss - loss).abs()), float((library_gradient - gradient).abs().max()))
        counts = counts + labels
        losses.append(loss)
        count_history.append(counts)
        state_history.append(state_probs)
        if algorithm == "follow the leader":
            logits = leader_logits(counts)
        else:
            logits = logits - 2 * RADIUS / (GRADIENT_BOUND * math.sqrt(n)) * gradient
            logits = logits * min(1.0, RADIUS / max(float(logits.norm()), 1e-30))
    aggregated = torch.stack(count_history)
    best_logprobs = (aggregated / aggregated.sum(-1, keepdim=True)).log()
    best_logits = best_logprobs - best_logprobs.mean(-1, keepdim=True)
    best_losses = -(aggregated * best_logprobs).sum((-2, -1))
    return _Curves(
        torch.stack(losses), best_losses, best_logits.flatten(1).norm(dim=1), torch.stack(state_history), error
    )


def library_loss_and_gradient(
    environment: Environment, teacher: Tensor, logits: Tensor, state_probs: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss l_n and its gradient in the table [observations, actions], from `fused_forward_ce`."""
    table = logits.clone().requires_grad_()
    loss = fused_forward_ce(
        one_hot(environment.observations, NUM_OBSERVATIONS).to(table.dtype),
        table.T,
        torch.eye(NUM_STATES, dtype=table.dtype),
        teacher.log().T,
        token_weight=state_probs,
        reduction="sum",
        detach_hidden=True,
    )
    (gradient,) = torch.autograd.grad(loss, table)
    return loss.detach(), gradient


def findings(result: RegretResult) -> list[Finding]:
    rows = []
    for name, regret in result.regret.items():
        below = all(r <= b for r, b in zip(regret, result.bound[name], strict=True))
        for n in (10, 100, result.rounds[-1]):
            i = result.rounds.index(n)
            compared = f"bound {result.bound[name][i]:.1f}"
            rows.append(Finding("regret", f"{name}: after {n} rounds", f"{regret[i]:.3f}", compared, verdict(below)))
        excess = result.average_loss[name][-1] - result.best_average_loss[name][-1]
        compared = f"best fixed student {result.best_average_loss[name][-1]:.4f}"
        quantity = f"{name}: average above the best, nats"
        rows.append(Finding("regret", quantity, f"{excess:.5f}", compared, ""))
    compared = f"its bound needs at most {RADIUS:g}"
    measured = f"{result.comparator_norm:.2f}"
    in_ball = verdict(result.comparator_norm <= RADIUS)
    rows.append(Finding("regret", "gradient descent: norm of the best logits", measured, compared, in_ball))
    error = f"{result.library_error:.1e}"
    quantity = "fused_forward_ce on the visited states: error"
    rows.append(Finding("shipped op", quantity, error, "closed form", verdict(result.library_error < 1e-12)))
    return rows
