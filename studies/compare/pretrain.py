"""Pre-training: the habit of the task without a correction, the corrected answer with one.

Half of a batch reads corrections. Some characters of the answers that it has given so far are replaced at random
while the targets stay, so that a reader finds back from states that only a student visits: that is what a teacher is
asked there. The result is cached beside the study's runs.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from studies.compare.model import Decoder
from studies.compare.tasks import END, TASKS, any_signs, cut


@dataclass(frozen=True)
class Pretraining:
    task: str
    seed: int
    steps: int
    batch: int = 192
    learning_rate: float = 3e-3
    replaced: float = 0.1
    """Share of the answer's characters that are misread."""


def pretrained(settings: Pretraining, folder: Path) -> Decoder:
    """The model of these settings, from the folder if it is there."""
    path = folder / f"{settings.task}-{settings.seed}.pt"
    if path.exists():
        found = torch.load(path, weights_only=True)
        if found["settings"] == asdict(settings):
            model = Decoder()
            model.load_state_dict(found["model"])
            return model
    model = pretrain(settings)
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    torch.save({"settings": asdict(settings), "model": model.state_dict()}, part)
    part.replace(path)
    return model


def pretrain(settings: Pretraining) -> Decoder:
    torch.manual_seed(settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    task, model = TASKS[settings.task], Decoder()
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, settings.steps, pct_start=0.1)
    for _ in range(settings.steps):
        problems = task.problems(settings.batch, generator)
        half = settings.batch // 2
        right = task.answer(problems[:half])
        targets = any_signs(torch.cat([right, task.habit(problems[half:], generator)]), generator)
        prompts = torch.cat([task.prompts(problems[:half], right), task.prompts(problems[half:])])
        replaced = torch.rand(targets.shape, generator=generator) < settings.replaced
        replaced[half:] = False
        read = torch.where(replaced, torch.randint(0, END + 1, targets.shape, generator=generator), targets)
        _, belongs = cut(targets)
        hidden = model.answer_hidden(prompts, read)[belongs]
        loss = F.cross_entropy(model.head(hidden), targets[belongs])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model
