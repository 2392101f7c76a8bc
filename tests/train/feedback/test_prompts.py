"""Prompts: what the student and its teacher read, and what is cut when it is too long."""

from __future__ import annotations

import pytest
from tiny import CHAT, byte_tokenizer

from distil_kernels.train.config import Config
from distil_kernels.train.feedback.prompts import Example, Prompts
from distil_kernels.train.tasks import Feedback, Problem

TOKENIZER = byte_tokenizer()
EXAMPLE = Problem("1, 2", "2", "2", "")
PROBLEM = Problem("3, 9", "9", "9", "")
FEEDBACK = Feedback(0.0, "The correct answer is 9.", "9")
EXAMPLES = [Example(EXAMPLE, Feedback(1.0, "The correct answer is 2.", "2"))]


def text(ids: list[int] | None) -> str:
    assert ids is not None
    return TOKENIZER.decode(ids)


def test_the_teacher_reads_the_correction_and_the_student_does_not() -> None:
    prompts = Prompts(TOKENIZER, EXAMPLES, end_ids=[0])
    assert text(prompts.student(PROBLEM)) == "Q: 1, 2\nA: 2\n\nQ: 3, 9\nA:"
    hint = "Feedback: The correct answer is"
    assert text(prompts.teacher(PROBLEM, FEEDBACK)) == f"Q: 1, 2\n{hint} 2.\nA: 2\n\nQ: 3, 9\n{hint} 9.\nA:"
    shown = Prompts(TOKENIZER, EXAMPLES, reads="demonstration", end_ids=[0])
    expected = "Q: 1, 2\nA: 2\n\n" * 2 + "Q: 3, 9\nA: 9\n\nQ: 3, 9\nA:"
    assert text(shown.teacher(PROBLEM, FEEDBACK)) == expected


def test_chat_layout_uses_the_models_template() -> None:
    prompts = Prompts(TOKENIZER, EXAMPLES, layout="chat", reads="both", end_ids=[0])
    assert text(prompts.student(PROBLEM)) == "<user>1, 2\n<assistant>2\n<user>3, 9\n<assistant>"
    taught = text(prompts.teacher(PROBLEM, FEEDBACK))
    assert taught.endswith("<user>3, 9\n<assistant>9\n<user>3, 9\nThe correct answer is 9.\n<assistant>")


def test_a_chat_template_is_given_its_options() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT + "{% if enable_thinking is false %}</think>{% endif %}"
    options = Config(layout="chat", chat_template_kwargs='{"enable_thinking": false}').chat_options()
    prompts = Prompts(tokenizer, [], layout="chat", end_ids=[0], chat_options=options)
    assert text(prompts.student(PROBLEM)) == "<user>3, 9\n<assistant></think>"
    assert text(Prompts(tokenizer, [], layout="chat", end_ids=[0]).student(PROBLEM)) == "<user>3, 9\n<assistant>"


def test_the_teacher_may_have_other_options() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT + "{% if enable_thinking is false %}</think>{% endif %}"
    config = Config(layout="chat", teacher_chat_template_kwargs='{"enable_thinking": false}')
    prompts = Prompts(tokenizer, [], layout="chat", end_ids=[0], chat_options=config.chat_options(),
                      teacher_chat_options=config.teacher_chat_options())  # fmt: skip
    assert text(prompts.student(PROBLEM)) == "<user>3, 9\n<assistant>"
    assert text(prompts.teacher(PROBLEM, FEEDBACK)).endswith("<assistant></think>")
    assert Config(layout="chat", chat_template_kwargs='{"a": 1}').teacher_chat_options() == {"a": 1}


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("<think>3 < 9</think> 9", "9"),
        ("3 < 9</think>\n9", "9"),  # the prompt has opened it
        ("It is <think>3?\nNo.</think>9 <think>sure</think>.", "It is 9 ."),
        ("9", "9"),
        ("<think>9</think>", "<think>9</think>"),  # nothing else is left
        ("<think>9", "<think>9"),
    ],
)
def test_reasoning_is_no_demonstration(answer: str, read: str) -> None:
    tags = Config().tags_of_reasoning()
    prompts = Prompts(TOKENIZER, [], layout="chat", reads="both", end_ids=[0], reasoning_tags=tags)
    feedback = Feedback(1.0, f"The correct answer is {answer}.", answer)
    found = text(prompts.teacher(PROBLEM, feedback))
    assert found.startswith(f"<user>3, 9\n<assistant>{read}\n<user>3, 9\n") and "<think>3" not in found
    kept = Prompts(TOKENIZER, [], layout="chat", reads="demonstration", end_ids=[0])
    assert text(kept.teacher(PROBLEM, feedback)).startswith(f"<user>3, 9\n<assistant>{answer}\n")


def test_tags_are_two(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"\[reasoning_tags\] expected two tags .* got '<think>'"):
        Config(reasoning_tags="<think>").check()
    assert Config(reasoning_tags="").tags_of_reasoning() is None


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        ("{{ raise_exception('no user here') }}", {}, r"\[layout\] .* makes no prompt of a question: .*no user here"),
        ("{% for m in messages %}{{ m.text }}{% endfor %}", {}, r"\[layout\] .* leaves out the question"),
        ("{% for m in messages %}{{ m.content[:15] }}{% endfor %}", {}, r"\[layout\] .* leaves out the feedback"),
        (CHAT, {"messages": []}, r"\[chat_template_kwargs\] .* the question|makes no prompt"),
        ("{{ messages[0].content + 1 }}", {}, r"makes no prompt of a question: TypeError"),
    ],
)
def test_a_template_that_makes_no_prompt_is_found_before_the_run(
    template: str, options: dict[str, object], message: str
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message) as refused:
        Prompts(tokenizer, [], layout="chat", end_ids=[0], chat_options=options)
    assert "\n" not in str(refused.value)


def test_chat_options_that_cannot_be_are_errors() -> None:
    for settings in ({"layout": "chat", "chat_template_kwargs": "thinking"}, {"chat_template_kwargs": '{"a": 1}'}):
        with pytest.raises(ValueError, match=r"\[chat_template_kwargs\]"):
            Config(**settings).check()


def test_too_long_feedback_goes_first_then_the_demonstration_never_the_question() -> None:
    def taught(limit: int) -> list[int] | None:
        return Prompts(TOKENIZER, [], reads="both", max_tokens=limit).teacher(PROBLEM, FEEDBACK)

    whole = "Q: 3, 9\nA: 9\n\nQ: 3, 9\nFeedback: The correct answer is 9.\nA:"
    assert text(taught(len(whole))) == whole
    assert text(taught(len(whole) - 3)) == whole.replace(" 9.\n", "\n")
    without_feedback = "Q: 3, 9\nA: 9\n\nQ: 3, 9\nA:"
    assert text(taught(len(without_feedback))) == without_feedback
    assert taught(len(without_feedback) - 1) is None  # nothing left that the student has not read
    for limit in (len(without_feedback), len(whole) - 1, len(whole), len(whole) + 1):
        prompts = Prompts(TOKENIZER, [], reads="both", max_tokens=limit)
        assert prompts.shortens(PROBLEM, FEEDBACK) == (limit < len(whole))
    for limit in range(len(without_feedback), len(whole)):
        shown = text(taught(limit))
        assert len(shown) <= limit and shown.endswith("\nA:") and shown.count("Q: 3, 9") == 2
    assert Prompts(TOKENIZER, [], max_tokens=9).student(PROBLEM) is None
    assert Prompts(TOKENIZER, [], max_tokens=10).student(PROBLEM) is not None


def test_every_token_with_a_line_break_ends_an_answer() -> None:
    line_break = TOKENIZER("\n").input_ids
    assert Prompts(TOKENIZER, [], end_ids=[0, 7]).stop_ids() == sorted([0, 7, *line_break])
    assert Prompts(TOKENIZER, [], layout="chat", end_ids=[7]).stop_ids() == [7]
    with pytest.raises(ValueError, match="ends an answer"):
        Prompts(TOKENIZER, [], layout="chat").stop_ids()
    assert Prompts(TOKENIZER, []).answer(TOKENIZER(" 12\nQ:").input_ids) == " 12"


def test_layouts_that_do_not_suit_are_errors() -> None:
    with pytest.raises(ValueError, match="several lines"):
        Prompts(TOKENIZER, []).student(Problem("?", "1\n2", None, ""))
    plain = byte_tokenizer()
    plain.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        Prompts(plain, [], layout="chat")
