"""A check of every public op: what a mask leaves out changes nothing, whatever it is."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from distil_kernels import (
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
from distil_kernels.engine.plan import Plan

N, V, D, K = 14, 70, 12, 3
BORDERS = torch.tensor([0, 4, 8, 9, N])


class Rows(NamedTuple):
    """Everything that a row has, for a call of any op."""

    student_hidden: Tensor
    teacher_hidden: Tensor
    tokens: Tensor
    token_weight: Tensor
    teacher_ids: Tensor
    teacher_logprobs: Tensor
    floats: Tensor  # [N]: advantages, old and behaviour log-probs, values of a baseline
    upstream: Tensor  # [2, N]


def make_rows(dtype: torch.dtype, generator: torch.Generator) -> Rows:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ids = torch.stack([torch.randperm(V, generator=generator)[:K] for _ in range(N)])
    return Rows(
        normal(N, D).to(dtype), normal(N, D).to(dtype), torch.randint(V, (N,), generator=generator),
        torch.rand(N, generator=generator) + 0.5, ids, normal(N, K).abs().neg() - 2.0, normal(N).abs().neg(),
        normal(2, N),
    )  # fmt: skip


def with_anything(rows: Rows, mask: Tensor, value: float) -> Rows:
    """Puts `value` into every float of the rows that the mask leaves out, and ids that no vocabulary has."""

    def spoilt(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        view = copy.t() if tensor.shape[0] == 2 else copy
        view[~mask] = value if tensor.is_floating_point() else -(10**9)
        return copy

    return Rows(*map(spoilt, rows))


def _distil(rows: Rows, heads: tuple[Tensor, ...], mask: Tensor, **options: Any) -> Any:
    hidden, weight, teacher_weight = heads
    return fused_distil_loss(
        hidden, weight, rows.teacher_hidden, teacher_weight, tokens=rows.tokens, cu_seqlens=BORDERS, token_mask=mask,
        token_weight=rows.token_weight, behaviour_logprobs=rows.floats, **options,
    )  # fmt: skip


def _topk_distil(rows: Rows, heads: tuple[Tensor, ...], mask: Tensor, **options: Any) -> Any:
    return fused_topk_distil_loss(
        *heads[:2], rows.teacher_ids, rows.teacher_logprobs, tokens=rows.tokens, cu_seqlens=BORDERS, token_mask=mask,
        behaviour_logprobs=rows.floats, **options,
    )  # fmt: skip


def _of_costs(op: Any, **fixed: Any) -> Any:
    def call(rows: Rows, heads: tuple[Tensor, ...], mask: Tensor, **options: Any) -> Any:
        hidden, weight, teacher_weight = heads
        return op(
            hidden, weight, rows.teacher_hidden, teacher_weight, token_mask=mask, token_weight=rows.token_weight,
            **fixed, **options,
        )  # fmt: skip

    return call


SCALAR = {
    "forward_ce": _of_costs(fused_forward_ce, return_dropped=True),
    "forward_kl": _of_costs(fused_forward_kl),
    "reverse_kl": _of_costs(fused_reverse_kl),
    "jsd": _of_costs(fused_jsd),
    "policy": lambda rows, heads, mask, **options: fused_policy_loss(
        *heads[:2], tokens=rows.tokens, advantages=rows.floats, old_logprobs=rows.floats, entropy_weight=0.1,
        reference_logprobs=rows.floats - 9.0, reference_weight=1e-3, token_mask=mask,
        token_weight=rows.token_weight, **options,
    ),
    "distil": _distil,
    "distil, no span": lambda *arguments, **options: _distil(*arguments, credit_span="none", **options),
    "distil, values": lambda *arguments, **options: _distil(*arguments, baseline=arguments[0].floats, **options),
    "distil, terms": lambda *arguments, **options: _distil(
        *arguments, distil_weight=arguments[0].token_weight, advantages=arguments[0].floats, labels=arguments[0].tokens,
        old_logprobs=arguments[0].floats, label_smoothing=0.1, z_loss_weight=0.1, entropy_weight=0.1,
        reference_logprobs=arguments[0].floats - 9.0, reference_weight=1e-3, **options,
    ),
    "distil, mean": lambda *arguments, **options: _distil(*arguments, baseline="position_mean", **options),
}  # fmt: skip
TOPK = {
    "topk_ce": lambda rows, heads, mask, **options: fused_topk_ce(
        *heads[:2], rows.teacher_ids, rows.teacher_logprobs, token_mask=mask, token_weight=rows.token_weight, **options
    ),
    "topk_distil": _topk_distil,
    "topk_distil, terms": lambda *arguments, **options: _topk_distil(
        *arguments,
        distil_weight=arguments[0].token_weight,
        advantages=arguments[0].floats,
        labels=arguments[0].tokens,
        label_smoothing=0.1,
        z_loss_weight=0.1,
        entropy_weight=0.1,
        reference_logprobs=arguments[0].floats - 9.0,
        reference_weight=1e-3,
        **options,
    ),
    "topk_distil, no span": lambda *arguments, **options: _topk_distil(*arguments, credit_span="none", **options),
    "topk_distil, sequence": lambda *arguments, **options: _topk_distil(
        *arguments, credit_span="sequence", baseline="leave_one_out", group_size=2, cost="kl", **options
    ),
}
PER_ROW = {
    "rows of forward_ce": _of_costs(fused_forward_ce, reduction="none"),
    "rows of jsd": _of_costs(fused_jsd, reduction="none"),
    "stats": lambda rows, heads, mask, **options: token_stats(
        heads[0], heads[1], rows.teacher_hidden, heads[2], tokens=rows.tokens, token_mask=mask, **options
    ),
    "logprobs": lambda rows, heads, mask, **options: token_logprobs(
        *heads[:2], tokens=rows.tokens, token_mask=mask, **options
    ),
}
OPS = {**SCALAR, **TOPK, **PER_ROW}


def cases() -> list[tuple[str, str]]:
    """Every op with every plan that can compute it."""
    plans = ["gradient_in_forward", "frozen_head", "recompute", "stats_only"]
    one_output = ["kept_gradient", "frozen_head", "recompute", "stats_only"]
    two_outputs = [plan for plan in one_output if plan != "frozen_head"]
    return [
        *((op, plan) for op in SCALAR for plan in plans),
        *((op, "auto") for op in TOPK),
        *((op, plan) for op in PER_ROW for plan in (one_output if op.startswith("rows") else two_outputs)),
    ]


def check(
    op: str, plan: str, backend: str, dtype: torch.dtype, generator: torch.Generator, device: str = "cpu"
) -> None:
    """Results and gradients are the same to the last bit beside NaN and infinity in all that the mask leaves out."""
    rows, mask = make_rows(dtype, generator), torch.rand(N, generator=generator) < 0.6
    weights = [torch.randn(V, D, generator=generator).to(dtype) for _ in range(2)]
    options: dict[str, Any] = {}
    if op not in TOPK:
        options = {
            "backend": backend,
            "plan": "auto" if plan == "auto" else Plan(plan, 4, 8 * (dtype != torch.float32)),
        }

    def results(rows: Rows) -> list[Tensor]:
        needs = plan != "stats_only", plan not in ("stats_only", "frozen_head")
        student, weight = (
            tensor.to(device, copy=True).requires_grad_(need)
            for tensor, need in zip((rows.student_hidden, weights[0]), needs, strict=True)
        )
        moved = Rows(*(tensor.to(device) for tensor in rows))
        found = OPS[op](moved, (student, weight, weights[1].to(device)), mask.to(device), **options)
        fields = [found] if isinstance(found, Tensor) else [x for x in found if isinstance(x, Tensor)]
        fields += [x for record in (found if isinstance(found, tuple) else ()) if isinstance(record, tuple)
                   for x in record]  # fmt: skip
        leaves = [leaf for leaf, need in zip((student, weight), needs, strict=True) if need]
        outputs = [field for field in fields if field.requires_grad]
        upstream = [torch.ones_like(x) if x.dim() == 0 else moved.upstream[i] for i, x in enumerate(outputs)]
        gradients = torch.autograd.grad(outputs, leaves, upstream) if leaves else ()
        if leaves:
            assert gradients[0][~mask.to(device)].eq(0).all()
        return [x.detach().cpu() for x in (*fields, *gradients)]

    expected = results(rows)
    for value in (float("nan"), float("inf")):
        for ours, clean in zip(results(with_anything(rows, mask, value)), expected, strict=True):
            torch.testing.assert_close(ours, clean, rtol=0, atol=0, equal_nan=op in TOPK)
            assert op in TOPK or ours.isfinite().all()
