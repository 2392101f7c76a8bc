"""How a call would be computed: `explain` runs a public op on tensors without memory, up to its custom op.

The op checks its arguments and chooses plan and back end as always; the record is read from what it hands to the custom
op. So it is exactly what a real call would use, and no loss, logit or gradient is computed (of a mask and of sequence
borders the values are read, to count chunks).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from distil_kernels.distil import fused_distil_loss
from distil_kernels.engine.checks import ArgumentChecks
from distil_kernels.engine.credit import reverse_chunks
from distil_kernels.engine.driver import forms_no_logits
from distil_kernels.engine.plan import Memory, Plan, call_memory
from distil_kernels.engine.sizes import Shape
from distil_kernels.engine.spec import Spec
from distil_kernels.losses import fused_forward_ce, fused_forward_kl, fused_jsd, fused_reverse_kl
from distil_kernels.policy import fused_policy_loss
from distil_kernels.token_statistics import token_logprobs, token_stats
from distil_kernels.topk import fused_topk_ce, fused_topk_distil_loss

_OPS: dict[str, Callable[..., Any]] = {
    op.__name__: op
    for op in (
        fused_forward_ce, fused_forward_kl, fused_reverse_kl, fused_jsd, fused_distil_loss, fused_topk_ce,
        fused_topk_distil_loss, fused_policy_loss, token_stats, token_logprobs,
    )
}  # fmt: skip


class Explanation(NamedTuple):
    """How one call is computed, in what memory, and why; `print` it."""

    op: str
    plan: str
    plan_reason: str
    backend: str
    backend_reason: str
    num_rows: int
    """Rows of the call, counted or not."""
    chunk_rows: int
    """Rows of a chunk of logits."""
    num_chunks: int
    """Chunks of one pass over the rows that count; plan `recompute` makes two passes. 0: no logits are formed."""
    staging_rows: int
    """Rows of the staging buffer of logit gradients; 0 for none."""
    memory: Memory
    """Bytes beyond the inputs and their gradients, by part; `memory.peak` is the largest sum at one time. Plain torch
    (back end "reference", and the ops of named tokens) needs temporaries of several chunks in addition."""
    spec: Spec
    """All settings of the call that are no tensors."""

    def __str__(self) -> str:
        parts = {name: num_bytes for name, num_bytes in self.memory._asdict().items() if num_bytes and name != "peak"}
        lines = [
            ("plan", f"{self.plan} ({self.plan_reason})"),
            ("back end", f"{self.backend} ({self.backend_reason})"),
            ("chunks", f"{self.num_chunks} of {self.chunk_rows} rows, {self.num_rows} rows in all"),
            ("staging", f"{self.staging_rows} rows" if self.staging_rows else "none"),
            *((name.replace("_", " "), _mebibytes(num_bytes)) for name, num_bytes in parts.items()),
            ("peak", f"{_mebibytes(self.memory.peak)} beyond inputs and gradients"),
        ]
        return "\n".join([self.op, *(f"  {name:<17} {text}" for name, text in lines)])


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def explain(op: Callable[..., Any] | str, *arguments: Any, **options: Any) -> Explanation:
    """Returns how a call of a public op would be computed: plan, rows, back end, bytes, and why. Computes nothing.

    With the arguments of the call:

        explain(fused_forward_ce, student_hidden, student_weight, teacher_hidden, teacher_weight, reduction="sum")

    or with its sizes, without any tensor:

        explain("fused_forward_ce", num_rows=8192, vocab_size=151936, hidden_size=4096, dtype=torch.bfloat16)

    Args:
        op: a public op (every `fused_*` and `token_*` of this package), or its name.
        arguments, options: those of the op; or, in place of its tensors, these keywords and its other options:
            num_rows, vocab_size, hidden_size: N, V, D.
            dtype: of hidden states and heads, default torch.float32.
            device: default "cpu". The back end is the one that this machine would take for such tensors.
            needs_grad: names of the arguments that need gradients, default ("student_hidden", "student_weight").
            num_named: K, tokens that the teacher names (`fused_topk_*`), default 16.
            cu_seqlens: as in the op; default one sequence.

    Raises:
        As the op does for these arguments; ValueError if `op` is no op of this package.
    """
    function = _OPS.get(op) if isinstance(op, str) else op
    if not any(function is each for each in _OPS.values()):
        came = repr(op) if isinstance(op, str) or callable(op) else type(op).__name__
        raise ValueError(f"[explain] op is {came}, expected one of {list(_OPS)}, or the function itself")
    assert callable(function)
    is_by_sizes = "num_rows" in options
    if is_by_sizes:
        _check_sizes(**options)
    if is_by_sizes and "cu_seqlens" in inspect.signature(function).parameters:
        options.setdefault("cu_seqlens", torch.tensor([0, options["num_rows"]], device="cpu"))

    # Tensors without memory, on any device; below autograd, which would need the device itself.
    with FakeTensorMode(allow_non_fake_inputs=True), torch._C._AutoDispatchBelowAutograd():
        if is_by_sizes:
            options = _from_sizes(function, **options)
        try:
            with _StopAtCustomOp():
                function(*map(_without_memory, arguments), **{name: _without_memory(options[name]) for name in options})
        except _CustomOpCall as call:
            decided = call
        else:
            raise AssertionError(f"{function.__name__} called no custom op")
    return _explanation(function.__name__, decided, options.get("token_mask"), options.get("cu_seqlens"))


class _CustomOpCall(Exception):
    """Carries the arguments of a custom op, by name, out of the public op."""

    def __init__(self, op: Any, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.is_scalar = op is not torch.ops.distil_kernels.row_statistics.default
        self.arguments = arguments


class _StopAtCustomOp(TorchDispatchMode):
    """Raises _CustomOpCall in place of the first custom op of this package."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.namespace == "distil_kernels":
            names = [argument.name for argument in func._schema.arguments]
            raise _CustomOpCall(func, dict(zip(names, args, strict=False)) | (kwargs or {}))
        return func(*args, **(kwargs or {}))


def _explanation(name: str, call: _CustomOpCall, token_mask: Tensor | None, cu_seqlens: Tensor | None) -> Explanation:
    """Returns the record of a call of a custom op."""
    spec = Spec.decode(call.arguments["spec"])
    plan = spec.plan_of(call.arguments["chunk_rows"], call.arguments["staging_rows"])
    hidden, weight = call.arguments["student_hidden"], call.arguments["student_weight"]
    num_models = 1 if call.arguments.get("teacher_hidden") is None else 2
    shape = Shape(
        hidden.shape[0], call.arguments["vocab_size"], weight.shape[1], hidden.dtype, hidden.device.type,
        call.is_scalar, logprob_grad=call.arguments["tokens"] is not None, grad_hidden=spec.needs.hidden,
        grad_head=spec.needs.weight or spec.needs.bias,
    )  # fmt: skip
    counted = None if token_mask is None else token_mask.reshape(-1).cpu().to(torch.bool)
    memory, num_chunks = call_memory(shape, plan, num_models), _num_chunks(shape, spec, plan, counted, cu_seqlens)
    if plan.is_without_gradient and forms_no_logits(spec, plan, num_models):
        memory, num_chunks = Memory(0, 0, 0, 0, peak=0), 0
    return Explanation(
        name, plan.name, plan.reason, spec.backend, spec.backend_reason, shape.num_rows, plan.chunk_rows, num_chunks,
        plan.staging_rows, memory, spec,
    )  # fmt: skip


def _num_chunks(shape: Shape, spec: Spec, plan: Plan, counted: Tensor | None, cu_seqlens: Tensor | None) -> int:
    """Returns the chunks of one pass; credit in order cuts them at the positions of sequences."""
    if cu_seqlens is not None and spec.credit.span != "none" and plan.forms_gradient_in_forward:
        lengths = cu_seqlens.to("cpu", torch.int64).diff()
        return sum(1 for _ in reverse_chunks(lengths, counted, spec.credit, plan.chunk_rows))
    num_counted = shape.num_rows if counted is None else int(counted.sum())
    return -(-num_counted // plan.chunk_rows)


def _without_memory(value: Any) -> Any:
    """Returns a tensor like `value` that has no memory; what is no plain tensor is left to the op's checks."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or hasattr(value, "device_mesh"):
        return value
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return copy.requires_grad_(value.requires_grad)


_STUDENT_TENSORS = ("student_hidden", "student_weight", "student_bias")


def _check_sizes(
    *,
    num_rows: int,
    vocab_size: int,
    hidden_size: int,
    num_named: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    needs_grad: Iterable[str] = (),
    **_: Any,
) -> None:
    """Checks the arguments that stand for tensors."""
    checks = ArgumentChecks("explain")
    sizes = {"num_rows": num_rows, "vocab_size": vocab_size, "hidden_size": hidden_size, "num_named": num_named}
    for name, size in sizes.items():
        checks.count(name, size, optional=False)
        checks.between(name, size, 1, 2**31 - 1)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        came = str(dtype) if isinstance(dtype, torch.dtype) else type(dtype).__name__
        checks.type_error(f"dtype is {came}, expected a floating torch.dtype")
    try:
        torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        came = repr(device) if isinstance(device, str) else type(device).__name__
        checks.value_error(f"device is {came}, expected a device of torch")
    is_collection = isinstance(needs_grad, (tuple, list, set, frozenset))
    if not is_collection or not all(name in _STUDENT_TENSORS for name in needs_grad):
        came = repr(needs_grad) if is_collection else type(needs_grad).__name__
        checks.value_error(f"needs_grad is {came}, expected a collection of names of {list(_STUDENT_TENSORS)}")


def _from_sizes(
    op: Callable[..., Any],
    *,
    num_rows: int,
    vocab_size: int,
    hidden_size: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    needs_grad: Iterable[str] = ("student_hidden", "student_weight"),
    num_named: int = 16,
    **options: Any,
) -> dict[str, Any]:
    """Returns the options of an op with tensors of the given sizes for the arguments that it needs."""

    def tensor(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    tensors = {
        "student_hidden": tensor(num_rows, hidden_size),
        "student_weight": tensor(vocab_size, hidden_size),
        "student_bias": tensor(vocab_size),
        "teacher_hidden": tensor(num_rows, hidden_size),
        "teacher_weight": tensor(vocab_size, hidden_size),
        "teacher_ids": tensor(num_rows, num_named, dtype=torch.int64),
        "teacher_logprobs": tensor(num_rows, num_named),
        "tokens": tensor(num_rows, dtype=torch.int64),
        "advantages": tensor(num_rows),
    }
    needs_grad = set(needs_grad)
    options.setdefault("detach_hidden", "student_hidden" not in needs_grad)
    for name in needs_grad:
        tensors[name].requires_grad_()
    parameters = inspect.signature(op).parameters.values()
    required = {each.name for each in parameters if each.default is each.empty and each.kind is not each.VAR_KEYWORD}
    names = (required | {"teacher_weight", *needs_grad}) & ({each.name for each in parameters} | needs_grad)
    return {name: tensors[name] for name in names if name in tensors} | options
