"""Another model as teacher: its own body, head, bias and scale, and vocabularies that are not quite the student's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import metrics, packed, train, trainer
from tiny import SMALL, byte_tokenizer, llama_config
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GenerationConfig, PreTrainedModel

from distil_kernels.hf import split
from distil_kernels.train.baseline import PositionAverage
from distil_kernels.train.config import Config
from distil_kernels.train.models.reading import Reader, reader
from distil_kernels.train.objective import distil_loss
from distil_kernels.train.teachers.in_process import InProcessTeacher, check_same_tokens

PROMPTS, ROWS, COMPLETIONS = [[1, 2, 3], [1, 4]], [0, 0, 1, 1], [[5, 6], [7], [8, 9, 10], [11]]
CONFIG = Config(
    cost="ce", credit_span="none", baseline="none", rollouts_per_prompt=2, teacher="local", teacher_model="other"
)


def model(config: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config).eval()


def wide(**changes: object) -> PreTrainedModel:
    """Twice the student's hidden size, another depth, a head of its own."""
    settings = {"hidden_size": 64, "num_hidden_layers": 1, "tie_word_embeddings": False, **changes}
    return model(llama_config(**settings))


def state_logprobs(lm: PreTrainedModel, num_tokens: int) -> torch.Tensor:
    """[N, num_tokens] at the states of COMPLETIONS, each read alone by the model's own forward."""
    rows = []
    for row, done in zip(ROWS, COMPLETIONS, strict=True):
        for seen in range(len(done)):
            logits = lm(torch.tensor([PROMPTS[row] + done[:seen]])).logits[0, -1].double()
            rows.append(logits[:num_tokens].log_softmax(-1))
    return torch.stack(rows)


def ours(lm: Reader, teacher: InProcessTeacher, mine: torch.Tensor) -> torch.Tensor:
    batch = packed(PROMPTS, ROWS, COMPLETIONS)
    average = PositionAverage(8, 0.1, mine.device)
    return distil_loss(lm, mine, teacher.target(batch), batch, CONFIG, average, 1.0)[0]


@pytest.mark.parametrize(
    ("rows", "kind"), [(260, "wide"), (320, "wide"), (257, "wide"), (260, "cohere")], ids=lambda value: str(value)
)
def test_the_loss_is_the_cross_entropy_to_the_other_models_own_forward(
    rows: int, kind: str, generator: torch.Generator
) -> None:
    """Heads as large as the student's, padded further, padded less; a logit scale and an attention of another kind."""
    torch.manual_seed(generator.initial_seed())
    lm = reader(split(model(llama_config())))
    if kind == "wide":
        other = wide(vocab_size=rows)
    else:
        shape = llama_config().to_dict()
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        other = model(CohereConfig(**{name: shape[name] for name in names}, logit_scale=0.5, initializer_range=0.2))
    teacher = InProcessTeacher(lm, "local", 0.0, other)
    before = [parameter.clone() for parameter in other.parameters()]
    with torch.no_grad():
        mine = torch.cat(
            [
                lm.hidden(torch.tensor([PROMPTS[row] + done]))[0, len(PROMPTS[row]) - 1 : -1]
                for row, done in zip(ROWS, COMPLETIONS, strict=True)
            ]
        )
        taught = state_logprobs(other, 260)
        student_logprobs = state_logprobs(lm.model, 260)
    expected = -(taught.exp() * student_logprobs[:, : taught.shape[1]]).sum()
    found = ours(lm, teacher, mine.requires_grad_())
    torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=0)
    found.backward()
    assert mine.grad is not None and lm.weight.grad is not None and torch.isfinite(lm.weight.grad).all()
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), before, strict=True))
    assert not any(parameter.requires_grad for parameter in other.parameters()) and teacher.state_dict() == {}


def test_a_run_learns_from_another_model_and_resumes(tiny_model: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    wide(vocab_size=320).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    options = ["--teacher", "local", "--teacher_model", str(tmp_path / "other")]
    whole = train(tiny_model, tmp_path, "whole", *options)
    halves = train(tiny_model, tmp_path, "halves", *options, steps=2)
    from distil_kernels.train.__main__ import main

    assert main(["--resume", str(halves), "--steps", "3"]) == 0
    assert [r for r in metrics(halves) if r["kind"] == "step"] == [r for r in metrics(whole) if r["kind"] == "step"]
    wide(vocab_size=320).save_pretrained(tmp_path / "other")  # other weights under the same name
    assert main(["--resume", str(halves), "--steps", "4"]) == 2


def test_an_answer_ends_where_the_teacher_would_end_it(tiny_model: Path, tmp_path: Path) -> None:
    """A base student of an instructed teacher: with its own end alone its answers would run on."""
    other = wide()
    other.generation_config.eos_token_id = [0, 99]
    other.save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    run = trainer(tiny_model, tmp_path / "run", teacher="local", teacher_model=str(tmp_path / "other"), layout="chat")
    assert run.sampling.stop_ids == [0, 99]
    run.save()
    saved = GenerationConfig.from_pretrained(tmp_path / "run" / "checkpoint")
    assert saved.eos_token_id == [0, 99]


def capped(**changes: object) -> PreTrainedModel:
    settings = {**SMALL, "head_dim": 8, "final_logit_softcapping": 3.0, **changes}
    return model(Gemma2Config(**settings))


@pytest.mark.parametrize("student_is_capped", [False, True])
def test_each_model_has_its_own_softcap_and_scale(student_is_capped: bool) -> None:
    torch.manual_seed(0)
    scaled = CohereConfig(**SMALL, logit_scale=0.25)
    lm, other = (capped(), model(scaled)) if student_is_capped else (model(scaled), capped())
    student = reader(split(lm))
    teacher = InProcessTeacher(student, "local", 0.0, other)
    with torch.no_grad():
        hidden = torch.cat(
            [
                student.hidden(torch.tensor([PROMPTS[row] + done]))[0, len(PROMPTS[row]) - 1 : -1]
                for row, done in zip(ROWS, COMPLETIONS, strict=True)
            ]
        )
        expected = -(state_logprobs(other, 260).exp() * state_logprobs(lm, 260)).sum()
        torch.testing.assert_close(ours(student, teacher, hidden).double(), expected, rtol=2e-5, atol=0)


def test_what_the_loss_cannot_express_is_said() -> None:
    lm = reader(split(model(llama_config())))
    with pytest.raises(ValueError, match=r"\[teacher_model\] its head has 250 rows, .* capped logits cannot say"):
        InProcessTeacher(lm, "local", 0.0, capped(vocab_size=250))
    for given in ({"teacher": "local"}, {"teacher_model": "somewhere"}):
        with pytest.raises(ValueError, match=r"\[teacher_model\] belongs to teachers local"):
            Config(**given).check()


def test_tokenizers_are_compared_token_by_token() -> None:
    mine = byte_tokenizer()
    check_same_tokens(mine, byte_tokenizer())
    longer = byte_tokenizer()
    longer.add_tokens(["<extra>"])
    check_same_tokens(mine, longer)
    check_same_tokens(longer, mine)
    mine.add_tokens(["<other>"])
    with pytest.raises(ValueError, match=r"1 of 258 token ids .* id 257 is '<other>' to the student, '<extra>'"):
        check_same_tokens(mine, longer)
