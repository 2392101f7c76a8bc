"""Models and data of a configuration, as `Trainer`, the command eval, benches and studies take them.

    build(config, directory)  ->  Parts: processes, models, data

The order of the steps matters where it is not obvious; the comments say why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from transformers import PreTrainedTokenizerBase

from distil_kernels.train.batches import Batches
from distil_kernels.train.config import Config
from distil_kernels.train.environments import ENVIRONMENTS, environment_class
from distil_kernels.train.evaluate import Evaluator
from distil_kernels.train.feedback.expert import expert_kind
from distil_kernels.train.feedback.kinds import FeedbackKind, feedback_kind
from distil_kernels.train.feedback.prompts import Example, Prompts
from distil_kernels.train.feedback.tutor import Tutor, judged
from distil_kernels.train.models import loading
from distil_kernels.train.models.activation_checkpointing import checkpoint_layers
from distil_kernels.train.models.lora import with_adapters
from distil_kernels.train.models.reading import Reader, reader
from distil_kernels.train.models.sharding import shard, split_sharded, unsharded
from distil_kernels.train.models.tensor_parallel import cut
from distil_kernels.train.rollouts.episodes import Episodes, Texts
from distil_kernels.train.rollouts.sampling import Sampling
from distil_kernels.train.run import checkpoint
from distil_kernels.train.run.accelerator import check_backend, make_accelerator
from distil_kernels.train.run.distributed import Processes
from distil_kernels.train.run.inputs import inputs
from distil_kernels.train.tasks import Problem, Task, answered_problems, held_out_problems, make_task, with_seed
from distil_kernels.train.tasks.sandbox import SANDBOX
from distil_kernels.train.teachers.base import Teacher
from distil_kernels.train.teachers.hidden_states import HiddenTeacher
from distil_kernels.train.teachers.in_process import InProcessTeacher, copied, other_model
from distil_kernels.train.teachers.remote import RemoteTeacher
from distil_kernels.train.teachers.stored import StoredTeacher
from distil_kernels.train.teachers.trust_region import TrustRegionTeacher

STARTS = ("frozen", "trust_region")
"""Teachers that hold the model of the start, which the reference is too."""
CHARACTERS_PER_TOKEN = 16
"""What is read of a judge's text for each token of a prompt's limit: four times what a token has on average."""


@dataclass
class Models:
    """The student, its teacher, and what belongs to them."""

    config: Config
    student: Reader
    teacher: Teacher
    reference: InProcessTeacher | None
    """The model of the start, where the student is held to it."""
    tokenizer: PreTrainedTokenizerBase
    end_ids: list[int]
    """Tokens that end any answer of the student."""
    trained: list[nn.Parameter]
    partial: list[nn.Parameter]
    """Those of whose gradients each member of a tensor-parallel group has a part."""
    notes: list[str]
    """What a person should know of the models before the run."""
    fingerprint: list[int]
    """Of the start weights that no checkpoint has: of a frozen or local teacher, and below adapters."""

    def restore(self, path: Path) -> dict[str, Any]:
        """Takes student and teacher from a checkpoint, and returns all of the checkpoint's state.

        Raises:
            ValueError: the start model has other weights than the one of the run.
        """
        state = checkpoint.load_state(path)
        if state["fingerprint"] != self.fingerprint:
            config = self.config
            raise ValueError(
                f"[resume] {config.teacher_model or config.model} has other weights than when the run started, and a "
                f"{config.teacher} teacher or adapters are made for them: expected the same model"
            )
        loading.restore(self.student.model, path)
        self.teacher.load_state_dict(state["teacher"])
        return state


@dataclass
class Data:
    """The problems of training and evaluation, and how rollouts of them are made."""

    tutor: Tutor
    batches: Batches
    sampling: Sampling
    """Parameters of training rollouts."""
    longest: int
    """The largest number of tokens of a completion, what is observed included."""
    evaluator: Evaluator
    notes: list[str]
    """What a person should know of the data before the run."""
    inputs: dict[str, str]
    """Checksums of what was read."""


@dataclass
class Parts:
    """Everything that a configuration determines, on the processes of the run."""

    accelerator: Accelerator
    processes: Processes
    directory: Path
    """The run directory of the main process."""
    models: Models
    data: Data


def build(config: Config, directory: Path) -> Parts:
    """The parts of a run in `directory`, where nothing is written.

    Raises:
        ValueError: an option names something that does not exist or does not fit.
    """
    accelerator = make_accelerator(config, directory)
    processes = Processes.of(accelerator, config)
    directory = processes.from_main(directory)
    # Names that are wrong are errors before any weights are read.
    SANDBOX.is_unsafe_allowed = config.unsafe_sandbox
    task = make_task(config.task, config.seed, config.show_private_tests, config.skip_bad_records)
    seconds = math.inf if config.judge_seconds is None else config.judge_seconds
    kind = feedback_kind(config.feedback, seconds, CHARACTERS_PER_TOKEN * config.max_prompt_tokens)
    kind = expert_kind(config) if config.feedback == "expert" else kind
    check_backend(config.backend, accelerator)
    models = build_models(config, accelerator, processes)
    data = build_data(config, models, task, kind, processes)
    # The processes begin alike, new adapters included. From here on each has its stream of random numbers.
    if processes.index:
        set_seed(processes.seed(config.seed))
    return Parts(accelerator, processes, directory, models, data)


def build_models(config: Config, accelerator: Accelerator, processes: Processes) -> Models:
    """Loads student and teacher onto the device; torch's generator starts from the seed."""
    # Before loading: new adapters are random.
    set_seed(config.seed)
    model, tokenizer = loading.load(config.model, keeps_adapters=config.lora_continue)
    loading.use_flash_attention(model, accelerator.device, accelerator.mixed_precision)

    # Before new adapters: the fingerprint is of the start weights. A checkpoint of adapters does not contain them, nor
    # does one of a run whose frozen teacher they are.
    is_kept = config.teacher in STARTS or config.trains_adapters or config.reference_weight > 0
    fingerprint = checkpoint.fingerprint(model) if is_kept else []
    if config.lora_rank:
        model = with_adapters(model, config.lora_rank, config.lora_alpha, config.lora_targets)

    # Before sharding: a teacher that starts as a copy of the student needs all of its weights.
    is_sharded, is_cut = config.shard and processes.count > 1, processes.mesh is not None
    other = other_model(config, model, tokenizer, accelerator, is_sharded or is_cut)
    fingerprint += checkpoint.fingerprint(other) if config.teacher == "local" else []
    end_ids = loading.end_ids(model, tokenizer)  # with those of a local teacher

    has_reference = config.reference_weight > 0 and config.teacher not in STARTS
    copies_start = (is_sharded or is_cut) and has_reference and not config.lora_rank
    start = copied(model, copies_all=True) if copies_start else None

    # Before the optimizer, which must see the shares of the parameters.
    parts, notes, partial = [part for part in (model, other, start) if part], list[str](), list[nn.Parameter]()
    if is_sharded:
        shard(parts, accelerator)
    if processes.mesh is not None:
        done = [cut(part, processes.mesh["tensor"]) for part in parts]
        notes, partial = list(dict.fromkeys(note for each in done for note in each.notes)), done[0].partial
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # evaluation_mode: the model is placed and its forward set for autocast, without DistributedDataParallel.
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    # The ways of reading are tried out here, as the model runs: with all weights and under autocast.
    with unsharded(model), accelerator.autocast():
        lm = split_sharded(accelerator.unwrap_model(prepared))
        student = reader(lm, config.reading, config.gradient_checkpointing, is_sharded, accelerator.autocast)
    teacher: Teacher
    if config.teacher == "hidden":
        teacher = HiddenTeacher(config, tokenizer, student)
    elif config.teacher_url:
        teacher = RemoteTeacher(config, tokenizer, student.vocab_size, student.weight.device)
    elif config.teacher == "stored":
        teacher = StoredTeacher(config, tokenizer, student.vocab_size, student.weight.device)
    elif config.teacher == "trust_region":
        with accelerator.autocast():
            teacher = TrustRegionTeacher(student, config.ema_rate, config.reading, not config.lora_continue)
    else:
        with accelerator.autocast():
            teacher = InProcessTeacher(
                student, config.teacher, config.ema_rate, other, config.reading, not config.lora_continue
            )
    reference = teacher if config.reference_weight > 0 and isinstance(teacher, InProcessTeacher) else None
    if has_reference:
        with accelerator.autocast():
            reference = InProcessTeacher(
                student, "frozen", 0.0, start, config.reading, starts_without=not config.lora_continue
            )
    # After the teacher, whose copy of the student needs no checkpointing.
    if config.gradient_checkpointing:
        checkpoint_layers(student.model)
    return Models(config, student, teacher, reference, tokenizer, end_ids, trained, partial, notes, fingerprint)


def build_data(config: Config, models: Models, task: Task, kind: FeedbackKind, processes: Processes) -> Data:
    """Prompts, training problems and held-out problems."""
    episodes = make_episodes(config, models)
    examples = answered_problems(task, config.num_examples)
    prompts = make_prompts(config, models, [_worked(problem, kind, task, episodes) for problem in examples], episodes)
    longest = config.max_new_tokens + (episodes.longest if episodes else 0)
    notes = [*models.notes, *_check_positions(config, models, longest)]
    if isinstance(models.teacher, (RemoteTeacher, HiddenTeacher, StoredTeacher)):
        notes.append(models.teacher.note)
    tutor = Tutor.of(kind, task, prompts, config.max_critique_tokens, episodes, processes)
    example_keys = {problem.key for problem in examples}
    batches = Batches(tutor, example_keys, config.prompts_per_step, processes, config.rollouts == "none")

    stop_ids = prompts.stop_ids()
    sampling = Sampling(config.max_new_tokens, stop_ids, config.temperature, config.top_p, config.top_k)
    held_out_task = with_seed(task, config.task, config.eval_seed)
    evaluator = Evaluator(
        tutor.for_task(held_out_task),
        held_out_problems(held_out_task, config.eval_problems),
        Sampling(config.max_new_tokens, stop_ids, config.temperature),  # the model's own distribution
        config.eval_samples,
        config.eval_seed,
        processes,
        config.teacher_temperature,
    )
    if len(examples) < config.num_examples:
        count = f"{len(examples)} of {config.num_examples} worked examples"
        notes.append(f"{count}: no other problem comes with an answer")
    return Data(tutor, batches, sampling, longest, evaluator, notes, inputs(config, models.tokenizer))


def make_prompts(
    config: Config, models: Models, examples: Sequence[Example], episodes: Episodes | None = None
) -> Prompts:
    """The prompts of a run, with these worked examples."""
    return Prompts(
        models.tokenizer,
        examples,
        config.layout,
        config.teacher_reads,
        config.max_prompt_tokens,
        models.end_ids,
        episodes.environment.example if episodes else None,
        config.chat_options(),
        config.teacher_chat_options(),
        config.tags_of_reasoning(),
    )


def make_episodes(config: Config, models: Models) -> Episodes | None:
    """The episodes of the run's environment; None without one.

    Raises:
        ValueError: there is no such environment, or it does not work here.
    """
    if not config.environment_name:
        return None
    environment, prompts = environment_class(config.environment_name), make_prompts(config, models, [])
    frame = environment.frame if environment.stop else prompts.frame(models.end_ids)
    is_ours = config.environment_name in ENVIRONMENTS  # and does not hang
    episodes = Episodes(
        environment, config.environment_name, Texts(prompts.answer, prompts.ids, frame), config.max_tool_calls,
        config.max_tool_tokens, math.inf if is_ours or config.judge_seconds is None else config.judge_seconds,
    )  # fmt: skip
    episodes.made()  # whose errors come before the first rollout
    return episodes


def _worked(record: Problem, kind: FeedbackKind, task: Task, episodes: Episodes | None) -> Example:
    """A worked example: the right answer, or the environment's own solution, with its feedback."""
    if episodes is None:
        return Example(record, kind.verifier(task, record, record.answer))
    problem, outcome = episodes.posed(record), episodes.worked(record)
    feedback = kind.verifier(judged(task, outcome), problem, outcome.answer)
    return Example(problem, feedback, outcome.turns)


def _check_positions(config: Config, models: Models, longest: int) -> list[str]:
    """Notes on models that prompt and completion, or prompt and critique, may be too long for.

    Raises:
        ValueError: a model has no positions for them.
    """
    critique = config.max_critique_tokens if config.feedback == "self_evaluation" else 0
    readers = [models.student, models.teacher.lm] if isinstance(models.teacher, InProcessTeacher) else [models.student]
    notes = [loading.check_positions(lm.model, config.max_prompt_tokens, max(longest, critique)) for lm in readers]
    return list(dict.fromkeys(filter(None, notes)))
