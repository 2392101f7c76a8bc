"""Both GPU back ends through the public ops and one by one, against the float64 oracle. Not yet run on a GPU."""

from __future__ import annotations

import gc
import os
from dataclasses import replace
from types import SimpleNamespace

import masked_rows
import pytest
import row_checks
import terms_reference
import to_go_checks
import torch

from distil_kernels import (
    fused_distil_loss,
    fused_forward_ce,
    fused_forward_kl,
    fused_jsd,
    fused_policy_loss,
    fused_reverse_kl,
    fused_topk_ce,
    fused_topk_distil_loss,
    token_logprobs,
    token_stats,
)
from distil_kernels.backends import LogitPair, LogitTransform, RowTerms, triton
from distil_kernels.backends.dispatch import BACKENDS, choose_backend
from distil_kernels.engine.plan import Plan, extra_bytes
from distil_kernels.engine.sizes import Shape
from distil_kernels.testing import (
    KINDS,
    Inputs,
    assert_within_budget,
    baselines,
    credited_weight,
    make_inputs,
    oracle,
    term_sizes,
)

pytestmark = pytest.mark.slow

GPU = torch.device("cuda")
IS_EMULATED = not torch.cuda.is_available()  # see conftest.py
IS_INTERPRETED = IS_EMULATED and os.environ.get("TRITON_INTERPRET") == "1"
# No multiple of a chunk. A program of a row takes the interpreter some 50 ms.
ROWS, CHUNK = (11, 4) if IS_INTERPRETED else (37, 16)


def test_auto_takes_the_first_that_runs():
    first = next(name for name in BACKENDS if BACKENDS[name].unavailable(GPU, torch.bfloat16) is None)
    assert choose_backend("auto", GPU, torch.bfloat16).name == first


def moved(value):
    if isinstance(value, LogitPair):
        return LogitPair(*(tensor.to(GPU) for tensor in value))
    if isinstance(value, LogitTransform):
        return LogitTransform(None if value.bias is None else value.bias.to(GPU), value.softcap, value.temperature)
    return value.to(GPU) if isinstance(value, torch.Tensor) else value


@pytest.fixture
def kernels(backend):
    """The back end's row kernels for tensors on the CPU."""
    module = BACKENDS[backend]

    def row_stats(*arguments):
        return module.row_stats(*map(moved, arguments)).cpu()

    def row_grad(*arguments, terms=None):
        *inputs, out = arguments
        result, terms = moved(out), None if terms is None else RowTerms(*map(moved, terms))
        lost = module.row_grad(*map(moved, inputs), result, terms)
        out.copy_(result)
        return None if lost is None else lost.cpu()

    def row_mixture(logits, student, teacher, statistics, cost):
        result = moved(statistics)
        module.row_mixture(moved(logits), moved(student), moved(teacher), result, cost)
        statistics.copy_(result)

    def cost_to_go(costs, slots, *state):
        to_go, later = module.cost_to_go(moved(costs), moved(slots), *state)
        return to_go.cpu(), later

    return SimpleNamespace(row_stats=row_stats, row_grad=row_grad, row_mixture=row_mixture, cost_to_go=cost_to_go)


@pytest.mark.parametrize("kind", ["ordinary", "peaked", "near"])
@pytest.mark.parametrize("cost", ["reverse_kl", "jsd", "entropy"])
def test_row_kernels_of_other_costs(kernels, cost, kind, generator):
    row_checks.check_kinds(kernels, 131, kind, generator, cost=cost)


@pytest.mark.parametrize("kind", ["ordinary", "peaked", "near", "offset"])
@pytest.mark.parametrize("vocab_size", [1, 7, 128, 131])
def test_row_kernels(kernels, vocab_size, kind, generator):
    row_checks.check_kinds(kernels, vocab_size, kind, generator)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("cost", row_checks.COSTS)
def test_row_kernels_with_terms(kernels, cost, softcap, generator):
    row_checks.check_terms(kernels, generator, cost, softcap)


def test_row_kernels_on_shards(kernels, generator):
    row_checks.check_shards(kernels, generator, is_slow=IS_INTERPRETED)


def test_row_kernels_in_corners(kernels, generator):
    row_checks.check_softcap_and_minus_infinity(kernels, generator)
    row_checks.check_blocks(kernels, generator)
    row_checks.check_equal_models(kernels, generator)
    row_checks.check_first_of_equal_maxima(kernels)
    row_checks.check_unused_rows_and_nan(kernels, generator)
    row_checks.check_tokens_outside(kernels, generator)
    row_checks.check_no_rows(kernels)


def test_cost_to_go(kernels, generator, monkeypatch):
    to_go_checks.check_random_layouts(kernels, generator, 16 if IS_INTERPRETED else 64)
    if IS_INTERPRETED:  # a program for every position takes it a second for twenty
        monkeypatch.setattr(triton, "_MAX_POSITIONS", 8)
        to_go_checks.check_long_sequences(kernels, generator, length=20)
    else:
        to_go_checks.check_long_sequences(kernels, generator)


@pytest.mark.parametrize(("op", "plan"), [
    ("distil", "gradient_in_forward"), ("rows of jsd", "kept_gradient"), ("rows of forward_ce", "frozen_head"),
    ("stats", "stats_only"),
])  # fmt: skip
def test_anything_in_masked_rows(backend, op, plan, generator):
    masked_rows.check(op, plan, backend, torch.bfloat16, generator, "cuda")


def on_gpu(inputs: Inputs) -> Inputs:
    return inputs.to(inputs.student_hidden.dtype, GPU)


def gradients_of(value: torch.Tensor, inputs: Inputs) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(value, list(inputs.leaves.values()))
    return dict(zip(inputs.leaves, (gradient.cpu() for gradient in found), strict=True))


def compare(inputs: Inputs, ours: dict[str, torch.Tensor], definition, weight: torch.Tensor) -> None:
    """`definition(copy)` by name, on the CPU, within the error budget."""
    exact, base = definition(inputs.to(torch.float64)), baselines(inputs, definition)
    terms = term_sizes(inputs, weight)
    for name, value in ours.items():
        assert_within_budget(name, value, base[name], exact[name], terms=terms.get(name, 1.0))


def sum_of_ce(copy: Inputs) -> dict[str, torch.Tensor]:
    value = oracle(copy).ce.sum()
    return {"value": value.detach(), **gradients_of(value, copy)}


# 4099 and 1031 columns: odd, more and less than a Triton block; 4096: whole vectors.
@pytest.mark.parametrize(
    "plan",
    ["auto", Plan("gradient_in_forward", CHUNK, 0), Plan("gradient_in_forward", CHUNK // 2, 3 * CHUNK // 2)],
    ids=str,
)
@pytest.mark.parametrize("vocab_size", [1031, 4096, 4099])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scalar_loss(backend, dtype, vocab_size, plan, generator):
    if isinstance(plan, Plan) and plan.staging_rows == 0 and dtype != torch.float32:
        pytest.skip("half precision needs staging: the operands are not as wide as the logits")
    inputs = make_inputs(ROWS, vocab_size, 64, dtype=dtype, generator=generator)
    moved_inputs = on_gpu(inputs)
    value = fused_forward_ce(*moved_inputs.heads, reduction="sum", backend=backend, plan=plan)
    ours = {"value": value.detach().cpu(), **gradients_of(value, moved_inputs)}
    compare(inputs, ours, sum_of_ce, torch.ones(ROWS))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared_head", [False, True])
def test_kinds_and_shared_head(backend, shared_head, kind, generator):
    inputs = make_inputs(ROWS, 4099, 64, kind=kind, dtype=torch.bfloat16, shared_head=shared_head, generator=generator)
    moved_inputs = on_gpu(inputs)
    value = fused_forward_ce(*moved_inputs.heads, reduction="sum", backend=backend)
    compare(inputs, {"value": value.detach().cpu(), **gradients_of(value, moved_inputs)}, sum_of_ce, torch.ones(ROWS))


@pytest.mark.parametrize("plan", ["auto", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_all_terms_at_once(backend, dtype, plan, generator):
    inputs = make_inputs(
        terms_reference.N, terms_reference.V, 16, dtype=dtype, bias=True, generator=generator, temperature=0.8
    )
    options = terms_reference.drawn(generator, terms_reference.ALL, credit_span="future")
    terms_reference.check(inputs, backend=backend, plan=plan, device=GPU, **options)


@pytest.mark.parametrize("plan", ["kept_gradient", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_with_upstream_gradients(backend, dtype, plan, generator):
    inputs = make_inputs(ROWS, 1031, 64, dtype=dtype, bias=True, generator=generator, logit_softcap=8.0)
    upstream = torch.rand(ROWS, generator=generator)

    def definition(copy: Inputs) -> dict[str, torch.Tensor]:
        ce = oracle(copy).ce
        return {"ce": ce.detach(), **gradients_of((ce * upstream.to(ce.dtype)).sum(), copy)}

    moved_inputs = on_gpu(inputs)
    ce = fused_forward_ce(*moved_inputs.heads, **moved_inputs.options, reduction="none", backend=backend, plan=plan)
    ours = {"ce": ce.detach().cpu(), **gradients_of((ce * upstream.to(GPU)).sum(), moved_inputs)}
    compare(inputs, ours, definition, upstream)


@pytest.mark.parametrize("plan", ["kept_gradient", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_outputs_with_upstream_gradients(backend, dtype, plan, generator):
    inputs = make_inputs(ROWS, 1031, 64, dtype=dtype, generator=generator)
    upstream = torch.randn(2, ROWS, generator=generator)

    def mix(ce: torch.Tensor, logprob: torch.Tensor) -> torch.Tensor:
        first, second = upstream.to(ce.device, ce.dtype)
        return (ce * first + logprob * second).sum()

    def definition(copy: Inputs) -> dict[str, torch.Tensor]:
        found = oracle(copy)
        return gradients_of(mix(found.ce, found.logprob), copy)

    moved_inputs = on_gpu(inputs)
    found = token_stats(*moved_inputs.heads, tokens=moved_inputs.tokens, backend=backend, plan=plan)
    compare(inputs, gradients_of(mix(found.ce, found.logprob), moved_inputs), definition, upstream.abs().sum(0))


def test_frozen_head_and_token_statistics(backend, generator):
    inputs = make_inputs(ROWS, 4099, 64, dtype=torch.bfloat16, generator=generator)
    inputs.student_weight.requires_grad_(False)
    moved_inputs = on_gpu(inputs)
    value = fused_forward_ce(*moved_inputs.heads, reduction="sum", backend=backend, plan="frozen_head")
    compare(inputs, {"value": value.detach().cpu(), **gradients_of(value, moved_inputs)}, sum_of_ce, torch.ones(ROWS))

    def definition(copy: Inputs) -> dict[str, torch.Tensor]:
        return {name: each.detach() for name, each in oracle(copy)._asdict().items() if name != "agree"}

    with torch.no_grad():  # `triton` forms no logits here
        found = token_stats(*moved_inputs.heads, tokens=moved_inputs.tokens, backend=backend)
    size = float(definition(inputs.to(torch.float64))["lse"].abs().max()) + 10.0
    exact, base = definition(inputs.to(torch.float64)), baselines(inputs, definition)
    for name, value in exact.items():
        assert_within_budget(name, getattr(found, name).cpu(), base[name], value, terms=size)


@pytest.mark.parametrize("plan", ["auto", "recompute", Plan("gradient_in_forward", 8, 16)], ids=str)
def test_credit(backend, plan, generator):
    inputs = make_inputs(20, 1031, 64, kind="near", generator=generator)
    borders = torch.tensor([0, 6, 11, 13, 20])

    def compute(copy: Inputs, name: str, plan: str | Plan) -> dict[str, torch.Tensor]:
        result = fused_distil_loss(*copy.heads, tokens=copy.tokens, cu_seqlens=borders, baseline="leave_one_out",
                                   group_size=2, discount=0.9, backend=name, plan=plan)  # fmt: skip
        found = {name: getattr(result, name).detach().cpu() for name in ("loss", "credit", "cost_to_go")}
        return found | gradients_of(result.loss, copy)

    ours = compute(on_gpu(inputs), backend, plan)
    exact = compute(inputs.to(torch.float64), "reference", "auto")
    weight = credited_weight(exact["credit"], exact["cost_to_go"]) / 4
    compare(inputs, ours, lambda copy: compute(copy, "reference", "auto"), weight)


BORDERS = torch.tensor([0, 6, 11, 13, 20])


def other_ops(copy: Inputs, backend: str) -> dict[str, torch.Tensor]:
    """A value of each public op that the tests above leave out, with masks and whatever else it takes."""
    hidden, weight, options = copy.student_hidden, copy.student_weight, {"backend": backend}
    rows = torch.arange(20, device=hidden.device)
    mask, numbers = rows % 4 != 1, torch.cos(rows.float())
    credit = {"cu_seqlens": BORDERS, "discount": 0.9, "token_mask": mask}
    ids = torch.stack([copy.tokens, (copy.tokens + 1) % weight.shape[0]], -1)
    logprobs = torch.stack([numbers - 2.0, numbers - 1.5], -1)
    sampled = token_logprobs(hidden, weight, tokens=copy.tokens, **options)
    return {
        "forward_kl": fused_forward_kl(*copy.heads, token_mask=mask, token_weight=numbers + 2.0, **options),
        "reverse_kl": fused_reverse_kl(*copy.heads, token_mask=mask, token_weight=numbers + 2.0, **options),
        "jsd": fused_jsd(*copy.heads, jsd_weight=0.3, **options),
        "jsd of rows": (fused_jsd(*copy.heads, reduction="none", token_mask=mask, **options) * numbers).sum(),
        "logprob and entropy": (sampled.logprob * numbers).sum() + sampled.entropy.sum(),
        "policy": fused_policy_loss(hidden, weight, tokens=copy.tokens, advantages=numbers, old_logprobs=numbers - 7.0,
                                    token_mask=mask, entropy_weight=0.1, **options).loss,
        "credited kl": fused_distil_loss(*copy.heads, tokens=copy.tokens, cost="kl", horizon=3, credit_clip=1.0,
                                         normalize_by_remaining=True, baseline="position_mean", **credit,
                                         **options).loss,
        "older rollouts": fused_distil_loss(*copy.heads, tokens=copy.tokens, behaviour_logprobs=numbers - 7.0,
                                            importance_clip=2.0, baseline=numbers, **credit, **options).loss,
        "sequence": fused_distil_loss(*copy.heads, tokens=copy.tokens, cu_seqlens=BORDERS, credit_span="sequence",
                                      **options).loss,
        "top k": fused_topk_ce(hidden, weight, ids, logprobs, token_mask=mask),
        "credited top k": fused_topk_distil_loss(hidden, weight, ids, logprobs, tokens=copy.tokens, **credit).loss,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_ops(backend, dtype, generator):
    """Each beside `reference` in float64 on the CPU, which has tests of its own."""
    inputs = make_inputs(20, 331 if IS_INTERPRETED else 1031, 64, dtype=dtype, generator=generator)

    def compute(copy: Inputs, name: str) -> dict[str, torch.Tensor]:
        found = {}
        for op, value in other_ops(copy, name).items():
            found |= {op: value.detach().cpu()} | {
                f"{op}: {leaf}": each for leaf, each in gradients_of(value, copy).items()
            }
        return found

    exact, ours = compute(inputs.to(torch.float64), "reference"), compute(on_gpu(inputs), backend)
    # Triton's interpreter rounds to bfloat16 toward zero, up to twice as far as a GPU rounds to the nearest.
    limit = 1e-4 if dtype == torch.float32 else 12e-3 if IS_INTERPRETED else 6e-3
    for name, value in ours.items():
        error = float((value.double() - exact[name]).norm() / exact[name].norm())
        assert error < limit, f"{name}: off by {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "chunk_rows", "staging_rows"), [
    ("gradient_in_forward", 8, 32), ("gradient_in_forward", 8, 64), ("frozen_head", 8, 16), ("recompute", 8, 16),
    ("kept_gradient", 8, 16), ("kept_gradient of both", 8, 16), ("stats_only", 8, 8),
])  # fmt: skip
def test_memory_is_what_the_plan_says(backend, dtype, name, chunk_rows, staging_rows, generator):
    scale = 1 if IS_EMULATED else 16  # a GPU's libraries take some MiB of their own
    row_scale = 0.5 if IS_INTERPRETED else scale
    num_rows, chunk_rows, staging_rows = (int(row_scale * number) for number in (64, chunk_rows, staging_rows))
    inputs = on_gpu(make_inputs(num_rows, 2048 * scale, 64 * scale, dtype=dtype, generator=generator))
    plan = Plan(name.removesuffix(" of both"), chunk_rows, staging_rows)
    both = name.endswith("both")
    frozen, nothing = plan.name == "frozen_head", plan.name == "stats_only"
    inputs.student_weight.requires_grad_(not frozen and not nothing)
    inputs.student_hidden.requires_grad_(not nothing)
    leaves = list(inputs.leaves.values())

    def run() -> int:
        """Bytes of the gradients."""
        if both:
            found = token_stats(*inputs.heads, tokens=inputs.tokens, backend=backend, plan=plan)
            loss = (found.ce + found.logprob).sum()
        else:
            reduction = "none" if plan.name == "kept_gradient" else "sum"
            loss = fused_forward_ce(*inputs.heads, reduction=reduction, backend=backend, plan=plan).sum()
        return sum(each.nbytes for each in torch.autograd.grad(loss, leaves)) if leaves else 0

    if not IS_EMULATED:
        run()  # a GPU's libraries take their memory at their first call
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients = run()
    extra = torch.cuda.max_memory_allocated() - before - gradients
    shape = Shape(
        len(inputs.tokens), *inputs.student_weight.shape, dtype, "cuda", scalar=plan.name != "kept_gradient",
        logprob_grad=both, grad_hidden=True, grad_head=not frozen and not nothing,
    )  # fmt: skip
    no_logits = backend == "triton" and plan.name == "stats_only"
    # Where bfloat16 dW is summed in float32, chunk and staging buffer are freed before dW itself is allocated.
    assert (0.0 if no_logits else 0.6) < extra / extra_bytes(shape, plan) < 1.3


@pytest.mark.parametrize("op", ["forward_ce", "credit", "statistics", "policy", "top k", "without tokens"])
def test_runs_on_the_current_stream_and_waits_for_nothing(backend, op, generator):
    num_rows = 16 if IS_INTERPRETED else 64
    moved_inputs = on_gpu(make_inputs(num_rows, 1031, 64, dtype=torch.bfloat16, generator=generator))
    heads, tokens = moved_inputs.heads, moved_inputs.tokens
    advantages, borders = torch.ones(num_rows).to(GPU), torch.tensor([0, 7, num_rows])

    def loss() -> torch.Tensor:
        if op == "forward_ce":
            return fused_forward_ce(*heads, backend=backend)
        if op == "credit":
            return fused_distil_loss(*heads, tokens=tokens, cu_seqlens=borders, backend=backend).loss
        if op == "top k":
            return fused_topk_ce(*heads[:2], tokens[:, None], advantages[:, None] - 1.2, normalizer=torch.tensor(3))
        if op == "without tokens":
            return fused_distil_loss(*heads, tokens=None, cu_seqlens=None, credit_span="none", backend=backend,
                                     student_logit_scale=0.5, vocab_size=1000).loss  # fmt: skip
        if op == "policy":
            return fused_policy_loss(*heads[:2], tokens=tokens, advantages=advantages, backend=backend).loss
        found = token_stats(*heads, tokens=tokens, backend=backend)
        return (found.ce + found.logprob).sum()

    expected = loss()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            value = loss()
            value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.equal(value, expected)


@pytest.mark.skipif(not IS_EMULATED, reason="an assertion that fails on a GPU ends the process")
@pytest.mark.parametrize(("ids", "logprob"), [(1031, -1.0), (-2, -1.0), (3, 0.01), (3, float("nan"))])
def test_what_a_teacher_cannot_name_is_refused_on_a_gpu_too(ids, logprob, generator):
    moved_inputs = on_gpu(make_inputs(8, 1031, 64, generator=generator))
    named = torch.full((8, 1), ids).to(GPU), torch.full((8, 1), logprob).to(GPU)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match=r"\[distil_kernels\] teacher_"):
            fused_topk_ce(*moved_inputs.heads[:2], *named)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_padding_rows_do_not_exist(backend, generator):
    """Heads with rows of NaN behind the vocabulary are those without, also where no logits are formed."""
    inputs = make_inputs(20, 1031, 64, dtype=torch.bfloat16, generator=generator)

    def longer(weight: torch.Tensor, num_rows: int) -> torch.Tensor:
        nothing = torch.full((num_rows, 64), float("nan"), dtype=weight.dtype)
        return torch.cat([weight.detach(), nothing]).requires_grad_(weight.requires_grad)

    padded = replace(
        inputs, student_weight=longer(inputs.student_weight, 9), teacher_weight=longer(inputs.teacher_weight, 40)
    )
    found = []
    for copy in (on_gpu(inputs), on_gpu(padded)):
        options = {"backend": backend, "vocab_size": 1031}
        value = fused_forward_ce(*copy.heads, **options)
        with torch.no_grad():
            stats = token_stats(*copy.heads, tokens=copy.tokens, **options)
        found.append([value.detach().cpu(), *gradients_of(value, copy).values(), *(each.cpu() for each in stats)])
    (value, hidden, weight, *stats), expected = found[1], found[0]
    assert torch.equal(weight[:1031], expected[2]) and not weight[1031:].any()
    assert all(map(torch.equal, (value, hidden, *stats), (*expected[:2], *expected[3:])))
