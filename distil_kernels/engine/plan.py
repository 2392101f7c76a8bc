"""The plan of a call: which gradients are formed when. The choice is a pure function that says why.

One lm_head product costs 2 N V D floating-point operations; a plan is named by what it stores:

    plan                  products  extra memory beyond inputs and their gradients (formulas in `sizes`)
    stats_only                2     logits chunk (nothing with back end `triton`)
    gradient_in_forward       4     logits chunk + staging buffer + dW accumulator
    frozen_head               3     logits chunk + staging buffer
    kept_gradient             4     stored gradients + logits chunk (two outputs: or staging buffer + dW accumulator)
    recompute                 6     logits chunk + staging buffer + dW accumulator

Chunk and staging buffer come from memory budgets (`sizes`); a `Plan` passed as `plan=` to a public op brings its own
sizes.
"""

from __future__ import annotations

from typing import NamedTuple

from distil_kernels.engine import sizes
from distil_kernels.engine.sizes import Shape, choose_chunk_rows, choose_staging_rows

PLANS = ("gradient_in_forward", "kept_gradient", "recompute", "frozen_head", "stats_only")


class Plan(NamedTuple):
    """How a call is computed, and in buffers of how many rows."""

    name: str
    """One of PLANS."""
    chunk_rows: int
    """R, rows of a chunk of logits."""
    staging_rows: int
    """Q, rows of the staging buffer, at least R; 0 for none: the gradient overwrites the student's logits."""
    reason: str = "asked for by name"

    @property
    def forms_gradient_in_forward(self) -> bool:
        """Whether the forward pass forms the gradients of hidden states and head that it can."""
        return self.name in ("gradient_in_forward", "frozen_head")

    @property
    def keeps_gradient(self) -> bool:
        """Whether the forward pass stores logit gradients until their upstream gradient is known."""
        return self.name == "kept_gradient"

    @property
    def is_frozen_head(self) -> bool:
        """Whether the student's head gets no gradient."""
        return self.name == "frozen_head"

    @property
    def recomputes_logits(self) -> bool:
        """Whether the logits are formed a second time for the gradient."""
        return self.name == "recompute"

    @property
    def is_without_gradient(self) -> bool:
        """Whether nothing gets a gradient."""
        return self.name == "stats_only"


def choose_plan(shape: Shape, requested: str | Plan = "auto", *, credit_in_one_pass: bool = True) -> Plan:
    """Returns the plan for a call, with the reason.

    Args:
        requested: "auto", a name of PLANS, or a Plan with sizes of its own.
        credit_in_one_pass: whether every row's weight is known when its chunk is processed in reverse-time order.

    Raises:
        ValueError: `requested` is no plan's name, or cannot compute this call; the message says why.
    """
    check_plan(requested)
    name = requested.name if isinstance(requested, Plan) else requested
    why_not = None if name == "auto" else _why_not(name, shape, credit_in_one_pass)
    if why_not is not None:
        raise ValueError(f"plan={name!r} cannot compute this call: {why_not}")
    if isinstance(requested, Plan):
        return requested
    reason = "asked for by name"
    if name == "auto":
        name, reason = _prefer(shape, credit_in_one_pass)
    chunk_rows = choose_chunk_rows(shape)
    return Plan(name, chunk_rows, choose_staging_rows(shape, chunk_rows), reason)


def check_plan(requested: str | Plan) -> None:
    """Checks what a user asks for.

    Raises:
        ValueError: it is no plan's name, or a Plan whose rows are no numbers of rows.
    """
    name = requested.name if isinstance(requested, Plan) else requested
    if not isinstance(name, str) or (name != "auto" and name not in PLANS):
        came = repr(name) if isinstance(name, str) else type(name).__name__
        raise ValueError(f"plan must be 'auto' or one of {list(PLANS)}, got {came}")
    if isinstance(requested, Plan) and not _has_sizes(requested):
        raise ValueError(
            f"plan has chunk_rows {requested.chunk_rows!r} and staging_rows {requested.staging_rows!r}, expected a "
            "positive integer, and 0 or an integer at least as large"
        )


def _has_sizes(plan: Plan) -> bool:
    """Returns whether the rows of a plan are numbers of rows."""
    chunk_rows, staging_rows = plan.chunk_rows, plan.staging_rows
    are_integers = all(isinstance(rows, int) and not isinstance(rows, bool) for rows in (chunk_rows, staging_rows))
    return are_integers and chunk_rows >= 1 and (staging_rows == 0 or staging_rows >= chunk_rows)


class Memory(NamedTuple):
    """Bytes that a call allocates beyond its inputs and their gradients; not all of it exists at the same time."""

    logits_chunk: int
    staging_buffer: int
    accumulator: int
    """For dW, in addition to dW itself."""
    stored_gradients: int
    """Logit gradients that plan `kept_gradient` stores until the backward pass."""
    peak: int


def call_memory(shape: Shape, plan: Plan, num_models: int = 2) -> Memory:
    """Returns the memory of a call by the formulas of `sizes`.

    Args:
        num_models: models whose logits are formed; 1 without a teacher.
    """
    chunk = sizes.logits_chunk_bytes(shape, plan.chunk_rows, num_models)
    staging = sizes.staging_bytes(shape, plan.staging_rows)
    if plan.is_without_gradient:
        return Memory(chunk, 0, 0, 0, peak=chunk)

    # Stored gradients: when dW is formed there are no logits any more, and it takes their memory. Those of one output
    # are multiplied where they are stored, all at once.
    if plan.keeps_gradient:
        stored = sizes.stored_gradient_bytes(shape)
        staging, rows_at_once = (staging, plan.staging_rows) if shape.logprob_grad else (0, shape.num_rows)
        accumulator = sizes.accumulator_bytes(shape, rows_at_once)
        peak = stored + max(chunk - sizes.head_bytes(shape), staging + accumulator)
        return Memory(chunk, staging, accumulator, stored, peak)

    accumulator = sizes.accumulator_bytes(shape, plan.staging_rows)
    if plan.staging_rows >= shape.num_rows:
        return Memory(chunk, staging, accumulator, 0, sizes.one_product_bytes(shape, chunk))
    return Memory(chunk, staging, accumulator, 0, peak=chunk + staging + accumulator)


def extra_bytes(shape: Shape, plan: Plan) -> int:
    """Returns the peak memory of a call with a teacher, beyond its inputs and their gradients."""
    return call_memory(shape, plan).peak


def _prefer(shape: Shape, credit_in_one_pass: bool) -> tuple[str, str]:
    """Returns the name of the preferred plan, and the reason."""
    if not (shape.grad_hidden or shape.grad_head):
        return "stats_only", "nothing needs a gradient"
    if _why_not("frozen_head", shape, credit_in_one_pass) is None:
        return "frozen_head", "the student's head needs no gradient"
    if _why_not("gradient_in_forward", shape, credit_in_one_pass) is None:
        return "gradient_in_forward", "a scalar loss whose row weights are known in order"
    may_keep = _why_not("kept_gradient", shape, credit_in_one_pass) is None
    if may_keep and sizes.stored_gradient_bytes(shape) <= 2 * sizes.wide_head_bytes(shape):
        return "kept_gradient", "what it keeps is no larger than two float32 dW"
    if shape.scalar:
        return "recompute", "row weights depend on rows of other chunks"
    return "recompute", "per-row outputs, their upstream gradients come later"


def _why_not(name: str, shape: Shape, credit_in_one_pass: bool) -> str | None:
    """Returns the reason why a plan cannot compute a call, or None if it can."""
    needs_grad = shape.grad_hidden or shape.grad_head
    if name == "stats_only":
        return "an input needs a gradient" if needs_grad else None
    if name == "recompute":
        return None
    if name == "kept_gradient":
        return "a scalar loss keeps nothing; use 'gradient_in_forward'" if shape.scalar else None
    if name == "frozen_head" and shape.grad_head:
        return "student_weight or student_bias needs a gradient"
    if shape.scalar:
        return None if credit_in_one_pass else "row weights depend on rows of other chunks; use 'recompute'"
    if name == "gradient_in_forward":
        return "per-row outputs have upstream gradients that come later; use 'kept_gradient' or 'recompute'"
    return "the log-prob has an upstream gradient of its own; use 'recompute'" if shape.logprob_grad else None
