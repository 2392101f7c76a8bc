"""Costs beside the forward cross-entropy, over the same rows and plans: what SDPO and OPSD minimise.

    fused_reverse_kl   KL(S || T)
    fused_jsd          b KL(T || M) + (1 - b) KL(S || M),  M = b T + (1 - b) S

The sequence-level forms are `fused_distil_loss` with cost "reverse_kl" and "jsd".
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack  # comes with torch

from distil_kernels.backends import Cost, Statistic
from distil_kernels.checks import Door
from distil_kernels.functional import LossOptions, token_loss


def fused_reverse_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None = None,
    **options: Unpack[LossOptions],
) -> Any:
    """Reverse KL divergence KL(S || T) of student and teacher.

    Where the teacher's logit is -inf and the student's is not, the value is huge (about 1e30 times the student's
    probability there) and finite.

    Arguments, options, what is returned and raised: as `fused_forward_ce`.
    """
    heads = student_hidden, student_weight, teacher_hidden, teacher_weight
    return token_loss("fused_reverse_kl", Cost(Statistic.REVERSE_KL), *heads, **options)


def fused_jsd(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None = None,
    *,
    jsd_weight: float = 0.5,
    **options: Unpack[LossOptions],
) -> Any:
    """Generalised Jensen-Shannon divergence b KL(T || M) + (1 - b) KL(S || M) with M = b T + (1 - b) S.

    Args:
        jsd_weight: b, above 0 and below 1. It goes to 0 with b (1 - b): the KL divergences are not its ends, they are
            `fused_forward_ce` (less the teacher's entropy) and `fused_reverse_kl`.
        Others, what is returned and raised: as `fused_forward_ce`.
    """
    Door("fused_jsd").share("jsd_weight", jsd_weight)
    heads = student_hidden, student_weight, teacher_hidden, teacher_weight
    return token_loss("fused_jsd", Cost(Statistic.JSD, jsd_weight), *heads, **options)
