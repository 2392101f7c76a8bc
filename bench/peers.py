"""All candidates of the benchmark behind one signature: inputs -> scalar loss whose backward is the op's gradient.

Our candidates, one per back end and plan, then the libraries that people use today. A peer is imported when it is first
built, never copied. `verify.py` compares value and gradients with float64 before a candidate may be timed. A candidate
that cannot run here gives the reason.

INSTALL puts the peers beside a torch that stays as it is (they are pure Python; plain `pip install liger-kernel` and
the like may pull another torch and its CUDA packages). Kernels in CuTe, for a Hopper or later:

    pip install --no-deps quack-kernels && pip install nvidia-cutlass-dsl

`pip install -e .[bench]` installs all of it with dependencies, where that is wanted; there, pin torch in a
constraints file.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from cases import DISCOUNT, DISTIL_WEIGHT, ENTROPY_WEIGHT, JSD_WEIGHT, LABEL_WEIGHT, Case, CaseInputs
from torch import Tensor

import distil_kernels as dk
from distil_kernels.backends import cpu
from distil_kernels.backends.dispatch import BACKENDS
from distil_kernels.plan import Shape, choose_plan

Loss = Callable[[CaseInputs], Tensor]

INSTALL = (
    "pip install 'distil-kernels[train]' datasets && pip install --no-deps liger-kernel trl torchtune "
    "flash-linear-attention fla-core cut-cross-entropy orda-kernel"
)

GRADIENT_THRESHOLDS = (1e-5, 5e-5, 1e-3)
"""Thresholds relative to the row's largest entry of the logits' gradient."""


@dataclass(frozen=True)
class Candidate:
    """A way to compute an op: one row of a table."""

    name: str
    group: str
    """"ours", "approximate" (ours, without the small entries of the gradient), "peer", or shown for its rate "label" (a
    loss without a teacher) and "cost" (ours, the cost without the other terms)."""
    ops: tuple[str, ...]
    """The ops that it computes."""
    value: str
    """The exact value that its loss has: a key of `ExactResult.values`."""
    build: Callable[[Case], Loss]
    needs: tuple[str, ...] = ()
    """Packages that must be installed."""
    cuda_only: bool = False
    backend_unavailable: str | None = None
    """The reason why the back end of one of ours cannot run here."""

    @property
    def missing(self) -> list[str]:
        """Packages that it needs and that are not installed."""
        return [package for package in self.needs if importlib.util.find_spec(package) is None]

    def waits_for_gpu(self, case: Case) -> bool:
        return self.cuda_only and case.device != "cuda"

    def unavailable(self, case: Case) -> str | None:
        """The reason why it cannot run here, or None."""
        if self.missing:
            return f"{self.missing[0]} is not installed"
        if self.waits_for_gpu(case):
            return "its kernels need a GPU"
        return self.backend_unavailable


def candidates(op: str, device: torch.device, dtype: torch.dtype) -> list[Candidate]:
    """All candidates that compute `op`, ours first."""
    return [*_ours(op, device, dtype), *(peer for peer in PEERS if op in peer.ops)]


def _ours(op: str, device: torch.device, dtype: torch.dtype) -> list[Candidate]:
    plans = {
        "ce": ("gradient_in_forward", "kept_gradient", "recompute"),
        "frozen": ("frozen_head",),
        "stats": ("kept_gradient", "recompute"),
        "distil": ("gradient_in_forward", "recompute"),
        "terms": ("gradient_in_forward", "recompute"),
        "jsd": ("gradient_in_forward", "kept_gradient", "recompute"),
    }[op]
    ours = []
    for backend, module in BACKENDS.items():
        reason = module.unavailable(device, dtype)
        # One plan of the plain torch back end shows what the kernels save.
        for plan in plans if backend != "reference" else plans[:1]:
            ours.append(_our_candidate(op, backend, plan, reason))
    if op == "terms":
        ours += [
            Candidate("ours, an op for each term", "ours", ("terms",), "loss", lambda case: _op_for_each_term),
            Candidate("ours, distillation alone", "cost", ("terms",), "loss", lambda case: _cost_alone),
        ]
    if op == "ce":
        ours += [_sparse_candidate(threshold, cpu.unavailable(device, dtype)) for threshold in GRADIENT_THRESHOLDS]
    return ours


def default_plan(case: Case) -> str:
    """The plan that the library chooses for a case."""
    shape = Shape(
        case.num_rows, case.vocab_size, case.hidden_size, case.torch_dtype, case.device, scalar=case.op != "stats",
        logprob_grad=case.op in ("stats", "distil"), grad_hidden=True, grad_head=case.op != "frozen",
    )  # fmt: skip
    return choose_plan(shape).name


def _sparse_candidate(threshold: float, unavailable: str | None) -> Candidate:
    """Our CPU candidate that leaves out the small entries of the logits' gradient."""

    def build(case: Case) -> Loss:
        return lambda inputs: dk.fused_forward_ce(
            *inputs.heads, backend="cpu", plan="gradient_in_forward", gradient_threshold=threshold
        )

    return Candidate(
        f"ours cpu threshold {threshold:g}", "approximate", ("ce",), "loss", build, backend_unavailable=unavailable
    )


def _our_candidate(op: str, backend: str, plan: str, unavailable: str | None) -> Candidate:
    def build(case: Case) -> Loss:
        return {"stats": stats, "distil": distil, "terms": terms}.get(
            op, mean_of_rows if plan == "kept_gradient" else mean
        )

    token_loss = partial(dk.fused_jsd, jsd_weight=JSD_WEIGHT) if op == "jsd" else dk.fused_forward_ce

    def mean(inputs: CaseInputs) -> Tensor:
        return token_loss(*inputs.heads, backend=backend, plan=plan)

    def mean_of_rows(inputs: CaseInputs) -> Tensor:
        return token_loss(*inputs.heads, reduction="none", backend=backend, plan=plan).mean()

    def stats(inputs: CaseInputs) -> Tensor:
        stats = dk.token_stats(*inputs.heads, tokens=inputs.tokens, backend=backend, plan=plan)
        return inputs.cost_weight @ stats.ce + inputs.logprob_weight @ stats.logprob

    def distil(inputs: CaseInputs) -> Tensor:
        return dk.fused_distil_loss(
            *inputs.heads, tokens=inputs.tokens, cu_seqlens=inputs.cu_seqlens, discount=DISCOUNT,
            backend=backend, plan=plan,
        ).loss  # fmt: skip

    def terms(inputs: CaseInputs) -> Tensor:
        return dk.fused_distil_loss(
            *inputs.heads, tokens=inputs.tokens, cu_seqlens=None, credit_span="none", distil_weight=DISTIL_WEIGHT,
            advantages=inputs.advantages, labels=inputs.tokens, label_weight=LABEL_WEIGHT,
            entropy_weight=ENTROPY_WEIGHT, normalizer=inputs.tokens.numel(), backend=backend, plan=plan,
        ).loss  # fmt: skip

    return Candidate(f"ours {backend} {plan}", "ours", (op,), "loss", build, backend_unavailable=unavailable)


def _op_for_each_term(inputs: CaseInputs) -> Tensor:
    """Distillation, rewards with the entropy bonus, and labels: a pass for each."""
    hidden, weight, *_ = inputs.heads
    rewards = dk.fused_policy_loss(
        hidden, weight, tokens=inputs.tokens, advantages=inputs.advantages, entropy_weight=ENTROPY_WEIGHT
    )
    labels = dk.token_logprobs(hidden, weight, tokens=inputs.tokens).logprob.mean()
    return DISTIL_WEIGHT * dk.fused_forward_ce(*inputs.heads) + rewards.loss - LABEL_WEIGHT * labels


def _cost_alone(inputs: CaseInputs) -> Tensor:
    return dk.fused_distil_loss(
        *inputs.heads, tokens=inputs.tokens, cu_seqlens=None, credit_span="none", normalizer=inputs.tokens.numel()
    ).loss


def _logits(inputs: CaseInputs) -> tuple[Tensor, Tensor]:
    hidden, weight, teacher_hidden, teacher_weight = inputs.heads
    with torch.no_grad():
        teacher = teacher_hidden @ teacher_weight.T
    return hidden @ weight.T, teacher


def _naive(op: str) -> Loss:
    """The textbook computation: logits in the dtype of the model, softmax in float32, autograd."""

    def rows(inputs: CaseInputs) -> tuple[Tensor, Tensor]:
        student, teacher = _logits(inputs)
        log_s = student.log_softmax(-1, dtype=torch.float32)
        ce = -(teacher.softmax(-1, dtype=torch.float32) * log_s).sum(-1)
        return ce, log_s

    def ce(inputs: CaseInputs) -> Tensor:
        return rows(inputs)[0].mean()

    def stats(inputs: CaseInputs) -> Tensor:
        ce, log_s = rows(inputs)
        logprob = log_s.gather(1, inputs.tokens[:, None])[:, 0]
        return inputs.cost_weight @ ce + inputs.logprob_weight @ logprob

    def distil(inputs: CaseInputs) -> Tensor:
        ce, log_s = rows(inputs)
        logprob = log_s.gather(1, inputs.tokens[:, None])[:, 0]
        num_sequences = inputs.cu_seqlens.numel() - 1
        position = torch.arange(ce.numel(), device=ce.device)
        gap = position[None, :] - position[:, None]
        sequence = torch.bucketize(position, inputs.cu_seqlens[1:].to(ce.device), right=True)
        later = (gap > 0) & (sequence[None, :] == sequence[:, None])
        credit = torch.where(later, DISCOUNT ** gap.clamp(min=0).float(), 0.0) @ ce.detach()
        surrogate = credit @ logprob
        return (ce.sum() + surrogate - surrogate.detach()) / num_sequences

    def jsd(inputs: CaseInputs) -> Tensor:
        log_s, log_t = (logits.log_softmax(-1, dtype=torch.float32) for logits in _logits(inputs))
        mixture = torch.logaddexp(log_t + math.log(JSD_WEIGHT), log_s + math.log1p(-JSD_WEIGHT))
        teacher, student = ((each.exp() * (each - mixture)).sum(-1) for each in (log_t, log_s))
        return (JSD_WEIGHT * teacher + (1 - JSD_WEIGHT) * student).mean()

    def terms(inputs: CaseInputs) -> Tensor:
        ce, log_s = rows(inputs)
        logprob = log_s.gather(1, inputs.tokens[:, None])[:, 0]
        rewards = -(logprob - logprob.detach()).exp() * inputs.advantages
        entropy = -(log_s.exp() * log_s).sum(-1)
        return (DISTIL_WEIGHT * ce + rewards - LABEL_WEIGHT * logprob - ENTROPY_WEIGHT * entropy).mean()

    return {"stats": stats, "distil": distil, "jsd": jsd, "terms": terms}.get(op, ce)


def _beta(case: Case) -> float:
    """The argument that makes a generalised JSD of Liger or TRL the op: 0 is the forward KL there."""
    return JSD_WEIGHT if case.op == "jsd" else 0.0


def _naive_compiled(case: Case) -> Loss:
    return torch.compile(_naive(case.op), dynamic=False)


def _liger_chunked(case: Case) -> Loss:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction

    def loss(inputs: CaseInputs) -> Tensor:
        hidden, weight, teacher_hidden, teacher_weight = inputs.heads
        hard, soft, beta = 0.0, 1.0, _beta(case)
        return LigerFusedLinearJSDFunction.apply(
            hidden, weight, teacher_hidden, teacher_weight, inputs.tokens, None, None, hard, soft, beta
        )

    return loss


def _liger_fused(case: Case) -> Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    return lambda inputs: liger_fused_linear_jsd(*inputs.heads, jsd_beta=_beta(case))


def _liger_fused_kl(case: Case) -> Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_kl_div

    def loss(inputs: CaseInputs) -> Tensor:
        hidden, weight, teacher_hidden, teacher_weight = inputs.heads
        with torch.no_grad():  # it takes the teacher's probabilities of all rows
            teacher = (teacher_hidden @ teacher_weight.T).softmax(-1)
        return liger_fused_linear_kl_div(hidden, weight, teacher)

    return loss


def _trl_generalized_jsd(case: Case) -> Loss:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    return lambda inputs: GKDTrainer.generalized_jsd_loss(*_logits(inputs), beta=_beta(case))


def _trl_chunked(case: Case) -> Loss:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def loss(inputs: CaseInputs) -> Tensor:
        hidden, weight, teacher_hidden, teacher_weight = inputs.heads
        rows = ChunkedDivergenceFunction.apply(
            hidden, weight, None, teacher_hidden, teacher_weight, None, _beta(case)
        )  # fmt: skip
        return rows[0].mean()

    return loss


def _torchtune_chunked(case: Case) -> Loss:
    # torchtune's __init__ needs torchao at an old version; the file of the loss needs torch alone.
    package = importlib.util.find_spec("torchtune")
    path = Path(package.submodule_search_locations[0]) / "modules" / "loss" / "kd_losses.py"
    spec = importlib.util.spec_from_file_location("torchtune_kd_losses", path)
    module = sys.modules.setdefault(spec.name, importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    chunks = 8
    forward_kl = module.ForwardKLWithChunkedOutputLoss(num_output_chunks=chunks)

    def loss(inputs: CaseInputs) -> Tensor:
        hidden, weight, teacher_hidden, teacher_weight = inputs.heads
        with torch.no_grad():
            teacher = [part @ teacher_weight.T for part in teacher_hidden[None].chunk(chunks, dim=1)]
        student = [part @ weight.T for part in hidden[None].chunk(chunks, dim=1)]
        return forward_kl(student, teacher, inputs.tokens[None])

    return loss


def _fla_fused_kl(case: Case) -> Loss:
    from fla.modules.fused_kl_div import fused_kl_div_loss

    def loss(inputs: CaseInputs) -> Tensor:
        hidden, weight, teacher_hidden, teacher_weight = inputs.heads
        return fused_kl_div_loss(hidden, teacher_hidden, weight, teacher_weight)

    return loss


def _orda(case: Case) -> Loss:
    from orda_kernel import SeparateTeacher, distillation_loss

    def loss(inputs: CaseInputs) -> Tensor:
        hidden, weight, teacher_hidden, teacher_weight = inputs.heads
        return distillation_loss(
            hidden, weight, inputs.tokens, SeparateTeacher(teacher_hidden, teacher_weight),
            student_ce_weight=0.0, kl_weight=1.0, kl_divergence="forward", backend="triton",
        ).loss  # fmt: skip

    return loss


def _apple_label(case: Case) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    def loss(inputs: CaseInputs) -> Tensor:
        return linear_cross_entropy(inputs.student_hidden, inputs.student_weight, inputs.tokens)

    return loss


def _liger_cute_label(case: Case) -> Loss:
    from liger_kernel.ops.backends._cutedsl.fused_linear_cross_entropy import fused_linear_cross_entropy_cutedsl

    return lambda inputs: fused_linear_cross_entropy_cutedsl(
        inputs.student_hidden, inputs.student_weight, inputs.tokens
    )[0]  # fmt: skip


def _quack_label(case: Case) -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda inputs: chunked_linear_cross_entropy(inputs.student_hidden, inputs.student_weight, inputs.tokens)


def _torch_label(case: Case) -> Loss:
    if not hasattr(F, "linear_cross_entropy"):
        raise RuntimeError(f"torch {torch.__version__} has no linear_cross_entropy")
    # Its chunks are a few rows long, which on a CPU takes ten times longer than without them.
    options = torch.nn.LinearCrossEntropyOptions() if case.device == "cuda" else None

    def loss(inputs: CaseInputs) -> Tensor:
        return F.linear_cross_entropy(inputs.student_hidden, inputs.student_weight, inputs.tokens, options=options)

    return loss


_CE = ("ce", "frozen")
_JSD = ("jsd",)
_ALL = ("ce", "frozen", "stats", "distil", "terms", "jsd")

PEERS = (
    Candidate("naive torch", "peer", _ALL, "loss", lambda case: _naive(case.op)),
    Candidate("naive torch, compiled", "peer", _ALL, "loss", _naive_compiled),
    Candidate("liger chunked jsd, compiled", "peer", _CE, "kl", _liger_chunked, ("liger_kernel", "triton")),
    Candidate("liger fused linear jsd", "peer", _CE, "kl", _liger_fused, ("liger_kernel", "triton"), cuda_only=True),
    Candidate("liger fused linear kl", "peer", _CE, "kl", _liger_fused_kl, ("liger_kernel", "triton"), cuda_only=True),
    Candidate("trl generalized jsd", "peer", _CE, "kl", _trl_generalized_jsd, ("trl", "datasets")),
    Candidate("trl chunked divergence", "peer", _CE, "kl", _trl_chunked, ("trl", "datasets")),
    Candidate("liger chunked jsd, compiled", "peer", _JSD, "loss", _liger_chunked, ("liger_kernel", "triton")),
    Candidate("liger fused linear jsd", "peer", _JSD, "loss", _liger_fused, ("liger_kernel", "triton"), cuda_only=True),
    Candidate("trl generalized jsd", "peer", _JSD, "loss", _trl_generalized_jsd, ("trl", "datasets")),
    Candidate("trl chunked divergence", "peer", _JSD, "loss", _trl_chunked, ("trl", "datasets")),
    Candidate("torchtune chunked kl", "peer", _CE, "loss", _torchtune_chunked, ("torchtune",)),
    Candidate("fla fused kl", "peer", _CE, "kl", _fla_fused_kl, ("fla", "triton"), cuda_only=True),
    Candidate("orda", "peer", _CE, "kl", _orda, ("orda_kernel", "triton"), cuda_only=True),
    Candidate("apple cce (labels)", "label", ("ce",), "label", _apple_label, ("cut_cross_entropy",), cuda_only=True),
    Candidate(
        "liger cute ce (labels)",
        "label",
        ("ce",),
        "label",
        _liger_cute_label,
        ("liger_kernel", "cutlass"),
        cuda_only=True,
    ),
    Candidate("quack ce (labels)", "label", ("ce",), "label", _quack_label, ("quack", "cutlass"), cuda_only=True),
    Candidate("torch linear ce (labels)", "label", ("ce",), "label", _torch_label),
)
