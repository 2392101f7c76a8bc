"""The code of docs/integrations.md, as it stands there, on tiny models."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import llama_config
from torch import nn
from transformers import LlamaForCausalLM, TrainingArguments

PAGE = (Path(__file__).parents[1] / "docs" / "integrations.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w[\w.-]*).*?\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))


def code_of(section: str, **names: Any) -> dict[str, Any]:
    """What a section's code defines."""
    (source,) = re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL)
    exec(source, names)
    return names


def model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(tie_word_embeddings=False))


@pytest.fixture
def rows() -> dict[str, torch.Tensor]:
    """Four answers of unequal length."""
    ids = torch.randint(0, 250, (4, 9), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    for i in range(4):
        labels[i, : 2 + i] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def log_probs(model: LlamaForCausalLM, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(rows["input_ids"]).logits[:, :-1].log_softmax(-1)


def divergences(student: LlamaForCausalLM, teacher: LlamaForCausalLM, rows: dict[str, torch.Tensor]) -> dict:
    """Of counted tokens."""
    mask = rows["labels"][:, 1:] != -100
    s, t = log_probs(student, rows)[mask], log_probs(teacher, rows)[mask].detach()
    mixture = torch.logaddexp(s, t) - torch.tensor(2.0).log()

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.exp() * (a - b)).sum(-1)

    return {"kl": kl(t, s), "reverse": kl(s, t), "jsd": 0.5 * (kl(t, mixture) + kl(s, mixture))}


def test_transformers_trainer(rows: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Two accumulated micro-batches are a step of SGD on the mean over all their tokens."""
    student, teacher = model(0), model(1)
    expected = copy.deepcopy(student)
    loss = divergences(expected, teacher, rows)["jsd"].mean()
    loss.backward()
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1, learning_rate=0.5,
        optim="sgd", report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, max_grad_norm=0.0,
        lr_scheduler_type="constant", per_device_eval_batch_size=4, prediction_loss_only=True,
    )  # fmt: skip
    data = [{name: tensor[i] for name, tensor in rows.items()} for i in range(4)]
    trainer = code_of("transformers.Trainer")["Distilling"](
        model=student, args=arguments, train_dataset=data, eval_dataset=data, teacher=teacher
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-4)
    trainer.train()
    for mine, start in zip(student.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, start - 0.5 * start.grad, rtol=1e-4, atol=1e-5)


def test_lightning_step(rows: dict[str, torch.Tensor]) -> None:
    student, teacher = model(0), model(1)
    module = code_of("Lightning", LightningModule=nn.Module)["Distillation"](student, teacher)
    loss = module.training_step(rows, 0)
    torch.testing.assert_close(loss, divergences(student, teacher, rows)["kl"].mean())
    assert {name.split(".")[0] for name in module.state_dict()} == {"student"}
    assert isinstance(module.configure_optimizers(), torch.optim.AdamW)


def test_lightning(rows: dict[str, torch.Tensor], tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")
    student, teacher = model(0), model(1)
    before = divergences(student, teacher, rows)["kl"].mean()
    module = code_of("Lightning", LightningModule=lightning.LightningModule)["Distillation"](student, teacher, 1e-2)
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader([rows], batch_size=None))
    assert divergences(student, teacher, rows)["kl"].mean() < before


@pytest.fixture
def pair(rows: dict[str, torch.Tensor]) -> SimpleNamespace:
    """Student and teacher with their hidden states."""
    student, teacher = model(0), model(1)
    return SimpleNamespace(
        student=student, teacher=teacher, hidden=student.model(rows["input_ids"]).last_hidden_state,
        teacher_hidden=teacher.model(rows["input_ids"]).last_hidden_state.detach(),
    )  # fmt: skip


def test_torchtitan_loss_wrapper(pair: SimpleNamespace, rows: dict[str, torch.Tensor]) -> None:
    wrapper = code_of("torchtitan")["DistilLossWrapper"]()
    wrapper.set_lm_head(pair.student.lm_head)
    loss, metrics = wrapper(
        pair.hidden[:, :-1], rows["labels"][:, 1:], torch.tensor(50), teacher_hidden=pair.teacher_hidden[:, :-1],
        teacher_weight=pair.teacher.lm_head.weight,
    )  # fmt: skip
    del pair.student.lm_head.forward
    torch.testing.assert_close(loss, divergences(pair.student, pair.teacher, rows)["kl"].sum() / 50)
    assert metrics == {}
    loss.backward()
    assert pair.student.lm_head.weight.grad.norm() > 0


def test_verl(pair: SimpleNamespace, rows: dict[str, torch.Tensor]) -> None:
    """Packed rows and a nested teacher, as the engine has them."""
    config = SimpleNamespace(distillation_loss=SimpleNamespace(kd_temperature=1.0))
    nested = torch.nested.nested_tensor(list(pair.teacher_hidden), layout=torch.jagged)
    losses = code_of("verl")["compute_forward_kl"](
        pair.hidden.flatten(0, 1)[None], pair.student.lm_head.weight, nested, pair.teacher.lm_head.weight, config, "thd"
    )["distillation_losses"]
    mask = rows["labels"][:, 1:] != -100
    expected = divergences(pair.student, pair.teacher, rows)["kl"]
    assert losses.shape == (1, 36) and losses.requires_grad
    torch.testing.assert_close(losses.view(4, 9)[:, :-1][mask], expected)


def test_nemo_rl(pair: SimpleNamespace, rows: dict[str, torch.Tensor]) -> None:
    loss_function = code_of("NeMo-RL")["HiddenStateReverseKL"](pair.teacher.lm_head.weight)
    data = {
        "token_mask": (rows["labels"] != -100).float(), "sample_mask": torch.tensor([1.0, 0.0, 1.0, 1.0]),
        "teacher_full_hidden_states": pair.teacher_hidden,
    }  # fmt: skip
    loss, metrics = loss_function(
        data, torch.tensor(3), torch.tensor(40), student_hidden=pair.hidden, student_weight=pair.student.lm_head.weight
    )
    counted = {name: tensor[[0, 2, 3]] for name, tensor in rows.items()}
    expected = divergences(pair.student, pair.teacher, counted)["reverse"].sum() / 40
    torch.testing.assert_close(loss, expected)
    assert torch.equal(metrics["loss"], loss.detach())
