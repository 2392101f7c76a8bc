"""Heads in shards of the vocabulary: the members of a group together compute what one process computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from members import Members
from test_distil import definition as sequence_definition
from topk_reference import dense, teacher_topk

import distil_kernels as dk
from distil_kernels.engine.plan import Plan
from distil_kernels.testing import (
    Inputs,
    assert_within_budget,
    baselines,
    cost_by_definition,
    credited_weight,
    make_inputs,
    oracle,
    term_sizes,
)

pytestmark = pytest.mark.slow

N, V, D = 23, 307, 16
CUTS = {"alike": (103, 103, 101), "unequal": (200, 1, 106), "empty": (307, 0, 0)}
LENGTHS = [5, 1, 9, 0, 4, 4]
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0)
COSTS = {"ce": dk.fused_forward_ce, "kl": dk.fused_forward_kl, "reverse_kl": dk.fused_reverse_kl, "jsd": dk.fused_jsd}


@pytest.fixture(scope="module")
def members() -> Iterator[Members]:
    group = Members(3)
    yield group
    group.close()


def shard_of(tensor: torch.Tensor, cut: tuple[int, ...], rank: int) -> torch.Tensor:
    """A member's rows; one without any gets one row of padding, since a head has at least one."""
    begin = sum(cut[:rank])
    rows = tensor.detach()[begin : begin + cut[rank]].clone()
    if not len(rows):
        rows = torch.full((1, *tensor.shape[1:]), torch.nan, dtype=tensor.dtype)
    return rows.requires_grad_(tensor.requires_grad)


def member_inputs(inputs: Inputs, cut: tuple[int, ...], rank: int, teacher_cut: tuple[int, ...] | None) -> Inputs:
    """Inputs of one member; `teacher_cut` is None for the teacher's whole head in each."""

    def of_teacher(tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        return tensor.clone() if teacher_cut is None else shard_of(tensor, teacher_cut, rank)

    options = dict(inputs.options)
    if "student_bias" in options:
        options["student_bias"] = shard_of(options["student_bias"], cut, rank)
    if "teacher_bias" in options:
        options["teacher_bias"] = of_teacher(options["teacher_bias"])
    return Inputs(
        inputs.student_hidden.detach().clone().requires_grad_(inputs.student_hidden.requires_grad),
        shard_of(inputs.student_weight, cut, rank),
        inputs.teacher_hidden,
        of_teacher(inputs.teacher_weight),
        inputs.tokens,
        options,
    )


def plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach()
    return type(value)(*map(plain, value)) if hasattr(value, "_fields") else value


def run(
    rank: int, op: str, inputs: Inputs, cut: tuple[int, ...], teacher_cut: tuple[int, ...] | None, options: dict
) -> tuple[Any, dict[str, torch.Tensor]]:
    """What an op returns in one member, and the gradients of the sum of what is differentiable."""
    mine = member_inputs(inputs, cut, rank, teacher_cut)
    vocab = {"vocab_group": torch.distributed.group.WORLD, "vocab_size": sum(cut)}
    heads = mine.heads[:2] if op in ("fused_policy_loss", "token_logprobs") else mine.heads
    upstream = options.pop("upstream", None)
    given = {
        name: value
        for name, value in mine.options.items()
        if op not in ("fused_policy_loss", "token_logprobs") or not name.startswith("teacher")
    }
    result = getattr(dk, op)(*heads, **given, **vocab, **options)
    outputs = [
        value
        for value in (result if isinstance(result, tuple) else (result,))
        if isinstance(value, torch.Tensor) and value.requires_grad
    ]
    leaves = mine.leaves
    gradients: tuple[torch.Tensor, ...] = ()
    if leaves:
        weights = [torch.ones_like(each) for each in outputs] if upstream is None else upstream
        gradients = torch.autograd.grad(outputs, list(leaves.values()), weights)
    return plain(result), dict(zip(leaves, gradients, strict=True))


def joined(
    results: list[tuple[Any, dict[str, torch.Tensor]]], cut: tuple[int, ...]
) -> tuple[Any, dict[str, torch.Tensor]]:
    """The result, which all members must have to the last bit, and the gradients of whole heads."""
    first, _ = results[0]
    for other, _ in results[1:]:
        torch.testing.assert_close(other, first, rtol=0.0, atol=0.0, equal_nan=True)
    gradients: dict[str, torch.Tensor] = {}
    for name in results[0][1]:
        parts = [each[name] for _, each in results]
        if name == "student_hidden":
            assert all(torch.equal(part, parts[0]) for part in parts)
            gradients[name] = parts[0]
        else:
            for part, size in zip(parts, cut, strict=True):
                assert not part[size:].any()
            gradients[name] = torch.cat([part[:size] for part, size in zip(parts, cut, strict=True)])
    return first, gradients


def check_cost(
    members: Members,
    inputs: Inputs,
    cost: str,
    cut: tuple[int, ...],
    teacher_cut: tuple[int, ...] | None,
    **options: Any,
) -> None:
    """Value and gradients of the sum of a cost, in the budget that one process has."""

    def by_definition(copy: Inputs) -> dict[str, torch.Tensor]:
        total = cost_by_definition(copy, cost).sum()
        gradients = torch.autograd.grad(total, list(copy.leaves.values()))
        return {"loss": total.detach(), **dict(zip(copy.leaves, gradients, strict=True))}

    exact = by_definition(inputs.to(torch.float64))
    base = baselines(inputs, by_definition)
    names = {"ce": "fused_forward_ce", "kl": "fused_forward_kl", "reverse_kl": "fused_reverse_kl", "jsd": "fused_jsd"}
    results = members.results(run, names[cost], inputs, cut, teacher_cut, {"reduction": "sum", **options})
    loss, gradients = joined(results, cut)
    assert_within_budget("loss", loss, base["loss"], exact["loss"])
    terms = term_sizes(inputs, torch.ones(N))
    for name, gradient in gradients.items():
        assert_within_budget(name, gradient, base[name], exact[name], terms=terms[name])


@pytest.mark.parametrize("cut", ["unequal", "empty"])
@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float64), ("cpu", torch.float32)], ids=str)
@pytest.mark.parametrize("cost", COSTS)
def test_costs(members, cost, backend, dtype, cut, generator):
    inputs = make_inputs(N, V, D, dtype=dtype, bias=True, teacher_hidden_size=24, generator=generator)
    check_cost(members, inputs, cost, CUTS[cut], CUTS[cut], backend=backend)


@pytest.mark.parametrize("kind", ["peaked", "flat", "offset", "near"])
@pytest.mark.parametrize("cost", ["kl", "jsd"])
def test_kinds_of_logits(members, cost, kind, generator):
    inputs = make_inputs(N, V, D, kind=kind, generator=generator, temperature=0.7)
    check_cost(members, inputs, cost, CUTS["unequal"], CUTS["unequal"], backend="cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cost", ["ce", "reverse_kl"])
def test_half_precision(members, cost, dtype, generator):
    inputs = make_inputs(N, V, D, dtype=dtype, generator=generator, logit_softcap=5.0, student_logit_scale=0.5)
    check_cost(members, inputs, cost, CUTS["alike"], CUTS["alike"], backend="cpu")


@pytest.mark.parametrize("teacher_cut", [None, (150, 150, 7), (307, 0, 0)], ids=["whole", "elsewhere", "in one"])
@pytest.mark.parametrize("shared_head", [False, True], ids=["own", "shared"])
def test_the_teacher_may_be_cut_elsewhere(members, teacher_cut, shared_head, generator):
    inputs = make_inputs(N, V, D, bias=not shared_head, shared_head=shared_head, generator=generator)
    check_cost(members, inputs, "kl", CUTS["unequal"], teacher_cut, backend="cpu")


@pytest.mark.parametrize("scale", [1e-3, 3e-5])
def test_small_divergences_keep_their_digits(members, scale, generator):
    """A KL of 1e-6, and of 1e-9."""
    inputs = make_inputs(N, V, D, generator=generator)
    noise = torch.randn(N, D, generator=generator)
    near = Inputs(inputs.student_hidden, inputs.student_weight, inputs.student_hidden.detach() + scale * noise,
                  inputs.student_weight.detach(), inputs.tokens)  # fmt: skip
    exact = oracle(near.to(torch.float64))
    results = members.results(run, "token_stats", near, CUTS["alike"], CUTS["alike"], {"tokens": near.tokens})
    stats, _ = joined(results, CUTS["alike"])
    whole = plain(dk.token_stats(*near.heads, tokens=near.tokens))
    for name in ("kl", "reverse_kl"):
        expected = getattr(exact, name)
        error, of_one = (((getattr(each, name) - expected) / expected).abs().max() for each in (stats, whole))
        assert error <= 2 * of_one + 1e-3, (name, expected.mean())


OPTIONS_OF_ROWS = {
    "kept": {"plan": "kept_gradient"},
    "recompute": {"plan": "recompute"},
    "masked": {"token_mask": torch.arange(N) % 3 != 1, "plan": "kept_gradient"},
    "chunks": {"plan": Plan("recompute", 4, 8)},
}


@pytest.mark.parametrize("case", OPTIONS_OF_ROWS)
@pytest.mark.parametrize(("backend", "dtype"), [("reference", torch.float64), ("cpu", torch.float32)], ids=str)
def test_token_stats(members, backend, dtype, case, generator):
    """Every statistic, and gradients for any upstream of its two differentiable ones."""
    options = {"tokens": None, "backend": backend, **OPTIONS_OF_ROWS[case]}
    inputs = make_inputs(N, V, D, dtype=dtype, bias=True, generator=generator)
    options["tokens"] = inputs.tokens.clone()
    counted = options.get("token_mask", torch.ones(N, dtype=torch.bool))
    options["tokens"][~counted] = 10**6  # of no vocabulary
    upstream = [torch.randn(N, generator=generator).to(dtype) for _ in range(2)]
    weights = [torch.where(counted, each, 0.0) for each in upstream]

    def by_definition(copy: Inputs) -> dict[str, torch.Tensor]:
        stats = oracle(copy)
        total = (weights[0].to(stats.ce) * stats.ce + weights[1].to(stats.ce) * stats.logprob).sum()
        gradients = torch.autograd.grad(total, list(copy.leaves.values()))
        return {**plain(stats)._asdict(), **dict(zip(copy.leaves, gradients, strict=True))}

    exact, base = by_definition(inputs.to(torch.float64)), baselines(inputs, by_definition)
    results = members.results(
        run, "token_stats", inputs, CUTS["unequal"], CUTS["unequal"], {**options, "upstream": upstream}
    )
    stats, gradients = joined(results, CUTS["unequal"])
    for name, value in stats._asdict().items():
        if name == "agree":
            assert torch.equal(value, exact[name] & counted)
        else:
            assert not value[~counted].any()
            assert_within_budget(name, value[counted], [each[counted] for each in base[name]], exact[name][counted])
    terms = term_sizes(inputs, weights[0].abs() + weights[1].abs())
    for name, gradient in gradients.items():
        assert_within_budget(name, gradient, base[name], exact[name], terms=terms[name])


SEQUENCE_CASES = {
    "future": {},
    "chunks": {"plan": Plan("gradient_in_forward", 4, 8), "discount": 0.9},
    "sequence": {"span": "sequence", "baseline": "leave_one_out", "group_size": 2},
    "masked": {"token_mask": torch.arange(N) % 4 != 2, "cost": "kl"},
    "frozen": {"frozen": True, "cost": "reverse_kl", "horizon": 3},
    "teacher ratio": {"teacher_clip": 1.0, "clip": 0.5},
    "older": {"behaviour": True, "importance_clip": 2.0},
}


@pytest.mark.parametrize("case", SEQUENCE_CASES)
def test_distil_loss(members, case, generator):
    settings = dict(SEQUENCE_CASES[case])
    inputs = make_inputs(N, V, D, generator=generator)
    if settings.pop("frozen", False):
        inputs.student_weight.requires_grad_(False)
    if settings.pop("behaviour", False):
        settings["behaviour"] = -2.0 - torch.rand(N, generator=generator)
    plan = settings.pop("plan", "auto")
    exact = sequence_definition(inputs.to(torch.float64), lengths=LENGTHS, **settings)
    base = baselines(inputs, lambda copy: sequence_definition(copy, lengths=LENGTHS, **settings))
    names = {
        "span": "credit_span", "behaviour": "behaviour_logprobs", "teacher_clip": "teacher_ratio_clip",
        "clip": "credit_clip",
    }  # fmt: skip
    options = {names.get(name, name): value for name, value in settings.items()}
    options |= {"tokens": inputs.tokens, "cu_seqlens": CU_SEQLENS, "plan": plan}
    results = members.results(run, "fused_distil_loss", inputs, CUTS["alike"], CUTS["alike"], options)
    loss, gradients = joined(results, CUTS["alike"])
    total = float(exact["loss"].abs()) * 10
    assert_within_budget("loss", loss.loss, base["loss"], exact["loss"])
    for name in ("credit", "cost_to_go"):
        assert_within_budget(name, getattr(loss, name), base[name], exact[name], terms=total)
    terms = term_sizes(inputs, credited_weight(exact["credit"], exact["cost_to_go"]) / len(LENGTHS))
    for name, gradient in gradients.items():
        assert_within_budget(name, gradient, base[name], exact[name], terms=terms[name])


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("op", ["fused_distil_loss", "fused_topk_distil_loss"])
def test_terms(members, op, cut, generator):
    """Rewards, labels, z-loss, entropy and a reference's penalty beside the cost are those of one process."""
    inputs = make_inputs(N, V, D, bias=op == "fused_distil_loss", generator=generator, temperature=0.8)
    labels = torch.randint(V, (N,), generator=generator)
    labels[::4] = -100
    options = {
        "tokens": inputs.tokens, "cu_seqlens": CU_SEQLENS, "advantages": torch.randn(N, generator=generator),
        "distil_weight": torch.rand(N, generator=generator), "labels": labels, "label_weight": 0.3,
        "label_smoothing": 0.1, "z_loss_weight": 0.01, "entropy_weight": 0.2, "reference_weight": 0.4,
        "policy_weight": 0.5,  # beside a reference near the student: ratios of 1e4 would be all of the gradient
        "reference_logprobs": oracle(inputs).logprob.detach() + 0.5 * torch.randn(N, generator=generator),
    }  # fmt: skip
    given = inputs
    if op == "fused_topk_distil_loss":
        ids, logprobs = teacher_topk(N, V, 8, generator)
        given = Inputs(*inputs.heads[:2], ids, logprobs.float(), inputs.tokens, {"temperature": 0.8})
    cuts = CUTS[cut], CUTS[cut] if given is inputs else None
    result, gradients = joined(members.results(run, op, given, *cuts, options), CUTS[cut])
    check_against_one(op, given, options, result, gradients)


def test_policy_loss(members, generator):
    inputs = make_inputs(N, V, D, bias=True, generator=generator)
    advantages, noise = (torch.randn(N, generator=generator) for _ in range(2))
    old = oracle(inputs).logprob.detach() + 0.3 * noise

    def by_definition(copy: Inputs) -> dict[str, torch.Tensor]:
        stats = oracle(copy)
        a, ratio = advantages.to(stats.ce), (stats.logprob - old.to(stats.ce)).exp()
        surrogate = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        total = (surrogate - 0.1 * stats.entropy).mean()
        gradients = torch.autograd.grad(total, list(copy.leaves.values()))
        return {"loss": total.detach(), **dict(zip(copy.leaves, gradients, strict=True))}

    exact, base = by_definition(inputs.to(torch.float64)), baselines(inputs, by_definition)
    options = {"tokens": inputs.tokens, "advantages": advantages, "old_logprobs": old, "entropy_weight": 0.1}
    results = members.results(run, "fused_policy_loss", inputs, CUTS["unequal"], CUTS["unequal"], options)
    loss, gradients = joined(results, CUTS["unequal"])
    assert_within_budget("loss", loss.loss, base["loss"], exact["loss"])
    terms = term_sizes(inputs, (1.0 + advantages.abs()) / N)
    for name, gradient in gradients.items():
        assert_within_budget(name, gradient, base[name], exact[name], terms=terms[name])


@pytest.mark.parametrize("cut", CUTS)
def test_named_tokens(members, cut, generator):
    """Loss, credit, statistics and gradients are those of one process."""
    inputs = make_inputs(N, V, D, bias=True, generator=generator)
    ids, logprobs = teacher_topk(N, V, 8, generator, num_padding=2)
    for op, options in {
        "fused_topk_ce": {"reduction": "sum"},
        "fused_topk_distil_loss": {"tokens": inputs.tokens, "cu_seqlens": CU_SEQLENS, "cost": "kl"},
    }.items():
        named = Inputs(*inputs.heads[:2], ids, logprobs.float(), inputs.tokens,
                       {"student_bias": inputs.options["student_bias"]})  # fmt: skip
        result, gradients = joined(members.results(run, op, named, CUTS[cut], None, options), CUTS[cut])
        check_against_one(op, named, options, result, gradients)
        if op == "fused_topk_ce":
            wide = inputs.to(torch.float64)
            total = dense(*wide.heads[:2], ids, logprobs, wide.options["student_bias"])
            assert_within_budget("loss", result, [result.new_tensor(total.item())], total, terms=float(total))


def check_against_one(op: str, given: Inputs, options: dict, result: Any, gradients: dict[str, torch.Tensor]) -> None:
    """Holds results to those of one process in float64, in the budget of one in float32."""

    def of_one(inputs: Inputs) -> dict[str, torch.Tensor]:
        whole = getattr(dk, op)(*inputs.heads, **inputs.options, **options)
        loss = whole if isinstance(whole, torch.Tensor) else whole.loss
        found = torch.autograd.grad(loss, list(inputs.leaves.values()))
        return {"loss": loss.detach(), "whole": plain(whole), **dict(zip(inputs.leaves, found, strict=True))}

    one, exact = of_one(given), of_one(given.to(torch.float64))
    torch.testing.assert_close(result, one["whole"], rtol=1e-5, atol=1e-5, equal_nan=True)
    weight = torch.ones(N)
    if hasattr(result, "credit"):
        weight = credited_weight(result.credit, result.cost_to_go)
    s = given.student_weight.detach().abs()
    terms = {
        "student_hidden": float(weight.max() * s.max()),
        "student_weight": float(weight.sum() * given.student_hidden.detach().abs().max()),
        "student_bias": float(weight.sum()),
    }
    for name, gradient in gradients.items():
        assert_within_budget(name, gradient, [one[name]], exact[name], terms=terms[name])


def own_rows(rank: int, inputs: Inputs, cut: tuple[int, ...], options: dict) -> tuple[Any, dict[str, torch.Tensor]]:
    """The loss from a member's own rows of hidden states, and the gradient of them."""
    mine = member_inputs(inputs, cut, rank, cut)
    rows = slice(rank * (N // 3), (rank + 1) * (N // 3))
    hidden = mine.student_hidden.detach()[rows].clone().requires_grad_()
    loss = dk.fused_forward_ce(
        hidden, mine.student_weight, mine.teacher_hidden[rows], mine.teacher_weight, vocab_size=V,
        vocab_group=torch.distributed.group.WORLD, sequence_parallel=True, **options,
    )  # fmt: skip
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(loss, [hidden, mine.student_weight], upstream)
    return loss.detach(), dict(zip(("student_hidden", "student_weight"), gradients, strict=True))


@pytest.mark.parametrize(
    "options",
    [{}, {"reduction": "none", "plan": "kept_gradient"}, {"plan": Plan("recompute", 4, 8), "reduction": "none"}],
    ids=str,
)
def test_sequence_parallel(members, options, generator):
    """Each member has its own rows of the hidden states, and gets their gradient by a reduce-scatter."""
    rows = N // 3 * 3
    inputs = make_inputs(rows, V, D, generator=generator)
    whole = dk.fused_forward_ce(*inputs.heads, **options)
    upstream = torch.randn(whole.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(whole, [inputs.student_hidden, inputs.student_weight], upstream)
    results = members.results(own_rows, inputs, CUTS["alike"], options)
    for loss, _ in results:
        torch.testing.assert_close(loss, whole.detach(), rtol=2e-6, atol=0.0)
    hidden = torch.cat([each["student_hidden"] for _, each in results])
    weight = torch.cat([each["student_weight"] for _, each in results])
    torch.testing.assert_close(hidden, expected[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weight, expected[1], rtol=1e-4, atol=1e-6)


def different(rank: int, inputs: Inputs, what: str) -> Any:
    """A call of which member 1 makes something else."""
    mine = member_inputs(inputs, CUTS["alike"], rank, CUTS["alike"])
    heads, options = list(mine.heads), {"tokens": mine.tokens, "vocab_size": V}
    if rank == 1:
        if what == "rows":
            heads = [each[:-1] if place % 2 == 0 else each for place, each in enumerate(heads)]
            options["tokens"] = options["tokens"][:-1]
        elif what == "dtype":
            heads = [each.detach().bfloat16().requires_grad_(each.requires_grad) for each in heads]
        elif what == "tokens":
            options["tokens"] = options["tokens"].roll(1)
        elif what == "mask":
            options["token_mask"] = torch.arange(N) > 2
        elif what == "option":
            options["temperature"] = 0.5
        elif what == "vocabulary":
            options["vocab_size"] = V - 1
        elif what == "error":
            options["tokens"] = options["tokens"].float()
        elif what == "op":
            return dk.fused_forward_ce(*heads, vocab_size=V, vocab_group=torch.distributed.group.WORLD)
    return plain(dk.token_stats(*heads, vocab_group=torch.distributed.group.WORLD, **options))


@pytest.mark.parametrize(
    "what", ["rows", "dtype", "tokens", "mask", "option", "vocabulary", "error", "op"],
)  # fmt: skip
def test_members_that_differ_end_in_an_error_on_all(members, what, generator):
    inputs = make_inputs(N, V, D, generator=generator)
    results = members.call(different, inputs, what)
    assert all(isinstance(each, (ValueError, TypeError)) for each in results), results
    if what == "error":
        assert "tokens has dtype" in str(results[1]) and "error of its own" in str(results[0])
    else:
        assert all("[vocab_group]" in str(each) and "member" in str(each) for each in results)
    assert [type(each) for each in members.call(different, inputs, "nothing")] == [dk.TokenStats] * 3


def counted_bytes(rank: int, inputs: Inputs, cost: str, plan: Any) -> list[tuple[str, int]]:
    """What a member sends: the operation and its bytes, in order."""
    from distil_kernels.engine import vocab_shards

    sent: list[tuple[str, int]] = []
    gather, reduce = vocab_shards.all_gather, vocab_shards.all_reduce

    def all_gather(out: torch.Tensor, part: torch.Tensor, group: Any) -> None:
        sent.append(("gather", part.nbytes))
        gather(out, part, group)

    def all_reduce(tensor: torch.Tensor, group: Any) -> None:
        sent.append(("sum", tensor.nbytes))
        reduce(tensor, group)

    vocab_shards.all_gather, vocab_shards.all_reduce = all_gather, all_reduce
    try:
        run(rank, "fused_distil_loss", inputs, CUTS["alike"], CUTS["alike"],
            {"tokens": inputs.tokens, "cu_seqlens": CU_SEQLENS, "cost": cost, "plan": plan})  # fmt: skip
    finally:
        vocab_shards.all_gather, vocab_shards.all_reduce = gather, reduce
    return sent


@pytest.mark.parametrize(("cost", "numbers"), [("ce", [11]), ("jsd", [11, 2])])
def test_what_is_exchanged(members, cost, numbers, generator):
    """A message at the start; eleven numbers a row and chunk, two more for the JSD; dh once."""
    inputs = make_inputs(N, V, D, generator=generator)
    plan = Plan("gradient_in_forward", 6, 12)
    for sent in members.results(counted_bytes, inputs, cost, plan):
        gathers, sums = ([size for kind, size in sent if kind == wanted] for wanted in ("gather", "sum"))
        num_chunks = (len(gathers) - 1) // len(numbers)
        assert gathers[0] == 32 * 8 and sum(gathers[1:]) == 4 * N * sum(numbers)
        assert len(gathers) - 1 == num_chunks * len(numbers) and num_chunks >= N // 6
        assert sum(sums) == 4 * N * D and len(sums) <= num_chunks


def compiled(rank: int, inputs: Inputs, cut: tuple[int, ...]) -> tuple[Any, dict[str, torch.Tensor]]:
    mine = member_inputs(inputs, cut, rank, cut)
    group = torch.distributed.group.WORLD

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss_of(hidden, weight, teacher_hidden, teacher_weight, tokens):
        return dk.fused_distil_loss(
            hidden * 2.0, weight, teacher_hidden, teacher_weight, tokens=tokens, cu_seqlens=CU_SEQLENS, vocab_size=V,
            vocab_group=group,
        ).loss  # fmt: skip

    loss = loss_of(*mine.heads, mine.tokens)
    gradients = torch.autograd.grad(loss, list(mine.leaves.values()))
    return loss.detach(), dict(zip(mine.leaves, gradients, strict=True))


def test_compiled(members, generator):
    inputs = make_inputs(N, V, D, generator=generator)
    whole = dk.fused_distil_loss(
        inputs.student_hidden * 2.0, *inputs.heads[1:], tokens=inputs.tokens, cu_seqlens=CU_SEQLENS
    ).loss
    expected = torch.autograd.grad(whole, list(inputs.leaves.values()))
    loss, gradients = joined(members.results(compiled, inputs, CUTS["alike"]), CUTS["alike"])
    torch.testing.assert_close(loss, whole.detach())
    for name, gradient in zip(inputs.leaves, expected, strict=True):
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


def under_autocast(rank: int, inputs: Inputs, cut: tuple[int, ...]) -> tuple[Any, dict[str, torch.Tensor]]:
    with torch.autocast("cpu", torch.bfloat16):
        return run(rank, "fused_forward_ce", inputs, cut, cut, {})


def test_autocast(members, generator):
    inputs = make_inputs(N, V, D, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        whole = dk.fused_forward_ce(*inputs.heads)
    expected = torch.autograd.grad(whole, list(inputs.leaves.values()))
    loss, gradients = joined(members.results(under_autocast, inputs, CUTS["alike"]), CUTS["alike"])
    torch.testing.assert_close(loss, whole.detach(), rtol=1e-5, atol=0.0)
    for name, gradient in zip(inputs.leaves, expected, strict=True):
        assert gradients[name].dtype == torch.float32
        torch.testing.assert_close(gradients[name], gradient, rtol=2e-2, atol=2e-4)


def test_threshold_is_refused(members, generator):
    inputs = make_inputs(N, V, D, generator=generator)
    for error in members.call(
        run, "fused_forward_ce", inputs, CUTS["alike"], CUTS["alike"], {"gradient_threshold": 1e-3}
    ):
        assert isinstance(error, ValueError) and "gradient_threshold is 0.001 with vocab_group" in str(error)


def test_group_of_another_kind():
    weight = torch.randn(5, 4)
    with pytest.raises(TypeError, match="vocab_group is str, expected a process group"):
        dk.fused_forward_ce(torch.randn(3, 4), weight, torch.randn(3, 4), weight, vocab_group="all")
    with pytest.raises(ValueError, match="sequence_parallel is True without vocab_group"):
        dk.fused_forward_ce(torch.randn(3, 4), weight, torch.randn(3, 4), weight, sequence_parallel=True)
