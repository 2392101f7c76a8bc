"""Rollouts come from the model's own distribution and keep the token that stopped them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import llama_config
from transformers import AutoModelForCausalLM

from distil_kernels.hf import split
from distil_kernels.train.models.reading import Reader, reader
from distil_kernels.train.rollouts.sampling import Sampling, generate


@pytest.fixture(scope="module")
def lm() -> Reader:
    torch.manual_seed(0)
    return reader(split(AutoModelForCausalLM.from_config(llama_config(vocab_size=12, eos_token_id=0)).eval()))


@pytest.mark.parametrize("reading", ["shared", "padded"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_tokens_follow_the_softmax(lm: Reader, reading: str, temperature: float) -> None:
    # Defaults that a model may bring along, each of which would bend the distribution.
    lm.model.generation_config.top_k = 2
    lm.model.generation_config.top_p = 0.5
    lm.model.generation_config.min_p = 0.3
    lm.model.generation_config.repetition_penalty = 5.0
    before = lm.model.generation_config
    prompts = [[1, 2, 3], [1, 4]]
    count = 4000
    torch.manual_seed(1)
    prompt_index = [0] * count + [1] * count
    rollouts = generate(reader(lm, reading), prompts, prompt_index, Sampling(1, [0], temperature))
    assert lm.model.generation_config is before
    for index, prompt in enumerate(prompts):
        drawn = torch.tensor([rollout.tokens[0] for rollout in rollouts[index * count : (index + 1) * count]])
        frequency = torch.bincount(drawn, minlength=12) / count
        with torch.no_grad():
            probs = (lm.model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
        # Five standard errors of a frequency, plus one draw.
        assert ((frequency - probs).abs() < 5 * (probs * (1 - probs) / count).sqrt() + 1 / count).all()


def test_the_stop_token_is_kept_and_a_cut_rollout_has_none(lm: Reader) -> None:
    torch.manual_seed(0)
    stops = {0, 5, 7}
    done = [rollout.tokens for rollout in generate(lm, [[1, 2, 3]], [0] * 200, Sampling(6, sorted(stops)))]
    assert any(tokens[-1] not in stops for tokens in done) and any(tokens[-1] in stops for tokens in done)
    for tokens in done:
        assert not stops & set(tokens[:-1])
        assert tokens[-1] in stops or len(tokens) == 6
    assert {tokens[-1] for tokens in done} >= stops  # not the padding token alone


def test_temperature_zero_is_greedy(lm: Reader) -> None:
    rollouts = generate(lm, [[1, 2, 3]], [0, 0], Sampling(1, [0], temperature=0.0))
    with torch.no_grad():
        best = int(lm.model(torch.tensor([[1, 2, 3]])).logits[0, -1].argmax())
    assert [rollout.tokens for rollout in rollouts] == [[best], [best]]


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.0}])
def test_rows_that_leave_change_no_token_of_the_others(lm: Reader, options: dict[str, float]) -> None:
    """The tokens are those of transformers' generate, which keeps finished rows in the batch."""
    sampling = Sampling(**{"max_new_tokens": 9, "stop_ids": [0, 5], "temperature": 0.7, **options})
    prompts, prompt_index = [[1, 2, 3], [1, 4], [7]], [0, 1, 2] * 8
    completions = []
    for way in ("shared", "padded"):
        torch.manual_seed(4)
        rollouts = generate(reader(lm, way), prompts, prompt_index, sampling, ends=lambda tokens: tokens[-2:] == [3, 3])
        completions.append([rollout.tokens for rollout in rollouts])
        completions.append([torch.rand(3).tolist()])  # the generator of what comes next
    assert completions[:2] == completions[2:]
    assert options.get("temperature") == 0.0 or len({len(tokens) for tokens in completions[0]}) > 4


def test_finished_rows_are_not_read(lm: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    hidden = type(lm).hidden
    monkeypatch.setattr(
        type(lm), "hidden", lambda self, ids, **options: sizes.append(len(ids)) or hidden(self, ids, **options)
    )
    torch.manual_seed(0)
    rollouts = generate(reader(lm, "shared"), [[1, 2, 3]], [0] * 50, Sampling(8, [0, 5]))
    lengths = [len(rollout.tokens) for rollout in rollouts]
    steps = sizes[-max(lengths) :]
    assert steps == [sum(length > step for length in lengths) for step in range(max(lengths))]
    assert steps[-1] < steps[0] == 50


@pytest.mark.parametrize("way", ["shared", "padded"])
def test_greedy_rows_among_sampled_ones(lm: Reader, way: str) -> None:
    """Each is what it is without the others."""
    prompts, sampling = [[1, 2, 3], [1, 4]], Sampling(6, [0, 5])
    torch.manual_seed(3)
    sampled = [rollout.tokens for rollout in generate(reader(lm, way), prompts, [0, 0, 1, 1], sampling)]
    greedy = [
        rollout.tokens for rollout in generate(reader(lm, way), prompts, [0, 1], replace(sampling, temperature=0))
    ]
    torch.manual_seed(3)
    mixed = replace(sampling, greedy_rows=range(0, 9, 3))
    together = [rollout.tokens for rollout in generate(reader(lm, way), prompts, [0, 0, 0, 1, 1, 1], mixed)]
    assert together == [greedy[0], *sampled[:2], greedy[1], *sampled[2:]]


def test_weights_that_are_no_numbers_end_the_run_in_words() -> None:
    model = AutoModelForCausalLM.from_config(llama_config(vocab_size=12, eos_token_id=0)).eval()
    lm = reader(split(model), "shared")
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(FloatingPointError, match="weights have diverged"):
        generate(lm, [[1, 2, 3]], [0], Sampling(1, [0]))
