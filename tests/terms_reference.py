"""A loss of several terms by its definition: calls drawn at random, the terms from full logits, and autograd."""

from __future__ import annotations

import random
from types import SimpleNamespace

import torch

from distil_kernels import fused_distil_loss
from distil_kernels.testing import (
    assert_within_budget,
    baselines,
    cost_by_definition,
    credit_by_definition,
    logits,
    oracle,
    term_sizes,
)

LENGTHS = [5, 1, 9, 0, 4, 7]
BORDERS = torch.tensor([0, *LENGTHS]).cumsum(0)
N, V, D = sum(LENGTHS), 331, 16

ALL = ("policy", "reference", "label", "z_loss", "entropy")


def per_row(value):
    """A number, or one for each sequence or row, as [N]."""
    value = torch.as_tensor(value)
    return value if value.shape == (N,) else value.expand(6).repeat_interleave(torch.tensor(LENGTHS))


def drawn(generator, terms, **fixed):
    """Options of a call with some terms, drawn at random; what belongs to tokens is near what the student would say."""
    draw = random.Random(int(torch.randint(2**31, (), generator=generator)))

    def normal(size):
        return torch.randn(size, generator=generator)

    weight = {name: draw.choice([0.3, 1.0, 2.5]) for name in ALL}
    options = {
        "distil_weight": draw.choice([1.0, 0.0, 0.4, torch.rand(6, generator=generator), normal(N).relu()]),
        "token_weight": draw.choice([None, torch.rand(N, generator=generator)]),
        "token_mask": draw.choice([None, torch.rand(N, generator=generator) < 0.7]),
        "credit_span": draw.choice(["none", "future", "sequence"]),
        "cost": draw.choice(["ce", "kl", "reverse_kl", "jsd"]),
        "normalizer": draw.choice([None, 7.0]),
    }
    if "policy" in terms:
        options |= {"advantages": draw.choice([normal(N), normal(6)]), "policy_weight": weight["policy"],
                    "old_logprobs": draw.choice([None, -4.0 + normal(N)]),
                    "clip_low": draw.choice([0.2, None]), "clip_high": draw.choice([0.28, None])}  # fmt: skip
    if "reference" in terms:
        options |= {"reference_logprobs": -4.0 + 0.5 * normal(N), "reference_weight": weight["reference"]}
    if "label" in terms:
        rows = torch.randperm(N, generator=generator)
        options |= {"label_rows": torch.where(torch.rand(N, generator=generator) < 0.3, -1, rows),
                    "label_weight": weight["label"], "label_smoothing": draw.choice([0.0, 0.1, 1.0])}  # fmt: skip
    if "z_loss" in terms:
        options |= {"z_loss_weight": 0.1 * weight["z_loss"]}
    if "entropy" in terms:
        options |= {"entropy_weight": weight["entropy"]}
    return options | fixed


def labels_of(inputs, label_rows):
    """A label is another row's token, so that it moves with the vocabulary's order."""
    return torch.where(label_rows < 0, -100, inputs.tokens[label_rows])


def policy_by_definition(logprob, o):
    advantages = per_row(o.advantages).to(logprob.dtype)
    old = logprob.detach() if o.old_logprobs is None else o.old_logprobs.to(logprob.dtype)
    ratio = (logprob - old).exp()
    low = -torch.inf if o.clip_low is None else 1.0 - o.clip_low
    high = torch.inf if o.clip_high is None else 1.0 + o.clip_high
    return -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)


def definition(inputs, **options):
    """Each term by its definition from full logits, and autograd of their weighted sum."""
    o = SimpleNamespace(**({"advantages": None, "reference_logprobs": None, "label_rows": None, "z_loss_weight": 0.0,
                            "entropy_weight": 0.0} | options))  # fmt: skip
    stats, (s, _) = oracle(inputs), logits(inputs)
    weight = torch.ones(N) if o.token_weight is None else o.token_weight
    counted = torch.ones(N, dtype=torch.bool) if o.token_mask is None else o.token_mask
    weight = (weight * counted).to(s.dtype)
    cost = cost_by_definition(inputs, o.cost)
    costs = per_row(o.distil_weight).to(s.dtype) * cost
    credit = torch.zeros_like(costs)
    if o.credit_span != "none":
        weighted = (weight * costs).detach()
        credit = credit_by_definition(weighted, LENGTHS, span=o.credit_span, counted=counted)
    terms = {"cost": cost, "z_loss": stats.lse.square(), "entropy": stats.entropy}
    value = costs + o.z_loss_weight * terms["z_loss"] - o.entropy_weight * stats.entropy
    size = per_row(o.distil_weight).abs() + 2 * o.z_loss_weight * stats.lse.abs() + o.entropy_weight * 10
    if o.advantages is not None:
        terms["policy"] = policy_by_definition(stats.logprob, o)
        value = value + o.policy_weight * terms["policy"]
        size = size + o.policy_weight * terms["policy"].abs()
    if o.reference_logprobs is not None:
        log_ratio = o.reference_logprobs.to(s.dtype) - stats.logprob
        terms["reference"] = log_ratio.exp() - log_ratio - 1.0
        value = value + o.reference_weight * terms["reference"]
        size = size + o.reference_weight * (1.0 + log_ratio.exp())
    if o.label_rows is not None:
        labels = labels_of(inputs, o.label_rows)
        terms["label"] = torch.nn.functional.cross_entropy(
            s, labels, reduction="none", ignore_index=-100, label_smoothing=o.label_smoothing
        )
        value = value + o.label_weight * terms["label"]
        size = size + o.label_weight
    normalizer = o.normalizer or len(LENGTHS)
    loss = (weight * value).sum() / normalizer
    surrogate = loss + (credit * stats.logprob).sum() / normalizer
    gradients = torch.autograd.grad(surrogate, list(inputs.leaves.values()))
    sizes_of_rows = (weight * size + credit.abs()).detach() / normalizer
    found = {"loss": loss.detach(), "credit": credit, "sizes": sizes_of_rows.to(s.dtype)}
    found |= {name: torch.where(counted, term.detach(), 0.0) for name, term in terms.items()}
    return found | dict(zip(inputs.leaves, gradients, strict=True))


def run(inputs, *, label_rows=None, **options):
    if label_rows is not None:
        options["labels"] = labels_of(inputs, label_rows)
    if options.get("token_mask") is not None:  # other rows may hold anything
        for name in ("advantages", "old_logprobs", "reference_logprobs", "distil_weight"):
            if isinstance(options.get(name), torch.Tensor) and options[name].shape == (N,):
                options[name] = options[name].where(options["token_mask"], float("nan"))
        if "labels" in options:
            options["labels"] = options["labels"].where(options["token_mask"], 10**9)
    return fused_distil_loss(*inputs.heads, tokens=inputs.tokens, cu_seqlens=BORDERS, **inputs.options, **options)


def check(inputs, *, backend="cpu", plan="auto", device="cpu", **options):
    """A call on a device within the budget of its definition; returns its result."""
    exact = definition(inputs.to(torch.float64), **options)
    base = baselines(inputs, lambda copy: definition(copy, **options))
    moved = inputs.to(inputs.student_hidden.dtype, device)
    on_device = {name: each.to(device) if isinstance(each, torch.Tensor) else each for name, each in options.items()}
    ours = run(moved, backend=backend, plan=plan, **on_device)
    size = float(exact["sizes"].sum()) * 20
    assert_within_budget("loss", ours.loss.detach().cpu(), base["loss"], exact["loss"], terms=size)
    assert_within_budget("credit", ours.credit.cpu(), base["credit"], exact["credit"], terms=size)
    for name in exact.keys() & {*ALL, "cost"}:
        value = ours.cost if name == "cost" else getattr(ours.terms, name)
        assert_within_budget(name, value.cpu(), base[name], exact[name], terms=20.0)
    gradients = torch.autograd.grad(ours.loss, list(moved.leaves.values()))
    terms = term_sizes(inputs, exact["sizes"])
    for name, gradient in zip(moved.leaves, gradients, strict=True):
        assert_within_budget(name, gradient.cpu(), base[name], exact[name], terms=terms[name])
    return ours
