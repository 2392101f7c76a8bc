"""Pre-training: the model learns the task's habit without a correction, and the right answer with one.

Half of a batch reads corrections. Some characters of its answer prefixes are replaced at random while the targets stay,
so that the model learns to return to the right answer from states that only a student visits: a teacher is asked for
that. The pre-trained model is cached in the study's folder.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from studies.compare.decoder import Decoder
from studies.compare.digit_tasks import END, TASKS, any_signs, truncate


@dataclass(frozen=True)
class Pretraining:
    """The settings that decide a pre-trained model; `batch` counts problems."""

    task: str
    seed: int
    steps: int
    batch: int = 192
    learning_rate: float = 3e-3
    replaced: float = 0.1
    """Share of the characters of answer prefixes that are replaced at random."""


def pretrained(settings: Pretraining, folder: Path) -> Decoder:
    """Loads the model of these settings from the folder, or pre-trains it and stores it there."""
    path = folder / f"{settings.task}-{settings.seed}.pt"
    if path.exists():
        checkpoint = torch.load(path, weights_only=True)
        if checkpoint["settings"] == asdict(settings):
            model = Decoder()
            model.load_state_dict(checkpoint["model"])
            return model
    model = pretrain(settings)
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    torch.save({"settings": asdict(settings), "model": model.state_dict()}, part)
    part.replace(path)
    return model


def pretrain(settings: Pretraining) -> Decoder:
    """Pre-trains a model; everything random follows from the settings' seed."""
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    task, model = TASKS[settings.task], Decoder()
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, settings.steps, pct_start=0.1)
    for _ in range(settings.steps):
        problems = task.problems(settings.batch, generator)
        half = settings.batch // 2
        corrections = task.answer(problems[:half])
        targets = any_signs(torch.cat([corrections, task.habit(problems[half:], generator)]), generator)
        prompts = torch.cat([task.prompts(problems[:half], corrections), task.prompts(problems[half:])])
        is_replaced = torch.rand(targets.shape, generator=generator) < settings.replaced
        is_replaced[half:] = False
        prefixes = torch.where(is_replaced, torch.randint(0, END + 1, targets.shape, generator=generator), targets)
        _, answer_mask = truncate(targets)
        hidden = model.answer_hidden(prompts, prefixes)[answer_mask]
        loss = F.cross_entropy(model.head(hidden), targets[answer_mask])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model
