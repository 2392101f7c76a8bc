"""Scale, softcap and temperature of each model's logits: every op against the definition in float64."""

from __future__ import annotations

import math

import pytest
import torch

import distil_kernels
from distil_kernels import (
    explain,
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
from distil_kernels.testing import (
    Inputs,
    assert_within_budget,
    baselines,
    cost_by_definition,
    logits,
    make_inputs,
    oracle,
    term_sizes,
)

N, V, D = 9, 40, 8
SCALINGS = {
    "both have their own": {
        "student_logit_scale": 0.4, "teacher_logit_scale": 2.5, "logit_softcap": 1.5, "teacher_logit_softcap": 4.0,
        "temperature": 0.7, "teacher_temperature": 1.3,
    },
    "the teacher's are the student's": {"student_logit_scale": 3.0, "logit_softcap": 2.0, "temperature": 0.7},
    "the teacher has no softcap": {"student_logit_scale": 2.0, "logit_softcap": 2.0, "teacher_logit_softcap": math.inf},
    "the teacher alone": {"teacher_logit_scale": 0.5, "teacher_logit_softcap": 1.0, "logit_softcap": math.inf},
}  # fmt: skip


def student_of(inputs: Inputs) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, object]]:
    """Hidden states and head, and the options that an op without a teacher's head takes."""
    options = {name: value for name, value in inputs.options.items() if not name.startswith("teacher")}
    return inputs.heads[:2], options


@pytest.mark.parametrize("shared_head", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("plan", ["kept_gradient", "recompute"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", SCALINGS)
def test_every_statistic_and_gradient(name, backend, plan, shared_head, generator):
    inputs = make_inputs(N, 1031, D, bias=True, shared_head=shared_head, generator=generator, **SCALINGS[name])
    upstream = torch.randn(2, N, generator=generator)

    def results(found: object, copy: Inputs) -> dict[str, torch.Tensor]:
        fields = {key: value for key, value in found._asdict().items() if key != "agree"}
        weights = zip(("ce", "logprob"), upstream, strict=True)
        total = sum((fields[key] * up.to(fields[key].dtype)).sum() for key, up in weights)
        gradients = torch.autograd.grad(total, list(copy.leaves.values()))
        return fields | dict(zip(copy.leaves, gradients, strict=True))

    found = token_stats(*inputs.heads, tokens=inputs.tokens, **inputs.options, backend=backend, plan=plan)
    ours, exact = results(found, inputs), results(oracle(wide := inputs.to(torch.float64)), wide)
    base = baselines(inputs, lambda copy: results(oracle(copy), copy))
    size = max(float(each.detach().abs().max()) for each in logits(wide)) + 8.0
    terms = term_sizes(inputs, upstream.abs().sum(0))
    for key, value in ours.items():
        assert_within_budget(key, value, base[key], exact[key], terms=terms.get(key, size))


def named(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tokens of each row, and their log-probs under some teacher."""
    ids = torch.stack([inputs.tokens, (inputs.tokens + 1) % V], -1)
    return ids, torch.tensor([0.5, 0.3], dtype=torch.float64).log().expand(N, 2)


def named_ce(inputs: Inputs) -> torch.Tensor:
    """The cross-entropy to them, and to all others as one."""
    probs = logits(inputs)[0].softmax(-1).gather(1, named(inputs)[0])
    return -(0.5 * probs[:, 0].log() + 0.3 * probs[:, 1].log() + 0.2 * (1.0 - probs.sum(-1)).log()).sum()


def one_row_each() -> torch.Tensor:
    return torch.arange(N + 1)


OPS = {
    "fused_forward_ce": (
        lambda x: fused_forward_ce(*x.heads, **x.options, reduction="sum"), lambda x: oracle(x).ce.sum(),
    ),
    "fused_forward_kl": (
        lambda x: fused_forward_kl(*x.heads, **x.options, normalizer=1.0), lambda x: oracle(x).kl.sum(),
    ),
    "fused_reverse_kl": (
        lambda x: fused_reverse_kl(*x.heads, **x.options, reduction="sum"), lambda x: oracle(x).reverse_kl.sum(),
    ),
    "fused_jsd": (
        lambda x: fused_jsd(*x.heads, **x.options, reduction="none").sum(),
        lambda x: cost_by_definition(x, "jsd").sum(),
    ),
    "fused_distil_loss": (
        lambda x: fused_distil_loss(
            *x.heads, **x.options, tokens=x.tokens, cu_seqlens=one_row_each(), cost="kl", normalizer=1.0
        ).loss,
        lambda x: oracle(x).kl.sum(),
    ),
    "token_stats": (
        lambda x: token_stats(*x.heads, **x.options, tokens=x.tokens).logprob.sum(), lambda x: oracle(x).logprob.sum(),
    ),
    "token_logprobs": (
        lambda x: (lambda heads, options: token_logprobs(*heads, **options, tokens=x.tokens).entropy.sum())(
            *student_of(x)
        ),
        lambda x: oracle(x).entropy.sum(),
    ),
    "fused_policy_loss": (
        lambda x: (
            lambda heads, options: fused_policy_loss(
                *heads, **options, tokens=x.tokens, advantages=x.teacher_hidden[:, 0], normalizer=1.0,
                entropy_weight=0.5, old_logprobs=oracle(x).logprob.detach(),
            ).loss
        )(*student_of(x)),
        lambda x: -(
            (oracle(x).logprob - oracle(x).logprob.detach()).exp() * x.teacher_hidden[:, 0] + 0.5 * oracle(x).entropy
        ).sum(),
    ),
    "fused_topk_ce": (
        lambda x: (lambda heads, options: fused_topk_ce(*heads, *named(x), **options, reduction="sum"))(*student_of(x)),
        named_ce,
    ),
    "fused_topk_distil_loss": (
        lambda x: (
            lambda heads, options: fused_topk_distil_loss(
                *heads, *named(x), **options, tokens=x.tokens, cu_seqlens=one_row_each(), normalizer=1.0
            ).loss
        )(*student_of(x)),
        named_ce,
    ),
}  # fmt: skip
assert OPS.keys() == {name for name in distil_kernels.__all__ if name.startswith(("fused", "token"))}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("op", OPS)
def test_every_op(op, name, generator):
    inputs = make_inputs(N, V, D, dtype=torch.float64, bias=True, generator=generator, **SCALINGS[name])
    for ours, exact in zip(*(results(compute(inputs), inputs) for compute in OPS[op]), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)


def results(value: torch.Tensor, inputs: Inputs) -> list[torch.Tensor]:
    return [value.detach(), *torch.autograd.grad(value, list(inputs.leaves.values()))]


@pytest.mark.parametrize("name", SCALINGS)
def test_gradcheck(name, generator):
    inputs = make_inputs(4, 9, 4, dtype=torch.float64, bias=True, generator=generator, **SCALINGS[name])
    options = {key: value for key, value in inputs.options.items() if key != "student_bias"}

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return fused_jsd(hidden, weight, *inputs.heads[2:], student_bias=bias, **options)

    assert torch.autograd.gradcheck(loss, list(inputs.leaves.values()))


def test_explain_has_what_was_given():
    spec = explain(
        "fused_forward_ce", num_rows=8, vocab_size=9, hidden_size=4, logit_softcap=30.0, student_logit_scale=0.5,
        teacher_logit_softcap=math.inf, teacher_temperature=2.0,
    ).spec  # fmt: skip
    assert (spec.student.scale, spec.student.softcap, spec.student.temperature) == (0.5, 30.0, 1.0)
    assert (spec.teacher.scale, spec.teacher.softcap, spec.teacher.temperature) == (0.5, None, 2.0)
