"""Inputs, oracle and error budget for tests and benchmarks.

The oracle states the definitions a second time, from float64 probabilities over full logits with torch's autograd; it
shares no code with the package. In float32 it is also the baseline that the error budget compares with:

    err(ours, oracle) <= 2 * err(baseline, oracle) + a few ulp of the largest entry and of the terms it sums

The error of a single baseline is one sample of rounding; the budget takes the worst of several orders of summation. The
size of the terms matters where large ones cancel: sum_v (S - T) W over weights of 12 cannot be better than 12 ulp.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distil_kernels.engine.gemm import accumulation_dtype

KINDS = ("ordinary", "peaked", "flat", "offset", "near")
"""ordinary: logits of unit scale. peaked: scale 12, most of the mass on one token. flat: scale 1e-3. offset: every
logit 1e4 higher in one model and 1e4 lower in the other. near: the teacher is the student plus noise of 1e-3, total
variation well below .005, where S - T cancels."""


@dataclass(frozen=True)
class Inputs:
    """Arguments of the public ops, by the names of the ops."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor | None
    tokens: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    """student_bias, teacher_bias, token_mask, token_weight, temperature, teacher_temperature, logit_softcap,
    teacher_logit_softcap, student_logit_scale, teacher_logit_scale."""

    @property
    def heads(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        return self.student_hidden, self.student_weight, self.teacher_hidden, self.teacher_weight

    @property
    def leaves(self) -> dict[str, Tensor]:
        """Returns the student's tensors that need a gradient, by name."""
        named = {"student_hidden": self.student_hidden, "student_weight": self.student_weight}
        if self.options.get("student_bias") is not None:
            named["student_bias"] = self.options["student_bias"]
        return {name: tensor for name, tensor in named.items() if tensor.requires_grad}

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Inputs:
        """Returns fresh leaves of the same values in another floating dtype."""

        def convert(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            moved = value.detach().to(device or value.device)
            moved = moved.to(dtype) if moved.is_floating_point() else moved
            return moved.clone().requires_grad_(value.requires_grad)

        tensors = {name: convert(getattr(self, name)) for name in (*_HEADS, "tokens")}
        return replace(self, **tensors, options={name: convert(value) for name, value in self.options.items()})

    def in_order(self, dims: Tensor, teacher_dims: Tensor, vocab: Tensor) -> Inputs:
        """Returns the inputs with hidden dimensions and vocabulary reordered: other rounding, equal mathematics."""

        def permute(tensor: Tensor, by: Tensor) -> Tensor:
            return tensor.detach()[..., by].clone().requires_grad_(tensor.requires_grad)

        def head(weight: Tensor, by: Tensor) -> Tensor:
            return weight.detach()[vocab][:, by].clone().requires_grad_(weight.requires_grad)

        biases = {name: permute(self.options[name], vocab) for name in _BIASES if self.options.get(name) is not None}
        return replace(
            self,
            student_hidden=permute(self.student_hidden, dims),
            student_weight=head(self.student_weight, dims),
            teacher_hidden=permute(self.teacher_hidden, teacher_dims),
            teacher_weight=None if self.teacher_weight is None else head(self.teacher_weight, teacher_dims),
            tokens=vocab.argsort()[self.tokens],
            options=self.options | biases,
        )


_HEADS = ("student_hidden", "student_weight", "teacher_hidden", "teacher_weight")
_BIASES = ("student_bias", "teacher_bias")


def make_inputs(
    num_rows: int,
    vocab_size: int,
    hidden_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    kind: str = "ordinary",
    teacher_hidden_size: int | None = None,
    shared_head: bool = False,
    bias: bool = False,
    generator: torch.Generator,
    **options: Any,
) -> Inputs:
    """Makes random inputs of a `kind` (see KINDS), rounded to `dtype`: every precision has the same values."""
    teacher_size = hidden_size if shared_head or kind == "near" else teacher_hidden_size or hidden_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scale = {"peaked": 12.0, "flat": 1e-3}.get(kind, 1.0)
    student_hidden = normal(num_rows, hidden_size)
    student_weight = normal(vocab_size, hidden_size) * scale / hidden_size**0.5
    teacher_hidden = normal(num_rows, teacher_size)
    teacher_weight = normal(vocab_size, teacher_size) * scale / teacher_size**0.5
    if kind == "near":
        teacher_hidden = student_hidden.to(dtype).double() + 1e-3 * teacher_hidden
        teacher_weight = student_weight.to(dtype).double()
    if kind == "offset":
        # The last hidden entry is 1 and carries the offset through the weights.
        student_hidden[:, -1] = teacher_hidden[:, -1] = 1.0
        student_weight[:, -1], teacher_weight[:, -1] = 1e4, -1e4
    if bias:
        options["student_bias"] = normal(vocab_size).to(dtype).requires_grad_()
        options["teacher_bias"] = normal(vocab_size).to(dtype)
    tokens = torch.randint(vocab_size, (num_rows,), generator=generator)
    return Inputs(
        student_hidden.to(dtype).requires_grad_(),
        student_weight.to(dtype).requires_grad_(),
        teacher_hidden.to(dtype),
        None if shared_head else teacher_weight.to(dtype),
        tokens,
        options,
    )


NUM_BASELINES = 8


def baselines(inputs: Inputs, compute: Callable[[Inputs], dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """Returns the results of `compute` in float32, by name, one for each order of hidden dimensions and vocabulary.

    Gradients are returned in the original order. If one term is far larger than the others (that of the token, for
    example), a sum rounds at its size from there on: the error depends on the position of that term.
    """
    by_name: dict[str, list[Tensor]] = {}
    vocab_size, hidden_size = inputs.student_weight.shape
    for shift in range(NUM_BASELINES):
        dims = torch.arange(hidden_size).roll(shift * hidden_size // NUM_BASELINES)
        teacher_dims = torch.arange(inputs.teacher_hidden.shape[-1]).flip(0).roll(shift)
        vocab = torch.arange(vocab_size).roll(shift * vocab_size // NUM_BASELINES)
        shared = inputs.teacher_weight is None
        results = compute(inputs.in_order(dims, dims if shared else teacher_dims, vocab).to(torch.float32))
        for name, result in results.items():
            if name in ("student_weight", "student_bias"):
                result = result[vocab.argsort()]
            if name in ("student_weight", "student_hidden"):
                result = result[..., dims.argsort()]
            by_name.setdefault(name, []).append(result)
    return by_name


class Oracle(NamedTuple):
    """Statistics [N] by their definitions, in the dtype of the inputs; differentiable."""

    ce: Tensor
    kl: Tensor
    reverse_kl: Tensor
    logprob: Tensor
    teacher_logprob: Tensor
    entropy: Tensor
    teacher_entropy: Tensor
    lse: Tensor
    teacher_lse: Tensor
    agree: Tensor


def cost_by_definition(inputs: Inputs, cost: str, jsd_weight: float = 0.5) -> Tensor:
    """Returns the cost [N] "ce", "kl", "reverse_kl", "jsd" or "entropy" in the dtype of the inputs; differentiable."""
    if cost in ("ce", "kl", "reverse_kl", "entropy"):
        return getattr(oracle(inputs), cost)
    s, t = (each.log_softmax(-1) for each in logits(inputs))
    # Log-probs of -inf (entries that a model excludes) contribute 0, not 0 * inf.
    floor = torch.finfo(s.dtype).min / 1e4
    s, t = s.clamp(min=floor), t.clamp(min=floor)
    m = torch.logaddexp(t + math.log(jsd_weight), s + math.log1p(-jsd_weight))
    return jsd_weight * (t.exp() * (t - m)).sum(-1) + (1.0 - jsd_weight) * (s.exp() * (s - m)).sum(-1)


def logits(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Returns the logits [N, V] of student and teacher, the teacher's without gradient."""
    options = inputs.options
    teacher_bias = options.get("teacher_bias")
    teacher_weight = inputs.teacher_weight
    if teacher_weight is None:
        teacher_weight = inputs.student_weight
        teacher_bias = options.get("student_bias") if teacher_bias is None else teacher_bias

    def model_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, ...]) -> Tensor:
        scale, softcap, temperature = map(options.get, names)
        scaled = (hidden.flatten(0, -2) @ weight.T + (0.0 if bias is None else bias)) * (scale or 1.0)
        capped = scaled if softcap in (None, math.inf) else softcap * torch.tanh(scaled / softcap)
        return capped / (temperature or 1.0)

    of_student = ("student_logit_scale", "logit_softcap", "temperature")
    student = model_logits(inputs.student_hidden, inputs.student_weight, options.get("student_bias"), of_student)
    own = ("teacher_logit_scale", "teacher_logit_softcap", "teacher_temperature")
    names = tuple(
        name if options.get(name) is not None else default for name, default in zip(own, of_student, strict=True)
    )
    with torch.no_grad():
        teacher = model_logits(inputs.teacher_hidden, teacher_weight, teacher_bias, names)
    return student, teacher


def oracle(inputs: Inputs) -> Oracle:
    """Returns every statistic from full logits, for rows [N]."""
    s, t = logits(inputs)
    log_s, log_t = s.log_softmax(-1), t.log_softmax(-1)
    index = inputs.tokens.flatten()[:, None]
    return Oracle(
        ce=_expect(log_t, -log_s),
        kl=_expect(log_t, log_t - log_s),
        reverse_kl=_expect(log_s, log_s - log_t),
        logprob=log_s.gather(1, index)[:, 0],
        teacher_logprob=log_t.gather(1, index)[:, 0],
        entropy=_expect(log_s, -log_s),
        teacher_entropy=_expect(log_t, -log_t),
        lse=s.logsumexp(-1),
        teacher_lse=t.logsumexp(-1),
        agree=s.argmax(-1) == t.argmax(-1),
    )


def _expect(log_probs: Tensor, values: Tensor) -> Tensor:
    """Returns sum p * value; entries without mass contribute 0."""
    probs = log_probs.exp()
    return torch.where(probs > 0, probs * values, 0.0).sum(-1)


@torch.no_grad()
def term_sizes(inputs: Inputs, row_weight: Tensor) -> dict[str, float]:
    """Returns the largest sum of absolute terms in each gradient of sum(row_weight * ce).

    The terms are (S + T) |W|, (S + T)^T |h| and S + T.
    """
    wide = inputs.to(torch.float64)
    s, t = logits(wide)
    mass = (s.softmax(-1) + t.softmax(-1)) * row_weight.double().abs()[:, None]
    hidden = wide.student_hidden.flatten(0, -2)
    gain = float(inputs.options.get("student_logit_scale", 1.0)) / float(inputs.options.get("temperature", 1.0))
    return {
        "student_hidden": float((mass @ wide.student_weight.abs()).max()) * gain,
        "student_weight": float((mass.T @ hidden.abs()).max()) * gain,
        "student_bias": float(mass.sum(0).max()) * gain,
    }


def credited_weight(credit: Tensor, cost_to_go: Tensor, scale: float = 1.0) -> Tensor:
    """Returns the sizes [N] of cost + credit * logprob, for `term_sizes`.

    A credit is a difference of costs to go, and rounded at their size, however small or clipped it is itself.
    """
    return 1.0 + credit.abs() + scale * cost_to_go.abs()


def credit_by_definition(
    costs: Tensor,
    lengths: list[int],
    *,
    span: str = "future",
    discount: float = 1.0,
    horizon: int | None = None,
    baseline: str | Tensor | None = None,
    group_size: int = 1,
    by_remaining: bool = False,
    clip: float | None = None,
    scale: float | Tensor = 1.0,
    counted: Tensor | None = None,
) -> Tensor:
    """Returns the credit a_t [N] by loops over tokens, sequences and siblings; `scale` is a number or [N]."""
    counted = torch.ones(len(costs), dtype=torch.bool) if counted is None else counted
    starts = [sum(lengths[:b]) for b in range(len(lengths))]

    def to_go(sequence: int, position: int) -> Tensor:
        rows = range(starts[sequence], starts[sequence] + lengths[sequence])
        total, num_tokens = costs.new_zeros(()), 0.0
        for i, row in enumerate(rows):
            near = position < i and (horizon is None or i - position <= horizon)
            if counted[row] and (span == "sequence" or near):
                factor = 1.0 if span == "sequence" else discount ** (i - position)
                total, num_tokens = total + factor * costs[row], num_tokens + factor
        return total / num_tokens if by_remaining and num_tokens else total

    weights = torch.zeros_like(costs)
    for b, length in enumerate(lengths):
        group = range(b // group_size * group_size, (b // group_size + 1) * group_size)
        for position in range(length):
            row = starts[b] + position
            if not counted[row]:
                continue
            value = to_go(b, position)
            if isinstance(baseline, Tensor):
                value = value - baseline[row]
            elif baseline == "leave_one_out":
                others = [j for j in group if j != b and (lengths[j] == 0 or counted[starts[j] :][: lengths[j]].any())]
                value = value - sum(to_go(j, position) for j in others) / max(1, len(others))
            elif baseline == "position_mean":
                alive = [j for j, n in enumerate(lengths) if position < n and counted[starts[j] + position]]
                value = value - sum(to_go(j, position) for j in alive) / len(alive)
            value = (scale[row] if isinstance(scale, Tensor) else scale) * value
            weights[row] = value if clip is None else max(-clip, min(clip, float(value)))
    return weights


def assert_within_budget(
    name: str, ours: Tensor, baselines: list[Tensor], exact: Tensor, *, terms: float = 0.0, ratio: float = 2.0
) -> None:
    """Asserts that the elementwise error of `ours` is within `ratio` times the baselines' largest plus some ulp.

    The ulp are 8 of `ours`' dtype at the largest exact entry (float16 has none finer than 6e-8), and 4 of the
    accumulation dtype at `terms`, the size of the summed terms.
    """
    assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)}, expected {list(exact.shape)}"
    if exact.numel() == 0:
        return
    ours64, exact64 = ours.detach().double(), exact.detach().double()
    error = (ours64 - exact64).abs().max()
    baseline_error = max(float((baseline.detach().double() - exact64).abs().max()) for baseline in baselines)
    limits = torch.finfo(ours.dtype)
    ulp = limits.eps * max(float(exact64.abs().max()), limits.smallest_normal)
    term_ulp = torch.finfo(accumulation_dtype(ours.dtype)).eps * terms
    budget = ratio * baseline_error + 8 * ulp + 4 * term_ulp
    assert error <= budget, (
        f"{name}: error {error:.3e} above {budget:.3e} "
        f"(baseline {baseline_error:.3e}, largest {exact64.abs().max():.3e})"
    )
