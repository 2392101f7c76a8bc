"""What the credit is in expectation: every rollout of a small policy is enumerated, so that expected gradients of
`fused_distil_loss` are exact and can be compared with finite differences of the expected cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
from torch import Tensor

from distil_kernels import DistilLoss, fused_distil_loss
from distil_kernels.train.baseline import PositionAverage

Rollout = tuple[int, ...]
NUM_TOKENS = 3
STOP = 0


class Tree:
    """A policy over three tokens for up to two steps; states are the prefixes, logits [states, 3] the parameters.

    Args:
        stops: token 0 ends a rollout, so that lengths differ.
    """

    def __init__(self, generator: torch.Generator, *, num_steps: int = 2, stops: bool = True) -> None:
        every = product(range(NUM_TOKENS), repeat=num_steps)
        cut = [y[: y.index(STOP) + 1] if stops and STOP in y else y for y in every]
        self.rollouts = list(dict.fromkeys(cut))
        self.prefixes = sorted({y[:t] for y in self.rollouts for t in range(len(y))})

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.logits = normal(len(self.prefixes), NUM_TOKENS)
        self.by_prefix = normal(len(self.prefixes), NUM_TOKENS)
        """Teacher's logits where the feedback comes from outside."""
        self.by_rollout = {y: normal(len(y), NUM_TOKENS) for y in self.rollouts}
        """Teacher's logits where the feedback is computed from the rollout."""

    def states(self, rollout: Rollout) -> list[int]:
        return [self.prefixes.index(rollout[:t]) for t in range(len(rollout))]

    def teacher(self, rollout: Rollout, from_rollout: bool) -> Tensor:
        return self.by_rollout[rollout] if from_rollout else self.by_prefix[self.states(rollout)]

    def logprobs(self, rollout: Rollout, logits: Tensor) -> Tensor:
        return logits[self.states(rollout)].log_softmax(-1)[range(len(rollout)), list(rollout)]

    def expected_cost(self, logits: Tensor, from_rollout: bool = False) -> Tensor:
        """E_{y ~ S}[sum_t H(T_t, S_t)]."""
        total = logits.new_zeros(())
        for y in self.rollouts:
            log_s = logits[self.states(y)].log_softmax(-1)
            cost = -(self.teacher(y, from_rollout).softmax(-1) * log_s).sum()
            total = total + self.logprobs(y, logits).sum().exp() * cost
        return total

    def exact(self, from_rollout: bool = False, step: float = 1e-6) -> Tensor:
        """Gradient of the expected cost by finite differences."""
        gradient = torch.zeros_like(self.logits)
        for index in product(range(len(self.prefixes)), range(NUM_TOKENS)):
            shift = torch.zeros_like(self.logits)
            shift[index] = step
            ahead, behind = (self.expected_cost(self.logits + s, from_rollout) for s in (shift, -shift))
            gradient[index] = (ahead - behind) / (2 * step)
        return gradient

    def loss(self, logits: Tensor, batch: Sequence[Rollout], *, from_rollout: bool = False, **options) -> DistilLoss:
        """The op on a batch: hidden states are the logits, the head is the identity."""
        identity = torch.eye(NUM_TOKENS, dtype=torch.float64)
        return fused_distil_loss(
            logits[[state for y in batch for state in self.states(y)]], identity,
            torch.cat([self.teacher(y, from_rollout) for y in batch]), identity,
            tokens=torch.tensor([token for y in batch for token in y]),
            cu_seqlens=torch.tensor([0, *map(len, batch)]).cumsum(0), **options,
        )  # fmt: skip

    def gradient(self, batch: Sequence[Rollout], **options) -> Tensor:
        logits = self.logits.clone().requires_grad_()
        return torch.autograd.grad(self.loss(logits, batch, **options).loss, logits)[0]

    def expectation(
        self,
        of: Callable[[tuple[Rollout, ...]], Tensor],
        num_rollouts: int = 1,
        sampled_from: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Over batches of independent rollouts; `sampled_from` has the logits that each is sampled from."""
        policies = sampled_from or [self.logits] * num_rollouts
        total = torch.zeros_like(self.logits)
        for batch in product(self.rollouts, repeat=num_rollouts):
            logprob = sum(self.logprobs(y, policy).sum() for y, policy in zip(batch, policies, strict=True))
            total += logprob.exp() * of(batch)
        return total

    def expected_gradient(self, num_rollouts: int = 1, **options) -> Tensor:
        return self.expectation(lambda batch: self.gradient(batch, **options), num_rollouts)


def assert_same(ours: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-8)


def assert_biased(ours: Tensor, exact: Tensor) -> None:
    assert (ours - exact).abs().max() > 1e-3


# Spans


@pytest.mark.parametrize("from_rollout", [False, True])
def test_sequence_span_is_the_exact_gradient(from_rollout, generator):
    tree = Tree(generator)
    assert_same(tree.expected_gradient(credit_span="sequence", from_rollout=from_rollout), tree.exact(from_rollout))


def test_future_span_is_exact_for_feedback_from_outside(generator):
    tree = Tree(generator)
    assert_same(tree.expected_gradient(), tree.exact())


def test_future_span_is_biased_for_feedback_from_the_rollout(generator):
    tree = Tree(generator)
    assert_biased(tree.expected_gradient(from_rollout=True), tree.exact(True))


def test_token_wise_gradient_is_another(generator):
    tree = Tree(generator)
    assert_biased(tree.expected_gradient(credit_span="none"), tree.exact())


@pytest.mark.parametrize(
    "settings",
    [
        {"discount": 0.5},
        {"horizon": 1},
        {"normalize_by_remaining": True},
        {"teacher_ratio_clip": 1.0},
        {"credit_clip": 0.3},
        {"credit_scale": 0.5},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_settings_that_are_called_biased_are(settings, generator):
    tree = Tree(generator, num_steps=3)
    exact = tree.expected_gradient()
    assert_same(exact, tree.exact())
    assert_biased(tree.expected_gradient(**settings), exact)


def test_a_cost_at_its_own_position_teaches_nothing_as_a_reward(generator):
    """a_t = cost_t (discount 0, baseline -cost_t): each rollout's gradient moves, their expectation does not."""
    tree = Tree(generator)

    def with_own_cost(batch: tuple[Rollout, ...]) -> Tensor:
        ce = tree.loss(tree.logits, batch).stats.ce
        return tree.gradient(batch, discount=0.0, baseline=-ce)

    local = tree.expected_gradient(credit_span="none")
    assert_same(tree.expectation(with_own_cost), local)
    one = (tree.rollouts[-1],)
    assert_biased(with_own_cost(one), tree.gradient(one, credit_span="none"))


# Baselines


@pytest.mark.parametrize("num_rollouts", [2, 3])
@pytest.mark.parametrize(("span", "from_rollout"), [("future", False), ("sequence", True)])
def test_leave_one_out_is_unbiased(span, from_rollout, num_rollouts, generator):
    """Lengths differ: siblings that have ended count as 0."""
    tree = Tree(generator)
    settings = {"credit_span": span, "from_rollout": from_rollout}
    ours = tree.expected_gradient(num_rollouts, baseline="leave_one_out", group_size=num_rollouts, **settings)
    assert_same(ours, tree.exact(from_rollout))


@pytest.mark.parametrize("num_rollouts", [2, 3])
def test_position_mean_takes_its_own_share_of_the_credit(num_rollouts, generator):
    """With n rollouts at a position the expected credit is (n - 1) / n of the true one, which a scale gives back."""
    tree = Tree(generator)
    share = (num_rollouts - 1) / num_rollouts
    ours = tree.expected_gradient(num_rollouts, baseline="position_mean")
    assert_biased(ours, tree.exact())
    assert_same(ours, tree.expected_gradient(credit_scale=share))
    assert_same(tree.expected_gradient(num_rollouts, baseline="position_mean", credit_scale=1 / share), tree.exact())


@pytest.mark.parametrize("own_batch_too", [False, True])
def test_moving_average_of_earlier_batches_is_unbiased(own_batch_too, generator):
    """An earlier batch of one rollout, from another policy; biased as soon as the batch itself is in the average."""
    tree = Tree(generator)
    earlier = torch.randn(tree.logits.shape, generator=generator, dtype=torch.float64)

    def gradient(batches: tuple[Rollout, ...]) -> Tensor:
        average = PositionAverage(2, 0.5, torch.device("cpu"))
        for y in batches if own_batch_too else batches[:1]:
            average.observe(tree.loss(tree.logits, [y]).cost_to_go, [len(y)])
            average.follow()
        now = batches[1:]
        return tree.gradient(now, baseline=average.values([len(y) for y in now]))

    ours = tree.expectation(gradient, 2, sampled_from=[earlier, tree.logits])
    (assert_biased if own_batch_too else assert_same)(ours, tree.exact())


# Importance weights


def expected_from(tree: Tree, behaviour: Tensor, **options) -> Tensor:
    """Expected gradient of one rollout sampled from the behaviour's logits and weighted by the op."""

    def gradient(batch: tuple[Rollout, ...]) -> Tensor:
        return tree.gradient(batch, behaviour_logprobs=tree.logprobs(batch[0], behaviour), **options)

    return tree.expectation(gradient, sampled_from=[behaviour])


@pytest.mark.parametrize(("span", "from_rollout"), [("future", False), ("sequence", True)])
def test_token_ratio_is_exact_for_one_token(span, from_rollout, generator):
    tree = Tree(generator, num_steps=1)
    behaviour = torch.randn(tree.logits.shape, generator=generator, dtype=torch.float64)
    settings = {"credit_span": span, "from_rollout": from_rollout}
    assert_same(expected_from(tree, behaviour, **settings), tree.exact(from_rollout))
    assert_biased(expected_from(tree, behaviour, importance_clip=0.5, **settings), tree.exact(from_rollout))


def test_token_ratio_is_exact_where_the_last_token_alone_is_older(generator):
    tree = Tree(generator, stops=False)
    behaviour = tree.logits + torch.randn(tree.logits.shape, generator=generator, dtype=torch.float64)
    behaviour[0] = tree.logits[0]
    assert_same(expected_from(tree, behaviour), tree.exact())


def test_token_ratio_does_not_mend_the_states(generator):
    tree = Tree(generator, stops=False)
    behaviour = tree.logits.clone()
    behaviour[0] = -tree.logits[0] + torch.tensor([1.0, 0.0, -1.0])
    assert_biased(expected_from(tree, behaviour), tree.exact())


# Early ends


def tree_with_early_ends(generator: torch.Generator, num_steps: int) -> tuple[Tree, list[bool]]:
    """Costs several nats to come wherever it goes on; and the states whose teacher rules the end out."""
    tree = Tree(generator, num_steps=num_steps)
    tree.logits[0] = 0.0
    tree.logits[1:] = torch.tensor([0.0, -2.0, 0.0])  # the teacher is sure of what the student hardly samples
    tree.by_prefix[1:, 1] += 20.0
    goes_on = [len(prefix) < num_steps - 1 for prefix in tree.prefixes]
    tree.by_prefix[goes_on, STOP] = -1000.0
    return tree, goes_on


@pytest.mark.parametrize("clip", [0.1, 0.3, 0.5])
@pytest.mark.parametrize(("num_steps", "baseline"), [(3, None), (2, "leave_one_out")])
def test_a_bound_keeps_the_gradient_near_the_teacher(clip, num_steps, baseline, generator):
    """S (1 - 2 clip) - T <= gradient / (how often the state is reached) <= S (1 + 2 clip) - T for every token, so a
    token that the teacher rules out never gains with a bound of half a nat; without one an end does.
    """
    tree, goes_on = tree_with_early_ends(generator, num_steps)
    settings = {} if baseline is None else {"num_rollouts": 2, "baseline": baseline, "group_size": 2}
    student, teacher = tree.logits.softmax(-1), tree.by_prefix.softmax(-1)
    paths = [[(tree.prefixes.index(s[:t]), token) for t, token in enumerate(s)] for s in tree.prefixes]
    reached = torch.tensor([math.prod(float(student[at]) for at in path) for path in paths]).double()

    gradient = tree.expected_gradient(**settings, credit_clip=clip) / reached[:, None]
    assert bool((gradient >= student * (1 - 2 * clip) - teacher - 1e-6).all())
    assert bool((gradient <= student * (1 + 2 * clip) - teacher + 1e-6).all())
    assert tree.expected_gradient(**settings)[0, STOP] < 0 <= gradient[goes_on, STOP].min() + 1e-6


@pytest.mark.parametrize("settings", [{}, {"credit_clip": 1.0}])
def test_a_token_that_the_teacher_rules_out_has_no_credit(settings, generator):
    """With the teacher's ratio its logit falls by S (1 - m), m the mean credit of the others, here below 1."""
    tree, _ = tree_with_early_ends(generator, 2)
    settings = settings | {"baseline": "leave_one_out", "group_size": 2, "teacher_ratio_clip": 1.0}
    for rollout in tree.rollouts:
        credit = tree.loss(tree.logits, (rollout, rollout), **settings).credit
        assert rollout[0] != STOP or credit[0] == 0
    assert tree.expected_gradient(2, baseline="leave_one_out", group_size=2)[0, STOP] < 0
    assert tree.expected_gradient(2, **settings)[0, STOP] > 0
