"""A vocabulary in shards: each process of a group holds consecutive rows of the heads, and all compute one loss.

The row kernels treat a shard as if it were the whole vocabulary. With w^k the share of a model's probability that lies
in shard k, statistics of the whole follow from those of the shards by the chain rule,

    KL(T || S) = KL(w_T || w_S) + sum_k w_T^k KL^k          H(S) = H(w_S) + sum_k w_S^k H^k          CE = KL + H(T)

in which no term of a divergence is negative and nothing cancels: a KL of 1e-6 keeps its digits. `row_grad` then takes
the statistics of the whole with the shard's own logits. What the processes exchange:

    once a call     `agree`: sizes of the shards, and digests of all arguments that must be the same
    once a chunk    nine numbers a row (eleven with tokens); two more for the JSD, three for named tokens
    once a call     dh, summed over the shards in float32; dW is each process's own

Every process sums in the same order, so all have the same values to the last bit.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from distil_kernels.backends import NUM_STATISTICS, Statistic
from distil_kernels.engine.plan import PLANS, Plan

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_FLOOR = -1e30
"""Log of a ratio whose numerator is 0, as in the row kernels."""

EXCHANGED = (
    Statistic.MAX_LOGIT, Statistic.LOG_NORMALIZER, Statistic.TEACHER_MAX_LOGIT, Statistic.TEACHER_LOG_NORMALIZER,
    Statistic.ENTROPY, Statistic.TEACHER_ENTROPY, Statistic.FORWARD_KL, Statistic.REVERSE_KL, Statistic.AGREE,
)  # fmt: skip
"""Statistics of a shard from which those of the whole vocabulary follow."""

OF_TOKEN = (Statistic.LOGPROB, Statistic.TEACHER_LOGPROB)
"""The same where there are tokens."""


Same = Mapping[str, "Tensor | str | None"]
"""What processes that share a vocabulary must have in common, by name."""


class ShardOptions(NamedTuple):
    """What a call says about its shards."""

    group: str
    """Name of the process group."""
    vocab_size: int | None
    """Entries of the whole vocabulary; None: the shards have no padding."""
    sequence_parallel: bool
    """Whether each process gets dh of its own rows only."""


@dataclass(frozen=True)
class VocabShards:
    """The shards of one call, and the exchanges of its processes."""

    group: ProcessGroup
    rank: int
    borders: tuple[int, ...]
    """[processes + 1], ascending; shard k is the entries from borders[k] to borders[k + 1]."""
    student_rows: Sequence[int]
    """Rows of the student's head in each process, with padding."""
    sequence_parallel: bool

    @property
    def columns(self) -> slice:
        """The entries of the vocabulary that this process holds."""
        return slice(self.borders[self.rank], self.borders[self.rank + 1])

    @property
    def num_columns(self) -> int:
        """The number of those entries, which may be 0."""
        return self.borders[self.rank + 1] - self.borders[self.rank]

    def no_statistics(self, like: Tensor, num_rows: int) -> Tensor:
        """Returns statistics [NUM_STATISTICS, R] of a shard without entries: they have no probability."""
        statistics = like.new_zeros(NUM_STATISTICS, num_rows)
        statistics[[Statistic.LOG_NORMALIZER, Statistic.TEACHER_LOG_NORMALIZER]] = -torch.inf
        return statistics

    def local_ids(self, tokens: Tensor) -> Tensor:
        """Returns ids of the vocabulary as those of this process's shard, -1 for one of another shard."""
        columns = self.columns
        return torch.where((tokens >= columns.start) & (tokens < columns.stop), tokens - columns.start, -1)

    def merged(self, statistics: Tensor, tokens: Tensor | None) -> Tensor:
        """Returns the statistics [NUM_STATISTICS, R] of the whole vocabulary from those of the shard.

        JSD and STUDENT_MIXTURE_KL are 0: they need a second exchange.

        Args:
            statistics: of this process's shard; log-probs of tokens of another shard may be anything.
            tokens: [R] ids of the whole vocabulary.
        """
        sent = EXCHANGED if tokens is None else EXCHANGED + OF_TOKEN
        shards = self.gather(statistics[list(sent)]).double()  # [processes, statistics, R]
        of = dict(zip(sent, shards.unbind(1), strict=True))
        student = _Masses.of(of[Statistic.MAX_LOGIT], of[Statistic.LOG_NORMALIZER])
        teacher = _Masses.of(of[Statistic.TEACHER_MAX_LOGIT], of[Statistic.TEACHER_LOG_NORMALIZER])

        whole: dict[Statistic, Tensor] = {
            Statistic.MAX_LOGIT: student.maximum,
            Statistic.LOG_NORMALIZER: student.log_normalizer,
            Statistic.TEACHER_MAX_LOGIT: teacher.maximum,
            Statistic.TEACHER_LOG_NORMALIZER: teacher.log_normalizer,
            Statistic.ENTROPY: student.entropy(of[Statistic.ENTROPY]),
            Statistic.TEACHER_ENTROPY: teacher.entropy(of[Statistic.TEACHER_ENTROPY]),
            Statistic.FORWARD_KL: teacher.divergence(student, of[Statistic.FORWARD_KL]),
            Statistic.REVERSE_KL: student.divergence(teacher, of[Statistic.REVERSE_KL]),
        }
        whole[Statistic.FORWARD_CE] = whole[Statistic.FORWARD_KL] + whole[Statistic.TEACHER_ENTROPY]
        agree = of[Statistic.AGREE].gather(0, student.peak[None])[0]
        whole[Statistic.AGREE] = torch.where(student.peak == teacher.peak, agree, 0.0)
        if tokens is not None:
            owner = self._owner(tokens)
            whole[Statistic.LOGPROB] = student.logprob(of[Statistic.LOGPROB], owner)
            whole[Statistic.TEACHER_LOGPROB] = teacher.logprob(of[Statistic.TEACHER_LOGPROB], owner)

        result = torch.zeros_like(statistics)
        for statistic, value in whole.items():
            result[statistic] = value.to(result.dtype)
        return result

    def gather(self, part: Tensor) -> Tensor:
        """Returns the parts of all processes, [processes, ...]."""
        return _gathered(part, self.group)

    def total(self, part: Tensor) -> Tensor:
        """Returns the sum over the shards of a few numbers a row, added in the same order by every process."""
        return self.gather(part).double().sum(0).to(part.dtype)

    def add_hidden(self, grad_hidden: Tensor) -> Tensor:
        """Returns dh [R, D] summed over the shards; its memory is used."""
        all_reduce(grad_hidden, self.group)
        return grad_hidden

    def own_rows(self, grad_hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns dh [N, D] in a dtype: of this process's rows summed over the shards, 0 of others."""
        rows = grad_hidden.shape[0] // len(self.borders[1:])
        own = grad_hidden.new_empty(rows, grad_hidden.shape[1])
        reduce_scatter(own, grad_hidden, self.group)
        result = torch.zeros_like(grad_hidden, dtype=dtype)
        result[self.rank * rows : (self.rank + 1) * rows] = own
        return result

    def of_teacher(self, head: Tensor, num_rows: Sequence[int]) -> Tensor:
        """Returns the teacher's rows that belong to this process's entries.

        Args:
            head: weight [V_k, D] or bias [V_k]: cut as the student's, whole, or cut elsewhere; then rows are exchanged.
            num_rows: V_k of each process.
        """
        form = self.teacher_form(num_rows)
        if form == "as the student":
            return head[: self.num_columns]
        if form == "whole":
            return head[self.columns]
        borders = _borders(num_rows, self.borders[-1])
        sizes = [
            [max(0, min(borders[sender + 1], end) - max(borders[sender], begin)) for begin, end in self._every_columns]
            for sender in range(len(num_rows))
        ]
        row_bytes = head[:1].numel() * head.itemsize
        first = max(0, self._every_columns[0][0] - borders[self.rank])
        sent = head[first : first + sum(sizes[self.rank])].contiguous().view(torch.uint8).flatten()
        received = sent.new_empty(self.num_columns * row_bytes)
        torch.distributed.all_to_all_single(
            received, sent, [size[self.rank] * row_bytes for size in sizes],
            [size * row_bytes for size in sizes[self.rank]], group=self.group,
        )  # fmt: skip
        return received.view(head.dtype).view(self.num_columns, *head.shape[1:])

    def teacher_form(self, num_rows: Sequence[int]) -> str:
        """Returns how the teacher's head is given, from its rows in each process.

        Raises:
            ValueError: its rows are no vocabulary.
        """
        vocab_size = self.borders[-1]
        if list(num_rows) == list(self.student_rows):
            return "as the student"
        if min(num_rows) >= vocab_size:
            return "whole"
        if sum(num_rows) >= vocab_size:
            return "cut elsewhere"
        raise ValueError(
            f"teacher_weight has {list(num_rows)} rows in the members of vocab_group, student_weight "
            f"{self.student_rows}: expected the same, a vocabulary of {vocab_size} cut elsewhere, or whole in each"
        )

    @property
    def _every_columns(self) -> list[tuple[int, int]]:
        return list(zip(self.borders, self.borders[1:], strict=False))

    def _owner(self, tokens: Tensor) -> Tensor:
        """Returns the process [R] that has each token; one outside the vocabulary has the number of processes."""
        borders = torch.tensor(self.borders[1:], device=tokens.device)
        return torch.where(tokens < 0, len(borders), torch.bucketize(tokens, borders, right=True))


class _Masses(NamedTuple):
    """How one model's probability lies in the shards."""

    maximum: Tensor
    """[R]."""
    log_normalizer: Tensor
    """[R], relative to the maximum."""
    logs: Tensor
    """[processes, R], log of each shard's share."""
    peak: Tensor
    """[R], the first shard that has the maximum."""

    @classmethod
    def of(cls, maximum: Tensor, log_normalizer: Tensor) -> _Masses:
        """Makes the record from the maxima and normalisers of the shards [processes, R]."""
        is_empty = log_normalizer == -torch.inf
        maximum = torch.where(is_empty, -torch.inf, maximum)
        top = maximum.amax(0)
        logs = torch.where(is_empty, -torch.inf, (maximum - top) + log_normalizer)
        whole = logs.logsumexp(0)
        shards = torch.arange(len(maximum), device=maximum.device)[:, None]
        peak = torch.where(maximum == top, shards, len(maximum) - 1).amin(0)
        return cls(top, whole, logs - whole, peak)

    def entropy(self, parts: Tensor) -> Tensor:
        """Returns the entropy [R] from those inside the shards [processes, R]."""
        probs = self.logs.exp()
        return torch.where(probs == 0, 0.0, probs * (parts - self.logs)).sum(0)

    def divergence(self, other: _Masses, parts: Tensor) -> Tensor:
        """Returns KL(self || other) [R] from those inside the shards [processes, R].

        The divergence of the shares is a sum of terms Q - P - P log(Q / P), which are never negative.
        """
        p, q = self.logs.exp(), other.logs.exp()
        log_ratio = torch.where(p > 0, (other.logs - self.logs).clamp(min=_FLOOR), 0.0)
        near, far = p * (log_ratio.expm1() - log_ratio), q - p * (1.0 + log_ratio)
        of_shares = torch.where((log_ratio.abs() < 0.5) & (p > 0), near, far)
        return (of_shares + torch.where((p == 0) | (q == 0), 0.0, p * parts)).sum(0)

    def logprob(self, parts: Tensor, owner: Tensor) -> Tensor:
        """Returns the log-prob [R] of tokens from those inside their owners' shards [processes, R]."""
        is_outside = owner == len(parts)
        owner = owner.masked_fill(is_outside, 0)[None]
        logprob = parts.gather(0, owner)[0] + self.logs.gather(0, owner)[0]
        return logprob.masked_fill(is_outside, torch.nan)


def agree(
    options: ShardOptions, plan: Plan, student_rows: int, teacher_rows: int, same: Same
) -> tuple[VocabShards, Plan, list[int]]:
    """Exchanges what the processes of a call must know of each other before any work starts.

    Args:
        student_rows, teacher_rows: of this process's heads; 0 for no teacher's head.
        same: as in `exchanged`.

    Returns:
        The shards; a plan whose chunks are the same in all processes; the rows of the teacher's head in each.

    Raises:
        As `exchanged`; ValueError if the shards have fewer rows than the vocabulary.
    """
    _call.is_agreed = True
    group = process_group(options.group)
    sizes = (student_rows, teacher_rows, plan.chunk_rows, plan.staging_rows, PLANS.index(plan.name))
    rows, teacher, chunk_rows, staging_rows, plans = zip(*exchanged(group, same, sizes), strict=True)
    vocab_size = sum(rows) if options.vocab_size is None else options.vocab_size
    if vocab_size > sum(rows):
        raise ValueError(
            f"[vocab_group] vocab_size is {vocab_size}, student_weight has {list(rows)} rows in its members: expected "
            f"no more than {sum(rows)}"
        )
    agreed = plan._replace(chunk_rows=min(chunk_rows), staging_rows=min(staging_rows))
    if plan.forms_gradient_in_forward and PLANS.index("recompute") in plans:
        agreed = agreed._replace(name="recompute")
    shards = VocabShards(group, group.rank(), _borders(rows, vocab_size), rows, options.sequence_parallel)
    return shards, agreed, list(teacher)


def exchanged(group: ProcessGroup, same: Same, sizes: Sequence[int]) -> list[list[int]]:
    """Returns the sizes of every process of a group, once it is sure that all make the same call.

    Args:
        same: by name what must be the same in all processes: tensors by shape, dtype and, of integers, values; texts.
            At least one is a tensor.
        sizes: of this process.

    Raises:
        ValueError: something differs, or another process has raised an error; in every process alike.
    """
    device = next(each.device for each in same.values() if isinstance(each, Tensor))
    with torch.no_grad():
        message = torch.zeros(_MESSAGE, dtype=torch.int64, device=device)
        for place, value in enumerate(same.values(), start=1):
            message[place] = _digest(value, device)
        message[_MESSAGE - len(sizes) :] = torch.tensor(sizes, dtype=torch.int64, device=device)
        every = _gathered(message, group).tolist()
    failed = [rank for rank, each in enumerate(every) if each[0]]
    if failed:
        raise ValueError(f"[vocab_group] member {failed[0]} of {len(every)} has raised an error of its own: see there")
    for place, name in enumerate(same, start=1):
        others = [rank for rank, each in enumerate(every) if each[place] != every[0][place]]
        if others:
            raise ValueError(
                f"[vocab_group] {name} of member {others[0]} of {len(every)} differs from that of member 0, expected "
                "the same in all members"
            )
    return [each[_MESSAGE - len(sizes) :] for each in every]


_FACTOR = 0x1E3779B97F4A7C15
"""An odd number whose multiples look random."""

_MESSAGE = 32
"""Numbers that `exchanged` sends: whether this process has failed, digests, and sizes at the end."""


class _Call(threading.local):
    is_agreed = False


_call = _Call()


def fails_together(function: Callable[[], Any], group: ProcessGroup, device: torch.device) -> Any:
    """Calls a function that reaches `agree`; an error before that is an error in every process of the group."""
    _call.is_agreed = False
    try:
        return function()
    except Exception:
        if not _call.is_agreed:
            message = torch.zeros(_MESSAGE, dtype=torch.int64, device=device)
            message[0] = 1
            _gathered(message, group)
        raise


def process_group(name: str) -> ProcessGroup:
    """Returns the process group of a name, by which custom ops and graphs know it."""
    resolve: Any = torch.distributed.distributed_c10d._resolve_process_group
    return resolve(name)


def _digest(value: Tensor | str | None, device: torch.device) -> Tensor | int:
    """Returns a number of 64 bits that is the same where texts are, or shapes, dtypes and integers of tensors."""
    if not isinstance(value, Tensor):
        return _digest_of_text(str(value))
    number = _digest_of_text(f"{list(value.shape)} {value.dtype}")
    if value.is_floating_point():
        return number
    values = value.to(device, torch.int64).flatten()
    factors = torch.arange(1, 2 * len(values), 2, device=device) * _FACTOR  # odd: no value is multiplied away
    return (values * factors).sum() + number


def _digest_of_text(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _borders(rows: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """Returns where shards of some rows begin and end in a vocabulary of which the last rows may be padding."""
    return (0, *(min(end, vocab_size) for end in accumulate(rows)))


def _gathered(part: Tensor, group: ProcessGroup) -> Tensor:
    """Returns [processes, ...] from the part of each."""
    every = part.new_empty(group.size(), *part.shape)
    all_gather(every, part.contiguous()[None], group)
    return every


def all_gather(out: Tensor, part: Tensor, group: ProcessGroup) -> None:
    """Writes the parts of all processes, one after the other, to `out`."""
    torch.distributed.all_gather(list(out.chunk(group.size())), part, group=group)


def all_reduce(tensor: Tensor, group: ProcessGroup) -> None:
    """Replaces a tensor by the sum of those of all processes."""
    torch.distributed.all_reduce(tensor, group=group)


def reduce_scatter(out: Tensor, whole: Tensor, group: ProcessGroup) -> None:
    """Writes to `out` this process's part of the sum of all `whole`."""
    distributed: Any = torch.distributed  # in 2.13 the function has another name, and warns of this one
    function = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
    function(out, whole, group=group)
