"""The training loop, top to bottom.

    for each batch of problems
        rollouts = sample(student)                          rollouts_per_prompt completions each, here or by a server,
                                                            or the data's own answers (rollouts none)
        feedback = verify(rollout)                          a score, and the expert's correction
        hidden   = student(prompt + rollout), teacher(prompt + correction + rollout)
        loss     = fused_distil_loss(...)                   whole vocabulary, sequence-level gradient
        one optimizer step, or several; the ema teacher follows each

Several processes share each batch out (`processes`); the main one writes and prints. Everything random in a step comes
from torch's global generator, one stream per process, and the data position, so that a resumed run repeats an
uninterrupted one. Ctrl-C, SIGTERM and SIGHUP finish the step; another Ctrl-C stops at once, at the last checkpoint. An
error in the middle of a step leaves a checkpoint of the step before it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from rich.console import Console

from distil_kernels.hf import CausalLM
from distil_kernels.train.baseline import PositionAverage
from distil_kernels.train.build import Parts
from distil_kernels.train.config import Config
from distil_kernels.train.diagnostics.held_out_logprob import change_metrics, held_out_logprob
from distil_kernels.train.diagnostics.reward_alignment import alignment_metrics, inner_products
from distil_kernels.train.diagnostics.token_table import token_columns
from distil_kernels.train.metrics import PhaseTimer, peak_memory, rollout_metrics, rollout_records, update_means
from distil_kernels.train.models.exchanged_rows import all_rows
from distil_kernels.train.models.sharding import head_in_shards, rows_exchanged
from distil_kernels.train.models.state import load_optimizer_state, model_state, optimizer_state
from distil_kernels.train.objective import Sums, UpdateState, distil_loss, policy_loss
from distil_kernels.train.optimizer import clip_gradients, make_optimizer, make_scheduler, rate_share
from distil_kernels.train.report import console as output
from distil_kernels.train.report.pages import Pages
from distil_kernels.train.rollouts.packed_batch import PackedBatch
from distil_kernels.train.rollouts.prompt_group import PromptGroup, Rollout
from distil_kernels.train.rollouts.sampling import Generate, generate
from distil_kernels.train.rollouts.vllm_server import RolloutServer
from distil_kernels.train.run import checkpoint, trackers
from distil_kernels.train.run.directory import WriteError, remove_leftovers
from distil_kernels.train.run.distributed import FailedTogether
from distil_kernels.train.run.inputs import differences
from distil_kernels.train.run.interrupt import Interrupt
from distil_kernels.train.run.json_lines import drop_after, last_evaluation
from distil_kernels.train.run.log import RunLog
from distil_kernels.train.shared_rows import SharedRows, target_of_all
from distil_kernels.train.teachers.base import Target

MAX_SKIPPED_STEPS = 5
"""Steps in a row with a gradient that is not finite, after which the run stops."""


class Trainer:
    """A run of the parts that `build` makes. The run directory is made before `run`, by the main process."""

    def __init__(self, config: Config, parts: Parts, console: Console) -> None:
        self.config, self.console, self.directory = config, console, parts.directory
        self.accelerator, self.processes = parts.accelerator, parts.processes
        self.models, self.student, self.teacher = parts.models, parts.models.student, parts.models.teacher
        self.data, self.tutor, self.batches = parts.data, parts.data.tutor, parts.data.batches
        self.evaluator, self.sampling = parts.data.evaluator, parts.data.sampling

        optimizer = make_optimizer(self.models.trained, config)
        self.scheduler = make_scheduler(optimizer, config)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        device = self.student.weight.device
        self.average = PositionAverage(parts.data.longest, config.baseline_rate, device, self.processes)
        self.server = None
        if config.rollout_url:
            self.server = RolloutServer(config, parts.data.longest, self.directory, self.processes)
        self.log = RunLog(config, self.directory, console, self.accelerator)
        self.pages = Pages(config, self.directory, self.processes.is_main)

        self.step = 0
        self.num_skipped_steps = 0  # the last steps in a row with a gradient that was not finite
        self.evaluated_step = self.saved_step = -1  # step of the last evaluation, of the last checkpoint
        self.is_between_steps = True  # the weights are those of `step`
        self.changes: list[str] = []  # what a resumed run has in another way than before

    # One step.

    def train_step(self) -> dict[str, Any]:
        """One batch of rollouts and its updates, of which the first is recorded.

        Returns the record of metrics.jsonl, the same in all processes but for times.
        """
        config, timer, start = self.config, PhaseTimer(), time.perf_counter()
        # The batch is the same in all processes. Each takes its share of the problems.
        batch = next(self.batches)
        share = self.processes.share(batch)

        # Sample completions, verify them, and give feedback for the teacher to read.
        generate_here = None
        if self.server:
            with timer.phase("weights"):
                generate_here = self.server.with_weights(self.student.model)
        with timer.phase("rollout"), self.student.opened(), self.processes.all_or_none():
            self.roll_out(share, generate_here)

        # Pack them into micro-batches. Losses are divided by the number of rollouts with a verdict in the whole step.
        num_rollouts = len(batch) * config.rollouts_per_prompt
        verdicts = [rollout.feedback.has_verdict for group in share for rollout in group.rollouts]
        normalizer = float(max(1, sum(self.processes.gather([sum(verdicts)]))))
        size = config.micro_batch_prompts or len(share)
        parts = [share[begin : begin + size] for begin in range(0, len(share), size)]
        device = self.student.weight.device
        micro_batches = [
            (
                self._packed(part),
                UpdateState(shared=SharedRows.of(part, self._packed, self.student, self.teacher, self.processes)),
            )
            for part in parts
        ]

        # One update, or several on the same rollouts.
        logprob_before = self._held_out_logprob(timer)
        updates = [self.update(micro_batches, normalizer, timer) for _ in range(config.updates_per_batch)]
        (first, grad_norm), (last, _) = updates[0], updates[-1]
        num_skipped_updates = sum(not math.isfinite(norm) for _, norm in updates)
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.scheduler.step()
        cost_to_come = math.nan
        if math.isfinite(grad_norm):
            cost_to_come = config.credit_scale * self.average.follow()
        else:
            self.average.forget()
        logprob_after = self._held_out_logprob(timer)
        self.step += 1
        self.num_skipped_steps = self.num_skipped_steps + 1 if num_skipped_updates else 0

        # Record the rollouts and sums of all processes.
        with timer.phase("exchange"):
            batch = self.processes.gather(share)
            first_sums, last_sums = (
                self.processes.gather([sums.on_cpu() for _, sums in update]) for update in (first, last)
            )
            losses = self.processes.gather([float(loss) for loss, _ in first])
            peaks = self.processes.gather([peak_memory(device)])
        num_tokens = sum(sum(rollout.by_model) for group in batch for rollout in group.rollouts)
        seconds = time.perf_counter() - start
        teacher_logprobs = [sums.sequence_teacher_logprob for sums in first_sums]
        record = {
            "kind": "step",
            "step": self.step,
            "loss": sum(losses),
            **rollout_metrics(batch, self.tutor.prompts, self.sampling.stop_ids, teacher_logprobs),
            **update_means(first_sums, last_sums),
            **({"cost_to_come": cost_to_come} if config.has_credit else {}),
            **alignment_metrics([sums.inner_products for sums in first_sums]),
            **change_metrics(logprob_before, logprob_after),
            "length": num_tokens / num_rollouts,
            "grad_norm": grad_norm,
            "num_skipped_updates": num_skipped_updates,
            "learning_rate": learning_rate,
            **self._spent(),
            "num_skipped_problems": self.batches.num_skipped,
            "num_left_out_records": len(getattr(self.tutor.task, "left_out", ())),
            "tokens_per_second": num_tokens / seconds,
            **{name: max(peak[name] for peak in peaks) for name in peaks[0]},
            "seconds": seconds,
            **{f"seconds_{phase}": spent for phase, spent in timer.seconds.items()},
        }
        if num_skipped_updates and not any(record.get("num_skipped_updates") for record in self.log.records):
            self.log.print(
                f"warning: the gradient of step {self.step} is not finite, its update is skipped (num_skipped_updates)"
            )
        self.log.add(record, rollout_records("training", self.step, batch))
        if self.num_skipped_steps == MAX_SKIPPED_STEPS:
            raise self._diverged(f"the gradient of {MAX_SKIPPED_STEPS} steps in a row was not finite")
        self.is_between_steps = True
        return record

    def roll_out(self, groups: Sequence[PromptGroup], generate_here: Generate | None = None) -> None:
        """Adds rollouts with feedback to the groups; the student samples, or `generate_here` does, or nobody."""
        if self.config.rollouts == "none":
            self.tutor.take_answers(groups, self.sampling)
            self.tutor.give_feedback(self.student, groups, 1)
        else:
            self._sample(groups, generate_here or partial(generate, self.student))

    def _sample(self, groups: Sequence[PromptGroup], generate_here: Generate) -> None:
        count = self.config.rollouts_per_prompt
        self.tutor.collect(groups, count, generate_here, self.sampling)
        self.tutor.give_feedback(self.student, groups, count)

    def update(
        self, micro_batches: Sequence[tuple[PackedBatch, UpdateState]], normalizer: float, timer: PhaseTimer
    ) -> tuple[list[tuple[torch.Tensor, Sums]], float]:
        """One optimizer step on all of a batch: losses and sums of its micro-batches, and the gradient's norm.

        If the norm is not finite, it is so in all processes, and no step is taken.
        """
        # Add up the gradients of the micro-batches.
        alone = nullcontext() if self.config.shard else self.processes.all_or_none()  # FSDP has the processes talk
        with alone:
            results = [self.micro_batch(batch, normalizer, timer, state) for batch, state in micro_batches]
        with timer.phase("exchange"):  # includes waiting for the other processes
            self.processes.sum_of_members(self.models.partial)
            self.processes.sum_gradients(self.models.trained)
        with timer.phase("optimizer"):
            grad_norm = clip_gradients(self.models.trained, self.config.max_grad_norm)
            self.is_between_steps = False
            if math.isfinite(grad_norm):
                self.optimizer.step()
                self.teacher.follow()
            self.optimizer.zero_grad()
        return results, grad_norm

    def micro_batch(
        self, batch: PackedBatch, normalizer: float, timer: PhaseTimer, state: UpdateState
    ) -> tuple[torch.Tensor, Sums]:
        """Forward and backward of one micro-batch: loss and sums. Its gradients are added to those before."""
        config, student = self.config, self.student
        # The teacher's distribution at every token. A teacher that does not move is asked once.
        target = state.target
        if target is None and config.objective != "policy_gradient":
            with timer.phase("teacher"):
                target = self.teacher.target(batch)
            if config.updates_per_batch > 1 and not self.teacher.moves:
                state.target = target

        state.distil_weight = config.distil_weight_at(self.step)
        if self.models.reference is not None and state.reference_logprobs is None:
            with timer.phase("reference"):
                state.reference_logprobs = self.models.reference.token_logprobs(batch, config)
                if state.shared is not None:
                    state.reference_logprobs = all_rows(state.reference_logprobs, head_in_shards(student).group)

        # The student's hidden states, and the loss by the kernels, which reads the heads in forward and backward.
        heads = self.teacher.head_opened() if state.shared is None else rows_exchanged(student)
        with heads:
            with self.accelerator.autocast():
                with timer.phase("student"):
                    hidden = student.states(batch.prompts, batch.prompt_index, batch.completions)
                    hidden = hidden.to(student.weight.dtype)
                with timer.phase("loss"):
                    loss, sums = self._loss(hidden, target, batch, normalizer, state)
            with timer.phase("backward"):
                self.accelerator.backward(loss)
        # A loss of all rows is the same in all processes, which are asked for their parts of the step's.
        return loss.detach() / (1 if state.shared is None else self.processes.count), sums

    def _loss(
        self, hidden: torch.Tensor, target: Target | None, batch: PackedBatch, normalizer: float, state: UpdateState
    ) -> tuple[torch.Tensor, Sums]:
        """The loss of a micro-batch, or of all processes' where their rows are exchanged, and this one's sums."""
        config, is_first, all_of_it = self.config, state.is_first, batch
        student: CausalLM = self.student
        if state.shared is not None:
            all_of_it, student = state.shared.batch, head_in_shards(student)
            hidden = all_rows(hidden, student.vocab_group)
            target = None if target is None else target_of_all(target, self.teacher, student.vocab_group)
        if target is None:
            return policy_loss(student, hidden, batch, config, normalizer, state)
        loss, sums = distil_loss(student, hidden, target, batch, config, self.average, normalizer, state)
        if is_first and config.alignment_every and (self.step + 1) % config.alignment_every == 0:
            products = inner_products(student, hidden, target, all_of_it, config, self.average)
            sums = sums._replace(inner_products=products)
        return loss, sums

    def _packed(self, groups: Sequence[PromptGroup]) -> PackedBatch:
        return PackedBatch.of(groups, self.student.weight.device, self.config.skip_first_tokens, self._leaves_out)

    def _spent(self) -> dict[str, float]:
        """What feedback has cost all processes since the last record."""
        parts = self.processes.gather([self.tutor.spent()])
        return {name: sum(part[name] for part in parts) for name in parts[0]}

    def _leaves_out(self, rollout: Rollout) -> bool:
        """Whether nothing is learnt from a rollout: it was cut off, and such are masked."""
        return self.config.mask_truncated and rollout.is_truncated(self.sampling.stop_ids)

    def _held_out_logprob(self, timer: PhaseTimer) -> float | None:
        """The log-prob of held-out right answers under the student; None in a step that does not record it."""
        if not self.config.held_out_every or (self.step + 1) % self.config.held_out_every:
            return None
        with timer.phase("held_out"), self.student.opened():
            return held_out_logprob(self.student, self.evaluator.groups(), self.tutor.prompts, self.config)

    def _diverged(self, reason: str) -> FloatingPointError:
        return FloatingPointError(
            f"stopped at step {self.step}: {reason}; a lower learning_rate or max_grad_norm may cure it, and "
            f"{self.directory} has the checkpoints before it"
        )

    # The run.

    def run(self) -> bool:
        """Trains to `config.steps`. Returns True if it got there; the directory is complete either way."""
        config = self.config
        for note in [*self.data.notes, *config.remarks()]:
            self.log.print(f"note: {note}")
        trackers.start(self.accelerator, config, self.directory)
        if self.changes:
            self.log.add({"kind": "change", "step": self.step, "changes": self.changes}, [])
        with Interrupt(self.console) as interrupt, output.progress_bar(self.console) as bar:
            task = bar.add_task(config.task, total=config.steps, completed=self.step, left="")
            lines = output.StepLines(self.console, self.step, config.steps, config.verbose)
            while True:
                place = self._place()
                try:
                    # Evaluate and save before the step that follows, or after the last one.
                    if self._evaluation_is_due():
                        self._evaluate(interrupt)
                    is_last = self.step >= config.steps or self.processes.any(interrupt.requested)
                    every = config.checkpoint_every
                    if is_last or (self.step and every and self.step % every == 0 and not self.num_skipped_steps):
                        self.save()
                    if is_last:
                        break
                    record = self.train_step()
                except Exception as error:
                    self._save_after(error, place)
                    raise
                bar.update(task, completed=self.step, left=lines.show(record))
                self.pages.refresh()
            self.pages.write()
        self.accelerator.end_training()
        evaluations = [record for record in self.log.records if record["kind"] == "evaluation"]
        if evaluations:
            self.console.print(output.final_table(evaluations))
        self.console.print(f"run directory: {self.directory}", highlight=False)
        return self.step >= config.steps

    def _evaluation_is_due(self) -> bool:
        every = self.config.eval_every
        is_due = self.step in (0, self.config.steps) or (every > 0 and self.step % every == 0)
        return is_due and self.evaluated_step < self.step

    def _evaluate(self, interrupt: Interrupt) -> None:
        """Evaluates and records student and teacher, unless it is interrupted."""
        start = time.perf_counter()
        # Opened here, because those of the first share alone read the models for the rollouts that are shown.
        with self.student.opened(), self.teacher.opened():
            result = self.evaluator.evaluate(self.student, self.teacher, lambda: interrupt.requested)
            seconds = time.perf_counter() - start
            with self.processes.all_or_none():
                rollouts = self._held_out_rollouts() if result is not None and self.processes.index == 0 else []
        spent = self._spent()
        if result is not None:
            self.log.add(
                {"kind": "evaluation", "step": self.step, **asdict(result), "seconds": seconds, **spent}, rollouts
            )
            self.evaluated_step = self.step
            self.console.print(output.evaluation_line(self.step, result), style="bold", highlight=False)
            self.pages.write()

    def _held_out_rollouts(self) -> list[dict[str, Any]]:
        """Records of held-out problems answered by the student, with the cost of every token."""
        groups = self.evaluator.groups(self.config.eval_rollouts)
        if not (groups and self.teacher.answers):  # a store knows no costs of the student's answers
            return []
        with self.evaluator.seeded(self.student.weight.device):
            self._sample(groups, partial(generate, self.student))
            tokenizer = self.models.tokenizer
            columns = token_columns(self.student, self.teacher, groups, tokenizer, self.config, self.average)
        return rollout_records("held_out", self.step, groups, columns)

    # Checkpoints.

    @property
    def _stateful(self) -> dict[str, Any]:
        """The parts whose state a checkpoint contains, apart from model and optimizer."""
        return {
            "scheduler": self.scheduler, "teacher": self.teacher, "baseline": self.average, "batches": self.batches,
        }  # fmt: skip

    def _place(self) -> dict[str, Any]:
        """The position in the data and the random numbers, which a step moves before it changes a weight."""
        return {"batches": self.batches.state_dict(), "generators": checkpoint.generator_states()}

    def save(self, place: dict[str, Any] | None = None) -> None:
        """Writes a checkpoint, unless the last one is of this step.

        Args:
            place: where the run was (`_place`); None for where it is.

        Raises:
            FloatingPointError: a weight is not finite.
        """
        if self.saved_step == self.step:
            return
        if self.processes.any(not checkpoint.are_finite(self.models.trained)):
            raise self._diverged("the weights are not finite")
        # All processes gather the state; the main one has it and writes it.
        model, place = self.student.model, place or self._place()
        weights = model_state(model)
        state = {
            "step": self.step, "fingerprint": self.models.fingerprint, "inputs": self.data.inputs,
            "optimizer": optimizer_state(model, self.optimizer.optimizer),
            **{name: part.state_dict() for name, part in self._stateful.items()},
            "batches": place["batches"], "generators": self.processes.gather([place["generators"]]),
        }  # fmt: skip
        if self.processes.is_main:
            tokenizer, count = self.models.tokenizer, self.config.keep_checkpoints
            checkpoint.save(self.directory, self.step, model, tokenizer, state, count, weights)
        self.saved_step = self.step

    def _save_after(self, error: Exception, place: dict[str, Any]) -> None:
        """Writes a checkpoint of the last complete step when an error ends the run: a judge's or a server's, say.

        Args:
            place: where the run was when that step was complete.
        """
        is_common = not self.processes.are_several or isinstance(error, FailedTogether)
        cannot_be_saved = isinstance(error, (WriteError, FloatingPointError)) or self.num_skipped_steps > 0
        if not (is_common and self.is_between_steps and self.saved_step < self.step > 0) or cannot_be_saved:
            return
        try:
            self.save(place)
        except (WriteError, FloatingPointError) as failure:
            self.log.print(str(failure))
        else:
            self.log.print(f"step {self.step} is saved: --resume {self.directory} goes on from it")

    def resume(self, accepts_changes: bool = False) -> None:
        """Goes on from the run directory's last checkpoint, or from its beginning, and drops the records after it.

        Another number of processes goes on with new streams of random numbers, and with everything else.

        Args:
            accepts_changes: data, judge or tokenizer may be others than those of the checkpoint.

        Raises:
            ValueError: they are others, or `load` refuses the checkpoint.
        """
        is_main = self.processes.is_main
        if is_main:
            remove_leftovers(self.directory)
        path = self.processes.from_main(
            checkpoint.newest_undamaged(self.directory, self.log.print) if is_main else None
        )
        if path is None:
            self.log.print(f"{self.directory} has no checkpoint yet: starting from step 0")
        else:
            state = self.load(path)
            self.changes = differences(state.get("inputs", self.data.inputs), self.data.inputs)
            if self.changes and not accepts_changes:
                raise ValueError(
                    f"[resume] since {path} was written {', '.join(self.changes)}: expected the same, or "
                    "--accept_changes, which goes on and records it"
                )
            self._restore_generators(state["generators"])
            if is_main:
                checkpoint.link_to(path)
            self.log.print(f"resuming from {path}")
        # Without a checkpoint `saved_step` is -1, and all records are dropped.
        records = drop_after(self.directory, self.saved_step, self.log.print) if is_main else []
        self.log.records = self.processes.from_main(records)
        self.evaluated_step = last_evaluation(self.log.records)

    def _restore_generators(self, generators: list[dict[str, Any]]) -> None:
        """Puts the random numbers where the run left them, or makes new streams for another number of processes."""
        count = self.processes.count
        if len(generators) == count:
            checkpoint.restore_generators(generators[self.processes.index])
            return
        set_seed(self.processes.seed(self.config.seed, self.step, count))
        self.changes.append(f"the number of processes has changed from {len(generators)} to {count}")
        self.log.print(
            f"note: {len(generators)} processes took the first {self.step} steps and {count} go on: what follows is "
            "sampled from new streams, and is not to the last bit what it would have been; all else is kept"
        )

    def load(self, path: Path) -> dict[str, Any]:
        """Takes everything but the generators' states from a checkpoint, and returns its state. No file is changed."""
        state = self.models.restore(path)
        load_optimizer_state(self.student.model, self.optimizer.optimizer, state["optimizer"])
        for name, part in self._stateful.items():
            part.load_state_dict(state[name])
        # The rate follows from the schedule of this run: --steps may have changed it.
        self.step = self.saved_step = state["step"]
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * rate_share(self.config, self.step)
        return state
