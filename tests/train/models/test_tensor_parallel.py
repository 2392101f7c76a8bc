"""One model in two processes: gradients of whole models, halves of weights, one verdict; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_steps, refused, start, two_steps
from tiny import SMALL, byte_tokenizer, llama_config
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, PretrainedConfig, Qwen3Config
from two_processes import together

from distil_kernels.train.__main__ import main
from distil_kernels.train.build import build
from distil_kernels.train.config import Config
from distil_kernels.train.models import tensor_parallel
from distil_kernels.train.models.sharding import local_shard
from distil_kernels.train.optimizer import clip_gradients

pytestmark = pytest.mark.slow

MODELS: dict[str, PretrainedConfig] = {
    # Five vocabularies that two do not divide, one padded.
    "tied": llama_config(vocab_size=261, pad_token_id=3),
    "untied": llama_config(tie_word_embeddings=False, vocab_size=263, intermediate_size=47),
    "three heads": llama_config(num_attention_heads=3, num_key_value_heads=1, hidden_size=24, intermediate_size=45),
    "norms of heads": Qwen3Config(head_dim=8, max_position_embeddings=512, **{**SMALL, "vocab_size": 265}),
    "no plan": GPT2Config(
        vocab_size=267,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        bos_token_id=None,
        eos_token_id=0,
        initializer_range=0.2,
    ),
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention whole, layers recomputed, ema teacher, two updates": (
        "three heads", {"teacher": "ema", "gradient_checkpointing": True, "updates_per_batch": 2},
    ),
    "partial gradients, micro-batches of 1, teacher of more tokens": (
        "norms of heads", {"teacher": "local", "teacher_model": "no plan", "micro_batch_prompts": 1},
    ),
    "teacher of fewer tokens, rewards, a reference": (
        "untied", {"teacher": "local", "teacher_model": "tied", "reward_weight": 0.5, "reference_weight": 0.2},
    ),
    "vocabulary alone, no teacher": ("no plan", {"teacher": "live", "objective": "policy_gradient"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return folder


def gradients(rank: int, models: Path, directory: Path, members: int) -> None:
    for name, (model, settings) in METHODS.items():
        settings = {"prompts_per_step": 4, "max_prompt_tokens": 400, "tensor_parallel": members, **settings}
        if "teacher_model" in settings:
            settings["teacher_model"] = str(models / settings["teacher_model"])
        torch.save(two_steps(models / model, directory / f"{name} {rank}", **settings), directory / f"{name} {rank}.pt")


def test_gradients_are_those_of_one_process(models: Path, tmp_path: Path) -> None:
    alone, two = tmp_path / "alone", tmp_path / "two"
    alone.mkdir()
    two.mkdir()
    gradients(0, models, alone, 1)
    assert together(gradients, models, two, 2) == [0, 0]
    for name in METHODS:
        expected, *found = (torch.load(path / f"{name} {rank}.pt") for path, rank in ((alone, 0), (two, 0), (two, 1)))
        for steps in found:
            assert_same_steps(steps, expected, name)


def held(rank: int, models: Path, directory: Path) -> None:
    parts = build(Config(model=str(models / "three heads"), tensor_parallel=2, teacher="live"), directory)
    model, student = parts.models.student.model, parts.models.student
    assert any("num_attention_heads 3 and num_key_value_heads 1" in note for note in parts.data.notes)
    sizes = {name: local_shard(weight).numel() / weight.numel() for name, weight in model.named_parameters()}
    for name, share in sizes.items():
        is_in_parts = "mlp" in name or "embed" in name
        assert share == pytest.approx(0.5, abs=0.05) if is_in_parts else share == 1.0, name
    assert student.vocab_group is not None and student.vocab_group.size() == 2
    # A vote that the members take differently is the first one's, and so is an error.
    assert parts.processes.once(lambda: rank) == 0
    with pytest.raises(ValueError, match="of 0"):
        parts.processes.once(lambda: (_ for _ in ()).throw(ValueError(f"of {rank}")))


def test_each_holds_half_and_hears_one_verdict(models: Path, tmp_path: Path) -> None:
    assert together(held, models, tmp_path) == [0, 0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tensor_parallel", "3"], "[tensor_parallel] expected a divisor of the 2 processes of the run, got 3"),
        (["--tensor_parallel", "2", "--shard"], "[shard] tensor_parallel takes False, got True"),
        (["--tensor_parallel", "2", "--lora_rank", "2"], "[lora_rank] tensor_parallel takes 0, got 2"),
    ],
)
def test_what_does_not_go_together_is_refused(
    tiny_model: Path, tmp_path: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*start(tiny_model, tmp_path, "run", 1), *options]
    if options[1] == "3":
        main_status, other = together(refused, arguments, tmp_path)
        assert main_status == 2 and other != 0
        assert said in (tmp_path / "0.txt").read_text()
        return
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in capsys.readouterr().err


def test_an_unknown_rule_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_config(MODELS["tied"])
    monkeypatch.setattr(model, "_tp_plan", {"model.layers.*.mlp.experts": "moe_tp_experts"})
    mesh: Any = type("Mesh", (), {"size": lambda self: 2})()
    with pytest.raises(ValueError, match=r"\[tensor_parallel\] the tp_plan of LlamaForCausalLM has moe_tp_experts"):
        tensor_parallel.cut(model, mesh)


def test_gradients_are_clipped_to_their_norm() -> None:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0, 0.0]), torch.full((2, 2), 2.0)
    assert clip_gradients(parameters, 10.0) == 5.0 and parameters[0].grad[0] == 3.0
    assert clip_gradients(parameters, 1.0) == 5.0
    torch.testing.assert_close(parameters[0].grad[0], torch.tensor(0.6))
    assert parameters[2].grad is None
