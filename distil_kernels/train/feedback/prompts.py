"""The prompts of the student and its teacher, as token ids.

The student reads worked examples and the question. The teacher reads the feedback too: in words ("text"), as the same
question answered once before ("demonstration"), or both. Its examples carry the feedback to their right answers, which
shows a small model what feedback is for: accuracy with the correction .81, against .40 for a demonstration after plain
examples (SmolLM2-135M, two examples, task `largest`).

    student   Q: 12, 45, 78, 33      teacher   Q: 12, 45, 78, 33
              A: 78                            Feedback: The correct answer is 78.
                                               A: 78

              Q: 51, 76, 16, 67                Q: 51, 76, 16, 67
              A:                               Feedback: The correct answer is 76.
                                               A:

A prompt over the limit loses the end of the feedback first, then of the demonstration, never the question or the
header. If it does not fit then, or if no feedback is left, there is no prompt.

Left out: answers of several lines in the "examples" format, whose answers end with the line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from distil_kernels.train.environments import Turn
from distil_kernels.train.feedback.kinds import verdict
from distil_kernels.train.rollouts.sampling import until_stop
from distil_kernels.train.tasks import Feedback, Problem

JUDGE = "Is this answer right? Say yes or no, and what the correct answer is."


class _Turn(NamedTuple):
    """A question, the feedback to read with it, and its answer; the answer of the last turn is None."""

    question: str
    text: str
    answer: str | None


class Example(NamedTuple):
    """A problem worked before the question."""

    problem: Problem
    feedback: Feedback
    """To its right answer."""
    turns: Sequence[Turn] = ()
    """Of an episode that ends with the answer; empty where the problem's answer is the only one."""


class Prompts:
    """Builds prompts as token ids, and reads answers from completions.

    Args:
        examples: problems worked before the question, in both prompts; the teacher reads their feedback too.
        layout: "examples" for `Q: ... A: ...` text, "chat" for the tokenizer's chat template.
        reads: "text", "demonstration" or "both": the parts of the feedback that the teacher reads.
        max_tokens: length limit of a prompt.
        end_ids: tokens that end any answer of this model.
        shown: a question and its answer that prompts begin with, without feedback.
        chat_options: further arguments of the chat template.
        teacher_chat_options: those for the teacher; None for the same.
        reasoning_tags: what a model's reasoning begins and ends with; it is left out of what the teacher reads. None
            for no such tags.

    Raises:
        ValueError: the layout does not suit the tokenizer, the model or the task's answers.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        layout: str = "examples",
        reads: str = "text",
        max_tokens: int = 1024,
        end_ids: Sequence[int] = (),
        shown: tuple[str, str] | None = None,
        chat_options: Mapping[str, Any] | None = None,
        teacher_chat_options: Mapping[str, Any] | None = None,
        reasoning_tags: tuple[str, str] | None = None,
    ) -> None:
        if layout == "chat" and not tokenizer.chat_template:
            raise ValueError("[layout] this tokenizer has no chat template: use layout examples")
        self._tokenizer = tokenizer
        self._layout, self._max_tokens, self._end_ids = layout, max_tokens, end_ids
        self._reads_text, self._reads_demonstration = reads in ("text", "both"), reads in ("demonstration", "both")
        self._chat_options = chat_options or {}
        self._teacher_chat_options = self._chat_options if teacher_chat_options is None else teacher_chat_options
        self._reasoning = None if reasoning_tags is None else _reasoning(*reasoning_tags)
        first = [_Turn(shown[0], "", shown[1])] if shown else []
        self._plain, self._with_feedback = list(first), list(first)
        for example in examples:
            question, feedback, (answer, later) = example.problem.question, example.feedback, _answers(example)
            self._plain += [_Turn(question, "", answer), *later]
            self._with_feedback += [*self._turns(question, feedback.text, feedback.demonstration, answer), *later]
        # Every second answer is that of the example before it, so that a model sees both verdicts.
        judged = [(problem, examples[index - index % 2].problem.answer) for index, (problem, *_) in enumerate(examples)]
        self._judged = [(problem.question, answer, verdict(answer, problem.answer)) for problem, answer in judged]
        if layout == "chat":
            self._check_template()

    def _check_template(self) -> None:
        """Raises ValueError if the chat template fails, or leaves out a part of what a prompt has to say."""
        option = "chat_template_kwargs" if self._chat_options or self._teacher_chat_options else "layout"
        parts = {name: f"DISTIL {name.upper()}" for name in ("question", "feedback", "demonstration")}
        teacher = self._turns(parts["question"], parts["feedback"], parts["demonstration"], None)
        parts = {name: text for name, text in parts.items() if any(text in turn for turn in teacher)}
        try:
            by_student = self._chat([*self._plain, _Turn(parts["question"], "", None)], self._chat_options)
            by_teacher = self._chat([*self._with_feedback, *teacher], self._teacher_chat_options)
        except Exception as error:  # a template is a program
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(f"[{option}] the chat template makes no prompt of a question: {reason}") from error
        lost = [name for name, text in parts.items() if text not in by_teacher]
        if lost or parts["question"] not in by_student:
            expected = "expected a prompt with the texts of its messages"
            raise ValueError(f"[{option}] the chat template leaves out the {(lost or ['question'])[0]}: {expected}")

    def student(self, problem: Problem) -> list[int] | None:
        """The prompt that rollouts continue; None if it is over the limit."""
        if self._layout == "examples" and "\n" in problem.answer.strip():
            raise ValueError("[layout] answers of this task have several lines, which layout examples cuts: use chat")
        ids = self._render([*self._plain, _Turn(problem.question, "", None)], self._chat_options)
        return ids if len(ids) <= self._max_tokens else None

    def teacher(self, problem: Problem, feedback: Feedback) -> list[int] | None:
        """The teacher's prompt; None if no part of the feedback is left or fits."""
        text = self._without_reasoning(feedback.text) if self._reads_text else ""
        demonstration = self._without_reasoning(feedback.demonstration) if self._reads_demonstration else ""
        while text or demonstration:
            turns = self._turns(problem.question, text, demonstration, None)
            ids = self._render([*self._with_feedback, *turns], self._teacher_chat_options)
            excess = len(ids) - self._max_tokens
            if excess <= 0:
                return ids
            if text:
                text = self._without_end(text, excess)
            else:
                demonstration = self._without_end(demonstration, excess)
        return None

    def critic(self, problem: Problem, answer: str) -> list[int] | None:
        """The prompt of a model that judges an answer, after judged examples; None if it is over the limit."""
        judged = [*self._judged, (problem.question, answer.strip(), None)]
        if self._layout == "chat":
            turns = [turn for q, a, text in judged for turn in (_Turn(q, "", a), _Turn(JUDGE, "", text))]
            ids = self._render(turns, self._chat_options)
        else:
            blocks = (f"Q: {q}\nA: {a}\nFeedback:" + (f" {text}\n\n" if text else "") for q, a, text in judged)
            ids = self._tokenizer("".join(blocks)).input_ids
        return ids if len(ids) <= self._max_tokens else None

    def fits(self, problem: Problem, known: Feedback) -> bool:
        """True if the teacher can read a part of feedback that is `known` before any answer, or if nothing is known."""
        return not (known.text or known.demonstration) or self.teacher(problem, known) is not None

    def shortens(self, problem: Problem, feedback: Feedback) -> bool:
        """Tells if the feedback has to be shortened to fit in the teacher's prompt."""
        text, demonstration = map(self._without_reasoning, (feedback.text, feedback.demonstration))
        turns = self._turns(problem.question, text, demonstration, None)
        return len(self._render([*self._with_feedback, *turns], self._teacher_chat_options)) > self._max_tokens

    def stop_ids(self) -> list[int]:
        """The tokens that end an answer; they are part of the completion."""
        stops = set(self._end_ids)
        if self._layout == "examples":
            texts = self._tokenizer.batch_decode([[token] for token in range(len(self._tokenizer))])
            stops |= {token for token, text in enumerate(texts) if "\n" in text}
        if not stops:
            raise ValueError("[model] neither tokenizer nor generation config names a token that ends an answer")
        return sorted(stops)

    def answer(self, completion: Sequence[int]) -> str:
        """The text of a completion that a verifier reads."""
        text = str(self._tokenizer.decode(list(completion), skip_special_tokens=True))
        return text.split("\n")[0] if self._layout == "examples" else text

    def ids(self, text: str) -> list[int]:
        """The tokens of a text."""
        return self._tokenizer(text, add_special_tokens=False).input_ids

    def frame(self, stop_ids: Sequence[int]) -> tuple[str, str]:
        """What stands before and after an observation that is the next question of a rollout.

        Raises:
            ValueError: the chat template leaves an answer or a question out.
        """
        if self._layout == "examples":
            return "Q: ", "\nA:"
        marks = "DISTIL ANSWER", "DISTIL OBSERVATION"
        text = self._chat([_Turn("?", "", marks[0]), _Turn(marks[1], "", None)], self._chat_options)
        if any(text.count(mark) != 1 for mark in marks):
            raise ValueError("[layout] the chat template leaves out an answer before a question, or repeats it")
        before, after = text.partition(marks[0])[2].split(marks[1])
        # The model has written the token that ends its answer.
        end = self.ids(before)[:1]
        if end and end[0] in stop_ids:
            before = before.removeprefix(str(self._tokenizer.decode(end)))
        return before, after

    def answer_tokens(self, answer: str) -> list[int]:
        """The tokens of a completion with this answer, without its stop token."""
        text = f" {answer}" if self._layout == "examples" else answer
        return self.ids(text)

    def completion(self, answer: str, stop_ids: Sequence[int]) -> list[int]:
        """The tokens of a completion with this answer, with the stop token that a model would end it by."""
        if self._layout == "examples":
            tokens = self.ids(f" {answer}\n\n")
        else:
            end = self._tokenizer.eos_token_id
            tokens = [*self.answer_tokens(answer), end if end in stop_ids else stop_ids[0]]
        return until_stop(tokens, set(stop_ids))

    def _turns(self, question: str, text: str, demonstration: str, answer: str | None) -> list[_Turn]:
        before = [_Turn(question, "", demonstration)] if demonstration and self._reads_demonstration else []
        return [*before, _Turn(question, text if self._reads_text else "", answer)]

    def _without_reasoning(self, text: str) -> str:
        """The text without what a model thought before it answered; all of it where nothing else is left."""
        shorter = text if self._reasoning is None else self._reasoning.sub("", text)
        return shorter if shorter.strip() else text

    def _render(self, turns: Sequence[_Turn], chat_options: Mapping[str, Any]) -> list[int]:
        """The token ids of some turns."""
        if self._layout == "chat":
            return self.ids(self._chat(turns, chat_options))
        blocks = []
        for question, text, answer in turns:
            hint = f"Feedback: {text}\n" if text else ""
            blocks.append(f"Q: {question}\n{hint}A:" + ("" if answer is None else f" {answer}\n\n"))
        return self._tokenizer("".join(blocks)).input_ids

    def _chat(self, turns: Sequence[_Turn], options: Mapping[str, Any]) -> str:
        """The text of some turns by the tokenizer's chat template."""
        messages = []
        for question, text, answer in turns:
            messages.append({"role": "user", "content": f"{question}\n{text}" if text else question})
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options))

    def _without_end(self, text: str, num_tokens: int) -> str:
        ids = self.ids(text)
        shorter = str(self._tokenizer.decode(ids[: max(0, len(ids) - num_tokens)]))
        return shorter if len(shorter) < len(text) else text[:-1]


def _answers(example: Example) -> tuple[str, list[_Turn]]:
    """The first answer of an example, and the turns after it, whose questions are what was observed."""
    if not example.turns:
        return example.problem.answer, []
    later = [_Turn(turn.observation, "", after.text) for turn, after in pairwise(example.turns)]
    return example.turns[0].text, later


def _reasoning(opening: str, closing: str) -> re.Pattern[str]:
    """A pattern of sections between two tags; the first may have been opened by the prompt."""
    first, last = re.escape(opening), re.escape(closing)
    return re.compile(rf"(?:{first}|\A)(?:(?!{first}).)*?{last}\s*", re.DOTALL)
