"""The public ops with back end `triton` against the float64 oracle: row kernels, head_stats and the driver's plans."""

from __future__ import annotations

import pytest
import torch

from distil_kernels import fused_distil_loss, fused_forward_ce, token_stats
from distil_kernels.backends import triton
from distil_kernels.engine import driver
from distil_kernels.engine.plan import Plan
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


def row_weight(inputs: Inputs) -> torch.Tensor:
    weight = inputs.options.get("token_weight", inputs.student_hidden.new_ones(len(inputs.tokens)))
    return torch.where(inputs.options["token_mask"], weight, 0.0) if "token_mask" in inputs.options else weight


def expected(inputs: Inputs) -> dict[str, torch.Tensor]:
    value = (row_weight(inputs) * oracle(inputs).ce).sum()
    gradients = torch.autograd.grad(value, list(inputs.leaves.values()))
    return {"value": value, **dict(zip(inputs.leaves, gradients, strict=True))}


def check(inputs: Inputs, plan: str | Plan = "auto") -> None:
    value = fused_forward_ce(*inputs.heads, **inputs.options, reduction="sum", backend="triton", plan=plan)
    gradients = torch.autograd.grad(value, list(inputs.leaves.values()))
    exact, base = expected(inputs.to(torch.float64)), baselines(inputs, expected)
    terms = term_sizes(inputs, row_weight(inputs))
    for name, ours in (("value", value), *zip(inputs.leaves, gradients, strict=True)):
        assert_within_budget(name, ours, base[name], exact[name], terms=terms.get(name, 0.0))


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients(kind, generator):
    # 4099: two programs per row.
    check(make_inputs(3, 4099, 8, kind=kind, generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", [1, 7, 131])
def test_every_option_at_once(vocab_size, dtype, generator):
    weight, mask = torch.rand(9, generator=generator).to(dtype), torch.rand(9, generator=generator) < 0.6
    inputs = make_inputs(9, vocab_size, 12, dtype=dtype, bias=True, teacher_hidden_size=20, generator=generator,
                         token_weight=weight, token_mask=mask, temperature=0.7, teacher_temperature=1.3,
                         logit_softcap=8.0)  # fmt: skip
    check(inputs)


@pytest.mark.parametrize("staging_rows", [0, 4, 7, 100])
def test_chunks_and_staging(staging_rows, generator):
    # Chunks of 4 rows of 11: staged are none, exactly one, one and a part of the next, or all of them.
    check(make_inputs(11, 67, 8, generator=generator), Plan("gradient_in_forward", 4, staging_rows))


def check_statistics(inputs: Inputs) -> None:
    """Without a gradient there are no logits; nothing of the driver's may form them."""
    with torch.no_grad():
        found = token_stats(*inputs.heads, **inputs.options, tokens=inputs.tokens, backend="triton")

    def fields(copy: Inputs) -> dict[str, torch.Tensor]:
        return {name: value.detach() for name, value in oracle(copy)._asdict().items() if name != "agree"}

    exact, base = fields(inputs.to(torch.float64)), baselines(inputs, fields)
    size = float(exact["lse"].abs().max()) + float(exact["entropy"].max())
    for name, value in exact.items():
        assert_within_budget(name, getattr(found, name), base[name], value, terms=size)
    if size < 1e3:  # else rounding makes ties
        assert torch.equal(found.agree, oracle(inputs.to(torch.float64)).agree)


@pytest.mark.parametrize(("num_rows", "vocab_size", "sizes"), [(3, 7, (5, 9)), (18, 131, (24, 40)), (2, 1, (8, 8))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_without_logits(num_rows, vocab_size, sizes, dtype, generator, monkeypatch):
    # More and fewer rows than a tile of 16, columns than one of 64, depths than one of 32.
    monkeypatch.setattr(driver.Workspace, "load", lambda *_: pytest.fail("logits were formed"))
    check_statistics(
        make_inputs(num_rows, vocab_size, sizes[0], dtype=dtype, teacher_hidden_size=sizes[1], bias=True,
                    generator=generator, temperature=0.7, logit_softcap=5.0)
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_splits_of_the_vocabulary_meet(kind, generator, monkeypatch):
    # Two processors: six splits of 64 columns for one tile of rows.
    monkeypatch.setattr(triton, "_gpu", lambda device: triton.Gpu("interpreter", (0, 0), 2))
    check_statistics(make_inputs(3, 330, 8, kind=kind, generator=generator))


@pytest.mark.parametrize("plan", ["auto", "recompute", Plan("gradient_in_forward", 8, 16)], ids=str)
def test_credit_in_reverse_time(plan, generator):
    # Four sequences in two groups; compared with the reference back end in float64, whose credit has its own tests.
    inputs = make_inputs(20, 67, 8, kind="near", generator=generator)
    borders = torch.tensor([0, 6, 11, 13, 20])

    def compute(copy: Inputs, backend: str, plan: str | Plan) -> dict[str, torch.Tensor]:
        result = fused_distil_loss(*copy.heads, tokens=copy.tokens, cu_seqlens=borders, baseline="leave_one_out",
                                   group_size=2, discount=0.9, cost="kl", backend=backend, plan=plan)  # fmt: skip
        gradients = torch.autograd.grad(result.loss, list(copy.leaves.values()))
        found = {name: getattr(result, name).detach() for name in ("loss", "credit", "cost_to_go")}
        return found | dict(zip(copy.leaves, gradients, strict=True))

    ours = compute(inputs, "triton", plan)
    exact = compute(inputs.to(torch.float64), "reference", "auto")
    base = baselines(inputs, lambda copy: compute(copy, "reference", "auto"))
    terms = term_sizes(inputs, credited_weight(exact["credit"], exact["cost_to_go"]) / 4)
    for name, value in ours.items():
        assert_within_budget(name, value, base[name], exact[name], terms=terms.get(name, 1.0))
