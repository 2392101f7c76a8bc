"""DistILTrainer: TRL's SDPO with DistIL's loss, a cost to the teacher credited back to the tokens that led to it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import Any, Literal

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # of the import below; DistIL's users know by its name

import torch
from torch import Tensor
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from distil_kernels import DistilLoss, fused_distil_loss
from distil_kernels.integrations.trl import methods
from distil_kernels.integrations.trl.switch import SDPO_FUNCTIONS, Replaced
from distil_kernels.integrations.trl.unformed_logits import UnformedLogits

LOSS_OPTIONS = (
    "cost", "jsd_weight", "credit_span", "discount", "horizon", "normalize_by_remaining", "baseline",
    "teacher_ratio_clip", "credit_clip", "credit_scale",
)  # fmt: skip
"""Fields of DistILConfig that are arguments of `fused_distil_loss`."""
OF_ANOTHER_LOSS = (
    "distillation_mode", "distillation_alpha", "distillation_topk", "distillation_add_tail", "use_teacher_server"
)  # fmt: skip
"""Fields of SDPOConfig that choose a loss."""


@dataclass
class DistILConfig(SDPOConfig):
    """Options of DistILTrainer: SDPO's rollouts, feedback, teachers and rewards, and the arguments of the loss.

    The loss has the names and meanings of `distil_kernels.fused_distil_loss`, and the defaults of
    `python -m distil_kernels.train`. What chooses another loss in SDPO stays at its default: `distillation_mode`,
    `distillation_alpha`, `distillation_topk`, `distillation_add_tail`, `use_teacher_server`. `distillation_is_clip`
    bounds the importance ratio where rollouts are older than the student.
    """

    distillation_mode: Literal["sampled_token", "full_logits", "topk_logits"] = field(
        default="full_logits", metadata={"help": "Not used: DistIL compares whole distributions."}
    )
    cost: str = field(
        default="kl", metadata={"help": "What a token costs: 'kl' or 'ce' to the teacher, 'reverse_kl' or 'jsd'."}
    )
    jsd_weight: float = field(default=0.5, metadata={"help": "The teacher's share of the mixture of cost 'jsd'."})
    credit_span: str = field(
        default="future",
        metadata={
            "help": "Which costs a token answers for: 'future', 'sequence' (exact where the feedback was computed from "
            "the rollout; with discount 1) or 'none', the token-wise gradient."
        },
    )
    discount: float = field(default=0.9, metadata={"help": "Weight of a cost one token later; below 1 is biased."})
    horizon: int | None = field(
        default=None, metadata={"help": "Costs more than this many tokens later do not count; biased."}
    )
    normalize_by_remaining: bool = field(
        default=False, metadata={"help": "Divide the cost to come by the number of tokens to come; biased."}
    )
    baseline: str | None = field(
        default="leave_one_out",
        metadata={
            "help": "What is subtracted from the cost to come: 'leave_one_out' over a prompt's other rollouts, "
            "'position_mean' over the batch's, or None."
        },
    )
    teacher_ratio_clip: float | None = field(
        default=1.0,
        metadata={
            "help": "The credit is multiplied by the token's probability under teacher over student, at most this; "
            "None multiplies by 1. Biased: an end that the teacher rules out gains nothing by the costs that it saves."
        },
    )
    credit_clip: float | None = field(default=0.25, metadata={"help": "Bound of a token's credit; biased."})
    credit_scale: float = field(default=1.0, metadata={"help": "Factor on the credit; 1 is the exact gradient."})

    def __post_init__(self) -> None:
        super().__post_init__()
        defaults = {option.name: option.default for option in fields(self)}
        for name in OF_ANOTHER_LOSS:
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"[DistILConfig] {name} is {getattr(self, name)!r}, expected its default {defaults[name]!r}: the "
                    "loss is to the whole distribution of a teacher in this process, chosen by cost and jsd_weight"
                )
        if self.baseline == "leave_one_out" and self.credit_span != "none":
            for name, group in (("train", self.num_generations), ("eval", self.num_generations_eval)):
                batch = getattr(self, f"per_device_{name}_batch_size")
                if group is not None and batch % group:
                    raise ValueError(
                        f"[DistILConfig] per_device_{name}_batch_size is {batch}, expected a multiple of the "
                        f"{group} rollouts of a prompt: baseline 'leave_one_out' compares them (or choose "
                        "'position_mean' or None)"
                    )
        # The op checks its arguments: on two tokens, before any work.
        rows, head = torch.zeros(2, 1), torch.zeros(2, 1)
        borders = torch.tensor([0, 1, 2])
        fused_distil_loss(
            rows, head, rows, head, tokens=torch.zeros(2, dtype=torch.int64), cu_seqlens=borders, group_size=2,
            **self.loss_options(),
        )  # fmt: skip

    def loss_options(self) -> dict[str, Any]:
        """Returns the arguments of `fused_distil_loss` that are set here."""
        options = {name: getattr(self, name) for name in LOSS_OPTIONS}
        return options | {"baseline": None} if self.credit_span == "none" else options


class DistILTrainer(SDPOTrainer):
    """SDPO's rollouts, feedback and teachers with DistIL's sequence-level loss; rewards by `distillation_weight`.

    A rollout costs the sum over its tokens, and the loss is the mean over rollouts (SDPO: the mean over a rollout's
    tokens), so its gradient is that of the expected cost of a rollout. No logits [B, T, V] are formed. The arguments
    are those of `SDPOTrainer`, with a `DistILConfig`.
    """

    _tag_names = ["trl", "distil"]  # noqa: RUF012 as its parents have them
    _name = "DistIL"
    _paper = {  # noqa: RUF012
        "title": "Reinforcement Learning from Rich Feedback with Distributional DAgger",
        "id": "2606.05152",
        "citation": (
            "@article{agrawal2026distil,\n"
            "    title  = {Reinforcement Learning from Rich Feedback with Distributional DAgger},\n"
            "    author = {Rishabh Agrawal and Jacob Fein-Ashley and Paria Rashidinejad},\n"
            "    year   = 2026,\n"
            "    eprint = {arXiv:2606.05152},\n"
            "}"
        ),
    }

    _forward_logits = methods.forward_logits(SDPOTrainer._forward_logits)
    compute_loss = methods.self_distillation(SDPOTrainer.compute_loss)

    args: DistILConfig
    _forms_logits_because: str | None = None

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *others: Any, **named: Any) -> None:
        if not isinstance(args, DistILConfig):
            raise TypeError(f"[DistILTrainer] args is {type(args).__name__}, expected a DistILConfig")
        super().__init__(model, reward_funcs, args, *others, **named)

    def _compute_policy_loss(self, inputs: dict[str, Any], student_logits: Any) -> Tensor:
        with Replaced(SDPO_FUNCTIONS):
            return super()._compute_policy_loss(inputs, student_logits)

    def _compute_rollout_logps(self, *tensors: Tensor, **named: Tensor) -> Tensor | None:
        with Replaced(SDPO_FUNCTIONS):
            return super()._compute_rollout_logps(*tensors, **named)

    def _compute_self_distillation_loss(self, model: Any, inputs: dict[str, Any], distillation_logits: Any) -> Tensor:
        student, teacher = distillation_logits.student_logits, distillation_logits.teacher_logits
        if not isinstance(student, UnformedLogits):
            raise ValueError(f"[DistILTrainer] {type(self.model).__name__} {self._forms_logits_because}")

        # Pack the completions; those without feedback stay in their place and count nothing.
        present = distillation_logits.completion_mask != 0
        counted = (distillation_logits.loss_mask != 0)[present]
        behaviour = inputs.get("old_per_token_logps")
        lengths = present.sum(1).cpu()
        mode = "train" if model.training else "eval"
        result = fused_distil_loss(
            student.hidden[present], student.weight, teacher.hidden[present], teacher.weight,
            tokens=distillation_logits.completion_ids[present],
            cu_seqlens=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
            token_mask=counted,
            behaviour_logprobs=None if behaviour is None else behaviour[present].float(),
            importance_clip=None if behaviour is None else self.args.distillation_is_clip,
            group_size=self.num_generations if mode == "train" else self.num_generations_eval,
            **student.student_options(), **teacher.teacher_options(), **self.args.loss_options(),
        )  # fmt: skip
        self._record(mode, result, counted.sum())
        return result.loss

    def _record(self, mode: str, result: DistilLoss, num_counted: Tensor) -> None:
        """Logs means over the tokens of all processes that count."""
        stats = result.stats
        sums = {
            "cost": result.cost,
            "kl": stats.kl,
            "reverse_kl": stats.reverse_kl,
            "entropy": stats.entropy,
            "teacher_entropy": stats.teacher_entropy,
            "agree": stats.agree,
            "abs_credit": result.credit.abs(),
        }
        local = torch.stack([num_counted.double(), *(value.double().sum() for value in sums.values())])
        count, *totals = self.accelerator.gather(local[None]).sum(0).tolist()
        means = {name: total / max(count, 1.0) for name, total in zip(sums, totals, strict=True)}
        self._log_self_distillation_metric(mode, means["cost"])
        for name, mean in means.items():
            self._metrics[mode][f"distil/{name}"].append(mean)
