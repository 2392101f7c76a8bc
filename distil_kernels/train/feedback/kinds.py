"""From a verified answer to what the student and its teacher read.

The student reads worked examples and the question. The teacher is the same model and reads the expert's correction too:
in words ("text"), as the very question answered once before ("demonstration"), or both. Its examples carry their own
corrections, which shows a small model what corrections are for: accuracy with the correction .81, against .40 for a
demonstration after plain examples (SmolLM2-135M, two examples, task `largest`).

    student   Q: 12, 45, 78, 33      teacher   Q: 12, 45, 78, 33
              A: 78                            Feedback: The correct answer is 78.
                                               A: 78

              Q: 51, 76, 16, 67                Q: 51, 76, 16, 67
              A:                               Feedback: The correct answer is 76.
                                               A:

A correction does not depend on the rollout, nor does what `siblings` shows: credit_span="future" assumes that. A trace
and a critique are computed from it, and then the whole sequence's cost is the exact credit (credit_span="sequence"). A
prompt over the limit loses the end of the feedback first, then of the demonstration, never the question or the header;
what still does not fit, or has nothing left that the student has not read, is no prompt at all and is counted by the
caller.

Left out: multi-line answers in the "examples" format, whose answers end with the line.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from distil_kernels.train.tasks import Feedback, Problem, Task

Verifier = Callable[[Task, Problem, str], Feedback]

KINDS = ("correction", "trace", "both", "siblings", "self_evaluation")
JUDGE = "Is this answer right? Say yes or no, and what the correct answer is."


def verifier(kind: str) -> Verifier:
    """What says something about an answer: one of KINDS, or a function of the user's by `module:function`.

    correction       the expert's answer; does not depend on the rollout
    trace            what happened to the answer (tasks whose answers are run); computed from the rollout
    siblings         what a right answer says to others; `siblings` hands it to them
    self_evaluation  what a critique of a right answer says, for worked examples; `critique` asks the model of others
    function         called with (problem, answer); returns a Feedback, or a score and a text

    Raises:
        ValueError: the path does not name a function. What comes of it raises one too where it gives anything else, and
            a RuntimeError where it raises.
    """
    if kind in KINDS:
        return dict(zip(KINDS, (correct, trace, both, shown, affirmed), strict=True))[kind]
    module, _, name = kind.partition(":")
    try:
        function = getattr(importlib.import_module(module), name) if name else None
    except (ImportError, AttributeError) as error:
        raise ValueError(f"[feedback] cannot import {kind!r}: {error}") from error
    if not callable(function):
        raise ValueError(f"[feedback] expected one of {', '.join(KINDS)}, or module:function, got {kind!r}")

    def by_user(task: Task, problem: Problem, answer: str) -> Feedback:
        try:
            found = function(problem, answer)
        except Exception as error:  # of any kind: main takes a ValueError for a wrong option
            raise RuntimeError(f"[feedback] {kind} raised {type(error).__name__}: {error}") from error
        try:
            score, text, demonstration = found if len(found) == 3 else (*found, problem.answer)
            score = float(score)
        except (TypeError, ValueError):
            score = math.nan
        if not (isinstance(found, tuple) and 0.0 <= score <= 1.0):
            raise ValueError(
                f"[feedback] {kind} gave {found!r}, expected (score from 0 to 1, text) or "
                "distil_kernels.train.tasks.Feedback(score from 0 to 1, text, demonstration)"
            )
        return Feedback(score, str(text), str(demonstration))

    return by_user


def correct(task: Task, problem: Problem, answer: str) -> Feedback:
    """Scores an answer and corrects it."""
    if not problem.answer:
        raise ValueError("[feedback] a record has no expert's answer to correct with: expected --feedback trace")
    return _correction(task.score(answer.strip(), problem.entry), problem.answer)


def shown(task: Task, problem: Problem, answer: str) -> Feedback:
    """Scores an answer, and where it is right makes it the correction of others."""
    score = task.score(answer.strip(), problem.entry)
    return _correction(score, answer.strip()) if score >= 1.0 else Feedback(score, "", "")


def affirmed(task: Task, problem: Problem, answer: str) -> Feedback:
    """Scores an answer, and says so where it is right."""
    score = task.score(answer.strip(), problem.entry)
    return Feedback(score, _verdict(answer.strip(), answer.strip()) if score >= 1.0 else "", "")


def _verdict(answer: str, right: str) -> str:
    return f"{'Yes' if answer == right else 'No'}, the correct answer is {right}."


def _correction(score: float, right: str) -> Feedback:
    return Feedback(score, f"The correct answer is {right}.", right)


def trace(task: Task, problem: Problem, answer: str) -> Feedback:
    """Runs an answer and says what happened."""
    run = getattr(task, "trace", None)
    if run is None:
        raise ValueError("[feedback] answers of this task are not run: expected correction, got trace")
    score, text = run(answer.strip(), problem.entry)
    return Feedback(score, text, "")


def both(task: Task, problem: Problem, answer: str) -> Feedback:
    """What happened, then the expert's answer where it is known."""
    score, text, _ = trace(task, problem, answer)
    known = f"\nThe correct answer is {problem.answer}." if problem.answer else ""
    return Feedback(score, text + known, problem.answer)


class _Turn(NamedTuple):
    question: str
    text: str
    answer: str | None


TOOL_EXAMPLE = _Turn(
    "17 * 23? (Python gives the value of <tool>EXPRESSION</tool>.)", "", "<tool>17 * 23</tool> <result>391</result> 391"
)
_CALLS = re.compile(r"<(tool|result)>.*?</\1>", re.DOTALL)


class Prompts:
    """Builds prompts as token ids.

    Args:
        examples: problems worked before the question, in both prompts, with the feedback to their right answers.
        layout: "examples" for `Q: ... A: ...` text, "chat" for the tokenizer's chat template.
        reads: "text", "demonstration" or "both": what the teacher is shown of the feedback.
        max_tokens: length limit of a prompt.
        end_ids: tokens that end any answer of this model.
        tool: whether the prompts show how to call `tools.Python`, whose calls are no part of an answer.
        chat_options: what the chat template is given beside the messages.

    Raises:
        ValueError: the layout does not suit the tokenizer, the model or the task's answers.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[tuple[Problem, Feedback]],
        layout: str = "examples",
        reads: str = "text",
        max_tokens: int = 1024,
        end_ids: Sequence[int] = (),
        tool: bool = False,
        chat_options: Mapping[str, Any] | None = None,
    ) -> None:
        if layout == "chat" and not tokenizer.chat_template:
            raise ValueError("[layout] this tokenizer has no chat template: use layout examples")
        self._tokenizer = tokenizer
        self._layout, self._max_tokens, self._end_ids = layout, max_tokens, end_ids
        self._reads_text, self._reads_demonstration = reads in ("text", "both"), reads in ("demonstration", "both")
        self._tool, self._chat_options = tool, chat_options or {}
        shown = [TOOL_EXAMPLE] if tool else []
        self._plain = [*shown, *(_Turn(problem.question, "", problem.answer) for problem, _ in examples)]
        self._corrected = shown + [
            turn
            for problem, feedback in examples
            for turn in self._turns(problem.question, feedback.text, feedback.demonstration, problem.answer)
        ]
        # Every second answer is the example's before it, so that a model sees both verdicts.
        judged = [(problem, examples[index - index % 2][0].answer) for index, (problem, _) in enumerate(examples)]
        self._judged = [(problem.question, shown, _verdict(shown, problem.answer)) for problem, shown in judged]

    def student(self, problem: Problem) -> list[int] | None:
        """The prompt that rollouts continue; None when it is over the limit."""
        if self._layout == "examples" and "\n" in problem.answer.strip():
            raise ValueError("[layout] answers of this task have several lines, which layout examples cuts: use chat")
        ids = self._render([*self._plain, _Turn(problem.question, "", None)])
        return ids if len(ids) <= self._max_tokens else None

    def teacher(self, problem: Problem, feedback: Feedback) -> list[int] | None:
        """The prompt of the model that has read the correction; None when no part of it fits."""
        text = feedback.text if self._reads_text else ""
        demonstration = feedback.demonstration if self._reads_demonstration else ""
        while text or demonstration:
            ids = self._render([*self._corrected, *self._turns(problem.question, text, demonstration, None)])
            excess = len(ids) - self._max_tokens
            if excess <= 0:
                return ids
            if text:
                text = self._without_end(text, excess)
            else:
                demonstration = self._without_end(demonstration, excess)
        return None

    def critic(self, problem: Problem, answer: str) -> list[int] | None:
        """What a model reads to judge an answer, after the worked examples judged; None when it is over the limit."""
        judged = [*self._judged, (problem.question, answer.strip(), None)]
        if self._layout == "chat":
            ids = self._render([turn for q, a, said in judged for turn in (_Turn(q, "", a), _Turn(JUDGE, "", said))])
        else:
            blocks = (f"Q: {q}\nA: {a}\nFeedback:" + (f" {said}\n\n" if said else "") for q, a, said in judged)
            ids = self._tokenizer("".join(blocks)).input_ids
        return ids if len(ids) <= self._max_tokens else None

    def fits(self, problem: Problem, known: Feedback) -> bool:
        """Whether the teacher can read some of what is `known` before any answer; nothing known always fits."""
        return not (known.text or known.demonstration) or self.teacher(problem, known) is not None

    def cuts(self, problem: Problem, feedback: Feedback) -> bool:
        """Whether `teacher` has to shorten this correction."""
        shown = self._turns(problem.question, feedback.text, feedback.demonstration, None)
        return len(self._render([*self._corrected, *shown])) > self._max_tokens

    def stop_ids(self) -> list[int]:
        """Tokens that end an answer; they are part of the completion."""
        stops = set(self._end_ids)
        if self._layout == "examples":
            texts = self._tokenizer.batch_decode([[token] for token in range(len(self._tokenizer))])
            stops |= {token for token, text in enumerate(texts) if "\n" in text}
        if not stops:
            raise ValueError("[model] neither tokenizer nor generation config names a token that ends an answer")
        return sorted(stops)

    def answer(self, completion: list[int]) -> str:
        """The text of a completion that a verifier reads."""
        text = str(self._tokenizer.decode(completion, skip_special_tokens=True))
        text = text.split("\n")[0] if self._layout == "examples" else text
        return _CALLS.sub("", text) if self._tool else text

    def written(self, answer: str) -> list[int]:
        """An answer as the tokens that a completion of a prompt begins with, without its end."""
        text = f" {answer}" if self._layout == "examples" else answer
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def _turns(self, question: str, text: str, demonstration: str, answer: str | None) -> list[_Turn]:
        before = [_Turn(question, "", demonstration)] if demonstration and self._reads_demonstration else []
        return [*before, _Turn(question, text if self._reads_text else "", answer)]

    def _render(self, turns: Sequence[_Turn]) -> list[int]:
        """Token ids of turns of which the last is to be answered."""
        if self._layout == "chat":
            messages = []
            for question, text, answer in turns:
                messages.append({"role": "user", "content": f"{question}\n{text}" if text else question})
                if answer is not None:
                    messages.append({"role": "assistant", "content": answer})
            rendered = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self._chat_options
            )
            return self._tokenizer(rendered, add_special_tokens=False).input_ids
        blocks = []
        for question, text, answer in turns:
            hint = f"Feedback: {text}\n" if text else ""
            blocks.append(f"Q: {question}\n{hint}A:" + ("" if answer is None else f" {answer}\n\n"))
        return self._tokenizer("".join(blocks)).input_ids

    def _without_end(self, text: str, num_tokens: int) -> str:
        ids = self._tokenizer(text, add_special_tokens=False).input_ids
        shorter = str(self._tokenizer.decode(ids[: max(0, len(ids) - num_tokens)]))
        return shorter if len(shorter) < len(text) else text[:-1]
