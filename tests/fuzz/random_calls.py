"""Random calls of the public ops, each checked against its definition in float64.

    python tests/fuzz/random_calls.py --calls 10000             some ten calls a second, on one core
    python tests/fuzz/random_calls.py --calls 1 --seed 1234     one call again

A call has a seed of its own, which a failure names. What is drawn: the op and its cost, reduction, credit, clip,
rewards, labels and other terms; sizes down to nothing; precision, back end and plan; the kind of logits (see
`distil_kernels.testing.KINDS`); both models' scale, softcap, temperature, bias, heads that are shared, padded or of
different widths; masks, weights, normalizers; which of the student's tensors want a gradient. Rows that a mask leaves
out and padding of heads hold NaN. The errors have the budget of the other tests, those of plain torch in float32, and a
few ulp of the logits' terms: few of these calls are large enough for rounding to average out.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import distil_kernels
from distil_kernels.testing import (
    KINDS,
    Inputs,
    assert_within_budget,
    baselines,
    cost_by_definition,
    credit_by_definition,
    logits,
    make_inputs,
    oracle,
    term_sizes,
)

DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOKEN_LOSSES = {
    "ce": "fused_forward_ce",
    "kl": "fused_forward_kl",
    "reverse_kl": "fused_reverse_kl",
    "jsd": "fused_jsd",
}


@dataclass
class Call:
    """One call: arguments by the op's names, and what it computes by definition."""

    op: str
    inputs: Inputs
    define: Callable[[Inputs], dict[str, Tensor]]
    """Makes the results by name, in the precision of the inputs; "surrogate" is what the gradients are of."""
    take: Callable[[Any], dict[str, Tensor]]
    """Takes the results by name from what the op returned; "surrogate" may be another than the loss."""
    row_sizes: Callable[[Inputs], Tensor]
    """Makes the size [N] of each row's part in the gradients."""
    tokens: bool = False
    teacher: bool = True
    settings: dict[str, Any] = field(default_factory=dict)
    counted: Tensor | None = None
    padding: int = 0

    def __str__(self) -> str:
        heads = [tuple(tensor.shape) if tensor is not None else None for tensor in self.inputs.heads]
        values = self.inputs.options | self.settings
        shown = {name: tuple(each.shape) if isinstance(each, Tensor) else each for name, each in values.items()}
        return f"{self.op}, {self.inputs.student_hidden.dtype}, {heads}, {self.padding} padding rows, {shown}"


def draw(seed: int) -> Call:
    """Draws the call of a seed."""
    choices = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)

    def sometimes(share: float, value: Callable[[], Any], otherwise: Any = None) -> Any:
        return value() if choices.random() < share else otherwise

    # The models.
    dtype = choices.choice(DTYPES)
    lengths = [choices.choice((0, 1, 2, 5, 9)) for _ in range(choices.choice((1, 2, 4)))]
    num_rows = sum(lengths)
    options = {
        "temperature": sometimes(0.4, lambda: choices.uniform(0.3, 3.0), 1.0),
        "teacher_temperature": sometimes(0.3, lambda: choices.uniform(0.3, 3.0)),
        "logit_softcap": sometimes(0.3, lambda: choices.uniform(2.0, 40.0)),
        "teacher_logit_softcap": sometimes(0.2, lambda: choices.choice((5.0, float("inf")))),
        "student_logit_scale": sometimes(0.3, lambda: choices.uniform(0.1, 2.0), 1.0),
        "teacher_logit_scale": sometimes(0.2, lambda: choices.uniform(0.1, 2.0)),
    }
    inputs = make_inputs(
        num_rows, choices.choice((2, 17, 64, 257, 301)), choices.choice((1, 8, 33)), dtype=dtype,
        kind=choices.choice(KINDS), teacher_hidden_size=choices.choice((None, 24)),
        shared_head=choices.random() < 0.2, bias=choices.random() < 0.3, generator=generator, **options,
    )  # fmt: skip
    if choices.random() < 0.2:  # LoRA on the body
        inputs = replace(inputs, student_weight=inputs.student_weight.detach())
        if inputs.options.get("student_bias") is not None:
            inputs.options["student_bias"] = inputs.options["student_bias"].detach()
    counted = sometimes(0.5, lambda: torch.rand(num_rows, generator=generator) < choices.choice((0.0, 0.6)))
    weight = sometimes(0.4, lambda: torch.rand(num_rows, generator=generator, dtype=torch.float32) * 3)
    normalizer = sometimes(0.4, lambda: choices.choice((7, 0.3, torch.tensor(11.0))))
    settings = {
        "backend": choices.choice(("auto", "reference") if dtype == torch.float64 else ("auto", "cpu", "reference")),
        "token_mask": sometimes(0.5, lambda: counted.to(torch.int64), counted) if counted is not None else None,
    }
    present = torch.ones(num_rows, dtype=torch.bool) if counted is None else counted
    row_weight = present.double() if weight is None else present * weight.double()
    mean_of = normalizer if normalizer is not None else (float(row_weight.sum()) or 1.0)
    common = {"inputs": inputs, "counted": counted, "padding": sometimes(0.2, lambda: 5, 0)}

    # The op.
    op = choices.choice(("loss", "loss", "distil", "distil", "stats", "logprobs", "policy"))
    upstream = torch.randn(2, num_rows, generator=generator, dtype=torch.float64) * present
    if op == "loss":
        cost, reduction = choices.choice(list(TOKEN_LOSSES)), choices.choice(("mean", "sum", "none"))
        jsd_weight = choices.uniform(0.1, 0.9)
        denominator = float(mean_of) if reduction == "mean" else 1.0
        by_row = row_weight / denominator * (upstream[0] if reduction == "none" else 1.0)
        settings |= {"reduction": reduction, "token_weight": weight, "plan": _plan(choices, reduction == "none")}
        settings |= {"jsd_weight": jsd_weight} if cost == "jsd" else {}
        settings |= {"normalizer": normalizer} if reduction == "mean" else {}

        def define(inputs: Inputs) -> dict[str, Tensor]:
            costs = cost_by_definition(inputs, cost, jsd_weight)
            total = (costs * by_row.to(costs)).sum()
            values = costs.detach() * row_weight.to(costs) if reduction == "none" else total.detach()
            return {"value": values, "surrogate": total}

        def take(result: Tensor) -> dict[str, Tensor]:
            total = (result * upstream[0].to(result)).sum() if reduction == "none" else result
            return {"value": result.detach(), "surrogate": total}

        return Call(
            TOKEN_LOSSES[cost], define=define, take=take, settings=settings, **common,
            row_sizes=lambda wide: by_row * _gain(wide, cost),
        )  # fmt: skip

    if op == "distil":
        cost = choices.choice(("ce", "kl", "reverse_kl", "jsd"))
        span = choices.choice(("none", "future", "future", "sequence"))
        exact = span == "sequence"
        credit = {
            "discount": 1.0 if exact else sometimes(0.6, choices.random, 1.0),
            "horizon": None if exact else sometimes(0.3, lambda: choices.randint(1, 4)),
            "baseline": choices.choice((None, "position_mean")),
        }
        by_remaining = not exact and choices.random() < 0.2
        scale = sometimes(0.3, lambda: choices.uniform(0.0, 2.0), 1.0)
        distil_weight = sometimes(0.3, lambda: choices.choice((0.0, 0.3)), 1.0)
        advantages = sometimes(0.3, lambda: torch.randn(num_rows, generator=generator, dtype=torch.float32))
        is_labelled = sometimes(0.3, lambda: torch.rand(num_rows, generator=generator) < 0.7)
        z_loss_weight = sometimes(0.2, lambda: choices.uniform(0.0, 0.1), 0.0)
        entropy_weight = sometimes(0.2, lambda: choices.uniform(-1.0, 1.0), 0.0)
        settings |= {
            "distil_weight": distil_weight, "advantages": advantages, "z_loss_weight": z_loss_weight,
            "entropy_weight": entropy_weight,
            "labels": None if is_labelled is None else torch.where(is_labelled, inputs.tokens, -100),
        }  # fmt: skip
        settings |= credit | {
            "cost": cost, "credit_span": span, "normalize_by_remaining": by_remaining, "credit_scale": scale,
            "token_weight": weight, "normalizer": normalizer, "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0),
            "plan": choices.choice(("auto", "recompute")),
        }  # fmt: skip
        denominator = float(len(lengths) if normalizer is None else normalizer)

        def define(inputs: Inputs) -> dict[str, Tensor]:
            weight = row_weight.to(inputs.student_hidden)
            costs = distil_weight * cost_by_definition(inputs, cost) * weight
            credits = torch.zeros_like(costs)
            if span != "none":
                credits = credit_by_definition(
                    costs.detach(),
                    lengths,
                    span=span,
                    by_remaining=by_remaining,
                    scale=scale,
                    counted=present,
                    **credit,
                )
            stats = oracle(inputs)
            terms = z_loss_weight * stats.lse.square() - entropy_weight * stats.entropy
            if advantages is not None:
                terms = terms - (stats.logprob - stats.logprob.detach()).exp() * advantages.to(weight)
            if is_labelled is not None:
                terms = terms - is_labelled * stats.logprob
            value = (costs + weight * terms).sum() / denominator
            total = value + (credits * stats.logprob).sum() / denominator
            return {"value": value.detach(), "credit": credits, "surrogate": total}

        def sizes(wide: Inputs) -> Tensor:
            reached = (
                (cost_by_definition(wide, cost).detach() * row_weight).abs().sum() * (span != "none") * (1 + scale)
            )
            of_terms = 2 * z_loss_weight * oracle(wide).lse.abs() + abs(entropy_weight) * _gain(wide, "entropy")
            of_terms = of_terms + (0.0 if advantages is None else advantages.abs()) + (is_labelled is not None)
            return (row_weight * (_gain(wide, cost) + of_terms) + present * reached) / denominator

        return Call(
            "fused_distil_loss", define=define, row_sizes=sizes, tokens=True, settings=settings, **common,
            take=lambda result: {"value": result.loss.detach(), "credit": result.credit, "surrogate": result.loss},
        )  # fmt: skip

    if op == "policy":
        advantages = torch.randn(num_rows, generator=generator, dtype=torch.float32)
        entropy_weight = sometimes(0.5, lambda: choices.uniform(-1.0, 1.0), 0.0)
        settings |= {
            "advantages": advantages, "entropy_weight": entropy_weight, "token_weight": weight,
            "normalizer": normalizer, "plan": choices.choice(("auto", "recompute")),
        }  # fmt: skip
        by_row = row_weight / float(mean_of)

        def define(inputs: Inputs) -> dict[str, Tensor]:
            stats = oracle(inputs)
            ratio = (stats.logprob - stats.logprob.detach()).exp()
            rows = -ratio * advantages.to(ratio) - entropy_weight * stats.entropy
            total = (rows * by_row.to(ratio)).sum()
            return {"value": total.detach(), "surrogate": total}

        return Call(
            "fused_policy_loss", define=define, tokens=True, teacher=False, settings=settings, **common,
            row_sizes=lambda wide: by_row * (advantages.abs() + abs(entropy_weight) * _gain(wide, "entropy")),
            take=lambda result: {"value": result.loss.detach(), "surrogate": result.loss},
        )  # fmt: skip

    names = ("ce", "kl", "reverse_kl", "logprob", "teacher_logprob", "entropy", "teacher_entropy")
    names, first = (names, "ce") if op == "stats" else (("logprob", "entropy"), "entropy")
    settings["plan"] = choices.choice(("auto", "recompute", "kept_gradient"))

    def define(inputs: Inputs) -> dict[str, Tensor]:
        stats = oracle(inputs)
        pairs = zip((first, "logprob"), upstream, strict=True)
        total = sum((getattr(stats, name) * weights.to(stats.ce)).sum() for name, weights in pairs)
        return {name: getattr(stats, name).detach() * present for name in names} | {"surrogate": total}

    def take(result: Any) -> dict[str, Tensor]:
        pairs = zip((first, "logprob"), upstream, strict=True)
        total = sum((getattr(result, name) * weights.to(result.lse)).sum() for name, weights in pairs)
        return {name: getattr(result, name).detach() for name in names} | {"surrogate": total}

    return Call(
        "token_stats" if op == "stats" else "token_logprobs", define=define, take=take, tokens=True,
        teacher=op == "stats", settings=settings, **common,
        row_sizes=lambda wide: upstream[0].abs() * _gain(wide, first) + upstream[1].abs(),
    )  # fmt: skip


def _plan(choices: random.Random, per_token: bool) -> str:
    return choices.choice(("auto", "recompute", "kept_gradient" if per_token else "gradient_in_forward"))


def _gain(wide: Inputs, cost: str) -> Tensor:
    """The size [N] of a term in the gradient of a cost, where that of cross-entropy is 1."""
    if cost in ("ce", "kl"):
        return torch.ones(wide.tokens.numel(), dtype=torch.float64)
    log_s, log_t = (each.detach().log_softmax(-1) for each in logits(wide))
    terms = log_s.exp() * (log_s.abs() if cost == "entropy" else (log_s - log_t).abs())
    return 1.0 + terms.amax(-1) + terms.sum(-1)


def _logit_sizes(wide: Inputs) -> Tensor:
    """The size [N] at which the logits of either model round: that of their terms."""
    options = wide.options
    bias = options.get("student_bias")
    student = (wide.student_hidden.abs() @ wide.student_weight.abs().T).amax(-1)
    student = student + (0.0 if bias is None else bias.abs().max())
    student = student * options["student_logit_scale"] / options["temperature"]
    weight = wide.student_weight if wide.teacher_weight is None else wide.teacher_weight
    teacher = (wide.teacher_hidden.abs() @ weight.abs().T).amax(-1)
    scale = options["student_logit_scale"] if options["teacher_logit_scale"] is None else options["teacher_logit_scale"]
    return (student + teacher * scale / (options["teacher_temperature"] or options["temperature"])).detach()


def check(call: Call) -> None:
    """Runs a call, and asserts that its results and gradients are those of its definition."""

    def with_gradients(inputs: Inputs) -> dict[str, Tensor]:
        results = call.define(inputs)
        gradients = torch.autograd.grad(results.pop("surrogate"), list(inputs.leaves.values()))
        return results | dict(zip(inputs.leaves, gradients, strict=True))

    wide = call.inputs.to(torch.float64)
    exact, base = with_gradients(wide), baselines(call.inputs, with_gradients)
    terms, row_sizes = dict.fromkeys(call.inputs.leaves, 0.0), torch.zeros(0)
    if call.inputs.tokens.numel():
        row_sizes = call.row_sizes(wide).detach() * (1.0 + _logit_sizes(wide))
        terms = term_sizes(call.inputs, row_sizes)
    spoilt = _spoilt(call)
    heads = spoilt.heads if call.teacher else spoilt.heads[:2]
    options = {name: value for name, value in spoilt.options.items() if call.teacher or not name.startswith("teacher")}
    settings = call.settings | ({"tokens": spoilt.tokens} if call.tokens else {})
    if call.padding:
        settings["vocab_size"] = call.inputs.student_weight.shape[0]
    results = call.take(getattr(distil_kernels, call.op)(*heads, **options, **settings))
    gradients = torch.autograd.grad(results.pop("surrogate"), list(spoilt.leaves.values()))
    for name, value in results.items():
        size = float(exact[name].abs().sum()) * 10 + float(row_sizes.abs().sum())
        assert_within_budget(name, value, base[name], exact[name], terms=size)
    for name, gradient in zip(spoilt.leaves, gradients, strict=True):
        if name != "student_hidden" and call.padding:
            assert not gradient[-call.padding :].any(), f"{name}: padding rows have a gradient"
            gradient = gradient[: -call.padding]
        # A z-loss of large logits has gradients that float16 cannot hold; those of a mean are divided after the op.
        divided = max(1, call.inputs.tokens.numel()) if gradient.dtype == torch.float16 else 1
        held = exact[name].abs() * divided < 0.99 * torch.finfo(gradient.dtype).max
        ours, exactly, *plain = (each.where(held, 0.0) for each in (gradient, exact[name], *base[name]))
        assert_within_budget(name, ours, plain, exactly, terms=terms[name])


def _spoilt(call: Call) -> Inputs:
    """The inputs with NaN in every row that does not count, and in rows of heads beyond the vocabulary."""
    inputs = call.inputs

    def rows(tensor: Tensor) -> Tensor:
        if call.counted is None:
            return tensor
        return torch.where(call.counted[:, None], tensor.detach(), torch.nan).requires_grad_(tensor.requires_grad)

    def padded(tensor: Tensor | None) -> Tensor | None:
        if tensor is None or not call.padding:
            return tensor
        filler = tensor.new_full((call.padding, *tensor.shape[1:]), torch.nan)
        return torch.cat([tensor.detach(), filler]).requires_grad_(tensor.requires_grad)

    biases = {name: padded(inputs.options.get(name)) for name in ("student_bias", "teacher_bias")}
    return replace(
        inputs,
        student_hidden=rows(inputs.student_hidden),
        teacher_hidden=rows(inputs.teacher_hidden),
        student_weight=padded(inputs.student_weight),
        teacher_weight=padded(inputs.teacher_weight),
        options=inputs.options | biases,
    )


def run(first_seed: int, num_calls: int, seconds: float) -> int:
    """Checks calls of consecutive seeds until their number or the time is reached; returns how many.

    Raises:
        AssertionError: a call is wrong; the message has its seed and the call.
    """
    begin = time.monotonic()
    for number in range(num_calls):
        if time.monotonic() - begin > seconds:
            return number
        call = draw(first_seed + number)
        try:
            check(call)
        except Exception as error:
            raise AssertionError(f"call of seed {first_seed + number}: {error}\n{call}") from error
    return num_calls


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    arguments = parser.parse_args()
    print(f"seeds from {arguments.seed}")
    begin = time.monotonic()
    print(f"{run(arguments.seed, arguments.calls, float('inf'))} calls in {time.monotonic() - begin:.0f} s, all right")
