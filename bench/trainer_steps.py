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
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from timing import reset_high_water, resident_bytes

from distil_kernels.train.build import build
from distil_kernels.train.config import Config
from distil_kernels.train.models import loading
from distil_kernels.train.trainer import Trainer

TRAINERS: dict[str, dict[str, Any]] = {
    "ours": {},
    "trl full_logits": {"distillation_mode": "full_logits"},
    "trl sampled_token": {"distillation_mode": "sampled_token"},
}
"""Options of TRL's SDPOConfig by name. full_logits is the whole vocabulary, sampled_token its default."""


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

    @staticmethod
    def of(config: Config, steps: int, endless: bool, threads: int) -> Work:
        """Our trainer's batches; `endless` completions run to the limit of their length."""
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
        if name == "ours":
            _ours(work, gate, Path(folder))
        else:
            _trl(TRAINERS[name], work, gate, Path(folder))


def _ours(work: Work, gate: Gate, folder: Path) -> None:
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


def _trl(options: dict[str, Any], work: Work, gate: Gate, folder: Path) -> None:
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

    class Theirs(SDPOTrainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            prepared = super()._prepare_inputs(inputs)
            gate.rolled_out(self._get_completion_ids_list(prepared))
            return prepared

    class Steps(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            gate.begin()

        def on_log(self, _arguments: Any, _state: Any, _control: Any, logs: dict[str, float], **_: Any) -> None:
            if "grad_norm" in logs:  # the last one is of the whole run
                gate.end(kl=logs["self_distillation/distillation_loss"], grad_norm=logs["grad_norm"])

    config = work.config
    arguments = SDPOConfig(
        **options,
        per_device_train_batch_size=config.prompts_per_step * config.rollouts_per_prompt,
        num_generations=config.rollouts_per_prompt,
        max_completion_length=config.max_new_tokens,
        max_prompt_length=config.max_prompt_tokens,
        temperature=config.temperature,
        shuffle_dataset=False,
        max_steps=work.steps,
        # Its teacher's prompt is what ours reads, and nothing else.
        teacher_model_kind=config.teacher,
        teacher_update_rate=config.ema_rate,
        include_environment_feedback=True,
        use_successful_as_teacher=False,
        reprompt_template="{feedback}",
        feedback_template="{feedback_raw}",
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
        diagnostics_warning_interval=0,
    )
    model, tokenizer = loading.load(config.model)
    columns = {
        "prompt": [_as_text(tokenizer, ids) for ids in work.prompts],
        "privileged_context": [_as_text(tokenizer, ids) for ids in work.teacher_prompts],
        "answer": work.answers,
    }
    trainer = Theirs(model, _reward, arguments, Dataset.from_dict(columns), processing_class=tokenizer)
    trainer.eos_token_ids = trainer.generation_config.eos_token_id = work.stop_ids
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Steps())  # after the one that moves its teacher
    trainer.train()


def _reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]


def _as_text(tokenizer: Any, ids: list[int]) -> str:
    """TRL takes prompts as text."""
    text = tokenizer.decode(ids)
    if tokenizer(text).input_ids != ids:
        raise ValueError(f"[prompts] expected tokens that their text gives back, got {text!r}")
    return text
