"""A step of each trainer of `trainers.py`: this one, and adapters of those it is compared with.

A trainer runs in a process of its own (`work_through`) and waits before each step until the parent lets it go on, so
that trainers take turns. What it computes is given as token ids (`Work`), so that nothing depends on templates.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from timing import reset_high_water, resident_bytes

from distil_kernels.train.config import Config


@dataclass(frozen=True)
class Peer:
    """A trainer of TRL as it is timed."""

    trainer: str
    """SDPO, Distillation, GKD, or DistIL (ours, on SDPO's rollouts)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of its configuration, by name."""
    switched: bool = False
    """Whether `apply_distil_kernels_to_trl` takes the logits out of it."""


_FULL = {"distillation_mode": "full_logits"}
TRAINERS: dict[str, Peer | None] = {
    "ours": None,
    "trl full_logits": Peer("SDPO", _FULL),
    "trl full_logits, switched": Peer("SDPO", _FULL, switched=True),
    "trl sampled_token": Peer("SDPO", {"distillation_mode": "sampled_token"}),
    "trl DistIL": Peer("DistIL", {"cost": "reverse_kl"}),
    "trl distillation": Peer("Distillation", {"beta": 0.5}),
    "trl distillation, switched": Peer("Distillation", {"beta": 0.5}, switched=True),
    "trl GKD": Peer("GKD", {"beta": 0.5, "lmbda": 1.0}),
    "trl GKD, switched": Peer("GKD", {"beta": 0.5, "lmbda": 1.0}, switched=True),
}
"""Ours, and TRL's. full_logits is SDPO's whole vocabulary, sampled_token its default. The teacher of Distillation and
GKD is another model, which reads the student's prompt."""


@dataclass(frozen=True)
class Work:
    """What all trainers do."""

    config: Config
    prompts: list[list[int]]
    """prompts_per_step for each step."""
    teacher_prompts: list[list[int]]
    answers: list[str]
    stop_ids: list[int]
    threads: int

    @property
    def steps(self) -> int:
        return len(self.prompts) // self.config.prompts_per_step

    def repeated_prompts(self) -> list[list[int]]:
        """Returns each prompt as many times as it has rollouts, in the order of the steps."""
        return [prompt for prompt in self.prompts for _ in range(self.config.rollouts_per_prompt)]

    @staticmethod
    def of(config: Config, steps: int, endless: bool, threads: int) -> Work:
        """Our trainer's batches; `endless` completions run to the limit of their length."""
        from distil_kernels.train.build import build

        parts = build(config, Path())
        tutor = parts.data.tutor
        groups = [group for _ in range(steps) for group in next(parts.data.batches)]
        # The teacher reads a correction, which does not depend on the rollout.
        teacher_prompts = [
            tutor.prompts.teacher(group.problem, tutor.verifier(tutor.task, group.problem, "")) for group in groups
        ]
        stop_ids = [parts.models.student.weight.shape[0]] if endless else list(parts.data.sampling.stop_ids)
        answers = [group.problem.answer for group in groups]
        return Work(config, [group.prompt for group in groups], teacher_prompts, answers, stop_ids, threads)


class Gate:
    """A trainer's side of a step: waits for the order, and answers with what the step took."""

    def __init__(self, pipe: Connection, seed: int) -> None:
        self._pipe, self._seed, self._step = pipe, seed, 0

    def begin(self) -> None:
        self._pipe.recv()
        reset_high_water()
        self._held = resident_bytes("VmRSS")
        torch.manual_seed(self._seed + self._step)
        self._step += 1
        self._began = time.perf_counter()

    def rolled_out(self, completions: list[list[int]]) -> None:
        self._rollout = {
            "rollout": time.perf_counter() - self._began,
            "rollout_peak": resident_bytes("VmHWM") - self._held,
            "completions": completions,
        }
        reset_high_water(trim=False)

    def end(self, **results: float) -> None:
        seconds, peak = time.perf_counter() - self._began, resident_bytes("VmHWM") - self._held
        self._pipe.send({"seconds": seconds, "held": self._held, "update_peak": peak, **self._rollout, **results})


def work_through(name: str, work: Work, pipe: Connection) -> None:
    """A trainer's process."""
    torch.set_num_threads(work.threads)
    warnings.simplefilter("ignore")
    gate = Gate(pipe, work.config.seed)
    with tempfile.TemporaryDirectory(prefix="distil_bench_") as folder:
        peer = TRAINERS[name]
        if peer is None:
            _ours(work, gate, Path(folder))
        else:
            _trl(peer, work, gate, Path(folder))


def _ours(work: Work, gate: Gate, folder: Path) -> None:
    from rich.console import Console

    from distil_kernels.train.build import build
    from distil_kernels.train.trainer import Trainer

    class Ours(Trainer):
        def roll_out(self, groups: Any, *rest: Any) -> None:
            super().roll_out(groups, *rest)
            gate.rolled_out([rollout.tokens for group in groups for rollout in group.rollouts])

    trainer = Ours(work.config, build(work.config, folder), Console(quiet=True))
    trainer.sampling = dataclasses.replace(trainer.sampling, stop_ids=work.stop_ids)
    for _ in range(work.steps):
        gate.begin()
        record = trainer.train_step()
        gate.end(kl=record["reverse_kl"], grad_norm=record["grad_norm"])


def _trl(peer: Peer, work: Work, gate: Gate, folder: Path) -> None:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from transformers import PrinterCallback, TrainerCallback

    from distil_kernels.integrations.trl import apply_distil_kernels_to_trl

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate.begin()

        def on_log(self, _arguments: Any, _state: Any, _control: Any, logs: dict[str, float], **_: Any) -> None:
            if "grad_norm" in logs:  # the last one is of the whole run
                loss = logs.get("self_distillation/distillation_loss", logs["loss"])
                gate.end(kl=loss, grad_norm=logs["grad_norm"])

    if peer.switched:
        apply_distil_kernels_to_trl()
    config = work.config
    options = dict(
        peer.options,
        per_device_train_batch_size=config.prompts_per_step * config.rollouts_per_prompt,
        temperature=config.temperature,
        max_steps=work.steps,
        optim="adamw_torch_fused",
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=config.gradient_checkpointing,
        bf16=config.precision == "bfloat16",
        use_cpu=True,
        dataloader_pin_memory=False,
        # A record for each step, as ours, and nothing else.
        output_dir=str(folder),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    make = {"SDPO": _sdpo, "DistIL": _sdpo, "Distillation": _distillation, "GKD": _gkd}[peer.trainer]
    trainer = make(peer, work, gate, options)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Steps())  # after the one that moves its teacher
    trainer.train()


def _sdpo(peer: Peer, work: Work, gate: Gate, options: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    trainer_class, config_class = SDPOTrainer, SDPOConfig
    if peer.trainer == "DistIL":
        from distil_kernels.integrations.trl import DistILConfig, DistILTrainer

        trainer_class, config_class = DistILTrainer, DistILConfig

    class Theirs(trainer_class):
        def _prepare_inputs(self, inputs: Any) -> Any:
            prepared = super()._prepare_inputs(inputs)
            gate.rolled_out(self._get_completion_ids_list(prepared))
            return prepared

    config = work.config
    arguments = config_class(
        **options,
        num_generations=config.rollouts_per_prompt,
        max_completion_length=config.max_new_tokens,
        max_prompt_length=config.max_prompt_tokens,
        shuffle_dataset=False,
        diagnostics_warning_interval=0,
        # Its teacher's prompt is what ours reads, and nothing else.
        teacher_model_kind=config.teacher,
        teacher_update_rate=config.ema_rate,
        include_environment_feedback=True,
        use_successful_as_teacher=False,
        reprompt_template="{feedback}",
        feedback_template="{feedback_raw}",
    )
    model, tokenizer = _load(config.model)
    columns = {
        "prompt": [_as_text(tokenizer, ids) for ids in work.prompts],
        "privileged_context": [_as_text(tokenizer, ids) for ids in work.teacher_prompts],
        "answer": work.answers,
    }
    trainer = Theirs(model, _reward, arguments, Dataset.from_dict(columns), processing_class=tokenizer)
    trainer.eos_token_ids = trainer.generation_config.eos_token_id = work.stop_ids
    return trainer


def _distillation(peer: Peer, work: Work, gate: Gate, options: dict[str, Any]) -> Any:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    class Theirs(DistillationTrainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            prepared = super()._prepare_inputs(inputs)
            rows = zip(prepared["completion_ids"], prepared["completion_mask"].bool(), strict=True)
            gate.rolled_out([ids[mask].tolist() for ids, mask in rows])
            return prepared

    model, tokenizer = _load(work.config.model)
    arguments = DistillationConfig(**options, max_completion_length=work.config.max_new_tokens, shuffle_dataset=False)
    prompts = [_as_text(tokenizer, ids) for ids in work.repeated_prompts()]
    trainer = Theirs(
        model, _other_teacher(work), arguments, Dataset.from_dict({"prompt": prompts}), processing_class=tokenizer
    )
    trainer.eos_token_ids = trainer.generation_config.eos_token_id = work.stop_ids
    return trainer


def _gkd(peer: Peer, work: Work, gate: Gate, options: dict[str, Any]) -> Any:
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    class Theirs(GKDTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset or self.train_dataset)

        @staticmethod
        def generate_on_policy_outputs(model: Any, inputs: Any, generation_config: Any) -> Any:
            outputs = GKDTrainer.generate_on_policy_outputs(model, inputs, generation_config)
            gate.rolled_out([ids[labels != -100].tolist() for ids, _, labels in zip(*outputs, strict=True)])
            return outputs

    model, tokenizer = _load(work.config.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def collate(records: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        padded = tokenizer.pad({"input_ids": [record["prompt"] for record in records]}, padding_side="left")
        ids, mask = (torch.tensor(padded[name]) for name in ("input_ids", "attention_mask"))
        # The text that its own sampling replaces is not there: lmbda is 1.
        return {"input_ids": ids, "attention_mask": mask, "labels": ids, "prompts": ids, "prompt_attention_mask": mask}

    trainer = Theirs(
        model=model, teacher_model=_other_teacher(work),
        args=GKDConfig(**options, max_new_tokens=work.config.max_new_tokens), data_collator=collate,
        train_dataset=Dataset.from_dict({"prompt": work.repeated_prompts()}), processing_class=tokenizer,
    )  # fmt: skip
    trainer.generation_config.eos_token_id = work.stop_ids
    return trainer


def _other_teacher(work: Work) -> Any:
    """The same model, but for its last norm: a teacher from which there is something to learn."""
    teacher, _ = _load(work.config.model)
    with torch.no_grad():
        teacher.base_model.norm.weight.mul_(0.9)
    return teacher


def _reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]


def _load(name: str) -> tuple[Any, Any]:
    """Model and tokenizer."""
    from distil_kernels.train.models import loading

    return loading.load(name)


def _as_text(tokenizer: Any, ids: list[int]) -> str:
    """TRL takes prompts as text."""
    text = tokenizer.decode(ids)
    if tokenizer(text).input_ids != ids:
        raise ValueError(f"[prompts] expected tokens that their text gives back, got {text!r}")
    return text
