"""The training loop, top to bottom.

    for each batch of problems
        rollouts = sample(student)                          rollouts_per_prompt completions each, here or by a server
        feedback = verify(rollout)                          a score, and the expert's correction
        hidden   = student(prompt + rollout), teacher(prompt + correction + rollout)
        loss     = fused_distil_loss(...)                   whole vocabulary, sequence-level gradient
        one optimiser step, or several; the ema teacher follows each

Several processes share each batch out (`processes`); the main one writes and prints. Everything random in a step comes
from torch's global generator, one stream per process, and the data position, so that a resumed run repeats an
uninterrupted one. Ctrl-C finishes the step; a second one stops at once, at the last checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from rich.console import Console
from torch.optim.lr_scheduler import LambdaLR

from distil_kernels.train.baseline import PositionAverage
from distil_kernels.train.batches import Batches, Sample, answered, figures, rollout_records, sampled_logprobs, unique
from distil_kernels.train.config import Config
from distil_kernels.train.diagnostics import held_out_logprob, reward_alignment
from distil_kernels.train.diagnostics.token_table import token_columns
from distil_kernels.train.evaluate import Evaluation, Evaluator
from distil_kernels.train.feedback.kinds import Prompts, verifier
from distil_kernels.train.feedback.self_evaluation import Critic
from distil_kernels.train.feedback.siblings import Say, as_verified, from_siblings
from distil_kernels.train.models import loading
from distil_kernels.train.models.activation_checkpointing import checkpoint_layers
from distil_kernels.train.models.lora import with_adapters
from distil_kernels.train.models.reading import reader
from distil_kernels.train.models.sharding import (
    full_tensor,
    shard,
    split_sharded,
    unsharded,
    unsharded_heads,
)
from distil_kernels.train.models.state import load_optimizer_state, model_state, optimizer_state
from distil_kernels.train.objective import Kept, Sums, distil_loss, means, policy_loss
from distil_kernels.train.report import console
from distil_kernels.train.report.chart import charts, plot
from distil_kernels.train.rollouts.python_tool import Python, Rollouts, roll_out
from distil_kernels.train.rollouts.sampling import Draw, Sampling, sample
from distil_kernels.train.rollouts.vllm_server import RolloutServer
from distil_kernels.train.run import checkpoint, trackers
from distil_kernels.train.run.accelerator import check_backend, make_accelerator
from distil_kernels.train.run.directory import drop_after, last_evaluation, remove_leftovers, write_text
from distil_kernels.train.run.distributed import Processes
from distil_kernels.train.run.interrupt import Interrupt
from distil_kernels.train.run.log import RunLog
from distil_kernels.train.tasks import answered_problems, held_out_problems, make_task
from distil_kernels.train.teachers.local import Teacher, other_model
from distil_kernels.train.teachers.remote import RemoteTeacher

MOST_LOST = 5
"""Steps in a row with a gradient that is not finite, after which the run stops."""


class Trainer:
    """Everything of one run. `directory` is its own and made before `run`; the main process's counts."""

    def __init__(self, config: Config, directory: Path, console: Console) -> None:
        self.config, self.console = config, console
        self.accelerator = make_accelerator(config, directory)
        self.processes = Processes.of(self.accelerator, config)
        self.directory = self.processes.from_main(directory)
        self.task, self.verify = make_task(config.task, config.seed), verifier(config.feedback)
        check_backend(config.backend, self.accelerator)
        set_seed(config.seed)
        model, self.tokenizer = loading.load(config.model)
        loading.use_flash_attention(model, self.accelerator.device, self.accelerator.mixed_precision)
        # A checkpoint of adapters, and one without its frozen teacher, says nothing of the weights it started from.
        self.start = checkpoint.fingerprint(model) if config.teacher == "frozen" or config.lora_rank else []
        if config.lora_rank:
            model = with_adapters(model, config.lora_rank, config.lora_alpha, config.lora_targets)
        is_sharded = config.shard and self.processes.count > 1
        other = other_model(config, model, self.tokenizer, self.accelerator, is_sharded)
        self.start += checkpoint.fingerprint(other) if config.teacher == "local" else []
        if is_sharded:
            shard([own for own in (model, other) if own], self.accelerator)
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        decay = config.weight_decay
        optimizer = torch.optim.AdamW(self.trained, lr=config.learning_rate, weight_decay=decay, fused=True)
        self.scheduler = LambdaLR(optimizer, config.rate_share)  # accelerate's takes a step for every process
        # evaluation_mode: placed and set for autocast, not wrapped in DistributedDataParallel.
        self.model = self.accelerator.prepare_model(model, evaluation_mode=True)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        # autocast: the prepared model's own forward has it, and flash-attn's kernels need it.
        with unsharded(model), self.accelerator.autocast():
            parts = split_sharded(self.accelerator.unwrap_model(self.model))
            self.student = reader(parts, config.reading, config.gradient_checkpointing, is_sharded)
        head = self.student.weight
        self.teacher: Teacher | RemoteTeacher
        if config.teacher_url:
            self.teacher = RemoteTeacher(config, self.tokenizer, head.shape[0], head.device)
        else:
            with self.accelerator.autocast():
                self.teacher = Teacher(self.student, config.teacher, config.ema_rate, other, config.reading)
        if config.gradient_checkpointing:
            checkpoint_layers(self.student.model)
        self.tool = None
        if config.tools == "python":
            self.tool = Python(self.tokenizer, config.max_tool_calls, config.max_tool_tokens)
        longest = config.max_new_tokens + (self.tool.longest if self.tool else 0)
        judging = config.max_critique_tokens if config.feedback == "self_evaluation" else 0
        for own in (model, other) if other else (model,):
            loading.check_positions(own, config.max_prompt_tokens, max(longest, judging))
        self.server = RolloutServer(config, longest, self.directory, self.processes) if config.rollout_url else None
        self.average = PositionAverage(longest, config.baseline_rate, head.device, self.processes)

        worked = answered_problems(self.task, config.num_examples)
        examples = [(problem, self.verify(self.task, problem, problem.answer)) for problem in worked]
        self.prompts = Prompts(
            self.tokenizer, examples, config.layout, config.teacher_reads, config.max_prompt_tokens,
            loading.end_ids(model, self.tokenizer), self.tool is not None, config.chat_options(),
        )  # fmt: skip
        keys = {problem.key for problem in worked}
        self.next_batch = Batches(self.task, self.verify, self.prompts, keys, config.prompts_per_step, self.processes)
        self.say: Say = from_siblings if config.feedback == "siblings" else as_verified
        if config.feedback == "self_evaluation":
            self.say = Critic(self.prompts, config.max_critique_tokens)
        self.sampling = Sampling(
            config.max_new_tokens, self.prompts.stop_ids(), config.temperature, config.top_p, config.top_k
        )
        own_distribution = Sampling(config.max_new_tokens, self.sampling.stop_ids, config.temperature)
        held_out_task = make_task(config.task, config.eval_seed)
        held_out = held_out_problems(held_out_task, config.eval_problems)
        self.evaluate = Evaluator(
            held_out_task, self.verify, self.say, self.prompts, held_out, own_distribution, config.eval_samples,
            config.eval_seed, self.tool, self.processes, config.teacher_temperature,
        )  # fmt: skip
        self.step = 0
        self.lost = 0  # last steps in a row with a gradient that was not finite
        self.evaluated = self.saved = -1  # step of the last evaluation, of the last checkpoint
        self.log = RunLog(config, self.directory, console, self.accelerator)
        if len(worked) < config.num_examples:
            shown = f"{len(worked)} of {config.num_examples} worked examples"
            self.log.print(f"note: {shown}: no other problem comes with an answer")
        if not self.processes.is_main:  # the model, with new adapters, is the same; what is sampled from it is not
            set_seed(self.processes.seed(config.seed))

    # One step.

    def roll_out(self, batch: Sequence[Sample], draw: Draw | None = None) -> None:
        """Samples completions (`draw` does, or the student), verifies them, and builds the teacher's prompts."""
        group = self.config.rollouts_per_prompt
        rows = [row for row in range(len(batch)) for _ in range(group)]
        prompts = [entry.prompt for entry in batch]
        done = roll_out(draw or partial(sample, self.student), prompts, rows, self.sampling, self.tool)
        self.answered(batch, [done.part(slice(first, first + group)) for first in range(0, len(rows), group)])

    def answered(self, batch: Sequence[Sample], rollouts: Sequence[Rollouts]) -> None:
        answered(self.student, self.task, self.verify, self.say, self.prompts, batch, rollouts)

    def micro_batch(
        self, batch: Sequence[Sample], normalizer: float, seconds: dict[str, float], kept: Kept | None = None
    ) -> tuple[torch.Tensor, Sums]:
        """Forward and backward of some of the batch's problems, added to the gradients.

        `kept` is the same object in each update on these problems.
        """
        group = self.config.rollouts_per_prompt
        completions = [done for entry in batch for done in entry.completions]
        counts = [row for entry in batch for row in entry.counts]
        rows = [row for row in range(len(batch)) for _ in range(group)]
        config, kept = self.config, kept or Kept()
        taught, is_fresh = kept.taught, kept.first is None
        with self.accelerator.autocast():
            if config.objective != "policy_gradient" and taught is None:
                texts, text_rows = unique([prompt for entry in batch for prompt in entry.teacher_prompts])
                with _timed(seconds, "teacher"), unsharded(*self.teacher.models):
                    taught = self.teacher.at_states(texts, text_rows, completions, counts)
                kept.taught = taught if config.updates_per_batch > 1 and not self.teacher.moves else None
            with _timed(seconds, "student"):
                hidden = self.student.states([entry.prompt for entry in batch], rows, completions)
                hidden = hidden.to(self.student.weight.dtype)
            with _timed(seconds, "loss"):
                if taught is None:
                    scores = [feedback.score for entry in batch for feedback in entry.feedback]
                    written = [row for entry in batch for row in entry.written]
                    loss, sums = policy_loss(
                        self.student, hidden, completions, scores, config, normalizer, written, kept
                    )
                else:
                    loss, sums = distil_loss(
                        self.student, hidden, self.teacher, taught, completions, config, self.average, normalizer,
                        counts, kept,
                    )  # fmt: skip
                    if is_fresh and config.alignment_every and (self.step + 1) % config.alignment_every == 0:
                        scores = [feedback.score for entry in batch for feedback in entry.feedback]
                        found = reward_alignment.inner_products(
                            self.student, hidden, self.teacher, taught, completions, scores, config, self.average,
                            counts,
                        )  # fmt: skip
                        sums = sums._replace(inner_products=found)
        with _timed(seconds, "backward"):
            self.accelerator.backward(loss)
        return loss.detach(), sums

    def update(
        self, parts: Sequence[tuple[Sequence[Sample], Kept]], normalizer: float, seconds: dict[str, float]
    ) -> tuple[list[tuple[torch.Tensor, Sums]], float]:
        """One optimiser step on all of a batch: losses and sums of its micro-batches, and the gradient's norm.

        Where that is not finite, in all processes alike, no step is taken.
        """
        with unsharded_heads(*self.teacher.models):
            found = [self.micro_batch(batch, normalizer, seconds, kept) for batch, kept in parts]
        with _timed(seconds, "exchange"):  # and waiting for the others
            self.processes.sum_gradients(self.trained)
        with _timed(seconds, "optimizer"):
            grad_norm = float(full_tensor(self.accelerator.clip_grad_norm_(self.trained, self.config.max_grad_norm)))
            if math.isfinite(grad_norm):
                self.optimizer.step()
                self.teacher.follow()
            self.optimizer.zero_grad()
        return found, grad_norm

    def train_step(self) -> dict[str, Any]:
        """One batch of rollouts and its updates, of which the first is recorded.

        Returns the record of metrics.jsonl, the same in all processes but for times.
        """
        seconds: dict[str, float] = {}
        began = time.perf_counter()
        batch = self.next_batch()
        own = self.processes.share(batch)
        draw = None
        if self.server:
            with _timed(seconds, "weights"):
                draw = self.server.with_weights(self.student.model)
        with _timed(seconds, "rollout"), self.accelerator.autocast(), unsharded(self.student.model):
            self.roll_out(own, draw)
        normalizer = float(len(batch) * self.config.rollouts_per_prompt)
        size = self.config.micro_batch_prompts or len(own)
        micro_batches = [own[begin : begin + size] for begin in range(0, len(own), size)]
        parts = [(part, Kept(sampled_logprobs(part, self.student.weight.device))) for part in micro_batches]
        held_out = self._right_logprob(seconds)
        updates = [self.update(parts, normalizer, seconds) for _ in range(self.config.updates_per_batch)]
        (found, grad_norm), (last, _) = updates[0], updates[-1]
        num_lost = sum(not math.isfinite(norm) for _, norm in updates)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step()
        if math.isfinite(grad_norm):
            self.average.follow()
        else:
            self.average.forget()
        changed = held_out_logprob.figures(held_out, self._right_logprob(seconds))
        self.step += 1
        self.lost = self.lost + 1 if num_lost else 0
        with _timed(seconds, "exchange"):
            batch = self.processes.gather(own)
            sums, last_sums = (self.processes.gather([part.on_cpu() for _, part in each]) for each in (found, last))
            losses = self.processes.gather([float(loss) for loss, _ in found])
        num_tokens = sum(sum(written) for entry in batch for written in entry.written)
        elapsed = time.perf_counter() - began
        record = {
            "kind": "step",
            "step": self.step,
            "loss": sum(losses),
            **figures(batch, self.prompts, self.sampling.stop_ids, [s.sequence_teacher_logprob for s in sums]),
            **means(last_sums),  # has the drift beside what the first update has
            **means(sums),
            **reward_alignment.figures([part.inner_products for part in sums]),
            **changed,
            "length": num_tokens / normalizer,
            "grad_norm": grad_norm,
            "not_finite": num_lost,
            "learning_rate": learning_rate,
            "skipped": self.next_batch.skipped,
            "tokens_per_second": num_tokens / elapsed,
            "seconds": elapsed,
            **{f"seconds_{phase}": spent for phase, spent in seconds.items()},
        }
        if num_lost and not any(record.get("not_finite") for record in self.log.records):
            self.log.print(f"warning: the gradient of step {self.step} is not finite: it is left out (not_finite)")
        self.log.add(record, rollout_records("training", self.step, batch, self.prompts))
        if self.lost == MOST_LOST:
            raise self._diverged(f"the gradient of {MOST_LOST} steps in a row was not finite")
        return record

    def _diverged(self, what: str) -> FloatingPointError:
        return FloatingPointError(
            f"stopped at step {self.step}: {what}; a lower learning_rate or max_grad_norm may cure it, and "
            f"{self.directory} has the checkpoints before it"
        )

    def _right_logprob(self, seconds: dict[str, float]) -> float | None:
        """Of held-out problems' right answers, now; None where this step's change is not asked for."""
        if not self.config.held_out_every or (self.step + 1) % self.config.held_out_every:
            return None
        with _timed(seconds, "held_out"), self.accelerator.autocast(), unsharded(self.student.model):
            return held_out_logprob.right_logprob(
                self.student, self.evaluate.student_prompts, self.prompts, self.config
            )

    # The run.

    def run(self) -> bool:
        """Trains to `config.steps`. Returns whether it got there; the directory is complete either way."""
        config = self.config
        for remark in config.remarks():
            self.log.print(f"note: {remark}")
        trackers.start(self.accelerator, config, self.directory)
        with Interrupt(self.console) as interrupt, console.progress_bar(self.console) as bar:
            shown = bar.add_task(config.task, total=config.steps, completed=self.step, rate="")
            while True:
                if self._evaluation_is_due():
                    self._evaluate(interrupt)
                done = self.step >= config.steps or self.processes.any(interrupt.requested)
                every = config.checkpoint_every
                if done or (self.step and every and self.step % every == 0 and not self.lost):
                    self.save()
                if done:
                    break
                record = self.train_step()
                bar.update(shown, completed=self.step, rate=f"{record['seconds']:.1f} s/step")
                self.console.print(console.step_line(record), highlight=False)
            if self.processes.is_main:
                about = f"{config.task}, {config.objective}, {config.teacher} teacher"
                write_text(self.directory / "plot.svg", plot(charts(self.log.records), about))
        self.accelerator.end_training()
        evaluations = [record for record in self.log.records if record["kind"] == "evaluation"]
        if evaluations:
            self.console.print(console.final_table(evaluations))
        self.console.print(f"run directory: {self.directory}", highlight=False)
        return self.step >= config.steps

    def _evaluation_is_due(self) -> bool:
        every = self.config.eval_every
        due = self.step in (0, self.config.steps) or (every > 0 and self.step % every == 0)
        return due and self.evaluated < self.step

    def _evaluate(self, interrupt: Interrupt) -> None:
        began = time.perf_counter()
        with self.accelerator.autocast(), unsharded(self.student.model, *self.teacher.models):
            result: Evaluation | None = self.evaluate(self.student, self.teacher, lambda: interrupt.requested)
            seconds = time.perf_counter() - began
            shown = self._samples() if result is not None and self.processes.is_main else []
        if result is not None:
            self.log.add({"kind": "evaluation", "step": self.step, **asdict(result), "seconds": seconds}, shown)
            self.evaluated = self.step
            self.console.print(console.evaluation_line(self.step, result), style="bold", highlight=False)

    def _samples(self) -> list[dict[str, Any]]:
        """Records of held-out problems answered as in training, with what every token costs."""
        shown = self.evaluate.student_prompts[: self.config.eval_rollouts]
        batch = [Sample(problem, prompt) for problem, prompt in shown]
        if not batch:
            return []
        with self.evaluate.own_draws(self.student):
            self.roll_out(batch)
            columns = token_columns(self.student, self.teacher, batch, self.tokenizer, self.config, self.average)
        return rollout_records("sample", self.step, batch, self.prompts, columns)

    @property
    def _stateful(self) -> dict[str, Any]:
        """What a checkpoint has beside model and optimizer."""
        return {
            "scheduler": self.scheduler, "teacher": self.teacher, "baseline": self.average, "problems": self.next_batch,
        }  # fmt: skip

    def save(self) -> None:
        """Writes a checkpoint, unless the last one is of this step.

        Raises:
            FloatingPointError: a weight is not finite.
        """
        if self.saved == self.step:
            return
        if self.processes.any(not checkpoint.are_finite(self.trained)):
            raise self._diverged("the weights are not finite")
        main, model = self.processes.is_main, self.student.model
        weights = model_state(model)
        state = {
            "step": self.step, "start": self.start, "optimizer": optimizer_state(model, self.optimizer.optimizer),
            **{name: part.state_dict() for name, part in self._stateful.items()},
            "generators": self.processes.gather([checkpoint.generator_states()]),
        }  # fmt: skip
        if main:
            kept = self.config.keep_checkpoints
            checkpoint.save(self.directory, self.step, model, self.tokenizer, state, kept, weights)
        self.saved = self.step

    def resume(self) -> None:
        """Takes up the run directory's last checkpoint, or its beginning, and drops the records after it.

        Raises:
            ValueError: the run had another number of processes, or `load` refuses the checkpoint.
        """
        main = self.processes.is_main
        if main:
            remove_leftovers(self.directory)
        path = self.processes.from_main(checkpoint.newest_undamaged(self.directory, self.log.print) if main else None)
        if path is None:
            self.log.print(f"{self.directory} has no checkpoint yet: starting from step 0")
        else:
            generators = self.load(path)
            if len(generators) != self.processes.count:
                raise ValueError(
                    f"[resume] the run has {len(generators)} streams of random numbers, one for each process: expected "
                    f"{len(generators)} processes, got {self.processes.count}"
                )
            checkpoint.restore_generators(generators[self.processes.index])
            if main:
                checkpoint.link_to(path)
            self.log.print(f"resuming from {path}")
        # Without a checkpoint `saved` is -1 and nothing is kept.
        kept = drop_after(self.directory, self.saved) if main else []
        self.log.records = self.processes.from_main(kept)
        self.evaluated = last_evaluation(self.log.records)

    def load(self, path: Path) -> list[dict[str, Any]]:
        """Takes up a checkpoint directory but for its generators' states, which it returns, and changes no file."""
        state = self.load_models(path)
        load_optimizer_state(self.student.model, self.optimizer.optimizer, state["optimizer"])
        for name, part in self._stateful.items():
            part.load_state_dict(state[name])
        for group in self.optimizer.param_groups:  # by the schedule that --steps makes, which may be another
            group["lr"] = self.config.learning_rate * self.config.rate_share(self.step)
        self.saved = self.step
        return state["generators"]

    def load_models(self, path: Path) -> dict[str, Any]:
        """Takes up a checkpoint's student, teacher and step, and returns its state.

        Raises:
            ValueError: a model that teaches, or that adapters change, is not the same any more.
        """
        state = checkpoint.load_state(path)
        if state["start"] != self.start:
            raise ValueError(
                f"[resume] {self.config.teacher_model or self.config.model} has other weights than when the run "
                f"started, and a {self.config.teacher} teacher or adapters are made for them: expected the same model"
            )
        loading.restore(self.student.model, path)
        self.teacher.load_state_dict(state["teacher"])
        self.step = state["step"]
        return state


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - began
