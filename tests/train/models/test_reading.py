"""Every way of reading rows gives the same hidden states and gradients; the choice reads the fewest tokens."""

from __future__ import annotations

import pytest
import torch
from reading_cases import COMPLETIONS, KINDS, PROMPTS, ROWS, make
from tiny import SMALL
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    MixtralConfig,
    OpenAIGPTConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
    Starcoder2Config,
)  # fmt: skip

from distil_kernels.hf import CausalLM, split
from distil_kernels.train.models import reading
from distil_kernels.train.models.reading import choose, reader
from distil_kernels.train.rollouts.sampling import Sampling, generate

SHARED = {"llama", "learnt positions", "parallel layers", "distances"}
PACKED = set(KINDS) - {"distances", "distances by key", "convolutions", "recurrent"}


def states_and_gradient(
    lm: CausalLM, way: str, prompts: list[list[int]], rows: list[int], completions: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = reader(lm, way).states(prompts, rows, completions)
    weight = torch.linspace(-1.0, 1.0, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    (hidden.sin() * weight).sum().backward()
    grads = [parameter.grad for parameter in lm.model.parameters() if parameter.grad is not None]
    lm.model.zero_grad(set_to_none=True)
    return hidden.detach(), torch.cat([grad.flatten() for grad in grads])


def by_hand(lm: CausalLM, prompts: list[list[int]], rows: list[int], completions: list[list[int]]) -> torch.Tensor:
    """Each row alone, through the model's own body."""
    parts = []
    for row, done in zip(rows, completions, strict=True):
        hidden = lm.body(torch.tensor([prompts[row] + done])).last_hidden_state
        parts.append(hidden[0, len(prompts[row]) - 1 : -1])
    return torch.cat(parts)


@pytest.mark.parametrize("limit", [8, 17, 1024])  # packs of one row (10 tokens are longer than it), two, all
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_gives_the_same(kind: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PACK_TOKENS", limit)
    lm = make(kind)
    able = {"padded": set(KINDS), "shared": SHARED, "packed": PACKED}
    assert list(reader(lm).ways) == [way for way in reading.WAYS if kind in able[way]]
    batches = [
        (PROMPTS, ROWS, COMPLETIONS),
        ([[1, 2], [3, 4], [5, 6]], ROWS, COMPLETIONS),
        ([[4], [5], [6]], ROWS, [[7]] * 7),  # rows of one token
        (PROMPTS[:1], [0], COMPLETIONS[:1]),
    ]
    for batch in batches:
        with torch.no_grad():
            wanted = by_hand(lm, *batch)
        expected = None
        for way in reader(lm).ways:
            hidden, grad = states_and_gradient(lm, way, *batch)
            # Norms and angles are float32 in some of the models.
            torch.testing.assert_close(hidden, wanted, rtol=1e-4, atol=1e-5, check_dtype=False)
            if expected is not None:
                torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5 * float(grad.abs().max()))
            expected = grad


@pytest.mark.parametrize(("kind", "way"), [("sliding window", "shared"), ("distances", "packed")])
def test_a_way_that_a_model_cannot_is_an_error(kind: str, way: str) -> None:
    with pytest.raises(ValueError, match=rf"\[reading\] .*ForCausalLM reads padded.*: got {way}, but"):
        reader(make(kind), way)


PLAIN = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT = {"vocab_size": 260, "n_embd": 32, "n_layer": 2, "n_head": 4}
WAYS_OF: dict[str, tuple[PretrainedConfig, set[str]]] = {
    "opt": (OPTConfig(**PLAIN, ffn_dim=48, word_embed_proj_dim=32, init_std=0.2), {"shared"}),
    "falcon": (FalconConfig(**PLAIN, initializer_range=0.2), {"shared", "packed"}),
    "falcon, distances": (FalconConfig(**PLAIN, initializer_range=0.2, alibi=True), {"shared"}),
    "neox": (GPTNeoXConfig(**PLAIN, intermediate_size=48, initializer_range=0.2), {"shared", "packed"}),
    "gptj": (GPTJConfig(**GPT, rotary_dim=8, initializer_range=0.2), {"shared", "packed"}),
    "phi3": (Phi3Config(**SMALL), {"shared", "packed"}),
    "qwen3": (Qwen3Config(**SMALL, head_dim=8), {"shared", "packed"}),
    "mixtral": (MixtralConfig(**SMALL, num_local_experts=4), {"shared", "packed"}),
    "gemma3": (Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=8), {"packed"}),
    "starcoder2": (Starcoder2Config(**SMALL, sliding_window=8), {"packed"}),
    "a window of 256": (
        GPTNeoConfig(
            vocab_size=260, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
            initializer_range=0.2,
        ),
        {"packed"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WAYS_OF)
def test_states_and_rollouts_behind_prompts_longer_than_a_window(kind: str) -> None:
    config, able = WAYS_OF[kind]
    torch.manual_seed(1)
    lm = reader(split(AutoModelForCausalLM.from_config(config).eval()))
    assert set(lm.ways) == {"padded", *able}
    with torch.autocast("cpu", torch.bfloat16):
        assert reader(lm).ways == lm.ways
    tokens = torch.randint(1, 260, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = [tokens, [*tokens[:270], 5, 6], tokens[:7]]
    rollouts = generate(lm, prompts, [0, 1, 2], Sampling(4, [0], temperature=0.0))
    done = [rollout.tokens for rollout in rollouts]
    with torch.no_grad():
        alone = by_hand(lm, prompts, [0, 1, 2], done)
        for way in lm.ways:
            found = reader(lm, way).states(prompts, [0, 1, 2], done)
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
        logits = lm.logits(alone)
    chosen = logits.gather(1, torch.tensor([token for own in done for token in own])[:, None])[:, 0]
    torch.testing.assert_close(chosen, logits.amax(1), rtol=1e-4, atol=1e-4)  # greedy


def test_a_model_without_a_cache_reads_padded_rows_alone() -> None:
    """The first GPT takes the argument of a cache and does not know it."""
    config = OpenAIGPTConfig(vocab_size=260, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    assert "shared" not in reader(split(AutoModelForCausalLM.from_config(config).eval())).ways


def test_the_trial_leaves_no_trace() -> None:
    config = GPT2Config(**GPT, initializer_range=0.2, resid_pdrop=0.5)
    model = AutoModelForCausalLM.from_config(config).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert reader(split(model)).ways == reading.WAYS
    assert [module.training for module in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)


def rows_of(lengths: list[int]) -> list[list[int]]:
    return [[1] * length for length in lengths]


def test_the_choice_is_what_reads_the_fewest_tokens() -> None:
    every = reading.WAYS
    # Short answers to one long prompt: 99 + 4 * 5 tokens against 4 * 104.
    prompt = [list(range(100))]
    assert choose(every, prompt, [0] * 4, rows_of([5] * 4)) == (
        "shared", "shared reads 119 tokens, padded 416, shared 119, packed 416",
    )  # fmt: skip
    # Answers of different lengths to short prompts: 2 + 2 * 90, 2 * 92, or 92 + 4.
    assert choose(every, [[1, 2, 3]], [0, 0], rows_of([90, 2])).way == "packed"
    # Without sharing, equal lengths need no pack; without packing, padding stays.
    assert choose(("padded", "packed"), prompt, [0] * 4, rows_of([5] * 4)).way == "padded"
    assert choose(("padded", "packed"), prompt, [0] * 4, rows_of([5, 6, 5, 5])).way == "padded"  # nearly
    assert choose(("padded", "packed"), prompt, [0] * 4, rows_of([5, 90, 5, 5])).way == "packed"
    assert choose(("padded",), [[1, 2, 3]], [0, 0], rows_of([90, 2])).way == "padded"
    # Prompts with nothing in common are each read once: 2 * 9 + 4 * 3 against 4 * 12.
    assert choose(every, [[1] * 10, [2] * 10], [0, 0, 1, 1], rows_of([3] * 4)).way == "shared"


def test_layers_that_run_again_do_not_fill_a_cache() -> None:
    lm = make("llama")
    once = reader(lm, recomputes=True)
    calls: list[int] = []
    handle = lm.body.embed_tokens.register_forward_hook(lambda module, inputs, out: calls.append(inputs[0].numel()))
    once.states([[1] * 20], [0, 0], [[2, 3], [4, 5]])
    assert calls == [2 * 21]  # whole rows
    with torch.no_grad():
        once.states([[1] * 20], [0, 0], [[2, 3], [4, 5]])
    handle.remove()
    assert calls[1:] == [19, 2 * 2]
