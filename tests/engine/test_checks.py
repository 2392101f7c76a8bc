"""Every wrong argument: one clear error that names it, before any work."""

from __future__ import annotations

import inspect
import math

import pytest
import torch

from distil_kernels import fused_distil_loss, fused_forward_ce, token_stats
from distil_kernels.losses import LossOptions

N, V, D = 6, 11, 4


def arguments(**changes):
    """Valid arguments of `fused_forward_ce`, some replaced."""
    valid = {
        "student_hidden": torch.zeros(N, D),
        "student_weight": torch.zeros(V, D),
        "teacher_hidden": torch.zeros(N, D),
        "teacher_weight": torch.zeros(V, D),
    }
    return {**valid, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student_hidden": [1.0]}, TypeError, "student_hidden is list, expected a torch.Tensor"),
        ({"teacher_weight": 3}, TypeError, "teacher_weight is int"),
        ({"teacher_hidden": None}, TypeError, "teacher_hidden is NoneType, expected a torch.Tensor"),
        ({"student_hidden": torch.zeros(N, D, dtype=torch.int64)}, TypeError, "student_hidden has dtype torch.int64"),
        ({"student_weight": torch.zeros(V, D).to_sparse()}, TypeError, "student_weight has layout"),
        ({"student_weight": torch.zeros(V, D, dtype=torch.bfloat16)}, TypeError, "student_hidden is torch.float32"),
        ({"teacher_weight": torch.zeros(V, D, dtype=torch.float16)}, TypeError, "teacher_hidden is torch.float32"),
        ({"teacher_hidden": torch.zeros(N, D).double(), "teacher_weight": torch.zeros(V, D).double()}, TypeError,
         "float64 does not mix"),
        ({"teacher_hidden": torch.zeros(N, D).half(), "teacher_weight": None}, TypeError, "without teacher_weight"),
        ({"student_hidden": torch.zeros(()), "teacher_hidden": torch.zeros(())}, ValueError, r"expected \[\.\.\., D\]"),
        ({"student_weight": torch.zeros(V)}, ValueError, r"expected \[\.\.\., D\] and \[V, D\]"),
        ({"student_weight": torch.zeros(V, D + 1)}, ValueError, "the last dimensions must be equal"),
        ({"teacher_weight": torch.zeros(V, D + 1)}, ValueError, "teacher_hidden has size 4"),
        ({"teacher_weight": torch.zeros(V + 2, D)}, ValueError, "student_weight has 11 rows, teacher_weight 13"),
        ({"teacher_hidden": torch.zeros(N, D + 1), "teacher_weight": None}, ValueError, "share student_weight"),
        ({"teacher_hidden": torch.zeros(N + 1, D)}, ValueError, "the same tokens"),
        ({"student_weight": torch.zeros(0, D), "teacher_weight": torch.zeros(0, D)}, ValueError, "at least one row"),
        ({"student_weight": torch.zeros(1, D).expand(2**31, D)}, ValueError, "expected at most 2147483647"),
        ({"student_weight": torch.zeros(V, D, device="meta")}, ValueError, "student_weight is on meta"),
        ({"student_bias": torch.zeros(V - 1)}, ValueError, "student_bias has shape"),
        ({"teacher_bias": torch.zeros(V, 1)}, ValueError, "teacher_bias has shape"),
        ({"token_mask": torch.ones(N)}, TypeError, "token_mask has dtype torch.float32, expected bool"),
        ({"token_mask": torch.ones(N + 1, dtype=torch.bool)}, ValueError, "token_mask has shape"),
        ({"token_weight": torch.ones(N, dtype=torch.int64)}, TypeError, "token_weight has dtype torch.int64"),
        ({"token_weight": torch.ones(N, 1)}, ValueError, "token_weight has shape"),
        ({"temperature": float("nan")}, ValueError, "temperature is nan, expected a finite number above 0"),
        ({"temperature": float("inf")}, ValueError, "temperature is inf"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0"),
        ({"temperature": None}, TypeError, "temperature is NoneType"),
        ({"temperature": 1e-45}, ValueError, "temperature is 1e-45, expected a number from 1e-12 to 1e[+]12"),
        ({"temperature": 3e38}, ValueError, "temperature is 3e[+]38, expected a number from"),
        ({"teacher_temperature": 1e-45}, ValueError, "teacher_temperature is 1e-45, expected a number from"),
        ({"logit_softcap": 1e-45}, ValueError, "logit_softcap is 1e-45, expected a number from"),
        ({"logit_softcap": 3e38}, ValueError, "logit_softcap is 3e[+]38, expected a number from"),
        ({"teacher_temperature": -1.0}, ValueError, "teacher_temperature is -1.0"),
        ({"logit_softcap": 0.0}, ValueError, "logit_softcap is 0.0"),
        ({"teacher_logit_softcap": -math.inf}, ValueError, "teacher_logit_softcap is -inf, expected"),
        ({"teacher_logit_softcap": math.nan}, ValueError, "teacher_logit_softcap is nan, expected"),
        ({"teacher_logit_softcap": 1e-13}, ValueError, "teacher_logit_softcap is 1e-13, expected a number from 1e-12"),
        ({"student_logit_scale": -2.0}, ValueError, "student_logit_scale is -2.0, expected a finite number above 0"),
        ({"student_logit_scale": None}, TypeError, "student_logit_scale is NoneType"),
        ({"teacher_logit_scale": 1e17}, ValueError, "teacher_logit_scale is 1e[+]17, expected a number from 1e-12 to"),
        ({"logit_softcap": "30"}, TypeError, "logit_softcap is str"),
        ({"vocab_size": 12}, ValueError, "vocab_size is 12, student_weight has 11 rows: expected no more"),
        ({"vocab_size": 5, "teacher_bias": torch.zeros(4)}, ValueError, "teacher_bias has shape"),
        ({"vocab_size": 0}, ValueError, "vocab_size is 0, expected a positive integer"),
        ({"detach_hidden": None}, TypeError, "detach_hidden is NoneType, expected a bool"),
        ({"reduction": "avg"}, ValueError, "reduction is 'avg', expected one of"),
        ({"normalizer": 0.0}, ValueError, "normalizer is 0.0"),
        ({"normalizer": torch.ones(2)}, ValueError, "normalizer has shape"),
        ({"normalizer": 2.0, "reduction": "sum"}, ValueError, "expected reduction='mean'"),
        ({"backend": "metal"}, ValueError, "backend must be 'auto' or one of"),
        ({"plan": "fast"}, ValueError, "plan must be 'auto' or one of"),
        ({"plan": "frozen_head", "student_weight": torch.zeros(V, D, requires_grad=True),
          "detach_hidden": True}, ValueError,
         "student_weight or student_bias needs a gradient"),
        ({"plan": "stats_only", "student_weight": torch.zeros(V, D, requires_grad=True),
          "detach_hidden": True}, ValueError,
         "an input needs a gradient"),
        ({"plan": "kept_gradient", "student_weight": torch.zeros(V, D, requires_grad=True),
          "detach_hidden": True}, ValueError,
         "use 'gradient_in_forward'"),
    ],
)  # fmt: skip
def test_forward_ce(changes, error, message):
    with pytest.raises(error, match=message):
        fused_forward_ce(**arguments(**changes))


def test_typed_options_are_those_of_the_forward_cross_entropy():
    parameters = inspect.signature(fused_forward_ce).parameters.values()
    keywords = [parameter.name for parameter in parameters if parameter.kind == inspect.Parameter.KEYWORD_ONLY]
    assert list(LossOptions.__annotations__) == keywords


def test_messages_begin_with_the_function():
    with pytest.raises(ValueError, match=r"^\[fused_forward_ce\] temperature"):
        fused_forward_ce(**arguments(temperature=-1.0))
    with pytest.raises(ValueError, match=r"^\[token_stats\] temperature"):
        token_stats(**arguments(temperature=-1.0), tokens=torch.zeros(N, dtype=torch.int64))


def test_backend_asked_for_by_name_never_falls_back():
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run here.*float64"):
        fused_forward_ce(**{k: v.double() for k, v in arguments().items()}, backend="cpu")


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.zeros(N), TypeError, "tokens has dtype torch.float32"),
        (torch.zeros(N + 1, dtype=torch.int64), ValueError, "tokens has shape"),
        (torch.full((N,), V), ValueError, "tokens holds ids from 11 to 11, expected 0 to 10"),
        (torch.full((N,), -100), ValueError, "token_mask"),
    ],
)
def test_tokens(tokens, error, message):
    with pytest.raises(error, match=message):
        token_stats(**arguments(), tokens=tokens)


def test_tokens_of_padding_rows_are_none():
    with pytest.raises(ValueError, match="tokens holds ids from 8 to 8, expected 0 to 7"):
        token_stats(**arguments(), tokens=torch.full((N,), 8), vocab_size=8)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student_hidden": torch.zeros(2, 3, D), "teacher_hidden": torch.zeros(2, 3, D)}, ValueError, "packed rows"),
        ({"cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, "cu_seqlens has dtype"),
        ({"cu_seqlens": torch.tensor([0])}, ValueError, "at least one sequence"),
        ({"cu_seqlens": torch.tensor([[0, 6]])}, ValueError, "cu_seqlens has shape"),
        ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "from 0 to 5; expected to rise from 0 to the 6 rows"),
        ({"cu_seqlens": torch.tensor([1, 6])}, ValueError, "from 1 to 6"),
        ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, ValueError, "and falls"),
        ({"cost": "l2"}, ValueError, "cost is 'l2', expected one of"),
        ({"credit_span": "past"}, ValueError, "credit_span is 'past'"),
        ({"discount": 1.5}, ValueError, "discount is 1.5, expected a finite number from 0.0 to 1.0"),
        ({"discount": 0.9, "credit_span": "sequence"}, ValueError, "discount is 0.9 with credit_span='sequence'"),
        ({"credit_scale": float("nan")}, ValueError, "credit_scale is nan"),
        ({"credit_scale": -1.0}, ValueError, "credit_scale is -1.0"),
        ({"baseline": "median"}, ValueError, "baseline is 'median', expected one of"),
        ({"baseline": torch.zeros(3)}, ValueError, "baseline has shape"),
        ({"horizon": 0}, ValueError, "horizon is 0, expected a positive integer"),
        ({"horizon": 2.0}, ValueError, "horizon is 2.0, expected a positive integer"),
        ({"horizon": 3, "credit_span": "sequence"}, ValueError, "horizon is 3 with credit_span='sequence'"),
        (
            {"normalize_by_remaining": True, "credit_span": "sequence"},
            ValueError,
            "normalize_by_remaining is True with credit_span='sequence'",
        ),
        ({"importance_clip": 2.0}, ValueError, "importance_clip is 2.0 without behaviour_logprobs"),
        ({"behaviour_logprobs": torch.zeros(3)}, ValueError, "behaviour_logprobs has shape"),
        (
            {"teacher_ratio_clip": 0.0},
            ValueError,
            "teacher_ratio_clip is 0.0, expected a finite number above 0",
        ),
        ({"credit_clip": 0.0}, ValueError, "credit_clip is 0.0, expected a finite number above 0"),
        ({"baseline": "leave_one_out"}, ValueError, "group_size is None"),
        ({"baseline": "leave_one_out", "group_size": 2}, ValueError, "expected a multiple of group_size 2"),
        ({"group_size": 0}, ValueError, "group_size is 0, expected a positive integer"),
    ],
)  # fmt: skip
def test_distil_loss(changes, error, message):
    valid = arguments(tokens=torch.zeros(N, dtype=torch.int64), cu_seqlens=torch.tensor([0, 2, 5, 6]))
    fused_distil_loss(**valid)
    with pytest.raises(error, match=message):
        fused_distil_loss(**{**valid, **changes})
