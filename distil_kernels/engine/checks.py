"""Checks of every argument of the public ops, once, before any work starts.

Messages name the argument, what came and what was expected. What depends on values in memory is checked where the op
runs: sequence borders always, a teacher's named tokens on a GPU by assertions there, and the student's tokens on the
CPU only, since it would cost a synchronisation.
"""

from __future__ import annotations

import decimal
import math
import numbers
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from distil_kernels.backends import LogitScaling
from distil_kernels.engine.allocation import to_device
from distil_kernels.engine.credit import BASELINES, SPANS, Credit, CreditInputs
from distil_kernels.engine.gemm import accumulation_dtype
from distil_kernels.engine.gradients import Needs
from distil_kernels.engine.plan import Plan
from distil_kernels.engine.terms import NO_LABEL
from distil_kernels.engine.vocab_shards import ShardOptions

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MAX_SIZE = 2**31 - 1
_LARGEST = sys.float_info.max
_SMALLEST_SCALE, _LARGEST_SCALE = 1e-12, 1e12
"""Bounds of temperature, scale and softcap: quotients of both, and products with logits, are normal float32 numbers."""
_TWO_DECIMALS = math.expm1(0.005)
"""What the probabilities of a row can sum to beyond 1 where an API rounds log-probs to two decimals."""


class ArgumentChecks:
    """Checks of the arguments of one public op; its name begins their messages.

    Every method takes arguments by the names that the op gives them, and raises ValueError or TypeError if one is
    wrong.
    """

    def __init__(self, function: str) -> None:
        self._function = function

    def value_error(self, message: str) -> NoReturn:
        """Raises a ValueError that names the op."""
        raise ValueError(f"[{self._function}] {message}")

    def type_error(self, message: str) -> NoReturn:
        """Raises a TypeError that names the op."""
        raise TypeError(f"[{self._function}] {message}")

    def scalings(
        self,
        temperature: float,
        logit_softcap: float | None,
        student_logit_scale: float,
        teacher_temperature: float | None = None,
        teacher_logit_softcap: float | None = None,
        teacher_logit_scale: float | None = None,
    ) -> tuple[LogitScaling, LogitScaling]:
        """Checks what makes logits of both heads' outputs, and returns it; the teacher's default is the student's."""
        self.scale("temperature", temperature, optional=False)
        self.scale("teacher_temperature", teacher_temperature)
        self.scale("student_logit_scale", student_logit_scale, optional=False)
        self.scale("teacher_logit_scale", teacher_logit_scale)
        softcap = self._softcap("logit_softcap", logit_softcap)
        teacher_softcap = self._softcap("teacher_logit_softcap", teacher_logit_softcap)
        student = LogitScaling(float(temperature), softcap, float(student_logit_scale))
        return student, LogitScaling(
            student.temperature if teacher_temperature is None else float(teacher_temperature),
            softcap if teacher_logit_softcap is None else teacher_softcap,
            student.scale if teacher_logit_scale is None else float(teacher_logit_scale),
        )

    def _softcap(self, name: str, value: float | None) -> float | None:
        """Checks a softcap, of which infinity is none, and returns it."""
        if value is None or self._number(name, value) > _LARGEST:
            return None
        self.scale(name, value)
        return float(value)

    def needs(
        self, student_hidden: Tensor, student_weight: Tensor, student_bias: Tensor | None, detach_hidden: bool
    ) -> Needs:
        """Returns which tensors get a gradient; hidden states that lost theirs on the way are an error."""
        self.flag("detach_hidden", detach_hidden)
        hidden, weight, bias = (
            torch.is_grad_enabled() and isinstance(tensor, Tensor) and _needs_gradient(tensor)
            for tensor in (student_hidden, student_weight, student_bias)
        )
        if (weight or bias) and not hidden and not detach_hidden:
            head = "student_weight" if weight else "student_bias"
            self.value_error(
                f"student_hidden needs no gradient but {head} does, expected both: the body would not learn (was it "
                "run under no_grad?); pass detach_hidden=True if the head alone is to learn, or call under "
                "torch.no_grad() if nothing is"
            )
        return Needs(hidden and not detach_hidden, weight, bias)

    def heads(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor | None,
        student_bias: Tensor | None,
        teacher_bias: Tensor | None,
        vocab_size: int | None,
        *,
        is_shard: bool = False,
    ) -> int:
        """Checks that hidden states [..., D] and heads [V, D] belong together, and returns V: `vocab_size` if given.

        Of a shard of the vocabulary it returns the student's rows: what the other processes hold is checked with them.
        """
        self.count("vocab_size", vocab_size)
        vocab_size = None if is_shard else vocab_size
        tensors = {
            "student_hidden": student_hidden,
            "student_weight": student_weight,
            "teacher_hidden": teacher_hidden,
            "teacher_weight": teacher_weight,
            "student_bias": student_bias,
            "teacher_bias": teacher_bias,
        }
        optional = ("teacher_weight", "student_bias", "teacher_bias")
        for name, tensor in tensors.items():
            if tensor is None and name in optional:
                continue
            checked = self._tensor(name, tensor)
            if checked.dtype not in _DTYPES:
                self.type_error(f"{name} has dtype {checked.dtype}, expected float64, float32, bfloat16 or float16")
            self._same_device(name, checked, student_hidden)
        self._head("student", student_hidden, student_weight, student_bias, vocab_size)
        if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
            self.value_error(
                f"student_hidden has rows {list(student_hidden.shape[:-1])}, teacher_hidden "
                f"{list(teacher_hidden.shape[:-1])}: both need one hidden state for the same tokens"
            )
        if teacher_weight is None:
            if teacher_hidden.shape[-1] != student_hidden.shape[-1]:
                self.value_error(
                    f"teacher_hidden has size {teacher_hidden.shape[-1]}, student_hidden "
                    f"{student_hidden.shape[-1]}: without teacher_weight both share student_weight"
                )
            if teacher_hidden.dtype != student_hidden.dtype:
                self.type_error(
                    f"teacher_hidden is {teacher_hidden.dtype}, student_hidden {student_hidden.dtype}: "
                    "without teacher_weight both share student_weight and its dtype"
                )
        else:
            self._head("teacher", teacher_hidden, teacher_weight, teacher_bias, vocab_size)
            if vocab_size is None and not is_shard and teacher_weight.shape[0] != student_weight.shape[0]:
                self.value_error(
                    f"student_weight has {student_weight.shape[0]} rows, teacher_weight "
                    f"{teacher_weight.shape[0]}: both models need the same vocabulary (vocab_size= leaves padding out)"
                )
        if teacher_weight is None and teacher_bias is not None and teacher_bias.shape != student_weight.shape[:1]:
            self.value_error(f"teacher_bias has shape {list(teacher_bias.shape)}, expected [{student_weight.shape[0]}]")
        if (teacher_hidden.dtype == torch.float64) != (student_hidden.dtype == torch.float64):
            self.type_error(
                f"student_hidden is {student_hidden.dtype}, teacher_hidden {teacher_hidden.dtype}: "
                "float64 does not mix with other dtypes"
            )
        return student_weight.shape[0] if vocab_size is None else vocab_size

    def shards(
        self, vocab_group: ProcessGroup | None, vocab_size: int | None, sequence_parallel: bool
    ) -> ShardOptions | None:
        """Returns how the vocabulary lies in the processes of a group; None for no group. Its type has been checked."""
        self.flag("sequence_parallel", sequence_parallel)
        if vocab_group is not None:
            return ShardOptions(vocab_group.group_name, vocab_size, sequence_parallel)
        if sequence_parallel:
            self.value_error("sequence_parallel is True without vocab_group, expected both")
        return None

    def no_tangents(self, **tensors: object) -> None:
        """Checks that forward-mode differentiation is not asked for: the custom ops would drop the tangents."""
        for name, tensor in tensors.items():
            if torch.compiler.is_compiling() or not isinstance(tensor, Tensor):
                continue
            if unpack_dual(tensor).tangent is not None:
                self.value_error(
                    f"{name} has a tangent (torch.func.jvp, forward_ad), expected none: only reverse mode is supported"
                )

    def rows(
        self,
        name: str,
        tensor: Tensor | None,
        student_hidden: Tensor,
        kind: str,
        *,
        optional: bool = True,
        num_sequences: int | None = None,
    ) -> None:
        """Checks a tensor with one entry per token, or per sequence if their number is given.

        `kind` is "mask", "float" or "int64".
        """
        if tensor is None and optional:
            return
        tensor = self._tensor(name, tensor)
        accepted = {
            "mask": not (tensor.dtype.is_floating_point or tensor.dtype.is_complex),
            "float": tensor.dtype.is_floating_point,
            "int64": tensor.dtype == torch.int64,
        }
        if not accepted[kind]:
            expected = "bool or an integer (True or 1 counts)" if kind == "mask" else kind
            self.type_error(f"{name} has dtype {tensor.dtype}, expected {expected}")
        is_per_sequence = num_sequences is not None and tensor.shape == (num_sequences,)
        if tensor.shape != student_hidden.shape[:-1] and not is_per_sequence:
            self.value_error(
                f"{name} has shape {list(tensor.shape)}, expected {list(student_hidden.shape[:-1])} "
                "as in student_hidden without its last dimension"
                f"{'' if num_sequences is None else f', or [{num_sequences}], one for each sequence'}"
            )
        self._same_device(name, tensor, student_hidden)

    def packed(self, student_hidden: Tensor, cu_seqlens: Tensor | None, *, optional: bool = False) -> None:
        """Checks packed rows [N, D] with sequence borders [B + 1]."""
        if student_hidden.dim() != 2:
            self.value_error(f"student_hidden has shape {list(student_hidden.shape)}, expected packed rows [N, D]")
        if cu_seqlens is None and optional:
            return
        cu_seqlens = self._tensor("cu_seqlens", cu_seqlens)
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            self.type_error(f"cu_seqlens has dtype {cu_seqlens.dtype}, expected int32 or int64")
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
            self.value_error(
                f"cu_seqlens has shape {list(cu_seqlens.shape)}, expected [B + 1] with at least one sequence"
            )

    def credit(
        self,
        student_hidden: Tensor,
        credit_span: str,
        baseline: str | Tensor | None,
        group_size: int | None,
        discount: float,
        horizon: int | None,
        normalize_by_remaining: bool,
        teacher_ratio_clip: float | None,
        credit_clip: float | None,
        credit_scale: float,
        importance_clip: float | None,
        behaviour_logprobs: Tensor | None,
    ) -> CreditInputs:
        """Checks the settings of the credit, and returns them with their tensors."""
        self.one_of("credit_span", credit_span, SPANS)
        self.between("discount", discount, 0.0, 1.0)
        self.count("horizon", horizon)
        self.flag("normalize_by_remaining", normalize_by_remaining)
        self.positive("teacher_ratio_clip", teacher_ratio_clip)
        self.positive("credit_clip", credit_clip)
        self.between("credit_scale", credit_scale, 0.0, math.inf)
        for name, value, exact in (
            ("discount", discount, 1.0),
            ("horizon", horizon, None),
            ("normalize_by_remaining", normalize_by_remaining, False),
        ):
            if credit_span == "sequence" and value != exact:
                self.value_error(f"{name} is {value} with credit_span='sequence', expected {exact}")
        if isinstance(baseline, Tensor):
            self.rows("baseline", baseline, student_hidden, "float")
        elif baseline is not None:
            self.one_of("baseline", baseline, BASELINES)
        self.count("group_size", group_size)
        if isinstance(baseline, str) and baseline == "leave_one_out" and (group_size or 1) < 2:
            self.value_error(f"group_size is {group_size} with baseline='leave_one_out', expected at least 2")
        self.rows("behaviour_logprobs", behaviour_logprobs, student_hidden, "float")
        self.positive("importance_clip", importance_clip)
        if importance_clip is not None and behaviour_logprobs is None:
            self.value_error(f"importance_clip is {importance_clip} without behaviour_logprobs, expected both")
        baseline_values = baseline if isinstance(baseline, Tensor) else None
        settings = Credit(
            span=credit_span,
            baseline=baseline if isinstance(baseline, str) else None if baseline_values is None else "values",
            group_size=group_size,
            discount=float(discount),
            horizon=horizon,
            by_remaining=normalize_by_remaining,
            teacher_ratio_clip=None if teacher_ratio_clip is None else float(teacher_ratio_clip),
            clip=None if credit_clip is None else float(credit_clip),
            scale=float(credit_scale),
            importance_clip=None if importance_clip is None else float(importance_clip),
        )
        return CreditInputs(settings, baseline_values, behaviour_logprobs)

    def named_tokens(self, student_hidden: Tensor, teacher_ids: Tensor, teacher_logprobs: Tensor) -> None:
        """Checks ids and log-probs [..., K] of the tokens that a teacher named."""
        rows = student_hidden.shape[:-1]
        for name, tensor in (("teacher_ids", teacher_ids), ("teacher_logprobs", teacher_logprobs)):
            self._tensor(name, tensor)
            if tensor.dim() != len(rows) + 1 or tensor.shape[:-1] != rows:
                self.value_error(
                    f"{name} has shape {list(tensor.shape)}, expected [..., K] with student_hidden's rows {list(rows)}"
                )
            self._same_device(name, tensor, student_hidden)
        if teacher_ids.dtype != torch.int64 or not teacher_logprobs.dtype.is_floating_point:
            self.type_error(
                f"teacher_ids, teacher_logprobs are {teacher_ids.dtype}, {teacher_logprobs.dtype}, expected int64 and "
                "a float"
            )
        if teacher_ids.shape != teacher_logprobs.shape or teacher_ids.shape[-1] == 0:
            self.value_error(
                f"teacher_ids has shape {list(teacher_ids.shape)}, teacher_logprobs {list(teacher_logprobs.shape)}, "
                "expected one [..., K]"
            )

    def positive(self, name: str, value: float | None, *, optional: bool = True) -> None:
        """Checks a finite number above 0."""
        if value is None and optional:
            return
        if (
            not 0.0 < self._number(name, value) <= _LARGEST
        ):  # comparisons that torch.compile can keep for a number that changes
            self.value_error(f"{name} is {value}, expected a finite number above 0")

    def scale(self, name: str, value: float | None, *, optional: bool = True) -> None:
        """Checks a factor or divisor of logits: with its reciprocal they keep their digits in float32."""
        self.positive(name, value, optional=optional)
        if value is not None and not _SMALLEST_SCALE <= value <= _LARGEST_SCALE:
            self.value_error(f"{name} is {value}, expected a number from {_SMALLEST_SCALE:g} to {_LARGEST_SCALE:g}")

    def count(self, name: str, value: int | None, *, optional: bool = True) -> None:
        """Checks an integer of at least 1."""
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.value_error(f"{name} is {_described(value)}, expected a positive integer")

    def flag(self, name: str, value: bool) -> None:
        """Checks a bool."""
        if not isinstance(value, bool):
            self.type_error(f"{name} is {type(value).__name__}, expected a bool")

    def between(self, name: str, value: float, low: float, high: float) -> None:
        """Checks a finite number in [low, high]."""
        if not max(low, -_LARGEST) <= self._number(name, value) <= min(high, _LARGEST):
            span = f" from {low} to {high}" if math.isfinite(high) else f" of at least {low}"
            self.value_error(f"{name} is {value}, expected a finite number{span if math.isfinite(low) else ''}")

    def share(self, name: str, value: float) -> None:
        """Checks a number above 0 and below 1."""
        self.between(name, value, 0.0, 1.0)
        if not 0.0 < value < 1.0:
            self.value_error(f"{name} is {value}, expected a number above 0 and below 1")

    def threshold(self, name: str, value: float) -> None:
        """Checks a number from 0 to 1, 1 excluded: a row's largest entry is never below the threshold."""
        self.between(name, value, 0.0, 1.0)
        if not value < 1.0:
            self.value_error(f"{name} is {value}, expected a number below 1")

    def sparse_gradient(
        self, threshold: float, backend: str, dtype: torch.dtype, plan: Plan, *, is_shard: bool
    ) -> None:
        """Checks that a call can leave out entries of the logits' gradient."""
        given = f"gradient_threshold is {threshold}"
        if is_shard:
            self.value_error(f"{given} with vocab_group, expected 0: a row's largest entry lies in one of the shards")
        if backend != "cpu":
            self.value_error(f"{given} with backend={backend!r}, expected 'cpu': only its products leave entries out")
        if dtype == torch.float16:
            self.type_error(f"{given} with float16 hidden states, expected float32 or bfloat16")
        if plan.recomputes_logits:
            self.value_error(
                f"{given} with plan 'recompute', expected 'gradient_in_forward' or 'frozen_head' (row weights known "
                "in order): with six products there is little to gain"
            )

    def normalizer(self, normalizer: Any, student_hidden: Tensor) -> float | Tensor | None:
        """Checks a number of at least 0 of any type, or a tensor with one element, whose value is not read.

        Returns it; a tensor with shape [], the loss's dtype and device, and no gradient.
        """
        if normalizer is None:
            return None
        if not isinstance(normalizer, Tensor):
            if not isinstance(normalizer, (int, float)):
                normalizer = _python_number(normalizer)
            self.between("normalizer", normalizer, 0.0, math.inf)
            return normalizer
        self._tensor("normalizer", normalizer)
        if normalizer.is_complex() or normalizer.dtype == torch.bool:
            self.type_error(f"normalizer has dtype {normalizer.dtype}, expected a float or an integer")
        if normalizer.numel() != 1:
            self.value_error(f"normalizer has shape {list(normalizer.shape)}, expected one element")
        normalizer = normalizer.detach().reshape(()).to(accumulation_dtype(student_hidden.dtype))
        if normalizer.device.type == "cpu" and student_hidden.device.type != "cpu":
            return to_device(normalizer, student_hidden.device)
        self._same_device("normalizer", normalizer, student_hidden)
        return normalizer

    def one_of(self, name: str, value: object, choices: tuple[str, ...]) -> None:
        """Checks a choice by name."""
        if not isinstance(value, str) or value not in choices:
            self.value_error(f"{name} is {_described(value)}, expected one of {list(choices)}")

    def _number(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.type_error(f"{name} is {type(value).__name__}, expected a number")
        return value

    def _tensor(self, name: str, tensor: object) -> Tensor:
        if not isinstance(tensor, Tensor):
            self.type_error(f"{name} is {type(tensor).__name__}, expected a torch.Tensor")
        if tensor.layout != torch.strided:
            self.type_error(f"{name} has layout {tensor.layout}, expected a dense (strided) tensor")
        if hasattr(tensor, "device_mesh"):
            self.type_error(
                f"{name} is a DTensor, expected a plain tensor: gather it first (full_tensor()), or call the op inside "
                "the sharded module's forward"
            )
        return tensor

    def _same_device(self, name: str, tensor: Tensor, student_hidden: Tensor) -> None:
        if tensor.device != student_hidden.device:
            self.value_error(f"{name} is on {tensor.device}, student_hidden on {student_hidden.device}")

    def _head(self, model: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab_size: int | None) -> None:
        if hidden.dim() < 1 or weight.dim() != 2:
            self.value_error(
                f"{model}_hidden has shape {list(hidden.shape)}, {model}_weight {list(weight.shape)}, "
                "expected [..., D] and [V, D]"
            )
        if hidden.shape[-1] != weight.shape[1]:
            self.value_error(
                f"{model}_hidden has size {hidden.shape[-1]}, {model}_weight is [{weight.shape[0]}, "
                f"{weight.shape[1]}]: the last dimensions must be equal"
            )
        if weight.shape[0] < 1 or weight.shape[1] < 1:
            self.value_error(f"{model}_weight has shape {list(weight.shape)}, expected at least one row and column")
        for name, size in ((f"{model}_weight", weight.shape[0]), (f"{model}_hidden", math.prod(hidden.shape[:-1]))):
            if size > _MAX_SIZE:
                self.value_error(f"{name} has {size} rows, expected at most {_MAX_SIZE}")
        if hidden.dtype != weight.dtype:
            self.type_error(
                f"{model}_hidden is {hidden.dtype}, {model}_weight {weight.dtype}: cast one, or use autocast"
            )
        if vocab_size is not None and weight.shape[0] < vocab_size:
            self.value_error(f"vocab_size is {vocab_size}, {model}_weight has {weight.shape[0]} rows: expected no more")
        if bias is not None and bias.shape != weight.shape[:1]:
            self.value_error(f"{model}_bias has shape {list(bias.shape)}, expected [{weight.shape[0]}]")


def _needs_gradient(tensor: Tensor) -> bool:
    """Returns whether a gradient is wanted, also by what torch.func.vmap has wrapped."""
    if tensor.requires_grad or torch.compiler.is_compiling() or not torch._C._functorch.is_batchedtensor(tensor):
        return tensor.requires_grad
    return _needs_gradient(torch._C._functorch.get_unwrapped(tensor))


def _python_number(value: Any) -> Any:
    """Returns what numpy, fractions or decimal have for a real number as a float or an int, and others as they are."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    is_real = isinstance(value, (numbers.Real, decimal.Decimal)) and not isinstance(value, bool)
    return float(value) if is_real else value


def _described(value: object) -> str:
    """Returns a value as a message shows it: a tensor would fill a screen."""
    return repr(value) if isinstance(value, (str, int, float)) else type(value).__name__


def check_tokens(tokens: Tensor | None, counted: Tensor | None, vocab_size: int) -> None:
    """Checks that the token ids of rows that count lie in the vocabulary (on the CPU only)."""
    _check_ids("tokens", tokens, counted, vocab_size, "(mask rows without a token by token_mask)")


def check_labels(labels: Tensor | None, counted: Tensor | None, vocab_size: int) -> None:
    """Checks the same of labels, of which NO_LABEL is none."""
    if labels is not None:
        counted = labels != NO_LABEL if counted is None else counted & (labels != NO_LABEL)
        _check_ids("labels", labels, counted, vocab_size, f"or {NO_LABEL} for none")


def _check_ids(name: str, ids: Tensor | None, counted: Tensor | None, vocab_size: int, others: str) -> None:
    if ids is None or ids.device.type != "cpu":
        return
    ids = ids if counted is None else ids[counted]
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= vocab_size):
        raise ValueError(
            f"{name} holds ids from {int(ids.min())} to {int(ids.max())}, expected 0 to {vocab_size - 1} {others}"
        )


def check_named_tokens(ids: Tensor, logprobs: Tensor, counted: Tensor | None, vocab_size: int) -> None:
    """Checks the values of named tokens [N, K] of rows that count: different tokens, log-probs of a distribution.

    Log-probs are rounded, by an API to two decimals or by their dtype: the sum of a row's probabilities may differ from
    that of a distribution by what this makes of it.
    """
    if ids.numel() == 0:
        return
    if counted is not None:
        ids = torch.where(counted[:, None], ids, -1)
    _require(
        ((ids >= -1) & (ids < vocab_size)).all(),
        "teacher_ids holds ids outside the vocabulary",
        lambda: f"from {int(ids.min())} to {int(ids.max())}",
        f"expected 0 to {vocab_size - 1}, or -1",
    )
    known, ordered = ids >= 0, ids.sort(-1).values
    is_twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    _require(
        ~is_twice.any(),
        "teacher_ids names a token twice in one row",
        lambda: f"token {int(ordered[:, 1:][is_twice][0])}",
        "expected different tokens",
    )
    probs = torch.where(known, logprobs.double(), -torch.inf).exp()
    mass = probs.sum(-1)
    terms = torch.special.entr(probs.clamp(max=1.0)).sum(-1)  # what a log p that is off by a share of itself moves p by
    rounding = _TWO_DECIMALS + torch.finfo(logprobs.dtype).eps / 2 * terms
    _require(
        (mass <= 1.0 + rounding).all(),  # False for NaN
        "teacher_logprobs has a row whose probabilities are no distribution",
        lambda: f"they sum to {float(mass.max()):.6g}",
        "expected at most 1",
    )
    _require(
        ((known.sum(-1) < vocab_size) | (mass >= 1.0 - rounding)).all(),
        "teacher_logprobs has a row with every token whose probabilities are no distribution",
        lambda: f"they sum to {float(mass.min()):.6g}",
        "expected 1",
    )


def _require(holds: Tensor, what: str, came: Callable[[], str], expected: str) -> None:
    """Raises a ValueError unless `holds` []; on an NVIDIA GPU an assertion there, for which the host does not wait."""
    if holds.device.type == "cuda":
        torch._assert_async(holds, f"[distil_kernels] {what}, {expected}")
    elif not holds:
        raise ValueError(f"{what} ({came()}), {expected}")


def sequence_lengths(cu_seqlens: Tensor, num_rows: int, group_size: int | None) -> Tensor:
    """Returns the lengths [B] int64 on the CPU; a `cu_seqlens` on a GPU is read once, before any work."""
    borders = cu_seqlens.to("cpu", torch.int64)
    lengths = borders.diff()
    if int(borders[0]) != 0 or int(borders[-1]) != num_rows or bool((lengths < 0).any()):
        raise ValueError(
            f"cu_seqlens goes from {int(borders[0])} to {int(borders[-1])}"
            f"{', and falls' if bool((lengths < 0).any()) else ''}; expected to rise from 0 to the {num_rows} rows"
        )
    if group_size is not None and lengths.numel() % group_size:
        raise ValueError(f"cu_seqlens has {lengths.numel()} sequences, expected a multiple of group_size {group_size}")
    return lengths
