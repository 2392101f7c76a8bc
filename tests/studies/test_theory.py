"""The numbers of docs/theory.md, and the mathematics behind them checked by other means: autograd, finite differences,
plain loops, the Fisher matrix, an adversary."""

import dataclasses
import importlib.util
import json
import math
from itertools import product

import pytest
import torch
from torch.nn.functional import one_hot

from distil_kernels import fused_distil_loss, fused_forward_ce
from studies.theory import bandit, regret, success, tabular
from studies.theory import results as theory_results


@pytest.fixture(scope="module")
def results() -> theory_results.Results:
    return theory_results.measure(seed=0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def simplex(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).softmax(-1)


# One decision


def test_bandit_numbers(results):
    first_order = results.bandit.first_order
    assert first_order["forward_ce"] == pytest.approx(0.0270, abs=1e-10)
    assert first_order["reverse_kl"] == pytest.approx(-0.10620, abs=5e-6)
    assert first_order["jsd"] == pytest.approx(-0.00775, abs=5e-6)
    after_five = {name: rewards[5] for name, rewards in results.bandit.rewards.items()}
    assert after_five == pytest.approx({"forward_ce": 0.5349, "reverse_kl": 0.2987, "jsd": 0.3845}, abs=5e-5)
    # All three reach the teacher in the end: they differ in the way there.
    for name, at_least in (("forward_ce", 0.70), ("reverse_kl", 0.70), ("jsd", 0.64)):
        assert results.bandit.rewards[name][-1] > at_least


@pytest.mark.parametrize("name", bandit.GRADIENTS)
def test_gradients_agree_with_autograd(name, generator):
    teacher, student = simplex(generator, 2, 7, 5)
    logits = student.log().requires_grad_()
    probs = logits.softmax(-1)
    middle = (probs + teacher) / 2
    loss = {
        "forward_ce": -(teacher * probs.log()).sum(),
        "reverse_kl": (probs * (probs / teacher).log()).sum(),
        "jsd": ((probs * (probs / middle).log()).sum() + (teacher * (teacher / middle).log()).sum()) / 2,
    }[name]
    (expected,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(bandit.GRADIENTS[name](student, teacher), expected, rtol=0, atol=1e-14)


def test_shipped_forward_ce_takes_the_same_step(generator):
    teacher, student = simplex(generator, 2, 4)
    table = student.log()[None].requires_grad_()
    hidden = torch.ones(1, 1, dtype=torch.float64)
    fused_forward_ce(hidden, table.T, hidden, teacher.log()[:, None], detach_hidden=True).backward()  # a table learns
    torch.testing.assert_close(table.grad[0], bandit.forward_ce_gradient(student, teacher), rtol=0, atol=1e-14)


def test_natural_step_inverts_the_fisher_matrix(generator):
    teacher, student = simplex(generator, 2, 6)
    gradient = bandit.jsd_gradient(student, teacher)
    fisher = student.diag() - student.outer(student)
    torch.testing.assert_close(fisher @ (gradient / student), gradient, rtol=0, atol=1e-15)
    torch.testing.assert_close(
        bandit.natural_change(student, teacher, gradient),
        -(fisher @ teacher) @ torch.linalg.pinv(fisher, hermitian=True) @ gradient,
        rtol=0,
        atol=1e-13,
    )


def test_natural_step_gains_the_teachers_advantage(results):
    assert results.bandit.identity_error < 1e-14


def test_shares_of_pairs_that_a_step_hurts(results):
    expected = {
        "any better teacher": {"plain": (0.136, 0.198, 0.165), "natural": (0.0, 0.137, 0.078)},
        "better by 0.1 or more": {"plain": (0.052, 0.118, 0.081), "natural": (0.0, 0.061, 0.019)},
        "student tilted to reward": {"plain": (0.063, 0.071, 0.066), "natural": (0.0, 0.029, 0.013)},
    }
    assert set(results.bandit.hurts) == set(expected)
    for kind, steps in expected.items():
        for step, values in steps.items():
            for name, value in zip(bandit.GRADIENTS, values, strict=True):
                share = results.bandit.hurts[kind][step][name]
                # The rounding of the figures above and four standard errors.
                assert share.value == pytest.approx(value, abs=5e-4 + 4 * share.standard_error), (kind, step, name)
                assert share.standard_error < 0.003
    # The guarantee is the natural step's alone.
    assert results.bandit.hurts["any better teacher"]["natural"]["forward_ce"].value == 0
    assert results.bandit.hurts["any better teacher"]["plain"]["forward_ce"].value > 0.1


# Several decisions


def test_aliased_numbers(results):
    left, reward = results.tabular.aliased_prob_left, results.tabular.aliased_reward
    assert left["token-wise"][-1] == pytest.approx(0.500, abs=5e-4)
    assert reward["token-wise"][-1] == pytest.approx(0.250, abs=5e-4)
    assert left["sequence-level"][-1] == pytest.approx(0.898, abs=5e-4)
    assert reward["sequence-level"][-1] == pytest.approx(0.726, abs=5e-4)


BOUNDED = {
    (None, None): 0.898, (None, 1.0): 0.707, (None, 0.5): 0.618, (None, 0.25): 0.562,
    (1.0, None): 0.903, (1.0, 1.0): 0.707, (1.0, 0.5): 0.618, (1.0, 0.25): 0.562,
}  # fmt: skip
"""pi(L) of the aliased problem by teacher_ratio_clip and credit_clip."""


@pytest.mark.parametrize("bounds", BOUNDED, ids=str)
def test_bounded_credit_numbers(bounds):
    problem = tabular.aliased_problem()
    logits = problem.start_logits
    for _ in range(400):
        logits = logits - tabular.bounded_gradient(problem, logits, *bounds)
    assert float(logits.softmax(-1)[0, 0]) == pytest.approx(BOUNDED[bounds], abs=5e-4)


@pytest.mark.parametrize("bounds", [(None, 0.3), (0.7, None), (1.0, 0.2)], ids=str)
def test_bounded_gradient_is_the_library_s(bounds, generator):
    """Over all pairs of rollouts, each the other's baseline."""
    problem = tabular.aliased_problem()
    logits = torch.randn(problem.start_logits.shape, generator=generator, dtype=torch.float64)
    soft = torch.randn(problem.teacher_logits.shape, generator=generator, dtype=torch.float64)
    problem = dataclasses.replace(problem, teacher_logits=soft)
    probs = tabular.rollout_logprobs(problem, logits).exp()
    table, expected = logits.clone().requires_grad_(), torch.zeros_like(logits)
    for pair in map(list, product(range(len(probs)), repeat=2)):
        states = one_hot(problem.student_states[pair].flatten(), 3).double()
        teacher = one_hot(problem.teacher_states[pair].flatten(), 3).double()
        loss = fused_distil_loss(
            states, table.T, teacher, soft.T, tokens=problem.tokens[pair].flatten(), cu_seqlens=torch.tensor([0, 3, 6]),
            baseline="leave_one_out", group_size=2, teacher_ratio_clip=bounds[0], credit_clip=bounds[1],
            detach_hidden=True,
        ).loss  # fmt: skip
        expected += probs[pair].prod() * torch.autograd.grad(loss, table)[0]
    torch.testing.assert_close(tabular.bounded_gradient(problem, logits, *bounds), expected)


def test_branch_numbers(results):
    left = {name: values[-1] for name, values in results.tabular.branch_prob_left.items()}
    assert left["token-wise"] == pytest.approx(0.500, abs=5e-4)
    assert left["sequence-level"] == pytest.approx(0.828, abs=5e-4)
    assert left["sequence-level, cost kl"] == pytest.approx(0.500, abs=2e-3)
    a = tabular.stationary_prob_left(math.log(10))
    assert (2 * a - 1) / (2 * a * (1 - a)) == pytest.approx(math.log(10))
    assert left["sequence-level"] == pytest.approx(a, abs=1e-4)


def expected_cost_by_loops(
    problem: tabular.SequenceProblem, table: torch.Tensor, cost: str, rollout_table: torch.Tensor
) -> float:
    """The sum of pi(y) C(y), one rollout and one token at a time, with pi from `rollout_table`."""
    total = 0.0
    for m in range(problem.tokens.shape[0]):
        prob, rollout_cost = float(problem.context_probs[m]), 0.0
        for token, o, s in zip(problem.tokens[m], problem.student_states[m], problem.teacher_states[m], strict=True):
            prob *= float(rollout_table[o].softmax(-1)[token])
            teacher, student = problem.teacher_logits[s].softmax(-1), table[o].softmax(-1)
            possible = teacher > 0
            rollout_cost -= float((teacher[possible] * student[possible].log()).sum())
            if cost == "kl":
                rollout_cost += float((teacher[possible] * teacher[possible].log()).sum())
        total += prob * rollout_cost
    return total


@pytest.mark.parametrize("name", tabular.OBJECTIVES)
@pytest.mark.parametrize(
    "make", [tabular.aliased_problem, lambda: tabular.branch_problem(3)], ids=["aliased", "branch"]
)
def test_exact_gradient_is_the_slope_of_the_expected_cost(make, name, generator):
    problem, objective = make(), tabular.OBJECTIVES[name]
    table = problem.start_logits + torch.randn(problem.start_logits.shape, generator=generator, dtype=torch.float64)
    direction = torch.randn(table.shape, generator=generator, dtype=torch.float64)
    slope = float((tabular.exact_gradient(problem, table[None], [objective])[0] * direction).sum())
    ahead, behind = table + 1e-5 * direction, table - 1e-5 * direction
    costs = [
        expected_cost_by_loops(problem, shifted, objective.cost, shifted if objective.future_credit else table)
        for shifted in (ahead, behind)
    ]
    assert slope == pytest.approx((costs[0] - costs[1]) / 2e-5, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("name", tabular.OBJECTIVES)
def test_shipped_op_averaged_over_all_rollouts_is_the_exact_gradient(name, results, generator):
    assert results.tabular.library_error[name] < 1e-12
    problem = tabular.branch_problem(5)
    tables = problem.start_logits + torch.randn((4, 3, 5), generator=generator, dtype=torch.float64)
    assert tabular.largest_library_error(problem, tables, tabular.OBJECTIVES[name]) < 1e-12


# The DAgger loop


def test_regret_stays_below_its_bounds(results):
    result = results.regret
    for name, bound in result.bound.items():
        assert all(r <= b for r, b in zip(result.regret[name], bound, strict=True))
        assert result.states_moved[name] > 0.05
    # A teacher that changes: regret grows, and more slowly than the rounds.
    last, tenth = result.rounds.index(1000), result.rounds.index(100)
    assert 1.0 < result.regret["follow the leader"][last] / result.regret["follow the leader"][tenth] < 2.0
    assert 1.0 < result.regret["gradient descent"][last] / result.regret["gradient descent"][tenth] < 5.0
    assert result.comparator_norm <= regret.RADIUS


def test_regret_numbers(results):
    numbers = {name: [values[-1], results.regret.bound[name][-1]] for name, values in results.regret.regret.items()}
    assert numbers["follow the leader"] == pytest.approx([1.718, 97.78], rel=1e-3)
    assert numbers["gradient descent"] == pytest.approx([6.712, 804.98], rel=1e-3)


def test_shipped_op_gives_the_rounds_loss_and_gradient(results):
    assert results.regret.library_error < 1e-12


@pytest.mark.parametrize("num_rounds", [1, 7, 150])
def test_leader_bound_against_an_adversary(num_rounds):
    """All the mass on one observation, and a teacher certain of what the student finds least likely."""
    counts = torch.zeros(regret.NUM_OBSERVATIONS, regret.NUM_ACTIONS, dtype=torch.float64)
    total = 0.0
    for n in range(num_rounds):
        logprobs = regret.leader_logits(counts).log_softmax(-1)
        o = n % regret.NUM_OBSERVATIONS
        a = int(logprobs[o].argmin())
        total -= float(logprobs[o, a])
        counts[o, a] += 1
    best = -torch.special.xlogy(counts, counts / counts.sum(-1, keepdim=True).clamp(min=1)).sum()
    assert 0 <= total - float(best) <= regret.follow_the_leader_bound(num_rounds)


def test_state_distribution_is_that_of_a_simulation():
    environment = regret.random_environment(seed=3, num_rounds=1)
    student = torch.full((regret.NUM_OBSERVATIONS, regret.NUM_ACTIONS), 1 / regret.NUM_ACTIONS, dtype=torch.float64)
    expected = torch.zeros(regret.NUM_STATES, dtype=torch.float64)
    state = torch.eye(regret.NUM_STATES, dtype=torch.float64)[0]
    for _ in range(regret.HORIZON):
        expected += state / regret.HORIZON
        state = sum(
            state[s] * student[environment.observations[s], a] * environment.transitions[s, a]
            for s, a in product(range(regret.NUM_STATES), range(regret.NUM_ACTIONS))
        )
    torch.testing.assert_close(regret.state_distribution(environment, student), expected)


# Success


def test_success_bounds(results):
    assert max(results.success.bound_excess.values()) < 1e-12
    assert results.success.gap_error < 1e-13
    log_success, first, second = (results.success.bound_path[k] for k in ("log J", "bound (1)", "bound (2)"))
    assert [log_success[0], first[0], second[0]] == pytest.approx([-2.303, -2.590, -3.018], abs=1e-3)
    assert [log_success[-1], first[-1], second[-1]] == pytest.approx([-0.2294, -0.2294, -1.0218], abs=1e-3)
    assert second == sorted(second)


def test_first_bound_is_tight_at_the_teacher(generator):
    teacher = simplex(generator, 9)
    succeeds = torch.arange(9) % 2 == 0
    log_success, first, second, gap = success.success_bounds(teacher, teacher, succeeds)
    assert float(first) == pytest.approx(float(log_success), abs=1e-14)
    assert abs(float(gap)) < 1e-14
    assert float(second) < float(log_success)


def test_pass_at_k_is_unbiased(results):
    assert results.success.estimator_error < 1e-12
    # By hand: of the 6 pairs out of 4 answers with one correct, 3 hold it.
    assert success.pass_at_k(4, 1, 2) == 0.5
    assert success.pass_at_k(4, 0, 4) == 0.0
    assert success.pass_at_k(4, 3, 2) == 1.0
    for arguments in ((4, 5, 1), (4, 1, 5), (4, 1, 0)):
        with pytest.raises(ValueError, match=r"\[pass_at_k\] needs"):
            success.pass_at_k(*arguments)


def test_pass_at_n_numbers(results):
    """Pass@N at N = 1, 8, 64 for both floors of the teacher."""
    expected = {
        "0.05": {
            "forward CE": (0.0625, 0.4033, 0.9839),
            "reverse KL": (0.1700, 0.2928, 0.4680),
            "JSD": (0.0625, 0.4033, 0.9839),
            "on-policy CE": (0.0625, 0.4033, 0.9839),
            "on-policy CE + credit": (0.0625, 0.4033, 0.9839),
        },
        "0.002": {
            "forward CE": (0.0625, 0.4033, 0.9839),
            "reverse KL": (0.2488, 0.2500, 0.2500),
            "JSD": (0.0702, 0.4232, 0.8961),
            "on-policy CE": (0.0625, 0.4033, 0.9839),
            # The credit of an on-policy objective costs coverage here.
            "on-policy CE + credit": (0.1087, 0.3350, 0.7300),
        },
    }
    for floor, objectives in expected.items():
        for name, values in objectives.items():
            curve = results.success.pass_at_n[floor][name]
            assert [curve[0], curve[7], curve[63]] == pytest.approx(values, abs=2e-4), (floor, name)
    # Where any mode counts, the student that settled on one is the better one.
    any_mode = results.success.pass_any_at_n["0.002"]
    assert any_mode["reverse KL"][0] > 0.99
    assert any_mode["forward CE"][0] == pytest.approx(0.25, abs=1e-4)
    assert max(results.success.gradient_left.values()) < 2e-4


@pytest.mark.parametrize("name", success.OBJECTIVES)
def test_objectives_of_the_small_student_against_plain_sums(name, generator):
    teachers = success.instance_teachers(0.01)
    torch.testing.assert_close(teachers.sum(-1), torch.ones(4, dtype=torch.float64))
    logits = torch.randn((1, 2, 4), generator=generator, dtype=torch.float64)
    first, second = logits[0].softmax(-1)
    student = first.outer(second).flatten()
    values = success.OBJECTIVES[name](logits, teachers[None])[0]
    for z, teacher in enumerate(teachers):
        middle = (student + teacher) / 2
        pairs = teacher.view(4, 4)
        later = sum(float(first[i] * -(pairs[i] / pairs[i].sum() * second.log()).sum()) for i in range(4)) - float(
            (pairs.sum(1) * first.log()).sum()
        )
        expected = {
            "forward CE": -(teacher * student.log()).sum(),
            "reverse KL": (student * (student / teacher).log()).sum(),
            "JSD": ((student * (student / middle).log()).sum() + (teacher * (teacher / middle).log()).sum()) / 2,
        }.get(name, later)
        assert float(values[z]) == pytest.approx(float(expected), abs=1e-12)


@pytest.mark.parametrize("credited", [False, True])
def test_shipped_op_trains_the_small_student(credited, generator):
    """The on-policy rows of the Pass@N table are `fused_distil_loss` on all rollouts of all instances."""
    teachers = success.instance_teachers(0.01).view(4, 4, 4)
    conditionals = torch.cat([teachers.sum(-1)[:, None], teachers / teachers.sum(-1, keepdim=True)], 1)
    z, i, j = torch.tensor(list(product(range(4), repeat=3))).unbind(1)
    problem = tabular.SequenceProblem(
        tokens=torch.stack([i, j], 1),
        student_states=torch.arange(2).expand(64, 2),
        teacher_states=torch.stack([5 * z, 5 * z + 1 + i], 1),
        start_logits=torch.randn((2, 4), generator=generator, dtype=torch.float64),
        teacher_logits=conditionals.flatten(0, 1).log(),
        context_probs=torch.full((64,), 0.25, dtype=torch.float64),
    )
    logits = problem.start_logits[None].clone().requires_grad_()
    name = "on-policy CE + credit" if credited else "on-policy CE"
    (expected,) = torch.autograd.grad(success.OBJECTIVES[name](logits, teachers.flatten(1)[None]).mean(), logits)
    library = tabular.library_gradient(problem, problem.start_logits, tabular.Objective("ce", credited))
    torch.testing.assert_close(library, expected[0], rtol=0, atol=1e-13)


# The command


def test_command_writes_table_numbers_and_figures(results, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    pytest.importorskip("rich")
    from studies.theory import __main__ as command

    monkeypatch.setattr(theory_results, "measure", lambda seed: results)
    command.main(["--output", str(tmp_path / "new" / "folder"), "--seed", "0"])
    printed = capsys.readouterr().out
    assert "seed 0" in printed
    assert "forward CE: plain step hurts" in printed and "FAILS" in printed
    for name in ("theory.json", "bandit.png", "multistep.png", "regret.png", "success.png"):
        path = tmp_path / "new" / "folder" / name
        assert path.stat().st_size > 2000
        assert str(path) in printed
    content = json.loads((tmp_path / "new" / "folder" / "theory.json").read_text())
    assert content["seed"] == 0
    assert content["bandit"]["first_order"]["forward_ce"] == pytest.approx(0.027)
    assert len(content["findings"]) == len(theory_results.findings(results))


def test_command_says_what_is_missing(monkeypatch, capsys):
    from studies.theory import __main__ as command

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        command.main([])
    assert stopped.value.code == 2
    assert "matplotlib and rich are not installed: pip install 'distil-kernels[studies]'" in capsys.readouterr().err
