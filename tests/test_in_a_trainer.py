"""README's code, as it stands there: compute_loss in a transformers.Trainer, and models split into their parts."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import SMALL, llama_config
from torch.nn import functional
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import distil_kernels
from distil_kernels.hf import split

README = (Path(__file__).parents[1] / "README.md").read_text()


def model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config(tie_word_embeddings=False))


def trained(tmp_path: Path, source: str, num_accumulated: int) -> list[torch.Tensor]:
    """Parameters after two steps of SGD on four answers of unequal length."""
    teacher = model(1)
    scope: dict[str, Any] = {
        **vars(torch),
        **vars(functional),
        "fused_forward_ce": distil_kernels.fused_forward_ce,
        "torch": torch,
        "teacher": teacher,
    }
    exec(textwrap.dedent(source), scope)
    student = model(0)
    rows = torch.randint(0, 250, (4, 9), generator=torch.Generator().manual_seed(2))
    labels = rows.clone()
    for i in range(4):
        labels[i, : 2 + i] = -100
    data = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4 // num_accumulated, gradient_accumulation_steps=num_accumulated,
        max_steps=2, learning_rate=0.5, optim="sgd", report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        max_grad_norm=0.0, lr_scheduler_type="constant",
    )  # fmt: skip
    type("Distilling", (Trainer,), {"compute_loss": scope["compute_loss"]})(
        model=student, args=arguments, train_dataset=data
    ).train()
    return [parameter.detach() for parameter in student.parameters()]


NAIVE = """
def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
    mask = inputs.pop("labels")[:, 1:] != -100
    with torch.no_grad():
        taught = teacher(**inputs).logits[:, :-1].softmax(-1)
    ce = -(taught * log_softmax(model(**inputs).logits[:, :-1], -1)).sum(-1)
    return ce[mask].sum() / num_items_in_batch
"""


@pytest.mark.parametrize("num_accumulated", [1, 2])
def test_readmes_compute_loss_is_the_loss_over_full_logits(num_accumulated, tmp_path):
    (ours,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "def compute_loss" in block)
    for mine, naive in zip(
        trained(tmp_path, ours, num_accumulated), trained(tmp_path, NAIVE, num_accumulated), strict=True
    ):
        torch.testing.assert_close(mine, naive, rtol=1e-4, atol=1e-5)


def test_readmes_split_is_the_loss_over_full_logits() -> None:
    (source,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "split(student)" in block)
    torch.manual_seed(0)
    student = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=3.0)).eval()
    teacher = CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25)).eval()
    inputs = {
        "input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    scope: dict[str, Any] = {"fused_forward_ce": distil_kernels.fused_forward_ce, "split": split, "inputs": inputs}
    scope |= {"student": student, "teacher": teacher}
    exec(source, scope)
    with torch.no_grad():
        logprobs, probs = student(**inputs).logits.log_softmax(-1), teacher(**inputs).logits.softmax(-1)
    torch.testing.assert_close(scope["loss"], -(probs * logprobs).sum(-1).mean())
