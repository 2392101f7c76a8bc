"""The whole method in one file: a model learns from corrections that only its teacher reads.

    problems     four numbers, of which the largest is to be named
    rollouts     the student answers every problem a few times
    correction   the teacher is the same model as it was at the start, and its prompt also says the right answer
    states       both models read their prompt and the completion: hidden states of the N completion tokens
    loss         fused_distil_loss: the divergence over the whole vocabulary with the sequence-level gradient
    step         AdamW

    python examples/distil.py [MODEL]       a path or hub name of any causal language model of transformers

`python -m distil_kernels.train` is the same loop with tasks, verifiers, other teachers and objectives, evaluation,
checkpoints and several processes.
"""

from __future__ import annotations

import copy
import random
import sys
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from distil_kernels import DistilLoss, fused_distil_loss
from distil_kernels.extras import require
from distil_kernels.hf import CausalLM, split

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEPS = 24
PROBLEMS_PER_STEP = 4
ROLLOUTS_PER_PROBLEM = 4
MAX_NEW_TOKENS = 12
LEARNING_RATE = 2e-5


class Problem(NamedTuple):
    question: str
    answer: str


class Rollout(NamedTuple):
    """One answer of the student, as token ids that are never decoded and encoded again."""

    prompt: list[int]
    """What the student read."""
    teacher_prompt: list[int]
    """The same with corrections."""
    completion: list[int]
    """What the student sampled, with the token that ended it."""


def make_problem(generator: random.Random) -> Problem:
    numbers = generator.sample(range(10, 100), 4)
    return Problem(", ".join(map(str, numbers)), str(max(numbers)))


def prompt(examples: list[Problem], problem: Problem, with_corrections: bool) -> str:
    """Worked examples, then the problem. The examples' corrections show a small model what corrections are for."""
    blocks = []
    for each in [*examples, problem]:
        correction = f"Feedback: The correct answer is {each.answer}.\n" if with_corrections else ""
        blocks.append(f"Q: {each.question}\n{correction}A:")
    return "".join(f"{block} {each.answer}\n\n" for block, each in zip(blocks, examples, strict=False)) + blocks[-1]


@torch.no_grad()
def generate(model: PreTrainedModel, prompts: list[list[int]], stop_ids: list[int], sample: bool) -> list[list[int]]:
    """One completion of each prompt, with its stop token unless the length limit cut it."""
    # Prompts are padded on the left, so that all completions begin in the same column.
    width = max(map(len, prompts))
    ids = torch.tensor([[stop_ids[0]] * (width - len(tokens)) + tokens for tokens in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in prompts], device=model.device)
    # The credit needs rollouts from the model's own distribution: temperature 1, nothing cut off.
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0} if sample else {}
    sequences = model.generate(
        ids, attention_mask=mask, do_sample=sample, max_new_tokens=MAX_NEW_TOKENS, eos_token_id=stop_ids,
        pad_token_id=stop_ids[0], **sampling,
    )  # fmt: skip
    completions = []
    for tokens in sequences[:, width:].tolist():
        end = next((index for index, token in enumerate(tokens, 1) if token in stop_ids), len(tokens))
        completions.append(tokens[:end])
    return completions


def completion_states(lm: CausalLM, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
    """Hidden states [N, D] that predict the completions' N tokens, packed completion after completion."""
    rows = [torch.tensor(before + tokens[:-1]) for before, tokens in zip(prompts, completions, strict=True)]
    ids = pad_sequence(rows, batch_first=True).to(lm.weight.device)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(lm.weight.device)
    hidden = lm.hidden(ids, attention_mask=mask)
    spans = [(len(before) - 1, len(tokens)) for before, tokens in zip(prompts, completions, strict=True)]
    return torch.cat([row[start : start + length] for row, (start, length) in zip(hidden, spans, strict=True)])


def distil_loss(student: CausalLM, teacher: CausalLM, rollouts: list[Rollout], rollouts_per_problem: int) -> DistilLoss:
    """The loss of a batch, whose rollouts of one problem follow each other."""
    completions = [rollout.completion for rollout in rollouts]
    hidden = completion_states(student, [rollout.prompt for rollout in rollouts], completions)
    with torch.no_grad():
        teacher_hidden = completion_states(teacher, [rollout.teacher_prompt for rollout in rollouts], completions)
    # No logits of all tokens exist: the op takes hidden states and the weights of both heads.
    return fused_distil_loss(
        hidden, student.weight, teacher_hidden, teacher.weight,
        student_bias=student.bias, teacher_bias=teacher.bias, vocab_size=student.vocab_size,
        student_logit_scale=student.logit_scale, teacher_logit_scale=teacher.logit_scale,
        logit_softcap=student.logit_softcap, teacher_logit_softcap=teacher.logit_softcap,
        tokens=torch.tensor([token for completion in completions for token in completion], device=hidden.device),
        cu_seqlens=torch.tensor([0, *map(len, completions)]).cumsum(0),
        cost="kl", discount=0.9, baseline="leave_one_out", group_size=rollouts_per_problem,
        teacher_ratio_clip=1.0, credit_clip=0.25,  # an end that the teacher rules out gains nothing by what it saves
    )  # fmt: skip


def main(name: str = "HuggingFaceTB/SmolLM2-135M-Instruct") -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    generator = random.Random(0)

    # The student learns; the teacher stays the model of the start. Both are split into a body and a head.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device).eval()
    student, teacher = split(model), split(copy.deepcopy(model).requires_grad_(False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)

    # An answer ends with its line. Worked examples are the same in all prompts.
    stop_ids = [token for token in range(len(tokenizer)) if "\n" in tokenizer.decode([token])]
    examples = [make_problem(generator) for _ in range(2)]

    def prompts_of(problems: list[Problem], with_corrections: bool) -> list[list[int]]:
        return [tokenizer(prompt(examples, problem, with_corrections)).input_ids for problem in problems]

    def accuracy(problems: list[Problem], completions: list[list[int]]) -> float:
        answers = [tokenizer.decode(completion).strip() for completion in completions]
        return sum(answer == problem.answer for answer, problem in zip(answers, problems, strict=True)) / len(problems)

    held_out = [make_problem(generator) for _ in range(48)]
    before = accuracy(held_out, generate(model, prompts_of(held_out, False), stop_ids, sample=False))
    for step in range(1, STEPS + 1):
        # Every problem has a prompt without and one with the correction.
        problems = [make_problem(generator) for _ in range(PROBLEMS_PER_STEP)]
        problems = [problem for problem in problems for _ in range(ROLLOUTS_PER_PROBLEM)]
        prompts, teacher_prompts = prompts_of(problems, False), prompts_of(problems, True)

        # The student samples several completions for each problem.
        completions = generate(model, prompts, stop_ids, sample=True)
        rollouts = [Rollout(*fields) for fields in zip(prompts, teacher_prompts, completions, strict=True)]

        # The gradient is that of the expected cost of whole rollouts: early tokens answer for later disagreement.
        loss = distil_loss(student, teacher, rollouts, ROLLOUTS_PER_PROBLEM).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(
            f"step {step:2d}  loss {float(loss.detach()):.3f}  accuracy {accuracy(problems, completions):.2f}",
            flush=True,
        )

    after = accuracy(held_out, generate(model, prompts_of(held_out, False), stop_ids, sample=False))
    print(f"accuracy on {len(held_out)} held-out problems, greedy: {before:.2f} before, {after:.2f} after")


if __name__ == "__main__":
    require("examples/distil.py", "train", "transformers")
    main(*sys.argv[1:])
