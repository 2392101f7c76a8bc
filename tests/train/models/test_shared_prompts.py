"""Prompts read once: how often, and samples behind them (states and gradients: test_reading)."""

from __future__ import annotations

import pytest
from reading_cases import PROMPTS, ROWS, make

from distil_kernels.train.models.reading import reader
from distil_kernels.train.models.shared_prompts import common_prefix, read
from distil_kernels.train.rollouts.sampling import Sampling, generate


@pytest.mark.parametrize("kind", ["llama", "learnt positions"])
def test_greedy_rollouts_equal_whole_rows(kind: str) -> None:
    lm = make(kind)
    sampling = Sampling(max_new_tokens=8, stop_ids=[0], temperature=0.0)
    shared = generate(reader(lm, "shared"), PROMPTS, ROWS, sampling)
    assert shared == generate(reader(lm, "padded"), PROMPTS, ROWS, sampling)
    assert shared[0] == shared[1] == shared[6]


def test_each_prompt_is_read_once() -> None:
    lm = make("llama")
    seen: list[int] = []
    handle = lm.body.embed_tokens.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].numel()))
    read(lm, PROMPTS, ROWS)
    handle.remove()
    assert seen == [3, 3 * 4]  # the shared start, then three rests padded to the longest


def test_common_prefix_leaves_every_prompt_its_last_token() -> None:
    assert common_prefix(PROMPTS) == 3
    assert common_prefix([[1, 2, 3], [1, 2, 3]]) == 2
    assert common_prefix([[1], [1, 2]]) == 0
    assert common_prefix([[1, 2], [3, 2]]) == 0
