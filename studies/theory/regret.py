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
from studies.theory.finding import Finding, held

NUM_STATES, NUM_OBSERVATIONS, NUM_ACTIONS, HORIZON = 6, 3, 3, 8
NUM_ROUNDS = 1000
CHECK_EVERY = 50
RADIUS = 6.0
GRADIENT_BOUND = math.sqrt(2.0)


@dataclass(frozen=True)
class World:
    transitions: Tensor  # [states, actions, states]
    teacher: Tensor  # [rounds, states, actions] probabilities
    observations: Tensor  # [states] int64


def random_world(seed: int, num_rounds: int) -> World:
    """Random transitions, two states an observation, a teacher whose feedback tilts it anew in every round.

    It never rules an action out: .02 of its weight is uniform, which keeps the best student's logits finite.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return 2.0 * torch.randn(shape, generator=generator, dtype=torch.float64)

    teacher_logits = normal(NUM_STATES, NUM_ACTIONS) + normal(num_rounds, NUM_STATES, NUM_ACTIONS)
    return World(
        transitions=normal(NUM_STATES, NUM_ACTIONS, NUM_STATES).softmax(-1),
        teacher=0.98 * teacher_logits.softmax(-1) + 0.02 / NUM_ACTIONS,
        observations=torch.arange(NUM_STATES) % NUM_OBSERVATIONS,
    )


def visited(world: World, student: Tensor) -> Tensor:
    """[states] share of time that student [observations, actions] spends in each state, starting in state 0."""
    step = torch.einsum("sa,sat->st", student[world.observations], world.transitions)
    state = one_hot(torch.tensor(0), NUM_STATES).to(step.dtype)
    total = state
    for _ in range(HORIZON - 1):
        state = state @ step
        total = total + state
    return total / HORIZON


@dataclass(frozen=True)
class RegretResult:
    """Lists: after each of `rounds`, by algorithm."""

    rounds: list[int]
    """About evenly spaced in the logarithm."""
    regret: dict[str, list[float]]
    bound: dict[str, list[float]]
    average_loss: dict[str, list[float]]
    best_average_loss: dict[str, list[float]]
    """Of the best fixed student in hindsight on the same rounds."""
    states_moved: dict[str, float]
    """Total variation between the visited states of the first and the last round."""
    comparator_norm: float
    """Largest norm of the best logits in hindsight after any round; gradient descent's bound needs at most RADIUS."""
    library_error: float
    """Largest |shipped op - closed form| over loss and gradient, every CHECK_EVERY rounds."""


def follow_the_leader_bound(num_rounds: int) -> float:
    share = num_rounds / NUM_OBSERVATIONS
    logs = math.log1p(share) + math.log1p(share / NUM_ACTIONS)
    return NUM_OBSERVATIONS * (1 + NUM_ACTIONS * logs)


def gradient_descent_bound(num_rounds: int) -> float:
    return 3 * RADIUS * GRADIENT_BOUND * math.sqrt(num_rounds)


BOUNDS = {"follow the leader": follow_the_leader_bound, "gradient descent": gradient_descent_bound}


def measure(seed: int, num_rounds: int = NUM_ROUNDS) -> RegretResult:
    world = random_world(seed, num_rounds)
    spaced = 10 ** torch.linspace(0, math.log10(num_rounds), 61, dtype=torch.float64)
    rounds = torch.cat([spaced.round().long(), torch.tensor([10, 100])]).clamp(max=num_rounds).unique()
    regret, average, best_average, moved, norms, errors = {}, {}, {}, {}, [], []
    for name in BOUNDS:
        run = _run(world, name)
        regret[name] = (run.losses.cumsum(0) - run.best)[rounds - 1].tolist()
        average[name] = (run.losses.cumsum(0)[rounds - 1] / rounds).tolist()
        best_average[name] = (run.best[rounds - 1] / rounds).tolist()
        moved[name] = float((run.states[-1] - run.states[0]).abs().sum() / 2)
        norms.append(float(run.best_norms.max()))
        errors.append(run.library_error)
    bound = {name: [of(n) for n in rounds.tolist()] for name, of in BOUNDS.items()}
    return RegretResult(rounds.tolist(), regret, bound, average, best_average, moved, max(norms), max(errors))


def leader_logits(counts: Tensor) -> Tensor:
    """Of follow the leader, one count added to each action."""
    return (counts + 1).log()


class _Run(NamedTuple):
    losses: Tensor  # [rounds]
    best: Tensor  # [rounds], cumulative loss of the best student so far
    best_norms: Tensor  # [rounds], of its centred logits
    states: Tensor  # [rounds, states]
    library_error: float


def _run(world: World, algorithm: str) -> _Run:
    counts = torch.zeros(NUM_OBSERVATIONS, NUM_ACTIONS, dtype=torch.float64)
    logits = torch.zeros_like(counts)
    losses, all_counts, states, error = [], [], [], 0.0
    for n, teacher in enumerate(world.teacher, start=1):
        logprobs = logits.log_softmax(-1)
        mass = visited(world, logprobs.exp())
        answers = torch.zeros_like(counts).index_add(0, world.observations, mass[:, None] * teacher)
        loss = -(answers * logprobs).sum()
        gradient = answers.sum(-1, keepdim=True) * logprobs.exp() - answers
        if n % CHECK_EVERY == 0:
            shipped = library_loss_and_gradient(world, teacher, logits, mass)
            error = max(error, float((shipped[0] - loss).abs()), float((shipped[1] - gradient).abs().max()))
        counts = counts + answers
        losses.append(loss)
        all_counts.append(counts)
        states.append(mass)
        if algorithm == "follow the leader":
            logits = leader_logits(counts)
        else:
            logits = logits - 2 * RADIUS / (GRADIENT_BOUND * math.sqrt(n)) * gradient
            logits = logits * min(1.0, RADIUS / max(float(logits.norm()), 1e-30))
    aggregated = torch.stack(all_counts)
    best_logprobs = (aggregated / aggregated.sum(-1, keepdim=True)).log()
    best_logits = best_logprobs - best_logprobs.mean(-1, keepdim=True)
    best = -(aggregated * best_logprobs).sum((-2, -1))
    return _Run(torch.stack(losses), best, best_logits.flatten(1).norm(dim=1), torch.stack(states), error)


def library_loss_and_gradient(world: World, teacher: Tensor, logits: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """l_n and its gradient in the table [observations, actions], from the shipped op."""
    table = logits.clone().requires_grad_()
    loss = fused_forward_ce(
        one_hot(world.observations, NUM_OBSERVATIONS).to(table.dtype),
        table.T,
        torch.eye(NUM_STATES, dtype=table.dtype),
        teacher.log().T,
        token_weight=mass,
        reduction="sum",
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
            rows.append(Finding("regret", f"{name}: after {n} rounds", f"{regret[i]:.3f}", compared, held(below)))
        excess = result.average_loss[name][-1] - result.best_average_loss[name][-1]
        compared = f"best fixed student {result.best_average_loss[name][-1]:.4f}"
        quantity = f"{name}: average above the best, nats"
        rows.append(Finding("regret", quantity, f"{excess:.5f}", compared, ""))
    compared = f"its bound needs at most {RADIUS:g}"
    measured = f"{result.comparator_norm:.2f}"
    good = held(result.comparator_norm <= RADIUS)
    rows.append(Finding("regret", "gradient descent: norm of the best logits", measured, compared, good))
    error = f"{result.library_error:.1e}"
    quantity = "fused_forward_ce on the visited states: error"
    rows.append(Finding("shipped op", quantity, error, "closed form", held(result.library_error < 1e-12)))
    return rows
