"""The loss of one micro-batch: hidden states of both models at the completion tokens, into `fused_distil_loss`.

    L = (1 / normalizer) sum_t H(teacher_t, student_t),  differentiated as an expectation over the rollouts

or another cost of the family, or, without a teacher, L = -(1 / normalizer) sum_t A log S[y_t] with the rollout's score
less its group's mean for A.

Only completion rows are computed. The normalizer is the batch's number of rollouts, so that micro-batches add up to
the batch whatever their sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distil_kernels import DistilLoss, fused_distil_loss, fused_policy_loss, fused_topk_distil_loss
from distil_kernels.hf import CausalLM
from distil_kernels.train.baseline import PositionAverage
from distil_kernels.train.config import Config
from distil_kernels.train.teachers.local import Teacher
from distil_kernels.train.teachers.remote import RemoteTeacher, TopK


class Sums(NamedTuple):
    """Sums over the completion tokens that count, to be divided by `tokens` when logged."""

    tokens: int
    totals: Tensor
    """[len(SUMMED)] float64."""
    sequence_teacher_logprob: Tensor | None
    """[B], of each completion under the teacher, where there is one."""
    inner_products: Tensor | None = None
    """Of `alignment`, where asked for."""
    largest_mismatch: Tensor | None = None
    """[], of any token in a first update on a rollout server's completions."""

    def on_cpu(self) -> Sums:
        return Sums(self.tokens, *(None if field is None else field.cpu() for field in self[1:]))  # type: ignore


SUMMED = (
    "cost", "ce", "kl", "reverse_kl", "entropy", "teacher_entropy", "agree", "abs_credit", "tail", "unmapped", "drift",
    "mismatch",
)  # fmt: skip


@dataclass
class Kept:
    """What the updates on the same rollouts share."""

    sampled: Tensor | None = None
    """[N], log-probs of the completions' tokens as the rollout server says that sampled them."""
    first: Tensor | None = None
    """[N], the same under the student in the first update, which sets it."""
    taught: Tensor | TopK | None = None
    """From a teacher that does not move."""

    @property
    def behaviour(self) -> Tensor | None:
        """[N], under the policy that sampled, at its temperature; None where that is the student as it is."""
        return self.first if self.sampled is None else self.sampled

    def compare(self, logprobs: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """How far the behaviour is from the student [N], as SUMMED names it; notes the student's first log-probs."""
        is_fresh, behaviour = self.first is None, self.behaviour
        self.first = logprobs if self.first is None else self.first
        if behaviour is None:
            return {}
        apart = behaviour - logprobs if mask is None else (behaviour - logprobs) * mask
        return {"mismatch": apart.abs()} if is_fresh else {"drift": apart}


def _cost(config: Config) -> str:
    return config.objective if config.objective in ("reverse_kl", "jsd") else config.cost


def fused_loss(
    student: CausalLM,
    student_hidden: Tensor,
    teacher: Teacher | RemoteTeacher,
    taught: Tensor | TopK,
    completions: Sequence[list[int]],
    config: Config,
    average: PositionAverage,
    plan: str = "auto",
    **options: Any,
) -> DistilLoss:
    """The op with a run's settings; hidden states are [N, D], packed completion after completion, and `taught` is what
    the teacher gave for these states."""
    lengths = [len(done) for done in completions]
    baseline: str | Tensor | None = config.baseline
    if config.baseline == "none" or config.credit_span == "none":
        baseline = None
    elif config.baseline == "moving_average":
        baseline = average.values(lengths)
    options |= dict(
        student_bias=student.bias,
        temperature=config.temperature,
        logit_softcap=student.softcap,
        tokens=torch.tensor([token for done in completions for token in done], device=student_hidden.device),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        cost=_cost(config),
        credit_span=config.credit_span,
        discount=config.discount,
        horizon=config.horizon,
        normalize_by_remaining=config.normalize_by_remaining,
        baseline=baseline,
        group_size=config.rollouts_per_prompt,
        credit_clip=config.credit_clip,
        credit_scale=config.credit_scale,
    )
    if isinstance(taught, TopK):
        return fused_topk_distil_loss(student_hidden, student.weight, taught.ids, taught.logprobs, **options)
    assert isinstance(teacher, Teacher)
    teacher_weight, teacher_bias = teacher.head
    return fused_distil_loss(
        student_hidden, student.weight, taught.to(student_hidden.dtype), teacher_weight, teacher_bias=teacher_bias,
        teacher_temperature=config.teacher_temperature, jsd_weight=config.jsd_weight, backend=config.backend,
        plan=plan, **options,
    )  # fmt: skip


def distil_loss(
    student: CausalLM,
    student_hidden: Tensor,
    teacher: Teacher | RemoteTeacher,
    taught: Tensor | TopK,
    completions: Sequence[list[int]],
    config: Config,
    average: PositionAverage,
    normalizer: float,
    counts: Sequence[Sequence[bool]],
    kept: Kept | None = None,
) -> tuple[Tensor, Sums]:
    """Loss [] and what is logged of it; `average` takes note of fresh rollouts' costs-to-go.

    Tokens that do not count (one entry of `counts` for each token of each completion) cost nothing, have no credit and
    are in no sum. Rollouts with log-probs in `kept` are another policy's, older or a server's, and weighted for it.
    """
    kept = kept or Kept()
    is_fresh, behaviour, clip = kept.first is None, kept.behaviour, config.importance_clip
    lengths = [len(done) for done in completions]
    mask = token_mask(counts, student_hidden.device)
    out = fused_loss(
        student, student_hidden, teacher, taught, completions, config, average,
        normalizer=normalizer, plan=config.plan, token_mask=mask, behaviour_logprobs=behaviour,
        importance_clip=None if behaviour is None else clip,
    )  # fmt: skip
    stats = out.stats
    found = {"cost": out.cost, "abs_credit": out.credit.abs(), **stats._asdict(), **kept.compare(stats.logprob, mask)}
    if is_fresh:
        average.observe(out.cost_to_go, lengths, mask)
    num_counted = sum(map(sum, counts))
    if isinstance(taught, TopK):  # a token that is not named has no log-prob, and so the completion has none
        shares = {"tail": taught.tail, "unmapped": taught.unmapped}
        counted = shares if mask is None else {name: share * mask for name, share in shares.items()}
        return out.loss, _sums(num_counted, found | counted)
    device = student_hidden.device
    index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    per_sequence = torch.zeros(len(lengths), dtype=torch.float64, device=device)
    per_sequence.index_add_(0, index, stats.teacher_logprob.to(torch.float64))
    return out.loss, _sums(num_counted, found, per_sequence)


def _sums(num_tokens: int, found: dict[str, Tensor], sequence_teacher_logprob: Tensor | None = None) -> Sums:
    """Of values [N], by name."""
    unknown = found["entropy"].new_full((), math.nan)
    totals = torch.stack([found.get(name, unknown).to(torch.float64).sum() for name in SUMMED])
    largest = found["mismatch"].max() if "mismatch" in found else None
    return Sums(num_tokens, totals, sequence_teacher_logprob, largest_mismatch=largest)


def token_mask(counts: Sequence[Sequence[bool]], device: torch.device) -> Tensor | None:
    """[N] bool for packed completions; None where every token counts."""
    flat = [token for row in counts for token in row]
    return None if all(flat) else torch.tensor(flat, device=device)


def policy_loss(
    student: CausalLM,
    student_hidden: Tensor,
    completions: Sequence[list[int]],
    scores: Sequence[float],
    config: Config,
    normalizer: float,
    counts: Sequence[Sequence[bool]],
    kept: Kept | None = None,
) -> tuple[Tensor, Sums]:
    """As `distil_loss`; scores are [B]. The ratio to another policy is clipped as the op does by default."""
    kept = kept or Kept()
    lengths = torch.tensor([len(done) for done in completions])
    tokens = torch.tensor([token for done in completions for token in done], device=student_hidden.device)
    advantages = group_advantages(torch.tensor(scores), config.rollouts_per_prompt, config.normalize_advantages)
    per_token = advantages.repeat_interleave(lengths).to(student_hidden.device)
    mask = token_mask(counts, tokens.device)
    out = fused_policy_loss(
        student_hidden, student.weight, tokens=tokens, advantages=per_token, student_bias=student.bias,
        temperature=config.temperature, logit_softcap=student.softcap, normalizer=normalizer, backend=config.backend,
        plan=config.plan, token_mask=mask, old_logprobs=kept.behaviour,
    )  # fmt: skip
    return out.loss, _sums(sum(map(sum, counts)), {"entropy": out.entropy, **kept.compare(out.logprob, mask)})


def group_advantages(scores: Tensor, group_size: int, normalize: bool) -> Tensor:
    """[B] scores less their group's mean, over the group's standard deviation where asked; 0 where all are equal."""
    groups = scores.unflatten(0, (-1, group_size))
    centred = groups - groups.mean(1, keepdim=True)
    if normalize:
        spread = groups.std(1, keepdim=True)
        centred = torch.where(spread > 0, centred / spread.clamp(min=1e-6), 0.0)
    return centred.flatten()


def means(sums: Sequence[Sums]) -> dict[str, float]:
    """Per-token means over micro-batches of what the objective knows, and the weight of the credit beside its cost.

    0 where no token counts.
    """
    num_tokens = max(1, sum(part.tokens for part in sums))
    totals = torch.stack([part.totals for part in sums]).sum(0).tolist()
    mean = {name: total / num_tokens for name, total in zip(SUMMED, totals, strict=True) if not math.isnan(total)}
    if "abs_credit" in mean:
        mean["credit_to_cost"] = mean.pop("abs_credit") / mean["cost"] if mean["cost"] > 0 else math.nan
    if "mismatch" in mean:
        mean["mismatch_max"] = max(float(part.largest_mismatch) for part in sums if part.largest_mismatch is not None)
    return mean
