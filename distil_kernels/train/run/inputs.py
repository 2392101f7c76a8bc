"""What a run reads beside its configuration and its models, by checksum: a resumed run must read the same."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json

from transformers import PreTrainedTokenizerBase

from distil_kernels.train.config import Config
from distil_kernels.train.environments import environment_source
from distil_kernels.train.feedback.kinds import judge_source
from distil_kernels.train.tasks import record_file


def inputs(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Returns checksums of the task's file, of the files that a user's judge and environment stand in, and of the
    tokenizer, by name.

    What they import is not in it. Of reasoning-gym's tasks it is the package's version.
    """
    found = {f"the vocabulary of --model {config.model}": json.dumps(sorted(tokenizer.get_vocab().items())).encode()}
    if config.layout == "chat":
        found[f"the chat template of --model {config.model}"] = json.dumps(tokenizer.chat_template).encode()
    if config.task.startswith("reasoning_gym:"):
        found["reasoning-gym"] = importlib.metadata.version("reasoning-gym").encode()
    if (records := record_file(config.task)) is not None:
        found[f"the file of --task {config.task}"] = records.read_bytes()
    if (judge := judge_source(config.feedback)) is not None:
        found[f"the file of --feedback {config.feedback}"] = judge.read_bytes()
    if config.environment_name and (environment := environment_source(config.environment_name)) is not None:
        found[f"the file of --environment {config.environment}"] = environment.read_bytes()
    return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


def differences(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """Returns a phrase for each input that is another one than before."""
    return [f"{name} has changed" for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
