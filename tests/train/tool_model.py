"""A tiny model that calls the Python tool where its prompt says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import byte_tokenizer, llama_config
from transformers import AutoModelForCausalLM

from distil_kernels.hf import split
from distil_kernels.train.environments.python import Python
from distil_kernels.train.feedback.prompts import Prompts
from distil_kernels.train.models.reading import Reader, reader
from distil_kernels.train.rollouts.episodes import Episode, Episodes, Texts
from distil_kernels.train.tasks import Problem, make_task

TOKENIZER = byte_tokenizer()


KNOWN = {
    "a:": "<tool>6*7</tool> <result>42</result> 42\n",
    "b:": "13\n",
    "c:": "<tool>2**99</tool> <result>633</result> big\n",
    "d:": "<tool>1</tool> <result>1</result><tool>2</tool> <result>2</result><tool>3</tool> <result>3</result> x\n",
}


STOP = Prompts(TOKENIZER, []).stop_ids()


def ids(text: str) -> list[int]:
    return TOKENIZER(text).input_ids


def python(max_calls: int, max_tokens: int) -> Episodes:
    """The tool as an environment."""
    prompts = Prompts(TOKENIZER, [])
    return Episodes(Python, "python", Texts(prompts.answer, ids, Python.frame), max_calls, max_tokens)


def started(episodes: Episodes, count: int) -> list[Episode]:
    return [episodes.start(Problem("", "", None, ""), "") for _ in range(count)]


def shown(tokens: list[int], written: list[bool]) -> str:
    """What was put in stands in brackets."""
    text, inside = "", False
    for token, own in zip([*tokens, None], [*written, True], strict=True):
        text += ("]" if own else "[") if inside == own else ""
        inside = not own
        text += TOKENIZER.decode([token]) if token is not None else ""
    return text


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Knows KNOWN by heart, and answers half of the problems of a task by a call."""
    torch.manual_seed(0)
    prompts, task = Prompts(TOKENIZER, [], shown=Python.example), make_task("largest", 5)
    pairs = [(ids(prompt), ids(answer)) for prompt, answer in KNOWN.items()]
    for index in range(6):
        answer = " 42\n" if index % 2 else " <tool>6*7</tool> <result>42</result> 42\n"
        pairs.append((prompts.student(task.problem(index)), ids(answer)))
    width = max(len(prompt) + len(answer) for prompt, answer in pairs)
    gaps = [width - len(prompt) - len(answer) for prompt, answer in pairs]
    tokens = torch.tensor([p + a + [0] * gap for (p, a), gap in zip(pairs, gaps, strict=True)])
    labels = torch.tensor([[-100] * len(p) + a + [-100] * gap for (p, a), gap in zip(pairs, gaps, strict=True)])
    model = AutoModelForCausalLM.from_config(llama_config(initializer_range=0.05))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(150):
        model(tokens, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    directory = tmp_path_factory.mktemp("caller")
    model.save_pretrained(directory)
    TOKENIZER.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def lm(caller: Path) -> Reader:
    return reader(split(AutoModelForCausalLM.from_pretrained(caller).eval()))
